"""The child process of `dtrain plan --exact`: a request on stdin, lines of JSON on stdout.

A line is {"done": units}, {"peaks": [...]} for each number of layers, or {"error": [message, where,
fix]}. Each begins with `LINE_PREFIX`, because libraries print to stdout as well.
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

from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.core.files import write_json
from dtrain.core.processes import die_with_parent
from dtrain.models.load import read_config
from dtrain.planning.simulated_peak import LINE_PREFIX
from dtrain.simulation.ledger import MemoryLedger, watch_resizes
from dtrain.simulation.model import build_fake_engine, fake_world, patch_value_readers
from dtrain.simulation.steps import ModuleTracker, StepSimulator


def main() -> None:
    """Simulate each number of layers in turn."""
    die_with_parent()
    warnings.simplefilter("ignore")
    request = json.load(sys.stdin)
    recipe = Recipe.model_validate(request["recipe"])
    stage = next(stage for stage in recipe.stages if stage.name == request["stage"])
    patch_value_readers(stage.data.sequence_length + stage.method.added_tokens)
    try:
        for content in request["configs"]:
            config = _build_config(content, recipe)
            _send({"peaks": simulate_stage(recipe, stage, config, request)})
    except UserError as error:
        _send({"error": [error.message, error.where, error.fix]})


def _send(line: dict[str, Any]) -> None:
    print(LINE_PREFIX + json.dumps(line), flush=True)


def _send_progress() -> None:
    _send({"done": 1})


def _build_config(content: dict[str, Any], recipe: Recipe) -> PretrainedConfig:
    """The config of transformers, checked as a run checks it."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", content)
        return read_config(Path(folder), trust_remote_code=recipe.model.trust_remote_code)


def simulate_stage(
    recipe: Recipe, stage: Stage, config: PretrainedConfig, request: dict[str, Any]
) -> list[dict[str, Any]]:
    """The peaks of one optimizer step, as fields of `SimulatedPeak`."""
    tracker, mode = ModuleTracker(), FakeTensorMode(allow_non_fake_inputs=True)
    ledger = MemoryLedger(tracker.location)
    watch_resizes(ledger.record_resize)
    with fake_world(request["ranks"], request["node_ranks"]) as world:
        engine = build_fake_engine(
            recipe, stage, config, world, mode, ledger, tracker.follow, request["on_gpu"]
        )
        _send_progress()
        micro_batches = request["micro_batches"]
        StepSimulator(engine, stage, ledger, tracker, mode, micro_batches, _send_progress).run()
    return [
        {
            "phase": phase,
            "region": region,
            "module": peak.module,
            "total": peak.total,
            "terms": ledger.terms(peak),
        }
        for (phase, region), peak in ledger.peaks.items()
    ]


if __name__ == "__main__":
    main()
