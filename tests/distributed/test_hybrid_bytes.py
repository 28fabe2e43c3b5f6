"""Hybrid sharding: only gradients of trainable parameters are sent between the groups."""

from __future__ import annotations

import json

FLOAT32_BYTES = 4


def test_only_adapter_gradients_cross_the_groups(start):
    lines = start(4, "count_bytes").splitlines()
    line = next(li for li in lines if li.startswith("FACTS "))
    facts = json.loads(line.removeprefix("FACTS "))
    sent, groups = facts["sent"], facts["groups"]
    between = {k: v for k, v in sent.items() if k.endswith(str(groups["replicate"]))}
    inside = {k: v for k, v in sent.items() if k.endswith(str(groups["shard"]))}
    assert set(sent) == set(between) | set(inside)
    # Each rank reduces its half of the adapter's gradient, once, whatever the accumulation.
    half = facts["trainable"] * FLOAT32_BYTES / 2
    assert sum(between.values()) == half
    assert [key.split()[0] for key in between] == ["all_reduce"]
    # The frozen base is gathered inside the group: more bytes than its size.
    gathered = sum(v for k, v in inside.items() if k.startswith("all_gather"))
    assert gathered > facts["total"] * FLOAT32_BYTES
