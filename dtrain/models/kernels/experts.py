"""Routed experts with LoRA, on the tokens that each expert gets.

    y_t = Σ_k p_tk down_e(act(up_e(x_t))),  e = the k-th expert of token t
    W_e x = x W_eᵀ + s (x A_eᵀ) B_eᵀ        (arXiv:2106.09685), for up and down

transformers holds the experts of a layer as parameters of three dimensions, and lets a function of
`ExpertsInterface` compute them. PEFT adapts such a parameter by making W + s B A for all experts
in every forward pass. Here tokens are sorted by expert, and each group of tokens is multiplied with
its expert's W, A and B: by one grouped product on a GPU that has it, one expert after the other
elsewhere.
Llama 4's experts get every token, as zeros where they are not chosen; only the others are computed.
Expert e has rows e r to (e + 1) r of A's matrix, and every E-th column from e on of B's.

Letters: T tokens, k experts of a token, S = T k rows sorted by expert, E experts, h and o widths of
input and output, r rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache, cached_property, partial
from itertools import pairwise
from typing import Any

import torch
from peft.tuners.lora.layer import ParamWrapper
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.nn import functional
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from dtrain.models.expert_layers import (
    count_choices,
    has_transposed_matrices,
    is_batched,
    is_experts,
    is_routed,
)
from dtrain.models.expert_nf4 import ExpertStates, expert_states, holds_nf4

NAME = "routed"  # of the implementation, in transformers' registry
WRAPPERS = "lora_wrappers"  # attribute of an experts module: parameter → PEFT's wrapper
GROUPED = (9, 10)  # major compute capabilities for which torch has a kernel of grouped products
ALIGNED_BYTES = 16  # of the rows that it reads


@dataclass(frozen=True)
class Groups:
    """Rows sorted by expert.

    Attributes:
        order: [S], positions among the T x k choices.
        ends: [E], int32, index after the last row of each expert.
    """

    order: Tensor
    ends: Tensor
    choices: int

    @property
    def rows(self) -> Tensor:
        """Token of each sorted row, [S]."""
        return self.order // self.choices

    @cached_property
    def spans(self) -> list[tuple[int, slice]]:
        """Each expert that has rows, and its rows; the first use waits for the device."""
        ends = self.ends.tolist()
        pairs = enumerate(pairwise([0, *ends]))
        return [(expert, slice(start, end)) for expert, (start, end) in pairs if end > start]

    def spread(self, values: Tensor, count: int) -> Tensor:
        """[S, h] → [count, h] with the rows at their positions, and zeros elsewhere."""
        return values.new_zeros(count, values.shape[-1]).index_copy(0, self.order, values)

    def sum_by_token(self, values: Tensor) -> Tensor:
        """[S, h] → [T, h]; in a fixed order, unlike index_add."""
        unsorted = torch.empty_like(values)
        unsorted[self.order] = values
        return unsorted.view(-1, self.choices, values.shape[-1]).sum(1)


def group_by_expert(index: Tensor, experts: int) -> Groups:
    """Sort the choices [T, k] of all tokens by expert."""
    flat = index.reshape(-1)
    order = torch.sort(flat, stable=True).indices
    counts = count_choices(flat, experts)  # bincount would wait for the device
    return Groups(order, counts.cumsum(0, dtype=torch.int32), index.shape[-1])


def group_rows(rows: Tensor, experts: int) -> Groups:
    """Choose the rows of [E T, h], T for each expert, that are not zero."""
    chosen = (rows != 0).any(-1)
    ends = chosen.view(experts, -1).sum(1).cumsum(0, dtype=torch.int32)
    return Groups(chosen.nonzero().flatten(), ends, 1)


@dataclass(frozen=True)
class ExpertLora:
    """The LoRA of all experts, as PEFT keeps it.

    Attributes:
        a, b: PEFT's parameters of its A and B, [E r, in] and [out, r E].
        scale: factor of B·A.
        experts: E.
        swapped: PEFT takes matrices [in, out] for [out, in]: its B is our A.
    """

    a: Tensor
    b: Tensor
    scale: float
    experts: int
    swapped: bool

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        """A [E, r, h] and B [E, o, r], views of the parameters as these are now."""
        a = self.a.view(self.experts, -1, self.a.shape[1])
        b = self.b.view(self.b.shape[0], -1, self.experts).permute(2, 0, 1)
        return (b.transpose(1, 2), a.transpose(1, 2)) if self.swapped else (a, b)

    def gradients(self, da: Tensor, db: Tensor) -> tuple[Tensor, Tensor]:
        """The gradients of the parameters, from those of the factors."""
        if self.swapped:
            da, db = db.transpose(1, 2), da.transpose(1, 2)
        return da.reshape(self.a.shape), db.permute(1, 2, 0).reshape(self.b.shape)


def routed_experts(
    module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor
) -> Tensor:
    """transformers' experts function, with the LoRA that `route_adapters` has found.

    Args:
        module: the experts; its attributes are those of `use_experts_implementation`.
        hidden_states: [T, h].
        top_k_index: [T, k].
        top_k_weights: [T, k].

    Returns:
        [T, h].
    """
    groups = group_by_expert(top_k_index, module.num_experts)
    rows = hidden_states[groups.rows]
    first = "gate_up_proj" if module.has_gate else "up_proj"
    inner = _project(module, first, rows, groups)
    inner = module._apply_gate(inner) if module.has_gate else module.act_fn(inner)
    outputs = _project(module, "down_proj", inner, groups)
    if module.has_post_expert_norm:
        outputs = module.post_expert_norm(outputs)
    outputs = outputs * top_k_weights.reshape(-1)[groups.order].unsqueeze(-1)
    return groups.sum_by_token(outputs).to(hidden_states.dtype)


def batched_experts(module: Any, hidden_states: Tensor) -> Tensor:
    """What Llama4TextExperts computes, with the LoRA that `route_adapters` has found.

    Args:
        hidden_states: [E T, h], the tokens for each expert one after the other. Zeros make zeros,
            without a gradient, as there are no biases.

    Returns:
        [E T, h].
    """
    hidden_states = hidden_states.view(-1, module.hidden_size)
    groups = group_rows(hidden_states, module.num_experts)
    inner = _project(module, "gate_up_proj", hidden_states[groups.order], groups)
    gate, up = inner.chunk(2, dim=-1)
    outputs = _project(module, "down_proj", up * module.act_fn(gate), groups)
    return groups.spread(outputs.to(hidden_states.dtype), len(hidden_states))


def _project(module: Any, name: str, x: Tensor, groups: Groups) -> Tensor:
    """One of the layers of the experts: [S, h] → [S, o]."""
    weight, kind = getattr(module, name), x.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    base = ExpertWeights(weight, expert_states(module, name), has_transposed_matrices(module))
    lora = _lora(module, name)
    trained = () if lora is None else (lora.a, lora.b)
    y: Tensor = _Grouped.apply(x.to(dtype), base, lora, groups, weight, *trained)
    if getattr(module, "has_bias", False):
        ids = torch.repeat_interleave(
            torch.arange(module.num_experts, device=x.device),
            groups.ends.diff(prepend=groups.ends.new_zeros(1)),
            output_size=len(x),
        )
        y = y + getattr(module, f"{name}_bias")[ids]
    return y


class _Grouped(torch.autograd.Function):
    # Weights are referenced, not saved: sharding engines gather them into the same tensor again.
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        base: ExpertWeights,
        lora: ExpertLora | None,
        groups: Groups,
        weight: Tensor,
        *trained: Tensor,
    ) -> Tensor:
        y = base.multiply(x, groups, forward=True)
        small = []
        if lora is not None:
            a, b = (_dense(factor, x.dtype).transpose(1, 2) for factor in lora.factors)
            small = [grouped_mm(x, a, groups)]
            y += grouped_mm(small[0], b, groups).mul_(lora.scale)
        ctx.base, ctx.lora, ctx.groups = base, lora, groups
        ctx.save_for_backward(x, *small)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, dy: Tensor) -> tuple[Any, ...]:
        x, *small = ctx.saved_tensors
        base, lora, groups, weight = ctx.base, ctx.lora, ctx.groups, ctx.base.weight
        dx = base.multiply(dy, groups, forward=False) if ctx.needs_input_grad[0] else None
        dw, trained = None, tuple[Tensor, ...]()
        if lora is not None:
            a, b = lora.factors
            inner = grouped_mm(dy, _dense(b, dy.dtype), groups).mul_(lora.scale)
            db = grouped_outer(dy, small[0], groups, b).mul_(lora.scale)
            trained = lora.gradients(grouped_outer(inner, x, groups, a), db)
            if dx is not None:
                dx += grouped_mm(inner, _dense(a, dy.dtype), groups)
        if ctx.needs_input_grad[4]:
            left, right = (x, dy) if base.transposed else (dy, x)
            dw = grouped_outer(left, right, groups, weight)
        return dx, None, None, None, dw, *trained


@dataclass(frozen=True)
class ExpertWeights:
    """One of the layers of the experts at a call.

    Attributes:
        weight: [E, o, h]; packed in 4 bits, [E, n].
        states: the quantization states of a packed weight.
        transposed: it is [E, h, o].
    """

    weight: Tensor
    states: ExpertStates | None
    transposed: bool

    def multiply(self, x: Tensor, groups: Groups, *, forward: bool) -> Tensor:
        """x W_eᵀ of each expert, [S, h] → [S, o]; the gradient's way back if not `forward`."""
        swaps = forward != self.transposed  # matrices are stored for the way back: [o, h]
        if self.states is None:
            weight = self.weight.to(x.dtype)
            return grouped_mm(x, weight.transpose(1, 2) if swaps else weight, groups)
        width = self.states.shape[1] if swaps else self.states.shape[2]
        y = x.new_empty(len(x), width)
        for expert, rows in groups.spans:
            matrix = self.states.matrix(self.weight, expert).to(x.dtype)
            torch.mm(x[rows], matrix.t() if swaps else matrix, out=y[rows])
        return y


