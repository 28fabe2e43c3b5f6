"""The sizes of any decoder that transformers builds, for `dtrain plan`.

The model is built on the meta device, with LoRA on all its layers as a run attaches it. So the
shape says which linear layers can get adapters, and all counts are the model's own.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, device, nn
from transformers import PretrainedConfig
from transformers.pytorch_utils import Conv1D

from dtrain.config.methods import Lora
from dtrain.core.errors import UserError
from dtrain.core.weight_files import PEFT_PREFIX
from dtrain.methods.base import build_method
from dtrain.models.by_document import has_state
from dtrain.models.decoder_layers import decoder_layers
from dtrain.models.expert_layers import (
    expert_parameters,
    has_transposed_matrices,
    router_layers,
)
from dtrain.models.kernels.patch import patch_modules
from dtrain.models.meta_model import (
    build_meta_model,
    experts_per_token,
    linear_layers,
    remove_modules,
    unused_parameters,
    unused_towers,
)
from dtrain.models.quantize import packable_layers
from dtrain.planning.kernel_table import KERNELS_OF_MEMORY
from dtrain.planning.shapes import LinearShape, ModelShape, join_layers


def describe_model(config: PretrainedConfig) -> ModelShape:
    """The shape of the model of a config, without loading or computing anything.

    Raises:
        UserError: the model cannot be built, or has a form that cannot be described.
    """
    return _Description(config).shape()


class _Description:
    """A model of transformers, read module by module.

    Letters: h hidden size, E experts.
    """

    def __init__(self, config: PretrainedConfig) -> None:
        self._config: Any = config.get_text_config(decoder=True)
        self._model = model = build_meta_model(config)
        remove_modules(model, unused_towers(config))
        self._hidden, self._vocabulary = self._input_matrix.shape[1], self._input_matrix.shape[0]
        self._transposed = {
            name: has_transposed_matrices(model.get_submodule(name.rpartition(".")[0]))
            for name in expert_parameters(model)
        }
        self._unused = unused_parameters(model)
        self._active = experts_per_token(model) if self._transposed else 1
        names = {module: name for name, module in model.named_modules()}
        decoder = set(model.get_decoder().modules())
        layers = [layer for layer in decoder_layers(model) if layer in decoder]
        self._layers = {names[layer]: layer for layer in layers}
        self._routers = router_layers(model)
        self._parameters = {n: p.shape for n, p in model.named_parameters()}
        self._matrix = next(n for n, p in model.named_parameters() if p is self._input_matrix)
        self._modules = dict(_leaf_modules(model))
        self._norms = set(self._norm_weights())
        self._linears = {
            name: (*_features(layer), layer.bias is not None)
            for name, layer in linear_layers(model).items()
            if name not in self._routers
        }
        self._packable = packable_layers(model).keys()
        adapted = build_method(Lora(kind="lora", r=1)).attach(model, seed=0, device=device("meta"))
        self._adapted = {
            name.removeprefix(PEFT_PREFIX)
            for name, module in adapted.named_modules()
            if isinstance(module, LoraLayer) and not isinstance(module, ParamWrapper)
        }
        self._kernels = KERNELS_OF_MEMORY & patch_modules(adapted).keys()

    @property
    def _input_matrix(self) -> Tensor:
        embeddings: Any = self._model.get_input_embeddings()
        weight: Tensor = embeddings.weight
        return weight

    def shape(self) -> ModelShape:
        if not self._layers:
            raise UserError("no decoder layers were found", where=self._config.model_type)
        prefixes = [name.rpartition(".")[0] for name in self._layers]
        blocks = [self._block(name, layer) for name, layer in self._layers.items()]
        return replace(
            join_layers(blocks),
            prefix=prefixes[0],
            outer=tuple(self._outer()),
            kernels=frozenset(self._kernels),
        )

    def _outer(self) -> Iterator[tuple[str, tuple[int, int]]]:
        """The parameters outside of the decoder layers: the embeddings, the norm, others."""
        inside = tuple(f"{name}." for name in self._layers)
        names = list(self._parameters)
        first = next(number for number, name in enumerate(names) if name.startswith(inside))
        norms = [name for name in names if name in self._norms and not name.startswith(inside)]
        after = [name for name in norms if names.index(name) > first]
        if not norms:
            raise UserError(
                "the plan does not describe a model whose last norm has no weight",
                where=self._config.model_type,
                fix="dtrain run needs no plan",
            )
        order = dict.fromkeys((self._matrix, after[0] if after else norms[-1], *names))
        yield from ((n, _size(self._parameters[n])) for n in order if not n.startswith(inside))

    def _norm_weights(self) -> Iterator[str]:
        """The weights [h] of the norms, by their shape: names of norms differ."""
        for name, parameters in self._modules.items():
            leaf, size = next(iter(parameters.items()))
            if size == (self._hidden, 1):
                yield f"{name}.{leaf}"

    def _block(self, name: str, layer: nn.Module) -> ModelShape:
        """One decoder layer, as a model of that layer alone."""
        h, start = self._hidden, f"{name}."
        own = {n.removeprefix(start): s for n, s in self._parameters.items() if n.startswith(start)}
        linears = tuple(self._linears_of(start))
        known = {name for x in linears for name in x.parameter_names}
        routers = [n for n in own if f"{start}{n}".rpartition(".")[0] in self._routers]
        rest = {n: s for n, s in own.items() if n not in {*known, *routers}}
        norms = [n for n in rest if f"{start}{n}" in self._norms]
        mixers = {n: m for n, m in layer.named_modules() if _mixes_tokens(m)}
        mixing = tuple(f"{n}." for n in mixers)
        down = [x for x in linears if x.outputs == h and not x.name.startswith(mixing)]
        attention = next((m for m in mixers.values() if hasattr(m, "is_causal")), None)
        heads = self._config.num_attention_heads if attention is not None else 0
        return ModelShape(
            kind=self._config.model_type,
            layers=1,
            hidden=h,
            heads=heads,
            kv_heads=heads // getattr(attention, "num_key_value_groups", 1),
            head_size=_head_size(attention, h // heads) if heads else 0,
            mlp=sum(x.active * x.inputs for x in down),
            vocabulary=self._vocabulary,
            tied=self._model.get_output_embeddings().weight is self._input_matrix,
            linears=linears,
            norm_elements=h * len(norms),
            norms=len(norms),
            soft_cap=getattr(self._config, "attn_logit_softcapping", None) is not None,
            router=_joined([own[n] for n in routers]),
            router_names=tuple(routers),
            others=tuple(_size(s) for n, s in rest.items() if n not in norms),
            other_names=tuple(n for n in rest if n not in norms),
            saved=sum(map(self._saved, linears)) + sum(map(_convolved, mixers.values())),
            modules=tuple(
                (n.removeprefix(start), tuple(sizes.values()))
                for n, sizes in self._modules.items()
                if n.startswith(start)
            ),
        )

    def _linears_of(self, start: str) -> Iterator[LinearShape]:
        for name, (inputs, outputs, bias) in self._linears.items():
            if name.startswith(start):
                yield LinearShape(
                    name.removeprefix(start),
                    inputs,
                    outputs,
                    bias,
                    active=int(f"{name}.weight" not in self._unused),
                    adaptable=name in self._adapted,
                    packable=name in self._packable,
                )
        for name, transposed in self._transposed.items():
            if name.startswith(start):
                experts, rows, columns = self._parameters[name]
                inputs, outputs = (rows, columns) if transposed else (columns, rows)
                is_used = name not in self._unused
                yield LinearShape(
                    name.removeprefix(start),
                    inputs,
                    outputs,
                    f"{name}_bias" in self._parameters,
                    experts,
                    active=self._active * is_used,
                    adaptable=is_used,
                )

    def _saved(self, linear: LinearShape) -> int:
        """Elements a token: the output, if it does not go to the residual stream; the input and
        what it was computed from, if it does not come from there."""
        saved = 0 if linear.outputs == self._hidden else linear.outputs
        if not linear.reads_stream(self._hidden):
            saved += 2 * linear.inputs
        return linear.active * saved


def _leaf_modules(model: nn.Module) -> Iterator[tuple[str, dict[str, tuple[int, int]]]]:
    """Modules without others in them → rows and columns of each of their parameters."""
    for name, module in model.named_modules():
        parameters = {n: _size(p.shape) for n, p in module.named_parameters()}
        if parameters and not any(True for _ in module.children()):
            yield name, parameters


def _features(layer: Any) -> tuple[int, int]:
    """Inputs and outputs of a linear layer; GPT-2's have a transposed weight."""
    rows, columns = layer.weight.shape
    return (rows, columns) if isinstance(layer, Conv1D) else (columns, rows)


def _joined(shapes: list[Any]) -> tuple[int, int]:
    """Rows and columns of a router's weight and bias together."""
    experts = min((shape[0] for shape in shapes), default=0)
    return experts, sum(shape.numel() for shape in shapes) // max(experts, 1)


def _size(shape: Any) -> tuple[int, int]:
    """Rows and columns of a parameter."""
    return (shape[0], shape.numel() // shape[0]) if shape else (1, 1)


def _mixes_tokens(module: nn.Module) -> bool:
    """Whether a module is attention, or a layer with a state."""
    return hasattr(module, "is_causal") or has_state(module)


def _convolved(module: nn.Module) -> int:
    """Elements a token of a layer's convolutions and of their activation."""
    return sum(2 * m.out_channels for m in module.children() if isinstance(m, nn.Conv1d))


def _head_size(attention: Any, otherwise: int) -> int:
    """Width of a head's queries."""
    names = ("qk_head_dim", "head_dim")
    return next((size for n in names if (size := getattr(attention, n, None))), otherwise)
