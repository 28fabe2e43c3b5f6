"""`dtrain export`: llama.cpp's converter is run on a complete model, or its command printed."""

from __future__ import annotations

import shlex
from pathlib import Path

import pytest

from dtrain.cli.publish import export
from dtrain.core.errors import UserError
from dtrain.serving.gguf import CONVERTER, SCRIPT, check_output

FAKE = """\
import json, sys
out = sys.argv[sys.argv.index("--outfile") + 1]
open(out, "w").write("GGUF" + json.dumps(sys.argv[1:]))
sys.exit({status})
"""


@pytest.fixture
def converter(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The script that the variable names; without it, none is on the PATH."""
    path = tmp_path / "llama cpp" / SCRIPT
    path.parent.mkdir()
    path.write_text(FAKE.format(status=0))
    monkeypatch.setenv(CONVERTER, str(path))
    monkeypatch.setenv("PATH", "/nonexistent")
    return path


def test_converter_gets_the_merged_model(run: Path, converter: Path, tmp_path: Path) -> None:
    out = tmp_path / "it's.gguf"
    export(run, out, stage="domain")
    assert out.read_text().startswith("GGUF") and str(run / "domain" / "merged") in out.read_text()
    with pytest.raises(UserError, match="exists already"):
        export(run, out)


def test_a_failed_conversion_leaves_no_file(run: Path, converter: Path, tmp_path: Path) -> None:
    converter.write_text(FAKE.format(status=3))
    with pytest.raises(UserError, match="ended with status 3"):
        export(run, tmp_path / "x.gguf")
    assert [path.name for path in tmp_path.iterdir()] == [converter.parent.name]


def test_command_is_printed_without_a_converter(
    run: Path,
    converter: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv(CONVERTER)
    out = tmp_path / "a b; echo.gguf"
    with pytest.raises(UserError, match="is not installed"):
        export(run, out)
    words = shlex.split(capsys.readouterr().out)
    assert words[:3] == ["python", SCRIPT, str(run / "task" / "merged")]
    assert words[words.index("--outfile") + 1] == str(out)
    monkeypatch.setenv(CONVERTER, "/nonexistent/x.py")
    with pytest.raises(UserError, match="no such file"):
        export(run, out)


def test_output_is_a_new_gguf_file(tmp_path: Path) -> None:
    for path, message in ((tmp_path / "x", "does not end"), (tmp_path / "a" / "x.gguf", "folder")):
        with pytest.raises(UserError, match=message):
            check_output(path)
