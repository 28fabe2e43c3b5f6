"""A config file of another tool, the recipe made from it, and what became of each of its keys."""

from __future__ import annotations

import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from dtrain.config.foreign_keys import answer, equivalent
from dtrain.config.schema_paths import path_of
from dtrain.core.errors import UserError

Outcome = Literal["same", "renamed", "computed", "changed", "default", "left out", "off"]
STAGE = "stages[]."
SWITCHES = {"yes": True, "on": True, "no": False, "off": False}  # YAML 1.1, which the tools read
SECRET = re.compile("(hub|hf|auth|access|api)_token|api_key|secret|password|webhook")
UNSET: tuple[Any, ...] = (None, "", [], {})


@dataclass(frozen=True)
class Note:
    """What became of a key.

    Attributes:
        key: in the tool's file, such as `datasets[0].type`; empty for a default of the tool.
        value: there.
        outcome: `changed` trains something else than the tool would; `off` was not set.
        path: of the recipe's key, such as `stages[].train.steps`.
        result: the value in the recipe.
        why: of a computed or changed value, or of a key that was left out.
    """

    key: str
    value: Any
    outcome: Outcome
    path: str = ""
    result: Any = None
    why: str = ""

    def __str__(self) -> str:
        value = "(a secret)" if SECRET.search(self.key) else _shown(self.value)
        old = f"{self.key}: {value}" if self.key else ""
        if not self.path:
            return f"{old}: {self.why}"
        if self.outcome in ("same", "renamed"):
            old = self.key
        arrow = f"{old} → " if old else ""
        return f"{arrow}{self.path}: {_shown(self.result)}" + (f" ({self.why})" if self.why else "")


