"""`dtrain checkpoints` as a user meets it."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from typer.testing import CliRunner

from dtrain.checkpoints import ParameterShard, Saver
from dtrain.cli import app


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder with checkpoints of steps 5 and 10 of one stage, and half of another."""
    (tmp_path / "recipe.yaml").write_text("name: any\n")
    saver = Saver(tmp_path / "domain/checkpoints", rank=0, ranks=1, attempt="a")
    for step, loss in ((5, 2.5), (10, None)):
        shard = ParameterShard("w", (8,), 0, 8, {"weight": torch.ones(8)})
        saver.save(step, [shard], {"held_out_loss": loss})
        saver.wait()
    return tmp_path


def listed(run: Path, *options: str) -> tuple[int, str]:
    """Exit status and output, with every run of blanks as one."""
    done = CliRunner().invoke(app, ["checkpoints", str(run), *options])
    return done.exit_code, " ".join(done.output.split())


def test_list_shows_step_loss_size_and_state(run: Path) -> None:
    status, said = listed(run)
    assert status == 0
    assert "domain 5 2.5000" in said and "domain 10 - " in said and "B yes -" in said
    assert listed(run, "--verify")[1].count("yes yes") == 2


def test_damage_is_named_and_sets_the_exit_status(run: Path) -> None:
    (run / "domain/checkpoints/.step-000011.dead").mkdir()
    status, said = listed(run)
    assert status == 0 and "domain 11 - 0 B no - its save was not finished" in said
    shard = run / "domain/checkpoints/step-000010/rank-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    assert "yes yes" not in listed(run)[1]  # nothing is called verified that was not hashed
    status, said = listed(run, "--verify")
    assert status == 2 and "no no" in said and str(shard) in said
