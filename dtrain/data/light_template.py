"""Check on a login node, with jinja alone, whether a chat template ends turns."""

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
from dtrain.data.chat_templates import RENDER_SECONDS, ChatTemplate, LimitExceeded, resource_limits
from dtrain.data.conversations import Messages
from dtrain.data.end_of_turn import endings

SPECIALS = ("bos_token", "eos_token", "pad_token", "unk_token")


class _Generation(Extension):
    """`{% generation %}` blocks, which do not change the text."""

    tags = {"generation"}  # noqa: RUF012 (jinja's own protocol)

    def parse(self, parser: Parser) -> list[nodes.Node]:
        """The body of the block."""
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class LightTemplate(ChatTemplate):
    """A template rendered with jinja alone, which is enough to see how it ends a turn."""

    @cached_property
    def _compiled(self) -> Any:
        environment = ImmutableSandboxedEnvironment(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, "jinja2.ext.loopcontrols"],
        )
        environment.filters["tojson"] = lambda value, **options: json.dumps(
            value, **{"ensure_ascii": False, **options}
        )
        environment.globals["raise_exception"] = _raise
        return environment.from_string(self.source)

    def _rendered(self, messages: Messages, settings: dict[str, Any]) -> Any:
        return [self._compiled.render(messages=messages, **settings)], [[]]


def _raise(message: str) -> None:
    raise ValueError(message)


def closes_turns(setting: str, base: Path | None) -> bool | None:
    """Whether the recipe's `template` ends the turn of an answer.

    Args:
        setting: auto, instruction, or the path of a jinja file.
        base: the base model's folder, if it is on this machine.

    Returns:
        None if the template cannot be rendered here.
    """
    if setting == "instruction":
        return True  # `template_text` refuses tokenizers without an end-of-text token
    config = _read_json(base / "tokenizer_config.json") if base else {}
    text = _own_text(base, config) if setting == "auto" else _file_text(setting)
    if text is None:
        return None
    specials = {name: _token(config.get(name)) or f"<{name}>" for name in SPECIALS}
    try:
        with resource_limits(RENDER_SECONDS):
            known = endings(LightTemplate(text, tuple(sorted(specials.items()))))
            return known and any(known)
    except (Exception, LimitExceeded):  # `resolve_template` reports the error
        return None


def _own_text(base: Path | None, config: dict[str, Any]) -> str | None:
    if base and (base / "chat_template.jinja").is_file():
        return _file_text(str(base / "chat_template.jinja"))
    template = config.get("chat_template")
    if isinstance(template, list):
        named = (t.get("template") for t in template if t.get("name") == "default")
        template = next(named, None)
    return template if isinstance(template, str) else None


def _file_text(path: str) -> str | None:
    try:
        return read_text(local_path(path))
    except (OSError, UnicodeDecodeError, UserError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return content if isinstance(content, dict) else {}


def _token(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
