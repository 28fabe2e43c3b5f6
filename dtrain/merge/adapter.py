"""A LoRA adapter in PEFT layout, checked against the base it is to be merged into.

Letters: r rank, out and in a layer's sizes; a base weight is [out, in].
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError, safe_open
from torch import Tensor

from dtrain.core.errors import Exit, UserError
from dtrain.core.files import read_json
from dtrain.models.finite import all_finite

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
PREFIX = "base_model.model."
SUFFIXES = {".lora_A.weight": "a", ".lora_B.weight": "b"}
FLOATS = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}
# Settings under which a merged weight is not base + scale·B·A, and the value that leaves it so.
UNSUPPORTED = {"use_dora": False, "use_bdlora": None, "alora_invocation_tokens": None}


@dataclass(frozen=True)
class Layer:
    """One adapted layer: the keys of A [r, in] and B [out, r], and the factor of B·A."""

    a: str
    b: str
    r: int
    scale: float


class Adapter:
    """An adapter's layers by the name of the base tensor that each changes.

    Raises:
        UserError: not a LoRA adapter, a half layer, ranks that disagree with the config.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.config = _read_config(folder)
        self.transposed = bool(self.config.get("fan_in_fan_out"))
        self.layers = self._find_layers()

    def _find_layers(self) -> dict[str, Layer]:
        halves: dict[str, dict[str, str]] = {}
        with self._open() as file:
            for key in file.keys():  # noqa: SIM118 - safe_open is no mapping
                suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
                if suffix is None or not key.startswith(PREFIX):
                    raise UserError(f"{key} is not part of a plain LoRA", where=str(self.folder))
                module = key.removeprefix(PREFIX).removesuffix(suffix)
                halves.setdefault(module, {})[SUFFIXES[suffix]] = key
        for module, keys in halves.items():
            if len(keys) != 2:
                raise UserError(f"{module} has only half an adapter", where=str(self.folder))
        if not halves:
            raise UserError("the adapter holds no tensors", where=str(self.folder))
        return {f"{m}.weight": self._layer(m, k) for m, k in sorted(halves.items())}

    def _layer(self, module: str, keys: dict[str, str]) -> Layer:
        """Rank and scale as PEFT finds them: by pattern, else the adapter's own."""
        ranks = self.config.get("rank_pattern") or {}
        alphas = self.config.get("alpha_pattern") or {}
        r = ranks.get(get_pattern_key(list(ranks), module), self.config["r"])
        alpha = alphas.get(get_pattern_key(list(alphas), module), self.config["lora_alpha"])
        divisor = math.sqrt(r) if self.config.get("use_rslora") else r
        return Layer(keys["a"], keys["b"], r, alpha / divisor)

    def check_against(self, shapes: dict[str, tuple[str, list[int]]]) -> None:
        """Refuse what cannot be merged, before a byte is written.

        Args:
            shapes: dtype and shape of each tensor of the base.

        Raises:
            UserError: a layer the base has not, a shape or rank that disagrees, non-finite values.
        """
        with self._open() as file:
            for name, layer in self.layers.items():
                if name not in shapes:
                    raise UserError(
                        f"{layer.a} matches nothing in the base (no {name})",
                        where=str(self.folder),
                        fix="merge into the base that the adapter was trained on",
                    )
                self._check_shapes(file, layer, name, *shapes[name])
                for key in (layer.a, layer.b):
                    if not all_finite(file.get_tensor(key)):
                        raise UserError(
                            f"{key} is not finite", where=str(self.folder), status=Exit.NON_FINITE
                        )

    def _check_shapes(
        self, file: Any, layer: Layer, name: str, dtype: str, shape: list[int]
    ) -> None:
        a, b = (file.get_slice(key).get_shape() for key in (layer.a, layer.b))
        where = str(self.folder)
        if dtype not in FLOATS:
            raise UserError(f"{name} of the base is {dtype}, not a plain float", where=where)
        if len(a) != 2 or len(b) != 2 or not a[0] == b[1] == layer.r:
            raise UserError(
                f"ranks of {name} disagree: {CONFIG} says {layer.r}, A is {a}, B is {b}",
                where=where,
            )
        found = [a[1], b[0]] if self.transposed else [b[0], a[1]]
        if found != shape:
            raise UserError(f"{name} is {shape} in the base, {found} in the adapter", where=where)

    def add(self, name: str, old: Tensor) -> Tensor:
        """base + scale·B·A for one base tensor, in float32.

        The product is made whole, not in blocks of rows: a block of one to three rows goes
        through another BLAS kernel and differs from PEFT's product in the last bit.
        """
        layer = self.layers[name]
        with self._open() as file:
            a, b = (file.get_tensor(key).float() for key in (layer.a, layer.b))
        product = (b @ a).mul_(layer.scale)
        return (product.T if self.transposed else product).add_(old)

    def _open(self) -> Any:
        path = self.folder / WEIGHTS
        try:
            return safe_open(path, framework="pt")
        except FileNotFoundError as error:
            raise UserError(
                f"no {WEIGHTS}", where=str(self.folder), fix="pickled adapters are not read"
            ) from error
        except SafetensorError as error:
            raise UserError("not a whole safetensors file", where=str(path)) from error


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    config = read_json(path)
    if not isinstance(config, dict) or config.get("peft_type") != "LORA":
        raise UserError("is not the config of a LoRA adapter", where=str(path))
    for key, plain in UNSUPPORTED.items():
        if config.get(key) not in (plain, None):
            raise UserError(f"an adapter with {key} cannot be merged here", where=str(path))
    missing = [key for key in ("r", "lora_alpha") if not isinstance(config.get(key), int | float)]
    if missing:
        raise UserError(f"no {missing[0]} in it", where=str(path))
    return config
