"""Hashes of all runs of n characters of many texts, at once and in any language.

Characters need no word boundaries, so Chinese is treated as English is. All of a batch is hashed
in numpy: a sum of powers per run (Karp and Rabin, 1987), mixed by splitmix64's finaliser.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray
from rensa import RMinHash

from dtrain.data.permutation import mix64

UInt64s = NDArray[np.uint64]
Int64s = NDArray[np.int64]

WIDTH = 5  # characters of a run that near duplicates are measured by
PERMUTATIONS = 120
SEED = 17
_BASE = 0x100000001B3
_BLANKS = re.compile(r"\s+")
_NOT_WORDS = re.compile(r"[\W_]+")


def plain(text: str) -> str:
    """Lower case, one blank where there were several."""
    return _BLANKS.sub(" ", text.casefold()).strip()


def bare(text: str) -> str:
    """Letters and digits alone, lower case: what is left when somebody reformats a text."""
    return _NOT_WORDS.sub("", text.casefold())


def run_hashes(texts: Sequence[str], width: int) -> tuple[UInt64s, Int64s]:
    """Hashes of the runs of `width` characters of each text.

    Returns:
        uint64 [runs], and offsets [texts + 1] into them; a text shorter than `width` has one run.
    """
    texts = [text if len(text) >= width or not text else text.ljust(width, "\0") for text in texts]
    codes = np.frombuffer("".join(texts).encode("utf-32-le"), dtype=np.uint32).astype(np.uint64)
    sizes = np.array([len(text) for text in texts], dtype=np.int64)
    total = np.zeros(max(codes.size - width + 1, 0), dtype=np.uint64)
    for place in range(width):
        total *= np.uint64(_BASE)
        total += codes[place : place + total.size] + np.uint64(1)
    runs = np.where(sizes, sizes - width + 1, 0)
    offsets = np.concatenate([[0], np.cumsum(runs)]).astype(np.int64)
    starts = np.cumsum(sizes) - sizes
    chosen = np.repeat(starts - offsets[:-1], runs) + np.arange(offsets[-1])
    return mix64(total[chosen]), offsets


def signatures(texts: Sequence[str]) -> NDArray[np.uint32]:
    """MinHash signatures (Broder, 1997), uint32 [texts, PERMUTATIONS]."""
    hashes, offsets = run_hashes(texts, WIDTH)
    matrix = RMinHash.digest_matrix_from_flat_token_hashes(hashes, offsets, PERMUTATIONS, SEED)
    return np.array(matrix.to_rows(), dtype=np.uint32).reshape(-1, PERMUTATIONS)
