"""What scores a model in its engine, and how ranks that share one call it.

On an engine that shards the model, every forward pass is a collective: a rank that has fewer
prompts than the others, or shorter answers, must still take part in each.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

import torch
from transformers import PreTrainedModel

from dtrain.config.engines import ENGINES
from dtrain.engines.base import Engine
from dtrain.models.loss import transformers_model
from dtrain.monitoring.scores import Score


class Scorer(Protocol):
    """Scores models on tasks or on sets of prompts.

    Attributes:
        inputs: name of each task or set → fingerprint of what decides its scores: rows, settings.
        every_steps: steps between measurements during a stage; None for none.
    """

    inputs: Mapping[str, str]
    every_steps: int | None

    def measure(self, engine: Engine, model: str) -> dict[str, dict[str, Score]]:
        """Score the engine's current model; called on all ranks together.

        Args:
            model: its name in the run: "base", a stage, or a stage with its step.

        Returns:
            Scores by name and metric, the same on every rank; the first metric of a name is the
            one that counts, where a gate names none.
        """


@contextmanager
def shared_forward(engine: Engine) -> Iterator[PreTrainedModel]:
    """The transformers model in an engine, for this rank's prompts; entered by all ranks together.

    Inside, a call of it (or of its `generate`, with `synced_gpus=False`) passes the wrappers
    of the adapter and of the engine. Ranks may call it different numbers of times: at the end, a
    rank computes a token as often as others still call a model that they share.
    """
    world, model = engine.world, transformers_model(engine.module)
    is_shared = ENGINES[engine.recipe.engine.kind].shards_base and world.size > 1
    inside = False

    def call_engine(*args: Any, **kwargs: Any) -> Any:
        nonlocal inside
        inside = True
        try:
            with engine.autocast():
                return engine.model(*args, **kwargs)
        finally:
            inside = False

    def call(*args: Any, **kwargs: Any) -> Any:
        if inside:  # the wrappers have arrived at the model itself
            return model._call_impl(*args, **kwargs)
        if is_shared:  # before any hook of the engine, whose collectives come next
            world.sum([1.0])
        return call_engine(*args, **kwargs)

    engine.model.eval()
    model._compiled_call_impl = call  # what `nn.Module.compile` replaces: calls, with their hooks
    try:
        with torch.no_grad(), engine.result_weights():
            yield model
            token = torch.zeros((1, 1), dtype=torch.int64, device=world.device)
            while is_shared and world.sum([0.0])[0]:
                call_engine(input_ids=token, use_cache=False)
    finally:
        model._compiled_call_impl = None
