"""Chat templates: render a conversation as the text that a model sees.

Templates are jinja, rendered by transformers in its sandbox. They are untrusted programs, so time,
memory and the size of their output are limited.
"""

from __future__ import annotations

import json
import re
import resource
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError, TemplateSyntaxError

from dtrain.core.cache_paths import local_path
from dtrain.core.errors import UserError
from dtrain.core.files import read_text
from dtrain.core.lazy_import import LazyModule
from dtrain.data.conversations import Conversation, Messages

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

chat_template_utils = LazyModule("transformers.utils.chat_template_utils")

Span = tuple[int, int]  # character offsets: start, stop (excluded)

INTERNAL_KEYS = frozenset(
    ("train", "written_role", "parts")
)  # keys of dtrain in messages, which no template sees
PROBES = ("dtrainprobe7f3a", "dtrainprobe9c1e")

MAX_CHARACTERS = 1 << 24  # of a rendered conversation
RENDER_SECONDS = 1.5  # CPU time for all renderings of a conversation

INSTRUCTION = """\
{%- if tools -%}{{ raise_exception('the instruction template knows no tools') }}{%- endif -%}
{%- for message in messages -%}
{%- if message.role == 'system' -%}
{{ message.content + '\\n\\n' }}
{%- elif message.role == 'user' -%}
{{ '### Instruction:\\n' + (message.instruction or message.content) + '\\n\\n' }}
{%- if message.input -%}{{ '### Input:\\n' + message.input + '\\n\\n' }}{%- endif -%}
{%- elif message.role == 'assistant' -%}
{{ '### Response:\\n' + message.content + eos_token }}
{%- if not loop.last -%}{{ '\\n\\n' }}{%- endif -%}
{%- else -%}
{{ raise_exception('the instruction template knows the roles system, user and assistant') }}
{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{ '### Response:\\n' }}{%- endif -%}
"""
# Some templates print today's date; prepared data must not depend on the day.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template and the special tokens that it may print.

    Attributes:
        text: jinja, as in a tokenizer's files.
        specials: (name, token) pairs, such as ("eos_token", "</s>").
    """

    text: str
    specials: tuple[tuple[str, str], ...]

    @property
    def source(self) -> str:
        """The jinja text to render: `text` with a fixed date."""
        return FIXED_DATE + self.text if "strftime_now" in self.text else self.text

    @cached_property
    def _used_specials(self) -> dict[str, str]:
        """The special tokens that the template mentions; others would only cost time."""
        return {name: token for name, token in self.specials if name in self.text}

    @cached_property
    def cache(self) -> dict[Any, Any]:
        """Cached results about this template, for callers that render many conversations."""
        return {}

    @cached_property
    def accepts_blocks(self) -> bool:
        """Whether `content` may be a list of blocks with type and text."""
        return self._writes([{"type": "text", "text": text} for text in PROBES])

    @cached_property
    def accepts_text(self) -> bool:
        """Whether `content` may be a text; assumed if neither works in a test."""
        return not self.accepts_blocks or self._writes("".join(PROBES))

    def _writes(self, content: Any) -> bool:
        """Whether the template writes both probes, and no names of keys."""
        turns = [{"role": role, "content": content} for role in ("user", "assistant")]
        try:
            text = self._render(Conversation(turns), add_generation_prompt=False)[0]
        except Exception:  # for example, it adds a list to a text
            return False
        between = re.findall(f"{PROBES[0]}(.*?){PROBES[1]}", text, re.DOTALL)
        return len(between) == len(turns) and not any("type" in text for text in between)

    def adapt(self, conversation: Conversation) -> Conversation:
        """The conversation as this template reads it: blocks if needed, no internal keys."""
        if self.accepts_text and all(map(INTERNAL_KEYS.isdisjoint, conversation.messages)):
            return conversation
        return replace(
            conversation,
            messages=[self._adapt_message(message) for message in conversation.messages],
        )

    def _adapt_message(self, message: dict[str, Any]) -> dict[str, Any]:
        adapt = {key: value for key, value in message.items() if key not in INTERNAL_KEYS}
        texts = message.get("parts")
        if (
            isinstance(adapt["content"], str)
            and self.accepts_blocks
            and (texts or not self.accepts_text)
        ):
            texts = texts or [adapt["content"]]
            adapt["content"] = [{"type": "text", "text": text} for text in texts]
        return adapt

    def render(self, conversation: Conversation, *, prompt: bool = False) -> str:
        """The conversation as text; `prompt` appends the generation prompt."""
        return self._render(self.adapt(conversation), add_generation_prompt=prompt)[0]

    def render_with_spans(self, conversation: Conversation) -> tuple[str, list[Span]]:
        """The conversation as text, and the spans in the template's `{% generation %}` blocks."""
        text, spans = self._render(self.adapt(conversation), return_assistant_tokens_mask=True)
        return text, [(start, stop) for start, stop in spans[0]]

    def _render(self, conversation: Conversation, **options: bool) -> tuple[str, Any]:
        settings: dict[str, Any] = {**self._used_specials, **options, "tools": conversation.tools}
        try:
            texts, spans = self._rendered(conversation.messages, settings)
        except TypeError:
            if not any("tool_calls" in message for message in conversation.messages):
                raise
            # Most templates read the arguments of a call as an object, some (DeepSeek) as a text.
            texts, spans = self._rendered(_with_json_arguments(conversation.messages), settings)
        if len(texts[0]) > MAX_CHARACTERS:
            raise LimitExceeded(f"the text has more than {MAX_CHARACTERS:,} characters")
        return texts[0], spans

    def _rendered(self, messages: Messages, settings: dict[str, Any]) -> Any:
        return chat_template_utils.render_jinja_template(
            [messages], chat_template=self.source, **settings
        )


