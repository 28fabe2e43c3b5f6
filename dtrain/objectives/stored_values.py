"""Values that a model computes once for every sequence of a stage, and that are read in each step.

They may be one row per document, such as a reference's log-probabilities, or one per target, such
as a teacher's logits.

    FOLDER/inputs.json          what decides the values; FOLDER is named after its fingerprint
    FOLDER/HASH.safetensors     the values of some sequences; HASH is of the file's content

The ranks share the work in blocks, each of which leaves files. A computation that was interrupted
continues with the sequences that are in no file, on any number of ranks. Every node writes all
files, so the cache may be local to a node.

Letters: S sequences, N rows of values.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import torch.distributed as dist
from blake3 import blake3
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from dtrain.core.errors import Exit, UserError
from dtrain.core.files import write_atomic, write_sealed
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.log import warn
from dtrain.data.loader import NO_SEQUENCE, Loader, MicroBatch
from dtrain.distributed.tensor_utils import all_finite, send
from dtrain.distributed.world import World

BLOCK_BATCHES = 64  # micro-batches of a rank between two files
IDS, ROWS = "sequence_ids", "rows"  # the tensors of a file in addition to the values
NOTHING = np.empty(0, dtype=np.int64)

Per = Literal["document", "target"]
ComputeFn = Callable[[MicroBatch], Mapping[str, Tensor]]
"""Computes named values [N, …] of a micro-batch: a row for each document or each target."""


class StoredValues:
    """The values of the sequences of a stage or of a held-out set. All ranks call it alike.

    Args:
        folder: in the cache.
        inputs: what decides the values in addition to the data, as JSON can represent it.
        loader: whose sequences have values.
        per: what a row of values belongs to.
    """

    def __init__(
        self, folder: Path, inputs: Mapping[str, Any], loader: Loader, world: World, *, per: Per
    ) -> None:
        self._inputs = {**inputs, "data": loader.dataset.fingerprint, "per": per}
        self.folder = folder / fingerprint(self._inputs)
        self._loader, self._world, self._per = loader, world, per
        if world.local_rank == 0:
            self._remove_damaged()
        world.barrier()
        self._open()

    def missing(self) -> NDArray[np.int64]:
        """Ids of the sequences, ascending, that on some rank have no values: the same on all."""
        self._open()  # another objective may have written them
        dataset, total = self._loader.dataset, self._loader.total_sequences
        needed = np.unique(dataset.sequence_ids_at(0, total, self._loader.seed))
        is_missing = torch.from_numpy(~np.isin(needed, self._ids)).to(torch.uint8)
        dist.all_reduce(is_missing, dist.ReduceOp.MAX, group=self._world.gloo_group)
        return needed[is_missing.bool().numpy()]

    def compute(self, values: ComputeFn, micro_batch: int) -> Iterator[int]:
        """Compute and store what is missing; yield the number of sequences of each block.

        Args:
            values: called on all ranks equally often, without a gradient, with micro-batches on
                the device; for a rank that has no sequence left, with one of no target.
            micro_batch: sequences at once.

        Raises:
            UserError: a value is not finite.
        """
        world, missing = self._world, self.missing()
        batches = [missing[i : i + micro_batch] for i in range(0, len(missing), micro_batch)]
        if world.local_rank == 0:
            write_sealed(self.folder / "inputs.json", self._inputs)
        for start in range(0, len(batches), BLOCK_BATCHES * world.size):
            block = batches[start : start + BLOCK_BATCHES * world.size]
            turns = -(-len(block) // world.size)
            mine = block[world.rank :: world.size]
            mine += [NOTHING] * (turns - len(mine))
            for content in world.gather_bytes(self._compute(values, mine)):
                if content and world.local_rank == 0:
                    self._write(content)
            yield sum(map(len, block))
        world.barrier()
        self._open()

    def read(self, batch: MicroBatch) -> dict[str, Tensor]:
        """The values [N, …] of a micro-batch, on its device, in the order of its documents or
        targets; zeros for the document of a micro-batch without sequences."""
        parts = [self._read_sequence(number) for number in batch.sequence_ids]
        device = batch.targets.device
        return {name: send(torch.cat([p[name] for p in parts]), device) for name in parts[0]}

    @torch.no_grad()
    def _compute(self, values: ComputeFn, batches: list[NDArray[np.int64]]) -> bytes:
        """The values of some micro-batches as the content of a file; empty without sequences."""
        computed, rows = list[Mapping[str, Tensor]](), [NOTHING]
        for ids in batches:
            batch = self._loader.read(ids)
            found = values(batch.to(self._world.device))
            if len(ids):
                computed.append({name: value.cpu() for name, value in found.items()})
                rows.append(self._rows_per_sequence(batch))
        if not computed:
            return b""
        tensors = {name: torch.cat([c[name] for c in computed]) for name in computed[0]}
        for name, tensor in tensors.items():
            if not all_finite(tensor):
                message = (
                    f"the model that the stage starts from computes {name} that are not finite"
                )
                raise UserError(message, fix="check model.base", status=Exit.NON_FINITE)
        counts = torch.from_numpy(np.concatenate(rows))
        tensors |= {IDS: torch.from_numpy(np.concatenate(batches)), ROWS: counts}
        assert all(len(tensors[name]) == counts.sum() for name in computed[0])
        return save(tensors, {"inputs": self.folder.name})

    def _rows_per_sequence(self, batch: MicroBatch) -> NDArray[np.int64]:
        positions = batch.target_positions.numpy()
        if self._per == "document":
            positions = batch.document_starts
        return np.bincount(batch.sequences_at(positions), minlength=len(batch.sequence_lengths))

    def _write(self, content: bytes) -> None:
        path = self.folder / f"{blake3(content).hexdigest()}.safetensors"
        if not path.exists():  # another node may have written it to a cache that both see
            write_atomic(path, content)

    def _remove_damaged(self) -> None:
        for path in self.folder.glob("*.safetensors"):
            with suppress(SafetensorError), safe_open(path, "pt") as file:
                is_own = (file.metadata() or {}).get("inputs") == self.folder.name
                if is_own and file_hash(path) == path.stem:
                    continue
            warn(f"{path}: its content is not what was written; it is computed again")
            path.unlink(missing_ok=True)

    def _open(self) -> None:
        """Map all files and index their sequences."""
        paths = sorted(self.folder.glob("*.safetensors"))
        self._files = [safe_open(path, "pt") for path in paths]
        ids = [file.get_tensor(IDS).numpy() for file in self._files]
        rows = [file.get_tensor(ROWS).numpy() for file in self._files]
        starts = [np.cumsum(counts) - counts for counts in rows]
        numbers = [np.full(len(part), number) for number, part in enumerate(ids)]
        self._ids, first = np.unique(np.concatenate([NOTHING, *ids]), return_index=True)
        table = [np.concatenate([NOTHING, *parts])[first] for parts in (numbers, starts, rows)]
        self._ranges = np.stack(table, axis=1)  # file, first row and number of rows, [S, 3]

    def _read_sequence(self, number: int) -> dict[str, Tensor]:
        if number == NO_SEQUENCE:
            rows = int(self._per == "document")
            like = {name: self._slice(0, name, 0, 0) for name in self._names}
            return {name: value.new_zeros(rows, *value.shape[1:]) for name, value in like.items()}
        index = int(np.searchsorted(self._ids, number))
        assert index < len(self._ids) and self._ids[index] == number, "not computed"
        file, start, rows = self._ranges[index].tolist()
        return {name: self._slice(file, name, start, start + rows) for name in self._names}

    @property
    def _names(self) -> list[str]:
        return sorted(set(self._files[0].keys()) - {IDS, ROWS})

    def _slice(self, file: int, name: str, start: int, stop: int) -> Tensor:
        values: Tensor = self._files[file].get_slice(name)[start:stop]
        return values