@dataclass
class ForeignConfig:
    """The keys of a tool's file, or of a group in it.

    Attributes:
        tool: its name.
        path: the file.
        values: of the keys.
        prefix: of the keys in notes.
        recipe: the recipe so far, with one stage.
        notes: what became of the keys that were read.
        source: path of the source that a group of keys describes.
        expanded: keys whose groups have notes of their own.
    """

    tool: str
    path: Path
    values: dict[str, Any]
    prefix: str = ""
    recipe: dict[str, Any] = field(default_factory=lambda: {"stages": [{}]})
    notes: list[Note] = field(default_factory=list)
    source: str = STAGE + "data.sources[]."
    expanded: set[str] = field(default_factory=set)

    def group(self, key: str, values: dict[str, Any]) -> ForeignConfig:
        """A group of keys inside this one; it adds to the same recipe and notes."""
        return ForeignConfig(
            self.tool,
            self.path,
            values,
            f"{self.prefix}{key}.",
            self.recipe,
            self.notes,
            self.source,
            self.expanded,
        )

    def name(self, *keys: str) -> str:
        """The first of these keys that is set; empty if none is."""
        return next((key for key in keys if self.values.get(key) not in UNSET), "")

    def get(self, *keys: str) -> Any:
        """The value of the first of these keys that is set; None if none is."""
        value = self.values.get(self.name(*keys))
        return SWITCHES.get(value.lower(), value) if isinstance(value, str) else value

    def number(self, *keys: str) -> float | int | None:
        """The value of a key as a number, which may be written as a text; None if it is not set.

        Raises:
            UserError: it is something else; so do the next methods.
        """
        value = self.get(*keys)
        if value is None or value is False:
            return None
        return self._parsed(self.name(*keys), value)

    def numbers(self, key: str) -> list[float]:
        """A list of numbers, or a text of them with commas."""
        return [float(self._parsed(key, text)) for text in self.names(key)]

    def names(self, *keys: str) -> list[str]:
        """A list, or a text with commas, as a list of texts."""
        value = self.get(*keys)
        entries = value.split(",") if isinstance(value, str) else value
        if not entries:
            return []
        if not isinstance(entries, list) or any(isinstance(x, dict | list) for x in entries):
            raise self._wrong(self.name(*keys), "a list of texts")
        return [str(entry).strip() for entry in entries if str(entry).strip()]

    def paths(self, key: str) -> list[str]:
        """A path or a list of paths; at least one."""
        value = self.get(key)
        entries = [value] if isinstance(value, str) else value
        if not isinstance(entries, list) or not all(isinstance(x, str) for x in entries):
            raise self._wrong(key, "a path or a list of paths")
        return entries

    def mapping(self, key: str) -> dict[str, Any]:
        """A group of keys; empty if it is not set."""
        value = self.get(key)
        if value is not None and not isinstance(value, dict):
            raise self._wrong(key, "a group of keys")
        return value or {}

    def groups(self, key: str, *, text: str = "") -> list[ForeignConfig]:
        """A list of groups of keys, whose notes stand for the key's.

        Args:
            text: the key that a text stands for, where it may stand for a group.
        """
        value = self.get(key)
        entries = value if isinstance(value, list) else [] if value is None else [value]
        entries = [{text: x} if text and isinstance(x, str) else x for x in entries]
        if not all(isinstance(entry, dict) for entry in entries):
            raise self._wrong(key, "a list of groups of keys")
        self.expand(key)
        return [self.group(f"{key}[{number}]", entry) for number, entry in enumerate(entries)]

    def where(self, key: str) -> str:
        """The file and a key, for messages."""
        return f"{self.path}: {self.prefix}{key}"

    def _parsed(self, key: str, value: Any) -> float | int:
        if isinstance(value, int | float) and not isinstance(value, bool):
            return value
        try:
            number = float(value)
        except (TypeError, ValueError) as error:
            raise self._wrong(key, "a number") from error
        return int(number) if number.is_integer() else number

    def _wrong(self, key: str, expected: str) -> UserError:
        value = _shown(self.values.get(key))
        return UserError(f"must be {expected}, not {value}", where=self.where(key))

    def copy(self, *keys: str, path: str = "") -> None:
        """Take over the value of the first of these keys that is set, in the same unit."""
        if key := self.name(*keys):
            self.put(path or equivalent(key) or path_of(key), self.get(key), key)

    def put(self, path: str, value: Any, *keys: str, why: str = "", changed: bool = False) -> None:
        """Set a key of the recipe, and note it.

        Args:
            path: such as `model.base` or `stages[].train.steps`.
            value: to set.
            keys: of the tool, which decided it; none if its default did.
            why: how the value follows from the keys.
            changed: the tool would train something else.
        """
        self.assign(path, value)
        self.note(path, value, *keys, why=why, changed=changed)

    def assign(self, path: str, value: Any) -> None:
        """Set a key of the recipe that is noted elsewhere."""
        *groups, last = path.split(".")
        holder = self.recipe
        for name in groups:
            holder = holder["stages"][0] if name == "stages[]" else holder.setdefault(name, {})
        holder[last] = value

    def note(self, path: str, value: Any, *keys: str, why: str = "", changed: bool = False) -> None:
        """Note that keys decided a value of the recipe; as `put`, which also sets it."""
        present = [key for key in keys if self.values.get(key) not in UNSET]
        for key in present:
            last = path.rpartition(".")[2]
            outcome: Outcome = "changed" if changed else "computed"
            if self.get(key) == value and not why and not changed:
                outcome = "same" if key == last else "renamed"
            self._add(Note(key, self.values[key], outcome, path, value, why))
        if not present:
            self.notes.append(Note("", None, "changed" if changed else "default", path, value, why))

    def leave(self, *keys: str, why: str = "") -> None:
        """Say why the keys that are set are not taken over; default: the table of foreign keys."""
        for key in keys:
            if key not in self.values or self._is_noted(key):
                continue
            value = self.values[key]
            if self.get(key) in (*UNSET, False, "none", "no"):
                self._add(Note(key, value, "off"))
            else:
                self._add(Note(key, value, "left out", why=why or _answer(key)))

    def expand(self, key: str) -> None:
        """Have the notes of the keys in a group, or in a list of groups, stand for its key."""
        self.expanded.add(self.prefix + key)

    def leave_rest(self) -> None:
        """Leave out all keys that nothing has read."""
        self.leave(*self.values)

    def _add(self, note: Note) -> None:
        self.notes.append(replace(note, key=self.prefix + note.key))

    def _is_noted(self, key: str) -> bool:
        full = self.prefix + key
        return full in self.expanded or any(note.key == full for note in self.notes)

    @property
    def stage(self) -> dict[str, Any]:
        """The recipe's stage."""
        stage: dict[str, Any] = self.recipe["stages"][0]
        return stage


def _answer(key: str) -> str:
    if sentence := answer(key):
        return sentence
    path = equivalent(key) or path_of(key)
    return f"see {path}" if path else "dtrain has no such setting"


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, float):
        return f"{value:g}"
    text = str(value)
    return text if len(text) <= 60 else f"{text[:60]}…"
