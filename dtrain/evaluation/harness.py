"""lm-evaluation-harness: load its tasks before the training, and try each once.

Loading downloads what a task of the hub needs, so that training nodes need no network. The Python
code that task files may name runs only where the recipe trusts it, and jinja templates run in a
sandbox.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from math import isclose
from pathlib import Path
from typing import Any

import datasets
import evaluate as evaluate_library
import lm_eval.api.metrics
import lm_eval.api.model
import lm_eval.api.task
import lm_eval.models.huggingface
import lm_eval.utils
import numpy as np
import tqdm
from jinja2.sandbox import SandboxedEnvironment
from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.evaluator import evaluate
from lm_eval.tasks import TaskManager, _yaml_loader
from lm_eval.tasks._index import Kind

from dtrain.config.gates import Gate
from dtrain.config.tasks import AT, Tasks
from dtrain.config.yaml_document import dotted
from dtrain.core.cache_paths import user_path
from dtrain.core.errors import UserError, first_line, nearest_name
from dtrain.core.hashes import fingerprint
from dtrain.monitoring.scores import Score

WHERE = dotted(AT)
TRUST = "read that code; if you trust it, set evaluation.tasks.trust_remote_code=true"
PACKAGE = Path(lm_eval.api.task.__file__).parents[1]
TRIED_ROWS = 1
MAX_BLOCKS = 256  # of rows, as for held-out losses


class _QuietTqdm(tqdm.tqdm):
    """No bar: dtrain shows progress of its own."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs | {"disable": True})


for _module in (tqdm, lm_eval.api.model, lm_eval.api.task, lm_eval.models.huggingface):
    _module.tqdm = _QuietTqdm
lm_eval.api.metrics.print = lambda *_: None
logging.getLogger("lm_eval").setLevel(logging.ERROR)
datasets.disable_progress_bars()
# It would fork a rank, whose threads hold locks.
os.environ["DISABLE_MULTIPROC"] = "1"
# Templates of task files can reach Python's internals in the harness's own environment.
_SANDBOX = SandboxedEnvironment(undefined=lm_eval.utils.env.undefined, keep_trailing_newline=True)
_SANDBOX.filters |= lm_eval.utils.env.filters
lm_eval.utils.env = _SANDBOX


@dataclass(frozen=True)
class LoadedTasks:
    """The tasks and groups that a recipe names, ready to be evaluated.

    Attributes:
        loaded: as the harness's `evaluate` takes them.
        leaves: the single tasks of each name in the recipe.
        inputs: name → fingerprint of its rows, prompts and settings.
    """

    settings: Tasks
    loaded: dict[str, Any]
    leaves: dict[str, list[str]]
    inputs: dict[str, str]

    def prepare(self) -> None:
        """Set the number of examples and the seed of their choice, as the harness does itself."""
        for task in self.loaded["tasks"].values():
            default, wanted = task.get_config("num_fewshot"), self.settings.num_fewshot
            if wanted is not None and default != 0:  # 0 in a file means that it cannot have any
                task.set_config(key="num_fewshot", value=wanted)
            elif default is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self.settings.seed)

    def evaluate(self, model: LM, limit: int | None, resamples: int) -> dict[str, Any]:
        """The harness's results of a model.

        Args:
            limit: rows of each task; None for all.
            resamples: for the standard errors of metrics without a formula.
        """
        self.prepare()
        with rules_of_code(self.settings):
            return evaluate(model, self.loaded, limit=limit, bootstrap_iters=resamples)


