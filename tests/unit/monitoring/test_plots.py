"""Curves: what is measured is drawn, what is not is said so, and long runs stay light."""

from __future__ import annotations

import base64

from dtrain.monitoring.plots import MOST_POINTS, curves, held_out, series, smooth


def _svg(records: list[dict[str, object]]) -> str:
    uri = curves(records)
    prefix = "data:image/svg+xml;base64,"
    assert uri.startswith(prefix)
    return base64.b64decode(uri.removeprefix(prefix)).decode()


def test_nothing_measured_gives_no_picture() -> None:
    assert curves([]) == ""
    assert curves([{"step": 1, "skipped": "non-finite loss"}]) == ""


def test_the_same_records_give_the_same_picture() -> None:
    records = [{"step": i, "loss": 1.0 / i, "learning_rate": 1e-4} for i in range(1, 9)]
    assert curves(records) == curves(records)


def test_names_are_shown_as_they_are() -> None:
    svg = _svg([{"step": 1, "loss": 2.0}, {"step": 1, "held_out": {"a $x_1$ <b>": 1.0}}])
    assert "a $x_1$ &lt;b&gt;" in svg
    assert "<b>" not in svg


def test_what_was_not_measured_is_said() -> None:
    assert "not measured" in _svg([{"step": 1, "loss": 2.0}])


def test_null_losses_and_skipped_steps_do_not_break_the_curve() -> None:
    records = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 3, "skipped": "x"},
        {"step": 4, "loss": 1.0},
    ]
    assert series(records, "loss") == [(1.0, 2.0), (4.0, 1.0)]
    assert "skipped step" in _svg(records)


def test_long_runs_are_thinned_to_averages() -> None:
    records = [{"step": i, "loss": float(i % 2)} for i in range(100_000)]
    points = series(records, "loss")
    assert len(points) <= MOST_POINTS
    assert all(abs(y - 0.5) < 0.01 for _, y in points[:-1])


def test_held_out_losses_by_set() -> None:
    records = [{"step": 0, "held_out": {"a": 2.0, "b": None}}, {"step": 5, "held_out": {"a": 1.0}}]
    assert held_out(records) == {"a": [(0.0, 2.0), (5.0, 1.0)]}


def test_smoothing_keeps_steps_and_level() -> None:
    points = [(float(i), 3.0 + (-1) ** i) for i in range(400)]
    smoothed = smooth(points)
    assert [x for x, _ in smoothed] == [x for x, _ in points]
    assert all(2.7 < y < 3.3 for _, y in smoothed[50:])
