"""A base folder and what was trained → a plain Hugging Face model, a block of rows at a time."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from math import prod
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.core.files import read_json, write_json
from dtrain.core.hash_cache import file_state, lookup_hash, remember_hash
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.log import progress, say
from dtrain.core.run_dir import MERGE_MANIFEST
from dtrain.core.units import size
from dtrain.merge.adapter import CONFIG, Adapter
from dtrain.merge.provenance import combine
from dtrain.merge.resumable_dir import Work
from dtrain.merge.stream import Added, Change, rewrite_file
from dtrain.merge.tied_weights import FLOATS, Shapes, TiedPair, stored_tensor, untied_config
from dtrain.merge.weight_delta import Step
from dtrain.models.weight_files import INDEX, SINGLE, read_header, weight_files

# What makes a folder of weights a model: config, tokenizer, template, licence, the model's code.
BESIDE = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "NOTICE*")
NOT_BESIDE = (INDEX, MERGE_MANIFEST, CONFIG)
SPARE_BYTES = 64 << 20
MOST_AT_ONCE = 8  # shards; each needs about 20 MB
FORMAT = 4  # of the result: a merge of another format is not continued


class Part(Protocol):
    """What changes a base: an adapter, or several as one."""

    @property
    def names(self) -> set[str]:
        """Every tensor that changes."""

    def step(self, name: str) -> Step:
        """What it does to blocks of rows of a tensor."""

    @property
    def unties(self) -> bool:
        """Whether it changes an embedding and the head that is tied to it differently."""

    def needs_whole(self, name: str) -> bool:
        """Whether all rows of a tensor are needed at once."""


class Packing(Protocol):
    """A base that was held in 4 bits for training."""

    names: set[str]
    about: dict[str, Any]

    def unpacked(self, blocks: Iterator[Tensor], stored: torch.dtype) -> Iterator[Tensor]:
        """Blocks of rows as it computed with them."""


@dataclass(frozen=True)
class Applied:
    """A part that is added, and the form of the base that it was trained on.

    Attributes:
        about: plain values that say what it is, for plan and manifest.
    """

    part: Part
    about: dict[str, Any]
    packing: Packing | None = None

    @property
    def names(self) -> set[str]:
        """Every tensor that changes."""
        return self.part.names | (self.packing.names if self.packing else set())

    def apply(self, name: str, stored: torch.dtype, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        """New blocks of rows, in float32."""
        if self.packing and name in self.packing.names:
            blocks = self.packing.unpacked(blocks, stored)
        if name not in self.part.names:
            yield from blocks
            return
        step, at = self.part.step(name), 0
        if self.part.needs_whole(name):
            blocks = iter([torch.cat([block.clone() for block in blocks])])
        for block in blocks:
            yield step(block, at)
            at += len(block)


@dataclass(frozen=True)
class Weighted:
    """An adapter of which a multiple is added.

    Raises:
        UserError: another multiple than 1 of something that is not a sum.
    """

    adapter: Adapter
    weight: float = 1.0

    def __post_init__(self) -> None:
        layers = self.adapter.layers
        whole = sorted(self.adapter.trained_whole) + [n for n in layers if "m" in layers[n].keys]
        if self.weight != 1 and whole:
            what = f"{whole[0]} is not a sum of base and adapter, so it takes no weight"
            raise UserError(what, where=self.adapter.where)

    @property
    def names(self) -> set[str]:
        """Every tensor that changes."""
        return self.adapter.names

    @property
    def unties(self) -> bool:
        """Whether it changes an embedding and the head that is tied to it differently."""
        return self.adapter.unties

    def step(self, name: str) -> Step:
        """What it does to blocks of rows of a tensor."""
        return self.adapter.step(name, self.weight)

    def needs_whole(self, name: str) -> bool:
        """Whether all rows of a tensor are needed at once."""
        return self.adapter.needs_whole(name)


def part_of(adapter: Adapter, weight: float = 1.0, packing: Packing | None = None) -> Applied:
    """An adapter as merge takes it."""
    about: dict[str, Any] = {"adapter": adapter.tensors.mark(), "weight": weight}
    about["quantised"] = packing.about if packing else False
    return Applied(Weighted(adapter, weight), about, packing)


@dataclass(frozen=True)
class Model:
    """What a merge writes.

    Attributes:
        changes: of the base's tensors, by name.
        added: tensors that the base does not have, by name.
        files: text files that are written in place of the base's, or with them, by name.
        about: plain values that decide the content, for plan and manifest.
    """

    base: Path
    changes: Mapping[str, Change]
    added: Mapping[str, Added]
    files: Mapping[str, str]
    about: dict[str, Any]

    @property
    def weights(self) -> list[Path]:
        """The base's weight files; the result's have the same names."""
        return weight_files(self.base)

    @property
    def copied(self) -> list[Path]:
        """What is copied from the base as it is."""
        return [path for path in _beside(self.base) if path.name not in self.files]


def merge(
    base: Path,
    parts: Sequence[Applied],
    out: Path,
    *,
    source: str,
    processes: int = 1,
    known: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
) -> None:
    """Add adapters to a base, one after another; shards, dtypes and all other files stay.

    A tensor is computed in float32 and rounded once to its own dtype: to the bit what PEFT's
    merge_and_unload gives for float32, bfloat16 and float16 bases with a float32 adapter. Tied
    embedding and head are written apart, where PEFT ties them, if the adapters change them
    differently. After an interruption the same call continues with the missing shards.

    Args:
        out: a new folder; it appears whole or not at all.
        source: what made the model, for the manifest.
        processes: shards that are rewritten at once, each in a thread.
        known: fingerprints of which the base must have one; any base if there are none.
        files: text of files that differ from the base's, by name.

    Raises:
        UserError: OUT is there, or is BASE; too little disk; another base; non-finite values.
    """
    shapes = check_places(base, [], out)
    names = set().union(*(part.names for part in parts))
    pair = shapes.tied if any(part.part.unties for part in parts) else None
    about: dict[str, Any] = {"source": source, "adapters": [part.about for part in parts]}
    added, beside = _untied(base, shapes, parts, pair) if pair else ({}, {})
    changes = {
        name: partial(_merged, parts, name, FLOATS[shapes[name][0]])
        for name in sorted(names & shapes.keys())
    }
    model = Model(base, changes, added, {**(files or {}), **beside}, about)
    _write(model, out, processes, known)


def replace(
    base: Path,
    tensors: Mapping[str, Sequence[int]],
    read: Callable[[str, int, int], Tensor],
    out: Path,
    *,
    source: str,
    content: str,
    processes: int = 1,
    known: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
) -> None:
    """Write the model that full fine-tuning made, in its base's layout and dtypes.

    Args:
        tensors: shapes by `named_parameters()` name; of tied tensors one name is enough.
        read: gives elements [start, stop) of a flattened tensor.
        content: a hash of what `read` gives.
        files: text of files that differ from the base's, by name.

    Raises:
        UserError: the base has no such tensor, or one of another shape; non-finite values.
    """
    shapes = check_places(base, [], out)
    changes: dict[str, Change] = {}
    for name, shape in tensors.items():
        stored = shapes.stored_name(name)
        if stored is None or shapes[stored][1] != list(shape):
            raise UserError(f"{name} {list(shape)} is not in the base", where=str(base))
        changes[stored] = partial(_replaced, read, name)
    pair = shapes.changes_tied(set(changes))
    if pair is not None and pair.missing is None:  # one matrix that is stored twice
        changed = next(changes[name] for name in pair.names if name in changes)
        changes |= {name: changes.get(name, changed) for name in pair.names}
    about = {"source": source, "adapters": [], "weights": content}
    _write(Model(base, changes, {}, files or {}, about), out, processes, known)


def check_mergeable(base: Path, changed: Iterable[str]) -> None:
    """Refuse to train what a merge could not write back into the base's files.

    Args:
        changed: names that the model's modules give to the parameters that the merge changes.

    Raises:
        UserError: naming the first that no file holds as it is, or not as a plain float.
    """
    shapes = Shapes(base)
    for name in sorted(changed):
        stored = shapes.stored_name(name)
        if stored is None and shapes.tied and name in shapes.tied.names:
            stored = shapes.tied.stored
        if stored is None or shapes[stored][0] not in FLOATS:
            raise UserError(
                f"{name} is trained, and the base's files hold it in another form, which a merge "
                "cannot write",
                where=str(base),
                fix="leave it out of method.target_modules; or train one stage with "
                "output.merge=false",
            )


def check_places(base: Path, adapters: Sequence[Path], out: Path) -> Shapes:
    """The dtype and shape of every tensor of the base.

    Raises:
        UserError: OUT is there already, or is one of the others; the base is no whole model.
    """
    if out.resolve() in {path.resolve() for path in (base, *adapters)}:
        raise UserError("would be overwritten by what is made from it", where=str(out))
    return Shapes(base)


def _untied(
    base: Path, shapes: Shapes, parts: Sequence[Applied], pair: TiedPair
) -> tuple[dict[str, Added], dict[str, str]]:
    """The tensor that an untied model adds to the base's, and config and index with it."""
    files = {"config.json": untied_config(base)}
    if pair.missing is None:
        return {}, files
    change = partial(_merged, parts, pair.missing, FLOATS[shapes[pair.stored][0]])
    old = stored_tensor(base, pair.stored)
    if old.path.name != SINGLE:
        index = read_json(base / INDEX)
        index["weight_map"][pair.missing] = old.path.name
        about = index.get("metadata") or {}
        for key, more in (
            ("total_size", old.stop - old.start),
            ("total_parameters", prod(old.shape)),
        ):
            if isinstance(about.get(key), int):
                about[key] += more
        files[INDEX] = json.dumps(index, indent=2) + "\n"
    return {pair.missing: Added(old, change)}, files


