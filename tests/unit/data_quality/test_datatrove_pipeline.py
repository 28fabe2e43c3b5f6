"""The datatrove pipeline on datatrove's local executor, compared with a scan of the same rows."""

from __future__ import annotations

import gzip
import importlib.util
import json
import os
import random
import re
import sys
from pathlib import Path

import pytest
from datatrove.pipeline.dedup.minhash import MinhashConfig

from dtrain.config.data import Clean, Source
from dtrain.core.errors import UserError
from dtrain.data.records import open_source
from dtrain.data_quality.clean import clean
from dtrain.data_quality.datatrove_pipeline import SIDES, ShingleSignatures, open_corpus
from dtrain.data_quality.scan import scan

SCRIPT = Path(__file__).parents[3] / "slurm" / "clean_corpus.py"
FILES = 5
RECIPE = """
name: corpus
model: {{base: none}}
stages:
  - name: domain
    kind: cpt
    method: {{kind: lora}}
    data:
      sources: [{{path: {path}, format: text}}]
      clean: {{{clean}}}
    train: {{global_batch_size: 1, steps: 1}}
output: {{folder: out}}
"""


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("clean_corpus", SCRIPT)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def rows() -> list[bytes]:
    """Forty texts, followed by problems, copies and near copies of them."""
    pick = random.Random(1)
    texts = [" ".join(f"{pick.randrange(10**6):x}" for _ in range(30)) + "." for _ in range(40)]
    texts += [f"{texts[3][:80]} Write to lin{n}@mail.cn today, number {n}." * 2 for n in range(2)]
    texts += ["", "  ", texts[5], texts[6].upper(), f"{texts[7]} Yes."]
    texts += ["Ã©tÃ© Ã  la franÃ§aise, dÃ©jÃ  vu Ã  NoÃ«l"]
    lines = [json.dumps({"text": text}).encode() for text in texts]
    return [*lines, b'{"text": ', b'{"other": 1}', b'{"text": "\xff"}']


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "corpus"
    folder.mkdir()
    for n in range(FILES):
        (folder / f"{n}.jsonl").write_bytes(b"\n".join(rows()[n::FILES]) + b"\n")
    return folder


@pytest.fixture
def start(script, folder, tmp_path):
    """start(clean, *options) → exit status of the script; its output is in tmp_path/out."""

    def run(clean="broken: quarantine", *options):
        recipe = tmp_path / "my.yaml"
        recipe.write_text(RECIPE.format(path=folder, clean=clean))
        more = options or ("--tasks", "3", "--local", "1")
        return script.main([str(recipe), str(tmp_path / "out"), *more])

    return run


def lines(data: bytes) -> list[dict]:
    return [json.loads(line) for line in data.splitlines()]


def read(folder: Path) -> list[dict]:
    return [
        row for p in sorted(folder.rglob("*.gz")) for row in lines(gzip.decompress(p.read_bytes()))
    ]


def test_the_pipeline_removes_what_a_scan_finds(start, folder, tmp_path) -> None:
    assert start() == 0
    kept = [row["text"] for row in read(tmp_path / "out" / "rows")]
    removed = read(tmp_path / "out" / "quarantine")
    assert len(kept) + len(removed) == len(rows())

    result = scan([open_source(Source(path=str(folder), format="text"))])
    clean(result, Clean(broken="quarantine"), tmp_path / "scanned")
    expected = lines((tmp_path / "scanned" / "quarantine.jsonl").read_bytes())
    by_row, copies = [], []
    # To datatrove a copy is a near duplicate, and which row counts as the first depends on tasks.
    for lines_removed in (removed, expected):
        reasons = {row["location"]: row["reasons"][0] for row in lines_removed}
        by_row.append({p: reason for p, reason in reasons.items() if "duplicate" not in reason})
        copies.append(sum("duplicate" in reason for reason in reasons.values()))
    assert by_row[0] == by_row[1] and len(by_row[0]) == 6
    assert copies[0] == copies[1] == 4
    assert any("[email]" in text for text in kept) and not any("@" in text for text in kept)


def test_quarantine_contains_the_row_and_drop_does_not(start, tmp_path) -> None:
    start()
    by_reason = {row["reasons"][0]: row for row in read(tmp_path / "out" / "quarantine")}
    assert by_reason["garbled"]["row"]["text"].startswith("Ã©tÃ©")
    assert by_reason["near_duplicate"]["row"]["text"]
    assert "row" not in by_reason["empty"] and by_reason["empty"]["action"] == "drop"
    assert "row" not in by_reason["broken"] and by_reason["broken"]["error"]


