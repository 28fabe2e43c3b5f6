"""Conversations into the text a model sees, and where in it the answers stand.

Chat templates are jinja (transformers renders them in its sandbox). Few mark their answers with
`{% generation %}`; for the others the answers are found by rendering the conversation with and
without them.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from jinja2 import TemplateSyntaxError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from dtrain.core.errors import UserError
from dtrain.core.folders import local_path
from dtrain.data.formats import Messages

Span = tuple[int, int]  # characters from … to (excluded)

INSTRUCTION = """\
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
MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
# Some templates print today's date; data prepared tomorrow must not differ from today's.
FIXED_DATE = "{%- macro strftime_now(format) -%}26 Jul 2024{%- endmacro -%}"
BEGIN, END = "\ue000dtrain-begin\ue001", "\ue000dtrain-end\ue001"  # private use characters


@dataclass(frozen=True)
class Template:
    """A chat template and the special tokens it may print.

    Attributes:
        text: jinja, as a tokenizer would keep it.
        specials: (name, token) pairs, such as ("eos_token", "</s>").
    """

    text: str
    specials: tuple[tuple[str, str], ...]

    @property
    def source(self) -> str:
        """The jinja text that is rendered: `text` with its date fixed."""
        return FIXED_DATE + self.text if "strftime_now" in self.text else self.text

    def render(self, messages: Messages, *, prompt: bool = False) -> str:
        """The conversation as text; with `prompt`, up to where the next answer starts."""
        return self._render(messages, add_generation_prompt=prompt)[0][0]

    def render_marked(self, messages: Messages) -> tuple[str, list[Span]]:
        """The conversation as text, and what the template itself marks as generated."""
        texts, spans = self._render(messages, return_assistant_tokens_mask=True)
        return texts[0], [(start, stop) for start, stop in spans[0]]

    def _render(self, messages: Messages, **how: bool) -> Any:
        plain = [{k: v for k, v in message.items() if v is not None} for message in messages]
        settings: dict[str, Any] = {**dict(self.specials), **how}
        return render_jinja_template([plain], chat_template=self.source, **settings)


def template_text(setting: str, tokenizer: PreTrainedTokenizerBase) -> str:
    """The jinja text that the recipe's `template` stands for with this tokenizer.

    Args:
        setting: auto, instruction, or the path of a jinja file.
        tokenizer: of the base model.

    Raises:
        UserError: there is no such template.
    """
    if setting == "auto":
        return _own_template(tokenizer)
    if setting == "instruction":
        return _instruction(tokenizer)
    try:
        return local_path(setting).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(
            f"the template cannot be read: {error}",
            where=f"template: {setting}",
            fix="name a jinja file, or write `template: auto` or `template: instruction`",
        ) from error


def _own_template(tokenizer: PreTrainedTokenizerBase) -> str:
    own = tokenizer.chat_template
    if isinstance(own, dict):
        own = own.get("default")
    if not own:
        raise UserError(
            "the tokenizer has no chat template",
            where="data.template: auto",
            fix="write `template: instruction` (a base model), or name a jinja file",
        )
    return str(own)


def _instruction(tokenizer: PreTrainedTokenizerBase) -> str:
    if tokenizer.eos_token is None:
        raise UserError(
            "the tokenizer has no end-of-text token, so an answer would have no end",
            where="data.template: instruction",
            fix="set `eos_token` in the model's tokenizer_config.json",
        )
    bos = tokenizer.bos_token_id
    adds_bos = bos is not None and tokenizer("a").input_ids[:1] == [bos]
    return ("{{ bos_token }}" if adds_bos else "") + INSTRUCTION


def resolve_template(setting: str, tokenizer: PreTrainedTokenizerBase) -> Template:
    """The template a recipe asks for, ready to render.

    Raises:
        UserError: there is none, or it is not jinja.
    """
    specials = {k: str(v) for k, v in tokenizer.special_tokens_map.items() if isinstance(v, str)}
    template = Template(template_text(setting, tokenizer), tuple(sorted(specials.items())))
    try:
        template.render([{"role": "user", "content": "a"}])
    except TemplateSyntaxError as error:
        raise UserError(
            f"not a jinja template: {error.message}", where=f"template: {setting}:{error.lineno}"
        ) from error
    except Exception:  # a template may refuse this conversation and take others
        return template
    return template


def render_answers(template: Template, messages: Messages, where: str) -> tuple[str, list[Span]]:
    """A conversation as text, with the spans of the answers, ends of turn included.

    Args:
        template: of `resolve_template`.
        messages: role/content.
        where: file and line, for the message.

    Raises:
        UserError: the template refuses the conversation, or changes its answers.
    """
    try:
        if MARK.search(template.text):
            return template.render_marked(messages)
        text = template.render(messages)
        spans = _by_prefix(template, messages, text)
        return text, _by_probe(template, messages, text) if spans is None else spans
    except UserError as error:
        raise UserError(error.what, where=where, fix=error.fix) from error
    except Exception as error:  # a template is a program: it can raise anything
        raise UserError(
            f"the chat template refuses this conversation: {error}",
            where=where,
            fix="mend the row, or choose another `template`",
        ) from error


def _by_prefix(template: Template, messages: Messages, text: str) -> list[Span] | None:
    """Each answer is what a rendering with it has beyond the prompt for it.

    None if the template writes earlier turns in another way once later ones follow.
    """
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        if index == 0:
            return None  # few templates render a prompt from nothing
        prompt = template.render(messages[:index], prompt=True)
        last = index == len(messages) - 1
        upto = text if last else template.render(messages[: index + 1])
        if not (upto.startswith(prompt) and text.startswith(upto)):
            return None
        answer = _without_blank_end(upto[len(prompt) :], message["content"])
        spans.append((len(prompt), len(prompt) + len(answer)))
    return spans


def _without_blank_end(answer: str, content: str) -> str:
    """The answer without the line break behind its end of turn: a model stops before it."""
    bare, core = answer.rstrip(), content.strip()
    content_end = answer.rfind(core) + len(core) if core else 0
    return bare if len(bare) > content_end else answer


def _by_probe(template: Template, messages: Messages, text: str) -> list[Span]:
    """Each answer is found by rendering it between two marks; the end of turn is added."""
    ending = _end_of_turn(template)
    spans = []
    for index, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        probed = template.render([*messages[:index], _marked(message), *messages[index + 1 :]])
        before, _, rest = probed.partition(BEGIN)
        answer, _, after = rest.partition(END)
        if before + answer + after != text:
            raise UserError(
                f"the chat template changes the answer in message {index + 1}, so it cannot be "
                "told from the prompt",
                fix="choose another `template`, or one with {% generation %} marks",
            )
        length = len(answer) + (len(ending) if after.startswith(ending) else 0)
        spans.append((len(before), len(before) + length))
    return spans


def _marked(message: dict[str, Any]) -> dict[str, Any]:
    """The message with marks around its text, inside of blanks that a template may strip."""
    content = message["content"]
    core = content.strip()
    head, tail = content.split(core, 1) if core else (content, "")
    return {**message, "content": f"{head}{BEGIN}{core}{END}{tail}"}


@lru_cache(maxsize=8)
def _end_of_turn(template: Template) -> str:
    """What the template writes behind an answer, without blanks at its end."""
    probe = [{"role": "user", "content": "a"}, {"role": "assistant", "content": f"a{END}"}]
    return template.render(probe).partition(END)[2].rstrip()