def shards_at_once() -> int:
    """One a core, within reason."""
    return min(len(os.sched_getaffinity(0)), MOST_AT_ONCE)


def _merged(
    parts: Sequence[Applied], name: str, stored: torch.dtype, blocks: Iterator[Tensor]
) -> Iterator[Tensor]:
    for part in parts:
        if name in part.names:
            blocks = part.apply(name, stored, blocks)
    return blocks


def _replaced(
    read: Callable[[str, int, int], Tensor], name: str, blocks: Iterator[Tensor]
) -> Iterator[Tensor]:
    at = 0
    for block in blocks:
        yield read(name, at, at + block.numel()).view(block.shape)
        at += block.numel()


def _write(model: Model, out: Path, processes: int, known: Sequence[str]) -> None:
    hashes = [lookup_hash(path) for path in model.weights]
    if all(hashes):  # then another base is told before the work, not after it
        _check_base(model.base, combine([str(one) for one in hashes], model.base), known)
    plan = fingerprint(_plan(model))
    try:
        work = Work(out, {"plan": plan})
        if not _is_made(out, plan, work):
            _make(model, plan, out, work, processes, known)
    except OSError as error:  # no right to write, no room any more, a disk that fails
        what = f"cannot be made: {error.strerror or error}"
        raise UserError(what, where=str(out), fix="mend it; the same command goes on") from error


