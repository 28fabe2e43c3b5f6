"""Files of strangers: types, size and depth are checked where a file is read."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.yaml_document import parse_value, read_document
from dtrain.core.cache_paths import user_path
from dtrain.core.errors import UserError
from dtrain.core.file_types import Count, Number, check_type
from dtrain.core.files import MAX_BYTES, parse_json_lines, read_json, read_sealed, read_text
from dtrain.core.weight_files import read_header
from dtrain.launching.status import log_of, status
from dtrain.merge.adapter_tensors import AdapterFile
from dtrain.models.peft_format import WEIGHTS, read_adapter_config
from dtrain.monitoring.report import write_report
from dtrain.planning.architectures import read_config

DEEP = 200_000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * DEEP, "nested too deeply"),
        ("[" * 500 + "]" * 500, "nested too deeply"),
        ('{"a": "\\ud800"}', "surrogates not allowed"),
        ("9" * 5000, "digits"),
        ("{", "cannot be read"),
    ],
)
def test_json_that_cannot_be_used_is_refused(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "x.json"
    path.write_text(text)
    with pytest.raises(UserError, match=message) as caught:
        read_json(path)
    assert str(path) in str(caught.value)
    assert parse_json_lines(f'{text}\n{{"a": 1}}') == [{"a": 1}]


def test_what_is_no_file_of_limited_size_is_not_read(tmp_path: Path) -> None:
    large, pipe = tmp_path / "large", tmp_path / "pipe"
    with open(large, "wb") as file:
        file.truncate(MAX_BYTES + 1)
    os.mkfifo(pipe)  # would wait for a writer
    for path, message in (
        (large, "larger than"),
        (pipe, "not a file"),
        (Path("/dev/zero"), "not a file"),
        (tmp_path, "not a file"),
        (Path("a\0b"), "cannot be read"),
        (Path("a\ud800b"), "cannot be read"),
    ):
        with pytest.raises(UserError, match=message):
            read_text(path)
    with pytest.raises(UserError, match="not a file"):
        read_header(pipe)
    os.mkfifo(tmp_path / WEIGHTS)
    with pytest.raises(UserError, match=f"no {WEIGHTS}"):
        AdapterFile(tmp_path)


def test_a_sealed_file_with_a_number_that_is_not_finite(tmp_path: Path) -> None:
    path = tmp_path / "stage.json"
    path.write_text('{"a": NaN, "blake3": "0"}')
    with pytest.raises(UserError, match="was changed"):
        read_sealed(path)


@pytest.mark.parametrize(
    ("value", "kind", "key"),
    [
        ({"a": {"b": "1"}}, dict[str, dict[str, int]], "a.b"),
        ({"a": [1, -1]}, dict[str, list[Count]], "a.1"),
        ({"a": 1e308}, dict[str, Number], "a"),
        ({"a": float("inf")}, dict[str, Number], "a"),
        ({"a": 10**400}, dict[str, Number], "a"),
    ],
)
def test_the_key_of_a_wrong_type_is_named(value: Any, kind: Any, key: str) -> None:
    with pytest.raises(UserError, match=f"^FILE: {key}: "):
        check_type(value, kind, "FILE")


@pytest.mark.parametrize(
    "text",
    [
        "~nosuchuser/x",
        "x" * 256,
        "é" * 128,
        "/x" * 2048,
        "a\0b",
        "a\ud800",
    ],
)
def test_what_is_no_path_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="path"):
        user_path(text)
    with pytest.raises(UserError):
        read_document(user_path(text))


ALIASES = "a: &a [x, x, x, x, x, x, x, x, x]\n" + "".join(
    f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]\n"
    for before, name in zip("abcdefgh", "bcdefghi", strict=True)
)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: &a {<<: *a}", "not valid YAML"),
        ("name: !!binary aGVsbG8=", "a tag"),
        ("a: !!set {b}", "a tag"),
        ("a: !secret b", "a tag"),
        ("a: !!timestamp 2026-99-99", "not valid YAML"),
        ('a: "\\0"', "NUL"),
        ('a: "\\ud800"', "half of a surrogate pair"),
        (ALIASES, "too many values"),
        ("a: " + "[" * DEEP, "too large"),
        ("a: " + "[" * 1000, "nested too deeply"),
        ("a:\n" + "".join(" " * i + "b:\n" for i in range(1, 500)), "nested too deeply"),
        ("\n".join(f"key{i}: v" for i in range(300_000)), "too large"),
        ("a: " + "9" * 5000, "not valid YAML"),
        ("a: 0x" + "f" * 5000, "too large"),
    ],
)
def test_yaml_that_cannot_be_used_is_refused(text: str, message: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        parse_value(text, "FILE")
    assert str(caught.value).startswith("FILE")


def test_tags_of_plain_texts_are_read() -> None:
    assert parse_value("a: !!str 5\nb: 2026-11-30", "FILE") == {"a": "5", "b": "2026-11-30"}


def _attempt(**changes: Any) -> dict[str, Any]:
    plain = {"number": 1, "job": "17", "restart": 0, "nodes": ["a"], "log": "", "started": 1.7e9}
    return plain | changes


def _run(folder: Path, **files: Any) -> Path:
    (folder / "slurm").mkdir(parents=True)
    (folder / "recipe.yaml").write_text("name: x\nstages: [{name: domain}]\n")
    for name, content in files.items():
        path = folder / ("slurm" if name in ("attempts", "jobs") else ".") / f"{name}.json"
        path.write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    "change",
    [
        {"started": 1e300},
        {"started": "now"},
        {"nodes": 3},
        {"number": None},
        {"job": "-1;x"},
        {"ended": float("nan")},
        {"progress": []},
    ],
)
def test_a_wrong_record_of_attempts_is_named(tmp_path: Path, change: dict[str, Any]) -> None:
    run = _run(tmp_path / "run", attempts=[_attempt(**change)])
    with pytest.raises(UserError, match=f"attempts.json: 0.{next(iter(change))}"):
        status(run)


def test_only_a_file_in_the_run_folder_is_its_log(tmp_path: Path) -> None:
    outside, run = tmp_path / "secret", tmp_path / "run"
    outside.write_text("secret")
    inside = run / "slurm" / "job.log"
    _run(run, attempts=[_attempt(log=str(outside)), _attempt(log=str(run / "link"))])
    (run / "link").symlink_to(outside)
    assert log_of(run) is None
    inside.write_text("step 1")
    assert log_of(run) == inside


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("lineage", {"artifacts": {"name": 1}}),
        ("lineage", {"artifacts": [{"name": "../../x"}]}),
        ("lineage", {"artifacts": [{"name": "domain", "seconds": 1e300}]}),
        ("evaluation", {"losses": [1]}),
        ("evaluation", {"models": ["base"], "losses": {"a": {"base": "x"}}}),
        ("evaluation", {"models": ["x" * 300]}),
        ("evaluation", {"scores": {"base": {"a": {"f1": 1}}}}),
    ],
)
def test_a_report_names_a_file_of_the_wrong_shape(tmp_path: Path, name: str, content: Any) -> None:
    run = _run(tmp_path / "run", **{name: content})
    assert f"{name}.json cannot be read" in write_report(run).read_text()


@pytest.mark.parametrize(
    "change",
    [
        {"r": 0},
        {"r": "4"},
        {"lora_alpha": float("inf")},
        {"lora_alpha": 1e308},
        {"rank_pattern": []},
        {"rank_pattern": {"q_proj": 0}},
        {"rank_pattern": {"(": 4}},
        {"rank_pattern": {"(a(?=b))": 4}},
        {"alpha_pattern": {"q_proj": "x"}},
        {"peft_type": ["LORA"]},
        {"modules_to_save": 3},
        {"target_modules": {"a": 1}},
        {"target_parameters": 3},
        {"target_parameters": "experts.down_proj"},
        {"use_dora": "false"},
    ],
)
def test_a_wrong_adapter_config_is_refused(tmp_path: Path, change: dict[str, Any]) -> None:
    plain = {"peft_type": "LORA", "r": 4, "lora_alpha": 8}
    (tmp_path / "adapter_config.json").write_text(json.dumps(plain | change))
    with pytest.raises(UserError, match=r"adapter_config\.json: "):
        read_adapter_config(tmp_path)


@pytest.mark.parametrize("config", [{"n_layer": 10**9}, {"text_config": {"num_layers": 2000}}])
def test_more_layers_than_can_be_built_are_refused(tmp_path: Path, config: dict[str, Any]) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "llama"} | config))
    with pytest.raises(UserError, match=r"config\.json: n\w*_layers? is not below 2,000"):
        read_config(tmp_path / "config.json")


PLAIN = {"dtype": "F32", "shape": [2, 2], "data_offsets": [0, 16]}


@pytest.mark.parametrize(
    "entry",
    [
        {"shape": [2, 2], "data_offsets": [0, 16]},
        PLAIN | {"dtype": ["F32"]},
        PLAIN | {"shape": "2"},
        PLAIN | {"shape": [-2, -2]},
        PLAIN | {"shape": [2**40, 2**40]},
        PLAIN | {"shape": [2**70]},
        PLAIN | {"shape": [2, 3]},
        PLAIN | {"data_offsets": [0.0, 16.0]},
        PLAIN | {"data_offsets": [4, 16]},
        PLAIN | {"data_offsets": [0, 32]},
        PLAIN | {"data_offsets": [0]},
        [],
    ],
)
def test_a_wrong_safetensors_header_is_refused(tmp_path: Path, entry: Any) -> None:
    head = json.dumps({"a": entry}).encode()
    path = tmp_path / "x.safetensors"
    path.write_bytes(len(head).to_bytes(8, "little") + head + bytes(16))
    with pytest.raises(UserError, match=r"x\.safetensors: "):
        read_header(path)
