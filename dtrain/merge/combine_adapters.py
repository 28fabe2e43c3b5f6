"""Two LoRA adapters → one that changes the base as both do, for serving without a merge.

W + s1·B1·A1 + s2·B2·A2 = W + [s1·B1, s2·B2]·[A1; A2]: the ranks add up and the scales go into B.
Cut to a smaller rank it is the nearest matrix of that rank (Eckart-Young), found from the thin
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
from dtrain.core.files import atomic_folder, read_json, write_json
from dtrain.core.log import progress
from dtrain.core.run_dir import MERGE_MANIFEST
from dtrain.merge.adapter import PREFIX, AdapterFile, by_config
from dtrain.merge.adapter_config import check_config
from dtrain.models.peft_format import (
    CHAT_TEMPLATE,
    COMBINED,
    CONFIG,
    GENERATION,
    WEIGHTS,
    Origin,
    origin,
    read_adapter_config,
)
from dtrain.models.tensor_utils import all_finite

DOWN, UP = ".lora_A.weight", ".lora_B.weight"
# Settings that can be merged, but add something else than scale·B·A.
NOT_PLAIN = ("use_dora", "modules_to_save", "lora_bias", "trainable_token_indices")
NARROWING = ("exclude_modules", "layers_to_transform", "layers_pattern")
Factors = tuple[Tensor, Tensor]  # A [r, in] and B [out, r], with every scale in B


@dataclass(frozen=True)
class Stacked:
    """What was made.

    Attributes:
        rank: of every layer, with rows of zeros where a layer needs less.
        error: ‖cut − exact‖ / ‖exact‖ over all layers, Frobenius; 0 if nothing was cut.
        worst: the layer with the largest error of its own; empty if nothing was cut.
    """

    rank: int
    error: float
    worst: str
    size_bytes: int
    base: str


def stack(first: Path, second: Path, out: Path, *, rank: int | None = None) -> Stacked:
    """Write the adapter that does what `first` and then `second` do.

    It is written in float32 with one rank and one scale for all layers, which every server reads.

    Args:
        first: of a base.
        second: of the same base, or of that base with `first` merged into it.
        out: a new folder; it appears whole or not at all.
        rank: of the result; None: the exact sum's.

    Raises:
        UserError: not plain LoRA, another base, trained over a model that was quantised anew, a
            value that is not finite, a rank that would cut nothing, `out` is there.
    """
    configs = [_plain_config(folder) for folder in (first, second)]
    made_from = _joined(first, second, configs)
    if configs[0].get("fan_in_fan_out") != configs[1].get("fan_in_fan_out"):
        raise UserError("the two disagree on fan_in_fan_out", where=str(second))
    exact = _sums(_read(first, configs[0]), _read(second, configs[1]))
    whole = max(a.shape[0] for a, _ in exact.values())
    if rank is not None and rank >= whole:
        what = f"the exact sum has rank {whole} already"
        raise UserError(what, where=f"--rank {rank}", fix="leave --rank out")
    layers, error, worst = _cut(exact, rank) if rank else (exact, 0.0, "")
    tensors = dict(_named(layers, rank or whole))
    config = _config(configs, rank or whole, [*layers])
    about = {
        "origin": asdict(made_from),
        "made_from": {str(path): AdapterFile(path).mark() for path in (first, second)},
        "rank": rank or whole,
        "relative_error": error,
        "worst_layer": worst,
    }
    with atomic_folder(out) as target:
        save_file(tensors, target / WEIGHTS, metadata={"format": "pt"})
        write_json(target / CONFIG, config)
        write_json(target / COMBINED, about)
        for folder in (first, second):  # a later one's name for what is in both
            for name in (CHAT_TEMPLATE, GENERATION):
                if (folder / name).is_file():
                    shutil.copyfile(folder / name, target / name)
    size = (out / WEIGHTS).stat().st_size
    return Stacked(rank or whole, error, worst, size, str(config["base_model_name_or_path"]))


def _plain_config(folder: Path) -> dict[str, Any]:
    config = read_adapter_config(folder)
    check_config(config, folder / CONFIG)
    odd = [key for key in NOT_PLAIN if config.get(key)]
    odd += [config["peft_type"]] * (config["peft_type"] != "LORA")
    odd += ["bias"] * (config.get("bias", "none") != "none")
    if odd:
        raise UserError(
            f"an adapter with {odd[0]} is no plain sum",
            where=str(folder / CONFIG),
            fix="merge it into its base instead",
        )
    return config


def _joined(first: Path, second: Path, configs: list[dict[str, Any]]) -> Origin:
    """The origin of what both make together.

    Raises:
        UserError: they do not stand on each other, nor on one base.
    """
    one, two = origin(first), origin(second)
    if _stands_on(first, second, one, two, configs[1]):
        if two.quantised:
            raise UserError(
                "was trained over the merged model in NF4, which rounded base and first adapter "
                "together: no adapter of the first base is equal to that",
                where=str(second),
                fix="serve the merged model, or this adapter on the merged model before it",
            )
        return Origin(two.identity, one.parent, one.quantised, "combined")
    bases = [config.get("base_model_name_or_path") for config in configs]
    same = one.parent == two.parent if one.parent and two.parent else bases[0] == bases[1]
    if not same or one.quantised != two.quantised:
        raise UserError(
            f"was trained on {bases[1]}, which is neither {bases[0]} nor made of it by {first}",
            where=str(second),
            fix="combine an adapter with the one trained right after it",
        )
    return Origin(None, one.parent, one.quantised, "combined")


def _stands_on(first: Path, second: Path, one: Origin, two: Origin, config: dict[str, Any]) -> bool:
    """Whether `second` was trained on the model that `first` was merged into."""
    if one.identity is not None and two.parent is not None:
        return one.identity == two.parent
    manifest = Path(config.get("base_model_name_or_path") or "-") / MERGE_MANIFEST
    if not manifest.is_file():
        return False
    merged = read_json(manifest).get("adapters", [])
    mark = AdapterFile(first).mark()
    return [(part.get("adapter"), part.get("weight")) for part in merged] == [(mark, 1.0)]


def _read(folder: Path, config: dict[str, Any]) -> dict[str, Factors]:
    """The factors of every layer, in float32."""
    file = AdapterFile(folder)
    tensors = {key: file.get(key) for key in file.shapes}
    for key, tensor in tensors.items():
        if not key.startswith(PREFIX) or not key.endswith((DOWN, UP)) or tensor.dim() != 2:
            raise UserError(f"{key} is not part of a plain LoRA", where=str(folder))
        if not all_finite(tensor):
            raise UserError(f"{key} is not finite", where=str(folder), status=Exit.NON_FINITE)
    names = sorted({key.removesuffix(DOWN).removesuffix(UP) for key in tensors})
    if not names:
        raise UserError("the adapter holds no tensors", where=str(folder))
    return {name.removeprefix(PREFIX): _factors(tensors, name, folder, config) for name in names}


def _factors(
    tensors: Mapping[str, Tensor], name: str, folder: Path, config: dict[str, Any]
) -> Factors:
    if name + DOWN not in tensors or name + UP not in tensors:
        raise UserError(f"{name} has only half an adapter", where=str(folder))
    a, b = tensors[name + DOWN], tensors[name + UP]
    layer = by_config(config, name.removeprefix(PREFIX), {}, a.shape[0])
    if not a.shape[0] == b.shape[1] == layer.r:
        what = f"ranks of {name} disagree: {layer.r} by the config, A {[*a.shape]}, B {[*b.shape]}"
        raise UserError(what, where=str(folder))
    return a, b * layer.scale


def _sums(first: dict[str, Factors], second: dict[str, Factors]) -> dict[str, Factors]:
    """Layer by layer [B1, B2]·[A1; A2]; a layer that only one adapter has stays as it is."""
    sums = {}
    for name in sorted(first.keys() | second.keys()):
        parts = [factors[name] for factors in (first, second) if name in factors]
        if len({(a.shape[1], b.shape[0]) for a, b in parts}) > 1:
            raise UserError(f"{name} has one shape in one adapter and another in the other")
        sums[name] = torch.cat([a for a, _ in parts]), torch.cat([b for _, b in parts], dim=1)
    return sums


def _cut(exact: dict[str, Factors], rank: int) -> tuple[dict[str, Factors], float, str]:
    """Every layer at `rank`; the error over all of them, and the layer that lost the most."""
    cut, lost, total, worst = {}, 0.0, 0.0, (0.0, "")
    with progress("cutting", len(exact)) as bar:
        for name, factors in exact.items():
            cut[name], values = nearest(factors, rank)
            gone, whole = (float(v.square().sum()) for v in (values[rank:], values))
            lost, total = lost + gone, total + whole
            worst = max(worst, (gone / whole if whole else 0.0, name))
            bar.advance()
    return cut, math.sqrt(lost / total) if total else 0.0, worst[1]


def nearest(factors: Factors, rank: int) -> tuple[Factors, Tensor]:
    """The nearest product of this rank, and all singular values; the work is done in float64."""
    a, b = (factor.double() for factor in factors)
    qa, ra = torch.linalg.qr(a.T)
    qb, rb = torch.linalg.qr(b)
    u, values, vt = torch.linalg.svd(rb @ ra.T)
    roots = values[:rank].sqrt()
    down = (qa @ vt[:rank].T * roots).T
    up = qb @ u[:, :rank] * roots
    return (down.float(), up.float()), values


def _named(layers: dict[str, Factors], rank: int) -> list[tuple[str, Tensor]]:
    """Tensors by PEFT's names; what is missing to the rank is zero, so that one rank holds."""
    named = []
    for name, (a, b) in layers.items():
        missing = rank - a.shape[0]
        named.append((f"{PREFIX}{name}{DOWN}", pad(a, (0, 0, 0, missing)).contiguous()))
        named.append((f"{PREFIX}{name}{UP}", pad(b, (0, missing)).contiguous()))
    return named


def _config(configs: list[dict[str, Any]], rank: int, layers: list[str]) -> dict[str, Any]:
    """The first adapter's settings; alpha equal to the rank is a scale of 1."""
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
