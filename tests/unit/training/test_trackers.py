"""Trackers get every metric, continue their run after a resume, and never stop the training."""

from __future__ import annotations

import json
import struct
import threading
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.load import load_recipe
from dtrain.config.trackers import TRACKERS
from dtrain.core.errors import UserErrors
from dtrain.core.run_dir import StageDir
from dtrain.training import background_tracker
from dtrain.training.background_tracker import BackgroundTracker, flat_numbers
from dtrain.training.trackers import TrackerContext, build_trackers

BLOCK_BYTES = 1 << 15
METRICS = {"loss": 2.5, "seconds": {"data": 0.25}, "skipped": "text", "norm": float("nan")}


class Values:
    """What a tracker has: value of each step, the ids of its runs, and all text of its files."""

    def __init__(self, steps: dict[int, float], ids: set[str], text: str) -> None:
        self.steps, self.ids, self.text = steps, ids, text


def read_tensorboard(stage: Path) -> Values:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage / "tensorboard")).Reload()
    steps = {event.step: event.value for event in events.Scalars("seconds/data")}
    text = str(events.Tensors("recipe/text_summary")[0].tensor_proto.string_val)
    return Values(steps, {"tensorboard"}, text)


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, behind a header of seven bytes."""
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if BLOCK_BYTES - at % BLOCK_BYTES < 7:  # padding
            at += BLOCK_BYTES - at % BLOCK_BYTES
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        record += content[at + 7 : at + 7 + size]
        at += 7 + size
        if kind in (1, 4):  # whole, or the last part
            yield record
            record = b""


def read_wandb(stage: Path) -> Values:
    import wandb
    from wandb.proto import wandb_internal_pb2

    wandb.teardown()  # it writes the end of its files, as at the end of a process
    steps: dict[int, float] = {}
    ids, text = set(), ""
    for path in sorted(stage.glob("wandb*/offline-run-*/run-*.wandb")):
        for data in log_records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                text += str(record.run.config)
            items = {item.key or "/".join(item.nested_key): item for item in record.history.item}
            if "seconds/data" in items:
                value = json.loads(items["seconds/data"].value_json)
                steps[int(items["_step"].value_json)] = value
    return Values(steps, ids, text)


def read_mlflow(stage: Path) -> Values:
    from mlflow import MlflowClient

    client = MlflowClient()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    history = client.get_metric_history(runs[0].info.run_id, "seconds/data")
    text = "".join(path.read_text() for path in stage.parents[1].rglob("recipe.json"))
    return Values(
        {entry.step: entry.value for entry in history}, {r.info.run_id for r in runs}, text
    )


def read_swanlab(stage: Path) -> Values:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    steps: dict[int, float] = {}
    ids = set()
    for path in sorted(stage.rglob("run-*.swanlab")):
        ids.add(path.stem)
        for data in log_records(path):
            record = Record.FromString(data)
            if record.scalar.key == "seconds/data":
                steps[record.scalar.step] = record.scalar.value.number
    text = "".join(path.read_text() for path in stage.rglob("config.yaml"))
    return Values(steps, ids, text)


def read_comet(stage: Path) -> Values:
    steps: dict[int, float] = {}
    ids, text = set(), ""
    for path in sorted(stage.glob("comet/*.zip")):
        archive = zipfile.ZipFile(path)
        ids.add(json.loads(archive.read("experiment.json"))["offline_id"])
        for line in archive.read("messages.json").decode().splitlines():
            message = json.loads(line)["payload"]
            text += line
            metric = message.get("metric") or {}
            if metric.get("metricName") == "seconds/data":
                steps[metric["step"]] = float(metric["metricValue"])
    return Values(steps, ids, text)


OFFLINE = {
    "WANDB_MODE": "offline",
    "SWANLAB_MODE": "offline",
    "COMET_START_ONLINE": "0",
    "MLFLOW_ALLOW_FILE_STORE": "true",
}
READERS = {
    "tensorboard": read_tensorboard,
    "wandb": read_wandb,
    "mlflow": read_mlflow,
    "swanlab": read_swanlab,
    "comet": read_comet,
}


def attempt(folder: Path, kind: str, resume_step: int, steps: list[int]) -> None:
    """Log some steps as an attempt does."""
    overrides = [f"monitoring.report_to=[{kind}]", f"output.folder={folder}"]
    recipe = load_recipe("tiny", overrides)
    stage = StageDir(folder / "domain")
    trackers = build_trackers(TrackerContext(recipe, recipe.stages[0], stage, resume_step))
    for step in steps:
        for tracker in trackers:
            tracker.log_metrics(step, METRICS | {"seconds": {"data": 0.25 * step}})
    for tracker in trackers:
        tracker.close()


@pytest.mark.parametrize("kind", TRACKERS)
def test_tracker_has_every_step_in_one_run(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: Any
) -> None:
    pytest.importorskip(TRACKERS[kind].module)
    for name, value in OFFLINE.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"file:{tmp_path}/mlruns")
    stage = tmp_path / "run" / "domain"
    stage.mkdir(parents=True)
    attempt(tmp_path / "run", kind, 0, [1, 2])
    if (stage / "wandb").exists():  # its files have names by the second
        (stage / "wandb").rename(stage / "wandb-first")
    attempt(tmp_path / "run", kind, 1, [2, 3])  # it was killed after the checkpoint of step 1
    assert "gets no more metrics" not in "".join(capfd.readouterr())
    values = READERS[kind](stage)
    assert values.steps == {1: 0.25, 2: 0.5, 3: 0.75}
    assert len(values.ids) == 1
    assert "learning_rate" in values.text


def test_a_missing_client_is_refused_with_the_command_that_installs_it(monkeypatch) -> None:
    monkeypatch.setattr("dtrain.config.trackers.find_spec", lambda name: None)
    with pytest.raises(
        UserErrors, match=r"wandb is not installed[\s\S]*pip install 'dtrain\[wandb"
    ):
        load_recipe("tiny", ["monitoring.report_to=[wandb]"])


class Fails:
    def log(self, step: int, metrics: dict[str, float]) -> None:
        raise ConnectionError("no route to host")

    def close(self) -> None:
        raise AssertionError("not reached")


class Hangs(Fails):
    def __init__(self) -> None:
        self.answer = threading.Event()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.answer.wait()


def test_a_client_that_fails_is_reported_once(capfd: Any) -> None:
    tracker = BackgroundTracker("service", Fails)
    for step in range(3):
        tracker.log_metrics(step, METRICS)
    tracker.close()
    said = "".join(capfd.readouterr())
    assert said.count("service: no route to host; it gets no more metrics") == 1


def test_a_client_that_hangs_is_reported_once(capfd: Any, monkeypatch) -> None:
    monkeypatch.setattr(background_tracker, "QUEUE_RECORDS", 2)
    monkeypatch.setattr(background_tracker, "CLOSE_SECONDS", 0.01)
    run = Hangs()
    tracker = BackgroundTracker("service", lambda: run)
    for step in range(9):
        tracker.log_metrics(step, METRICS)
    tracker.close()
    run.answer.set()
    assert "".join(capfd.readouterr()).count("service: does not answer") == 1


def test_only_finite_numbers_are_sent() -> None:
    assert flat_numbers(METRICS | {"is": True}) == {"loss": 2.5, "seconds/data": 0.25}
