"""Samples are built once and atomically."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from types import SimpleNamespace

import pytest

from dtrain.core.cache_paths import sample_folder
from dtrain.core.errors import UserError
from dtrain.samples import ensure, general, make, python_docs


@pytest.fixture
def maker(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """A sample `toy` whose builder counts its calls and fails on request."""
    control = SimpleNamespace(calls=0, fails=None)

    def write(folder: Path) -> None:
        control.calls += 1
        (folder / "part").write_text("half")
        if control.fails is not None:
            raise control.fails
        (folder / "whole").write_text(f"made {control.calls}")

    monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path))
    monkeypatch.setattr(make, "SAMPLES", {"toy": ("toy", 1)})
    monkeypatch.setattr(make, "import_module", lambda _: SimpleNamespace(make=write))
    return control


def test_a_sample_is_built_once(maker: SimpleNamespace) -> None:
    assert ensure("toy") == ensure("toy") == sample_folder("toy")
    assert maker.calls == 1


def test_concurrent_calls_build_a_sample_once(maker: SimpleNamespace) -> None:
    threads = [threading.Thread(target=ensure, args=("toy",)) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert maker.calls == 1
    assert (sample_folder("toy") / "whole").read_text() == "made 1"


def test_a_failure_leaves_no_files_and_no_lock(maker: SimpleNamespace) -> None:
    maker.fails = OSError("No space left on device")
    with pytest.raises(UserError, match="No space left") as caught:
        ensure("toy")
    assert "DTRAIN_CACHE" in caught.value.fix
    assert [path.name for path in sample_folder("toy").parent.iterdir()] == [".lock"]
    maker.fails = None
    assert (ensure("toy") / "whole").is_file()


def test_an_old_version_is_rebuilt(maker: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ensure("toy")
    monkeypatch.setattr(make, "SAMPLES", {"toy": ("toy", 2)})
    assert (ensure("toy") / "whole").read_text() == "made 2"
    assert {path.name for path in sample_folder("toy").parent.iterdir()} == {".lock", "toy"}


def test_an_unknown_name_gets_a_suggestion() -> None:
    with pytest.raises(UserError, match="did you mean smollm2-135m") as caught:
        ensure("smollm-135m")
    assert caught.value.where == "dtrain:smollm-135m"
    with pytest.raises(UserError, match="choose from: smollm2-135m"):
        ensure("???")


def test_general_texts_are_not_those_that_samples_train_on(tmp_path: Path) -> None:
    general.make(tmp_path)
    lines = (tmp_path / "heldout.jsonl").read_text(encoding="utf-8").splitlines()
    texts = {json.loads(line)["text"] for line in lines}
    trained = {json.loads(line)["text"] for line in python_docs.GENERAL.read_text().splitlines()}
    assert len(texts) == len(lines) > 40 and not texts & trained
