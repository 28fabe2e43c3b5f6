"""No text of other people steers the terminal: names, keys, rows, logs and errors."""

from __future__ import annotations

import io
import json
import os
import pty
import re
import subprocess
import sys
from pathlib import Path

import pytest

from dtrain.cli.root import main
from dtrain.core.output import SafeText, visible

HOSTILE = "a\x1b[31mred\x1b]0;title\x07\x9b2K\x7f\u202eevil\u202c\u2066x\rY"
STEERING = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")
RECIPE = """
name: mine
model: {base: dtrain:tiny-llama}
stages:
  - name: task
    kind: sft
    data: {sequence_length: 64, sources: [{path: %s, format: alpaca}]}
    train: {global_batch_size: 4, learning_rate: 1.0e-3, steps: 1, micro_batch_size: auto}
evaluation: {sets: {%s: {kind: sft, sequence_length: 64, sources: [{path: %s, format: alpaca}]}}}
output: {folder: %s}
"""


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Files whose names and contents are hostile."""
    folder = tmp_path / f"{HOSTILE}d"
    (folder / "run" / "task").mkdir(parents=True)
    rows = folder / f"{HOSTILE}.jsonl"
    row = {"instruction": f"Why {HOSTILE}?", "output": f"Because {HOSTILE}, so.", HOSTILE: HOSTILE}
    bad = f'{{"instruction": "{HOSTILE}'
    rows.write_text("".join(f"{json.dumps(row)}\n" for _ in range(3)) + bad + "\n")
    quoted = json.dumps(str(rows)), json.dumps(HOSTILE), json.dumps(str(rows))
    recipe = RECIPE % (*quoted, json.dumps(str(folder / "run")))
    (folder / "good.yaml").write_text(recipe)
    (folder / "key.yaml").write_text(recipe + f"{json.dumps(HOSTILE)}: 1\n")
    (folder / "value.yaml").write_text(recipe + f"seed: {json.dumps(HOSTILE)}\n")
    (folder / "raw.yaml").write_text(recipe + f"{HOSTILE}: [\n")
    (folder / "run" / "recipe.yaml").write_text(recipe)
    (folder / "run" / "task" / "metrics.jsonl").write_text(f'{{"step": 1, "loss": "{HOSTILE}"\n')
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": HOSTILE}))
    (folder / "config.json").write_text(json.dumps({"model_type": HOSTILE}))
    return folder


def commands(folder: Path) -> list[list[str]]:
    run, rows = str(folder / "run"), str(folder / f"{HOSTILE}.jsonl")
    recipes = [str(folder / f"{name}.yaml") for name in ("good", "key", "value", "raw", HOSTILE)]
    files = [str(folder), str(folder / HOSTILE), run]
    return [
        *(["check", recipe] for recipe in recipes),
        *(["plan", recipe] for recipe in recipes),
        ["plan", recipes[0], f"model.base={HOSTILE}"],
        ["plan", recipes[0], "--gpu", HOSTILE],
        ["plan", recipes[0], f"{HOSTILE}=1"],
        ["run", recipes[1]],
        ["data", "show", rows],
        ["data", "scan", rows],
        ["data", "scan", rows, "--against", rows],
        ["data", "show", recipes[0], "--stage", HOSTILE],
        ["recipes", "copy", HOSTILE],
        ["model", "fetch", HOSTILE],
        ["import", recipes[0], str(folder / f"{HOSTILE}.out")],
        *([name, file] for name in ("report", "checkpoints", "adapters") for file in files),
        *(["watch", "--once", file] for file in files),
        *([name, file] for name in ("status", "logs", "verify") for file in files),
        ["compare", run, str(folder)],
        ["diff", str(folder), run],
        ["merge", str(folder), str(folder), str(folder / "out")],
        [HOSTILE],
        ["plan", f"--{HOSTILE}"],
    ]


def test_no_command_prints_a_control_character(folder, monkeypatch) -> None:
    shown = 0
    for arguments in commands(folder):
        raw = io.BytesIO()
        stream = SafeText(raw, encoding="utf-8", write_through=True)
        monkeypatch.setattr(sys, "argv", ["dtrain", *arguments])
        monkeypatch.setattr(sys, "stdout", stream)
        monkeypatch.setattr(sys, "stderr", stream)
        main()
        stream.flush()
        printed = raw.getvalue().decode()
        assert not STEERING.search(printed), (arguments, printed)
        assert "Traceback" not in printed, printed
        shown += "\u241b[31mred" in printed
    assert shown > 15  # the text itself is there


def test_a_real_terminal_gets_only_the_colors_that_dtrain_writes(tmp_path) -> None:
    code = (
        "from dtrain.core.output import protect_output; protect_output(); import sys; "
        "from dtrain.core.log import console, progress, say; from rich.text import Text; "
        f"bad = {HOSTILE!r}; print(bad); print(bad, file=sys.stderr); say(bad); "
        "console.print(Text(bad, style='red'))\n"
        "with progress(bad, 2) as bar: bar.advance(1, bad); say(bad); print(bad)"
    )
    outer, inner = pty.openpty()
    environment = {k: v for k, v in os.environ.items() if k != "NO_COLOR"} | {"TERM": "xterm"}
    process = subprocess.Popen(
        [sys.executable, "-c", code], stdout=inner, stderr=inner, env=environment
    )
    os.close(inner)
    data = b""
    try:
        while part := os.read(outer, 65536):
            data += part
    except OSError:  # the terminal is closed
        pass
    os.close(outer)
    assert process.wait() == 0
    text = re.sub("\x1b\\[[0-9;?]*[mKAhl]", "", data.decode()).replace("\r", "")
    assert not STEERING.search(text), text
    assert text.count("\u241b[31mred") >= 5 and "\x1b[31mred" not in data.decode()


@pytest.mark.parametrize("text", ["plain", "ünï 漢字\tand\nlines", "emoji 👩🏽\u200d🚀"])
def test_other_text_stays_as_it_is(text: str) -> None:
    assert visible(text) == text
