"""Order without state: a keyed permutation that is pure arithmetic on the position.

A Feistel network over the smallest power of two that holds `n`, with cycle walking for the rest
(Black and Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002). The round function is
the finaliser of splitmix64 (Steele, Lea and Flood, OOPSLA 2014). It shuffles; it keeps no secret.
"""

from __future__ import annotations

import hashlib

import numpy as np
from numpy.typing import NDArray

Int64s = NDArray[np.int64]
UInt64s = NDArray[np.uint64]

ROUNDS = 8
MAX_ITEMS = 1 << 62

_GOLDEN = np.uint64(0x9E3779B97F4A7C15)
_MIX_A = np.uint64(0xBF58476D1CE4E5B9)
_MIX_B = np.uint64(0x94D049BB133111EB)


def stream_key(seed: int, *labels: object) -> int:
    """A 64-bit key for one use of the seed: other labels give an unrelated key."""
    text = "/".join([str(seed), *map(str, labels)])
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "little")


def permute(index: Int64s, n: int, key: int, epoch: Int64s | int = 0) -> Int64s:
    """Where each `index` goes under the permutation of 0 … n-1 that (key, epoch) names.

    Args:
        index: values [m] in 0 … n-1.
        n: how many items there are, 1 … 2**62.
        key: of `stream_key`.
        epoch: one for all, or one for each index; other epochs give unrelated permutations.

    Returns:
        Values in 0 … n-1; for one epoch, distinct for distinct `index`.
    """
    assert 1 <= n <= MAX_ITEMS, n
    values = np.asarray(index, dtype=np.int64).astype(np.uint64)
    epochs = np.atleast_1d(np.asarray(epoch, dtype=np.int64)).astype(np.uint64)
    base = np.broadcast_to(mix64(epochs * _GOLDEN ^ np.uint64(key)), values.shape)
    bits = max((n - 1).bit_length(), 2)
    out = _feistel(values, base, bits)
    while (outside := out >= np.uint64(n)).any():  # the cycle of an inside value comes back inside
        out[outside] = _feistel(out[outside], base[outside], bits)
    return out.astype(np.int64)


def _feistel(values: UInt64s, base: UInt64s, bits: int) -> UInt64s:
    """A bijection of 0 … 2**bits - 1: each half in turn is xored with a hash of the other."""
    low_bits = np.uint64(bits // 2)
    low_mask = np.uint64((1 << (bits // 2)) - 1)
    high_mask = np.uint64((1 << (bits - bits // 2)) - 1)
    low, high = values & low_mask, values >> low_bits
    for turn in range(0, ROUNDS, 2):
        high = high ^ (mix64(low ^ _round_key(base, turn)) & high_mask)
        low = low ^ (mix64(high ^ _round_key(base, turn + 1)) & low_mask)
    return (high << low_bits) | low


def _round_key(base: UInt64s, turn: int) -> UInt64s:
    return base + np.uint64((turn + 1) * int(_GOLDEN) & (2**64 - 1))


def mix64(x: UInt64s) -> UInt64s:
    """splitmix64's finaliser: every input bit reaches every output bit."""
    x = (x ^ (x >> np.uint64(30))) * _MIX_A
    x = (x ^ (x >> np.uint64(27))) * _MIX_B
    return x ^ (x >> np.uint64(31))
