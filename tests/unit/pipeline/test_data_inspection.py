"""What a scan of a stage looks for."""

from __future__ import annotations

from dtrain.config.load import load_recipe
from dtrain.pipeline.data_inspection import longest_row


def test_a_long_text_is_a_finding_only_where_it_loses_something() -> None:
    recipe = load_recipe("tiny")
    assert [longest_row(stage) for stage in recipe.stages] == [None, 128]
    asked_for = load_recipe("tiny", ["stages.domain.data.clean.overlong=drop"])
    assert longest_row(asked_for.stages[0]) == 64
