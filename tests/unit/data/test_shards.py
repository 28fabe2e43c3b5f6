"""Any number of processes and array shares builds the same store, each shard once."""

from __future__ import annotations

import hashlib
import os
import signal
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dtrain.config.data import Data
from dtrain.core import hardware
from dtrain.core.errors import Exit, UserError
from dtrain.core.locks import ShardLocks
from dtrain.core.processes import worker_pool
from dtrain.data import shards
from dtrain.data.prepare import prepare, prepare_share
from dtrain.data.records import read_records
from dtrain.data.shards import WorkShare, share_of_array
from dtrain.data.sources import find_source_files
from dtrain.objectives.causal_lm import ContinuedPretraining, SupervisedFinetuning

CPT = ContinuedPretraining.dataset
SFT = SupervisedFinetuning.dataset


@pytest.fixture
def rows_of_all_kinds(tmp_path, write_rows, monkeypatch) -> Data:
    """150 texts in three files, in shards of twenty."""
    texts = [f"document {n} " * (n % 7 + 1) for n in range(150)]
    write_rows("rows/a.jsonl", [{"text": text} for text in texts[:60]])
    table = pa.table({"text": texts[60:100]})
    pq.write_table(table, tmp_path / "rows" / "b.parquet", row_group_size=9)
    (tmp_path / "rows" / "c.csv").write_text("text\n" + "".join(f"{t}\n" for t in texts[100:]))
    monkeypatch.setattr(shards, "BLOCK_ROWS", 20)
    monkeypatch.setattr(shards, "BATCH_ROWS", 7)
    source = {"path": str(tmp_path / "rows"), "format": "text"}
    return Data.model_validate({"sources": [source], "sequence_length": 64})


def digests(folder: Path) -> dict[str, str]:
    """Hash of each file of the one store in a cache."""
    files = [path for path in store_of(folder).iterdir() if not path.name.startswith(".")]
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


def store_of(cache: Path) -> Path:
    """The one store in a cache."""
    (store,) = (path for path in cache.iterdir() if path.is_dir())
    return store


@pytest.mark.parametrize("processes", [2, 5])
def test_store_does_not_depend_on_the_number_of_processes(
    rows_of_all_kinds, tokenizer, tmp_path, processes
) -> None:
    for count in (1, processes):
        prepare(
            rows_of_all_kinds,
            CPT,
            tokenizer,
            "t",
            tmp_path / str(count),
            count,
        )
    alone, together = digests(tmp_path / "1"), digests(tmp_path / str(processes))
    assert len(alone) > 8 and alone == together


def test_shares_in_any_order_build_the_store_once(
    rows_of_all_kinds, tokenizer, tmp_path, monkeypatch
) -> None:
    prepare(rows_of_all_kinds, CPT, tokenizer, "t", tmp_path / "alone", 1)
    built = []
    write = shards.write_shard
    monkeypatch.setattr(
        shards, "write_shard", lambda path, *a: built.append(path) or write(path, *a)
    )
    cache = tmp_path / "shared"
    taken = hold(cache / store_of(tmp_path / "alone").name, shard=5)
    first = prepare_share(rows_of_all_kinds, CPT, tokenizer, "t", cache, WorkShare(2, 3), 1)
    assert not first and len(built) == 7  # another process holds one, and may yet end
    taken()
    last = prepare_share(rows_of_all_kinds, CPT, tokenizer, "t", cache, WorkShare(0, 3), 1)
    assert last and len(set(built)) == len(built) == 8
    assert digests(cache) == digests(tmp_path / "alone")


def hold(folder: Path, shard: int):
    """Let another process claim a shard; its death gives it back."""
    reader, writer = os.pipe()
    child = os.fork()
    if child == 0:
        ShardLocks(folder / shards.LOCKS_FILE).acquire(shard)
        os.write(writer, b"x")
        signal.pause()
    os.read(reader, 1)

    def end() -> None:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)

    return end


