"""The progress of a job, as `dtrain status` reads it from the lines that the training logs."""

from __future__ import annotations

from pathlib import Path

from dtrain.core import log
from dtrain.core.run_dir import RunDir
from dtrain.launching.status import progress_lines
from dtrain.training.callbacks import ProgressBar
from dtrain.training.progress import StageProgress


def test_status_shows_the_newest_line_of_the_progress(tmp_path: Path, monkeypatch, capsys) -> None:
    monkeypatch.setattr(log, "LINE_EVERY_SECONDS", 0.0)
    bar = ProgressBar("stage task", steps_after=10**9)
    bar.pre_train(StageProgress(step=2), total_steps=9)
    rates = {"learning_rate": 2e-4, "grad_norm": 0.5, "tokens_per_second": 1200.0}
    rates["peak_memory_bytes"] = 3_200_000_000
    for step in (3, 4):
        bar.log_metrics(step, {"loss": 1.0 / step, **rates})
    bar.close()
    job_log = RunDir(tmp_path).job_log("job")
    job_log.parent.mkdir()
    job_log.write_text(capsys.readouterr().out)
    (line,) = progress_lines(tmp_path)
    assert line.startswith("stage task: step 4 of 9, ")
    assert " left in this stage, about " in line and " h " in line.partition(" in all stages")[0]
    figures = "loss 0.2500  lr 2.0e-04  grad norm 0.5  1.2k tokens/s  memory 3.2 GB"
    assert line.endswith(f" in all stages  {figures}")
