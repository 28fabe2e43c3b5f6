"""Builds a stage's model and engine as a run does, of fake tensors on one of many fake ranks."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from functools import cached_property
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

from dtrain.config.engines import ENGINES
from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.distributed.world import World
from dtrain.engines.base import Engine, TorchEngine, build_engine
from dtrain.engines.ddp import Ddp
from dtrain.methods.base import build_method
from dtrain.models import attention, dora, positions, quantize
from dtrain.models.expert_nf4 import STATES, ExpertStates, holds_nf4
from dtrain.models.kernels import experts, native
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.load import prepare_config, resolve_dtype
from dtrain.models.sharded_loading import build_frozen_meta_model
from dtrain.simulation.ledger import GRADIENTS, WEIGHTS, MemoryLedger

CPU = torch.device("cpu")  # autograd aborts on fake tensors of a missing GPU
BLOCK, SCALES_BLOCK = 64, 256  # elements that share an NF4 scale; scales that share a scale


@contextmanager
def fake_world(ranks: int, node_ranks: int) -> Iterator[World]:
    """The first of `ranks` ranks; what it sends is dropped."""
    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    try:
        group = dist.distributed_c10d._get_default_group()
        yield World(0, ranks, 0, min(node_ranks, ranks), CPU, group)
    finally:
        dist.destroy_process_group()


def patch_value_readers(sequence_length: int) -> None:
    """Replace functions that read tensor values, in this process, which only simulates."""

    def whole_sequences(batch_size: int, q_length: int, *rest: Any, **more: Any) -> Any:
        return attention.Documents((sequence_length,) * (q_length // sequence_length), None)

    def whole_lengths(position_ids: Tensor) -> list[int]:
        return [sequence_length] * (position_ids.shape[-1] // sequence_length)

    AttentionMaskInterface.register(attention.NAME, whole_sequences)
    positions.document_lengths = whole_lengths
    experts.group_by_expert = _one_group  # type: ignore[assignment]
    quantize.fix_4bit_weight_quant_state_from_module = _set_quant_state
    bnb_modules.fix_4bit_weight_quant_state_from_module = _set_quant_state
    dora.zero_rows = lambda squares: 0


class _OneGroup(experts.Groups):
    """The rows of all experts in one product, as the kernel of a GPU computes them."""

    @cached_property
    def spans(self) -> list[tuple[int, slice]]:
        return [(0, slice(0, len(self.order)))]


def _one_group(index: Tensor, count: int) -> experts.Groups:
    order = torch.sort(index.reshape(-1)).indices
    ends = torch.zeros(count, dtype=torch.int32, device=index.device)
    return _OneGroup(order, ends, index.shape[-1])


def _set_quant_state(module: Any) -> None:
    """Does what bitsandbytes does, for a weight that is a plain fake tensor."""
    module.weight.quant_state = module.quant_state


def build_fake_engine(
    recipe: Recipe,
    stage: Stage,
    config: PretrainedConfig,
    world: World,
    mode: FakeTensorMode,
    ledger: MemoryLedger,
    follow: Callable[[nn.Module], None],
    on_gpu: bool,
) -> Engine:
    """Build a stage's engine as a run does, and name its tensors in the ledger.

    Args:
        follow: called with the model before the engine wraps it.
        on_gpu: simulate a GPU, where torch's optimizer updates all parameters at once.

    Raises:
        UserError: a target module matches no layer, or the engine cannot use the ranks.
    """
    dtype = resolve_dtype(recipe.model.dtype, CPU)
    method = build_method(stage.method)
    width = method.base_dtype(dtype)
    train_config = prepare_config(config, recipe.model, width, CPU)
    if train_config._attn_implementation != attention.NAME:
        raise UserError(
            f"attention {train_config._attn_implementation!r} cannot be simulated",
            where="model.attention",
            fix="plan without --exact",
        )
    quantized = method.traits.quantizes_base
    base = build_frozen_meta_model(
        train_config, recipe.model, quantized=quantized, dtype=width, device=CPU
    )
    model = method.attach(base, seed=0, device=torch.device("meta"))
    apply_kernels(model, recipe.model)
    native.set_enabled(on=False)  # the CPU kernels save less, and read values
    _fake_buffers(model, mode)
    follow(model)
    filler = FakeFiller(mode)

    def materialize(block: nn.Module) -> None:
        filler.materialize(block)
        with mode:
            method.on_weights_loaded(block)

    # An engine with shard groups builds a device mesh, which reads values; DDP's reducer must be
    # built from fake tensors.
    inside = not ENGINES[recipe.engine.kind].shard_group
    with mode if inside else nullcontext(), ledger if inside else nullcontext():
        engine = build_engine(model, recipe, stage, world, materialize)
    _match_gpu_run(engine, on_gpu)
    ledger.name(_weights(engine.module), WEIGHTS)
    ledger.name_rest(GRADIENTS)  # DDP's buckets, which store the gradients
    return engine


class FakeFiller:
    """Replaces meta parameters by fake tensors."""

    def __init__(self, mode: FakeTensorMode) -> None:
        self._mode = mode
        self._built: dict[nn.Parameter, Tensor] = {}  # tied parameters share one tensor

    def materialize(self, block: nn.Module) -> None:
        """Fill every parameter in `block`."""
        for module in block.modules():
            for leaf, parameter in module._parameters.items():
                if parameter is None or not parameter.is_meta or isinstance(parameter, FakeTensor):
                    continue
                if parameter not in self._built:
                    with self._mode:
                        self._built[parameter] = _fake_parameter(module, leaf, parameter)
                module._parameters[leaf] = self._built[parameter]  # type: ignore[assignment]


def _fake_parameter(module: nn.Module, leaf: str, empty: nn.Parameter) -> Tensor:
    if isinstance(module, Linear4bit) and isinstance(empty, Params4bit):
        return _packed_parameter(module, empty)
    if holds_nf4(module) and empty.dim() == 3:
        return _packed_experts(module, leaf, empty)
    fake = torch.empty(empty.shape, dtype=empty.dtype, device=CPU)
    return nn.Parameter(fake, requires_grad=empty.requires_grad)


def _packed_parameter(module: Any, empty: Any) -> Tensor:
    """A fake tensor of the size of a packed NF4 weight, with its quantization state.

    It is a plain parameter, because a fake Params4bit would not be a fake tensor.
    """
    module.quant_state = _quant_state(empty.shape, module.compute_dtype)
    weight = nn.Parameter(_packed(empty.shape, empty.quant_storage)[:, None], requires_grad=False)
    weight.quant_state = module.quant_state  # type: ignore[attr-defined]
    return weight


def _packed_experts(module: nn.Module, leaf: str, empty: Tensor) -> Tensor:
    """The same of experts [E, rows, columns]: [E, n], with the states of each."""
    states = [[_quant_state(expert.shape, empty.dtype)] for expert in empty]
    getattr(module, STATES)[leaf] = ExpertStates(tuple(empty.shape), states)
    packed = torch.stack([_packed(expert.shape, empty.dtype) for expert in empty])
    return nn.Parameter(packed, requires_grad=False)


def _packed(shape: torch.Size, storage: torch.dtype) -> Tensor:
    return torch.empty(-(-shape.numel() // 2) // storage.itemsize, dtype=storage)


def _quant_state(shape: torch.Size, dtype: torch.dtype) -> QuantState:
    scales = -(-shape.numel() // BLOCK)
    second = QuantState(
        absmax=torch.empty(-(-scales // SCALES_BLOCK)),
        code=torch.empty(256),
        blocksize=SCALES_BLOCK,
        dtype=torch.float32,
    )
    return QuantState(
        absmax=torch.empty(scales, dtype=torch.uint8),
        shape=shape,
        code=torch.empty(16),
        blocksize=BLOCK,
        quant_type="nf4",
        dtype=dtype,
        offset=torch.empty(()),
        state2=second,
    )


def _fake_buffers(model: nn.Module, mode: FakeTensorMode) -> None:
    for module in model.modules():
        for leaf, buffer in module._buffers.items():
            if buffer is not None:
                module._buffers[leaf] = mode.from_tensor(buffer)


def _match_gpu_run(engine: Engine, on_gpu: bool) -> None:
    """Set the optimizer as on a GPU, and complete DDP's all-reduces, which fake ranks do not."""
    if isinstance(engine, TorchEngine):
        for group in engine.optimizer.param_groups:  # the fused kernel is for the CPU
            group |= {"fused": False, "foreach": on_gpu}
    if isinstance(engine, Ddp):
        engine.send_bucket = _complete_at_once


def _complete_at_once(group: object, bucket: dist.GradBucket) -> Any:
    """Return a completed future: fake ranks send no result, and DDP's reducer waits for one."""
    future: Any = torch.futures.Future()
    future.set_result(bucket.buffer())
    return future


def _weights(model: nn.Module) -> Iterator[Tensor]:
    yield from model.parameters()
    yield from model.buffers()
    for module in model.modules():
        own = getattr(module, "quant_state", None)
        packed = getattr(module, STATES, {}).values()
        states = [state for x in packed for expert in x.by_expert for state in expert]
        for state in (*states, *([own] if own is not None else [])):
            yield from (state.absmax, state.code, state.offset)
            yield from (state.state2.absmax, state.state2.code)
