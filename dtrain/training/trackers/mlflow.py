"""MLflow: an experiment for the project, a run for each stage."""

from __future__ import annotations

import time

from mlflow import MlflowClient
from mlflow.entities import Metric

from dtrain.training.trackers import TrackerContext


class MlflowRun:
    """The stage's run, with the recipe as the artifact recipe.json."""

    def __init__(self, context: TrackerContext) -> None:
        self._client = MlflowClient()
        self._id = context.run_id("mlflow", lambda: self._create(context))
        self._client.update_run(self._id, status="RUNNING")

    def _create(self, context: TrackerContext) -> str:
        known = self._client.get_experiment_by_name(context.project)
        experiment = known.experiment_id if known else None
        experiment = experiment or self._client.create_experiment(context.project)
        run: str = self._client.create_run(experiment, run_name=context.title).info.run_id
        self._client.log_dict(run, context.settings, "recipe.json")
        return run

    def log(self, step: int, metrics: dict[str, float]) -> None:
        now = int(time.time() * 1000)
        self._client.log_batch(self._id, [Metric(n, v, now, step) for n, v in metrics.items()])

    def alert(self, step: int, kind: str, text: str) -> None:
        self._client.set_tag(self._id, f"alert.{kind}", text)

    def close(self) -> None:
        self._client.set_terminated(self._id)


open_run = MlflowRun
