"""Score the model in an engine on tasks of lm-evaluation-harness, on all ranks together.

Each rank builds all requests, computes its share, and gets the answers to all of them, so that the
harness sees one process and computes the same metrics as it does alone.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import deepcopy
from typing import Any

import numpy as np
import torch
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from dtrain.core.log import Meter, progress
from dtrain.engines.base import Engine
from dtrain.evaluation.harness import LoadedTasks, read_metrics
from dtrain.evaluation.scorer import Scorer, shared_forward
from dtrain.models.loss import transformers_model
from dtrain.monitoring.scores import Score

RESAMPLES = 1000


class TaskScorer(Scorer):
    """Scores models on the tasks that a recipe names.

    Args:
        tasks: from `load_tasks`.
        tokenizer: of the base.
    """

    def __init__(self, tasks: LoadedTasks, tokenizer: PreTrainedTokenizerBase) -> None:
        self._tasks, self._tokenizer = tasks, deepcopy(tokenizer)  # it gets a token for padding
        self.inputs: Mapping[str, str] = tasks.inputs
        self.every_steps = tasks.settings.every_steps

    def measure(self, engine: Engine, model: str) -> dict[str, dict[str, Score]]:
        """Score the engine's current model.

        Args:
            model: its name, for the progress.
        """
        world, settings = engine.world, self._tasks.settings
        shared = SharedModel(engine, self._tokenizer, settings.batch_size, f"tasks, {model}")
        with random_state(settings.seed, world.device):
            resamples = RESAMPLES if world.is_first else 0
            results = self._tasks.evaluate(shared, settings.limit, resamples)
        scores = {
            name: read_metrics(results, name, self._tasks.leaves[name]) for name in self.inputs
        }
        content = {n: {m: s.dump() for m, s in metrics.items()} for n, metrics in scores.items()}
        first = json.loads(world.broadcast_text(json.dumps(content)))  # NaN and infinity pass
        return {
            name: {metric: Score.read(entry) for metric, entry in metrics.items()}
            for name, metrics in first.items()
        }


class SharedModel(HFLM):
    """The harness's own model of transformers, whose forward passes are the engine's."""

    def __init__(
        self, engine: Engine, tokenizer: PreTrainedTokenizerBase, batch_size: int, title: str
    ) -> None:
        self._engine, self._title = engine, title
        callable_model = CallableModel(engine, tokenizer)
        super().__init__(callable_model, tokenizer=tokenizer, batch_size=batch_size)

    def loglikelihood(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[tuple[float, bool]]:
        answers = self._share(requests, super().loglikelihood)
        return [(value, is_greedy) for value, is_greedy in answers]

    def loglikelihood_rolling(
        self, requests: list[Instance], disable_tqdm: bool = True
    ) -> list[float]:
        return self._share(requests, super().loglikelihood_rolling)

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = True) -> list[str]:
        return self._share(requests, super().generate_until)

    def _share(
        self, requests: list[Instance], compute: Callable[[list[Instance]], list[Any]]
    ) -> list[Any]:
        """The answers to all requests, each computed by one rank."""
        world = self._engine.world
        shares = split_requests(requests, world.size)
        mine = [requests[index] for index in shares[world.rank]]
        with progress(self._title, len(mine)) as meter, shared_forward(self._engine):
            self.cache_hook = _MeterHook(meter)
            answers = compute(mine) if mine else []
        merged: list[Any] = [None] * len(requests)
        for share, data in zip(
            shares, world.gather_bytes(json.dumps(answers).encode()), strict=True
        ):
            for index, answer in zip(share, json.loads(data), strict=True):
                merged[index] = answer
        return merged


class CallableModel:
    """What the harness calls: not a module, so that it does not tie or move sharded weights."""

    def __init__(self, engine: Engine, tokenizer: PreTrainedTokenizerBase) -> None:
        self._model: Any = transformers_model(engine.module)
        self._tokenizer = tokenizer  # for the stop strings of the generation config
        self.config, self.device = self._model.config, engine.world.device

    def __call__(self, input_ids: Tensor) -> Any:
        """The output for tokens [B, T]."""
        return self._model(input_ids=input_ids, use_cache=False)

    def generate(self, **settings: Any) -> Tensor:
        """Tokens [B, T + new]."""
        tokens: Tensor = self._model.generate(
            synced_gpus=False, tokenizer=self._tokenizer, **settings
        )
        return tokens


class _MeterHook:
    """Called by the harness with each answer, for a cache."""

    def __init__(self, meter: Meter) -> None:
        self._meter = meter

    def add_partial(self, *answer: Any) -> None:
        """Count an answer."""
        self._meter.advance()


def split_requests(requests: Sequence[Instance], ranks: int) -> list[list[int]]:
    """Indices of the requests of each rank.

    Requests with the same context stay together, as one forward pass answers them; the longest
    contexts are dealt first, so that the ranks finish at about the same time.
    """
    by_context: dict[str, list[int]] = {}
    for index, request in enumerate(requests):
        by_context.setdefault(str(request.args[0]), []).append(index)
    order = sorted(by_context, key=lambda text: (-len(text), text))
    return [[i for text in order[rank::ranks] for i in by_context[text]] for rank in range(ranks)]


@contextmanager
def random_state(seed: int, device: torch.device) -> Iterator[None]:
    """Draw from seeded generators inside; those outside stay as they were."""
    python, legacy = random.getstate(), np.random.get_state()
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        random.seed(seed)
        np.random.seed(seed % 2**32)
        torch.manual_seed(seed)
        try:
            yield
        finally:
            random.setstate(python)
            np.random.set_state(legacy)
