"""Texts that are there already, by the keys and sketches that a scan has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dtrain.data.order import mix64
from dtrain.data.quality import duplicates
from dtrain.data.quality.examine import key
from dtrain.data.quality.scan import SIMILARITY
from dtrain.data.quality.shingles import bands, plain, signatures

BATCH_TEXTS = 1000


class Likeness:
    """Texts in groups, 208 bytes each; texts of different groups are never alike."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, str]] = []
        self._keys: list[NDArray[np.uint64]] = []
        self._bands: list[NDArray[np.uint32]] = []
        self._sketches: list[NDArray[np.uint8]] = []

    def add_one(self, group: int, text: str) -> None:
        """Take in a text; the answers of `earlier` come in the same order."""
        self._waiting.append((group, plain(text)))
        if len(self._waiting) >= BATCH_TEXTS:
            self._sketch()

    def earlier(self) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
        """For each text an earlier one that is the same or nearly so, or NONE; and how alike."""
        self._sketch()
        if not self._keys:
            return np.empty(0, np.int64), np.empty(0, np.float32)
        same = duplicates.exact(np.concatenate(self._keys))
        tables = np.concatenate(self._bands), np.concatenate(self._sketches)
        near, how = duplicates.near(*tables, SIMILARITY)
        exact = same != duplicates.NONE
        how = np.where(exact, 1, np.minimum(how, np.float32(0.999)))
        return np.where(exact, same, near), how.astype(np.float32)

    def _sketch(self) -> None:
        if not self._waiting:
            return
        texts = [text for _, text in self._waiting]
        groups = mix64(np.array([group for group, _ in self._waiting], np.uint64))
        matrix = signatures(texts)
        own = (groups >> np.uint64(32)).astype(np.uint32)
        self._keys.append(np.array([key(text) for text in texts], np.uint64) ^ groups)
        self._bands.append(bands(matrix) ^ own[:, None])
        self._sketches.append(matrix.astype(np.uint8))
        self._waiting = []
