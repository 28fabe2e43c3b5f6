"""`dtrain data extract`: files that a recipe can use, split by document and scanned."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from dtrain.cli.root import app
from dtrain.config.load import load_recipe
from dtrain.core.check_report import CheckReport
from dtrain.core.errors import UserError
from dtrain.data.check_rows import check_rows

TOPICS = [
    "engines", "brakes", "lights", "wheels", "seats", "doors", "mirrors", "pumps", "valves",
    "belts",
    "filters", "cables", "tires", "locks", "horns", "tanks", "gauges", "hinges", "springs",
    "bearings",
]  # fmt: skip


def page(topic: str) -> str:
    about = (
        f"The {topic} of the wagon need care: oil the {topic} twice, then test all {topic} again."
    )
    return (
        f"# Care of {topic}\n\n{about}\n\n## Tools for {topic}\n\nTake the {topic} key number "
        f"{len(topic)} from the {topic} box, and keep the {topic} dry while you work with them.\n"
    )


@pytest.fixture
def docs(tmp_path: Path) -> Path:
    folder = tmp_path / "docs"
    folder.mkdir()
    for topic in TOPICS:
        (folder / f"{topic}.md").write_text(page(topic))
    return folder


def run(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["data", "extract", *map(str, arguments)])


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_documents_are_on_one_side_each_time(docs, tmp_path) -> None:
    for name in ("a", "b"):
        done = run(docs, tmp_path / name, "--from", "markdown", "--held-out", 0.3)
        assert done.exit_code == 0, done.output
    files = {path.name for path in (tmp_path / "a").iterdir()}
    data = {f"{k}-{s}.jsonl" for k in ("domain", "task") for s in ("train", "heldout")}
    assert files == data | {"extract.json", "left-out.jsonl"}
    sides: dict[str, set[str]] = {"train": set(), "heldout": set()}
    for name in data:
        assert (tmp_path / "a" / name).read_bytes() == (tmp_path / "b" / name).read_bytes()
        sides[name.partition("-")[2].removesuffix(".jsonl")] |= {
            row["origin"].partition(":")[0] for row in rows(tmp_path / "a" / name)
        }
    assert not sides["train"] & sides["heldout"] and sides["heldout"]
    assert sides["train"] | sides["heldout"] == {f"{topic}.md" for topic in TOPICS}
    (docs / "engines.md").write_text(page("engines").replace("oil", "wash"))  # the name decides
    assert run(docs, tmp_path / "c", "--from", "markdown", "--held-out", 0.3).exit_code == 0
    summaries = [json.loads((tmp_path / n / "extract.json").read_text()) for n in ("a", "c")]
    assert summaries[0]["documents"] == summaries[1]["documents"]


def test_printed_lines_are_those_of_a_recipe(docs, tmp_path) -> None:
    out = tmp_path / "my 'rows': é"
    done = run(docs, out, "--from", "markdown")
    stages, sets = [], []
    for comment, line in re.findall(r"  # (.*)\n  (.*)\n", done.output):
        if kind := re.search(r"kind: (\w+)", comment):
            head = f"  - name: {kind[1]}\n    kind: {kind[1]}\n    method: {{kind: lora}}\n"
            stages.append(f"{head}    {line}\n    train: {{global_batch_size: 2, steps: 1}}\n")
        else:
            sets.append(f"    {line}\n")
    assert len(stages) == len(sets) == 2
    recipe = tmp_path / "r.yaml"
    head = "name: x\nmodel: {base: 'dtrain:tiny-llama'}\noutput: {folder: run}\n"
    text = f"{head}stages:\n{''.join(stages)}evaluation:\n  sets:\n{''.join(sets)}"
    recipe.write_text(text, encoding="utf-8")
    loaded = load_recipe(str(recipe))
    report = CheckReport()
    check_rows(loaded, report)
    report.raise_errors()
    assert loaded.stages[0].data.sources[0].path == str(out / "domain-train.jsonl")
    assert {s.kind for s in loaded.evaluation.sets.values()} == {"cpt", "sft"}


def test_copies_are_left_out_with_a_reason(docs, tmp_path) -> None:
    (docs / "v2").mkdir()
    for topic in TOPICS:
        (docs / "v2" / f"{topic}.md").write_text(page(topic))
    done = run(docs, tmp_path / "out", "--from", "markdown", "--held-out", 0.3)
    kept = [rows(tmp_path / "out" / f"domain-{side}.jsonl") for side in ("train", "heldout")]
    texts = [row["text"] for side in kept for row in side]
    assert sorted(texts) == sorted(map(page, TOPICS))  # each once, on one side
    assert "exact duplicates" in done.output and "rows that contain held-out data" in done.output
    left = rows(tmp_path / "out" / "left-out.jsonl")
    assert {reason for row in left for reason in row["reasons"]} >= {"exact_duplicate", "leak"}
    assert all(re.match(r"(v2/)?\w+\.md(:\d+)?$", row["origin"]) for row in left)
    assert str(tmp_path) not in (tmp_path / "out" / "left-out.jsonl").read_text()


def test_chats_are_masked_and_filtered(tmp_path) -> None:
    def talk(number: int) -> dict[str, Any]:
        question = f"My {TOPICS[number]} squeak since May, what can I do? {TOPICS[number]}@mail.de"
        answer = f"Oil the {TOPICS[number]} with two drops, and call again if they still squeak."
        messages = [{"role": "customer", "body": question}, {"role": "agent", "body": answer}]
        return {"id": number, "messages": messages, "rating": number % 2}

    export = tmp_path / "export.json"
    export.write_text(json.dumps({"chats": [talk(n) for n in range(20)]}))
    done = run(export, tmp_path / "out", "--from", "chats", "--keep", "rating=1")
    assert done.exit_code == 0, done.output
    assert "role in `role`, text in `body`" in done.output
    assert "customer → user: 20 messages" in done.output
    assert re.search(r"10 conversations that --keep rating=1 leaves out", done.output)
    assert re.search(r"10 e-mail addresses \(masked\)", done.output)
    kept = rows(tmp_path / "out" / "task-train.jsonl")
    kept += rows(tmp_path / "out" / "task-heldout.jsonl")
    assert {row["origin"] for row in kept} == {f"{export}#{n + 1} id={n}" for n in range(1, 20, 2)}
    assert "@mail.de" not in json.dumps(kept)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("[" * 100_000, "no rows remain"),
        ('{"a": 1}', "of a message"),
        ('{"messages": [{"role": "U1", "text": "a"}]}', "unknown roles: U1"),
        ('{"messages": [{"role": "user", "text": "a"}]}', "no rows remain"),
        ("\x00\x01", "no rows remain"),
    ],
)
def test_bad_exports_leave_nothing_behind(tmp_path, content, message) -> None:
    (tmp_path / "a.jsonl").write_text(content)
    done = run(tmp_path / "a.jsonl", tmp_path / "out", "--from", "chats")
    assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert [path.name for path in tmp_path.iterdir()] == ["a.jsonl"]


def test_existing_output_and_options_that_do_not_fit_are_refused(docs, tmp_path) -> None:
    (tmp_path / "out").mkdir()
    for arguments, message in (
        ([docs, tmp_path / "out", "--from", "markdown"], "exists already"),
        ([docs, tmp_path / "o", "--from", "markdown", "--keep", "a"], "need --from chats"),
        ([docs, tmp_path / "o", "--from", "chats", "--role", "a=boss"], "is not a role"),
        ([tmp_path / "x", tmp_path / "o", "--from", "chats"], "no such file"),
        ([docs, tmp_path / "o", "--from", "code"], "no .py files here"),
    ):
        done = run(*arguments)
        assert isinstance(done.exception, UserError) and message in str(done.exception)
    assert not (tmp_path / "o").exists() and not list((tmp_path / "out").iterdir())
