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
