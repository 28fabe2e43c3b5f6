"""Gates: a stage that makes an evaluation set worse than its limit ends the chain."""

from __future__ import annotations

from typing import Any

from dtrain.config.gates import Gate
from dtrain.core.errors import Exit, UserError, UserErrors
from dtrain.core.log import warn
from dtrain.core.run_dir import BASE_MODEL
from dtrain.monitoring.run_record import HeldOutLosses
from dtrain.monitoring.scores import get_score, metrics_of
from dtrain.monitoring.uncertainty import CERTAIN

ADVICE = (
    "train with data.replay, a lower train.learning_rate, fewer epochs, or a lower method.alpha / "
    "method.r; or raise the limit"
)


def check_gates(gates: dict[str, Gate], known: dict[str, Any], model: str) -> None:
    """Check a stage's measurements against the base model's.

    Args:
        known: content of evaluation.json.
        model: name of the stage.

    Raises:
        UserError: one is worse by more than its limit, and that is not chance; or the base or the
            metric was not measured.
    """
    failures = [failure for name in gates if (failure := _failure(name, gates[name], known, model))]
    if failures:
        raise failures[0] if len(failures) == 1 else UserErrors(failures)


def _failure(name: str, gate: Gate, known: dict[str, Any], model: str) -> UserError | None:
    where, metric = f"evaluation.gates.{name}", gate.metric or _default_metric(known, name)
    before, after = (_measured(known, name, metric, m) for m in (BASE_MODEL, model))
    if before is None or after is None:
        missing = BASE_MODEL if before is None else model
        fix = _metric_names(known, name) or "start the run in a new folder"
        if metric in metrics_of(known, name):  # measured once, so that it failed this time
            fix = "the warning above says why; the same command measures it again"
        return UserError(f"{metric} of {missing} was not measured", where=where, fix=fix)
    excess = gate.excess(before, after)
    if excess <= 0:
        return None
    text = f"stage {model} changed the {metric} of {name} from {before:.4f} to {after:.4f}"
    error = _standard_error(known, name, metric, model)
    if error is not None:
        text += f" (standard error of the change {error:.4f})"
        if excess < CERTAIN * error:
            warn(f"{where}: {text}: over the limit, but by no more than chance")
            return None
    limit = gate.max_drop if gate.max_drop is not None else gate.max_increase
    message = f"{text}; {limit:g} is allowed. Nothing is merged"
    return UserError(message, where=where, fix=ADVICE, status=Exit.GATE_FAILED)


def _default_metric(known: dict[str, Any], name: str) -> str:
    """The loss of a held-out set, the first metric of a task or of a set of prompts."""
    return "loss" if name in known["losses"] else next(iter(metrics_of(known, name)), "score")


def _measured(known: dict[str, Any], name: str, metric: str, model: str) -> float | None:
    if metric == "loss" and name in known["losses"]:
        return known["losses"][name].get(model)
    if name in known.get("metrics", {}):
        return known["metrics"][name].get(model, {}).get(metric)
    score = get_score(known, model, name, metric)
    return None if score is None else score.value


def _standard_error(known: dict[str, Any], name: str, metric: str, model: str) -> float | None:
    """Standard error of the change from the base, if it is known."""
    if metric == "loss" and name in known["losses"]:
        return HeldOutLosses.of(name, known).standard_error(model)
    before, after = (get_score(known, m, name, metric) for m in (BASE_MODEL, model))
    return after.stderr_of_change(before) if before and after else None


def _metric_names(known: dict[str, Any], name: str) -> str:
    """What the set or task reports, for an unknown metric."""
    if scored := metrics_of(known, name):
        return f"metric={' or '.join(scored)}"
    measured = known.get("metrics", {}).get(name, {}).get(BASE_MODEL, {})
    return f"metric={' or '.join(['loss', *measured])}" if measured else ""
