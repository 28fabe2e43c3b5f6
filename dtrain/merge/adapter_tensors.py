"""The tensors of an adapter in PEFT layout; those of VeRA as the LoRA that it equals."""

from __future__ import annotations

from functools import cached_property
from math import prod
from pathlib import Path
from typing import Any, Protocol

from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.stage_dir import ADAPTER_CONFIG
from dtrain.core.weight_files import PEFT_PREFIX
from dtrain.merge.base_tensors import BaseTensors
from dtrain.models.peft_format import WEIGHTS, file_keys
from dtrain.models.vera import projections

LORA_A, LORA_B = ".lora_A.weight", ".lora_B.weight"
VECTORS = {LORA_A: ".vera_lambda_d", LORA_B: ".vera_lambda_b"}
PROJECTIONS = {LORA_A: "base_model.vera_A", LORA_B: "base_model.vera_B"}


class AdapterTensors(Protocol):
    """The tensors of an adapter, from its folder or from a checkpoint."""

    shapes: dict[str, list[int]]

    def get(self, key: str) -> Tensor:
        """Return a tensor in float32."""

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor, as they are stored."""

    def fingerprint(self) -> str:
        """Return a hash of the content."""


class AdapterFile:
    """The tensors of an adapter folder, by their keys without the adapter's name.

    Raises:
        UserError: there is no complete safetensors file.
    """

    def __init__(self, folder: Path) -> None:
        self.folder, self._path = folder, folder / WEIGHTS
        with self._open() as file:
            self._keys = file_keys(file.keys(), self._path)
            self.shapes: dict[str, list[int]] = {
                name: file.get_slice(key).get_shape() for name, key in self._keys.items()
            }

    def get(self, key: str) -> Tensor:
        """Return a tensor in float32."""
        with self._open() as file:
            tensor: Tensor = file.get_tensor(self._keys[key])
        return tensor.float()

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor, as they are stored."""
        with self._open() as file:
            tensor: Tensor = file.get_slice(self._keys[key])[start:stop]
        return tensor

    def fingerprint(self) -> str:
        """Return a hash of the folder's two files."""
        paths = (self._path.with_name(name) for name in (ADAPTER_CONFIG, WEIGHTS))
        return fingerprint({path.name: file_hash(path) for path in paths})

    def _open(self) -> Any:
        if not self._path.is_file():
            fix = "save the adapter as safetensors; pickled adapters are not read"
            raise UserError(f"no {WEIGHTS}", where=str(self._path.parent), fix=fix)
        try:
            return safe_open(self._path, framework="pt")
        except SafetensorError as error:
            raise UserError("is not a complete safetensors file", where=str(self._path)) from error


class VeraTensors:
    """The tensors of a VeRA adapter as those of the LoRA that it equals (arXiv:2310.11454).

    A layer's change diag(b) B diag(d) A is a product of [out, r] and [r, in]. All layers share B
    and A, and use their first rows and columns; where the file lacks them, they are drawn again.

    Args:
        sizes: name of a module → sizes of its output and input.
    """

    def __init__(
        self, config: dict[str, Any], tensors: AdapterTensors, sizes: dict[str, tuple[int, int]]
    ) -> None:
        self._tensors, self._config, self._sizes = tensors, config, sizes
        replaced = (*VECTORS.values(), *PROJECTIONS.values())
        self.shapes = {k: v for k, v in tensors.shapes.items() if not k.endswith(replaced)}
        for module, (outputs, inputs) in sizes.items():
            self.shapes[f"{module}{LORA_A}"] = [config["r"], inputs]
            self.shapes[f"{module}{LORA_B}"] = [outputs, config["r"]]

    @cached_property
    def _shared(self) -> dict[str, Tensor]:
        if PROJECTIONS[LORA_A] in self._tensors.shapes:
            return {role: self._tensors.get(key) for role, key in PROJECTIONS.items()}
        outputs, inputs = (max(sizes) for sizes in zip(*self._sizes.values(), strict=True))
        seed = self._config["projection_prng_key"]
        a, b = projections(seed, self._config["r"], inputs, outputs)
        return {LORA_A: a, LORA_B: b}

    def get(self, key: str) -> Tensor:
        """Return a tensor in float32."""
        if key in self._tensors.shapes:  # a module that trained whole
            return self._tensors.get(key)
        role = LORA_A if key.endswith(LORA_A) else LORA_B
        module, (rows, columns) = key.removesuffix(role), self.shapes[key]
        vector = self._tensors.get(f"{module}{VECTORS[role]}")
        return vector.unsqueeze(-1) * self._shared[role][:rows, :columns]

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor."""
        return self.get(key)[start:stop]

    def fingerprint(self) -> str:
        """Return a hash of the content."""
        return self._tensors.fingerprint()


def vera_as_lora(
    config: dict[str, Any], tensors: AdapterTensors, base: BaseTensors, where: str
) -> tuple[dict[str, Any], AdapterTensors]:
    """The config and the tensors of the LoRA that a VeRA adapter equals.

    Raises:
        UserError: it has half a layer.
    """
    sizes: dict[str, tuple[int, int]] = {}
    for key in (key for key in tensors.shapes if ".vera_lambda_" in key):
        module, _, name = key.rpartition(".")
        if not {f"{module}{vector}" for vector in VECTORS.values()} <= tensors.shapes.keys():
            raise UserError(f"{module} has only half of an adapter", where=where)
        if name == "vera_lambda_b":
            outputs = tensors.shapes[key][0]
            stored = base.stored_name(f"{module.removeprefix(PEFT_PREFIX)}.weight")
            sizes[module] = outputs, prod(base.shape_of(stored)[1]) // outputs if stored else 0
    lora = {"peft_type": "LORA", "lora_alpha": config["r"]}
    return config | lora, VeraTensors(config, tensors, sizes)