def _make(
    model: Model, plan: str, out: Path, work: Work, processes: int, known: Sequence[str]
) -> None:
    _check_room(model, out, work)
    try:
        _rewrite(model, work, processes, f"merging into {out.name}")
        if work.is_mine_to_publish():
            _publish(model, plan, out, work, known)
    except UserError:
        work.discard()
        raise
    finally:
        work.leave()


def _publish(model: Model, plan: str, out: Path, work: Work, known: Sequence[str]) -> None:
    """Let OUT appear, with all that lies beside the weights and the manifest."""
    done = {path.name: work.result(path.name) for path in model.weights}
    base_print = combine([record["before"] for record in done.values()], model.base)
    _check_base(model.base, base_print, known)
    hashes = {name: record["after"] for name, record in done.items()}
    for path in model.copied:
        shutil.copyfile(path, work.target / path.name)  # only content: may be read-only
    for name, text in model.files.items():
        (work.target / name).write_text(text, encoding="utf-8")
    for name in (*model.files, *(path.name for path in model.copied)):
        hashes[name] = file_hash(work.target / name)
    made = {
        "format": FORMAT,
        "plan": plan,
        "base": base_print,
        "result": combine([record["after"] for record in done.values()], work.target),
        "files": dict(sorted(hashes.items())),
    }
    write_json(work.target / MERGE_MANIFEST, model.about | made)
    work.publish({MERGE_MANIFEST, *hashes})
    for name, record in done.items():  # it may be the next one's base
        path = out / name
        remember_hash(path, record["after"], file_state(path), ours=True)


