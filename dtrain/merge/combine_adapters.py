"""Two LoRA adapters → one with the effect of both, for serving without a merge.

W + s1·B1·A1 + s2·B2·A2 = W + [s1·B1, s2·B2]·[A1; A2]: the ranks add up, and the scales go into B.
A smaller rank gives the nearest matrix of that rank (Eckart-Young), computed from the thin
factors: with B = Qb·Rb and Aᵀ = Qa·Ra, the singular values of B·A are those of Rb·Raᵀ [k, k].

Letters: r rank, k sum of the ranks, out and in a layer's sizes; A [r, in], B [out, r].
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from dtrain.core.errors import Exit, UserError
from dtrain.core.files import atomic_folder, write_json
from dtrain.core.log import progress
from dtrain.core.run_dir import RunDir
from dtrain.core.stage_dir import ADAPTER_CONFIG, MERGE_MANIFEST, read_merge_manifest
from dtrain.core.weight_files import PEFT_PREFIX
from dtrain.distributed.tensor_utils import all_finite
from dtrain.merge.adapter_tensors import AdapterFile
from dtrain.merge.weight_delta import check_config, layer_from_config
from dtrain.models.peft_format import (
    CHAT_TEMPLATE,
    COMBINED,
    GENERATION,
    WEIGHTS,
    AdapterOrigin,
    adapter_base,
    base_reference,
    read_adapter_config,
    read_adapter_origin,
)

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
# Settings that can be merged, but add something other than scale·B·A.
NOT_PLAIN = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices")
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
Factors = tuple[Tensor, Tensor]  # A [r, in] and B [out, r], with every scale in B


@dataclass(frozen=True)
class CombineResult:
    """The combined adapter.

    Attributes:
        rank: of every layer, with rows of zeros where a layer needs less.
        error: ‖truncated − exact‖ / ‖exact‖ over all layers, Frobenius; 0 if exact.
        worst_layer: the layer with the largest error; empty if exact.
    """

    rank: int
    error: float
    worst_layer: str
    size_bytes: int
    base: str


def combine_adapters(
    first: Path, second: Path, out: Path, *, rank: int | None = None
) -> CombineResult:
    """Write the adapter that has the effect of `first` followed by `second`.

    It is written in float32 with one rank and one scale for all layers, which every server reads.

    Args:
        first: an adapter of a base.
        second: an adapter of the same base, or of that base with `first` merged into it.
        out: a new folder; it appears complete or not at all.
        rank: of the result; None: the exact sum's.

    Raises:
        UserError: not plain LoRA, different bases, `second` was trained over a merged model in
            NF4, a value that is not finite, a rank that truncates nothing, `out` exists.
    """
    configs = [_plain_config(folder) for folder in (first, second)]
    joined = _combined_origin(first, second)
    if configs[0].get("fan_in_fan_out") != configs[1].get("fan_in_fan_out"):
        raise UserError("the two disagree on fan_in_fan_out", where=str(second))
    exact = _sums(_read(first, configs[0]), _read(second, configs[1]))
    exact_rank = max(a.shape[0] for a, _ in exact.values())
    if rank is not None and rank >= exact_rank:
        message = f"the exact sum has only rank {exact_rank}"
        raise UserError(message, where=f"--rank {rank}", fix="leave --rank out")
    layers, error, worst = _truncate(exact, rank) if rank else (exact, 0.0, "")
    tensors = dict(_named(layers, rank or exact_rank))
    base = adapter_base(first)
    config = _config(configs, rank or exact_rank, [*layers])
    config["base_model_name_or_path"] = base and base_reference(base, out, _run_of(first))
    record = {
        "origin": asdict(joined),
        "combined_from": {str(path): AdapterFile(path).fingerprint() for path in (first, second)},
        "rank": rank or exact_rank,
        "relative_error": error,
        "worst_layer": worst,
    }
    with atomic_folder(out) as target:
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        write_json(target / ADAPTER_CONFIG, config)
        write_json(target / COMBINED, record)
        for folder in (first, second):  # of a file that both have, the second's
            for name in (CHAT_TEMPLATE, GENERATION):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, target / name)
    size = (out / WEIGHTS).stat().st_size
    return CombineResult(rank or exact_rank, error, worst, size, str(base))


def _run_of(adapter: Path) -> Path:
    """The run folder that an adapter is in; its own folder if it is in none."""
    folders = adapter.absolute().parents
    return next((folder for folder in folders if RunDir(folder).recipe.is_file()), adapter)


def _plain_config(folder: Path) -> dict[str, Any]:
    config = read_adapter_config(folder)
    check_config(config, folder / ADAPTER_CONFIG)
    odd = [key for key in NOT_PLAIN if config.get(key)]
    odd += [config["peft_type"]] * (config["peft_type"] != "LORA")
    odd += ["bias"] * (config.get("bias", "none") != "none")
    if odd:
        raise UserError(
            f"an adapter with {odd[0]} is not a plain sum",
            where=str(folder / ADAPTER_CONFIG),
            fix="merge it into its base instead",
        )
    return config


def _combined_origin(first: Path, second: Path) -> AdapterOrigin:
    """Return the origin of the combined adapter.

    Raises:
        UserError: the second was trained neither after the first nor on the same base.
    """
    a, b = read_adapter_origin(first), read_adapter_origin(second)
    if _was_trained_after(first, second, a, b):
        if b.base_in_nf4:
            raise UserError(
                "was trained over the merged model in NF4, which rounded base and first adapter "
                "together: no adapter of the first base is equal to that",
                where=str(second),
                fix="serve the merged model, or this adapter on the merged model before it",
            )
        return AdapterOrigin(b.identity, a.parent, a.base_in_nf4, "combined")
    bases = [adapter_base(folder) for folder in (first, second)]
    same = a.parent == b.parent if a.parent and b.parent else bases[0] == bases[1]
    if not same or a.base_in_nf4 != b.base_in_nf4:
        raise UserError(
            f"was trained on {bases[1]}, which is neither {bases[0]} nor that model with {first} "
            "merged into it",
            where=str(second),
            fix="combine an adapter with the one trained right after it",
        )
    return AdapterOrigin(None, a.parent, a.base_in_nf4, "combined")


def _was_trained_after(first: Path, second: Path, a: AdapterOrigin, b: AdapterOrigin) -> bool:
    """Return whether the second adapter was trained on the model with `first` merged into it."""
    if a.identity is not None and b.parent is not None:
        return a.identity == b.parent
    base = Path(adapter_base(second) or "-")
    if not (base / MERGE_MANIFEST).is_file():
        return False
    merged = read_merge_manifest(base).get("adapters", [])
    content = AdapterFile(first).fingerprint()
    return [(item.get("adapter"), item.get("weight")) for item in merged] == [(content, 1.0)]


def _read(folder: Path, config: dict[str, Any]) -> dict[str, Factors]:
    """Return the factors of every layer, in float32."""
    file = AdapterFile(folder)
    tensors = {key: file.get(key) for key in file.shapes}
    for key, tensor in tensors.items():
        if not key.startswith(PEFT_PREFIX) or not key.endswith((DOWN, UP)) or tensor.dim() != 2:
            raise UserError(f"{key} does not belong to a plain LoRA adapter", where=str(folder))
        if not all_finite(tensor):
            raise UserError(f"{key} is not finite", where=str(folder), status=Exit.NON_FINITE)
    names = sorted({key.removesuffix(DOWN).removesuffix(UP) for key in tensors})
    if not names:
        raise UserError("the adapter has no tensors", where=str(folder))
    return {
        name.removeprefix(PEFT_PREFIX): _factors(tensors, name, folder, config) for name in names
    }


def _factors(
    tensors: Mapping[str, Tensor], name: str, folder: Path, config: dict[str, Any]
) -> Factors:
    if name + DOWN not in tensors or name + UP not in tensors:
        raise UserError(f"{name} has only half of an adapter", where=str(folder))
    a, b = tensors[name + DOWN], tensors[name + UP]
    layer = layer_from_config(config, name.removeprefix(PEFT_PREFIX), {}, a.shape[0])
    if config.get("target_parameters") and a.shape[0] == b.shape[1] != layer.r:
        raise UserError(
            f"{name.removeprefix(PEFT_PREFIX)} is an adapter of experts, which are not combined",
            where=str(folder),
            fix="merge them into their base: `dtrain merge BASE ADAPTER OUT`",
        )
    if not a.shape[0] == b.shape[1] == layer.r:
        shapes = f"A {[*a.shape]}, B {[*b.shape]}"
        message = f"ranks of {name} disagree: {layer.r} by the config, {shapes}"
        raise UserError(message, where=str(folder))
    return a, b * layer.scale


def _sums(first: dict[str, Factors], second: dict[str, Factors]) -> dict[str, Factors]:
    """Return [B1, B2]·[A1; A2] for each layer; a layer that only one adapter has stays as it is."""
    sums = {}
    for name in sorted(first.keys() | second.keys()):
        pairs = [factors[name] for factors in (first, second) if name in factors]
        if len({(a.shape[1], b.shape[0]) for a, b in pairs}) > 1:
            raise UserError(f"{name} has different shapes in the two adapters")
        sums[name] = torch.cat([a for a, _ in pairs]), torch.cat([b for _, b in pairs], dim=1)
    return sums


def _truncate(exact: dict[str, Factors], rank: int) -> tuple[dict[str, Factors], float, str]:
    """Return every layer at `rank`, the error over all layers, and the layer with the largest."""
    truncated, lost, total, worst = {}, 0.0, 0.0, (0.0, "")
    with progress("truncating", len(exact)) as bar:
        for name, factors in exact.items():
            truncated[name], values = nearest_of_rank(factors, rank)
            layer_lost, layer_total = (float(v.square().sum()) for v in (values[rank:], values))
            lost, total = lost + layer_lost, total + layer_total
            worst = max(worst, (layer_lost / layer_total if layer_total else 0.0, name))
            bar.advance()
    return truncated, math.sqrt(lost / total) if total else 0.0, worst[1]


def nearest_of_rank(factors: Factors, rank: int) -> tuple[Factors, Tensor]:
    """Return the nearest product of this rank, and all singular values; computed in float64."""
    a, b = (factor.double() for factor in factors)
    qa, ra = torch.linalg.qr(a.T)
    qb, rb = torch.linalg.qr(b)
    u, values, vt = torch.linalg.svd(rb @ ra.T)
    roots = values[:rank].sqrt()
    down = (qa @ vt[:rank].T * roots).T
    up = qb @ u[:, :rank] * roots
    return (down.float(), up.float()), values


def _named(layers: dict[str, Factors], rank: int) -> list[tuple[str, Tensor]]:
    """Return tensors by PEFT's names, padded with zeros so that all layers have one rank."""
    named = []
    for name, (a, b) in layers.items():
        missing = rank - a.shape[0]
        named.append((f"{PEFT_PREFIX}{name}{DOWN}", pad(a, (0, 0, 0, missing)).contiguous()))
        named.append((f"{PEFT_PREFIX}{name}{UP}", pad(b, (0, missing)).contiguous()))
    return named


def _config(configs: list[dict[str, Any]], rank: int, layers: list[str]) -> dict[str, Any]:
    """Return the first adapter's settings with a scale of 1 (alpha equal to the rank)."""
    targets: list[Any] = [config.get("target_modules") for config in configs]
    narrowed = any(config.get(key) for config in configs for key in NARROWING)
    by_name = all(isinstance(names, list) for names in targets) and not narrowed
    return configs[0] | {
        "r": rank,
        "lora_alpha": rank,
        "use_rslora": False,
        "rank_pattern": {},
        "alpha_pattern": {},
        "lora_dropout": 0.0,
        "init_lora_weights": True,
        "target_modules": sorted({n for names in targets for n in names}) if by_name else layers,
        **{key: None for key in NARROWING},
        "inference_mode": True,
    }
