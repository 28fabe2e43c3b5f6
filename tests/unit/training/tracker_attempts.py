"""Two attempts at a stage under a tracker: the first is killed, the second resumes.

    python tracker_attempts.py FOLDER KIND…

Each attempt is a process, forked after the imports.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import time
from pathlib import Path

from dtrain.config.load import load_recipe
from dtrain.core.stage_dir import StageDir
from dtrain.monitoring.alerts import Alert
from dtrain.training.trackers import TrackerContext, background, build_trackers
from dtrain.training.trackers.background import BackgroundTracker

background.CLOSE_SECONDS = 200.0  # all clients start at once, on any machine
METRICS = {"loss": 2.5, "skipped": "text", "norm": float("nan")}
ALERT = Alert("loss spike", 3, "the loss was 9.000", "check the rows")


def attempt(folder: Path, kind: str, resume_step: int, steps: list[int], *, dies: bool) -> None:
    """Log some steps as an attempt does; `dies`: by SIGKILL, once the client has them."""
    overrides = [f"monitoring.report_to=[{kind}]", f"output.folder={folder}"]
    recipe = load_recipe("tiny", overrides)
    stage = StageDir(folder / "domain")
    trackers = build_trackers(TrackerContext(recipe, recipe.stages[0], stage, resume_step))
    for step in steps:
        for tracker in trackers:
            tracker.log_metrics(step, METRICS | {"seconds": {"data": 0.25 * step}})
    if dies:
        for tracker in trackers:
            if isinstance(tracker, BackgroundTracker):
                wait_until_sent(tracker)
        os.kill(os.getpid(), signal.SIGKILL)
    for tracker in trackers:
        tracker.log_alert(ALERT)
        tracker.close()


def wait_until_sent(tracker: BackgroundTracker) -> None:
    """Wait until the client has got all records: a record is taken when the one before is sent."""
    tracker.log_metrics(1, {})
    while not tracker._queue.empty():
        time.sleep(0.01)


def both_attempts(kind: str, folder: Path) -> None:
    """One after the other; print the ids that the stage has after each."""
    (folder / "domain").mkdir(parents=True)
    for resume_step, steps, dies in ((0, [1, 2], True), (1, [2, 3], False)):
        process = os.fork()
        if not process:
            attempt(folder, kind, resume_step, steps, dies=dies)
            os._exit(0)
        status = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert status == (-signal.SIGKILL if dies else 0), (kind, status)
        runs = folder / "domain" / "trackers.json"
        ids = json.loads(runs.read_text()) if runs.exists() else {}
        print("ids", kind, json.dumps(ids), flush=True)
        files = folder / "domain" / "wandb"  # their names differ by the second
        if dies and files.exists():
            files.rename(folder / "domain" / "wandb-first")


def main(folder: Path, kinds: list[str]) -> int:
    """The attempts under all trackers, at once."""
    processes = []
    for kind in kinds:
        process = os.fork()
        if not process:
            both_attempts(kind, folder / kind)
            os._exit(0)
        processes.append(process)
    return max(os.waitpid(process, 0)[1] for process in processes)


if __name__ == "__main__":
    sys.exit(bool(main(Path(sys.argv[1]), sys.argv[2:])))
