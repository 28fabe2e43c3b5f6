"""What only the built model shows of a later stage is reported before the first one trains."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from peft import LoraConfig, get_peft_model
from transformers import LlamaConfig, LlamaForCausalLM, Olmo2Config, Olmo2ForCausalLM

from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.pipeline.input_checks import check_inputs
from dtrain.pipeline.stage_checks import check_stages

SIZES = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2,
}  # fmt: skip


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """check(method of the second stage, base, …) → None, or a UserError."""
    monkeypatch.chdir(tmp_path)
    LlamaForCausalLM(LlamaConfig(**SIZES)).save_pretrained("llama")
    Olmo2ForCausalLM(Olmo2Config(**SIZES)).save_pretrained("olmo2")

    def run(method: dict[str, Any], base: str = "llama", **train: Any) -> None:
        overrides = [f"stages.task.method={json.dumps(method)}", f"model.base={base}"]
        overrides += [f"stages.task.train.{key}={json.dumps(v)}" for key, v in train.items()]
        check_stages(load_recipe("tiny", overrides), Path(base))

    return run


def write_adapter(base: str, **settings: Any) -> str:
    model = get_peft_model(LlamaForCausalLM.from_pretrained(base), LoraConfig(**settings))
    model.save_pretrained("adapter")
    return "adapter"


LORA = {"kind": "lora", "r": 4, "alpha": 8}
FAULTS: dict[str, tuple[dict[str, Any], str, str]] = {
    "names of an unknown architecture": (
        LORA | {"target_modules": ["q_prj"]}, "olmo2", r"target_modules: no linear layer is"
    ),
    "whole modules": (
        LORA | {"modules_to_save": ["mlp"]}, "olmo2", r"modules_to_save: \S*mlp is no single"
    ),
    "rank": ({"kind": "pissa", "r": 33}, "llama", "r: .* singular values, fewer than"),
    "patterns": (LORA | {"rank_pattern": {"k_prj": 2}}, "olmo2", "rank_pattern: no layer"),
    "frozen": ({"kind": "full", "frozen_modules": ["hed"]}, "olmo2", "frozen_modules: 'hed' has"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_method_that_does_not_fit_the_base(fault: str, check: Callable[..., None]) -> None:
    method, base, message = FAULTS[fault]
    with pytest.raises(UserError, match=rf"stages\.task\.method\.\S*{message}"):
        check(method, base)


def test_rates_of_parameters_that_do_not_train(check: Callable[..., None]) -> None:
    with pytest.raises(UserError, match=r"learning_rate_scales: 'lora_A' has no effect"):
        check({"kind": "vera", "r": 8}, learning_rate_scales={"lora_A": 2.0})
    check({"kind": "vera", "r": 8}, learning_rate_scales={"vera_lambda_b": 2.0})


def test_an_adapter_with_other_layers(check: Callable[..., None]) -> None:
    folder = write_adapter("llama", r=4, lora_alpha=8, target_modules=["q_proj"])
    check(LORA | {"target_modules": ["q_proj"], "from_adapter": folder, "dropout": 0.0})
    with pytest.raises(UserError, match=r"tensors that the stage trains are not in it"):
        check(LORA | {"target_modules": ["q_proj", "v_proj"], "from_adapter": folder})


@pytest.mark.parametrize(
    "method",
    [
        LORA, {"kind": "qlora"}, {"kind": "dora"}, {"kind": "olora"}, {"kind": "adalora"},
        {"kind": "ia3"}, {"kind": "full"}, LORA | {"modules_to_save": ["embed_tokens", "lm_head"]},
    ],
    ids=str,
)  # fmt: skip
def test_every_method_is_attached_without_values(
    method: dict[str, Any], check: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("values are drawn")

    monkeypatch.setattr("dtrain.methods.added.blake2b", never)  # the seed of the values
    check(method)


def test_a_run_ends_before_the_first_stage_trains(tmp_path: Path) -> None:
    """The fault is one that `dtrain check` does not find."""
    fault = "stages.task.method={kind: pissa, r: 4000}"
    assert not check_inputs(load_recipe("tiny", [fault])).errors
    done = subprocess.run(
        [sys.executable, "-m", "dtrain", "run", "tiny", fault],
        cwd=tmp_path,
        env=os.environ | {"CUDA_VISIBLE_DEVICES": "", "NO_COLOR": "1"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 2
    assert "stages.task.method.r: model.layers.0" in done.stderr
    assert "singular values, fewer than the rank 4000" in done.stderr
    assert not list(tmp_path.glob("runs/tiny/*/metrics.jsonl"))
