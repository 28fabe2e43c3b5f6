"""What the settings of all fine-tuning methods share, and the traits that need no torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field

from dtrain.config.group import Count, Group, PathText, Text

Shapes = tuple[tuple[int, int], ...]
"""Rows and columns of matrices; a vector has one column."""


@dataclass(frozen=True)
class MethodTraits:
    """What one kind of method does to memory, checkpoints and the merge.

    Attributes:
        title: name in reports.
        implementation: "module:class" of its `dtrain.methods.base.Method`.
        objective: "module:class" of the `AddedTerm` around the stage's objective, if it has one.
        trains_base: the base's own parameters train; they are kept in float32, and the merged
            model replaces them. Otherwise the base is frozen, in the dtype that computes.
        adds_adapter: float32 parameters are added to the base, which stays as it is. What is added
            is saved in PEFT layout.
        quantizes_base: the frozen base's linear layers are kept in NF4, 4 bits a weight.
        stacks: a model computes the same with this adapter and earlier ones that stack on one base
            as with this adapter on their merged model.
        has_kernel: `dtrain.models.kernels.lora_linear` computes the layers that it adapts.
        adds_product: what the adapter adds to a layer's weight is a scaled product of two matrices,
            zero at the start.
        is_compared: the plan of any recipe shows this method next to the recipe's own.
        base_when_disabled: with its adapter switched off, the model computes exactly as the one
            that the stage starts from.
        cannot_merge: why the result cannot become a plain model; empty if it can.
        counts_from_start: what is added is the difference to its first values, which come from the
            base, are kept frozen, and are not in a checkpoint.
        quantized_kind: the kind to use instead if the base fits only in NF4; methods with the key
            `quantize` need none.
    """

    title: str
    implementation: str
    objective: str = ""
    trains_base: bool = False
    adds_adapter: bool = False
    quantizes_base: bool = False
    stacks: bool = False
    has_kernel: bool = False
    adds_product: bool = False
    is_compared: bool = False
    base_when_disabled: bool = False
    cannot_merge: str = ""
    counts_from_start: bool = False
    quantized_kind: str = "qlora"


class MethodSettings(Group):
    """The keys that all methods share.

    Attributes:
        traits_by_kind: the traits of each kind that these settings have.
    """

    traits_by_kind: ClassVar[Mapping[str, MethodTraits]]
    kind: str

    @property
    def traits(self) -> MethodTraits:
        """The traits of this kind."""
        return self.traits_by_kind[self.kind]

    def learning_rate_scale(self, parameter: str) -> float:
        """The factor of the learning rate for a parameter, by its name in the model."""
        return 1.0

    @property
    def added_tokens(self) -> int:
        """Virtual tokens in front of every document."""
        return 0

    def outer_shapes(self, hidden: int, layers: int, kv: int) -> Shapes:
        """The shapes of what is added outside the decoder layers.

        Args:
            hidden: hidden size of the model.
            layers: number of its decoder layers.
            kv: width of the keys of a layer.
        """
        return ()

    def decays(self, parameter: str) -> bool:
        """Whether weight decay applies to a matrix, by its name in the model."""
        return True

    def freezes(self, parameter: str) -> bool:
        """Whether a parameter of the base stays frozen though others around it train."""
        return False

    def trained_layers(self, layers: int) -> int:
        """Decoder layers, the last of so many, whose own parameters train."""
        return layers if self.traits.trains_base else 0

    @property
    def trains_outer(self) -> bool:
        """Whether the base's parameters outside the decoder layers train."""
        return self.traits.trains_base

    @property
    def trains_token_rows(self) -> bool:
        """Whether single rows of the embeddings and the output matrix can train."""
        return False

    @property
    def adapter(self) -> AdapterSettings | None:
        """These settings, if the method adds an adapter to linear layers."""
        return None

    @property
    def rank(self) -> int:
        """Rank of the adapter's product of matrices; 0 without one."""
        return 0

    @property
    def base_when_disabled(self) -> bool:
        """Whether the model computes as at the start of the stage with its adapter switched off."""
        return self.traits.base_when_disabled

    @property
    def stacks(self) -> bool:
        """Whether an adapter and those of other stages can be on one base at once."""
        return self.traits.stacks

    @property
    def trains_whole_modules(self) -> bool:
        """Whether modules of the base train, or copies of them: gradients as large as these."""
        return self.traits.trains_base

    @property
    def trains_router(self) -> bool:
        """Whether the routers of a mixture of experts train, with its load-balancing loss."""
        return False

    def rank_of(self, layer: str) -> int:
        """The rank of one layer, by its name in the model."""
        return self.rank

    @property
    def kept_values(self) -> int:
        """Values kept for each parameter that trains, in addition to the optimizer's."""
        return 0

    @property
    def has_dropout(self) -> bool:
        """Whether dropout is applied to an adapter's input."""
        return False

    @property
    def saves_inputs(self) -> bool:
        """Whether an adapted layer saves its input for the backward pass."""
        return True

    @property
    def saves_outputs(self) -> bool:
        """Whether an adapted layer saves its output for the backward pass."""
        return False


