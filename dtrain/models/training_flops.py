"""The arithmetic of a training step by the usual rule, for the model FLOPs utilization (MFU)."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from dtrain.core.errors import UserError
from dtrain.models.decoder_layers import decoder_layers
from dtrain.models.expert_layers import is_experts, own_experts
from dtrain.models.meta_model import build_meta_model, experts_per_token
from dtrain.models.parameter_counts import parameter_elements


def training_flops_per_token(model: nn.Module) -> int | None:
    """Floating-point operations of a token's forward and backward pass.

    Each weight costs 2 in the forward pass, 2 for the gradient of its input, and 2 for its own
    gradient if it trains: 6 P for full fine-tuning, 4 P for a frozen base with a small adapter
    (Kaplan et al., arXiv:2001.08361, section 2.1). The backward pass ends at the lowest layer that
    trains. An input embedding is only looked up, unless it is the output matrix too. Of routed
    experts and their adapters, a token is computed with its own share. As usual for
    MFU (Chowdhery et al., arXiv:2204.02311, appendix B), recomputation, a reference and a teacher
    do not count; attention scores do not count either.

    Call it before an engine shards the model.

    Returns:
        None if code of the model's own chooses among experts, or how many is not known.
    """
    if own_experts(model):
        return None
    try:
        elements, shares = parameter_elements(model), _expert_shares(model)
    except UserError:  # a forward pass on the meta device needs values
        return None
    layers = decoder_layers(model)
    level = {p: i for i, layer in enumerate(layers) for p in layer.parameters()}
    outer = [p for p in model.parameters() if p.requires_grad and p not in level]
    inputs, outputs = _embedding(model, "input"), _embedding(model, "output")
    trains_below = any(p not in outputs for p in outer)
    trained = [level[p] for p in model.parameters() if p.requires_grad and p in level]
    lowest = 0 if trains_below else min(trained, default=len(layers))
    skipped = inputs - outputs
    flops = 0
    for name, parameter in model.named_parameters():
        if parameter in skipped or ".original_module." in name:  # a trained copy replaces those
            continue
        passes = 1 + (level.get(parameter, lowest) >= lowest) + parameter.requires_grad
        active, of = shares.get(parameter, (1, 1))
        flops += 2 * passes * elements[parameter] * active // of
    return flops


def _expert_shares(model: nn.Module) -> dict[nn.Parameter, tuple[int, int]]:
    """The parameters of experts and their adapters: how many of how many experts a token uses."""
    experts = [(name, module) for name, module in model.named_modules() if is_experts(module)]
    if not experts:
        return {}
    base = next(m for m in model.modules() if isinstance(m, PreTrainedModel))
    described = build_meta_model(base.config, trust_remote_code=base.is_custom_code())
    active = experts_per_token(described)
    shares: dict[nn.Parameter, tuple[int, int]] = {}
    for name, module in experts:
        outermost = model.get_submodule(name.partition(".base_layer")[0])  # PEFT's wrapper
        shares |= dict.fromkeys(outermost.parameters(), (active, int(module.num_experts)))
    return shares


def _embedding(model: nn.Module, side: str) -> set[nn.Parameter]:
    """The parameters of the input or output embeddings."""
    base = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    module = getattr(base, f"get_{side}_embeddings")() if base is not None else None
    return set() if module is None else set(module.parameters())
