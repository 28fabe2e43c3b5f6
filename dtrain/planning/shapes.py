"""The sizes of a decoder's tensors, which memory, time and communication depend on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from dtrain.core.errors import UserError


@dataclass(frozen=True)
class LinearShape:
    """A linear layer, or the linear layers of all experts, which are one parameter.

    Attributes:
        name: inside the decoder layer, such as self_attn.q_proj.
        experts: number of matrices; 1 for a layer that is none of experts'.
        active: how many of them a token is multiplied with.
    """

    name: str
    inputs: int
    outputs: int
    bias: bool = False
    experts: int = 1
    active: int = 1

    @property
    def elements(self) -> int:
        """Elements of the weight."""
        return self.inputs * self.outputs * self.experts

    @property
    def active_elements(self) -> int:
        """Elements that a token is multiplied with."""
        return self.inputs * self.outputs * self.active

    @property
    def biases(self) -> int:
        """Elements of the bias."""
        return self.outputs * self.experts if self.bias else 0

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
        kind: model_type of its config.json, a key of `ARCHITECTURES`.
        linears: linear layers of one decoder layer; all decoder layers are alike.
        norm_elements: weights of the norms of one decoder layer.
        norms: norms over h in one decoder layer.
        tied: the output matrix is the embedding matrix.
        soft_cap: attention scores are capped, which needs the attention that stores all scores.
        router: rows and columns of the router's weight; its bias, if it has one, is a column.
        extra_elements: other parameters of one decoder layer, such as attention sinks.
        dense_layers: decoder layers whose MLP is a single one. They count as layers with experts
            in memory and time, which is a little more than they take.
        dense_mlp: width of that MLP.
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
    extra_elements: int = 0
    dense_layers: int = 0
    dense_mlp: int = 0

    @property
    def experts(self) -> tuple[LinearShape, ...]:
        """Those of `linears` that are experts'."""
        return tuple(x for x in self.linears if x.experts > 1)

    @property
    def q(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_size

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_size

    @property
    def linear_elements(self) -> int:
        """Weights of the linear layers of all decoder layers: what NF4 quantizes."""
        return self.layers * sum(linear.elements for linear in self.linears)

    @property
    def active_linear_elements(self) -> int:
        """Weights of the linear layers that a token is multiplied with."""
        return self.layers * sum(linear.active_elements for linear in self.linears)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        router = self.router[0] * self.router[1]
        linears = sum(x.elements + x.biases for x in self.linears)
        return self.norm_elements + router + self.extra_elements + linears

    @property
    def outer_elements(self) -> dict[str, int]:
        """Parameter outside the decoder layers → its elements; tied matrices have one name."""
        matrix = self.vocabulary * self.hidden
        head = {} if self.tied else {"lm_head.weight": matrix}
        return {"model.embed_tokens.weight": matrix, "model.norm.weight": self.hidden, **head}

    @property
    def outer_parameters(self) -> int:
        """Parameters outside the decoder layers: embeddings, output matrix, final norm."""
        return sum(self.outer_elements.values())

    @property
    def parameters(self) -> int:
        """Number of parameters; tied matrices count once."""
        routed = self.router[0] * self.router[1]
        routed += sum(x.elements + x.biases for x in self.linears if x.name.startswith("mlp."))
        fewer = self.dense_layers * (routed - 3 * self.hidden * self.dense_mlp)
        return self.layers * self.layer_parameters - fewer + self.outer_parameters

    @property
    def active_parameters(self) -> int:
        """Number of parameters that a token is computed with, embeddings included."""
        idle = sum(
            (x.experts - x.active) * (x.elements + x.biases) // x.experts for x in self.experts
        )
        return self.parameters - (self.layers - self.dense_layers) * idle


def select_linears(
    shape: ModelShape, target_modules: str | Sequence[str], *, experts: bool = False
) -> tuple[LinearShape, ...]:
    """The linear layers of one decoder layer that get an adapter, and lm_head where it is named.

    Args:
        target_modules: as in a recipe; a name matches the whole name or its end after a dot, as in
            PEFT.
        experts: whether those of experts can get one.

    Raises:
        UserError: no linear layer has one of the names.
    """
    linears = tuple(x for x in shape.linears if experts or x.experts == 1)
    if isinstance(target_modules, str):
        return linears
    head = LinearShape("lm_head", shape.hidden, shape.vocabulary)
    known = [*linears, *([] if shape.tied else [head])]
    for target in target_modules:
        if not any(_matches(linear.name, target) for linear in known):
            names = sorted({linear.name.rpartition(".")[2] for linear in known})
            fix = f"choose from: {', '.join(names)}"
            raise UserError(
                f"no linear layer is named {target!r}", where="method.target_modules", fix=fix
            )
    return tuple(x for x in known if any(_matches(x.name, target) for target in target_modules))


def layer_names(shape: ModelShape, linear: LinearShape) -> list[str]:
    """The names of a linear layer in the model, one for each decoder layer that has it."""
    if linear.name == "lm_head":
        return [linear.name]
    return [f"model.layers.{number}.{linear.name}" for number in range(shape.layers)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")
