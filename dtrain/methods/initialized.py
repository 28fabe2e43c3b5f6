"""LoRA with first values from the base's weights: PiSSA, OLoRA and LoftQ.

    PiSSA (arXiv:2404.02948)    s B₀ A₀ is the best approximation of W of rank r, halved by roots
    OLoRA (arXiv:2406.01775)    B₀ and A₀ are the first columns and rows of W = Q R
    LoftQ (arXiv:2310.08659)    s B₀ A₀ is the best approximation of W - NF4(W): one iteration, so
                                the base in NF4 is the same as without it

With PiSSA and OLoRA the adapter counts from its first values, so that the model starts as its base:
see `dtrain/models/difference.py`.

Letters: W [o, h], r rank, s scale of the adapter.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.pytorch_utils import Conv1D

from dtrain.config.methods import Lora
from dtrain.core.errors import UserError
from dtrain.core.hashes import fingerprint
from dtrain.core.weight_files import PEFT_PREFIX
from dtrain.methods.adapter import ADAPTER
from dtrain.methods.base import MethodContext
from dtrain.methods.factor_store import Factors, FactorStore
from dtrain.methods.lora import LoraMethod
from dtrain.models.difference import count_from_start, first_factors
from dtrain.models.meta_model import build_meta_model
from dtrain.models.quantize import rounded_to_nf4
from dtrain.models.state_dict_names import match_state_dict
from dtrain.models.stored_tensors import ModelTensors

Decompose = Callable[[Tensor, int, float], Factors]
"""(W, r, s) → A₀ and B₀."""


def principal_factors(weight: Tensor, rank: int, scale: float) -> Factors:
    """PiSSA's: s B A is the nearest matrix of this rank."""
    left, values, right = largest_singular(weight, rank)
    roots = (values / scale).sqrt()
    return roots[:, None] * right, left * roots


def orthonormal_factors(weight: Tensor, rank: int, scale: float) -> Factors:
    """OLoRA's: the first columns of Q and rows of R."""
    q, r = torch.linalg.qr(weight.float())
    return r[:rank], q[:, :rank]


def rounding_factors(weight: Tensor, rank: int, scale: float) -> Factors:
    """LoftQ's: s B A is nearest to what NF4 loses."""
    lost = weight.float() - rounded_to_nf4(weight).float()
    return principal_factors(lost, rank, scale)


def largest_singular(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor, Tensor]:
    """The first singular vectors and values: U [o, r], S [r], Vᵀ [r, h].

    From the eigenvectors of the smaller of W Wᵀ and Wᵀ W in float64, which GPUs find in a fraction
    of the time of an SVD; squaring costs digits of the small singular values only.
    """
    is_tall = matrix.shape[0] > matrix.shape[1]
    wide = (matrix.t() if is_tall else matrix).double()
    left = torch.linalg.eigh(wide @ wide.t()).eigenvectors[:, -rank:].flip(1)
    right = left.t() @ wide
    values = torch.linalg.vector_norm(right, dim=1)
    right /= values.clamp_min(torch.finfo(torch.float64).tiny)[:, None]
    return (right.t(), values, left.t()) if is_tall else (left, values, right)


DECOMPOSITIONS: dict[str, Decompose] = {
    "pissa": principal_factors,
    "olora": orthonormal_factors,
    "loftq": rounding_factors,
}


