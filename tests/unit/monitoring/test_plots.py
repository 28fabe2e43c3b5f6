"""Plots show what was measured, say what was not, and stay small for long runs."""

from __future__ import annotations

import base64

from dtrain.monitoring.plots import MAX_POINTS, held_out_losses, plot_stage, series, smooth


def _svg(records: list[dict[str, object]]) -> str:
    uri = plot_stage(records)
    prefix = "data:image/svg+xml;base64,"
    assert uri.startswith(prefix)
    return base64.b64decode(uri.removeprefix(prefix)).decode()


def test_an_unmeasured_stage_has_no_plot() -> None:
    assert plot_stage([]) == ""
    assert plot_stage([{"step": 1, "skipped": "non-finite loss"}]) == ""


def test_plots_are_reproducible() -> None:
    records = [{"step": i, "loss": 1.0 / i, "learning_rate": 1e-4} for i in range(1, 9)]
    assert plot_stage(records) == plot_stage(records)


def test_names_are_not_interpreted() -> None:
    svg = _svg([{"step": 1, "loss": 2.0}, {"step": 1, "held_out": {"a $x_1$ <b>": 1.0}}])
    assert "a $x_1$ &lt;b&gt;" in svg
    assert "<b>" not in svg


def test_missing_metrics_are_labeled() -> None:
    assert "not measured" in _svg([{"step": 1, "loss": 2.0}])


def test_null_losses_and_skipped_steps_are_plotted() -> None:
    records = [
        {"step": 1, "loss": 2.0},
        {"step": 2, "loss": None},
        {"step": 3, "skipped": "x"},
        {"step": 4, "loss": 1.0},
    ]
    assert series(records, "loss") == [(1.0, 2.0), (4.0, 1.0)]
    assert "skipped step" in _svg(records)


def test_long_series_are_averaged() -> None:
    records = [{"step": i, "loss": float(i % 2)} for i in range(100_000)]
    points = series(records, "loss")
    assert len(points) <= MAX_POINTS
    assert all(abs(y - 0.5) < 0.01 for _, y in points[:-1])


def test_held_out_losses_are_grouped_by_set() -> None:
    records = [{"step": 0, "held_out": {"a": 2.0, "b": None}}, {"step": 5, "held_out": {"a": 1.0}}]
    assert held_out_losses(records) == {"a": [(0.0, 2.0), (5.0, 1.0)]}


def test_smoothing_keeps_steps_and_level() -> None:
    points = [(float(i), 3.0 + (-1) ** i) for i in range(400)]
    smoothed = smooth(points)
    assert [x for x, _ in smoothed] == [x for x, _ in points]
    assert all(2.7 < y < 3.3 for _, y in smoothed[50:])
