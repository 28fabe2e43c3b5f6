"""Draw a trial's parameters and decide when it is pruned, by Optuna.

Both are functions of the sweep's seed, the trial's number and the results of earlier trials alone:
trial n knows the results of the trials up to n - `at_once`, and that the others are running. So a
sweep gives the same table whatever ends first, and also when it was killed in between. Optuna's
studies are in memory, built again from the record for each trial.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)
from optuna.trial import FrozenTrial, TrialState, create_trial

from dtrain.config.sweep import Choices, Range, Sweep
from dtrain.core.errors import Exit
from dtrain.core.hashes import fingerprint
from dtrain.sweep.record import Point, Trial

SIGNIFICANT_DIGITS = 4
RUNG = "completed_rung_"  # how Optuna's Hyperband names its notes
# The values were the cause: a search avoids them. Other failures say nothing about them.
BAD_VALUES = (Exit.NON_FINITE, Exit.OUT_OF_MEMORY, Exit.GATE_FAILED)

STATES = {"complete": TrialState.COMPLETE, "pruned": TrialState.PRUNED}

optuna.logging.set_verbosity(optuna.logging.WARNING)


class Search:
    """A sweep's sampler and pruner."""

    def __init__(self, sweep: Sweep) -> None:
        self._sweep, self._space = sweep, sweep.space
        self._distributions = {key: _distribution(v) for key, v in self._space.items()}

    def first_unknown(self, number: int) -> int:
        """The first trial whose result a trial does not know."""
        return max(0, number - self._sweep.at_once + 1)

    def draw(self, number: int, trials: Sequence[Trial]) -> dict[str, Any]:
        """The parameters of trial `number`.

        Args:
            trials: all before it; those before `first_unknown` have ended.
        """
        seed = int(fingerprint([self._sweep.seed, number])[:8], 16)
        if self._sweep.method == "tpe":
            startup = max(4, min(10, self._sweep.number_of_trials // 3))
            sampler = optuna.samplers.TPESampler(seed=seed, n_startup_trials=startup)
            study = self._study(number, trials, sampler)
        else:
            study = optuna.create_study(sampler=optuna.samplers.RandomSampler(seed))
        drawn = study.ask(self._distributions).params
        if self._sweep.method == "grid":
            rest = number
            for key in reversed(self._space):
                values = self._space[key]
                if isinstance(values, Choices):
                    rest, drawn[key] = divmod(rest, len(values.values))
        return {key: _value(self._space[key], drawn[key]) for key in self._space}

    def judge(self, number: int, trials: Sequence[Trial]) -> PruneJudge:
        """Decides when trial `number` is pruned; see `draw` for the arguments."""
        return PruneJudge(self._study(number, trials, optuna.samplers.RandomSampler(0)))

    def importances(self, trials: Sequence[Trial]) -> dict[str, float]:
        """How much each parameter matters for a low loss, in shares of 1, largest first.

        PED-ANOVA (Watanabe, Bansal, Hutter 2023, "PED-ANOVA: Efficiently Quantifying Hyperparameter
        Importance in Arbitrary Subspaces"): how the best tenth of the trials is distributed.

        Returns:
            Nothing with fewer than four complete trials.
        """
        complete = [trial for trial in trials if trial.value is not None]
        if len(complete) < 4:
            return {}
        study = optuna.create_study()
        study.add_trials([self._frozen(trial, is_known=True) for trial in complete])
        return dict(optuna.importance.get_param_importances(study))

    def _study(
        self, number: int, trials: Sequence[Trial], sampler: optuna.samplers.BaseSampler
    ) -> optuna.Study:
        """A study with all trials before `number`."""
        study = optuna.create_study(
            study_name="sweep", sampler=sampler, pruner=_pruner(self._sweep)
        )
        unknown = self.first_unknown(number)
        study.add_trials([self._frozen(t, is_known=t.number < unknown) for t in trials[:number]])
        return study

    def _frozen(self, trial: Trial, *, is_known: bool) -> FrozenTrial:
        """A trial of the record as Optuna has it; without its result if that is not known."""
        inner = {k: _inner(self._space[k], value) for k, value in trial.parameters.items()}
        state, points, rungs = TrialState.RUNNING, dict[int, float](), dict[str, Any]()
        if is_known:
            state = STATES.get(trial.state, TrialState.FAIL)
            if any(run.status in BAD_VALUES for run in trial.runs):
                state = TrialState.PRUNED
        if is_known and trial.state != "failed":
            points = {i: _number(loss) for i, (_, loss) in enumerate(trial.points, start=1)}
            rungs = dict(trial.rungs)
        return create_trial(
            state=state,
            value=trial.value if is_known else None,
            params=inner,
            distributions=self._distributions,
            intermediate_values=points,
            system_attrs=rungs,
        )


class PruneJudge:
    """Decides whether one trial is pruned, from its losses so far."""

    def __init__(self, study: optuna.Study) -> None:
        self._study, self._trial = study, study.ask()
        self._judged = 0

    def prunes_after(self, points: Sequence[Point]) -> int | None:
        """How many of the losses were enough to prune the trial; None if it continues.

        Args:
            points: of the trial, never fewer than in the call before.
        """
        for count, (_, loss) in enumerate(points[self._judged :], start=self._judged + 1):
            self._judged = count
            self._trial.report(_number(loss), count)
            if self._trial.should_prune():
                return count
        return None

    @property
    def rungs(self) -> dict[str, float]:
        """What Hyperband has noted of the trial."""
        notes = self._study.trials[self._trial.number].system_attrs
        return {key: value for key, value in notes.items() if key.startswith(RUNG)}


def _pruner(sweep: Sweep) -> optuna.pruners.BasePruner:
    if sweep.prune == "median":
        finished = max(2, min(5, sweep.number_of_trials // 4))
        return optuna.pruners.MedianPruner(n_startup_trials=finished)
    if sweep.prune == "hyperband":
        return optuna.pruners.HyperbandPruner()
    return optuna.pruners.NopPruner()


def _distribution(values: Choices | Range) -> BaseDistribution:
    """A distribution of a parameter; of choices, over their indices."""
    if isinstance(values, Range):
        if values.scale == "int":
            return IntDistribution(int(values.low), int(values.high))
        return FloatDistribution(values.low, values.high, log=values.scale == "log")
    last = len(values.values) - 1
    numbers = [v for v in values.values if isinstance(v, int | float) and not isinstance(v, bool)]
    if len(numbers) == len(values.values) and sorted(numbers) == numbers:
        return IntDistribution(0, last)  # neighbors are alike
    return CategoricalDistribution(range(last + 1))


def _value(values: Choices | Range, drawn: Any) -> Any:
    """The recipe's value for Optuna's."""
    if isinstance(values, Choices):
        return values.values[int(drawn)]
    if values.scale == "int":
        return int(drawn)
    rounded = float(f"{drawn:.{SIGNIFICANT_DIGITS}g}")
    return min(max(rounded, values.low), values.high)


def _inner(values: Choices | Range, value: Any) -> Any:
    """Optuna's value for the recipe's."""
    return values.values.index(value) if isinstance(values, Choices) else value


def _number(loss: float | None) -> float:
    return float("nan") if loss is None else loss