class RouterSettings(MethodSettings):
    """The key of methods that can train the routers of a mixture of experts."""

    router: Literal["frozen", "train"] = Field(
        "frozen",
        description="train: the routers of a mixture of experts train whole, and the loss has the "
        "model's load-balancing loss (arXiv:2101.03961) of the global batch, by the coefficient in "
        "its config.json (`router_aux_loss_coef`), if it has one",
    )

    @property
    def trains_router(self) -> bool:
        return self.router == "train"


class QuantizableSettings(MethodSettings):
    """The key of methods that are the same over a base in 16 bits and in 4.

    LoRA has kinds of their own for that, by the names that the field uses.
    """

    quantize: Literal["nf4"] | None = Field(
        None,
        description="nf4: over a base in NF4 (arXiv:2305.14314), for a quarter of its memory",
    )

    @property
    def traits(self) -> MethodTraits:
        return replace(super().traits, quantizes_base=self.quantize is not None)


class AdapterSettings(MethodSettings):
    """The keys that adapters of linear layers share."""

    target_modules: Literal["all-linear"] | Annotated[list[Text], Field(min_length=1)] = Field(
        "all-linear",
        description="names of the linear layers that get an adapter; of experts, where they get "
        "one, those of their weights, such as gate_up_proj and down_proj",
    )

    @property
    def adapter(self) -> AdapterSettings:
        """These settings."""
        return self

    @property
    def adapts_experts(self) -> bool:
        """Whether experts get adapters, where the model has any."""
        return False

    @property
    def whole_modules(self) -> list[str]:
        """Ends of the names of modules that train whole, together with the adapter."""
        return []

    @property
    def initial_adapter(self) -> str | None:
        """Folder of an adapter whose training continues; None for a new adapter."""
        return None

    @property
    def base_when_disabled(self) -> bool:
        return self.traits.base_when_disabled and self.initial_adapter is None

    @property
    def stacks(self) -> bool:
        return self.traits.stacks and not self.trains_whole_modules

    @property
    def trains_whole_modules(self) -> bool:
        return bool(self.whole_modules) or self.trains_router

    def peft_config(self) -> dict[str, Any]:
        """The settings of adapter_config.json that decide what PEFT computes."""
        raise NotImplementedError

    def shapes(self, layer: str, outputs: int, inputs: int) -> Shapes:
        """The shapes of what is added to a linear layer.

        Args:
            layer: its name in the model, such as `model.layers.0.mlp.down_proj`.
        """
        raise NotImplementedError

    def check_layers(self, layers: Sequence[str]) -> None:
        """Check the settings of single layers against the names of all that get an adapter.

        Raises:
            UserError: a setting has no effect.
        """
        return

    def saved_elements(self, layer: str, outputs: int, inputs: int) -> int:
        """Elements a token that are saved for the backward pass, without the layer's input."""
        return self.rank_of(layer)

    def multiplied_elements(self, layer: str, outputs: int, inputs: int) -> int:
        """Elements of the matrices that each token is multiplied with."""
        return sum(rows * columns for rows, columns in self.shapes(layer, outputs, inputs))


class PeftSettings(RouterSettings, AdapterSettings):
    """The keys that adapters of PEFT share."""

    modules_to_save: list[Text] = Field(
        default_factory=list,
        description="ends of the names of modules that train whole and are saved with the "
        "adapter, as in PEFT: embed_tokens, lm_head, norm (all whose names end so)",
    )
    from_adapter: PathText | None = Field(
        None,
        description="folder of an adapter in PEFT layout, trained on the same base: its training "
        "continues. The other keys must be as it was trained",
    )

    @property
    def initial_adapter(self) -> str | None:
        return self.from_adapter

    @property
    def whole_modules(self) -> list[str]:
        return self.modules_to_save


class LowRankSettings(PeftSettings):
    """The keys of adapters that are a product of two matrices."""

    r: Count = Field(16, description="rank; 8 for simple tasks, 32 to 64 for domain knowledge")
    dropout: Annotated[float, Field(ge=0, lt=1)] = Field(0.05, description="on the adapter's input")

    @property
    def rank(self) -> int:
        return self.r

    @property
    def has_dropout(self) -> bool:
        return self.dropout > 0
