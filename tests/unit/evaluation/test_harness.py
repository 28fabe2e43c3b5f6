"""Tasks of the harness: what decides their scores, and what code they may run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import pytest

from dtrain.config.gates import Gate
from dtrain.config.tasks import Tasks
from dtrain.core.errors import UserError
from dtrain.evaluation.harness import load_tasks, read_metrics
from dtrain.evaluation.task_scorer import split_requests
from dtrain.monitoring.scores import Score
from tests.task_files import ANSWER, CHOICE, ROLLING, write_task


def load(folder: Path, *names: str, gates: dict[str, Gate] | None = None, **more: object):
    return load_tasks(Tasks(names=list(names), include_path=str(folder), **more), gates or {})


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "datasets")


@pytest.fixture
def no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    def connect(socket: object, address: object) -> None:
        pytest.fail(f"connects to {address}")

    monkeypatch.setattr("socket.socket.connect", connect)
    monkeypatch.setattr("socket.getaddrinfo", connect)


@pytest.mark.usefixtures("no_network")
def test_tasks_of_each_kind_load_and_have_fingerprints_of_their_rows(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "choice", CHOICE)
    write_task(folder, "rolling", ROLLING)
    write_task(folder, "answer", ANSWER)
    inputs = load(folder, "choice", "rolling", "answer").inputs
    assert len(set(inputs.values())) == 3
    again = load(folder, "choice", "rolling").inputs
    assert again["choice"] == inputs["choice"]
    assert load(folder, "choice", limit=5).inputs["choice"] != inputs["choice"]
    assert load(folder, "choice", num_fewshot=2).inputs["choice"] != inputs["choice"]
    (folder / "rows.jsonl").write_text((folder / "rows.jsonl").read_text().replace("fox", "ant"))
    changed = load(folder, "choice").inputs
    assert changed["choice"] != inputs["choice"]


CODE = "process_docs: !function rows.first\n"
TEMPLATE = "{{ ''.__class__.__mro__[1].__subclasses__() }}"


@pytest.fixture
def code_ran(tmp_path: Path) -> Path:
    """A file that the code next to the tasks writes when it is imported."""
    folder = tmp_path / "tasks"
    folder.mkdir()
    ran = tmp_path / "ran"
    lines = f"open({str(ran)!r}, 'w').close()\ndef first(rows):\n    return rows.select([0])\n"
    (folder / "rows.py").write_text(lines)
    return ran


def test_the_code_of_a_task_file_runs_only_if_trusted(tmp_path: Path, code_ran: Path) -> None:
    folder = write_task(tmp_path / "tasks", "quiz", CHOICE + CODE)
    with pytest.raises(UserError, match=r"runs the Python function rows\.first") as caught:
        load(folder, "quiz")
    assert "trust_remote_code" in caught.value.fix
    assert not code_ran.exists()
    assert load(folder, "quiz", trust_remote_code=True).leaves == {"quiz": ["quiz"]}
    assert code_ran.exists()


def test_a_template_reaches_no_internals(tmp_path: Path) -> None:
    rest = CHOICE.replace("{{sentence}}", TEMPLATE)
    folder = write_task(tmp_path / "tasks", "quiz", rest)
    with pytest.raises(UserError, match="quiz: it cannot be evaluated: SecurityError"):
        load(folder, "quiz")


GROUP = """\
group: both
task: [one, two]
aggregate_metric_list: [{metric: acc, aggregation: mean, weight_by_size: true}]
"""


def test_a_gate_names_a_metric_of_its_task_or_group(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "one")
    write_task(folder, "two")
    (folder / "both.yaml").write_text(GROUP)
    group = load(folder, "both", gates={"both": Gate(metric="acc", max_drop=0.1)})
    assert group.leaves == {"both": ["one", "two"]}
    with pytest.raises(UserError, match="no metric acc_nrom") as caught:
        load(folder, "one", gates={"one": Gate(metric="acc_nrom", max_drop=0.1)})
    assert "evaluation.gates.one.metric" in str(caught.value) and "acc_norm" in caught.value.fix
    (folder / "both.yaml").write_text(GROUP.rsplit("\n", 2)[0])
    with pytest.raises(UserError, match="group both has no score of its own") as caught:
        load(folder, "both")
    assert "one, two" in caught.value.fix


def test_a_task_that_executes_answers_is_refused(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "quiz", ANSWER + "unsafe_code: true\n")
    with pytest.raises(UserError, match="quiz executes code that the model writes"):
        load(folder, "quiz")


def test_a_metric_of_the_hub_is_code(tmp_path: Path) -> None:
    rest = ANSWER.replace("metric: chrf, aggregation: chrf", "metric: mauve, aggregation: mean")
    folder = write_task(tmp_path / "tasks", "quiz", rest)
    with pytest.raises(UserError, match="the metric mauve is Python code of the hub"):
        load(folder, "quiz")


def test_a_task_that_fails_says_so_before_the_training(tmp_path: Path) -> None:
    folder = write_task(tmp_path / "tasks", "quiz", CHOICE.replace("sentence", "sentenze"))
    with pytest.raises(UserError, match=r"names: quiz: it cannot be evaluated.*sentenze"):
        load(folder, "quiz")
    write_task(folder, "quiz")
    (folder / "rows.jsonl").unlink()
    with pytest.raises(UserError, match=r"names: quiz: .*rows\.jsonl"):
        load(folder, "quiz")


def test_rows_that_the_hub_would_have_name_the_command(tmp_path: Path, monkeypatch) -> None:
    rest = CHOICE + "dataset_name: null\n"
    folder = write_task(tmp_path / "tasks", "quiz", rest)
    text = (folder / "quiz.yaml").read_text().splitlines()
    lines = ["dataset_path: nobody/quiz" if x.startswith("dataset_path") else x for x in text]
    lines = [line for line in lines if not line.startswith("dataset_kwargs")]
    (folder / "quiz.yaml").write_text("\n".join(lines))
    monkeypatch.setattr("datasets.config.HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match=r"rows \(nobody/quiz\) are not on this machine") as caught:
        load(folder, "quiz")
    assert "dtrain data prepare" in caught.value.fix


def test_every_rank_gets_whole_contexts() -> None:
    requests = [SimpleNamespace(args=(f"question {n // 4}" * (n // 4), f"{n}")) for n in range(20)]
    shares = split_requests(requests, 3)
    assert sorted(index for share in shares for index in share) == list(range(20))
    for share in shares:
        assert all(len([i for i in share if i // 4 == n // 4]) == 4 for n in share)
    assert split_requests(requests[:4], 3) == [[0, 1, 2, 3], [], []]


def test_metrics_keep_their_direction_filter_and_rows() -> None:
    rows = [{"filter": "none", "acc": float(n % 2), "f1": (0, 1)} for n in range(4)]
    results = {
        "results": {
            "quiz": {
                "alias": "quiz",
                "sample_len": 4,
                "acc,none": 0.5,
                "acc_stderr,none": 0.1,
                "f1,none": 0.7,
                "f1_stderr,none": "N/A",
                "loss,strict": 2.0,
            }
        },
        "higher_is_better": {"quiz": {"acc": True, "f1": None, "loss": False}},
        "samples": {"quiz": rows},
    }
    assert read_metrics(results, "quiz", ["quiz"]) == {
        "acc": Score(0.5, 0.1, True, (0.0, 1.0, 0.0, 1.0), (1.0,) * 4),
        "f1": Score(0.7),
        "loss,strict": Score(2.0, None, False),
    }
