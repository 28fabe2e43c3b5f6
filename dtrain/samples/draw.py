"""Choices that are the same on every machine and under every version of Python."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import TypeVar

T = TypeVar("T")


def number(*key: object) -> int:
    """A number in 0 … 2**64 - 1 that depends on `key` alone."""
    text = "\0".join(str(part) for part in key)
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


def choose(options: Sequence[T], *key: object) -> T:
    """One of `options`, by `key`."""
    return options[number(*key) % len(options)]


def shuffled(items: Sequence[T], *key: object) -> list[T]:
    """`items` in an order that depends on `key` and on what they are, not on where they stood."""
    return sorted(items, key=lambda item: (number(*key, item), str(item)))
