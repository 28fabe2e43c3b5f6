"""What each PEFT method adds to a base tensor, for a block of its rows, in PEFT's order of steps.

Letters: r rank, out and in a layer's sizes. A base weight is stored as [out, in]; transposed
(GPT-2's Conv1D, an embedding of `out` columns) as [in, out].

Blocks of 64 rows or more give exactly the rows of the whole product; smaller blocks do not, because
BLAS uses another kernel for them. Convolutions equal PEFT's bit for bit only if PEFT computes on
one thread too: their last bit depends on the number of threads.

A field of PEFT's LoRA config that is not listed here, or is refused, must be empty: with it, PEFT
would compute something that a merge does not.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from dtrain.config.methods.patterns import compile_pattern, value_for
from dtrain.core.errors import UserError
from dtrain.models.kernels.merge_rounding import add_scaled

ReadTensor = Callable[[str], Tensor]  # a key of the adapter's file → the tensor, float32
# Rows in any float dtype, index of the first → new rows in float32, valid until the next call.
BlockUpdate = Callable[[Tensor, int], Tensor]
ADALORA_EPSILON = 1e-5  # of peft's SVDLinear
CONVOLUTIONS = {3: functional.conv1d, 4: functional.conv2d, 5: functional.conv3d}


@dataclass(frozen=True)
class LayerDelta:
    """The change of one adapted tensor.

    Attributes:
        keys: the adapter's key for each role: a, b, and e (AdaLoRA), m (DoRA's magnitude); or bias;
            or s (IA3's factors).
        r: rank by the config; None if the config does not say.
        scale: factor of B·A.
        initial_rank: AdaLoRA's divisor, the rank it started with.
        transposed: the base tensor is stored as [in, out].
        dims: number of dimensions of the base tensor.
    """

    keys: Mapping[str, str]
    r: int | None
    scale: float
    initial_rank: int | None = None
    transposed: bool = False
    dims: int = 2

    @property
    def needs_all_rows(self) -> bool:
        """Whether all rows are needed at once: a convolution, or norms of a transposed tensor."""
        return self.dims > 2 or (self.transposed and "m" in self.keys)

    def block_update(self, read: ReadTensor, weight: float = 1.0) -> BlockUpdate:
        """Read the adapter's tensors once; return the function that changes blocks of rows.

        Args:
            weight: factor of what is added.
        """
        tensors = {role: read(key) for role, key in self.keys.items()}
        scale = self.scale * weight
        if "s" in tensors:
            return partial(_multiply, tensors["s"].T if self.transposed else tensors["s"])
        if "bias" in tensors:
            bias = tensors["bias"] * scale
            return lambda old, row: old.float() + bias[row : row + len(old)]
        a = tensors["a"] * tensors["e"] if "e" in tensors else tensors["a"]
        if not self.transposed and self.dims == 2 and not {"e", "m"} & tensors.keys():
            return partial(_add_product, a, tensors["b"], scale, [])

        def update(old: Tensor, row: int) -> Tensor:
            old = old.float()
            delta = self._product(a, tensors["b"], old, row).mul_(scale)
            if self.initial_rank is not None:
                delta.div_(torch.tensor([float(self.initial_rank)]) + ADALORA_EPSILON)
            if "m" not in tensors:
                return delta.add_(old)
            magnitude = tensors["m"].flatten()
            if not self.transposed:
                magnitude = magnitude[row : row + len(old)]
            return self._normalize(old, delta, magnitude)

        return update

    def _product(self, a: Tensor, b: Tensor, old: Tensor, row: int) -> Tensor:
        """B·A in the shape of `old`."""
        if self.dims > 2:
            return _convolution_product(a, b)
        if self.transposed:
            return (b @ a[:, row : row + len(old)]).T
        return b[row : row + len(old)] @ a

    def _normalize(self, old: Tensor, delta: Tensor, magnitude: Tensor) -> Tensor:
        """Scale rows (transposed: columns) to the trained magnitude (DoRA, arXiv:2402.09353)."""
        new = old + delta
        if self.transposed:
            # PEFT takes the norm of the transposed matrix; memory order decides the last bit.
            return (magnitude / torch.linalg.norm(old.T + delta.T, dim=1)).view(1, -1) * new
        if self.dims == 2:
            return (magnitude / torch.linalg.norm(new, dim=1)).view(-1, 1) * new
        norm = new.norm(p=2, dim=tuple(range(1, self.dims)))
        return (magnitude / norm).view(-1, *[1] * (self.dims - 1)) * new


def _add_product(
    a: Tensor, b: Tensor, scale: float, buffer: list[Tensor], old: Tensor, row: int
) -> Tensor:
    """Plain LoRA, nearly all of what is merged, in memory that the next block reuses."""
    if not buffer or buffer[0].numel() < old.numel():
        buffer[:] = [torch.empty(old.numel())]
    out = buffer[0][: old.numel()].view(old.shape)
    delta = torch.mm(b[row : row + len(old)], a, out=out)
    return add_scaled(old, delta, scale)


def _multiply(factors: Tensor, old: Tensor, row: int) -> Tensor:
    """IA3 (arXiv:2205.05638): a factor for each row [out, 1], or for each column [1, in]."""
    if len(factors) > 1:
        factors = factors[row : row + len(old)]
    return old.float() * factors.view(-1, *factors.shape[1 : old.dim()])


def _convolution_product(a: Tensor, b: Tensor) -> Tensor:
    """The kernel [out, in, ...] that equals A [r, in, ...] followed by B [out, r, 1, ...]."""
    if a.dim() == 4 and a.shape[2:] == (1, 1):
        return (b.flatten(1) @ a.flatten(1))[:, :, None, None]
    return CONVOLUTIONS[a.dim()](a.transpose(0, 1), b).transpose(0, 1).contiguous()


# Their settings that a merge needs.
REQUIRED = {
    "LORA": ("r", "lora_alpha"),
    "ADALORA": ("init_r", "lora_alpha"),
    "IA3": (),
    "VERA": ("r", "projection_prng_key"),
}
# The merge uses these.
USED = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "lora_bias", "bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying", "target_parameters", "init_lora_weights", "init_r",
    "projection_prng_key",
}  # fmt: skip
# These say where adapters were put (as the tensors' names do), or how they were trained or loaded;
# settings of an initialization matter only with an initialization that is refused.
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size",
    "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    "feedforward_modules", "init_ia3_weights", "save_projection", "vera_dropout", "d_initial",
    "init_weights", "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight",
    "total_step",
}  # fmt: skip
# With these, PEFT computes differently or changes the base itself.
REFUSED = {
    "megatron_config": "its layers are sharded by Megatron",
    "use_qalora": "its layers take the mean of groups of inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "alora_invocation_tokens": "it applies only after an invocation; merged, it would always apply",
    "arrow_config": "it routes between several adapters",
    "kasa_config": "it removes a component from the base",
    "monteclora_config": "it samples its weights",
    "velora_config": "its adapters have a third matrix, for the backward pass",
    "layer_replication": "it repeats layers of the base",
}
# Initializations that leave the base unchanged; with others PEFT changes the base at loading.
INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")
SAVE_AGAIN = "config and weights must belong to one adapter; save it again"


def check_config(config: Any, path: Path) -> None:
    """Check that a merge with this config computes what PEFT computes.

    Raises:
        UserError: not the config of a LoRA adapter, or it has a setting that cannot be merged.
    """
    if not isinstance(config, dict) or config.get("peft_type") not in REQUIRED:
        fix = f"give an adapter that PEFT saved, with peft_type {', '.join(REQUIRED)}"
        raise UserError("is not the config of an adapter that merges", where=str(path), fix=fix)
    for name, value in config.items():
        if name not in USED and name not in WITHOUT_EFFECT and value:
            reason = REFUSED.get(name, f"this version of dtrain does not know {name}")
            message = f"an adapter with {name} cannot be merged: {reason}"
            raise UserError(message, where=str(path), fix="serve base and adapter unmerged")
    if config["peft_type"] == "LORA":
        _check_patterns(config, path)
    initialization = config.get("init_lora_weights")
    if initialization not in INITIALIZATIONS:
        raise UserError(
            f"init_lora_weights {initialization!r} removes a component from the base",
            where=str(path),
            fix="save_pretrained(…, path_initial_model_for_weight_conversion=…) makes a plain LoRA",
        )
    required = REQUIRED[config["peft_type"]]
    if missing := [key for key in required if not isinstance(config.get(key), int | float)]:
        fix = "save the adapter again with PEFT's save_pretrained"
        raise UserError(f"no {missing[0]} in it", where=str(path), fix=fix)


def _check_patterns(config: dict[str, Any], path: Path) -> None:
    for key in ("rank_pattern", "alpha_pattern"):
        patterns = config.get(key) or {}
        if not isinstance(patterns, dict) or any(
            type(v) not in (int, float) for v in patterns.values()
        ):
            fix = "save the adapter again with PEFT's save_pretrained"
            raise UserError(f"{key} is not a table of numbers", where=str(path), fix=fix)
        for pattern in patterns:
            compile_pattern(pattern, str(path))


def check_roles(config: dict[str, Any], module: str, keys: dict[str, str], where: str) -> None:
    """Check that a layer of LoRA has the tensors that its settings ask for, and no others.

    Raises:
        UserError: DoRA's magnitude or a bias is missing, or no setting asks for it.
    """
    for role, tensor, setting in (("m", "magnitude", "use_dora"), ("bias", "bias", "lora_bias")):
        is_set, has = bool(config.get(setting)), role in keys
        if is_set != has:
            problem = f"{module} has {'a' if has else 'no'} {tensor}"
            message = f"{problem}, but the config says {setting}: {str(is_set).lower()}"
            raise UserError(message, where=where, fix=SAVE_AGAIN)


def layer_from_config(
    config: dict[str, Any], module: str, keys: dict[str, str], rank: int
) -> LayerDelta:
    """Return a layer with rank and scale as PEFT finds them: by pattern, else the adapter's own."""
    if config["peft_type"] == "ADALORA":
        alpha = config["lora_alpha"]
        return LayerDelta(keys, None, alpha if alpha > 0 else float(rank), config["init_r"])
    r = value_for(config.get("rank_pattern"), module, config["r"])
    alpha = value_for(config.get("alpha_pattern"), module, config["lora_alpha"])
    return LayerDelta(keys, r, alpha / (math.sqrt(r) if config.get("use_rslora") else r))
