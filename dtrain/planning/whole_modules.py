"""The modules of a decoder that can train whole, together with an adapter: names and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

from dtrain.core.errors import UserError
from dtrain.planning.shapes import ModelShape

NORMS_OF_A_LAYER = (
    "input_layernorm",
    "post_attention_layernorm",
    "pre_feedforward_layernorm",
    "post_feedforward_layernorm",
)
HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


@dataclass(frozen=True)
class WholeModule:
    """Parameters of a module that trains whole.

    Attributes:
        layers: decoder layers that have it; 0 for a module outside them.
        parameters: rows and columns of each.
    """

    name: str
    layers: int
    parameters: tuple[tuple[int, int], ...]


def select_modules(shape: ModelShape, ends: Sequence[str]) -> tuple[WholeModule, ...]:
    """The modules whose names end with one of `ends`, as in PEFT's modules_to_save.

    Raises:
        UserError: no module is named so.
    """
    known = {f"model.{name}": parameters for name, parameters in _outer_modules(shape).items()}
    if not shape.tied:
        known["lm_head"] = known["model.embed_tokens"]
    inner = _layer_modules(shape)
    found, used = list[WholeModule](), set[str]()
    for name, parameters in known.items():
        if matching := {end for end in ends if name.endswith(end)}:
            used |= matching
            found.append(WholeModule(name, 0, parameters))
    for module in inner:
        names = [f"{shape.prefix}.{number}.{module.name}" for number in module.numbers]
        if matching := {end for end in ends if any(n.endswith(end) for n in names)}:
            used |= matching
            layers = sum(n.endswith(tuple(matching)) for n in names)
            found.append(WholeModule(module.name, layers, module.parameters))
    if shape.tied and "lm_head" in ends:
        used.add("lm_head")
    if unknown := [end for end in ends if end not in used]:
        names = sorted({n.rpartition(".")[2] for n in (*known, *(x.name for x in inner))})
        raise UserError(
            f"no module is named {unknown[0]!r}",
            where="method.modules_to_save",
            fix=f"choose from: {', '.join(names)}",
        )
    return tuple(found)


def _outer_modules(shape: ModelShape) -> dict[str, tuple[tuple[int, int], ...]]:
    return {
        "embed_tokens": ((shape.vocabulary, shape.hidden),),
        "norm": ((shape.hidden, 1),),
    }


class _LayerModule(NamedTuple):
    """A module of the decoder layers with these numbers."""

    name: str
    numbers: Sequence[int]
    parameters: tuple[tuple[int, int], ...]


def _layer_modules(shape: ModelShape) -> list[_LayerModule]:
    """The linear layers and norms of the decoder layers."""
    every = range(shape.layers)
    modules = []
    for x in shape.linears:
        bias = ((x.outputs, 1),) if x.bias else ()
        modules.append(_LayerModule(x.name, x.layers or every, ((x.outputs, x.inputs), *bias)))
    norms = dict.fromkeys(NORMS_OF_A_LAYER[: shape.norms], shape.hidden)
    if shape.norm_elements > shape.norms * shape.hidden:
        norms |= dict.fromkeys(HEAD_NORMS, shape.head_size)
    modules += [_LayerModule(name, every, ((width, 1),)) for name, width in norms.items()]
    return modules