def load_tasks(settings: Tasks, gates: Mapping[str, Gate]) -> LoadedTasks:
    """Load tasks with their rows, and evaluate the first row of each with answers of no model.

    Raises:
        UserError: the rows cannot be read or downloaded, a task runs code that is not trusted,
            fails on its first row, or has no metric that a gate names.
    """
    loaded: dict[str, Any] = {"tasks": {}, "groups": {}}
    leaves: dict[str, list[str]] = {}
    groups: dict[str, Any] = {}
    with rules_of_code(settings):
        manager = _task_manager(settings)
        for name in settings.names:
            with _explained(name, manager):
                found: Any = manager.load([name])
            leaves[name], groups[name] = list(found["tasks"]), found["groups"]
            loaded["tasks"] = found["tasks"] | loaded["tasks"]
            loaded["groups"] |= found["groups"]
            _check_has_score(name, found)
            _check_is_safe(name, found)
    result = LoadedTasks(settings, loaded, leaves, {})
    result.prepare()
    for name in settings.names:
        result.inputs[name] = _fingerprint(settings, [loaded["tasks"][x] for x in leaves[name]])
        tasks = {leaf: loaded["tasks"][leaf] for leaf in leaves[name]}
        part = LoadedTasks(settings, {"tasks": tasks, "groups": groups[name]}, {}, {})
        with _explained(name, manager):
            tried = part.evaluate(_NoModel(), TRIED_ROWS, 0)
        if name in gates:
            _check_gate(name, gates[name], list(read_metrics(tried, name, leaves[name])))
    return result


def _task_manager(settings: Tasks) -> TaskManager:
    """The index of the recipe's own task files; with the harness's, which take 10 s, if needed."""
    if settings.include_path is None:
        return TaskManager()
    folder = user_path(settings.include_path)
    manager = TaskManager(include_path=folder, include_defaults=False)
    names: list[Any] = list(settings.names)
    while names:
        name = names.pop()
        entry = manager.task_index.get(name) if isinstance(name, str) else None
        if entry is None:
            return TaskManager(include_path=folder)
        if entry.kind == Kind.GROUP:
            names += (entry.cfg or {}).get("task") or []
    return manager


def _check_gate(name: str, gate: Gate, metrics: list[str]) -> None:
    if gate.metric is not None and gate.metric not in metrics:
        fix = nearest_name(gate.metric, metrics, f"use one of {', '.join(metrics)}")
        where = f"evaluation.gates.{name}.metric"
        raise UserError(f"the task has no metric {gate.metric}", where=where, fix=fix)


def _check_has_score(name: str, found: dict[str, Any]) -> None:
    group = found["groups"].get(name)
    if group is not None and not group.has_aggregation:
        children = ", ".join(group.child_names)
        message = f"the group {name} has no score of its own"
        raise UserError(message, where=f"{WHERE}.names", fix=f"name its members: {children}")


def _check_is_safe(name: str, found: dict[str, Any]) -> None:
    for task in found["tasks"].values():
        if getattr(task, "UNSAFE_CODE", False):
            message = f"{task.task_name} executes code that the model writes"
            fix = "run lm_eval on the merged model, in a container"
            raise UserError(message, where=f"{WHERE}.names: {name}", fix=fix)


def _fingerprint(settings: Tasks, tasks: list[Any]) -> str:
    """What decides the scores of tasks, in addition to the model."""
    content: list[Any] = [version("lm_eval"), settings.limit, settings.num_fewshot, settings.seed]
    for task in tasks:
        config = {k: v for k, v in task.dump_config().items() if k != "metadata"}
        rows = [_plain(row) for row in islice(task.eval_docs, settings.limit)]
        examples = list(task.fewshot_docs()) if config.get("num_fewshot") else []
        content.append([task.VERSION, _plain(config), rows, [_plain(row) for row in examples]])
    return fingerprint(_plain(content))


