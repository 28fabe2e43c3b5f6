"""A chat template as a login node can look at it: with jinja alone, without transformers."""

from __future__ import annotations

import json
from functools import cached_property
from pathlib import Path
from typing import Any

from jinja2 import nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dtrain.core.cache_paths import local_path
from dtrain.core.errors import UserError
from dtrain.core.files import read_text
from dtrain.data.chat_templates import RENDER_SECONDS, ChatTemplate
from dtrain.data.conversations import Messages
from dtrain.data.end_of_turn import endings
from dtrain.data.sandbox import LimitExceeded, resource_limits

SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")


class _Generation(Extension):
    """`{% generation %}` marks, which change nothing in the text."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own protocol)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class LightTemplate(ChatTemplate):
    """A template that renders with jinja alone; enough to see how it closes a turn."""

    @cached_property
    def _compiled(self) -> Any:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = lambda value, **how: json.dumps(
            value, **{"ensure_ascii": False, **how}
        )
        environment.globals["raise_exception"] = _raise
        return environment.from_string(self.source)

    def _rendered(self, messages: Messages, settings: dict[str, Any]) -> Any:
        return [self._compiled.render(messages=messages, **settings)], [[]]


def _raise(message: str) -> None:
    raise ValueError(message)


def closes_turns(setting: str, base: Path | None) -> bool | None:
    """Whether the recipe's `template` writes something behind an answer that ends its turn.

    Args:
        setting: auto, instruction, or the path of a jinja file.
        base: the base model's folder, if it is on this machine.

    Returns:
        None where the template cannot be read without more than this machine has.
    """
    if setting == "instruction":
        return True  # or it is refused for a tokenizer that cannot end a text
    config = _read_json(base / "tokenizer_config.json") if base else {}
    text = _own_text(base, config) if setting == "auto" else _file_text(setting)
    if text is None:
        return None
    specials = {name: _token(config.get(name)) or f"<{name}>" for name in SPECIALS}
    try:
        with resource_limits(RENDER_SECONDS):
            known = endings(LightTemplate(text, tuple(sorted(specials.items()))))
            return known and any(known)
    except (Exception, LimitExceeded):  # rendering it with transformers reports what is wrong
        return None


def _own_text(base: Path | None, config: dict[str, Any]) -> str | None:
    if base and (base / "chat_template.jinja").is_file():
        return _file_text(str(base / "chat_template.jinja"))
    own = config.get("chat_template")
    if isinstance(own, list):
        own = next((one.get("template") for one in own if one.get("name") == "default"), None)
    return own if isinstance(own, str) else None


def _file_text(path: str) -> str | None:
    try:
        return read_text(local_path(path))
    except (OSError, UnicodeDecodeError, UserError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _token(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
