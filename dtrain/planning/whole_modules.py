"""The modules of a decoder that can train whole, together with an adapter: names and sizes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
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


Parameters = tuple[tuple[int, int], ...]
"""Rows and columns of each parameter of a module."""


@dataclass(frozen=True)
class WholeModule:
    """Parameters of a module that trains whole.

    Attributes:
        layers: numbers of the decoder layers that have it; empty for a module outside them.
    """

    name: str
    layers: tuple[int, ...]
    parameters: Parameters


def select_modules(
    shape: ModelShape, ends: Sequence[str], *, trains_router: bool = False
) -> tuple[WholeModule, ...]:
    """The modules whose names end with one of `ends`, as in PEFT's modules_to_save.

    Args:
        trains_router: `ends` may name routers too, which are not among the result.

    Raises:
        UserError: no module is named so, or a router is that does not train.
    """
    if not ends:
        return ()
    routers = {x for x in shape.routers if x.endswith(tuple(ends))}
    if routers and not trains_router:
        raise UserError(
            f"{min(routers)} is a router, which trains with its load-balancing loss",
            where="method.modules_to_save",
            fix="name it no longer: method.router=train",
        )
    found = dict[tuple[str, Parameters], list[int]]()
    names = list[str]()
    for name, parameters in _outer_modules(shape).items():
        names.append(name)
        if name.endswith(tuple(ends)):
            found[name, parameters] = []
    for number, block in enumerate(shape.each_layer):
        for name, parameters in block.modules or _llama_modules(block):
            if name in routers:
                continue
            names.append(f"{shape.prefix}.{number}.{name}")
            if names[-1].endswith(tuple(ends)):
                found.setdefault((name, parameters), []).append(number)
    known = [*names, "lm_head"] if shape.tied else names
    for end in ends:
        if not any(name.endswith(end) for name in (*known, *routers)):
            choices = sorted({name.rpartition(".")[2] for name in names})
            raise UserError(
                f"no module is named {end!r}",
                where="method.modules_to_save",
                fix=f"choose from: {', '.join(choices)}",
            )
    return tuple(WholeModule(name, tuple(found[name, p]), p) for name, p in found)


def _outer_modules(shape: ModelShape) -> dict[str, Parameters]:
    modules: dict[str, Parameters] = {}
    for name, size in shape.outer_sizes.items():
        module = name.rpartition(".")[0]
        modules[module] = (*modules.get(module, ()), size)
    return modules


def _llama_modules(block: ModelShape) -> Iterator[tuple[str, Parameters]]:
    """The linear layers and norms of a decoder layer with Llama's names.

    Experts are none: their layers are parameters of one module, which does not train whole.
    """
    for x in block.linears:
        if x.experts > 1:
            continue
        bias = ((x.outputs, 1),) if x.bias else ()
        yield x.name, ((x.outputs, x.inputs), *bias)
    norms = dict.fromkeys(NORMS_OF_A_LAYER[: block.norms], block.hidden)
    if block.norm_elements > block.norms * block.hidden:
        norms |= dict.fromkeys(HEAD_NORMS, block.head_size)
    for name, width in norms.items():
        yield name, ((width, 1),)
