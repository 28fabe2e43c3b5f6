"""The DeepSpeed files are found, valid, and set no recipe key."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.config.deepspeed_file import (
    DECIDED_BY_RECIPE,
    PREFETCH,
    load_ds_config,
    prefetch_elements,
)
from dtrain.core.errors import UserError

CASES = [("zero2", False), ("zero3", False), ("zero3", True)]


@pytest.mark.parametrize(("kind", "offload"), CASES)
def test_shipped_deepspeed_file_sets_no_recipe_keys(kind: str, offload: bool) -> None:
    config = load_ds_config(None, kind, offload)
    for knob in DECIDED_BY_RECIPE:
        group, _, name = knob.rpartition(".")
        holder = config.get(group, {}) if group else config
        assert holder.get(name, "auto") == "auto", knob
    assert f"zero{config['zero_optimization']['stage']}" == kind


@pytest.mark.parametrize(("kind", "offload"), CASES)
def test_every_auto_value_is_filled_in(kind: str, offload: bool) -> None:
    config = load_ds_config(None, kind, offload)
    left = [key for key, value in config.items() if value == "auto"]
    assert set(left) <= set(DECIDED_BY_RECIPE)
    zero = config["zero_optimization"]
    assert {key for key, value in zero.items() if value == "auto"} <= {PREFETCH}


def test_prefetch_size_scales_with_the_model() -> None:
    assert prefetch_elements(576) == 298_598
    assert prefetch_elements(8192) == 50_000_000


def test_clashing_user_deepspeed_file_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "mine.json"
    file.write_text('{"zero_optimization": {"stage": 2}, "gradient_clipping": 3}')
    with pytest.raises(UserError, match=r"mine\.json: gradient_clipping is 3, but"):
        load_ds_config(file, "zero2", False)
