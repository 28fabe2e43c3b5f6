"""Finished stages of another run folder are used by identity, and never written to."""

from __future__ import annotations

import hashlib
from pathlib import Path

RATE = "stages.task.train.learning_rate=0.003"


def contents(folder: Path) -> dict[str, str]:
    files = [path for path in sorted(folder.rglob("*")) if path.is_file()]
    return {str(f.relative_to(folder)): hashlib.sha256(f.read_bytes()).hexdigest() for f in files}


def test_a_finished_stage_is_reused_by_identity(start_ranks, tmp_path: Path) -> None:
    first = start_ranks(folder="first").wait(0)
    reuse = f"output.reuse={first.folder}"
    alone = start_ranks(RATE, folder="alone").wait(0)
    second = start_ranks(RATE, reuse, folder="second").wait(0)
    assert (second.folder / "domain").resolve() == first.folder / "domain"
    assert "stage domain: reused from" in second.output
    assert "stage task: not reused" in second.output and "train.learning_rate" in second.output
    assert second.losses() == alone.losses()
    measured, expected = second.json("evaluation.json"), alone.json("evaluation.json")
    for key in ("models", "losses", "blocks", "sets"):
        assert measured[key] == expected[key]
    lineages = [run.json("lineage.json")["artifacts"] for run in (second, alone)]
    assert [a["identity"] for a in lineages[0]] == [a["identity"] for a in lineages[1]]

    other_seed = start_ranks("seed=1", reuse, ranks=1, folder="other").wait(0)
    assert "stage domain: not reused" in other_seed.output and "seed" in other_seed.output
    assert not (other_seed.folder / "domain").is_symlink()

    model = next((first.folder / "domain/merged").glob("*.safetensors"))
    model.write_bytes(model.read_bytes()[:-1] + b"x")
    before = contents(first.folder / "domain")
    third = start_ranks(RATE, reuse, folder="third").wait(0)
    assert "is not what was written" in third.output
    assert not (third.folder / "domain").is_symlink() and third.losses() == alone.losses()
    assert contents(first.folder / "domain") == before
