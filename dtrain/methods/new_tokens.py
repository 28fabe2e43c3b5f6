"""How a stage trains the rows of new tokens: whole matrices, or these rows alone."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from peft.utils.other import ModulesToSaveWrapper, TrainableTokensWrapper
from torch import nn
from transformers import PreTrainedModel

from dtrain.config.methods.patterns import match_names
from dtrain.core.errors import UserError
from dtrain.models.loss import transformers_model
from dtrain.models.token_rows import token_layers

FIX = "method.modules_to_save: [embed_tokens, lm_head], which trains them whole"


def rows_to_train(
    model: PreTrainedModel,
    tokens: Sequence[int],
    whole_modules: Sequence[str],
    targets: str | list[str],
) -> dict[str, list[int]] | None:
    """PEFT's `trainable_token_indices`: name of a module → rows that train; None for none.

    Of tied matrices PEFT wants the embedding's name alone.

    Args:
        model: before PEFT changes it.
        whole_modules: ends of the names of modules that train whole.
        targets: names of the layers that get an adapter, or all within the decoder layers.

    Raises:
        UserError: a module would have an adapter too.
    """
    layers = {layer.weight: layer for _, layer in reversed([*_outer_layers(model)])}
    names = {module: name for name, module in model.named_modules()}
    rows = {names[layer]: list(tokens) for layer in layers.values()}
    rows = {name: r for name, r in rows.items() if not name.endswith(tuple(whole_modules))}
    if both := [] if isinstance(targets, str) else match_names(rows, targets):
        raise UserError(
            f"{both[0]} cannot have an adapter and rows of new tokens that train",
            where="method.target_modules",
            fix=f"leave it out, or {FIX}",
        )
    return rows or None


def check_new_tokens(model: nn.Module) -> None:
    """Check that a model trains the rows of new tokens in its embeddings and its output matrix.

    Args:
        model: from `Method.attach`.

    Raises:
        UserError: it does not, or PEFT could not load what is trained.
    """
    for name, layer in token_layers(model):
        if getattr(layer.base_layer, "bias", None) is not None:
            raise UserError(
                f"{name} has a bias, which PEFT leaves out where rows train",
                where="model.tokens",
                fix=FIX,
            )
    for role, layer in _outer_layers(model):
        kinds = ModulesToSaveWrapper, TrainableTokensWrapper
        if not isinstance(layer, kinds) and not layer.weight.requires_grad:
            raise UserError(
                f"the new tokens would not train: the method leaves the {role} as they are",
                where="model.tokens",
                fix=f"method.kind: lora, or {FIX}",
            )


def _outer_layers(model: nn.Module) -> Iterator[tuple[str, Any]]:
    inner = transformers_model(model)
    yield "embeddings", inner.get_input_embeddings()
    if (output := inner.get_output_embeddings()) is not None:
        yield "rows of the output matrix", output
