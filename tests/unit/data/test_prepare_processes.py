"""Concurrent and killed preparation in real processes."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

import dtrain
from dtrain.config.data import Data
from dtrain.data import shards
from dtrain.data.prepare import prepare
from dtrain.objectives.causal_lm import ContinuedPretraining

CPT = ContinuedPretraining.dataset

# The tokenizer of a worker counts its batches, and can die or wait for the test in one of them.
WORKER = """
import os, signal, sys
from pathlib import Path
from dtrain.core.lazy_import import import_fast
import_fast("dtrain.objectives.causal_lm")
from transformers import PreTrainedTokenizerFast
from dtrain.config.schema import Data
from dtrain.data import shards
from dtrain.data import prepare as module
from dtrain.objectives.causal_lm import ContinuedPretraining
folder, die_in_batch, wait_for = Path(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
shards.BLOCK_ROWS, shards.BATCH_ROWS = 10, 5

class Watched(PreTrainedTokenizerFast):
    batches = 0
    def __call__(self, *args, **how):
        Watched.batches += 1
        if Watched.batches == die_in_batch:
            os.kill(os.getpid(), signal.SIGKILL)
        if Watched.batches == 1 and wait_for:
            print("at work", flush=True)
            open(wait_for).read()
        return super().__call__(*args, **how)

tokenizer = Watched.from_pretrained(folder / "tokenizer")
data = Data(sources=[{"path": str(folder / "a.jsonl"), "format": "text"}], sequence_length=64)
mixture = module.prepare(data, ContinuedPretraining.dataset, tokenizer, "t", folder / "cache")
print("batches", Watched.batches, mixture.fingerprint, flush=True)
"""


@pytest.fixture
def start(tmp_path, tokenizer, write_rows):
    """start(die_in_batch, wait_for) → a worker over 47 documents in shards of ten."""
    tokenizer.save_pretrained(tmp_path / "tokenizer")
    write_rows("a.jsonl", [{"text": f"document {n} " * (n % 7 + 1)} for n in range(47)])
    started = []

    def run(die_in_batch: int = 0, wait_for: str = "") -> subprocess.Popen:
        arguments = [sys.executable, "-c", WORKER, str(tmp_path), str(die_in_batch), wait_for]
        process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            env={
                **os.environ,
                "PYTHONPATH": str(Path(dtrain.__file__).parents[1]),
                "PYTHONUNBUFFERED": "1",
            },
        )
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.wait()


@pytest.fixture
def expected(tmp_path, tokenizer):
    """The rows as one undisturbed process makes them."""

    def run():
        data = {"sources": [{"path": str(tmp_path / "a.jsonl"), "format": "text"}]}
        data = Data.model_validate({**data, "sequence_length": 64})
        return prepare(data, CPT, tokenizer, "t", tmp_path / "undisturbed")

    return run


def wait_until_at_work(process: subprocess.Popen) -> None:
    for line in process.stdout:
        if line == "at work\n":
            return
    pytest.fail("the worker ended before it worked")


def last_words(process: subprocess.Popen) -> list[str]:
    """Return the words of the last line; progress lines may precede it on a busy machine."""
    return process.communicate()[0].splitlines()[-1].split()


def contents(dataset) -> list:
    rows = [dataset.sequence(number) for number in range(dataset.sequences_per_epoch)]
    return [(r.input_ids.tolist(), r.is_target.tolist(), r.documents) for r in rows]


@pytest.mark.parametrize("batch", [1, 4, 10])
def test_a_killed_preparation_continues(start, expected, tmp_path, tokenizer, monkeypatch, batch):
    worker = start(die_in_batch=batch)
    worker.communicate()
    assert worker.returncode == -9
    (folder,) = (p for p in (tmp_path / "cache").iterdir() if p.is_dir())
    kept = {p: p.stat().st_mtime_ns for p in folder.glob("shard-*")}
    assert len(kept) == (batch - 1) // 2
    (folder / ".shard-00009.arrow.torn").write_bytes(b"half")  # as a kill while writing leaves it
    monkeypatch.setattr(shards, "BLOCK_ROWS", 10)
    data = {"sources": [{"path": str(tmp_path / "a.jsonl"), "format": "text"}]}
    data = Data.model_validate({**data, "sequence_length": 64})
    dataset = prepare(data, CPT, tokenizer, "t", tmp_path / "cache")
    assert contents(dataset) == contents(expected())
    assert {p: p.stat().st_mtime_ns for p in kept} == kept
    assert sorted(p.name for p in folder.glob("*shard-*")) == [
        f"shard-0000{n}.arrow" for n in range(5)
    ]
    dataset.sources[0].store.verify()


def test_second_process_waits_for_the_first(start, expected, tmp_path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    first = start(wait_for=str(gate))
    wait_until_at_work(first)
    second = start()
    line = second.stdout.readline()
    assert f"waiting for process {first.pid}" in line and "prepares the same data" in line
    gate.write_text("go on")
    ended = [last_words(process) for process in (first, second)]
    assert [words[:2] for words in ended] == [["batches", "10"], ["batches", "0"]]
    assert ended[0][2] == ended[1][2] == expected().fingerprint


def test_waiting_process_takes_over_from_a_killed_process(start, tmp_path) -> None:
    gate = tmp_path / "gate"
    os.mkfifo(gate)
    first = start(wait_for=str(gate))
    wait_until_at_work(first)
    second = start()
    assert "waiting for" in second.stdout.readline()
    first.kill()
    assert last_words(second)[:2] == ["batches", "10"]