class TokenizerKilledOnce:
    """A tokenizer that is killed once, in the process that comes to a certain document first."""

    def __init__(self, tokenizer, marker: Path) -> None:
        self.tokenizer, self.mark = tokenizer, marker

    def __getattr__(self, name: str):
        return getattr(self.tokenizer, name)

    def __call__(self, texts, **how):
        if any("document 80 " in text for text in texts) and not self.mark.exists():
            self.mark.touch()
            os.kill(os.getpid(), signal.SIGKILL)
        return self.tokenizer(texts, **how)


def test_a_killed_process_is_reported_and_its_shard_built(
    rows_of_all_kinds, tokenizer, tmp_path, capsys
) -> None:
    prepare(rows_of_all_kinds, CPT, tokenizer, "t", tmp_path / "alone", 1)
    killer = TokenizerKilledOnce(tokenizer, tmp_path / "killed")
    prepare(rows_of_all_kinds, CPT, killer, "t", tmp_path / "two", 2)
    assert "was killed by SIGKILL (out of memory?)" in capsys.readouterr().out
    assert digests(tmp_path / "two") == digests(tmp_path / "alone")


class TokenizerKilledInWorkers(TokenizerKilledOnce):
    """A tokenizer that is killed in every process but the one that made it."""

    def __call__(self, texts, **how):
        if os.getpid() != int(self.mark.name):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.tokenizer(texts, **how)


def test_a_share_builds_the_shards_of_its_killed_processes(
    rows_of_all_kinds, tokenizer, tmp_path, capsys
) -> None:
    prepare(rows_of_all_kinds, CPT, tokenizer, "t", tmp_path / "alone", 1)
    killer, cache = TokenizerKilledInWorkers(tokenizer, Path(str(os.getpid()))), tmp_path / "shared"
    assert prepare_share(rows_of_all_kinds, CPT, killer, "t", cache, WorkShare(1, 2), 2)
    assert "was killed by SIGKILL" in capsys.readouterr().out
    assert digests(cache) == digests(tmp_path / "alone")


@pytest.mark.parametrize(
    ("number", "first", "count", "share"),
    [
        (3, 3, 2, WorkShare(0, 2)),
        (5, 3, 2, WorkShare(0, 2)),
        (8, 3, 2, WorkShare(1, 2)),
        (2, 1, 4, WorkShare(1, 4)),
    ],
)
def test_task_of_an_array_with_gaps_gets_a_share(number, first, count, share) -> None:
    names = {"ID": number, "MIN": first, "COUNT": count}
    environ = {f"SLURM_ARRAY_TASK_{name}": str(value) for name, value in names.items()}
    assert share_of_array(environ) == share


def test_an_error_in_a_process_is_reported_as_without_processes(
    tokenizer, tmp_path, write_rows, monkeypatch
) -> None:
    monkeypatch.setattr(shards, "BLOCK_ROWS", 2)
    long = {"messages": [{"role": role, "content": "x" * 900} for role in ("user", "assistant")]}
    short = {"messages": [{"role": role, "content": "x"} for role in ("user", "assistant")]}
    source = {"path": write_rows("a.jsonl", [*[short] * 20, long, short])}
    settings = {"sources": [source], "sequence_length": 64, "overlong": "fail"}
    with pytest.raises(UserError, match=r"a\.jsonl:21: the conversation has \d+ tokens") as error:
        prepare(
            Data.model_validate(settings),
            SFT,
            tokenizer,
            "t",
            tmp_path / "c",
            3,
        )
    assert "overlong: truncate" in error.value.fix


def test_progress_of_processes_is_summed() -> None:
    counts: list[int] = []
    with worker_pool(
        3, lambda number, report_progress: [report_progress(number), report_progress(10)]
    ) as members:
        members.join(counts.append)
    assert sum(counts) == 33


