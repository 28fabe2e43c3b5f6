"""Metrics by rules of the recipe: a JSON schema, tool calls, a regular expression, a function."""

from __future__ import annotations

import inspect
import json
import sys
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from math import isfinite
from pathlib import Path
from typing import Any

import re2

from dtrain.config.generation import GenerationSet
from dtrain.core.cache_paths import local_path
from dtrain.core.errors import UserError, first_line
from dtrain.core.files import read_json
from dtrain.core.lazy_import import LazyModule, import_object
from dtrain.evaluation.metric import (
    Metric,
    MetricFailure,
    MetricResult,
    PromptRow,
    RowMetric,
    RowScores,
    means_of,
)

jsonschema: Any = LazyModule("jsonschema")
referencing: Any = LazyModule("referencing")

ARGUMENT_KEYS = ("arguments", "parameters")


class JsonValid(RowMetric):
    """Whether an answer is JSON, and valid by a schema if there is one."""

    def __init__(self, settings: GenerationSet, where: str) -> None:
        super().__init__(settings, where)
        self._schema: Any = None
        if settings.json_schema is not None:
            self._schema = _read_schema(settings.json_schema, f"{where}.json_schema")
            kind = jsonschema.validators.validator_for(self._schema)
            # an empty registry: a reference to a URL is not fetched
            self._validator = kind(self._schema, registry=referencing.Registry())

    def inputs(self) -> str:
        return json.dumps(self._schema)

    def score(self, row: PromptRow, answer: str) -> RowScores:
        try:
            value = json.loads(answer)
        except (ValueError, RecursionError):
            return {"json_valid": 0.0}
        if self._schema is None:
            return {"json_valid": 1.0}
        try:
            return {"json_valid": float(self._validator.is_valid(value))}
        except Exception as error:  # such as a reference to another file
            raise MetricFailure(f"the schema cannot be applied: {error}") from error


def _read_schema(path: str, where: str) -> Any:
    """A JSON schema.

    Raises:
        UserError: the file is missing, not JSON, or not a schema.
    """
    try:
        schema = read_json(local_path(path))
    except UserError as error:
        raise UserError(error.message, where=f"{where}: {path}", fix=error.fix) from error
    except OSError as error:
        fix = "correct the path"
        raise UserError(str(error.strerror), where=f"{where}: {path}", fix=fix) from error
    if not isinstance(schema, dict | bool):
        raise UserError("not a JSON schema: it is no object", where=f"{where}: {path}")
    try:
        jsonschema.validators.validator_for(schema).check_schema(schema)
    except jsonschema.exceptions.SchemaError as error:
        key = "/".join(map(str, error.absolute_path)) or "the file"
        message = f"not a JSON schema: {key}: {error.message}"
        raise UserError(message, where=f"{where}: {path}") from error
    return schema


class ToolCall(RowMetric):
    """Whether an answer makes the reference's calls: all names and arguments, in any order."""

    def check_row(self, row: PromptRow, rendered: str) -> None:
        expected = reference_calls(row)
        if expected and list(find_calls(rendered))[-len(expected) :] != expected:
            raise UserError(
                "the chat template writes this call in a way that tool_call cannot read: not as "
                "JSON with a name and arguments",
                where=row.location,
                fix="score the answers with `function` instead of tool_call",
            )

    def score(self, row: PromptRow, answer: str) -> RowScores:
        made, expected = (
            Counter(map(_dump, calls)) for calls in (find_calls(answer), reference_calls(row))
        )
        return {"tool_call": float(made == expected)}


def reference_calls(row: PromptRow) -> list[dict[str, Any]]:
    """Name and arguments of each call of a row's reference."""
    calls = (row.reference or {}).get("tool_calls") or []
    return [call for value in calls for call in _calls(value)]


def find_calls(text: str) -> Iterator[dict[str, Any]]:
    """Name and arguments of each call in an answer.

    Templates wrap calls in different tags, but most write them as JSON objects with `name` and
    `arguments` or `parameters`.
    """
    decoder, start = json.JSONDecoder(), 0
    while (start := _next_bracket(text, start)) >= 0:
        try:
            value, start = decoder.raw_decode(text, start)
        except (ValueError, RecursionError):
            start += 1
        else:
            yield from _calls(value)


