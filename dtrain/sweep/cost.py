"""The plan of a whole sweep: its trials, and their time and price before any of them runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from statistics import mean

from dtrain.config.schema import Recipe
from dtrain.config.sweep import Sweep
from dtrain.core.errors import UserError
from dtrain.core.units import duration
from dtrain.planning.fit import ORDER
from dtrain.planning.plan import RecipePlan, make_plan
from dtrain.planning.speed import Estimate
from dtrain.planning.workload import Cluster
from dtrain.sweep.recipes import TrialRecipes, shared_name, trial_name
from dtrain.sweep.record import SeedRun, SweepRecord
from dtrain.sweep.search import Search

Item = tuple[str, str]  # label and text

PLANNED_TRIALS = 16  # their mean stands for the others


def draw_recipes(sweep: Sweep, recipes: TrialRecipes) -> list[Recipe]:
    """The recipes of the first trials, as far as they are known before any result.

    Raises:
        UserErrors: values that do not fit together.
    """
    search, base = Search(sweep), recipes.base
    known = sweep.number_of_trials if sweep.method != "tpe" else 1
    drawn = []
    for number in range(min(known, PLANNED_TRIALS)):
        run = SeedRun(name=trial_name(number, base.seed, sweep.seeds), seed=base.seed)
        drawn.append(recipes.trial(search.draw(number, []), run, 0))
    return drawn


def plan_lines(
    sweep: Sweep,
    recipes: TrialRecipes,
    record: SweepRecord,
    cluster: Cluster | None,
    price: float | None,
) -> Iterator[str]:
    """The sweep in words, and what it costs, as aligned lines.

    Args:
        record: of earlier starts; complete runs in it are better than a plan.
        cluster: that each run trains on; None for CPUs.
        price: of an hour of one GPU.
    """
    seeds = f", {sweep.seeds} seeds each" if sweep.seeds > 1 else ""
    yield f"sweep of {recipes.base.name}: {sweep.number_of_trials} trials, {sweep.method}{seeds}"
    items = [*_settings_items(sweep, recipes), *_cost_items(sweep, recipes, record, cluster, price)]
    width = max(len(label) for label, _ in items)
    yield from (f"  {label:<{width}}  {text}" for label, text in items)


def _settings_items(sweep: Sweep, recipes: TrialRecipes) -> Iterator[Item]:
    target, seeds = recipes.target, sweep.seeds
    loss = target.evaluate_on
    yield ("minimizes", f"loss of stage {target.stage} on {loss}")
    for key, values in sweep.parameters.items():
        text = values if isinstance(values, str) else ", ".join(map(str, values))
        yield (key, text)
    where = "Slurm" if sweep.slurm else "this machine"
    yield ("runs", f"{sweep.at_once} at once on {where}; pruning: {sweep.prune}")
    if recipes.shared:
        names = ", ".join(stage.name for stage in recipes.shared)
        yield ("shared", f"{names}: trained {'once' if seeds == 1 else f'{seeds} times'}")


def _cost_items(
    sweep: Sweep,
    recipes: TrialRecipes,
    record: SweepRecord,
    cluster: Cluster | None,
    price: float | None,
) -> Iterator[Item]:
    runs, most = sweep.number_of_trials * sweep.seeds, "" if sweep.prune == "off" else "at most "
    complete = [run.seconds for trial in record.trials for run in trial.runs if run.value]
    if complete:
        seconds = mean(complete)
        left = runs - sum(run.state != "waiting" for trial in record.trials for run in trial.runs)
        yield ("a run", f"{duration(seconds)}, the mean of {len(complete)} so far")
        yield ("left", f"{most}{left} runs, {duration(left * seconds / sweep.at_once)}")
        return
    drawn = draw_recipes(sweep, recipes)
    if cluster is None:
        yield ("time", "not known for CPUs before the first trial")
        return
    try:
        plans = [make_plan(recipe, cluster) for recipe in drawn]
    except UserError as error:
        yield ("not planned", error.message)
        return
    verdict = max((plan.verdict for plan in plans), key=ORDER.index)
    yield ("each run on", f"{cluster}: {verdict}")
    skipped = {stage.name for stage in recipes.shared}
    per_run = _hours(plans, skipped)
    shared = Estimate(0.0, 0.0, 0.0)
    if recipes.shared:
        seed = recipes.base.seed
        prefix = recipes.shared_run(SeedRun(name=shared_name(seed), seed=seed))
        hours = _hours([make_plan(prefix, cluster)], set())
        per_run, shared = (per_run, hours.times(sweep.seeds)) if hours else (None, shared)
    if per_run is None:
        yield ("time", "not known: the data are not on this machine; dtrain data prepare")
        return
    whole = per_run.times(runs).plus(shared)
    yield ("a run", _range(per_run))
    if recipes.shared:
        yield ("shared stages", _range(shared))
    on_gpus = whole.times(cluster.ranks)
    yield ("GPU-hours", f"{most}{on_gpus.middle:.3g} ({on_gpus.low:.3g} to {on_gpus.high:.3g})")
    at_once = min(sweep.at_once, runs)
    yield ("wall time", most + _range(per_run.times(runs / at_once).plus(shared)))
    if price is not None:
        low, middle, high = (x * price for x in (on_gpus.low, on_gpus.middle, on_gpus.high))
        yield (
            "price",
            f"{most}{middle:,.2f} ({low:,.2f} to {high:,.2f}) at {price:g} per GPU-hour",
        )
    yield ("", "without answers to prompts, and waiting for nodes")


def _hours(plans: Sequence[RecipePlan], skipped: set[str]) -> Estimate | None:
    """The mean hours of recipes; None where the number of tokens is not known.

    Args:
        skipped: stages that are not trained.
    """
    totals = []
    for plan in plans:
        hours = [stage.time.total for stage in plan.stages if stage.name not in skipped]
        known = [x for x in hours if x is not None]
        if len(known) < len(hours):
            return None
        totals.append([sum(getattr(x, name) for x in known) for name in ("low", "middle", "high")])
    return Estimate(*(mean(column) for column in zip(*totals, strict=True)))


def _range(hours: Estimate) -> str:
    low, middle, high = (duration(3600 * x) for x in (hours.low, hours.middle, hours.high))
    return f"{middle} ({low} to {high})"
