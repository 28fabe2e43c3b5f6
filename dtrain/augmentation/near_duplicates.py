"""Texts that are there already, by the keys and sketches that a scan has."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from dtrain.data.permutation import mix64
from dtrain.data_quality import duplicates
from dtrain.data_quality.row_checks import key
from dtrain.data_quality.scan import SIMILARITY
from dtrain.data_quality.shingles import plain, signatures

BATCH_TEXTS = 1000
NONE = -1  # no earlier text is alike


class Likeness:
    """Texts in groups, 136 bytes each; texts of different groups are never alike."""

    def __init__(self) -> None:
        self._waiting: list[tuple[int, str]] = []
        self._keys: list[NDArray[np.uint64]] = []
        self._groups: list[NDArray[np.uint64]] = []
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
        keys, groups = np.concatenate(self._keys), np.concatenate(self._groups)
        earlier = np.full(len(keys), NONE)
        how = np.zeros(len(keys), np.float32)
        for later, first in duplicates.exact(keys ^ groups):
            earlier[later], how[later] = first, 1
        same = earlier != NONE
        for later, first, alike in duplicates.near(
            np.concatenate(self._sketches), SIMILARITY, same, groups
        ):
            earlier[later], how[later] = first, np.minimum(alike, np.float32(0.999))
        return earlier, how

    def _sketch(self) -> None:
        if not self._waiting:
            return
        texts = [text for _, text in self._waiting]
        groups = mix64(np.array([group for group, _ in self._waiting], np.uint64))
        self._keys.append(np.array([key(text) for text in texts], np.uint64))
        self._groups.append(groups)
        self._sketches.append(signatures(texts).astype(np.uint8))
        self._waiting = []
