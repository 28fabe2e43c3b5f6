"""`dtrain plan --exact`: the peak memory of a step that a child process simulates.

The child (dtrain/simulation) builds the recipe's model with dtrain's own code and runs it in its
engine with fake tensors and fake ranks, for a few small numbers of layers. Each peak must grow by
the same amount with every layer, and so is known for the model's real depth.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from dtrain.config.engines import engines_with
from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.planning.model_process import has_torch, run_child
from dtrain.planning.workload import Workload

MIN_LAYERS = 3  # a first and a last layer, and another between them
LAYER_KEYS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
MAX_MICRO_BATCHES = 2  # a third has the same peak as the second
MAX_RANKS = 1024
TOLERANCE = 0.01  # between the two extrapolations that three numbers of layers allow
NO_SIMULATION = "plan without --exact"

ReportProgress = Callable[[int], None]
"""Called with a number of finished units."""


@dataclass(frozen=True)
class SimulatedPeak:
    """The most memory that was in use in one phase, in one region of the model.

    Attributes:
        phase: forward, backward or update.
        region: outside the layers, or in the first, the last or another layer.
        module: name of the module that was computing.
        total: bytes.
        terms: bytes by name; their sum is `total`.
    """

    phase: str
    region: str
    module: str
    total: float
    terms: dict[str, float]


@dataclass(frozen=True)
class SimulatedStep:
    """The peak of a step at the model's real depth.

    Attributes:
        layers: the numbers of layers that were simulated.
    """

    peak: SimulatedPeak
    layers: tuple[int, ...]


def progress_units(workload: Workload) -> int:
    """Units of progress that `simulate_step` reports: building, and each phase of two steps."""
    micro_batches = min(workload.accumulation, MAX_MICRO_BATCHES)
    return len(simulated_layers(workload)) * (5 + 2 * micro_batches)


def simulated_layers(workload: Workload) -> tuple[int, ...]:
    """Numbers of layers to simulate; a shallow model is simulated as it is.

    Where layers of several kinds repeat, the numbers differ by whole repetitions, and end as the
    model does. Where only the last layers train, as many train in each simulation, below which
    others differ in number.
    """
    depth, trained = workload.shape.layers, workload.trained_layers
    lead, period = repetition(workload.shape.each_layer)
    least = max(MIN_LAYERS, lead + 2) if period == 1 else lead + period + 2
    least += trained - 1 if 0 < trained < depth else 0
    least += (depth - least) % period
    layers = (least, least + period, least + 2 * period)
    return layers if depth > layers[-1] else (depth,)


def repetition(layers: Sequence[Hashable]) -> tuple[int, int]:
    """How many layers come before the part that repeats, and after how many it does.

    The second is the number of all layers where nothing repeats.
    """
    kinds = list(dict.fromkeys(layers))
    numbers = [kinds.index(layer) for layer in layers]
    depth, found = len(numbers), [(0, len(numbers))]
    for period in range(1, depth // 3 + 1):
        differ = [i for i in range(depth - period) if numbers[i] != numbers[i + period]]
        found.append((differ[-1] + 1 if differ else 0, period))
    return min(found, key=lambda pair: pair[0] + 3 * pair[1])


def simulate_step(
    recipe: Recipe,
    name: str,
    workload: Workload,
    config: dict[str, Any],
    report_progress: ReportProgress,
) -> SimulatedStep:
    """Simulate a step of one stage of a resolved recipe.

    Args:
        name: name of the stage.
        workload: the stage as numbers.
        config: content of the base's config.json.
        report_progress: called with finished units, `progress_units` in all.

    Raises:
        UserError: torch is missing, the engine or the number of ranks cannot be simulated, or
            memory does not grow evenly with the layers.
    """
    stage = next(stage for stage in recipe.stages if stage.name == name)
    _check_can_simulate(recipe, stage, workload)
    depth = workload.shape.layers
    layers = simulated_layers(workload)
    request = _build_request(recipe, name, workload)
    request["configs"] = [with_layers(config, count) for count in layers]
    peaks = list(_run_child(request, report_progress))
    return SimulatedStep(extrapolate_peak(peaks, layers, depth), layers)


def _check_can_simulate(recipe: Recipe, stage: Stage, workload: Workload) -> None:
    if not has_torch():
        raise UserError(
            "--exact simulates a step with torch, which is not installed here",
            fix="plan without --exact, which does not need torch, or install dtrain with torch",
        )
    if workload.ranks > MAX_RANKS:
        raise UserError(
            f"--exact simulates at most {MAX_RANKS} ranks, not {workload.ranks}",
            where="--exact",
            fix=NO_SIMULATION,
        )
    if recipe.determinism == "strict":
        raise UserError(
            "--exact does not simulate strict determinism",
            where="--exact",
            fix=f"{NO_SIMULATION}, or determinism=off",
        )
    trained = [len(workload.layers_that_train(linear)) for linear in workload.shape.linears]
    if any(0 < count < workload.trained_layers for count in trained):
        raise UserError(
            "--exact simulates models of which all layers that train are alike",
            where="--exact and method.frozen_modules",
            fix=NO_SIMULATION,
        )
    if workload.distills and stage.distill is None:
        raise UserError(
            "--exact does not simulate a term against forgetting that compares with the base",
            where="--exact",
            fix=NO_SIMULATION,
        )
    if workload.teacher is not None or workload.stores_teacher:
        raise UserError(
            "--exact simulates one model, which can be its own teacher; this teacher is another "
            "model, or was stored",
            where="--exact",
            fix=NO_SIMULATION,
        )
    if not workload.capabilities.simulated:
        raise UserError(
            f"{workload.engine} is not simulated: DeepSpeed reads the values of tensors, which "
            "simulated tensors lack, and what ZeRO-3 keeps does not grow evenly with the layers",
            where="--exact",
            fix=f"{NO_SIMULATION}, which models DeepSpeed's rules; "
            f"or engine.kind={' or '.join(engines_with('simulated'))}",
        )


def _build_request(recipe: Recipe, name: str, workload: Workload) -> dict[str, Any]:
    """The JSON object that the child reads."""
    settings = recipe.model_dump(mode="json")
    settings["model"]["dtype"] = "float32" if workload.element_bytes == 4 else "bfloat16"
    return {
        "recipe": settings,
        "stage": name,
        "ranks": workload.ranks,
        "node_ranks": workload.node_ranks,
        "on_gpu": workload.on_gpu,
        "micro_batches": min(workload.accumulation, MAX_MICRO_BATCHES),
    }


def with_layers(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """The config of the same model with fewer layers, also inside of a multimodal wrapper."""
    key = next((key for key in LAYER_KEYS if key in config), None)
    if key is None and "text_config" in config:
        return config | {"text_config": with_layers(config["text_config"], layers)}
    depth = config[key] if key else 0
    per_layer = {
        name: value[:layers]
        for name, value in config.items()
        if isinstance(value, list) and len(value) == depth
    }
    return config | per_layer | {key or LAYER_KEYS[0]: layers}


def _run_child(
    request: dict[str, Any], report_progress: ReportProgress
) -> Iterator[list[SimulatedPeak]]:
    """The peaks for each number of layers, as the child sends them."""
    for line in run_child(request, NO_SIMULATION):
        report_progress(line.get("done", 0))
        if "peaks" in line:
            yield [SimulatedPeak(**peak) for peak in line["peaks"]]


def extrapolate_peak(
    peaks: Sequence[Sequence[SimulatedPeak]], layers: Sequence[int], depth: int
) -> SimulatedPeak:
    """The greatest peak at the real depth.

    Args:
        peaks: the peaks for each of `layers`.

    Raises:
        UserError: memory does not grow evenly, so other depths cannot be predicted.
    """
    if len(layers) == 1:
        return max(peaks[0], key=lambda peak: peak.total)
    tables = [{(peak.phase, peak.region): peak for peak in group} for group in peaks]
    common = [key for key in tables[-1] if all(key in table for table in tables)]
    series = [[table[key] for table in tables] for key in common]
    intervals = list(pairwise(layers))
    predictions = [
        [
            _extrapolate(low.total, high.total, interval, depth)
            for (low, high), interval in zip(pairwise(line), intervals, strict=True)
        ]
        for line in series
    ]
    greatest = max(map(max, predictions))
    for predicted, line in zip(predictions, series, strict=True):
        matters = max(predicted) >= (1 - TOLERANCE) * greatest
        if matters and max(predicted) - min(predicted) > TOLERANCE * greatest:
            raise _uneven_growth(line, layers)
    winner = max(range(len(series)), key=lambda i: predictions[i][-1])
    low, high = series[winner][-2:]
    terms = {
        name: _extrapolate(low.terms.get(name, 0), high.terms.get(name, 0), intervals[-1], depth)
        for name in sorted({*low.terms, *high.terms})
    }
    return SimulatedPeak(high.phase, high.region, high.module, sum(terms.values()), terms)


def _extrapolate(low: float, high: float, layers: tuple[int, int], depth: int) -> float:
    """The value at `depth` on the straight line through the values at two numbers of layers."""
    return high + (high - low) / (layers[1] - layers[0]) * (depth - layers[1])


def _uneven_growth(peaks: Sequence[SimulatedPeak], layers: Sequence[int]) -> UserError:
    steps = [f"{high.total - low.total:+,.0f}" for low, high in pairwise(peaks)]
    return UserError(
        f"memory does not grow evenly with the layers: {' and '.join(steps)} bytes from "
        f"{', '.join(map(str, layers))} layers ({peaks[0].phase}, {peaks[0].region}), so the full "
        "depth cannot be predicted",
        where="--exact",
        fix=NO_SIMULATION,
    )
