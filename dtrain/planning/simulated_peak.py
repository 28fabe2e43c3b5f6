"""`dtrain plan --exact`: a step simulated in a child process, and what follows for all layers.

The child (dtrain/simulation) builds the recipe's model by dtrain's own code and runs it in its
engine with fake tensors and fake ranks. It does so for a few numbers of layers; every peak must
grow by the same amount with each of them, and so is known for the model's real depth.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from importlib.util import find_spec
from itertools import pairwise
from typing import Any

from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.planning.workload import ZERO, Cluster, Workload

CHILD, MARK = "dtrain.simulation", "dtrain-simulation "
LAYERS = (3, 4, 5)  # a first, a last, and others between them
MOST_MICRO_BATCHES = 2  # a third finds what the second found
MOST_RANKS = 1024
TOLERANCE = 0.01  # between the two extrapolations that three numbers of layers allow

Told = Callable[[int], None]


@dataclass(frozen=True)
class Peak:
    """The most that lived in a phase while one kind of place computed.

    Attributes:
        phase: forward, backward or update.
        place: outside the layers, in the first, the last or another one.
        module: its name.
        terms: name → bytes, sum `total`.
    """

    phase: str
    place: str
    module: str
    total: float
    terms: dict[str, float]


@dataclass(frozen=True)
class SimulationResult:
    """The peak at the real depth.

    Attributes:
        layers: numbers of layers that were simulated.
    """

    peak: Peak
    layers: tuple[int, ...]


def steps_of(workload: Workload) -> int:
    """Units of progress that `simulate` tells of: building, and each phase of two steps."""
    micro_batches = min(workload.accumulation, MOST_MICRO_BATCHES)
    return len(layers_for(workload.shape.layers)) * (5 + 2 * micro_batches)


def layers_for(depth: int) -> tuple[int, ...]:
    """Numbers of layers to simulate: all of them where they are few."""
    return LAYERS if depth > LAYERS[-1] else (depth,)


def simulate(
    recipe: Recipe,
    name: str,
    workload: Workload,
    cluster: Cluster,
    config: dict[str, Any],
    told: Told,
) -> SimulationResult:
    """Simulate a stage of a resolved recipe.

    Args:
        name: of the stage.
        setup: the same as numbers.
        config: the content of the base's config.json.
        told: called with units of progress, `steps_of` in all.

    Raises:
        UserError: no torch, an engine that is not simulated, more ranks than are simulated,
            memory that does not grow evenly with the layers.
    """
    _refuse(recipe, workload, cluster)
    depth = workload.shape.layers
    layers = layers_for(depth)
    question = _question(recipe, name, workload, cluster)
    question["configs"] = [cut(config, count) for count in layers]
    found = list(_answers(question, told))
    return SimulationResult(at_depth(found, layers, depth), layers)


def _refuse(recipe: Recipe, workload: Workload, cluster: Cluster) -> None:
    if find_spec("torch") is None:
        raise UserError(
            "--exact simulates with torch, which is not installed here",
            fix="plan without --exact, which needs none, or where dtrain is installed whole",
        )
    if workload.ranks > MOST_RANKS:
        what = f"{cluster.ranks} ranks; at most {MOST_RANKS} are simulated"
        raise UserError(what, where="--exact", fix="plan without --exact")
    if recipe.determinism == "strict":
        what = "strict sums are not simulated"
        raise UserError(what, where="--exact", fix="plan without --exact, or determinism=off")
    if workload.engine in ZERO:
        raise UserError(
            f"{workload.engine} is not simulated: DeepSpeed reads the values of tensors, which "
            "simulated tensors lack, and what ZeRO-3 keeps does not grow evenly with the layers",
            where="--exact",
            fix="plan without --exact, which plays DeepSpeed's rules through; "
            "or engine.kind=ddp or fsdp2",
        )


def _question(recipe: Recipe, name: str, workload: Workload, cluster: Cluster) -> dict[str, Any]:
    """What the child reads."""
    micro_batches = min(workload.accumulation, MOST_MICRO_BATCHES)
    plain = recipe.model_dump(mode="json")
    plain["model"]["dtype"] = "float32" if workload.element_bytes == 4 else "bfloat16"
    return {
        "recipe": plain,
        "stage": name,
        "ranks": workload.ranks,
        "on_node": workload.node_ranks,
        "on_gpu": workload.on_gpu,
        "micro_batches": micro_batches,
    }


def cut(config: dict[str, Any], layers: int) -> dict[str, Any]:
    """A config of so many layers."""
    per_layer = {
        key: value[:layers]
        for key, value in config.items()
        if isinstance(value, list) and len(value) == config["num_hidden_layers"]
    }
    return config | per_layer | {"num_hidden_layers": layers}


def _answers(question: dict[str, Any], told: Told) -> Iterator[list[Peak]]:
    """Peaks of each number of layers, as the child finds them."""
    child = subprocess.Popen(
        [sys.executable, "-m", CHILD],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": ""},
        text=True,
    )
    assert child.stdin and child.stdout and child.stderr
    with child:
        child.stdin.write(json.dumps(question))
        child.stdin.close()
        for text in child.stdout:
            line = json.loads(text.removeprefix(MARK)) if text.startswith(MARK) else {}
            told(line.get("done", 0))
            if "error" in line:
                what, where, fix = line["error"]
                raise UserError(what, where=where, fix=fix)
            if "peaks" in line:
                yield [Peak(**peak) for peak in line["peaks"]]
        said = child.stderr.read().strip().splitlines()
    if child.returncode:
        what = f"the simulation ended with status {child.returncode}"
        raise UserError(f"{what}: {said[-1] if said else 'no word'}", fix="plan without --exact")


def at_depth(found: Sequence[Sequence[Peak]], layers: Sequence[int], depth: int) -> Peak:
    """The greatest peak at the real depth.

    Args:
        found: peaks for each of `layers`.

    Raises:
        UserError: memory does not grow evenly, so that nothing can be said of other depths.
    """
    if len(layers) == 1:
        return max(found[0], key=lambda peak: peak.total)
    tables = [{(p.phase, p.place): p for p in peaks} for peaks in found]
    common = [key for key in tables[-1] if all(key in table for table in tables)]
    ends = list(pairwise(layers))
    lines = [[table[key] for table in tables] for key in common]
    reached = [
        [_line(a.total, b.total, at, depth) for (a, b), at in zip(pairwise(x), ends, strict=True)]
        for x in lines
    ]
    best = max(max(ways) for ways in reached)
    for ways, peaks in zip(reached, lines, strict=True):
        if max(ways) >= (1 - TOLERANCE) * best and max(ways) - min(ways) > TOLERANCE * best:
            raise _uneven(peaks, layers)
    winner = max(range(len(lines)), key=lambda i: reached[i][-1])
    return _extended(lines[winner][-2:], ends[-1], depth)


def _line(low: float, high: float, at: Sequence[int], depth: int) -> float:
    """On the straight line through two points."""
    return high + (high - low) / (at[1] - at[0]) * (depth - at[1])


def _extended(pair: Sequence[Peak], at: tuple[int, int], depth: int) -> Peak:
    low, high = pair
    names = sorted({*low.terms, *high.terms})
    terms = {n: _line(low.terms.get(n, 0), high.terms.get(n, 0), at, depth) for n in names}
    return Peak(high.phase, high.place, high.module, sum(terms.values()), terms)


def _uneven(peaks: Sequence[Peak], layers: Sequence[int]) -> UserError:
    steps = [f"{b.total - a.total:+,.0f}" for a, b in pairwise(peaks)]
    where = f"{peaks[0].phase}, {peaks[0].place}"
    return UserError(
        f"memory does not grow evenly with the layers: {' and '.join(steps)} bytes from "
        f"{', '.join(map(str, layers))} of them ({where}); nothing follows for all",
        where="--exact",
        fix="plan without --exact",
    )
