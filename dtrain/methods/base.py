"""The protocol of a fine-tuning method: what it makes trainable in a base, and what it saves.

What needs no torch (recipe keys, memory, whether it merges) is in `dtrain/config/methods/`. To
add a method, add its settings and traits there, and the class that the traits name here.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from dtrain.config.methods import MethodSettings, MethodTraits
from dtrain.core.lazy_import import import_object
from dtrain.distributed.world import World

Settings = TypeVar("Settings", bound=MethodSettings)


@dataclass(frozen=True)
class MethodContext:
    """What a method may need to compute first values from the base's weights.

    Attributes:
        base: folder of the model that the stage starts from.
        base_identity: hash of that model.
        dtype: that the base is loaded in.
        cache: folder for what is computed once.
    """

    base: Path
    base_identity: str
    dtype: torch.dtype
    cache: Path
    world: World


class Method(ABC, Generic[Settings]):
    """A method with the settings of a stage.

    Attributes:
        new_tokens: numbers of the tokens that the run has added to its base, whose rows train.
    """

    new_tokens: Sequence[int] = ()

    def __init__(self, settings: Settings) -> None:
        self.settings = settings

    @property
    def traits(self) -> MethodTraits:
        """The method's traits that need no torch."""
        return self.settings.traits

    def base_dtype(self, compute_dtype: torch.dtype) -> torch.dtype:
        """The dtype to load the base in; what trains is kept in float32."""
        return torch.float32 if self.traits.trains_base else compute_dtype

    @abstractmethod
    def attach(
        self, model: PreTrainedModel, *, seed: int, device: torch.device | None = None
    ) -> nn.Module:
        """Make a frozen base trainable; its parameters may still be on the meta device.

        Args:
            model: from `load_base` or `stream_base`.
            seed: decides the first values of what is added, together with the layers' names and
                nothing else: they are the same on every rank, device and dtype.
            device: of what is added; that of its layer if None.

        Returns:
            The model to train: its parameters that require a gradient are float32.

        Raises:
            UserError: the settings do not fit the model.
        """

    def on_attached(self, model: nn.Module, context: MethodContext) -> None:
        """Set first values that depend on the base's files; called once, on all ranks.

        Args:
            model: from `attach`; the base's weights are not loaded yet.

        Raises:
            UserError: the base has no such values.
        """
        return

    def on_weights_loaded(self, block: nn.Module) -> None:
        """Called when a block's base weights are loaded, before an engine shards them.

        Args:
            block: a decoder layer, or the whole model after its layers.
        """
        return

    @abstractmethod
    def changed_tensors(self, model: nn.Module) -> set[str]:
        """Names, in the base, of the parameters that the merge will change."""

    def save(
        self,
        folder: Path,
        model: nn.Module,
        tensors: dict[str, Tensor],
        *,
        base: str | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        """Write what was added to the base, in PEFT layout; nothing if nothing was.

        Args:
            folder: replaced as a whole if it exists.
            model: from `attach`, for its settings and the names of what trains.
            tensors: whole tensors by `named_parameters()` name.
            base: the base that PEFT shall load; not named if None.
            files: text of other files to save in the folder, by name.

        Raises:
            UserError: a value is not finite.
        """
        return


def build_method(settings: MethodSettings, new_tokens: Sequence[int] = ()) -> Method[Any]:
    """The method that a stage's settings name.

    Args:
        new_tokens: numbers of the tokens that the run has added to its base.
    """
    method: Method[Any] = import_object(settings.traits.implementation)(settings)
    method.new_tokens = tuple(new_tokens)
    return method


def summarize_names(names: Iterable[str]) -> str:
    """The first modules of parameters or layers, by the two leading parts of their names.

    Those of numbered layers are named whole, for all layers together.
    """
    stems = sorted({_stem(name.split(".")) for name in names})
    return ", ".join(stems[:3]) + (", …" if len(stems) > 3 else "")


def _stem(parts: list[str]) -> str:
    if not any(part.isdigit() for part in parts[:3]):
        return ".".join(parts[:2])
    return ".".join("*" if part.isdigit() else part for part in parts)
