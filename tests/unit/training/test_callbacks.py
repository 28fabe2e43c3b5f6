"""A person learns of each kind of alert once, in the log and in every tracker."""

from __future__ import annotations

import pytest

from dtrain.monitoring.alerts import Alert
from dtrain.training.callbacks import AlertWatch, Tracker


class Shows(Tracker):
    def __init__(self) -> None:
        self.alerts: list[Alert] = []

    def log_alert(self, alert: Alert) -> None:
        self.alerts.append(alert)


def test_each_kind_of_alert_is_shown_once(capsys: pytest.CaptureFixture[str]) -> None:
    trackers = [Shows(), Shows()]
    watch = AlertWatch([*trackers, Tracker()])
    for step in range(1, 201):
        watch.log_metrics(step, {"loss": 9.0 if step in (50, 90) else 3.0 - step / 200})
        watch.log_metrics(step, {"held_out": {"general": 2.0}})
    for tracker in trackers:
        assert [(a.kind, a.step) for a in tracker.alerts] == [("loss spike", 50)]
    assert capsys.readouterr().out.count("loss spike at step 50") == 1
