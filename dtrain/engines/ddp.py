"""ddp: every rank holds the whole model; gradients are averaged in one all-reduce."""

from __future__ import annotations

from torch import nn
from torch.nn.parallel import DistributedDataParallel

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
