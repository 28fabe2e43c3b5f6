"""Files, tests, floors and parameters named in the documentation exist."""

from __future__ import annotations

import ast
import importlib.util
import re
from pathlib import Path
from types import ModuleType

import pytest

from dtrain.config.methods import TRAITS, QuantizableSettings, parse_method
from dtrain.config.objectives import OBJECTIVES
from dtrain.core.errors import Exit

ROOT = Path(__file__).parents[2]
IGNORED = {".venv", ".venv-lowest", ".git", "node_modules"}
PAGES = sorted(p for p in ROOT.rglob("*.md") if not IGNORED & set(p.relative_to(ROOT).parts))
LINK = re.compile(r"\]\((?!https?:|#)([^)#\s]+)")
FILE = re.compile(r"`((?:dtrain|tests|slurm|launch|ds_configs)/[\w./-]*\w(?:/|\.\w+))`")
CODE = re.compile(r"`(?:([A-Z]\w+)\.)?(\w+)\(\)`")  # `function()`, `Class.method()`
TEST = re.compile(r"`(?:([\w/]+/)?(test_\w+\.py))?::(test_\w+)")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_resolve(page: Path) -> None:
    missing = [
        link for link in LINK.findall(page.read_text("utf-8")) if not (page.parent / link).exists()
    ]
    assert not missing


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_named_by_a_page_exist(page: Path) -> None:
    text = page.read_text("utf-8")
    missing = [name for name in FILE.findall(text) if not (ROOT / name).exists()]
    assert not missing


def test_fault_table_names_existing_tests() -> None:
    defined = {
        name
        for file in (ROOT / "tests").rglob("test_*.py")
        for name in re.findall(r"def (test_\w+)", file.read_text("utf-8"))
    }
    page = (ROOT / "tests" / "README.md").read_text("utf-8")
    named = {name for *_, name in TEST.findall(page)}
    assert len(named) > 20
    assert named <= defined, sorted(named - defined)
    files = {file.name for file in (ROOT / "tests").rglob("test_*.py")}
    assert set(re.findall(r"test_\w+\.py", page)) <= files


def test_architecture_page_names_existing_functions() -> None:
    source = "\n".join(path.read_text("utf-8") for path in (ROOT / "dtrain").rglob("*.py"))
    classes = set(re.findall(r"^class (\w+)", source, re.MULTILINE))
    functions = set(re.findall(r"^ *def (\w+)", source, re.MULTILINE))
    named = CODE.findall((ROOT / "dtrain" / "README.md").read_text("utf-8"))
    assert len(named) > 20
    assert not {name for _, name in named} - functions
    assert not {owner for owner, _ in named if owner} - classes


@pytest.fixture(scope="module")
def floors() -> ModuleType:
    spec = importlib.util.spec_from_file_location(
        "floors", Path(__file__).with_name("test_floors.py")
    )
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_architecture_page_lists_the_floors(floors: ModuleType) -> None:
    page = (ROOT / "dtrain" / "README.md").read_text("utf-8")
    rows = re.findall(r"^\| (\d+) \| (`.*?) \|", page, re.MULTILINE)
    table = {int(number): set(re.findall(r"`(\w+)`", names)) for number, names in rows}
    expected = [floor for floor in floors.FLOORS if "__main__" not in floor]
    assert table == dict(enumerate(expected))


@pytest.mark.parametrize("name", ["CONTRIBUTING.md", "dtrain/README.md"])
def test_pages_list_what_needs_no_torch(name: str, floors: ModuleType) -> None:
    sentences = re.split(r"[.|]\s", (ROOT / name).read_text("utf-8"))
    (sentence,) = [s for s in sentences if re.search(r"neither\s+torch\s+nor\s+transformers", s)]
    assert set(re.findall(r"`(\w+)`", sentence)) == floors.NO_TORCH


def test_readme_explains_every_exit_status() -> None:
    page = (ROOT / "README.md").read_text("utf-8")
    table = page.partition("| exit status |")[2].partition("\n\n")[0]
    assert [int(status) for status in re.findall(r"^\| (\d+) \|", table, re.M)] == sorted(Exit)


def documented(node: ast.FunctionDef | ast.ClassDef, section: str) -> set[str]:
    """Names that a section of a docstring describes, such as `nodes, ranks: how many.`"""
    text = (ast.get_docstring(node) or "").partition(f"{section}:\n")[2].partition("\n\n")[0]
    heads = re.findall(r"^    (\S[^:\n]*):", text, re.MULTILINE)
    return {name.strip("*") for head in heads for name in head.split(", ")}


def parameters(function: ast.FunctionDef) -> set[str]:
    return {node.arg for node in ast.walk(function.args) if isinstance(node, ast.arg)}


def attributes(node: ast.ClassDef) -> set[str]:
    """Fields and methods of a class, and what it sets or reads of `self`."""
    names = {n.id for n in ast.walk(node) if isinstance(n, ast.Name)}
    names |= {n.attr for n in ast.walk(node) if isinstance(n, ast.Attribute)}
    return names | {n.name for n in ast.walk(node) if isinstance(n, ast.FunctionDef)}


def test_docstrings_name_existing_parameters_and_attributes() -> None:
    wrong, described = [], 0
    for file in (ROOT / "dtrain").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef):
                inits = [n for n in node.body if getattr(n, "name", "") == "__init__"]
                known = attributes(node).union(*map(parameters, inits))
                named = documented(node, "Args") | documented(node, "Attributes")
            elif isinstance(node, ast.FunctionDef):
                known, named = parameters(node), documented(node, "Args")
            else:
                continue
            described += len(named)
            wrong += [f"{file.name}, {node.name}: {name}" for name in named - known]
    assert described > 1000 and not wrong


def guide_table(head: str) -> dict[str, list[str]]:
    """The cells of a table of the guide after its first column, by the kind there."""
    page = (ROOT / "dtrain" / "recipes" / "GUIDE.md").read_text("utf-8")
    rows = page.partition(f"| `{head}` |")[2].partition("\n\n")[0].splitlines()[2:]
    cells = [[cell.strip() for cell in row.strip("|").split("|")] for row in rows]
    return {first.strip("`"): rest for first, *rest in cells}


def test_guide_has_a_row_for_every_method() -> None:
    table = guide_table("method.kind")
    assert table.keys() == TRAITS.keys(), "add the method to dtrain/recipes/GUIDE.md"
    for kind, (_, base, merges, _) in table.items():
        traits = TRAITS[kind]
        kept = "trains" if traits.trains_base else "4 bits" if traits.quantizes_base else "16 bits"
        if isinstance(parse_method({"kind": kind}), QuantizableSettings):
            kept = "16 or 4 bits"
        assert (base, merges) == (kept, "no" if traits.cannot_merge else "yes"), kind
    engines = (ROOT / "tests" / "golden" / "methods.txt").read_text().splitlines()[1:]
    assert not [line for line in engines if "refused" in line], "the guide says: all engines"


def test_guide_has_a_row_for_every_objective() -> None:
    words = {"text": "texts", "conversation": "conversations", "preference": "pairs"}
    table = guide_table("kind")
    assert table.keys() == OBJECTIVES.keys(), "add the objective to dtrain/recipes/GUIDE.md"
    for kind, (rows, _, others) in table.items():
        traits = OBJECTIVES[kind]
        contents = {words.get(content, "rated answers") for content in traits.contents}
        assert set(rows.split(", ")) == contents, kind
        assert (others == "reference") == traits.needs_reference, kind
        assert (others == "teacher") == traits.needs_teacher, kind
