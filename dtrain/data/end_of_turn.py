"""What a chat template writes to end a turn, as a token or as a text.

A login node has no transformers, so `closes_turns` renders the template with jinja alone.
"""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateSyntaxError, nodes
from jinja2.ext import Extension
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from dtrain.core.cache_paths import local_path
from dtrain.core.errors import UserError
from dtrain.core.files import read_object, read_text
from dtrain.core.weight_files import processor_template
from dtrain.data.chat_templates import (
    RENDER_SECONDS,
    ChatTemplate,
    LimitExceeded,
    no_template_error,
    read_template,
    resource_limits,
    syntax_error,
)
from dtrain.data.conversations import Conversation, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

MORE_TEMPLATES = "additional_chat_templates"  # folder of a tokenizer with several
PROBE, ANSWER = "\U000f0000", "\U000f0001"  # private use characters, none of `template_fields`


@dataclass(frozen=True)
class StopCriterion:
    """What ends an answer: a token, a text, or neither if the template does not end turns.

    Attributes:
        token: id of a special token.
        text: for a template that ends turns with ordinary tokens.
    """

    token: int | None = None
    text: str | None = None

    @property
    def texts(self) -> list[str]:
        """The stop strings: none or one."""
        return [self.text] if self.text else []


def find_stop_criterion(
    template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> StopCriterion:
    """How a template ends a turn, with the tokens of a tokenizer."""
    try:
        with resource_limits(RENDER_SECONDS):
            ending = end_of_turn(template)
    except (Exception, LimitExceeded):  # the template refuses a plain exchange
        return StopCriterion()
    if not ending:
        return StopCriterion()
    known = {*tokenizer.get_added_vocab().values(), *tokenizer.all_special_ids}
    ids = tokenizer(ending, add_special_tokens=False).input_ids
    # Some tokenizers have added tokens for blanks, which also occur in answers.
    token = next((i for i in ids if i in known and str(tokenizer.decode([i])).strip()), None)
    return StopCriterion(token=token) if token is not None else StopCriterion(text=ending)


def find_ends(
    generation_config: Any, template: ChatTemplate, tokenizer: PreTrainedTokenizerBase
) -> tuple[list[int], list[str]]:
    """What ends an answer: tokens and texts of the model, the tokenizer and the template.

    Args:
        generation_config: of transformers.
    """
    stop, eos = find_stop_criterion(template, tokenizer), generation_config.eos_token_id
    ends = [*(eos if isinstance(eos, list) else [eos]), tokenizer.eos_token_id, stop.token]
    texts = [*(generation_config.stop_strings or []), *stop.texts]
    return sorted({end for end in ends if end is not None}), texts


def end_of_turn(template: ChatTemplate) -> str:
    """What the template writes after an answer, without trailing blanks; may be empty."""
    inner, last = endings(template) or ("", "")
    return inner if inner and (last.startswith(inner) or not last) else last


@lru_cache(maxsize=8)
def endings(template: ChatTemplate) -> tuple[str, str] | None:
    """What ends an answer in the middle of a conversation, and what ends the last answer.

    Returns:
        None if the template refuses a plain exchange, so that it is unknown.
    """
    first = [{"role": "user", "content": PROBE}, {"role": "assistant", "content": f"a{ANSWER}"}]
    text = _probed(template, first)
    more = _probed(template, [*first, {"role": "user", "content": PROBE}])
    if not text and not more:
        return None
    last = text.partition(ANSWER)[2].rstrip()
    before, middle = more.partition(PROBE)[0], more.partition(ANSWER)[2].partition(PROBE)[0]
    if text and middle.startswith(last):
        return last, last
    # Phi 3 ends the conversation with one more token: the end of a turn is then the text between
    # an answer and the header of the next question.
    same = common_prefix_length(before[::-1], middle[::-1])
    if inner := middle[: len(middle) - same].rstrip():
        return inner, last
    # gpt-oss ends its own preface in the same way, so this text is also before the first question;
    # but a conversation starts like every turn.
    begin = text.removeprefix(dict(template.specials).get("bos_token", ""))
    both = middle[: common_prefix_length(middle, text.partition(PROBE)[2])]
    sizes = range(len(both), 0, -1)
    head = next((size for size in sizes if begin.startswith(both[-size:])), 0)
    return both[: len(both) - head].rstrip(), last


def _probed(template: ChatTemplate, messages: Messages) -> str:
    try:
        return template.render(Conversation(messages))
    except Exception:  # for example, it accepts only one exchange
        return ""


def common_prefix_length(a: str, b: str) -> int:
    """Number of characters that both texts start with."""
    size = 0
    while size < min(len(a), len(b)) and a[size] == b[size]:
        size += 1
    return size


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


def check_template(setting: str, base: Path | None) -> None:
    """Check that the recipe's `template` exists and is jinja, as far as no tokenizer is needed.

    Args:
        setting: auto, instruction, or the path of a jinja file.
        base: the base model's folder, if it is on this machine.

    Raises:
        UserError: the file cannot be read, the text is not jinja, or `auto` finds no template.
    """
    if setting == "instruction":
        return
    if setting == "auto":
        config = _read_json(base / "tokenizer_config.json") if base else {}
        text = _own_text(base, config)
        if text is None and config and base and not (base / MORE_TEMPLATES).is_dir():
            raise no_template_error("template: auto")
    else:
        text = read_template(setting)
    try:
        _ = LightTemplate(text or "", ())._compiled
    except TemplateSyntaxError as error:
        raise syntax_error(error, setting) from error


def _own_text(base: Path | None, config: dict[str, Any]) -> str | None:
    if base and (base / "chat_template.jinja").is_file():
        return _file_text(str(base / "chat_template.jinja"))
    template = config.get("chat_template")
    if isinstance(template, list):
        named = (t.get("template") for t in template if t.get("name") == "default")
        template = next(named, None)
    if base and not isinstance(template, str):
        with suppress(UserError):
            return processor_template(base)
    return template if isinstance(template, str) else None


def _file_text(path: str) -> str | None:
    try:
        return read_text(local_path(path))
    except (OSError, UnicodeDecodeError, UserError):
        return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except UserError:
        return {}


def _token(value: Any) -> str | None:
    value = value.get("content") if isinstance(value, dict) else value
    return value if isinstance(value, str) else None
