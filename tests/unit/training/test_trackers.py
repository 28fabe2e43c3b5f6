"""Trackers get every metric, continue their run after a resume, and never stop the training."""

from __future__ import annotations

import json
import os
import struct
import subprocess
import sys
import threading
import zipfile
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from queue import Queue
from typing import Any

import pytest

from dtrain.config.load import load_recipe
from dtrain.config.trackers import TRACKERS
from dtrain.core.errors import UserErrors
from dtrain.training.trackers import background
from dtrain.training.trackers.background import BackgroundTracker, flat_numbers

BLOCK_BYTES = 1 << 15
METRICS = {"loss": 2.5, "seconds": {"data": 0.25}, "skipped": "text", "norm": float("nan")}


@dataclass
class Values:
    """What a tracker has: value of each step, the ids of its runs, the settings, the alerts."""

    steps: dict[int, float]
    ids: set[str]
    text: str
    alerts: str


def read_tensorboard(stage: Path) -> Values:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(stage / "tensorboard")).Reload()
    steps = {event.step: event.value for event in events.Scalars("seconds/data")}
    tags = [tag for tag in events.Tags()["tensors"] if tag.startswith("alert/")]
    recipe, *alerts = (
        str(events.Tensors(tag)[0].tensor_proto.string_val)
        for tag in ("recipe/text_summary", *tags)
    )
    return Values(steps, {"tensorboard"}, recipe, f"{tags} {alerts}")


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a file in LevelDB's log format, behind a header of seven bytes."""
    content, at, record = path.read_bytes(), 7, b""
    while at + 7 <= len(content):
        if BLOCK_BYTES - at % BLOCK_BYTES < 7:  # padding
            at += BLOCK_BYTES - at % BLOCK_BYTES
            continue
        size, kind = struct.unpack("<HB", content[at + 4 : at + 7])
        if at + 7 + size > len(content):  # the kill came while it was written
            return
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
    ids, text, alerts = set(), "", ""
    for path in sorted(stage.glob("wandb*/offline-run-*/run-*.wandb")):
        for data in log_records(path):
            record = wandb_internal_pb2.Record.FromString(data)
            if record.HasField("run"):
                ids.add(record.run.run_id)
                text += str(record.run.config)
            if record.HasField("alert"):
                alerts += f"{record.alert.title}: {record.alert.text}"
            items = {item.key or "/".join(item.nested_key): item for item in record.history.item}
            if "seconds/data" in items:
                value = json.loads(items["seconds/data"].value_json)
                steps[int(items["_step"].value_json)] = value
    return Values(steps, ids, text, alerts)


def read_mlflow(stage: Path) -> Values:
    from mlflow import MlflowClient

    client = MlflowClient()
    runs = client.search_runs([e.experiment_id for e in client.search_experiments()])
    history = client.get_metric_history(runs[0].info.run_id, "seconds/data")
    text = "".join(path.read_text() for path in stage.parents[1].rglob("recipe.json"))
    steps = {entry.step: entry.value for entry in history}
    return Values(steps, {r.info.run_id for r in runs}, text, str(runs[0].data.tags))


def read_swanlab(stage: Path) -> Values:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    steps: dict[int, float] = {}
    ids, alerts = set(), ""
    for path in sorted(stage.rglob("run-*.swanlab")):
        ids.add(path.stem)
        for data in log_records(path):
            record = Record.FromString(data)
            if record.scalar.key == "seconds/data":
                steps[record.scalar.step] = record.scalar.value.number
            alerts += str(record) if "loss spike" in str(record) else ""
    alerts += "".join(path.read_text() for path in stage.rglob("*.txt"))
    text = "".join(path.read_text() for path in stage.rglob("config.yaml"))
    return Values(steps, ids, text, alerts)


def read_comet(stage: Path) -> Values:
    steps: dict[int, float] = {}
    ids, text = set(), ""
    for path in sorted(stage.glob("comet/*.zip")):
        archive = zipfile.ZipFile(path)
        if not archive.namelist():  # of the killed attempt
            continue
        ids.add(json.loads(archive.read("experiment.json"))["offline_id"])
        for line in archive.read("messages.json").decode().splitlines():
            message = json.loads(line)["payload"]
            text += line
            metric = message.get("metric") or {}
            if metric.get("metricName") == "seconds/data":
                steps[metric["step"]] = float(metric["metricValue"])
    return Values(steps, ids, text, text)


