"""The sizes of a decoder's tensors, which memory, time and communication depend on."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import prod

from dtrain.config.methods.patterns import match_names
from dtrain.core.errors import UserError
from dtrain.core.units import count


@dataclass(frozen=True)
class LinearShape:
    """A linear layer, or the linear layers of all experts, which are one parameter.

    Attributes:
        name: inside the decoder layer, such as self_attn.q_proj.
        experts: number of matrices; 1 for a layer that is none of experts'.
        active: how many of them a token is multiplied with; 0: none, in a text.
        layers: numbers of the decoder layers that have it; empty: all.
        adaptable: it can get an adapter.
        packable: a base in NF4 holds it in 4 bits.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    experts: int = 1
    active: int = 1
    layers: tuple[int, ...] = ()
    adaptable: bool = True
    packable: bool = True

    @property
    def elements(self) -> int:
        """Elements of the weight."""
        return self.inputs * self.outputs * self.experts

    @property
    def active_elements(self) -> int:
        """Elements that a token is multiplied with."""
        return self.inputs * self.outputs * self.active

    def reads_stream(self, hidden: int) -> bool:
        """Whether the residual stream is its input; of a square matrix that is not known."""
        return self.inputs == hidden != self.outputs

    @property
    def biases(self) -> int:
        """Elements of the bias."""
        return self.outputs * self.experts if self.bias else 0

    @property
    def parameter_names(self) -> tuple[str, ...]:
        """Names of the weight and of the bias, inside the decoder layer."""
        leaves = ("", "_bias") if self.experts > 1 else (".weight", ".bias")
        return tuple(f"{self.name}{leaf}" for leaf in leaves[: 1 + self.bias])

    @property
    def size(self) -> tuple[int, int]:
        """Rows and columns of the parameter, as engines divide it: experts are rows."""
        if self.experts == 1:
            return self.outputs, self.inputs
        return self.experts, self.inputs * self.outputs


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that memory, time and communication depend on.

    Attributes:
        kind: model_type of its config.json.
        heads, kv_heads: 0 for a decoder layer without attention.
        linears: linear layers of one decoder layer, or of all where they differ.
        norm_elements: weights of the norms of one decoder layer.
        norms: norms over h in one decoder layer.
        tied: the output matrix is the embedding matrix.
        soft_cap: attention scores are capped, which needs the attention that stores all scores.
        router: rows and columns of the router's weight; its bias, if it has one, is a column.
        router_names: names of its parameters, inside the decoder layer.
        others: rows and columns of the other parameters of one decoder layer, such as attention
            sinks.
        other_names: their names, inside the decoder layer.
        kernels: dtrain's layers that this model gets.
        mlp_saved: elements that an MLP saves for each of its width: gate, up, activation; more
            where the activation takes several steps.
        saved: elements a token that are saved between the linear layers of one decoder layer, where
            they are not Llama's; 0: as in Llama.
        prefix: what comes before the number of a decoder layer in the names of its modules.
        outer: parameters outside the decoder layers, and rows and columns of each; the embeddings
            come first, then the final norm. Empty: Llama's.
        modules: modules of one decoder layer that have parameters of their own, and rows and
            columns of each parameter; empty: Llama's.
        blocks: the decoder layers, each as a model of one layer, where they differ; the sizes of
            the whole are then those of the largest.
    """

    kind: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    tied: bool
    linears: tuple[LinearShape, ...]
    norm_elements: int
    norms: int
    soft_cap: bool = False
    router: tuple[int, int] = (0, 0)
    router_names: tuple[str, ...] = ()
    others: tuple[tuple[int, int], ...] = ()
    other_names: tuple[str, ...] = ()
    kernels: frozenset[str] = frozenset()
    mlp_saved: int = 3
    saved: int = 0
    prefix: str = "model.layers"
    outer: tuple[tuple[str, tuple[int, int]], ...] = ()
    modules: tuple[tuple[str, tuple[tuple[int, int], ...]], ...] = ()
    blocks: tuple[ModelShape, ...] = ()

    @cached_property
    def kinds(self) -> tuple[ModelShape, ...]:
        """The decoder layers that are alike, each kind as a model of as many layers."""
        counts = Counter(self.blocks)
        return tuple(replace(x, layers=n) for x, n in counts.items()) or (self,)

    @property
    def each_layer(self) -> tuple[ModelShape, ...]:
        """The decoder layers in their order, each as a model of one layer."""
        return self.blocks or (replace(self, layers=1),) * self.layers

    @property
    def experts(self) -> tuple[LinearShape, ...]:
        """Those of `linears` that are experts'."""
        return tuple(x for x in self.linears if x.experts > 1)

    @cached_property
    def routers(self) -> frozenset[str]:
        """Names of the modules that choose experts, inside a decoder layer."""
        names = (name for kind in self.kinds for name in kind.router_names)
        return frozenset(name.rpartition(".")[0] for name in names)

    @property
    def q(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_size

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_size

    @property
    def attention_width(self) -> int:
        """Width of the queries of all decoder layers that have attention."""
        return sum(kind.layers * kind.q for kind in self.kinds)

    @property
    def linear_elements(self) -> int:
        """Weights of the linear layers of all decoder layers."""
        return sum(kind.layers * sum(x.elements for x in kind.linears) for kind in self.kinds)

    @property
    def packed_elements(self) -> int:
        """Those of `linear_elements` that NF4 quantizes."""
        packed = ((kind, x) for kind in self.kinds for x in kind.linears if x.packable)
        return sum(kind.layers * x.elements for kind, x in packed)

    @property
    def largest_packed(self) -> int:
        """Weights of the largest matrix that NF4 quantizes; 0 if there is none."""
        packed = (x.elements // x.experts for x in self.linears if x.packable)
        return max(packed, default=0)

    @property
    def active_linear_elements(self) -> int:
        """Weights of the linear layers that a token is multiplied with."""
        kinds = self.kinds
        return sum(kind.layers * sum(x.active_elements for x in kind.linears) for kind in kinds)

    @cached_property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer; of the largest, where they differ."""
        if self.blocks:
            return max(block.layer_parameters for block in self.kinds)
        others = sum(rows * columns for rows, columns in (self.router, *self.others))
        return self.norm_elements + others + sum(x.elements + x.biases for x in self.linears)

    @property
    def decoder_parameters(self) -> int:
        """Parameters of all decoder layers."""
        return sum(kind.layers * kind.layer_parameters for kind in self.kinds)

    @property
    def outer_sizes(self) -> dict[str, tuple[int, int]]:
        """Parameter outside the decoder layers → rows and columns; tied matrices have one name."""
        if self.outer:
            return dict(self.outer)
        matrix = (self.vocabulary, self.hidden)
        head = {} if self.tied else {"lm_head.weight": matrix}
        return {"model.embed_tokens.weight": matrix, "model.norm.weight": (self.hidden, 1), **head}

    @property
    def outer_elements(self) -> dict[str, int]:
        """Parameter outside the decoder layers → its elements."""
        return {name: rows * columns for name, (rows, columns) in self.outer_sizes.items()}

    @property
    def outer_parameters(self) -> int:
        """Parameters outside the decoder layers: embeddings, output matrix, final norm."""
        return sum(self.outer_elements.values())

    @property
    def parameters(self) -> int:
        """Number of parameters; tied matrices count once."""
        return self.decoder_parameters + self.outer_parameters

    @property
    def active_parameters(self) -> int:
        """Number of parameters that a token is computed with, embeddings included."""
        idle = sum(
            kind.layers * (x.experts - x.active) * (x.elements + x.biases) // x.experts
            for kind in self.kinds
            for x in kind.linears
        )
        return self.parameters - idle


def check_stored(shape: ModelShape, stored: Iterable[Sequence[int]], where: str) -> None:
    """Check that files have all values of a model; they may have more, such as image towers.

    Where a config lacks a size, transformers takes that of another model.

    Args:
        stored: the shapes of the tensors in the files.
        where: source of the config, for messages.

    Raises:
        UserError: they have fewer values.
    """
    values = sum(map(prod, stored))
    if shape.parameters > values:
        raise UserError(
            f"describes a model of {count(shape.parameters)} parameters ({shape.layers} layers, "
            f"hidden size {shape.hidden}, {shape.vocabulary} tokens); its files have "
            f"{count(values)}",
            where=where,
            fix="weights and config.json must belong to the same model, and config.json must have "
            "all sizes; download them again",
        )


def join_layers(blocks: Sequence[ModelShape]) -> ModelShape:
    """The model whose decoder layers are `blocks`, each a model of one layer."""
    if len(set(blocks)) == 1:
        return replace(blocks[0], layers=len(blocks))
    numbers: dict[LinearShape, list[int]] = {}
    for number, block in enumerate(blocks):
        for linear in block.linears:
            numbers.setdefault(linear, []).append(number)
    located = {x: replace(x, layers=tuple(n)) for x, n in numbers.items()}
    blocks = [replace(x, linears=tuple(located[y] for y in x.linears)) for x in blocks]
    largest = max(blocks, key=lambda block: block.layer_parameters)
    return replace(
        largest,
        layers=len(blocks),
        heads=max(x.heads for x in blocks),
        kv_heads=max(x.kv_heads for x in blocks),
        head_size=max(x.head_size for x in blocks),
        mlp=max(x.mlp for x in blocks),
        linears=tuple(located.values()),
        blocks=tuple(blocks),
    )


def select_linears(
    shape: ModelShape, target_modules: str | Sequence[str], *, experts: bool = False
) -> tuple[LinearShape, ...]:
    """The linear layers of one decoder layer that get an adapter, and lm_head where it is named.

    Args:
        target_modules: as in a recipe; a name matches the whole name or its end after a dot, as in
            PEFT.
        experts: whether those of experts can get one.

    Raises:
        UserError: no linear layer has one of the names, or a router or only experts that get none.
    """
    known = _adaptable(shape, experts=experts)
    for target in () if isinstance(target_modules, str) else target_modules:
        if router := next((x for x in sorted(shape.routers) if _matches(x, target)), None):
            raise UserError(
                f"{router} is a router, which gets no adapter",
                where="method.target_modules",
                fix="leave it out; method.router=train trains it whole",
            )
        if not any(_is_named(shape, linear, [target]) for linear in known):
            raise _unknown_target(shape, target, known)
    return matching_linears(shape, target_modules, experts=experts)


def _unknown_target(shape: ModelShape, target: str, known: Sequence[LinearShape]) -> UserError:
    where = "method.target_modules"
    if any(_matches(linear.name, target) for linear in shape.experts):
        return UserError(
            f"{target!r} names weights of experts, which get no adapter here",
            where=where,
            fix="leave it out; or method.kind=lora, rslora or qlora, with experts=true",
        )
    names = sorted({linear.name.rpartition(".")[2] for linear in known})
    fix = f"choose from: {', '.join(names)}"
    return UserError(f"no linear layer is named {target!r}", where=where, fix=fix)


def matching_linears(
    shape: ModelShape, target_modules: str | Sequence[str], *, experts: bool = False
) -> tuple[LinearShape, ...]:
    """As `select_linears`, but a name may match nothing, as in one kind of decoder layer.

    A linear layer that is named in one decoder layer counts in all that have it.
    """
    known = _adaptable(shape, experts=experts)
    if isinstance(target_modules, str):
        return tuple(x for x in known if x.name != "lm_head")
    return tuple(x for x in known if _is_named(shape, x, target_modules))


def _adaptable(shape: ModelShape, *, experts: bool) -> list[LinearShape]:
    linears = [x for x in shape.linears if x.adaptable and (experts or x.experts == 1)]
    head = LinearShape("lm_head", shape.hidden, shape.vocabulary)
    return linears if shape.tied else [*linears, head]


def layer_names(shape: ModelShape, linear: LinearShape) -> list[str]:
    """The names of a linear layer in the model, one for each decoder layer that has it."""
    if linear.name == "lm_head":
        return [linear.name]
    numbers = linear.layers or range(shape.layers)
    return [f"{shape.prefix}.{number}.{linear.name}" for number in numbers]


def _is_named(shape: ModelShape, linear: LinearShape, targets: Sequence[str]) -> bool:
    """Whether a target names a linear layer, in each decoder layer or in one of them."""
    names = [linear.name, *layer_names(shape, linear)]
    return bool(match_names(names, targets))


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
