"""The engine that a launcher's file names, and what happens when the recipe names another."""

from __future__ import annotations

from pathlib import Path

import pytest
from ruamel.yaml import YAML

from dtrain.core.errors import UserError
from dtrain.launching.accelerate_env import launcher_engine, resolve_engine

PLAIN = {"ACCELERATE_MIXED_PRECISION": "no"}  # what `accelerate launch` sets in any case
FSDP = PLAIN | {"ACCELERATE_USE_FSDP": "true", "FSDP_VERSION": "2"}
ZERO2 = PLAIN | {"ACCELERATE_USE_DEEPSPEED": "true", "ACCELERATE_DEEPSPEED_ZERO_STAGE": "2"}
ZERO3 = ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "3"}
TORCHRUN = {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "x"}
FILES = Path(__file__).parents[3] / "launch" / "accelerate"


@pytest.mark.parametrize(
    ("environ", "kind"),
    [
        ({}, None),
        (TORCHRUN, None),
        (PLAIN, "ddp"),
        (FSDP, "fsdp2"),
        (ZERO2, "zero2"),
        (ZERO3, "zero3"),
    ],
)
def test_engine_is_read_from_the_launcher_file(environ: dict[str, str], kind: str | None) -> None:
    assert launcher_engine(environ) == kind
    assert resolve_engine("auto", environ) == (kind or "ddp")


def test_recipe_engine_applies_if_the_launcher_names_none() -> None:
    assert resolve_engine("zero3", TORCHRUN) == "zero3"


def test_equal_engines_are_accepted() -> None:
    assert resolve_engine("fsdp2", FSDP) == "fsdp2"


@pytest.mark.parametrize(
    ("kind", "environ", "variable"),
    [
        ("ddp", FSDP, "ACCELERATE_USE_FSDP"),
        ("zero2", ZERO3, "ACCELERATE_DEEPSPEED_ZERO_STAGE"),
        ("fsdp2", PLAIN, "ACCELERATE_USE_FSDP"),
    ],
)
def test_contradiction_names_both_engines(
    kind: str, environ: dict[str, str], variable: str
) -> None:
    with pytest.raises(UserError) as caught:
        resolve_engine(kind, environ)
    for name in ("engine.kind", kind, variable, f"launch/accelerate/{kind}.yaml"):
        assert name in str(caught.value)


@pytest.mark.parametrize(
    "environ",
    [
        FSDP | {"FSDP_VERSION": "1"},
        ZERO2 | {"ACCELERATE_DEEPSPEED_ZERO_STAGE": "1"},
        PLAIN | {"ACCELERATE_USE_MEGATRON_LM": "true"},
    ],
)
def test_unsupported_launcher_setting_is_refused(environ: dict[str, str]) -> None:
    with pytest.raises(UserError, match="accelerate's file asks for"):
        resolve_engine("auto", environ)


def test_zero_stage_of_a_deepspeed_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text('{"zero_optimization": {"stage": 3}}')
    assert launcher_engine(ZERO2 | {"ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file)}) == "zero3"


@pytest.mark.parametrize("file", sorted(FILES.glob("*.yaml")), ids=lambda file: file.stem)
def test_accelerate_file_sets_only_launcher_options(file: Path) -> None:
    settings = YAML(typ="safe", pure=True).load(file)
    engine = {
        "ddp": ("MULTI_GPU", {}),
        "fsdp2": ("FSDP", {"fsdp_config": {"fsdp_version": 2}}),
        "zero2": ("DEEPSPEED", {"deepspeed_config": {"zero_stage": 2}}),
        "zero3": ("DEEPSPEED", {"deepspeed_config": {"zero_stage": 3}}),
    }
    kind, plugin = engine[file.stem]
    assert settings.pop("distributed_type") == kind
    assert {k: v for k, v in settings.items() if k.endswith("_config")} == plugin
    assert settings["mixed_precision"] == "no"  # the recipe's model.dtype
    assert settings["main_process_port"] == 0  # a free one: two runs never meet
