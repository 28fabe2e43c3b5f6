"""Changes of a model's parameters → changes of the tensors that its files have in another layout.

Of experts some are in memory, with all that is made of them; of other parameters one, and what the
files have together with it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from itertools import chain, tee
from typing import Any

import torch
from torch import Tensor

from dtrain.merge.base_tensors import BaseTensors
from dtrain.merge.stream import ChangeBlocks
from dtrain.models.stored_tensors import ModelTensors, row_blocks


def stored_changes(
    changes: Mapping[str, ChangeBlocks], base: BaseTensors
) -> dict[str, ChangeBlocks]:
    """Return the changes by the names that the files have.

    Args:
        changes: by the names that `BaseTensors.stored_name` gives.
    """
    plain = {name: change for name, change in changes.items() if name not in base.conversions}
    conversions = {id(base.conversions[n]): base.conversions[n] for n in changes.keys() - plain}
    for made in conversions.values():
        change = _ConvertedChange(made, base, changes)
        plain |= {name: partial(change.apply, name) for name in made.names}
    return plain


class _ConvertedChange:
    """The change of all that one conversion makes."""

    def __init__(
        self, conversion: Any, base: BaseTensors, changes: Mapping[str, ChangeBlocks]
    ) -> None:
        self._conversion, self._moves = conversion, base.moves(conversion)
        self._files: ModelTensors = base.files
        self._changes = {entry: changes.get(entry, _unchanged) for entry in self._moves.positions}

    def apply(self, name: str, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        """Yield the new values of one of the files' tensors."""
        if self._moves.by_expert:
            yield from self._by_expert(name, blocks)
        elif whole := [block.clone() for block in blocks]:
            files = {n: self._files.read(n) for n in self._conversion.names if n != name}
            old = self._conversion.convert((files | {name: torch.cat(whole)}).__getitem__)
            new = {e: _change_whole(change, old[e]) for e, change in self._changes.items()}
            yield self._moves.revert(new)[name]

    def _by_expert(self, name: str, blocks: Iterator[Tensor]) -> Iterator[Tensor]:
        entries = list(self._changes)
        old = tee(self._convert_blocks(name, blocks), len(entries))
        new = [
            chain.from_iterable(block.split(1) for block in self._changes[e](_entry(e, part)))
            for e, part in zip(entries, old, strict=True)
        ]
        for experts in zip(*new, strict=True):
            yield self._moves.revert(dict(zip(entries, experts, strict=True)))[name]

    def _convert_blocks(self, name: str, blocks: Iterator[Tensor]) -> Iterator[dict[str, Tensor]]:
        """Make some experts of all entries, block by block."""
        first = 0
        for block in blocks:
            stop = first + len(block)
            read = {
                n: self._files[n].rows(first, stop) for n in self._conversion.names if n != name
            }
            read[name] = block.clone()
            empty = {
                entry: torch.empty(len(block), *tensor.shape[1:], device="meta")
                for entry, tensor in self._conversion.empty.items()
            }
            yield self._conversion.convert(read.__getitem__, empty)
            first = stop


def _entry(name: str, made: Iterator[dict[str, Tensor]]) -> Iterator[Tensor]:
    return (entries[name] for entries in made)


def _change_whole(change: ChangeBlocks, values: Tensor) -> Tensor:
    blocks = change(values[start:stop] for start, stop in row_blocks(values.shape))
    return torch.cat([block.clone() for block in blocks])


def _unchanged(blocks: Iterator[Tensor]) -> Iterator[Tensor]:
    return blocks
