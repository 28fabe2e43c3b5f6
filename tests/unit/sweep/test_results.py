"""The table, the page and the pictures of a sweep."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest

from dtrain.config.sweep import Sweep
from dtrain.core.errors import UserError
from dtrain.sweep.page import render_page
from dtrain.sweep.record import SeedRun, SweepDir, SweepRecord, Trial, read_record
from dtrain.sweep.results import lead, short_names, summary, table
from dtrain.sweep.search import Search

RATE, TEMPLATE = "stages.task.train.learning_rate", "stages.task.data.template"
HOSTILE = "<script>alert(1)</script>.jinja"


def trial(number: int, state: str, losses: list[float | None], **more: Any) -> Trial:
    runs = [
        SeedRun(name=f"trials/{number:04d}-seed-{seed}", seed=seed, value=loss, seconds=4.0)
        for seed, loss in enumerate(losses)
    ]
    values = {RATE: 10.0 ** -(number + 1), TEMPLATE: HOSTILE if number % 2 else "auto"}
    return Trial(number=number, parameters=values, state=state, runs=runs, **more)


@pytest.fixture
def record() -> SweepRecord:
    sweep = Sweep(
        recipe="tiny",
        parameters={RATE: "log(1e-8, 1)", TEMPLATE: ["auto", HOSTILE]},
        seeds=2,
        prune="median",
    )
    failed = trial(4, "failed", [None])
    failed.runs[0].reason = "out of memory: <b>CUDA</b>"
    trials = [
        trial(0, "complete", [2.0, 2.2], points=[(2, 3.0), (4, 2.5)]),
        trial(1, "pruned", [None], points=[(2, 4.0)]),
        trial(2, "complete", [1.9, 2.1], points=[(2, 2.9), (4, None)]),
        trial(3, "complete", [2.5, 2.4]),
        failed,
        trial(5, "complete", [2.6, 2.8]),
    ]
    settings = sweep.model_dump(mode="json")
    return SweepRecord(settings=settings, recipe="", working="/", trials=trials, best=2)


def test_table_has_the_best_first_with_mean_and_spread(record: SweepRecord) -> None:
    head, *rows = table(record)
    assert head[:5] == ["trial", "loss", "± seeds", "learning_rate", "template"]
    assert [row[0] for row in rows] == ["2", "0", "3", "5", "1", "4"]
    assert rows[0][1:4] == ["2.0000", "0.1414", "0.001"]
    assert rows[4][-1] == "pruned at step 2, loss 4.0000" and rows[5][-1].startswith("out of")
    assert re.search(r"trial 2 against trial 0: -0.1000 ± 0.0000, not noise", lead(record))
    record.trials[2].runs[1].value = 2.4
    assert "may be noise" in lead(record)
    assert "6 trials: 4 complete, 1 pruned, 1 failed" in summary(record, SweepDir(Path("/x")))


def test_page_is_one_file_in_which_all_text_is_escaped(record: SweepRecord) -> None:
    page = render_page(record, SweepDir(Path("/nowhere/a&b")))
    assert "<script" not in page and "&lt;script&gt;" in page and "<b>CUDA" not in page
    assert page.count("data:image/svg+xml;base64,") == 2
    assert not re.search(r'(src|href)="(?!data:)', page)
    assert "a&amp;b" in page and "PED-ANOVA" in page
    empty = record.model_copy(update={"trials": [], "best": None})
    assert "data:image" not in render_page(empty, SweepDir(Path("/nowhere")))


def test_importance_of_a_parameter_with_one_value_is_nothing(record: SweepRecord) -> None:
    for each in record.trials:
        each.parameters[TEMPLATE] = "auto"
    sweep = Sweep.model_validate(
        record.settings | {"parameters": {RATE: "log(1e-8, 1)", TEMPLATE: ["auto"]}}
    )
    shares = Search(sweep).importances(record.trials)
    assert shares[RATE] == pytest.approx(1.0) and shares[TEMPLATE] == pytest.approx(0.0)


def test_short_names_tell_keys_apart() -> None:
    keys = ["stages.a.train.learning_rate", "stages.b.train.learning_rate", "stages.b.method.r"]
    assert short_names(keys) == ["a.train.learning_rate", "b.train.learning_rate", "r"]


def test_a_record_that_leaves_its_folder_is_refused(record: SweepRecord, tmp_path: Path) -> None:
    folder = SweepDir(tmp_path)
    record.trials[0].runs[0].name = "trials/../../elsewhere"
    record.write(folder)
    with pytest.raises(UserError, match="is not the record of a sweep"):
        read_record(folder)
