"""A child process of `dtrain plan`: a request on stdin, lines of JSON on stdout.

A request to describe a config is answered by {"shape": …}, a request to simulate a step by {"done":
units} and {"peaks": […]} for each number of layers. Both may be answered by {"error": [message,
where, fix]}. Each line begins with `LINE_PREFIX`, because libraries print to stdout as well.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter
from torch._subclasses.fake_tensor import FakeTensorMode
from transformers import PretrainedConfig

from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.core.files import write_json
from dtrain.core.processes import die_with_parent
from dtrain.models.load import needs_own_code, read_config
from dtrain.planning.model_process import LINE_PREFIX
from dtrain.planning.shapes import ModelShape
from dtrain.simulation.ledger import MemoryLedger, watch_resizes
from dtrain.simulation.model import build_fake_engine, fake_world, patch_value_readers
from dtrain.simulation.model_shape import describe_model
from dtrain.simulation.steps import ModuleTracker, StepSimulator


def main() -> None:
    """Answer the request."""
    die_with_parent()
    warnings.simplefilter("ignore")
    request = json.load(sys.stdin)
    try:
        if "describe" in request:
            describe(request["describe"], request["where"])
        else:
            _simulate(request)
    except UserError as error:
        _send({"error": [error.message, error.where, error.fix]})


def describe(content: dict[str, Any], where: str) -> None:
    """Send the shape of the model of a config.

    Args:
        where: source of the config, for messages.

    Raises:
        UserError: dtrain cannot build the model, or only the model's own code can.
    """
    if needs_own_code(content):
        raise UserError(
            "the plan does not run a model's own Python code",
            where=where,
            fix="dtrain run needs no plan",
        )
    try:
        shape = describe_model(_build_config(content, trust_remote_code=False))
    except UserError as error:
        raise UserError(error.message, where=where, fix=error.fix) from error
    _send({"shape": TypeAdapter(ModelShape).dump_python(shape, mode="json")})


def _simulate(request: dict[str, Any]) -> None:
    """Simulate each number of layers in turn, and send the peaks."""
    recipe = Recipe.model_validate(request["recipe"])
    stage = next(stage for stage in recipe.stages if stage.name == request["stage"])
    patch_value_readers(stage.data.sequence_length + stage.method.added_tokens)
    for content in request["configs"]:
        config = _build_config(content, trust_remote_code=recipe.model.trust_remote_code)
        _send({"peaks": simulate_stage(recipe, stage, config, request)})


def _send(line: dict[str, Any]) -> None:
    print(LINE_PREFIX + json.dumps(line), flush=True)


def _send_progress() -> None:
    _send({"done": 1})


def _build_config(content: dict[str, Any], *, trust_remote_code: bool) -> PretrainedConfig:
    """The config of transformers, checked as a run checks it."""
    with tempfile.TemporaryDirectory() as folder:
        write_json(Path(folder) / "config.json", content)
        return read_config(Path(folder), trust_remote_code=trust_remote_code)


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
