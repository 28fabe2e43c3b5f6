"""CPU ranks of one node gather through shared memory; no rank overwrites what others still read."""

from __future__ import annotations

import json
from collections.abc import Callable

GATHERS = 300


def test_gathered_tensors_stay_valid_while_in_use(start: Callable) -> None:
    for ranks in (2, 3):
        lines = start(ranks, "gather_worker", [str(GATHERS)]).splitlines()
        facts = json.loads(next(li for li in lines if li.startswith("FACTS ")).split(" ", 1)[1])
        # some through memory, some, since an older one was still held, as torch does it
        assert 0 < facts["held too long"] < GATHERS / 2
        assert facts["one node"] == 0
        assert facts["two nodes"] > 0
        assert facts["buffers"] == 0  # none has one if one cannot
        # Most are gathered once forward and once backward.
        assert facts["zero3 gathers"] > 1.5 * facts["zero3 has"]
