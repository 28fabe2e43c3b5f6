"""An output matrix that is stored beside the embedding it is tied to."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from dtrain.core.files import read_json
from dtrain.merge.stream import Change
from dtrain.models.weights import read_header, weight_files

HEAD, EMBEDDINGS = "lm_head.weight", ("embed_tokens.weight", "wte.weight")
COMPARED_BYTES = 1 << 22  # at once


@dataclass(frozen=True)
class _Place:
    path: Path
    start: int
    stop: int
    form: tuple[str, tuple[int, ...]]


def with_tied(base: Path, changes: Mapping[str, Change]) -> Mapping[str, Change]:
    """The changes, and for a tied pair that is stored twice the same change to both.

    transformers does not tie two that differ when it loads them, so that a model with a trained
    embedding would answer with its old output matrix.
    """
    if not _ties(base):
        return changes
    pair = {n: p for n, p in _places(base).items() if n == HEAD or n.endswith(EMBEDDINGS)}
    changed = [name for name in pair if name in changes]
    if len(pair) != 2 or len(changed) != 1 or not _equal(*pair.values()):
        return changes
    return {**changes, **dict.fromkeys(pair, changes[changed[0]])}


def _ties(base: Path) -> bool:
    config = read_json(base / "config.json") if (base / "config.json").is_file() else {}
    text = config.get("text_config") or {}
    return bool(config.get("tie_word_embeddings", text.get("tie_word_embeddings")))


def _places(base: Path) -> dict[str, _Place]:
    places = {}
    for path in weight_files(base):
        entries, head = read_header(path)
        for name, entry in entries.items():
            start, stop = (len(head) + offset for offset in entry["data_offsets"])
            places[name] = _Place(path, start, stop, (entry["dtype"], tuple(entry["shape"])))
    return places


def _equal(one: _Place, other: _Place) -> bool:
    if one.form != other.form:
        return False
    with open(one.path, "rb") as a, open(other.path, "rb") as b:
        a.seek(one.start)
        b.seek(other.start)
        left = one.stop - one.start
        while left:
            size = min(left, COMPARED_BYTES)
            if a.read(size) != b.read(size):
                return False
            left -= size
    return True