@pytest.mark.timeout(60)
def test_any_error_text_of_a_process_is_reported() -> None:
    long = "\0\ud800é" * 100_000  # more than a pipe holds

    def work(number: int, report_progress: object) -> None:
        raise UserError(long, where="a\0b", fix="\udfff", status=Exit.NON_FINITE)

    with pytest.raises(UserError) as error, worker_pool(2, work) as members:
        members.join(lambda units: None)
    raised = error.value
    assert (raised.message, raised.where, raised.fix) == (long, "a\0b", "\udfff")
    assert raised.status is Exit.NON_FINITE


def test_crash_of_a_worker_raises_an_error() -> None:
    with pytest.raises(RuntimeError, match="ended with status 1"), worker_pool(2, crash) as members:
        members.join(lambda units: None)


def crash(number: int, report_progress: object) -> None:
    raise ZeroDivisionError


@given(
    st.lists(st.integers(1, 400), min_size=1, max_size=60),
    st.integers(1, 9),
    st.integers(1, 3),
)
def test_boundaries_cover_every_row_once(sizes, block, partitions) -> None:
    records = [
        shards.Record("x" * size, index * partitions // len(sizes), index)
        for index, size in enumerate(sizes)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(shards, "BLOCK_ROWS", block)
        patch.setattr(shards, "BLOCK_CHARACTERS", 500)
        boundaries = shards.find_boundaries(iter(records))
    assert boundaries["row"][0] == 0
    assert boundaries["row"][-1] == len(sizes)
    rows = boundaries["row"].tolist()
    assert rows == sorted(set(rows))
    assert all(stop - start <= block for start, stop in pairwise(rows))
    for boundary in boundaries[:-1].tolist():
        before = [record for record in records[: boundary[2]] if record.file_index == boundary[0]]
        assert len(before) == boundary[1] and records[boundary[2]].file_index == boundary[0]


def test_shards_with_other_boundaries_are_not_reused(
    rows_of_all_kinds, tokenizer, tmp_path
) -> None:
    prepare(rows_of_all_kinds, CPT, tokenizer, "t", tmp_path / "alone", 1)
    folder = tmp_path / "again" / store_of(tmp_path / "alone").name
    folder.mkdir(parents=True)
    (folder / "shard-00000.arrow").write_bytes(b"cut in another way")
    prepare(rows_of_all_kinds, CPT, tokenizer, "t", tmp_path / "again", 1)
    assert digests(tmp_path / "again") == digests(tmp_path / "alone")


def test_cores_are_bounded_by_slurm_and_the_control_group(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: set(range(16)))
    monkeypatch.delenv("SLURM_CPUS_PER_TASK", raising=False)
    assert hardware.available_cores() == 16
    (tmp_path / "cpu.max").write_text("max 100000\n")
    assert hardware.available_cores() == 16
    (tmp_path / "cpu.max").write_text("450000 100000\n")
    assert hardware.available_cores() == 4
    monkeypatch.setenv("SLURM_CPUS_PER_TASK", "3")
    assert hardware.available_cores() == 3
    (tmp_path / "cpu.max").unlink()
    monkeypatch.setenv("SLURM_CPUS_ON_NODE", "12")  # four such tasks
    assert (hardware.available_cores(), hardware.job_cores()) == (3, 12)


def test_page_cache_counts_as_free_memory(tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(hardware, "CGROUP", tmp_path)
    (tmp_path / "memory.max").write_text(f"{9 << 20}\n")
    (tmp_path / "memory.current").write_text(f"{8 << 20}\n")
    (tmp_path / "memory.stat").write_text(f"anon 5\ninactive_file {6 << 20}\nactive_file 7\n")
    assert hardware.available_memory() == 7 << 20


def test_reading_all_rows_equals_reading_by_shard(rows_of_all_kinds, tmp_path) -> None:
    source_files = find_source_files(rows_of_all_kinds.sources[0], tmp_path)
    whole = list(read_records(source_files, "text"))
    record_reader = shards.RecordReader(source_files, "text", {})
    records = []
    for file_index, skip, row in (
        (0, 0, 0),
        (0, 55, 55),
        (1, 38, 98),
        (0, 10, 10),
    ):  # on, over, back
        records = list(record_reader.records(file_index, skip, 9))
        assert records == whole[row : row + 9]
