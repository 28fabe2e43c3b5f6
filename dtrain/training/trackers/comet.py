"""Comet: an experiment for each stage; offline ones are archives in the stage's folder."""

from __future__ import annotations

import logging

import comet_ml

from dtrain.training.trackers import TrackerContext


class CometRun:
    """The stage's experiment."""

    def __init__(self, context: TrackerContext) -> None:
        logging.getLogger("comet_ml").setLevel(logging.ERROR)
        self._experiment = comet_ml.start(
            project_name=context.project,
            experiment_key=context.run_id("comet"),
            experiment_config=comet_ml.ExperimentConfig(
                name=context.title,
                offline_directory=str(context.folder.path / "comet"),
                auto_output_logging=False,  # type: ignore[arg-type] # its own way to turn it off
                auto_metric_logging=False,
                auto_param_logging=False,
                log_code=False,
                parse_args=False,
                display_summary_level=0,
            ),
        )
        self._experiment.log_parameters(context.settings)

    def log(self, step: int, metrics: dict[str, float]) -> None:
        self._experiment.log_metrics(metrics, step=step)

    def alert(self, step: int, kind: str, text: str) -> None:
        self._experiment.log_other(f"alert: {kind}", text)

    def close(self) -> None:
        self._experiment.end()


open_run = CometRun