def _next_bracket(text: str, start: int) -> int:
    indices = [index for bracket in "{[" if (index := text.find(bracket, start)) >= 0]
    return min(indices, default=-1)


def _calls(value: Any) -> Iterator[dict[str, Any]]:
    if isinstance(value, list):
        for item in value:
            yield from _calls(item)
    if not isinstance(value, dict):
        return
    if isinstance(value.get("function"), dict):
        value = value["function"]
    key = next((key for key in ARGUMENT_KEYS if key in value), None)
    if key is None or not isinstance(value.get("name"), str):
        return
    arguments = value[key]
    if isinstance(arguments, str):  # OpenAI writes them as JSON in a text
        with suppress(ValueError):
            arguments = json.loads(arguments)
    yield {"name": value["name"], "arguments": arguments}


def _dump(call: dict[str, Any]) -> str:
    return json.dumps(call, sort_keys=True)


class Regex(RowMetric):
    """Whether a pattern matches anywhere in an answer; in time linear in its length."""

    def __init__(self, settings: GenerationSet, where: str) -> None:
        super().__init__(settings, where)
        assert settings.regex is not None
        options = re2.Options()
        options.log_errors = False
        try:
            self._pattern = re2.compile(settings.regex, options)
        except re2.error as error:
            reason = error.args[0].decode() if isinstance(error.args[0], bytes) else error
            message = f"not a pattern of google-re2: {reason}"
            raise UserError(message, where=f"{where}.regex: {settings.regex}") from error

    def score(self, row: PromptRow, answer: str) -> RowScores:
        return {"regex": float(self._pattern.search(answer) is not None)}


class Function(Metric):
    """The mean of what a function of the user returns."""

    def __init__(self, settings: GenerationSet, where: str) -> None:
        super().__init__(settings, where)
        assert settings.function is not None
        self._function = import_function(settings.function, f"{where}.function")

    def inputs(self) -> str:
        try:
            return inspect.getsource(self._function)
        except (OSError, TypeError):  # not written in Python
            return ""

    def measure(self, rows: Sequence[PromptRow], answers: Sequence[str], run: Path) -> MetricResult:
        values: list[RowScores] = []
        errors: list[str] = []
        for row, answer in zip(rows, answers, strict=True):
            try:
                value = float(self._function(answer, row.reference_text, dict(row.columns)))
                if not isfinite(value):
                    raise ValueError(f"it returned {value}")
                values.append({"function": value})
            except (Exception, SystemExit) as error:
                values.append({"function": None})
                errors.append(f"{row.location}: {type(error).__name__}: {first_line(error)}")
        if errors:
            name = self.settings.function
            message = f"{name} failed for {len(errors)} of {len(rows)} answers; the first: "
            raise MetricFailure(message + errors[0])
        return means_of(values)


def import_function(path: str, where: str) -> Callable[..., Any]:
    """Import `package.module:name`; modules of the current folder can be imported too.

    Raises:
        UserError: it cannot be imported, or cannot be called with three arguments.
    """
    module, _, name = path.partition(":")
    if not module or not name.isidentifier():
        raise UserError(
            "not an import path", where=f"{where}: {path}", fix="write package.module:name"
        )
    if (folder := str(Path.cwd())) not in sys.path:
        sys.path.append(folder)
    try:
        function: Callable[..., Any] = import_object(path)
    except (Exception, SystemExit) as error:  # the module's own code runs
        message = f"cannot be imported: {type(error).__name__}: {first_line(error)}"
        fix = "name a module of the current folder, of PYTHONPATH, or that is installed"
        raise UserError(message, where=f"{where}: {path}", fix=fix) from error
    try:
        inspect.signature(function).bind("prediction", "reference", {})
    except (TypeError, ValueError) as error:
        message = f"cannot be called with (prediction, reference, row): {first_line(error)}"
        raise UserError(message, where=f"{where}: {path}") from error
    return function
