"""Parameters of a small model, split among ranks at any boundaries."""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dtrain.checkpoints import Checkpoint, ParameterShard, Saver
from dtrain.checkpoints.parameter_shards import elements

KINDS = ("weight", "exp_avg", "exp_avg_sq")
SHAPES = {"layers.0.a": (5, 8), "layers.0.b": (64, 3), "layers.1.gate": (), "head|odd": (1, 41)}

Whole = dict[str, dict[str, Tensor]]


class Kit:
    """Shared helpers of the checkpoint tests."""

    shapes = SHAPES

    def whole(self, step: int, shapes: dict[str, tuple[int, ...]] = SHAPES) -> Whole:
        """Return name → kind → flat tensor, with values that depend on the step."""
        draw = torch.Generator().manual_seed(step)
        return {
            name: {kind: torch.randn(elements(shape), generator=draw) for kind in KINDS}
            for name, shape in shapes.items()
        }

    def rank_shards(
        self,
        whole: Whole,
        rank: int,
        ranks: int,
        shapes: dict[str, tuple[int, ...]] = SHAPES,
        edges: dict[str, list[int]] | None = None,
    ) -> list[ParameterShard]:
        """Return the shards of `rank`: even ranges, or between `edges` (ranks + 1 per name)."""
        shards = []
        for name, kinds in whole.items():
            total = elements(shapes[name])
            cuts = edges[name] if edges else [total * i // ranks for i in range(ranks + 1)]
            start, stop = cuts[rank], cuts[rank + 1]
            tensors = {kind: tensor[start:stop] for kind, tensor in kinds.items()}
            shards.append(ParameterShard(name, shapes[name], start, stop, tensors))
        return shards

    def save(self, folder: Path, step: int, *, ranks: int = 2, **state: Any) -> Path:
        """Save `whole(step)` from `ranks` ranks and wait until the checkpoint is complete."""
        savers = [Saver(folder, rank=r, ranks=ranks, attempt="test") for r in range(ranks)]
        for rank, saver in enumerate(savers):
            saver.save(
                step, self.rank_shards(self.whole(step), rank, ranks), {"step": step, **state}
            )
        for saver in savers:
            saver.wait()
        return folder / f"step-{step:06d}"

    def assert_holds(self, checkpoint: Checkpoint, expected: Whole) -> None:
        """Restore on one rank and compare bit for bit."""
        blank = {n: {k: torch.zeros_like(t) for k, t in ks.items()} for n, ks in expected.items()}
        shapes = checkpoint.names
        checkpoint.restore(self.rank_shards(blank, 0, 1, shapes))
        for name, kinds in expected.items():
            for kind, tensor in kinds.items():
                assert torch.equal(blank[name][kind], tensor), (name, kind)


@pytest.fixture(scope="session")
def kit() -> Kit:
    return Kit()


@pytest.fixture
def start() -> Iterator[Callable[..., BaseProcess]]:
    """Start a function in a subprocess; it is killed at the end of the test."""
    started: list[BaseProcess] = []

    def run(function: Callable[..., None], *args: Any) -> BaseProcess:
        context = multiprocessing.get_context("fork")  # the function needs no importable module
        process = context.Process(target=_alone, args=(function, *args))
        process.start()
        started.append(process)
        return process

    yield run
    for process in started:
        process.kill()
        process.join()


def _alone(function: Callable[..., None], *args: Any) -> None:
    torch.set_num_threads(1)  # a forked process hangs in the thread pool that it has inherited
    function(*args)
