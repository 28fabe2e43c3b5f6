"""Imports point only to lower floors, and login-node packages import no torch."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2] / "dtrain"
FILES = sorted(ROOT.rglob("*.py"))

# From the ground up; parts of one floor do not import each other.
FLOORS: list[set[str]] = [
    {"core"},
    {"recipes"},
    {"config"},
    {"planning", "launching", "distributed", "extraction"},
    {"data", "models", "checkpoints", "monitoring", "samples", "supervisor"},
    {"methods", "objectives", "data_quality", "augmentation", "importing", "submitit_jobs"},
    {"engines", "merge", "serving"},
    {"evaluation"},
    {"training"},
    {"pipeline", "simulation", "sweep"},
    {"api", "cli", "train", "rank_main", "torchrun"},
    {"__init__", "__main__"},
]
HEIGHT = {package: number for number, floor in enumerate(FLOORS) for package in floor}
NO_TORCH = {"core", "recipes", "config", "planning", "launching", "supervisor", "submitit_jobs"}
HEAVY = {"torch", "transformers", "peft", "datasets", "deepspeed", "accelerate", "numpy"}


@cache
def tree(file: Path) -> ast.Module:
    return ast.parse(file.read_text(encoding="utf-8"))


def package(file: Path) -> str:
    """dtrain/config/load.py → config; dtrain/train.py → train."""
    return file.relative_to(ROOT).parts[0].removesuffix(".py")


def imported(node: ast.AST) -> Iterator[str]:
    """Modules that the imports under `node` name."""
    for child in ast.walk(node):
        if isinstance(child, ast.Import):
            yield from (name.name for name in child.names)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, "imports name their module in full"
            yield str(child.module)
            if child.module == "dtrain":
                yield from (f"dtrain.{name.name}" for name in child.names)


def packages_imported(file: Path) -> set[str]:
    names = [name.split(".") for name in imported(tree(file))]
    return {name[1] for name in names if name[0] == "dtrain" and len(name) > 1}


def test_every_package_has_a_floor() -> None:
    assert {package(file) for file in FILES} <= set(HEIGHT)


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_point_to_lower_floors(file: Path) -> None:
    importer = package(file)
    too_high = {
        p for p in packages_imported(file) - {importer} if HEIGHT[p] >= HEIGHT.get(importer, 0)
    }
    assert not too_high, f"{importer} may not import {too_high}"


@pytest.mark.parametrize("file", FILES, ids=lambda file: str(file.relative_to(ROOT)))
def test_imports_are_at_the_head_of_the_file(file: Path) -> None:
    if package(file) == "cli":  # verbs import what they need when they run
        return
    functions = (n for n in ast.walk(tree(file)) if isinstance(n, ast.FunctionDef))
    hidden = [name for function in functions for name in imported(function)]
    assert not hidden


@pytest.mark.parametrize("name", sorted(NO_TORCH))
def test_login_node_packages_need_no_torch(name: str) -> None:
    for file in (file for file in FILES if package(file) == name):
        heavy = {module.split(".")[0] for module in imported(tree(file))} & HEAVY
        assert not heavy, f"{file}: {heavy}"
