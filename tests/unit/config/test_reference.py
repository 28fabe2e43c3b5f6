"""The reference page of recipe keys is generated from the schema and is current."""

from __future__ import annotations

from dtrain.config.reference import reference
from dtrain.recipes import FOLDER


def test_reference_page_matches_the_schema() -> None:
    page = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert page == reference(), "python -m dtrain.config.reference > dtrain/recipes/README.md"


def test_every_key_has_a_meaning() -> None:
    rows = [line.split(" | ") for line in reference().splitlines() if line.startswith("| `")]
    bare = [row[0] for row in rows if row[-1].strip(" |") == "" and row[0] != "| `kind`"]
    assert not bare
