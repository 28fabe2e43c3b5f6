"""A and B of layers, computed from the base's weights once and kept in the cache.

    FOLDER/LAYER-HASH.safetensors    LAYER is a hash of the layer's name, HASH of the file's content

The ranks share the layers, and an interrupted computation continues with those that are missing.
Every node writes all files, so the cache may be local to a node.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from blake3 import blake3
from safetensors.torch import load, save
from torch import Tensor

from dtrain.core.errors import Exit, UserError
from dtrain.core.files import write_atomic
from dtrain.core.log import progress
from dtrain.distributed.tensor_utils import all_finite
from dtrain.distributed.world import World

Factors = tuple[Tensor, Tensor]
"""A [r, h] and B [o, r], float32."""


class FactorStore:
    """The factors of a model's layers; all ranks call it alike.

    Args:
        folder: in the cache, named after what decides the factors.
        compute: the factors of a layer, by its name.
    """

    def __init__(self, folder: Path, compute: Callable[[str], Factors], world: World) -> None:
        self._folder, self._compute, self._world = folder, compute, world

    def fill(self, layers: Sequence[str]) -> None:
        """Compute what is missing on any node.

        Raises:
            UserError: a weight of the base is not finite.
        """
        world = self._world
        is_missing = torch.tensor([self._content(x) is None for x in layers], dtype=torch.uint8)
        dist.all_reduce(is_missing, dist.ReduceOp.MAX, group=world.gloo_group)
        missing = [layer for layer, lacks in zip(layers, is_missing.tolist(), strict=True) if lacks]
        if not missing:
            return
        with progress("factors of the base's weights", len(missing)) as bar:
            for start in range(0, len(missing), world.size):
                turn = missing[start : start + world.size]
                own = turn[world.rank : world.rank + 1]
                contents = world.gather_bytes(self._encode(own[0]) if own else b"")
                for layer, content in zip(turn, contents, strict=False):
                    self._write(layer, content)
                bar.advance(len(turn))
        world.barrier()

    def read(self, layer: str) -> Factors:
        """The factors of a layer that `fill` was called with."""
        content = self._content(layer)
        assert content is not None, f"{layer} is not in {self._folder}"
        tensors = load(content)
        return tensors["a"], tensors["b"]

    def _encode(self, layer: str) -> bytes:
        a, b = (factor.float().contiguous().cpu() for factor in self._compute(layer))
        if not (all_finite(a) and all_finite(b)):
            message = f"the weight of {layer} is not finite, or has no factors that are"
            raise UserError(message, fix="check model.base", status=Exit.NON_FINITE)
        return save({"a": a, "b": b})

    def _write(self, layer: str, content: bytes) -> None:
        path = self._folder / f"{_key(layer)}-{blake3(content).hexdigest()}.safetensors"
        if self._world.local_rank == 0 and self._content(layer) is None:
            write_atomic(path, content)

    def _content(self, layer: str) -> bytes | None:
        """A layer's file, if there is an undamaged one."""
        for path in sorted(self._folder.glob(f"{_key(layer)}-*.safetensors")):
            content = path.read_bytes()
            if path.stem.partition("-")[2] == blake3(content).hexdigest():
                return content
        return None


def _key(layer: str) -> str:
    return blake3(layer.encode()).hexdigest()[:32]
