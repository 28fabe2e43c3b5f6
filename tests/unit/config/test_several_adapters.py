"""A stage with `adapters` becomes one stage per adapter, whose errors keep their lines."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.config.load import dump, load_recipe
from dtrain.core.errors import UserError, UserErrors

RECIPE = """\
name: x
model: {base: b}
stages:
  - name: domain
    kind: cpt
    method: {kind: lora}
    data: {sources: [{path: a.txt, format: text}]}
    train: {global_batch_size: 8, steps: 1}
  - name: task
    kind: sft
    method: {kind: lora, r: 4}
    data: {sequence_length: 64}
    adapters:
      legal:
        sources: [{path: legal.json, format: alpaca}]
      code:
        sources: [{path: code.json, format: alpaca}]
        replay: {path: general.json, format: alpaca}
    train: {global_batch_size: 8, steps: 2}
output: {folder: runs/x, merge: false}
"""


def load(tmp_path: Path, text: str, *overrides: str) -> object:
    (tmp_path / "x.yaml").write_text(text)
    return load_recipe(str(tmp_path / "x.yaml"), overrides)


def test_each_adapter_is_a_stage_on_the_model_before_them(tmp_path: Path) -> None:
    recipe = load(tmp_path, RECIPE, "stages.task.method.r=8")
    domain, legal, code = recipe.stages
    assert [s.name for s in recipe.stages] == ["domain", "task-legal", "task-code"]
    assert (legal.adapter_name, code.adapter_name) == ("legal", "code")
    assert legal.data.sources[0].path == "legal.json" and legal.data.replay is None
    assert code.data.sources[0].path == "code.json" and code.data.replay.path == "general.json"
    assert legal.data.sequence_length == code.data.sequence_length == 64
    assert legal.method == code.method and legal.method.r == 8 and legal.train == code.train
    assert [recipe.parent_of(s) for s in recipe.stages] == [None, domain, domain]
    assert [recipe.merges(s) for s in recipe.stages] == [True, False, False]
    assert load(tmp_path, dump(recipe)) == recipe


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        (
            "      code:\n",
            "      code: {}\n      x:\n",
            "x.yaml:16: stages.1.adapters.code must have",
        ),
        ("64}", "64, sources: []}", "move sources into the adapters"),
        ("code.json, format: alpaca", "code.json, formt: alpaca", "x.yaml:17: "),
        ("merge: false", "merge: true", "output.merge: several adapters of one base are not"),
        ("{kind: lora, r: 4}", "{kind: full}", "full trains no adapter"),
        ("      code:", "      domain:", "domain names something else too"),
        ("      code:", "      co/de:", "letters, digits, dots"),
        ("global_batch_size: 8, steps: 2", "global_batch_size: 8, steps: x", "x.yaml:19: "),
    ],
)
def test_errors_name_the_line(old: str, new: str, message: str, tmp_path: Path) -> None:
    assert old in RECIPE
    with pytest.raises((UserError, UserErrors)) as caught:
        load(tmp_path, RECIPE.replace(old, new))
    assert message in str(caught.value)


def test_a_stage_after_several_adapters_is_refused(tmp_path: Path) -> None:
    domain = RECIPE.split("  - name: task")[0].split("stages:\n")[1].replace("domain", "later")
    with pytest.raises(UserErrors, match="put the adapters at the end"):
        load(tmp_path, RECIPE.replace("output:", f"{domain}output:"))
