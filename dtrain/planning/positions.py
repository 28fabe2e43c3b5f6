"""How far a model was made to place a token, as its config.json says."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

from dtrain.config.schema import Data, Recipe
from dtrain.core.errors import UserError
from dtrain.planning.known_models import find_config

KEYS = ("max_position_embeddings", "n_positions", "max_seq_len")
ROPES = ("rope_parameters", "rope_scaling")


def trained_positions(config: Mapping[str, Any]) -> int | None:
    """Positions that a model was trained for, or that a scaled rope reaches; None if not said.

    Args:
        config: as config.json holds it; of a multimodal model, the text model's counts.
    """
    text = config.get("text_config") or config
    own = next((text[key] for key in KEYS if isinstance(text.get(key), int)), None)
    if own is None:
        return None
    scaled = [factor * (original or own) for factor, original in _scalings(text)]
    return int(max(own, *scaled, 0))


def _scalings(config: Mapping[str, Any]) -> Iterator[tuple[float, int | None]]:
    """Factor and original length of each scaled rope; some models have one a kind of layer."""
    for rope in (config.get(key) for key in ROPES):
        if not isinstance(rope, Mapping):
            continue
        for one in (rope, *(inner for inner in rope.values() if isinstance(inner, Mapping))):
            factor = one.get("factor")
            if isinstance(factor, int | float):
                yield float(factor), one.get("original_max_position_embeddings")


def position_warnings(recipe: Recipe) -> list[str]:
    """Sequences that may hold longer documents than the base can place, before any is read.

    Packed documents that are shorter are placed: only prepared data shows which there are.
    """
    try:
        config, source = find_config(recipe.model.base)
    except UserError:  # fetched later, and looked at then
        return []
    known = trained_positions(config)
    groups: dict[str, Data] = {f"stages.{s.name}.data": s.data for s in recipe.stages}
    groups |= {f"evaluation.sets.{name}": one for name, one in recipe.evaluation.sets.items()}
    return [
        f"{key}: sequence_length {data.sequence_length}, but the model has {known} positions "
        f"({source}); a longer document in a sequence goes beyond them"
        for key, data in groups.items()
        if known is not None and data.sequence_length > known
    ]
