"""dtrain's own model in dtrain's own engine, of fake tensors and one of many fake ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import bitsandbytes.nn.modules as bnb_modules
import torch
import torch.distributed as dist
from bitsandbytes.functional import QuantState
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from transformers import AttentionMaskInterface, PretrainedConfig

from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.distributed.world import World
from dtrain.engines.base import Engine, TorchEngine
from dtrain.engines.build import build_engine
from dtrain.methods.base import build_method
from dtrain.models import attention, positions
from dtrain.models.kernels import lora_linear, native
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.load import for_training, resolve_dtype
from dtrain.models.sharded_loading import empty_model
from dtrain.simulation.ledger import GRADIENTS, WEIGHTS, Ledger

CPU = torch.device("cpu")  # autograd aborts on fake tensors of a GPU that is not there
BLOCK, BLOCKS = 64, 256  # of NF4's scales, and of the scales of those


@contextmanager
def fake_world(ranks: int, on_node: int) -> Iterator[World]:
    """The first of `ranks` ranks; what it sends goes nowhere."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        everyone = dist.distributed_c10d._get_default_group()
        yield World(0, ranks, 0, min(on_node, ranks), CPU, everyone)
    finally:
        dist.destroy_process_group()


def prepare(sequence_length: int) -> None:
    """Replace what looks at numbers, in this process, which simulates and does nothing else."""

    def whole_sequences(batch_size: int, q_length: int, *rest: Any, **more: Any) -> Any:
        return attention.Documents((sequence_length,) * (q_length // sequence_length), None)

    def whole_lengths(position_ids: Tensor) -> list[int]:
        return [sequence_length] * (position_ids.shape[-1] // sequence_length)

    AttentionMaskInterface.register(attention.NAME, whole_sequences)
    positions.document_lengths = whole_lengths
    lora_linear.fix_4bit_weight_quant_state_from_module = _recall
    bnb_modules.fix_4bit_weight_quant_state_from_module = _recall


def _recall(module: Any) -> None:
    """As bitsandbytes', for a weight that is a plain fake tensor."""
    module.weight.quant_state = module.quant_state


def build(
    recipe: Recipe,
    stage: Stage,
    config: PretrainedConfig,
    world: World,
    mode: FakeTensorMode,
    ledger: Ledger,
    follow: Callable[[nn.Module], None],
    on_gpu: bool,
) -> Engine:
    """A stage's engine as a run builds it; its tensors are known to the ledger.

    Args:
        follow: told the model before an engine takes it.
        on_gpu: what is simulated: there torch's optimizer works on all parameters at once.

    Raises:
        UserError: a target that no layer answers to, ranks that do not fit the engine.
    """
    dtype = resolve_dtype(recipe.model.dtype, CPU)
    method = build_method(stage.method)
    width = method.base_dtype(dtype)
    settled = for_training(config, recipe.model, width, CPU)
    if settled._attn_implementation != attention.NAME:
        raise UserError(
            f"attention {settled._attn_implementation!r} cannot be simulated",
            where="model.attention",
            fix="plan without --exact",
        )
    quantised = method.traits.quantizes_base
    base = empty_model(settled, recipe.model, quantised=quantised, dtype=width, device=CPU)
    model = method.attach(base, seed=0, device=torch.device("meta"))
    apply_kernels(model, recipe.model)
    native.switch(on=False)  # a CPU's own loops, which keep less and look at numbers
    _fake_buffers(model, mode)
    follow(model)
    # A mesh of ranks is made of numbers, and fully_shard makes one; DDP's reducer wants the mode.
    inside = recipe.engine.kind != "fsdp2"
    with mode if inside else nullcontext(), ledger if inside else nullcontext():
        engine = build_engine(model, recipe, stage, world, Filler(mode).fill)
    _settle(engine, on_gpu)
    ledger.name(_held(engine.bare), WEIGHTS)
    ledger.name_rest(GRADIENTS)  # DDP's buckets, which gradients lie in
    return engine


class Filler:
    """Gives what has no storage a fake one."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._made: dict[nn.Parameter, Tensor] = {}  # tied ones are one

    def fill(self, block: nn.Module) -> None:
        """Fill every parameter in `block`."""
        for module in block.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None or not parameter.is_meta or isinstance(parameter, FakeTensor):
                    continue
                if parameter not in self._made:
                    with self._mode:
                        self._made[parameter] = _made(module, parameter)
                module._parameters[leaf] = self._made[parameter]  # type: ignore[assignment]


def _made(module: nn.Module, empty: nn.Parameter) -> Tensor:
    if isinstance(module, Linear4bit) and isinstance(empty, Params4bit):
        return _packed(module, empty)
    fake = torch.empty(empty.shape, dtype=empty.dtype, device=CPU)
    return nn.Parameter(fake, requires_grad=empty.requires_grad)


def _packed(module: Any, empty: Any) -> Tensor:
    """An NF4 weight: a fake tensor of a packed one's size, with the state that unpacks it.

    A fake Params4bit is no fake tensor any more.
    """
    elements, storage = empty.numel(), empty.quant_storage
    scales = -(-elements // BLOCK)
    second = QuantState(
        absmax=torch.empty(-(-scales // BLOCKS)),
        code=torch.empty(256),
        blocksize=BLOCKS,
        dtype=torch.float32,
    )
    module.quant_state = QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8),
        shape=empty.shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=module.compute_dtype,
        offset=torch.empty(()),
        state2=second,
    )
    packed = torch.empty(-(-elements // 2) // storage.itemsize, 1, dtype=storage)
    weight = nn.Parameter(packed, requires_grad=False)
    weight.quant_state = module.quant_state  # type: ignore[attr-defined]
    return weight


def _fake_buffers(model: nn.Module, mode: FakeTensorMode) -> None:
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = mode.from_tensor(buffer)


def _settle(engine: Engine, on_gpu: bool) -> None:
    """What a run on GPUs has, and what fake ranks lack."""
    if isinstance(engine, TorchEngine):
        for group in engine.optimizer.param_groups:  # the fused one is a CPU's
            group |= {"fused": False, "foreach": on_gpu}
    if hasattr(engine.model, "register_comm_hook"):
        engine.model.register_comm_hook(None, _sent_at_once)


def _sent_at_once(group, bucket):  # type: ignore[no-untyped-def] # DDP refuses annotations as text
    """Fake ranks give no result, which DDP's reducer waits for."""
    done: Any = torch.futures.Future()
    done.set_result(bucket.buffer())
    return done


def _held(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        state = getattr(module, "quant_state", None)
        if state is not None:
            yield from (state.absmax, state.code, state.offset)
            yield from (state.state2.absmax, state.state2.code)
