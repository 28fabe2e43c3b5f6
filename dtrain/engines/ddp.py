"""ddp: every rank holds the whole model; gradients are averaged in one all-reduce."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from dtrain.config.checks import accumulation
from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.distributed.world import World
from dtrain.engines.base import Fill, TorchEngine, build_optimizer


class Ddp(TorchEngine):
    """torch's DistributedDataParallel."""

    def __init__(
        self, bare: nn.Module, recipe: Recipe, stage: Stage, world: World, fill: Fill
    ) -> None:
        super().__init__(bare, recipe, stage, world)
        fill(bare)
        self.copy = (world.rank, world.size)
        self.optimizer = build_optimizer(self.owned, stage)
        # Every rank loaded the same base and drew the same adapter: nothing to broadcast.
        self.model = DistributedDataParallel(
            bare, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        assert self.model.process_group.size() == world.size

    def before_forward(self, *, last: bool) -> None:
        # DDP decides in the forward pass whether the backward pass sends: `no_sync` around the
        # latter alone sends the gradient of every micro-batch.
        self.model.require_backward_grad_sync = last

    def step(self, learning_rate: float) -> float:
        self.check_reached()
        return super().step(learning_rate)

    def check_reached(self) -> None:
        """Refuse what trains and gets no gradient: DDP would wait for it in the next pass.

        Raises:
            UserError: naming the parameters.
        """
        if unreached := [name for name, p in self.trainable if p.grad is None]:
            what = f"the loss does not depend on {len(unreached)} of the parameters that train"
            raise UserError(
                f"{what}: {', '.join(unreached[:3])}",
                where="method.target_modules",
                fix="name layers that the forward pass of a text uses",
            )


class StrictDdp(TorchEngine):
    """Replicas whose weights do not depend on the number of ranks, for `determinism: strict`.

    Every micro-batch of the global batch is a leaf of one binary tree that halves its range at
    each node. A rank sums the subtree of its own contiguous leaves as they arrive; the ranks' sums
    are then gathered and summed in the same way. With 2^k ranks the tree is the same for every k,
    and so are the weights, to the bit. The price: communication does not overlap computation, and
    `ranks` gradients travel instead of one (an adapter's are small).
    """

    def __init__(
        self, bare: nn.Module, recipe: Recipe, stage: Stage, world: World, fill: Fill
    ) -> None:
        super().__init__(bare, recipe, stage, world)
        if world.size & (world.size - 1):
            raise UserError(
                f"{world.size} ranks: the order of sums is the same for 1, 2, 4, 8, … ranks only",
                where="determinism",
                fix="use a power of two, or determinism: off",
            )
        # A matrix product's rounding depends on how many threads share it.
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        fill(bare)
        self.model = bare
        self.copy = (world.rank, world.size)
        self.optimizer = build_optimizer(self.owned, stage)
        train = stage.train
        self.leaves = accumulation(train.global_batch_size, world.size, train.micro_batch)
        self._leaf, self._sums = 0, list[Tensor]()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss / self.world.size).backward()  # exact: a power of two
        self._sums.append(self._take_gradient())
        for _ in range(closed_nodes(self._leaf, self.leaves)):
            right = self._sums.pop()
            self._sums[-1] = self._sums[-1] + right
        self._leaf += 1
        if last:
            self._put_gradient(self._sum_over_ranks(self._sums.pop()))
            self._leaf = 0

    def _take_gradient(self) -> Tensor:
        parts = [p.grad.reshape(-1) for p in self.owned if p.grad is not None]
        self.optimizer.zero_grad()
        return torch.cat(parts)

    def _sum_over_ranks(self, mine: Tensor) -> Tensor:
        parts = [torch.empty_like(mine) for _ in range(self.world.size)]
        dist.all_gather(parts, mine)
        while len(parts) > 1:
            parts = [a + b for a, b in zip(parts[::2], parts[1::2], strict=True)]
        return parts[0]

    def _put_gradient(self, flat: Tensor) -> None:
        parts = flat.split([p.numel() for p in self.owned])
        for parameter, part in zip(self.owned, parts, strict=True):
            parameter.grad = part.view_as(parameter)


def closed_nodes(leaf: int, leaves: int) -> int:
    """How many inner nodes of the halving tree over `leaves` end with `leaf`."""
    low, high, closed = 0, leaves, 0
    while high - low > 1:
        closed += high == leaf + 1
        middle = low + (high - low) // 2
        low, high = (low, middle) if leaf < middle else (middle, high)
    return closed
