"""Run a sweep: start runs, follow their files, prune, and record every result."""

from __future__ import annotations

import signal
import time
from collections.abc import Iterator, Sequence
from types import FrameType
from typing import Protocol

from dtrain.config.load import dump
from dtrain.config.sweep import Sweep
from dtrain.core.errors import Exit, UserError, first_line
from dtrain.core.files import read_tail, write_atomic
from dtrain.core.log import say
from dtrain.sweep.measure import ending, spent
from dtrain.sweep.recipes import TrialRecipes, shared_name, trial_name
from dtrain.sweep.record import SeedRun, SweepDir, SweepRecord, Trial
from dtrain.sweep.search import PruneJudge, Search

INTERRUPTS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
RETRIED = (Exit.CRASHED, Exit.HANG)  # of a run that was ended together with the sweep


class Runs(Protocol):
    """Processes or jobs that work on runs.

    Attributes:
        capacity: how many at the same time.
        poll_seconds: how often to look at them.
    """

    capacity: int
    poll_seconds: float

    def start(self, batch: Sequence[SeedRun]) -> None:
        """Start runs whose recipes are in their folders; sets their `job`."""

    def refresh(self) -> None:
        """Learn the state of all runs, before `ended` is asked."""

    def ended(self, run: SeedRun) -> int | None:
        """The exit status of a run that has ended, if it left no report; None while it works."""

    def stop(self, run: SeedRun) -> None:
        """Ask a run to save and end."""

    def adopt(self, runs: Sequence[SeedRun]) -> list[SeedRun]:
        """The runs of an earlier start that still work, or have ended since; sets their `job`."""

    def interrupt(self) -> None:
        """Ask all runs that cannot go on alone to save and end, and wait for them."""