def _plain(value: Any) -> Any:
    """A value of a configuration or row as JSON has it, without addresses in memory."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple | set):
        return [_plain(item) for item in value]
    if callable(value):
        return getattr(value, "__qualname__", type(value).__name__)
    return value if isinstance(value, str | int | bool | None) else str(value)


@contextmanager
def rules_of_code(settings: Tasks) -> Iterator[None]:
    """Refuse the code of task files and of the hub, unless the recipe trusts it."""
    if settings.trust_remote_code:
        yield
        return
    refused: list[UserError] = []
    import_function, load_metric = _yaml_loader._import_func_in_yml, evaluate_library.load

    def refuse(message: str) -> None:
        refused.append(UserError(message, where=WHERE, fix=TRUST))
        raise refused[-1]

    def checked_import(name: str, folder: Path) -> Any:
        if not Path(folder).resolve().is_relative_to(PACKAGE):
            refuse(f"a task file in {folder} runs the Python function {name}")
        return import_function(name, folder)

    def checked_load(name: str, *args: Any, **kwargs: Any) -> Any:
        refuse(f"the metric {name} is Python code of the hub")

    _yaml_loader._import_func_in_yml = checked_import
    evaluate_library.load = checked_load
    try:
        yield
    finally:
        _yaml_loader._import_func_in_yml, evaluate_library.load = import_function, load_metric
        if refused:  # the harness may have caught it
            raise refused[0]


@contextmanager
def _explained(name: str, manager: TaskManager) -> Iterator[None]:
    """Turn an error of a task into one that names it and its rows."""
    try:
        yield
    except UserError:
        raise
    except Exception as error:  # of the harness, of a library of data, or of a task's own code
        entry = manager.task_index.get(name)
        rows = (entry.cfg or {}).get("dataset_path") if entry else None
        reason = first_line(error)
        raise _task_error(name, rows, error, reason) from error


def _task_error(name: str, rows: str | None, error: Exception, reason: str) -> UserError:
    where = f"{WHERE}.names: {name}"
    if isinstance(error, ConnectionError | datasets.exceptions.DatasetNotFoundError) or (
        "offline" in reason.lower() or "connect" in reason.lower()
    ):
        message = f"its rows ({rows or 'of the hub'}) are not on this machine: {reason}"
        fix = (
            "run `dtrain data prepare RECIPE` where the hub can be reached; HF_HOME keeps the rows"
        )
        return UserError(message, where=where, fix=fix)
    if isinstance(error, ImportError):
        return UserError(reason, where=where, fix=f"install what the task needs: {reason}")
    return UserError(f"it cannot be evaluated: {type(error).__name__}: {reason}", where=where)


class _NoModel(LM):
    """Answers that cost nothing, to find a task that fails before the training."""

    def loglikelihood(self, requests: list[Instance]) -> list[tuple[float, bool]]:
        return [(-1.0 - number, False) for number, _ in enumerate(requests)]

    def loglikelihood_rolling(self, requests: list[Instance]) -> list[float]:
        return [-1.0 for _ in requests]

    def generate_until(self, requests: list[Instance]) -> list[str]:
        return ["" for _ in requests]


def read_metrics(results: Mapping[str, Any], name: str, leaves: Sequence[str]) -> dict[str, Score]:
    """The scores of a task or group in the harness's results.

    The harness names a metric with the filter of the answers: `exact_match,strict-match`. The
    filter `none` is left out.

    Args:
        leaves: the single tasks of a group, or the task itself.
    """
    content, directions = results["results"][name], results["higher_is_better"].get(name) or {}
    scores = {}
    for key, value in content.items():
        metric, comma, filter_name = key.partition(",")
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not comma or metric.endswith("_stderr") or not is_number:
            continue
        error = content.get(f"{metric}_stderr,{filter_name}")
        blocks, items = _blocks(results["samples"], leaves, metric, filter_name, float(value))
        scores[metric if filter_name == "none" else key] = Score(
            value=float(value),
            stderr=float(error) if isinstance(error, int | float) else None,
            higher_is_better=directions.get(metric) is not False,
            blocks=blocks,
            items=items,
        )
    return scores


def _blocks(
    samples: Mapping[str, Any], leaves: Sequence[str], metric: str, filter_name: str, mean: float
) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """Sums and numbers of the values of blocks of rows; empty if `mean` is not their mean."""
    values = [
        row[metric]
        for leaf in leaves
        for row in samples[leaf]
        if row["filter"] == filter_name and metric in row
    ]
    if not values or not all(isinstance(v, int | float | np.number) for v in values):
        return (), ()
    array = np.asarray(values, dtype=np.float64)
    if not isclose(array.mean(), mean, rel_tol=1e-9, abs_tol=1e-12):
        return (), ()
    block = np.arange(len(array)) % min(len(array), MAX_BLOCKS)
    sums, items = np.bincount(block, weights=array), np.bincount(block)
    return tuple(sums.tolist()), tuple(items.astype(float).tolist())
