"""The recipe's JSON Schema, for editors that complete and check YAML files."""

from __future__ import annotations

from typing import Any

from dtrain.config.schema import Recipe
from dtrain.config.several_adapters import ADAPTERS, KEYS

_DIALECT = "https://json-schema.org/draft/2020-12/schema"


def json_schema() -> dict[str, Any]:
    """The schema of a recipe as a person writes it, with the `adapters` that loading expands."""
    schema = Recipe.model_json_schema()
    _allow_adapters(schema["$defs"]["Stage"], schema["$defs"]["Data"])
    return {"$schema": _DIALECT, **schema}


def _allow_adapters(stage: dict[str, Any], data: dict[str, Any]) -> None:
    """A stage has `data.sources`, or `adapters` whose entries have them."""
    stage["properties"][ADAPTERS] = {
        "description": "one stage per name, each with sources of its own",
        "type": "object",
        "minProperties": 1,
        "additionalProperties": {
            "type": "object",
            "additionalProperties": False,
            "required": ["sources"],
            "properties": {key: data["properties"][key] for key in KEYS},
        },
    }
    stage["required"].remove("data")
    data["required"].remove("sources")
    of_its_own = {"required": ["data"], "properties": {"data": {"required": ["sources"]}}}
    stage["anyOf"] = [of_its_own, {"required": [ADAPTERS]}]