class Driver:
    """Works on a sweep until all its trials have ended, or its budget is used up.

    Args:
        sweep: its settings.
        folder: its folder, locked.
        record: from `open_record`.
        runs: processes or jobs.
    """

    def __init__(
        self,
        sweep: Sweep,
        folder: SweepDir,
        recipes: TrialRecipes,
        record: SweepRecord,
        runs: Runs,
    ) -> None:
        self.sweep, self.folder, self.recipes = sweep, folder, recipes
        self.record, self.runs = record, runs
        self._search = Search(sweep)
        self._judges: dict[int, PruneJudge] = {}
        self._before, self._began = record.seconds, time.monotonic()
        self._is_interrupted = self._is_over = False

    def run(self) -> bool:
        """Work; return False if interrupted.

        Raises:
            UserError: a stage that all trials share has failed.
        """
        before = {number: signal.signal(number, self._interrupt) for number in INTERRUPTS}
        try:
            return self._work()
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _work(self) -> bool:
        self._resume()
        while True:
            self._follow()
            self._settle()
            if self._is_interrupted:
                self.runs.interrupt()
                self._save()
                return False
            self._start()
            if self._has_ended():
                self._save()
                return True
            time.sleep(self.runs.poll_seconds)

    def _has_ended(self) -> bool:
        """Whether no run works, and none is to start."""
        if any(run.state in ("running", "stopping") for run in self.record.runs):
            return False
        trials = self.record.trials
        is_complete = len(trials) >= self.sweep.number_of_trials
        return self._is_over or (is_complete and all(trial.has_ended for trial in trials))

    def _interrupt(self, number: int, frame: FrameType | None) -> None:
        self._is_interrupted = True

    def _save(self) -> None:
        self.record.seconds = self._before + time.monotonic() - self._began
        self.record.write(self.folder)

    def _resume(self) -> None:
        """Find out what became of the runs that the last start of the sweep left."""
        left = [run for run in self.record.runs if run.state in ("running", "stopping")]
        working = self.runs.adopt(left) if left else []
        for run in left:
            if run in working:
                if run.state == "stopping":
                    self.runs.stop(run)  # the last start may have had no time to
                continue
            outcome, status, reason = ending(self.folder.run(run.name))
            if run.state == "stopping":
                self._end(run, "pruned")
            elif outcome == "finished" or (outcome == "failed" and status not in RETRIED):
                self._finish(run, outcome, status, reason)
            else:
                run.state = "waiting"
        if self.record.trials:
            ended = sum(trial.has_ended for trial in self.record.trials)
            say(f"the sweep continues: {ended} of {self.sweep.number_of_trials} trials have ended")

    # Runs

    def _follow(self) -> None:
        """Record the runs that have ended."""
        self.runs.refresh()
        for run in list(self.record.runs):
            if run.state not in ("running", "stopping"):
                continue
            if (code := self.runs.ended(run)) is None:
                continue
            outcome, status, reason = ending(
                self.folder.run(run.name), read_tail(self.folder.log(run.name)), code
            )
            if run.state == "stopping":
                self._end(run, "pruned")
            elif outcome == "interrupted" and self.sweep.slurm is None:
                self._is_interrupted = True  # by the end of this job, most likely
            else:
                self._finish(run, outcome, status, reason or "was stopped")
            self._save()

    def _finish(self, run: SeedRun, outcome: str, status: int, reason: str) -> None:
        """Record a run that was not pruned."""
        if outcome == "finished":
            run.value = None if run in self.record.shared else self._value(run)
            is_measured = run in self.record.shared or run.value is not None
            run.reason = "" if is_measured else "diverged: the loss is not finite"
            run.status = 0 if is_measured else Exit.NON_FINITE
        else:
            run.status, run.reason = status, reason
        self._end(run, "failed" if run.reason else "complete")

    def _value(self, run: SeedRun) -> float | None:
        return self.recipes.target.value(self.folder.run(run.name))

    def _end(self, run: SeedRun, state: str) -> None:
        run.state = state  # type: ignore[assignment]
        seconds, gpu_hours = spent(self.folder.run(run.name))
        run.seconds, run.gpu_hours = round(seconds, 1), round(gpu_hours, 4)
        if run in self.record.shared and state == "failed":
            self._save()
            self.runs.interrupt()
            message = f"the stages that all trials share have failed: {run.reason}"
            where = str(self.folder.run(run.name).path)
            raise UserError(message, where=where, fix="fix it, then start the sweep again")

    # Trials

    def _settle(self) -> None:
        """Find the trials whose results are final, in the order of their numbers."""
        for trial in self.record.trials:
            if trial.has_ended:
                continue
            if self.sweep.prune != "off":
                if not self._knows_enough(trial.number):
                    continue
                self._prune(trial)
            if not trial.has_ended:
                self._complete(trial)
            if trial.has_ended:
                self._judges.pop(trial.number, None)
                self._stop(trial)
                self._report(trial)

    def _knows_enough(self, number: int) -> bool:
        """Whether the results that a trial depends on are final."""
        unknown = self._search.first_unknown(number)
        return all(trial.has_ended for trial in self.record.trials[:unknown])

    def _prune(self, trial: Trial) -> None:
        """Look at a trial's new losses."""
        judge = self._judges.get(trial.number)
        if judge is None:
            judge = self._search.judge(trial.number, self.record.trials)
            self._judges[trial.number] = judge
        points = self.recipes.target.points(self.folder.run(trial.runs[0].name))
        count = judge.prunes_after(points)
        trial.points, trial.rungs = points[:count], judge.rungs
        if count is not None:
            trial.state = "pruned"

    def _complete(self, trial: Trial) -> None:
        """End a trial whose runs have all ended, or one of which has failed."""
        first = trial.runs[0]
        if any(run.state == "failed" for run in trial.runs):
            trial.state = "failed"
        elif first.state == "complete" and len(trial.runs) < self.sweep.seeds:
            trial.runs += [
                self._seed_run(trial.number, offset) for offset in range(1, self.sweep.seeds)
            ]
        elif all(run.state == "complete" for run in trial.runs):
            trial.state = "complete"
            trial.points = trial.points or self.recipes.target.points(self.folder.run(first.name))

    def _stop(self, trial: Trial) -> None:
        """Record a trial that has ended, then stop what still works on it."""
        working = [run for run in trial.runs if run.state == "running"]
        for run in trial.runs:
            if run.state in ("running", "waiting"):
                run.state = "stopping" if run in working else "pruned"
        self._save()
        for run in working:
            self.runs.stop(run)

    def _report(self, trial: Trial) -> None:
        ended = sum(each.has_ended for each in self.record.trials)
        texts = {
            "complete": f"loss {trial.value:.4f}" if trial.value is not None else "",
            "pruned": f"pruned at step {trial.points[-1][0]}" if trial.points else "pruned",
            "failed": f"failed: {trial.reason}",
        }
        values = ", ".join(f"{k.rpartition('.')[2]} {v}" for k, v in trial.parameters.items())
        total = self.sweep.number_of_trials
        say(f"trial {trial.number} ({values}): {texts[trial.state]}; {ended} of {total} ended")

    # Starts

    def _start(self) -> None:
        """Start as many runs as there is room for."""
        active = sum(run.state in ("running", "stopping") for run in self.record.runs)
        batch: list[SeedRun] = []
        waiting = self._waiting()
        while active + len(batch) < self.runs.capacity and not self._is_used_up():
            run = next(waiting, None)
            if run is None:
                break
            if self._write_recipe(run):
                run.state = "running"
                batch.append(run)
        if batch:
            self._save()  # before they start: a killed sweep must know them
            self.runs.start(batch)
            self._save()

    def _waiting(self) -> Iterator[SeedRun]:
        """Runs that can start, the most urgent first; trials are drawn as they are asked for."""
        if self.recipes.shared and not self.record.shared:
            self.record.shared = [
                SeedRun(name=shared_name(seed), seed=seed)
                for seed in (self.recipes.base.seed + i for i in range(self.sweep.seeds))
            ]
        yield from [run for run in self.record.shared if run.state == "waiting"]
        if any(run.state != "complete" for run in self.record.shared):
            return
        for trial in self.record.trials:
            yield from [run for run in trial.runs if run.state == "waiting"]
        while (number := len(self.record.trials)) < self.sweep.number_of_trials:
            if self.sweep.method == "tpe" and not self._knows_enough(number):
                return
            parameters = self._search.draw(number, self.record.trials)
            run = self._seed_run(number, 0)
            self.record.trials.append(Trial(number=number, parameters=parameters, runs=[run]))
            yield run

    def _seed_run(self, number: int, offset: int) -> SeedRun:
        seed = self.recipes.base.seed + offset
        return SeedRun(name=trial_name(number, seed, self.sweep.seeds), seed=seed)

    def _write_recipe(self, run: SeedRun) -> bool:
        """Write a run's recipe; a run whose values do not fit together has failed."""
        try:
            if run in self.record.shared:
                recipe = self.recipes.shared_run(run)
            else:
                trial = next(trial for trial in self.record.trials if run in trial.runs)
                offset = run.seed - self.recipes.base.seed
                recipe = self.recipes.trial(trial.parameters, run, offset)
        except UserError as error:
            run.state, run.status, run.reason = "failed", error.status, first_line(error)
            return False
        write_atomic(self.folder.run(run.name).recipe, dump(recipe))
        return True

    def _is_used_up(self) -> bool:
        """Whether the budget allows no further run; says so once."""
        hours = (self._before + time.monotonic() - self._began) / 3600
        limits = [(hours, self.sweep.max_hours, "hours")]
        if self.sweep.max_gpu_hours is not None:
            limits.append((self._gpu_hours(), self.sweep.max_gpu_hours, "GPU-hours"))
        for used, limit, unit in limits:
            if limit is not None and used >= limit:
                if not self._is_over:
                    say(f"the budget of {limit:g} {unit} is used up: no further run starts")
                self._is_over = True
        return self._is_over

    def _gpu_hours(self) -> float:
        """GPU-hours of all runs, those that work included."""
        working = [run for run in self.record.runs if run.state in ("running", "stopping")]
        now = sum(spent(self.folder.run(run.name))[1] for run in working)
        return self.record.gpu_hours + now
