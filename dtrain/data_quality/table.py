"""What a scan keeps of the rows: a table that grows in place, and where its rows come from."""

from __future__ import annotations

from functools import cached_property

import numpy as np
from numpy.typing import NDArray

from dtrain.data_quality.shingles import PERMUTATIONS

Int64s = NDArray[np.int64]

# Keys of the whole, the question, the answer and how the question begins, without regard to case
# and blanks; tokens (0 where none are counted); bits of `kinds.BIT`; the lowest byte of each value
# of the signature; whether there is a question at all. 169 bytes, without gaps.
ROW = np.dtype(
    [
        *((name, "<u8") for name in ("whole", "question", "answer", "start")),
        *((name, "<i4") for name in ("question_characters", "answer_characters", "tokens")),
        ("flags", "<u4"),
        ("sketch", "u1", (PERMUTATIONS,)),
        ("asked", "?"),
    ]
)
ROOM = 1 << 15  # rows, or a 32nd, that there is room for when the table grows


class Table:
    """ROWs that grow in number, never twice in memory."""

    def __init__(self) -> None:
        self._rows = np.empty(0, ROW)
        self._size = 0

    def add(self, rows: NDArray[np.void]) -> None:
        """Append rows; no view that `rows` gave may be in use any more."""
        stop = self._size + len(rows)
        if stop > len(self._rows):
            # The system moves the pages of a large block, not its bytes.
            self._rows.resize(stop + max(ROOM, stop // 32), refcheck=False)
        self._rows[self._size : stop] = rows
        self._size = stop

    @property
    def rows(self) -> NDArray[np.void]:
        """All rows, ROW [rows], as they lie in the table."""
        return self._rows[: self._size]


class Places:
    """Source, part and number of each row; what goes on by ones takes no memory."""

    def __init__(self) -> None:
        self._runs: list[Int64s] = []
        self._rows = 0

    def add(self, places: Int64s) -> None:
        """Append places [rows, 3]."""
        steps = np.diff(places, axis=0, prepend=places[:1])
        steps[1:, 2] -= 1
        heads = np.flatnonzero(steps.any(axis=1))
        heads = np.concatenate([[0], heads]) if len(places) else heads
        self._runs.append(np.column_stack([self._rows + heads, places[heads]]))
        self._rows += len(places)

    def of(self, row: int) -> tuple[int, int, int]:
        """Source, part and number of a row."""
        first, source, part, number = self._all[self._all[:, 0].searchsorted(row, "right") - 1]
        return int(source), int(part), int(number + row - first)

    @property
    def nbytes(self) -> int:
        """Memory that they take."""
        return sum(runs.nbytes for runs in self._runs)

    @cached_property
    def _all(self) -> Int64s:
        return np.concatenate(self._runs)
