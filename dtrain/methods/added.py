"""What all methods that add parameters share: their first values, and their folder."""

from __future__ import annotations

import shutil
import tempfile
from abc import abstractmethod
from collections.abc import Container, Iterator, Mapping
from hashlib import blake2b
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from dtrain.config.methods import MethodSettings
from dtrain.core.errors import Exit, UserError
from dtrain.core.files import atomic_folder, write_json
from dtrain.core.ownership import share_with_group
from dtrain.core.stage_dir import ADAPTER_CONFIG
from dtrain.distributed.tensor_utils import all_finite
from dtrain.methods.base import Method
from dtrain.models.peft_format import WEIGHTS, file_key
from dtrain.models.token_rows import MARK

Settings = TypeVar("Settings", bound=MethodSettings)


class AddedMethod(Method[Settings]):
    """A frozen base, and float32 parameters that are added to it and saved in PEFT layout."""

    @abstractmethod
    def initialize(self, name: str, tensor: Tensor, generator: torch.Generator) -> None:
        """Set the first values of one parameter of the adapter, which are zero before.

        Args:
            tensor: float32, on the CPU.
            generator: seeded by the recipe's seed and the parameter's name.
        """

    def initialize_all(
        self,
        model: nn.Module,
        seed: int,
        device: torch.device | None,
        others: Container[str] = (),
    ) -> None:
        """Set the first values of all that trains, on any rank and device the same.

        Args:
            device: where to put them; where they are if None.
            others: names of parameters that train and have their values from elsewhere.
        """
        for name, parameter in list(model.named_parameters()):
            if not parameter.requires_grad or name in others:
                continue
            if (device or parameter.device).type == "meta":  # no values are asked for
                _replace(model, name, torch.zeros(parameter.shape, device="meta"))
                continue
            values = torch.zeros(parameter.shape, dtype=torch.float32, device="cpu")
            digest = blake2b(f"{seed} {name}".encode(), digest_size=8).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest, "big") >> 1)
            self.initialize(name, values, generator)
            _replace(model, name, values.to(device or parameter.device))

    def save(
        self,
        folder: Path,
        model: nn.Module,
        tensors: dict[str, Tensor],
        *,
        base: str | None = None,
        files: Mapping[str, str] | None = None,
    ) -> None:
        _check_tensors(model, tensors)
        named = dict(_with_tied(model, tensors))
        stored = {n: t.contiguous().cpu() for n, t in self.saved_tensors(model, named).items()}
        config = self.saved_config(model) | {"base_model_name_or_path": base}
        folder.parent.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=f".{folder.name}.", dir=folder.parent))
        try:
            with atomic_folder(staging / "new") as target:
                save_file(stored, target / WEIGHTS, metadata={"format": "pt"})
                write_json(
                    target / ADAPTER_CONFIG, dict(sorted(config.items())) | {"inference_mode": True}
                )
                for name, text in (files or {}).items():
                    (target / name).write_text(text, encoding="utf-8")
            share_with_group(staging / "new", folder.parent)
            if folder.exists():
                folder.rename(staging / "old")
            (staging / "new").rename(folder)
        finally:
            shutil.rmtree(staging, ignore_errors=True)

    def saved_tensors(self, model: nn.Module, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """What the adapter's file holds, by PEFT's keys.

        Args:
            tensors: what trained, by `named_parameters()` name.
        """
        return {file_key(name): tensor for name, tensor in tensors.items()}

    @abstractmethod
    def saved_config(self, model: nn.Module) -> dict[str, Any]:
        """The content of adapter_config.json, without the base."""

    def changed_tensors(self, model: nn.Module) -> set[str]:
        return set()  # for what does not merge


def _replace(model: nn.Module, name: str, values: Tensor) -> None:
    parent, _, leaf = name.rpartition(".")
    model.get_submodule(parent)._parameters[leaf] = nn.Parameter(values)


def _with_tied(model: nn.Module, tensors: dict[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    """All names of each tensor: PEFT reads tied modules that train whole one by one."""
    first: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if parameter.requires_grad:
            tensor = tensors[first.setdefault(parameter, name)]
            if first[parameter] == name:
                yield name, tensor
            elif MARK not in name:  # tied rows are saved once
                yield name, tensor.clone()


def _check_tensors(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    expected = {name for name, p in model.named_parameters() if p.requires_grad}
    odd = sorted(expected ^ tensors.keys())
    assert not odd, f"adapter and model disagree on {len(odd)} names: {odd[:3]}"
    for name, tensor in tensors.items():
        if not all_finite(tensor):
            raise UserError(
                f"the adapter is not finite in {name}",
                status=Exit.NON_FINITE,
                fix="resume from an earlier checkpoint with a lower train.learning_rate",
            )
