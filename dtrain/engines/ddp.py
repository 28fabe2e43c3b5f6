"""ddp: every rank has the whole model; gradients are averaged in one all-reduce."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import allreduce_hook
from torch.futures import Future
from torch.nn.parallel import DistributedDataParallel

from dtrain.config.checks import accumulation
from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.distributed.world import World
from dtrain.engines.base import MaterializeFn, TorchEngine
from dtrain.engines.optimizers import build_optimizer


class Ddp(TorchEngine):
    """torch's DistributedDataParallel.

    Attributes:
        send_bucket: DDP's communication hook, which averages a bucket of gradients.
    """

    send_bucket: Callable[..., Future[torch.Tensor]] = staticmethod(allreduce_hook)

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        stage: Stage,
        world: World,
        materialize: MaterializeFn,
    ) -> None:
        super().__init__(module, recipe, stage, world)
        materialize(module)
        self.replica = (world.rank, world.size)
        self.optimizer = build_optimizer(self.trainable_names, self.local_params, stage, module)
        # All ranks load the same base and initialize the same adapter: nothing to broadcast.
        self.model = DistributedDataParallel(
            module, init_sync=False, broadcast_buffers=False, gradient_as_bucket_view=True
        )
        assert self.model.process_group.size() == world.size
        self._last_sent: Any = None
        self.model.register_comm_hook(self.model.process_group, self._on_bucket_full)

    def _on_bucket_full(self, group, bucket):  # type: ignore[no-untyped-def] # DDP refuses text
        """Send a bucket; after the last one the backward pass only waits for the ranks."""
        if bucket.is_last():
            self._last_sent = self.collectives.now(on_gpu=self.world.device.type == "cuda")
        return self.send_bucket(group, bucket)

    def backward(self, loss: Tensor, *, last: bool) -> None:
        super().backward(loss, last=last)
        if self._last_sent is not None:
            self.collectives.add(self._last_sent)
            self._last_sent = None

    def before_forward(self, *, last: bool) -> None:
        # DDP decides in the forward pass whether the backward pass sends gradients: `no_sync`
        # around the backward pass alone would send those of every micro-batch.
        self.model.require_backward_grad_sync = last

    def step(self, learning_rate: float) -> float:
        # DDP would wait for a missing gradient in the next pass.
        if unused := [name for name, p in self.trainable if p.grad is None]:
            raise UserError(
                f"the loss does not depend on {len(unused)} of the trainable parameters: "
                f"{', '.join(unused[:3])}",
                where="method.target_modules",
                fix="name layers that the forward pass of a text uses",
            )
        return super().step(learning_rate)


class StrictDdp(TorchEngine):
    """Replicas whose weights do not depend on the number of ranks, for `determinism: strict`.

    Every micro-batch of the global batch is a leaf of one binary tree that halves its range at
    each node. A rank sums the subtree of its own contiguous leaves as they arrive; the ranks' sums
    are then gathered and summed in the same way. With 2^k ranks the tree is the same for every k,
    and so are the weights, to the bit. The price: communication does not overlap computation, and
    `ranks` gradients travel instead of one (an adapter's are small).
    """

    def __init__(
        self,
        module: nn.Module,
        recipe: Recipe,
        stage: Stage,
        world: World,
        materialize: MaterializeFn,
    ) -> None:
        super().__init__(module, recipe, stage, world)
        if world.size & (world.size - 1):
            raise UserError(
                f"determinism: strict needs a power of two of ranks, not {world.size}",
                where="determinism",
                fix="use 1, 2, 4, 8, … ranks, or determinism=off",
            )
        # The rounding of a matrix product depends on the number of threads.
        torch.set_num_threads(1)
        torch.use_deterministic_algorithms(True)
        materialize(module)
        self.model = module
        self.replica = (world.rank, world.size)
        self.optimizer = build_optimizer(self.trainable_names, self.local_params, stage, module)
        train = stage.train
        self._leaves = accumulation(train.global_batch_size, world.size, train.micro_batch)
        self._leaf, self._sums = 0, list[Tensor]()

    def backward(self, loss: Tensor, *, last: bool) -> None:
        (loss / self.world.size).backward()  # exact: the number of ranks is a power of two
        self._sums.append(self._take_gradient())
        for _ in range(closed_nodes(self._leaf, self._leaves)):
            right = self._sums.pop()
            self._sums[-1] = self._sums[-1] + right
        self._leaf += 1
        if last:
            self._set_gradient(self._sum_over_ranks(self._sums.pop()))
            self._leaf = 0

    def _take_gradient(self) -> Tensor:
        gradients = [p.grad.reshape(-1) for p in self.local_params if p.grad is not None]
        self.optimizer.zero_grad()
        return torch.cat(gradients)

    def _sum_over_ranks(self, local_sum: Tensor) -> Tensor:
        sums = [torch.empty_like(local_sum) for _ in range(self.world.size)]
        dist.all_gather(sums, local_sum)
        while len(sums) > 1:
            sums = [a + b for a, b in zip(sums[::2], sums[1::2], strict=True)]
        return sums[0]

    def _set_gradient(self, flat: Tensor) -> None:
        gradients = flat.split([p.numel() for p in self.local_params])
        for parameter, gradient in zip(self.local_params, gradients, strict=True):
            parameter.grad = gradient.view_as(parameter)


def closed_nodes(leaf: int, leaves: int) -> int:
    """Number of inner nodes, in the halving tree over `leaves`, whose last leaf is `leaf`."""
    low, high, closed = 0, leaves, 0
    while high - low > 1:
        closed += high == leaf + 1
        middle = low + (high - low) // 2
        low, high = (low, middle) if leaf < middle else (middle, high)
    return closed