def read_trackio(stage: Path) -> Values:
    import trackio
    from trackio.sqlite_storage import SQLiteStorage

    runs = list(trackio.Api().runs("tiny"))
    logs = SQLiteStorage.get_logs("tiny", runs[0].name, run_id=runs[0].id)
    steps = {log["step"]: log["seconds/data"] for log in logs if "seconds/data" in log}
    alerts = str(runs[0].alerts())
    return Values(steps, {run.id for run in runs}, str(runs[0].config), alerts)


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
    "trackio": read_trackio,
}
# The others' clients keep the last records in memory: wandb a block of its offline file, swanlab
# and trackio those of a second, comet all of its offline archive.
WRITES_AT_ONCE = ("tensorboard", "mlflow")


@pytest.fixture(scope="module")
def attempts(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A folder with a run for each installed tracker, of two attempts, and what they printed."""
    folder = tmp_path_factory.mktemp("trackers")
    script = Path(__file__).with_name("tracker_attempts.py")
    kinds = [kind for kind, client in TRACKERS.items() if find_spec(client.module)]
    done = subprocess.run(
        [sys.executable, str(script), str(folder), *kinds],
        env=os.environ | environment(folder),
        capture_output=True,
        text=True,
        check=False,
    )
    output = done.stdout + done.stderr
    assert done.returncode == 0 and "gets no more metrics" not in output, output
    return folder, done.stdout


def environment(folder: Path) -> dict[str, str]:
    """Where the clients write, without a network."""
    return OFFLINE | {
        "MLFLOW_TRACKING_URI": f"file:{folder}/mlruns",
        "TRACKIO_DIR": str(folder / "trackio-data"),
    }


@pytest.mark.parametrize("kind", TRACKERS)
def test_a_killed_and_resumed_stage_is_one_run(
    kind: str, attempts: tuple[Path, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, printed = attempts
    for name, value in environment(folder).items():
        monkeypatch.setenv(name, value)
    pytest.importorskip(TRACKERS[kind].module)
    head = f"ids {kind} "
    ids = [x.removeprefix(head) for x in printed.splitlines() if x.startswith(head)]
    assert len(ids) == 2 and ids[0] == ids[1], "the killed attempt started the run"
    values = READERS[kind](folder / kind / "domain")
    assert len(values.ids) == 1
    lost = values.steps.keys() ^ {1, 2, 3}
    assert all(value == 0.25 * step for step, value in values.steps.items())
    assert not lost if kind in WRITES_AT_ONCE else lost <= {1}
    assert "learning_rate" in values.text
    assert "loss spike" in values.alerts and "check the rows" in values.alerts


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


class HangsAndFails(Fails):
    def __init__(self) -> None:
        self.answer = threading.Event()

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.answer.wait()
        super().log(step, metrics)


def test_a_client_that_fails_is_reported_once(capfd: Any) -> None:
    tracker = BackgroundTracker("service", Fails)
    for step in range(3):
        tracker.log_metrics(step, METRICS)
    tracker.close()
    said = "".join(capfd.readouterr())
    assert said.count("service: no route to host; it gets no more metrics") == 1


def test_a_client_that_hangs_is_reported_once(capfd: Any, monkeypatch) -> None:
    monkeypatch.setattr(background, "QUEUE_RECORDS", 2)
    monkeypatch.setattr(background, "CLOSE_SECONDS", 0.01)
    run = HangsAndFails()
    tracker = BackgroundTracker("service", lambda: run)
    for step in range(9):
        tracker.log_metrics(step, METRICS)
    tracker.close()
    run.answer.set()
    tracker._thread.join()
    said = "".join(capfd.readouterr())
    assert said.count("service: does not answer") == 1 and "no route to host" not in said


class HangsUntilClosed:
    """A run whose client answers once the trainer has asked to close, with a full queue."""

    def __init__(self) -> None:
        self.entered, self.answer = threading.Event(), threading.Event()
        self.steps: list[int] = []
        self.is_closed = False

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self.entered.set()
        self.answer.wait()
        self.steps.append(step)

    def close(self) -> None:
        self.is_closed = True


def test_a_slow_client_gets_all_that_is_queued_and_is_closed(capfd: Any, monkeypatch) -> None:
    run = HangsUntilClosed()

    class AnsweringQueue(Queue):
        def put(self, item: Any, block: bool = True, timeout: float | None = None) -> None:
            try:
                super().put(item, block, timeout)
            finally:
                if item is None:
                    run.answer.set()

    monkeypatch.setattr(background, "QUEUE_RECORDS", 1)
    monkeypatch.setattr(background, "Queue", AnsweringQueue)
    tracker = BackgroundTracker("service", lambda: run)
    tracker.log_metrics(0, METRICS)
    run.entered.wait()
    tracker.log_metrics(1, METRICS)
    tracker.close()
    assert run.is_closed and run.steps == [0, 1]
    assert "service" not in "".join(capfd.readouterr())


def test_only_finite_numbers_are_sent() -> None:
    assert flat_numbers(METRICS | {"is": True}) == {"loss": 2.5, "seconds/data": 0.25}
