"""Patterns of parameters: which names they match, and that each has an effect."""

from __future__ import annotations

import pytest

from dtrain.config.methods.patterns import check_parameter_patterns, match_parameter
from dtrain.core.errors import UserError

LORA_B = "base_model.model.model.layers.1.self_attn.q_proj.lora_B.default.weight"
NAMES = ["model.embed_tokens.weight", "model.layers.1.mlp.up_proj.bias", LORA_B]


@pytest.mark.parametrize(
    ("pattern", "parameter", "matches"),
    [
        ("lora_B", LORA_B, True),
        (r"layers\.1", LORA_B, True),
        ("layers.1.self_attn", LORA_B, True),
        (r"layers\.(1|2)\..*", LORA_B, True),
        ("lora_A|lora_B", LORA_B, True),
        ("B", LORA_B, False),
        (r"layers\.11", LORA_B, False),
        ("q_pro", LORA_B, False),
        ("bias", "model.layers.1.mlp.up_proj.bias", True),
        ("embed_tokens", "model.embed_tokens.weight", True),
        ("weight", "model.embed_tokens.weight", True),
    ],
)
def test_a_pattern_matches_the_end_of_a_name_or_of_a_module(
    pattern: str, parameter: str, matches: bool
) -> None:
    assert (match_parameter([pattern], parameter) == pattern) is matches


def test_the_first_pattern_counts_and_each_must_have_an_effect() -> None:
    assert match_parameter(["bias", r"layers\.1"], NAMES[1]) == "bias"
    check_parameter_patterns(["bias", r"layers\.1"], NAMES, "key")
    for patterns in (["lm_head"], [r"layers\.1", "bias"]):
        with pytest.raises(UserError, match=patterns[-1]) as refused:
            check_parameter_patterns(patterns, NAMES, "key")
        assert refused.value.where == "key"