def grouped_mm(x: Tensor, matrices: Tensor, groups: Groups) -> Tensor:
    """Multiply each row with the matrix of its expert: [S, h] x [E, h, o] → [S, o]."""
    if _runs_grouped(x, matrices):
        result: Tensor = functional.grouped_mm(x, matrices, offs=groups.ends)
        return result
    y = x.new_empty(len(x), matrices.shape[2])
    for expert, rows in groups.spans:
        torch.mm(x[rows], matrices[expert], out=y[rows])
    return y


def grouped_outer(left: Tensor, right: Tensor, groups: Groups, like: Tensor) -> Tensor:
    """Sum leftᵀ right over the rows of each expert: [S, o], [S, h] → [E, o, h] in like's dtype."""
    if _runs_grouped(left, right):
        product: Tensor = functional.grouped_mm(left.t(), right, offs=groups.ends)
        return product.to(like.dtype)
    total = torch.zeros(like.shape, dtype=like.dtype, device=left.device)
    for expert, rows in groups.spans:
        total[expert] = left[rows].t() @ right[rows]
    return total


def _dense(factors: Tensor, dtype: torch.dtype) -> Tensor:
    """A or B of all experts in a dtype, row after row: B's columns alternate between experts."""
    return factors.to(dtype).contiguous()


