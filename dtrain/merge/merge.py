"""A base folder and what was trained → a plain Hugging Face model, a block of rows at a time."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.core.files import json_text, write_json
from dtrain.core.hardware import workers_that_fit
from dtrain.core.hash_cache import file_state, lookup_hash, remember_hash
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.log import progress, say
from dtrain.core.stage_dir import ADAPTER_CONFIG, MERGE_MANIFEST, read_merge_manifest
from dtrain.core.units import size
from dtrain.core.weight_files import INDEX, SINGLE, read_header, weight_files
from dtrain.merge.base_tensors import (
    FLOATS,
    BaseTensors,
    untied_config,
)
from dtrain.merge.converted_changes import stored_changes
from dtrain.merge.merge_inputs import MergeInput
from dtrain.merge.merged_model import MergedModel
from dtrain.merge.provenance import combined_fingerprint
from dtrain.merge.resumable_dir import ResumableDir
from dtrain.merge.stream import AddedTensor, ChangeBlocks, rewrite_file

# Files other than the weights: config, tokenizer, template, license, the model's code.
COPIED_PATTERNS = (
    "*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "NOTICE*"
)  # fmt: skip
NOT_COPIED = (INDEX, MERGE_MANIFEST, ADAPTER_CONFIG)
SPARE_BYTES = 64 << 20
MAX_SHARDS_AT_ONCE = 8
SHARD_BYTES = 64 << 20  # a shard being rewritten needs about 20 MB
FORMAT = 4  # of the result; a merge of another format is not continued


@dataclass(frozen=True)
class TrainedWeights:
    """All weights of a model after full fine-tuning.

    Attributes:
        shapes: by `named_parameters()` name; of tied parameters one name is enough.
        read: (name, start, stop) → elements [start, stop) of the flattened parameter.
        content_hash: hash of everything that `read` returns.
    """

    shapes: Mapping[str, Sequence[int]]
    read: Callable[[str, int, int], Tensor]
    content_hash: str


@dataclass(frozen=True)
class MergeJob:
    """One merge: which base, into which folder, and what the result says about itself.

    Shards, dtypes and all other files stay as they are in the base. A tensor is computed in
    float32 and rounded once to its own dtype: for float32, bfloat16 and float16 bases with a
    float32 adapter the result equals PEFT's merge_and_unload bit for bit. What the base stores as
    codes and scales is written as bfloat16. After an interruption,
    the same job continues with the missing shards; several processes that run the same job share
    its shards.

    Attributes:
        output: a new folder; it appears complete or not at all.
        source: what the model was made from, for the manifest.
        processes: shards that are rewritten at once, each in a thread.
        expected_bases: the base must have one of these fingerprints; empty: any base.
        files: text files that replace the base's or are added to them, by name.

    Raises:
        UserError: the output is the base, or the base is not a complete model.
    """

    base: Path
    output: Path
    source: str
    processes: int = 1
    expected_bases: Sequence[str] = ()
    files: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.output.resolve() == self.base.resolve():
            raise UserError("would overwrite the base", where=str(self.output))

    @cached_property
    def tensors(self) -> BaseTensors:
        """Names, dtypes and shapes of the base's tensors."""
        return BaseTensors(self.base)

    @cached_property
    def weights(self) -> list[Path]:
        """The base's weight files; the result's have the same names."""
        return weight_files(self.base)

    def merge_adapters(self, inputs: Sequence[MergeInput]) -> None:
        """Add adapters to the base, one after another, and write the result.

        A tied embedding and output head become two tensors where the adapters change them
        differently.

        Raises:
            UserError: the output exists, the disk is too small, the base is not the expected one,
                or a value is not finite.
        """
        names = set().union(*(item.names for item in inputs)) & self.tensors.keys()
        pair = self.tensors.tied if any(item.change.unties for item in inputs) else None
        added, files = dict[str, AddedTensor](), dict(self.files)
        if pair:
            files["config.json"] = json_text(untied_config(self.base))
            if name := pair.missing:
                change = partial(_apply_all, inputs, name, FLOATS[self.tensors[pair.stored][0]])
                added[name] = AddedTensor(self.tensors.files[pair.stored], change)
        changes = {
            name: partial(_apply_all, inputs, name, FLOATS[self.tensors[name][0]])
            for name in sorted(names)
        }
        description = {"source": self.source, "adapters": [item.description for item in inputs]}
        self._write(MergedModel(stored_changes(changes, self.tensors), added, files, description))

    def replace_weights(self, trained: TrainedWeights) -> None:
        """Write the fully fine-tuned model, in the layout and dtypes of its base.

        Raises:
            UserError: the base has no such tensor, or one of another shape; as `merge_adapters`.
        """
        changes: dict[str, ChangeBlocks] = {}
        for name, shape in trained.shapes.items():
            stored = self.tensors.stored_name(name)
            if stored is None and (parts := self.tensors.expert_parts.get(name)):
                changes |= self._replace_experts(trained, name, tuple(shape), parts)
                continue
            if stored is None or self.tensors[stored][1] != list(shape):
                raise UserError(f"{name} {list(shape)} is not in the base", where=str(self.base))
            changes[stored] = partial(_replace_blocks, trained.read, name, 0)
        pair = self.tensors.tied_pair_among(set(changes))
        if pair is not None and pair.missing is None:  # one matrix that is stored twice
            change = next(changes[name] for name in pair.names if name in changes)
            changes |= {name: changes.get(name, change) for name in pair.names}
        description = {"source": self.source, "adapters": [], "weights": trained.content_hash}
        changes = stored_changes(changes, self.tensors)
        self._write(MergedModel(changes, {}, self.files, description))

    def _replace_experts(
        self, trained: TrainedWeights, name: str, shape: Sequence[int], parts: list[Any]
    ) -> dict[str, ChangeBlocks]:
        """The changes of the tensors that a parameter [E, rows, columns] is stored as."""
        experts, rows, columns = shape
        changes: dict[str, ChangeBlocks] = {}
        for part in parts:
            at, count = part.share
            if (
                self.tensors[part.name][1] != [rows // count, columns]
                or len(parts) != experts * count
            ):
                raise UserError(f"{name} {list(shape)} is not in the base", where=str(self.base))
            start = (part.expert * rows + at * (rows // count)) * columns
            changes[part.name] = partial(_replace_blocks, trained.read, name, start)
        return changes

    def _write(self, model: MergedModel) -> None:
        self.tensors.check_complete()
        model = model.decoded(self.tensors).indexed(self.base)
        hashes = [lookup_hash(path) for path in self.weights]
        if all(hashes):  # a wrong base is then reported before the work, not after it
            self._check_base(combined_fingerprint([str(digest) for digest in hashes], self.base))
        plan = fingerprint(self._plan(model))
        try:
            work = ResumableDir(self.output, {"plan": plan})
            if not self._is_complete(plan, work):
                self._write_into(work, model, plan)
        except OSError as error:  # no permission, no space left, a failing disk
            raise UserError(
                f"cannot be written: {error.strerror or error}",
                where=str(self.output),
                fix="fix the cause, then run the same command again: it continues",
            ) from error

    def _plan(self, model: MergedModel) -> dict[str, Any]:
        """Everything that decides the result; the base's weights by size, time and header."""
        return {
            "format": FORMAT,
            "base": [
                (
                    p.name,
                    p.stat().st_size,
                    p.stat().st_mtime_ns,
                    fingerprint(read_header(p)[1].hex()),
                )
                for p in self.weights
            ],
            "description": model.description,
            "copied": {path.name: file_hash(path) for path in self._copied(model)},
            "files": dict(model.files),
            "added": sorted(model.added),
        }

    def _copied(self, model: MergedModel) -> list[Path]:
        """The base's files that are copied unchanged."""
        paths = {p for pattern in COPIED_PATTERNS for p in self.base.glob(pattern) if p.is_file()}
        paths = {path for path in paths if path.name not in NOT_COPIED}
        if self.weights[0].name != SINGLE:
            paths.add(self.base / INDEX)
        return sorted(path for path in paths if path.name not in model.files)

    def _is_complete(self, plan: str, work: ResumableDir) -> bool:
        """Return whether the output is this job's result; a stopped call had only to clean up."""
        if not self.output.exists():
            return False
        work.discard()
        is_merged = (self.output / MERGE_MANIFEST).is_file()
        if not is_merged or read_merge_manifest(self.output).get("plan") != plan:
            raise UserError("exists already", where=str(self.output), fix="choose another folder")
        say(f"{self.output} is already complete")
        return True

    def _write_into(self, work: ResumableDir, model: MergedModel, plan: str) -> None:
        self._check_disk(work, model)
        try:
            self._rewrite_shards(work, model)
            if work.claim_publishing():
                self._publish(work, model, plan)
        except UserError:
            work.discard()
            raise
        finally:
            work.close()

    def _check_disk(self, work: ResumableDir, model: MergedModel) -> None:
        total = sum(path.stat().st_size for path in self.weights)
        needed = total + model.more_bytes + SPARE_BYTES - work.bytes_written()
        free = shutil.disk_usage(self.output.absolute().parent).free
        if free < needed and not self.output.exists():  # else another process has published it
            (work.close if work.bytes_written() else work.discard)()
            message = f"the merged model needs {size(needed)}, {size(free)} are free"
            raise UserError(message, where=str(self.output))

    def _rewrite_shards(self, work: ResumableDir, model: MergedModel) -> None:
        """Rewrite every shard, shared with other processes; all are done when this returns."""
        tensor_counts = [len(read_header(path)[0]) for path in self.weights]
        with progress(f"merging into {self.output.name}", sum(tensor_counts)) as bar:

            def rewrite(index: int, wait: bool = False) -> bool:
                path = self.weights[index]
                if not work.claim(index, wait=wait):
                    return False
                if work.is_done(path.name):
                    bar.advance(tensor_counts[index])
                else:
                    target = work.target / path.name
                    layout = model.added, model.dropped.keys()
                    before, after = rewrite_file(path, target, model.changes, bar, *layout)
                    work.record(path.name, {"before": before, "after": after})
                work.release(index)
                return True

            # One core each: torch's idle worker threads spin, and hashing needs the other cores.
            threads = torch.get_num_threads()
            pool = ThreadPoolExecutor(
                self.processes, initializer=torch.set_num_threads, initargs=(1,)
            )
            try:
                futures = [pool.submit(rewrite, index) for index in range(len(self.weights))]
                claimed = [index for index, future in enumerate(futures) if not future.result()]
            finally:
                pool.shutdown(cancel_futures=True)
                torch.set_num_threads(threads)  # it also holds for threads started later
            for index in claimed:  # wait until they are done, or free because their process died
                rewrite(index, wait=True)

    def _publish(self, work: ResumableDir, model: MergedModel, plan: str) -> None:
        """Add all other files and the manifest, then rename the folder to the output."""
        shards = {path.name: work.recorded(path.name) for path in self.weights}
        base_fingerprint = combined_fingerprint([s["before"] for s in shards.values()], self.base)
        self._check_base(base_fingerprint)
        hashes = {name: shard["after"] for name, shard in shards.items()}
        for path in (copied := self._copied(model)):
            shutil.copyfile(path, work.target / path.name)  # content only: it may be read-only
        for name, text in model.files.items():
            (work.target / name).write_text(text, encoding="utf-8")
        for name in (*model.files, *(path.name for path in copied)):
            hashes[name] = file_hash(work.target / name)
        after = [shard["after"] for shard in shards.values()]
        manifest = {
            "format": FORMAT,
            "plan": plan,
            "base": base_fingerprint,
            "result": combined_fingerprint(after, work.target),
            "files": dict(sorted(hashes.items())),
        }
        write_json(work.target / MERGE_MANIFEST, model.description | manifest)
        work.publish({MERGE_MANIFEST, *hashes})
        for name, shard in shards.items():  # the result may be the next stage's base
            path = self.output / name
            remember_hash(path, shard["after"], file_state(path), written_here=True)

    def _check_base(self, base_fingerprint: str) -> None:
        if self.expected_bases and base_fingerprint not in self.expected_bases:
            raise UserError(
                "is not the base that the adapter was trained on",
                where=str(self.base),
                fix="adapter_config.json names its base (base_model_name_or_path); stage.json and "
                "the base's merge.json record what was made from what",
            )


def check_mergeable(base: Path, changed: Iterable[str]) -> None:
    """Check that a merge can write every trained parameter back into the base's files.

    Args:
        changed: the model's own names of the parameters that the merge changes.

    Raises:
        UserError: a parameter is stored in another layout, or not as a plain float.
    """
    tensors = BaseTensors(base)
    for name in sorted(changed):
        stored = [tensors.stored_name(name) or ""]
        if not stored[0] and tensors.tied and name in tensors.tied.names:
            stored = [tensors.tied.stored]
        if not stored[0]:
            stored = [part.name for part in tensors.expert_parts.get(name, ())] or [""]
        unknown = [x for x in stored if x not in tensors]
        dtypes = {tensors[x][0] for x in stored if x not in unknown} - FLOATS.keys()
        if unknown or dtypes:
            reason = tensors.why_not_written(name)
            form = f"as {dtypes.pop()}" if dtypes else "in another layout"
            raise UserError(
                f"{name} changes, but the base's files store it {form}, which a merge cannot "
                "write" + (f": {reason}" if reason else ""),
                where=str(base),
                fix="leave it out of method.target_modules (experts: method.experts=false); or "
                "train one stage with output.merge=false",
            )


def default_processes() -> int:
    """Return how many shards to rewrite at once: as many as cores and memory allow, at most 8."""
    return min(workers_that_fit(SHARD_BYTES), MAX_SHARDS_AT_ONCE)


def _apply_all(
    inputs: Sequence[MergeInput], name: str, stored: torch.dtype, blocks: Iterator[Tensor]
) -> Iterator[Tensor]:
    for item in inputs:
        if name in item.names:
            blocks = item.apply(name, stored, blocks)
    return blocks


def _replace_blocks(
    read: Callable[[str, int, int], Tensor], name: str, start: int, blocks: Iterator[Tensor]
) -> Iterator[Tensor]:
    for block in blocks:
        yield read(name, start, start + block.numel()).view(block.shape)
        start += block.numel()
