"""A base folder and what was trained → a plain Hugging Face model, a block of rows at a time."""

from __future__ import annotations

import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from dtrain.core.errors import UserError
from dtrain.core.files import read_json, write_json
from dtrain.core.hashes import file_sha256, fingerprint
from dtrain.core.known_hashes import known_sha256, remember_sha256, state_of
from dtrain.core.log import progress, say
from dtrain.core.units import size
from dtrain.merge.adapter import CONFIG, FLOATS, Adapter, Shapes
from dtrain.merge.fingerprint import combine
from dtrain.merge.methods import Step
from dtrain.merge.stream import Change, rewrite_file
from dtrain.merge.tied import with_tied
from dtrain.merge.work import Work
from dtrain.models.weights import INDEX, read_header, weight_files

MANIFEST = "merge.json"
# What makes a folder of weights a model: config, tokenizer, template, licence, the model's code.
BESIDE = ("*.json", "*.jinja", "*.model", "*.tiktoken", "*.txt", "*.py", "LICENSE*", "NOTICE*")
NOT_BESIDE = (INDEX, MANIFEST, CONFIG)
SPARE_BYTES = 64 << 20
MOST_AT_ONCE = 8  # shards; each needs about 20 MB
FORMAT = 2  # of the result: another one is not gone on with


class Part(Protocol):
    """What changes a base: an adapter, or several as one."""

    @property
    def names(self) -> set[str]:
        """Every tensor that changes."""

    def step(self, name: str) -> Step:
        """What it does to blocks of rows of a tensor."""

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
        whole = [*self.adapter.replaced, *(n for n in layers if "m" in layers[n].keys)]
        if self.weight != 1 and whole:
            what = f"{whole[0]} is not a sum of base and adapter, so it takes no weight"
            raise UserError(what, where=self.adapter.where)

    @property
    def names(self) -> set[str]:
        """Every tensor that changes."""
        return self.adapter.names

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


def merge(
    base: Path,
    parts: Sequence[Applied],
    out: Path,
    *,
    source: str,
    processes: int = 1,
    known: Sequence[str] = (),
) -> None:
    """Add adapters to a base, one after another; shards, dtypes and all other files stay.

    A tensor is computed in float32 and rounded once to its own dtype: to the bit what PEFT's
    merge_and_unload gives for float32, bfloat16 and float16 bases with a float32 adapter. Stopped,
    the same call goes on with the shards that are missing.

    Args:
        out: a new folder; it appears whole or not at all.
        source: what made the model, for the manifest.
        processes: shards that are rewritten at once, each in a thread.
        known: fingerprints of which the base must have one; any base if there are none.

    Raises:
        UserError: OUT is there, or is BASE; too little disk; another base; non-finite values.
    """
    shapes = check_places(base, [], out)
    names = sorted(set().union(*(part.names for part in parts)))
    changes = {name: partial(_merged, parts, name, FLOATS[shapes[name][0]]) for name in names}
    adapters = [part.about for part in parts]
    _write(base, out, changes, {"source": source, "adapters": adapters}, processes, known)


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
) -> None:
    """Write the model that full fine-tuning made, in its base's layout and dtypes.

    Args:
        tensors: shapes by `named_parameters()` name; of tied tensors one name is enough.
        read: gives elements [start, stop) of a flattened tensor.
        content: a hash of what `read` gives.

    Raises:
        UserError: the base has no such tensor, or one of another shape; non-finite values.
    """
    shapes = check_places(base, [], out)
    for name, shape in tensors.items():
        if name not in shapes or shapes[name][1] != list(shape):
            raise UserError(f"{name} {list(shape)} is not in the base", where=str(base))
    changes = {name: partial(_replaced, read, name) for name in tensors}
    about = {"source": source, "adapters": [], "weights": content}
    _write(base, out, changes, about, processes, known)


def check_places(base: Path, adapters: Sequence[Path], out: Path) -> Shapes:
    """The dtype and shape of every tensor of the base.

    Raises:
        UserError: OUT is there already, or is one of the others; the base is no whole model.
    """
    if out.resolve() in {path.resolve() for path in (base, *adapters)}:
        raise UserError("would be overwritten by what is made from it", where=str(out))
    headers = (read_header(path)[0] for path in weight_files(base))
    return {name: (e["dtype"], e["shape"]) for entries in headers for name, e in entries.items()}


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