class InitializedLora(LoraMethod):
    """LoRA whose A and B start at factors of the base's weights."""

    def __init__(self, settings: Lora) -> None:
        super().__init__(settings)
        self._first: dict[str, Factors] = {}  # of the rank that saves, on the CPU

    def _with_adapter(
        self, model: PreTrainedModel, targets: str | list[str], **more: Any
    ) -> PeftModel:
        adapted = super()._with_adapter(model, targets, **more)
        for name, module in _layers(adapted).items():
            base = module.get_base_layer()
            if not isinstance(base, nn.Linear | Conv1D):
                raise UserError(
                    f"{self.settings.kind} adapts linear layers, and {name} is a "
                    f"{type(base).__name__}",
                    where="method.target_modules",
                    fix="name linear layers only, or kind: lora",
                )
            if (rank := module.r[ADAPTER]) > (most := min(base.weight.shape)) and not (
                self.traits.quantizes_base
            ):
                message = f"{name} has only {most} singular values, fewer than the rank {rank}"
                raise UserError(message, where="method.r", fix=f"r: {most} or less")
            if self.traits.counts_from_start:
                count_from_start(module, ADAPTER)
        return adapted

    def on_attached(self, model: nn.Module, context: MethodContext) -> None:
        layers = _layers(model)
        if self.traits.quantizes_base:  # others, such as the output matrix, are not rounded
            nf4 = (Linear4bit,)
            layers = {n: m for n, m in layers.items() if isinstance(m.get_base_layer(), nf4)}
        assert isinstance(model, PeftModel)
        weights = BaseWeights(context, model.get_base_model())
        decompose = DECOMPOSITIONS[self.settings.kind]

        def compute(name: str) -> Factors:
            module = layers[name]
            weight = weights.read(name, transposed=isinstance(module.get_base_layer(), Conv1D))
            return decompose(weight, module.r[ADAPTER], module.scaling[ADAPTER])

        decides = {
            "base": context.base_identity,
            "dtype": str(context.dtype),
            "device": context.world.device.type,
            "layers": {n: [m.r[ADAPTER], m.scaling[ADAPTER]] for n, m in layers.items()},
            "kind": self.settings.kind,
        }
        store = FactorStore(context.cache / fingerprint(decides), compute, context.world)
        store.fill(sorted(layers))
        for name, module in layers.items():
            a, b = store.read(name)
            _start_at(module, a, b)
            if self.traits.counts_from_start and context.world.is_first:
                self._first[name] = a, b

    def saved_tensors(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Tensors to save; if the adapter counts from its start, B A - B₀ A₀ as one of rank 2 r."""
        assert bool(self._first) == self.traits.counts_from_start
        saved = super().saved_tensors(model, tensors)
        for name, (a, b) in self._first.items():
            key_a, key_b = (f"{PEFT_PREFIX}{name}.lora_{factor}.weight" for factor in "AB")
            saved[key_a] = torch.cat([saved[key_a], a.to(saved[key_a].device)])
            saved[key_b] = torch.cat([saved[key_b], -b.to(saved[key_b].device)], dim=1)
        return saved

    def saved_config(self, model: nn.Module) -> dict[str, Any]:
        config = super().saved_config(model)
        if self.traits.counts_from_start:  # twice the rank at the same scale
            for key in ("r", "lora_alpha"):
                config[key] *= 2
            for key in ("rank_pattern", "alpha_pattern"):
                config[key] = {pattern: 2 * value for pattern, value in config[key].items()}
        return config


@torch.no_grad()
def _start_at(module: Any, a: Tensor, b: Tensor) -> None:
    """Set the first values of A and B, and what they count from."""
    trained = module.lora_A[ADAPTER].weight, module.lora_B[ADAPTER].weight
    for parameter, values in zip(trained, (a, b), strict=True):
        parameter.copy_(values)
    if (first := first_factors(module, ADAPTER)) is not None:
        first.start_at(*trained)


def _layers(model: nn.Module) -> dict[str, Any]:
    """The adapted layers, by their names in the base."""
    return {
        name.removeprefix(PEFT_PREFIX): module
        for name, module in model.named_modules()
        if isinstance(module, LoraLayer)
    }


class BaseWeights:
    """Reads weights of the base from its files, in the dtype that computes.

    Args:
        model: the base's, for its config.
    """

    def __init__(self, context: MethodContext, model: Any) -> None:
        self._context = context
        self._files = ModelTensors(context.base)
        described = build_meta_model(model.config, trust_remote_code=model.is_custom_code())
        self._names = match_state_dict(described, self._files)

    def read(self, layer: str, *, transposed: bool) -> Tensor:
        """W [o, h] of a layer, on the device.

        Raises:
            UserError: the files do not have it.
        """
        entry, device = f"{layer}.weight", self._context.world.device
        if (name := self._names.stored.get(entry)) is not None:
            weight = self._files.read(name, device)
        elif (conversion := self._names.converted.get(entry)) is not None:
            weight = conversion.convert(self._files.read)[entry].to(device)
        else:
            raise UserError(
                f"the files of the base have no tensor of {layer}",
                where=str(self._context.base),
                fix="method.kind: lora, or target_modules without that layer",
            )
        weight = weight.to(self._context.dtype)
        return weight.t() if transposed else weight
