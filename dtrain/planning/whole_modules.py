"""The modules of a decoder that can train whole, together with an adapter: names and sizes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

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
    for name, parameters in (known | inner).items():
        names = [name]
        if name in inner:
            names = [f"model.layers.{number}.{name}" for number in range(shape.layers)]
        matching = [end for end in ends if any(n.endswith(end) for n in names)]
        used.update(matching)
        layers = sum(any(n.endswith(end) for end in matching) for n in names)
        if matching:
            found.append(WholeModule(name, layers if name in inner else 0, parameters))
    if shape.tied and "lm_head" in ends:
        used.add("lm_head")
    if unknown := [end for end in ends if end not in used]:
        names = sorted({name.rpartition(".")[2] for name in (*known, *inner)})
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


def _layer_modules(shape: ModelShape) -> dict[str, tuple[tuple[int, int], ...]]:
    """The modules of one decoder layer: its linear layers and norms."""
    modules = {
        x.name: ((x.outputs, x.inputs), *(((x.outputs, 1),) if x.bias else ()))
        for x in shape.linears
    }
    modules |= dict.fromkeys(NORMS_OF_A_LAYER[: shape.norms], ((shape.hidden, 1),))
    if shape.norm_elements > shape.norms * shape.hidden:
        modules |= dict.fromkeys(HEAD_NORMS, ((shape.head_size, 1),))
    return modules
