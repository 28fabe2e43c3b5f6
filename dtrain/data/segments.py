"""What rows are made of, gathered for many rows at once, before a token is read.

Shapes: P pieces, R supervised runs.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Int32s = NDArray[np.int32]
Int64s = NDArray[np.int64]


@dataclass(frozen=True)
class Pieces:
    """The pieces of some rows, in the order of the rows.

    Attributes:
        views: tokens of each piece, int32, as views of the mapped files.
        sizes: [P], of these.
        rows: [P], which of the rows (0, 1, …) a piece belongs to; never falls.
        documents, labels: [P], number and label of the document of each piece.
        run_pieces: [R], piece of each run of supervised tokens; never falls.
        run_starts, run_stops: [R], places in that piece; a run never starts at 0.
    """

    views: list[Int32s]
    sizes: Int64s
    rows: Int64s
    documents: Int64s
    labels: Int64s
    run_pieces: Int64s
    run_starts: Int64s
    run_stops: Int64s


def joined(parts: list[Pieces], places: list[Int64s]) -> Pieces:
    """Pieces of several stores as those of one.

    Args:
        parts: of each store.
        places: for each store, which rows of the whole its rows are, rising.
    """
    if len(parts) == 1:
        return parts[0]
    rows = np.concatenate([place[part.rows] for part, place in zip(parts, places, strict=True)])
    order = np.argsort(rows, kind="stable")
    moved = np.empty_like(order)
    moved[order] = np.arange(order.size)
    first = np.cumsum([0, *(len(part.views) for part in parts)])
    own = [part.run_pieces + shift for part, shift in zip(parts, first[:-1], strict=True)]
    pieces = moved[np.concatenate(own)]
    by_piece = np.argsort(pieces, kind="stable")
    views = [view for part in parts for view in part.views]
    return Pieces(
        [views[place] for place in order.tolist()],
        np.concatenate([part.sizes for part in parts])[order],
        rows[order],
        np.concatenate([part.documents for part in parts])[order],
        np.concatenate([part.labels for part in parts])[order],
        pieces[by_piece],
        np.concatenate([part.run_starts for part in parts])[by_piece],
        np.concatenate([part.run_stops for part in parts])[by_piece],
    )


def spread(first: Int64s, counts: Int64s) -> Int64s:
    """first[0], first[0] + 1, … (counts[0] of them), first[1], …"""
    ends = np.cumsum(counts)
    total = int(ends[-1]) if ends.size else 0
    return np.arange(total) + np.repeat(first - ends + counts, counts)
