"""The inputs of a run when it was saved and now: a resume reports every difference."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

from dtrain.core.errors import UserError

CHANGEABLE = frozenset(
    {
        "train.learning_rate",
        "train.lr_scheduler",
        "train.warmup_ratio",
        "train.min_lr_ratio",
        "train.decay_ratio",
        "train.decay_type",
        "train.epochs",
        "train.steps",
        "train.tokens",
        "train.weight_decay",
        "train.max_grad_norm",
        "train.label_smoothing",
        "train.neftune_noise_alpha",
        "train.evaluate_every_steps",
        "train.evaluate_on",
        "train.maximize",
        "output.use",
        "output.watched",
        "train.early_stopping_patience",
        "train.max_non_finite_steps",
        "train.checkpoint_every_steps",
        "method.dropout",
    }
)
"""Keys that may change in the middle of a stage: the position in the data, the shapes of the
trained parameters and the meaning of the optimizer's state do not depend on them."""

MAX_VALUE_CHARACTERS = 60

_ABSENT = object()


def differences(saved: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """Return a line for each dotted key that differs, with both values."""
    return [_line(*change) for change in _changes("", _plain(saved), _plain(now))]


def changes_allowed_in(stage: str, keys: Iterable[str]) -> set[str]:
    """Those of the keys of --allow-change that concern a stage, as this module writes them.

    Args:
        keys: `train.steps` for every stage, `stages.task.train.steps` for one; a `=VALUE` behind
            it, as in an override, is ignored.
    """
    keys = {key.partition("=")[0] for key in keys}
    prefix = f"stages.{stage}."
    return {key.removeprefix(prefix) for key in keys if key.startswith(prefix) or key in CHANGEABLE}


def check_changeable(keys: Iterable[str], stages: Sequence[str]) -> None:
    """Check the keys of --allow-change.

    Raises:
        UserError: one of them names no stage, or cannot change in the middle of a stage.
    """
    for key in keys:
        if not any(changes_allowed_in(stage, [key]) & CHANGEABLE for stage in stages):
            raise UserError(
                f"`{key}` cannot change in the middle of a stage",
                where="--allow-change",
                fix=f"these can, alone or after stages.NAME.: {', '.join(sorted(CHANGEABLE))}",
            )


def check_same_inputs(saved: dict[str, Any], now: dict[str, Any], allowed: set[str]) -> list[str]:
    """Check that a run resumes with the inputs that the checkpoint was made from.

    Args:
        saved: nested plain values, from a checkpoint's state.
        now: the same of this run.
        allowed: dotted keys that the user lets change.

    Returns:
        The differences that were allowed, to report to the user.

    Raises:
        UserError: something else differs.
    """
    changes = list(_changes("", _plain(saved), _plain(now)))
    refused = [change for change in changes if change[0] not in allowed]
    if refused:
        lines = "".join(f"\n    {_line(*change)}" for change in refused)
        raise UserError(
            f"the run differs from the one that saved the checkpoint:{lines}",
            fix=_advice([key for key, _, _ in refused]),
        )
    return [_line(*change) for change in changes]


def _plain(value: dict[str, Any]) -> Any:
    """Return a value as JSON gives it back: tuples become lists, keys strings."""
    return json.loads(json.dumps(value))


def _advice(keys: list[str]) -> str:
    if all(key in CHANGEABLE for key in keys):
        flags = " ".join(f"--allow-change {key}" for key in keys)
        return f"change it back; or, if it is intended: {flags}"
    return "change it back, or start again with --fresh in a new folder"


def _changes(key: str, saved: Any, now: Any) -> Iterator[tuple[str, Any, Any]]:
    """Yield (dotted key, saved, now) for each leaf that differs, sorted by key.

    Lists of different lengths count as leaves.
    """
    if isinstance(saved, dict) and isinstance(now, dict):
        for name in sorted({*saved, *now}):
            yield from _changes(_join(key, name), saved.get(name, _ABSENT), now.get(name, _ABSENT))
    elif isinstance(saved, list) and isinstance(now, list) and len(saved) == len(now):
        for index, pair in enumerate(zip(saved, now, strict=True)):
            yield from _changes(_join(key, str(index)), *pair)
    elif saved != now:
        yield key, saved, now


def _join(key: str, name: str) -> str:
    return f"{key}.{name}" if key else name


def _line(key: str, saved: Any, now: Any) -> str:
    return f"{key}: {_render(saved)} in the checkpoint, {_render(now)} now"


def _render(value: Any) -> str:
    if value is _ABSENT:
        return "absent"
    text = repr(value)
    return text if len(text) <= MAX_VALUE_CHARACTERS else text[: MAX_VALUE_CHARACTERS - 1] + "…"
