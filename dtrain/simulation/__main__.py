"""The child of `dtrain plan --exact`: a question on stdin, lines of JSON on stdout.

A line is {"done": units}, {"peaks": …} for each number of layers, or {"error": …}; each begins
with MARK, since libraries print as well.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.core.files import write_json
from dtrain.core.processes import die_with_parent
from dtrain.models.load import read_config
from dtrain.planning.simulated_peak import MARK
from dtrain.simulation.ledger import Ledger, hear_resizes
from dtrain.simulation.model import build, fake_world, prepare
from dtrain.simulation.steps import Places, Simulated


def tell(line: dict[str, Any]) -> None:
    """A line for the parent."""
    print(MARK + json.dumps(line), flush=True)


def done() -> None:
    """A unit of progress."""
    tell({"done": 1})


def main() -> None:
    """Simulate each number of layers in turn."""
    die_with_parent()
    warnings.simplefilter("ignore")
    question = json.load(sys.stdin)
    recipe = Recipe.model_validate(question["recipe"])
    stage = next(stage for stage in recipe.stages if stage.name == question["stage"])
    prepare(stage.data.sequence_length)
    try:
        for config in question["configs"]:
            tell({"peaks": simulate(recipe, stage.name, config_of(config, recipe), question)})
    except UserError as error:
        tell({"error": [error.message, error.where, error.fix]})


def config_of(raw: dict[str, Any], recipe: Recipe) -> PretrainedConfig:
    """The config of transformers, checked as a run checks it."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", raw)
        return read_config(Path(folder), trust_remote_code=recipe.model.trust_remote_code)


def simulate(
    recipe: Recipe, name: str, config: PretrainedConfig, question: dict[str, Any]
) -> list[dict[str, Any]]:
    """Peaks of one step, by phase and kind of place."""
    stage = next(stage for stage in recipe.stages if stage.name == name)
    places = Places()
    ledger, mode = Ledger(places.here), FakeTensorMode(allow_non_fake_inputs=True)
    hear_resizes(ledger.resized)
    with fake_world(question["ranks"], question["on_node"]) as world:
        engine = build(
            recipe, stage, config, world, mode, ledger, places.follow, question["on_gpu"]
        )
        done()
        count = question["micro_batches"]
        Simulated(engine, stage, ledger, places, mode, count, done).run()
    return [
        {"phase": phase, "place": place, "module": peak.module, "total": peak.total,
         "terms": ledger.terms(peak)}
        for (phase, place), peak in ledger.peaks.items()
    ]  # fmt: skip


if __name__ == "__main__":
    main()