def test_output_is_reproducible_and_a_second_run_does_nothing(start, tmp_path, script) -> None:
    start()
    first = {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*.jsonl.gz")}
    times = {p: p.stat().st_mtime_ns for p in (tmp_path / "out").rglob("*.jsonl.gz")}
    start()
    assert {p: p.stat().st_mtime_ns for p in times} == times
    os.rename(tmp_path / "out", tmp_path / "before")
    start()
    assert {p.name: p.read_bytes() for p in (tmp_path / "out").rglob("*.jsonl.gz")} == first


def test_only_exact_duplicates_are_removed_if_the_policy_keeps_near_ones(start, tmp_path) -> None:
    start("broken: quarantine, near_duplicate: keep")
    reasons = [row["reasons"][0] for row in read(tmp_path / "out" / "quarantine")]
    assert reasons.count("exact_duplicate") == 2 and "near_duplicate" not in reasons


def test_another_policy_needs_another_folder(start, capsys) -> None:
    start()
    assert start("broken: quarantine, garbled: drop") == 2
    assert "was started with different policy" in capsys.readouterr().err


def test_an_unreadable_row_stops_its_task_under_broken_stop(start, tmp_path) -> None:
    with pytest.raises(UserError, match=r"corpus/\d.jsonl:\d+"):
        start("broken: stop")
    assert not (tmp_path / "out" / "rows").exists()


def test_a_corpus_is_its_folder_or_glob_without_symlinks_that_leave_it(folder, tmp_path) -> None:
    (folder / "leaves.jsonl").symlink_to(tmp_path / "elsewhere.jsonl")
    (tmp_path / "elsewhere.jsonl").write_text("{}")
    (source,) = open_corpus([Source(path=str(folder), format="text")])
    assert len(source.files) == FILES
    (source,) = open_corpus([Source(path=f"{folder}/[01].jsonl", format="text")])
    assert len(source.files) == 2
    with pytest.raises(UserError, match="a corpus needs an explicit format"):
        open_corpus([Source(path=str(folder))])
    with pytest.raises(UserError, match="no readable file here"):
        open_corpus([Source(path=str(tmp_path / "none"), format="text")])


SBATCH = """#!{python}
import json, sys
log = open({log!r}, "a+")
log.seek(0)
number = 100 + len(log.readlines())
print(json.dumps([str(number), open(sys.argv[-1]).read(), sys.argv]), file=log)
print("Submitted batch job", number)
"""


def test_on_slurm_each_array_waits_for_the_previous_one(start, tmp_path, monkeypatch) -> None:
    shims = tmp_path / "bin"
    shims.mkdir()
    log = tmp_path / "log"
    (shims / "sbatch").write_text(SBATCH.format(python=sys.executable, log=str(log)))
    (shims / "sbatch").chmod(0o755)
    monkeypatch.setenv("PATH", f"{shims}:{os.environ['PATH']}")
    assert start("broken: quarantine", "--tasks", "3", "--partition", "idle") == 0
    jobs = [job for job in lines(log.read_bytes()) if "launch_pickled_pipeline" in job[1]]
    names = [re.search(r"--job-name=(\S+)", text).group(1) for _, text, _ in jobs]
    assert names == [f"dtrain-{name}" for name in ("check", "buckets", "cluster", "rest")]
    waits = [re.search(r"--dependency=(\S*)", " ".join(arguments)) for *_, arguments in jobs]
    assert [wait and wait.group(1) for wait in waits] == [
        None,
        *(f"afterok:{number}" for number, *_ in jobs[:-1]),
    ]
    assert "--array=0-2" in jobs[0][1] and "--partition=idle" in jobs[0][1]


def test_questions_with_other_numbers_share_no_shingle(tmp_path) -> None:
    signatures = ShingleSignatures(str(tmp_path), MinhashConfig(), exact=False)

    def shingles(question: str) -> set[int]:
        return set(signatures.get_shingles(f"{question}{SIDES}It is so.").ravel().tolist())

    one = shingles("A baker has 12 loaves of bread and sells 7 of them. How many are left?")
    assert not one & shingles(
        "A baker has 15 loaves of bread and sells 9 of them. How many are left?"
    )
    assert one & shingles("A baker has 12 loaves of bread and sells 7 of them. What is left?")
