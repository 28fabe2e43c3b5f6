"""The diagonal Fisher information of adapted layers, factored into rows and columns.

For y = W x the gradient of W at a token is the product of dy and x. Its expected square at (i, j)
is taken as u_i v_j, with u the mean of dy² and v the mean of x²: the diagonals of K-FAC's factors
(arXiv:1503.05671). dy is the gradient of the log-likelihood of a sequence's targets, so this is
the empirical Fisher information; u is per target, v per token. Adapters are off: the information is
that of the stage's base, also where a resumed stage estimates it again.

Letters: T tokens, h inputs and o outputs of a layer.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from blake3 import blake3
from numpy.typing import NDArray
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import ParamWrapper
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from dtrain.config.regularize import Ewc
from dtrain.core.errors import UserError
from dtrain.core.files import write_atomic
from dtrain.core.hashes import fingerprint
from dtrain.core.log import progress, say, warn
from dtrain.data.loader import Loader, MicroBatch
from dtrain.data.permutation import permute, stream_key
from dtrain.distributed.world import World
from dtrain.models.loss import target_losses
from dtrain.objectives.base import StageContext, adapters_disabled

Factors = dict[str, Tensor]
"""Factors by "LAYER.u" and "LAYER.v": float32 [o] and [h] of a layer."""


def penalized_layers(module: nn.Module) -> dict[str, Any]:
    """The layers with a LoRA adapter, by name.

    Args:
        module: not wrapped by an engine.

    Raises:
        UserError: experts have adapters, whose matrices are those of many layers in one.
    """
    layers = {name: m for name, m in module.named_modules() if isinstance(m, LoraLayer)}
    if experts := [name for name, m in layers.items() if isinstance(m, ParamWrapper)]:
        raise UserError(
            f"there is no penalty on the adapters of experts ({experts[0]})",
            where="regularize.kind",
            fix="kind=kl_to_base, or method.experts=false",
        )
    return layers


def fisher_factors(module: nn.Module, context: StageContext, settings: Ewc) -> Factors:
    """The factors of each adapted layer, on the CPU, the same on all ranks.

    They are estimated once: the first rank stores them under the fingerprint of base and rows.
    """
    loader, ids = chosen_sequences(context, settings)
    layers = penalized_layers(module)
    made_from = {
        "start": fingerprint(dict(context.start)),
        "data": loader.dataset.fingerprint,
        "sequences": fingerprint(ids.tolist()),
        "layers": fingerprint(sorted(layers)),
    }
    file = context.cache / f"fisher-{fingerprint(made_from)[:32]}.safetensors"
    world = context.world
    stored = read_factors(file) if world.is_first else None
    if world.sum([float(stored is not None)])[0]:
        factors = stored or zero_factors(layers)
    else:
        factors = estimate(module, context.world, loader, ids)
        if world.is_first:
            write_factors(file, factors, made_from)
        else:
            factors = zero_factors(layers)
    # Zeros except on the first rank, whose file may have another order than the model.
    world.sum_tensors([factors[name] for name in sorted(factors)])
    say(f"Fisher information of {len(ids)} sequences: {file}")
    return factors


def chosen_sequences(context: StageContext, settings: Ewc) -> tuple[Loader, NDArray[np.int64]]:
    """The rows that the information is estimated on, and ids of the sequences."""
    own = context.loader
    dataset = own.dataset if settings.reads_replay else context.previous
    assert dataset is not None
    borders = dataset.first_sequences
    first = int(borders[-2]) if settings.reads_replay else 0
    total = int(borders[-1]) - first
    chosen = np.arange(min(settings.sequences, total))
    loader = Loader(dataset, seed=own.seed, global_batch=1, total_sequences=1, alone=own.alone)
    return loader, first + permute(chosen, total, stream_key(own.seed, "fisher"))


def estimate(module: nn.Module, world: World, loader: Loader, ids: NDArray[np.int64]) -> Factors:
    """Estimate the factors on these sequences, which the ranks share."""
    sums = zero_factors(penalized_layers(module), world.device, torch.float64)
    tokens = targets = 0
    rounds = -(-len(ids) // world.size)
    with collecting(module, sums) as embeddings, progress("Fisher information", rounds) as bar:
        for number in range(rounds):
            # Without a sequence left, a rank still takes part in the gathers of a sharded model.
            batch = loader.read(ids[number * world.size + world.rank :][:1])
            add_squares(module, batch.to(world.device), embeddings)
            tokens += batch.input_ids.numel() if len(batch.targets) else 0
            targets += len(batch.targets)
            bar.advance()
    sums = {name: value.cpu() for name, value in sums.items()}
    world.sum_tensors(list(sums.values()))
    tokens, targets = map(int, world.sum([tokens, targets]))
    counts = {"u": targets, "v": tokens}
    return {n: (value / counts[n.rsplit(".", 1)[-1]]).float() for n, value in sums.items()}


def add_squares(module: nn.Module, batch: MicroBatch, embeddings: list[Tensor]) -> None:
    """Forward and backward pass of a micro-batch; no parameter gets a gradient."""
    loss, _ = target_losses(module, batch)
    torch.autograd.grad(loss, embeddings.pop())


@contextmanager
def collecting(module: nn.Module, sums: Factors) -> Iterator[list[Tensor]]:
    """Let backward passes of the base add dy² and x² of every adapted layer to `sums`.

    Yields:
        The embeddings of each forward pass; gradients flow to these.
    """
    embeddings, inputs = list[Tensor](), cast(Any, module).get_input_embeddings()

    def keep_embeddings(_: nn.Module, args: Any, output: Tensor) -> None:
        embeddings.append(output.requires_grad_())

    with adapters_disabled(module), ExitStack() as stack:
        stack.callback(inputs.register_forward_hook(keep_embeddings).remove)
        for name, layer in penalized_layers(module).items():
            u, v = sums[f"{name}.u"], sums[f"{name}.v"]

            def collect(_: nn.Module, args: Any, y: Tensor, u: Tensor = u, v: Tensor = v) -> Tensor:
                result: Tensor = _AddSquares.apply(y, args[0].detach(), u, v)
                return result

            stack.callback(layer.register_forward_hook(collect).remove)
        yield embeddings


class _AddSquares(torch.autograd.Function):
    """Returns y [1, T, o]; its backward pass adds the sums over T of dy² to u and of x² to v.

    A sequence without targets has no gradient and does not count.
    """

    @staticmethod
    def forward(ctx: Any, y: Tensor, x: Tensor, u: Tensor, v: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        ctx.sums = u, v
        return y.view_as(y)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Tensor, None, None, None]:
        (x,), (u, v) = ctx.saved_tensors, ctx.sums
        u += dy.flatten(0, -2).float().square().sum(0)
        v += x.flatten(0, -2).float().square().sum(0) * dy.any()
        return dy, None, None, None


def zero_factors(
    layers: dict[str, Any],
    device: torch.device | None = None,
    dtype: torch.dtype = torch.float32,
) -> Factors:
    """Zeros for each layer."""
    sizes = {
        f"{name}.{letter}": size
        for name, layer in layers.items()
        for letter, size in (("u", layer.out_features), ("v", layer.in_features))
    }
    return {name: torch.zeros(n, device=device, dtype=dtype) for name, n in sizes.items()}


def read_factors(file: Path) -> Factors | None:
    """The stored factors; None if there are none, or if they are not what was written."""
    if not file.exists():
        return None
    try:
        with safe_open(file, framework="pt") as opened:
            factors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
            if opened.metadata()["content"] == content_hash(factors):
                return factors
    except SafetensorError:
        pass
    warn(f"{file} is damaged; it is computed again")
    return None


def write_factors(file: Path, factors: Factors, made_from: dict[str, str]) -> None:
    """Store factors with the fingerprints of what they were made from."""
    metadata = {**made_from, "content": content_hash(factors), "format": "pt"}
    write_atomic(file, save(factors, metadata))


def content_hash(factors: Factors) -> str:
    """BLAKE3 of the values."""
    hasher = blake3()
    for name in sorted(factors):
        hasher.update(factors[name].numpy().tobytes())
    return str(hasher.hexdigest())