def _runs_grouped(*operands: Tensor) -> bool:
    """Whether one kernel computes all groups: torch's takes aligned tensors in bfloat16."""
    return _has_grouped_kernel(operands[0].device) and all(map(_is_aligned, operands))


@cache
def _has_grouped_kernel(device: torch.device) -> bool:
    """Whether it is Hopper or Blackwell; on others torch waits for the device in every product."""
    return device.type == "cuda" and torch.cuda.get_device_capability(device)[0] in GROUPED


def _is_aligned(operand: Tensor) -> bool:
    """Whether rows, or columns, are dense and begin at multiples of 16 bytes."""
    *_, row, column = operand.stride()
    step = row if column == 1 else column if row == 1 else 1
    return (
        operand.dtype == torch.bfloat16
        and step * operand.element_size() % ALIGNED_BYTES == 0
        and operand.data_ptr() % ALIGNED_BYTES == 0
    )


def _lora(module: nn.Module, name: str) -> ExpertLora | None:
    """The LoRA of a parameter; None without one, and where PEFT has disabled it."""
    wrapper: Any = getattr(module, WRAPPERS, {}).get(name)
    if wrapper is None or wrapper.disable_adapters or wrapper.merged:
        return None
    (active,) = wrapper.active_adapters
    a, b = wrapper.lora_A[active].weight, wrapper.lora_B[active].weight
    return ExpertLora(a, b, wrapper.scaling[active], wrapper.num_experts, is_batched(module))


def _call(inner: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Call experts inside of PEFT's wrappers, with their hooks."""
    return inner(*args, **kwargs)


def route_adapters(module: nn.Module) -> bool:
    """Compute experts by `routed_experts` or `batched_experts`, with PEFT's adapters around them.

    Args:
        module: of any kind.

    Returns:
        Whether it is the outermost wrapper of experts, or experts without a wrapper.
    """
    wrappers, inner = _unwrap(module)
    if not is_experts(inner) or hasattr(inner, WRAPPERS):
        return False
    setattr(inner, WRAPPERS, wrappers)  # a dict: not children of the module
    if is_routed(inner):
        config: Any = inner.config
        config._experts_implementation = NAME
    else:
        inner.forward = partial(batched_experts, inner)
    for wrapper in wrappers.values():
        wrapper.forward = partial(_call, inner)
    return True


def has_packed_experts(module: nn.Module) -> bool:
    """Whether a module is, or wraps, experts in NF4, which only functions of this file compute."""
    return holds_nf4(_unwrap(module)[1])


def _unwrap(module: nn.Module) -> tuple[dict[str, nn.Module], nn.Module]:
    """PEFT's wrappers by their parameters, and what they wrap."""
    wrappers = dict[str, nn.Module]()
    while isinstance(module, ParamWrapper):
        wrappers[module.parameter_name] = module
        module = module.base_layer
    return wrappers, module


ALL_EXPERTS_FUNCTIONS.register(NAME, routed_experts)