def _plan(model: Model) -> dict[str, Any]:
    """Everything that decides the result; the base's weights by size, time and header."""
    found = [(p.name, p.stat().st_size, p.stat().st_mtime_ns, file_head(p)) for p in model.weights]
    beside = {path.name: file_hash(path) for path in model.copied}
    written = {"beside": beside, "files": dict(model.files), "added": sorted(model.added)}
    return {"format": FORMAT, "base": found, "about": model.about, **written}


def file_head(path: Path) -> str:
    """A safetensors file's header, as a hash."""
    return fingerprint(read_header(path)[1].hex())


def _is_made(out: Path, plan: str, work: Work) -> bool:
    """Whether OUT was made by this very plan; then a stopped call had only its tidying left."""
    if not out.exists():
        return False
    work.discard()
    manifest = out / MERGE_MANIFEST
    made = read_json(manifest) if manifest.is_file() else None
    if not isinstance(made, dict) or made.get("plan") != plan:
        raise UserError("exists already", where=str(out), fix="choose another folder")
    say(f"{out} is complete already")
    return True


def _rewrite(model: Model, work: Work, processes: int, title: str) -> None:
    """Every shard, beside other processes that do the same; all are done when this returns."""
    files = model.weights
    tensors = [len(read_header(path)[0]) for path in files]
    with progress(title, sum(tensors)) as bar:

        def one(number: int, wait: bool = False) -> bool:
            path = files[number]
            if not work.take(number, wait=wait):
                return False
            if work.is_done(path.name):
                bar.advance(tensors[number])
            else:
                target = work.target / path.name
                before, after = rewrite_file(path, target, model.changes, bar, model.added)
                work.finish(path.name, {"before": before, "after": after})
            work.give_back(number)
            return True

        # One core for each: teams of threads wait in spinning, and hashing needs the other cores.
        before = torch.get_num_threads()
        pool = ThreadPoolExecutor(processes, initializer=torch.set_num_threads, initargs=(1,))
        try:
            futures = [pool.submit(one, number) for number in range(len(files))]
            others = [number for number, future in enumerate(futures) if not future.result()]
        finally:
            pool.shutdown(cancel_futures=True)
            torch.set_num_threads(before)  # some of it holds for all threads that come after
        for number in others:  # until they are done, or free since their process was killed
            one(number, wait=True)


def _check_room(model: Model, out: Path, work: Work) -> None:
    added = sum(one.old.stop - one.old.start for one in model.added.values())
    whole = sum(path.stat().st_size for path in model.weights) + added
    needed = whole + SPARE_BYTES - work.bytes_done()
    if (free := shutil.disk_usage(work.target).free) < needed:
        (work.leave if work.bytes_done() else work.discard)()
        raise UserError(
            f"the merged model needs {size(needed)}, {size(free)} are free", where=str(out)
        )


def _check_base(base: Path, found: str, known: Sequence[str]) -> None:
    if known and found not in known:
        raise UserError(
            "is not the base that the adapter was trained on",
            where=str(base),
            fix="adapter_config.json names its base (base_model_name_or_path); its stage.json and "
            "the base's merge.json say what was made from what",
        )


def _beside(base: Path) -> list[Path]:
    found = {path for pattern in BESIDE for path in base.glob(pattern) if path.is_file()}
    index = base / INDEX
    wanted = {path for path in found if path.name not in NOT_BESIDE}
    sharded = weight_files(base)[0].name != "model.safetensors"
    return sorted(wanted | ({index} if sharded else set()))