def _with_json_arguments(messages: Messages) -> Messages:
    """The messages with the arguments of every call as JSON text."""
    converted = []
    for message in messages:
        calls = [
            {**call, "function": {**call["function"], "arguments": _json(call["function"])}}
            for call in message.get("tool_calls", [])
        ]
        converted.append({**message, "tool_calls": calls} if calls else message)
    return converted


def _json(function: dict[str, Any]) -> str:
    arguments = function["arguments"]
    return arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)


def template_text(setting: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The jinja text that the recipe's `template` stands for with this tokenizer.

    Args:
        setting: auto, instruction, or the path of a jinja file.
        tokenizer: of the base model.

    Raises:
        UserError: the template does not exist.
    """
    if setting == "auto":
        return _own_template(tokenizer)
    if setting == "instruction":
        return _instruction(tokenizer)
    return read_template(setting)


def read_template(path: str) -> str:
    """The text of a jinja file.

    Raises:
        UserError: it cannot be read.
    """
    try:
        return read_text(local_path(path))
    except UserError as error:
        raise UserError(
            f"the template cannot be used: {error.message}",
            where=f"template: {path}",
            fix=error.fix
            or "name a jinja file, or write `template: auto` or `template: instruction`",
        ) from error


def no_template_error(where: str = "data.template: auto") -> UserError:
    """The error of a base without a chat template."""
    return UserError(
        "the tokenizer has no chat template",
        where=where,
        fix="set `template: instruction` (for a base model), or name a jinja file",
    )


def syntax_error(error: TemplateSyntaxError, setting: str) -> UserError:
    """The error of a template that is not jinja; `setting` is the recipe's."""
    where = f"template: {setting}:{error.lineno}"
    return UserError(f"not a jinja template: {error.message}", where=where)


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    template = tokenizer.chat_template
    if isinstance(template, dict):
        template = template.get("default")
    if not template:
        raise no_template_error()
    return str(template)


def _instruction(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise UserError(
            "the tokenizer has no end-of-text token, so answers would have no end",
            where="data.template: instruction",
            fix="set `eos_token` in the model's tokenizer_config.json",
        )
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return ("{{ bos_token }}" if adds_bos else "") + INSTRUCTION


def resolve_template(setting: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """Load the template of a recipe.

    Raises:
        UserError: it does not exist, is not jinja, or exceeds the limits.
    """
    specials = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    template = ChatTemplate(template_text(setting, tokenizer), tuple(sorted(specials.items())))
    try:
        with resource_limits(RENDER_SECONDS):
            template.render(Conversation([{"role": "user", "content": "a"}]))
    except LimitExceeded as error:
        fix = "use another template: this one does not terminate, or is malicious"
        raise UserError(f"the template: {error}", where=f"template: {setting}", fix=fix) from error
    except TemplateSyntaxError as error:
        raise syntax_error(error, setting) from error
    except Exception:  # a template may refuse this conversation and accept others
        pass
    return template


def answering_template(setting: str, tokenizer: PreTrainedTokenizerBase) -> ChatTemplate:
    """The template of conversations; that of instructions for a model without one of its own."""
    if setting == "auto" and not tokenizer.chat_template:
        setting = "instruction"
    return resolve_template(setting, tokenizer)


def render_prompt(template: ChatTemplate, conversation: Conversation) -> str:
    """The text that a model continues with its answer to a conversation.

    Raises:
        UserError: the template refuses the conversation.
    """
    try:
        with resource_limits(RENDER_SECONDS):
            return template.render(conversation, prompt=True)
    except (TemplateError, TypeError, LimitExceeded) as error:
        raise UserError(f"the chat template refuses it: {error}") from error


EXTRA_BYTES = 1 << 28  # beyond what the process has mapped already
_PAGE = resource.getpagesize()


class LimitExceeded(BaseException):
    """The code exceeded a limit; a BaseException, so that it cannot catch it by accident."""


@contextmanager
def resource_limits(seconds: float) -> Iterator[None]:
    """Run a block within bounds; one that exceeds them raises `LimitExceeded`.

    Args:
        seconds: of CPU time, so that a busy machine does not change what is refused.

    Signals reach only the main thread; in other threads nothing is limited.
    """
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def stop(*_: object) -> None:
        raise LimitExceeded(f"takes more than {seconds:g} seconds")

    earlier = signal.signal(signal.SIGPROF, stop)
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (_bound(soft), hard))
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        yield
    except MemoryError as error:
        raise LimitExceeded("asks for too much memory") from error
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))
        signal.signal(signal.SIGPROF, earlier)


def _bound(soft: int) -> int:
    try:
        with open("/proc/self/statm", "rb", buffering=0) as file:  # read for each conversation
            mapped = int(file.read(32).split()[0]) * _PAGE
    except OSError:  # no /proc: a limit that is not above what is mapped could stop any template
        return soft
    limit = mapped + EXTRA_BYTES
    return limit if soft == resource.RLIM_INFINITY else min(soft, limit)
