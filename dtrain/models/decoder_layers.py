"""The decoder layers of any model of transformers."""

from __future__ import annotations

from torch import nn
from transformers import PreTrainedModel

from dtrain.models.expert_layers import expert_biases, expert_parameters


def decoder_layers(model: nn.Module) -> list[nn.Module]:
    """The outermost modules that transformers says must not be split.

    Embeddings are left out, though some model types name theirs: the matrix may be tied to the
    output matrix, and an engine that shards by block cannot put it into two blocks.
    """
    names = {
        name for m in model.modules() for name in (getattr(m, "_no_split_modules", None) or ())
    }
    base = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    embeddings = base.get_input_embeddings() if base else None
    blocks = [m for m in model.modules() if type(m).__name__ in names]
    blocks = [m for m in blocks if all(child is not embeddings for child in m.modules())]
    inner = {child for block in blocks for child in block.modules() if child is not block}
    return [block for block in blocks if block not in inner]


def layer_matrices(model: nn.Module) -> set[str]:
    """Names of the matrices inside decoder layers, and of the stacks that hold those of experts."""
    inside = {p for block in decoder_layers(model) for p in block.parameters() if p.dim() == 2}
    matrices = {name for name, parameter in model.named_parameters() if parameter in inside}
    return (matrices - expert_biases(model)) | expert_parameters(model).keys()