def _write(
    base: Path,
    out: Path,
    changes: Mapping[str, Change],
    about: dict[str, Any],
    processes: int,
    known: Sequence[str],
) -> None:
    files, changes = weight_files(base), with_tied(base, changes)
    hashes = [known_sha256(path) for path in files]
    if all(hashes):  # then another base is told before the work, not after it
        _check_base(base, combine([str(one) for one in hashes], base), known)
    plan = _plan(files, base, about)
    try:
        work = Work(out, plan)
        if not _is_made(out, fingerprint(plan), work):
            marked = about | {"plan": fingerprint(plan)}
            _make(files, base, out, work, changes, marked, processes, known)
    except OSError as error:  # no right to write, no room any more, a disk that fails
        what = f"cannot be made: {error.strerror or error}"
        raise UserError(what, where=str(out), fix="mend it; the same command goes on") from error


def _make(
    files: Sequence[Path],
    base: Path,
    out: Path,
    work: Work,
    changes: Mapping[str, Change],
    about: dict[str, Any],
    processes: int,
    known: Sequence[str],
) -> None:
    _check_room(files, out, work)
    try:
        _rewrite(files, work, changes, processes, f"merging into {out.name}")
        if work.is_mine_to_publish():
            _publish(files, base, out, work, about, known)
    except UserError:
        work.discard()
        raise
    finally:
        work.leave()


def _publish(
    files: Sequence[Path],
    base: Path,
    out: Path,
    work: Work,
    about: dict[str, Any],
    known: Sequence[str],
) -> None:
    """Let OUT appear, with all that lies beside the weights and the manifest."""
    done = {path.name: work.result(path.name) for path in files}
    prints = {
        "base": combine([record["before"] for record in done.values()], base),
        "result": combine([record["after"] for record in done.values()], base),
    }
    _check_base(base, prints["base"], known)
    hashes = {name: record["after"] for name, record in done.items()}
    for path in _beside(base):
        shutil.copyfile(path, work.target / path.name)  # only content: may be read-only
        hashes[path.name] = file_sha256(work.target / path.name)
    files_of_it = {"files": dict(sorted(hashes.items()))}
    write_json(work.target / MANIFEST, about | prints | files_of_it)
    work.publish({MANIFEST, *hashes})
    for name, record in done.items():  # it may be the next one's base
        path = out / name
        remember_sha256(path, record["after"], state_of(path), ours=True)


def _plan(files: Sequence[Path], base: Path, about: dict[str, Any]) -> dict[str, Any]:
    """Everything that decides the result; the base's weights by size, time and header."""
    found = [(p.name, p.stat().st_size, p.stat().st_mtime_ns, file_head(p)) for p in files]
    beside = {path.name: file_sha256(path) for path in _beside(base)}
    return {"format": FORMAT, "base": found, "beside": beside, "about": about}


def file_head(path: Path) -> str:
    """A safetensors file's header, as a hash."""
    return fingerprint(read_header(path)[1].hex())


def _is_made(out: Path, plan: str, work: Work) -> bool:
    """Whether OUT was made by this very plan; then a stopped call had only its tidying left."""
    if not out.exists():
        return False
    work.discard()
    manifest = out / MANIFEST
    made = read_json(manifest) if manifest.is_file() else None
    if not isinstance(made, dict) or made.get("plan") != plan:
        raise UserError("exists already", where=str(out), fix="choose another folder")
    say(f"{out} is complete already")
    return True


def _rewrite(
    files: Sequence[Path], work: Work, changes: Mapping[str, Change], processes: int, title: str
) -> None:
    """Every shard, beside other processes that do the same; all are done when this returns."""
    tensors = [len(read_header(path)[0]) for path in files]
    with progress(title, sum(tensors)) as bar:

        def one(number: int, wait: bool = False) -> bool:
            path = files[number]
            if not work.take(number, wait=wait):
                return False
            if work.is_done(path.name):
                bar.advance(tensors[number])
            else:
                before, after = rewrite_file(path, work.target / path.name, changes, bar)
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


def _check_room(files: Sequence[Path], out: Path, work: Work) -> None:
    needed = sum(path.stat().st_size for path in files) + SPARE_BYTES - work.bytes_done()
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
