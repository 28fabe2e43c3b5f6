"""Where in a rendered conversation the answers stand, or the turns of other roles.

Few chat templates mark their answers with `{% generation %}`; for the others the answers are found
by rendering the conversation with and without them.
"""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache

from dtrain.core.errors import UserError
from dtrain.data.conversations import Talk
from dtrain.data.limits import Limit, limits
from dtrain.data.templates import SECONDS, Span, Template

MARK = re.compile(r"\{%-?\s*generation\s*-?%\}")
BEGIN, END = "\ue000dtrain-begin\ue001", "\ue000dtrain-end\ue001"  # private use characters
PROBE = "dtrainprobe7f3a"  # for what a template may write as JSON: it reads the same there
REASON_CHARACTERS = 300  # of what a template says when it refuses a conversation

ROLES = {"all": "assistant", "last": "assistant"}  # else a part of `train_on` is the role itself


def render_answers(
    template: Template, talk: Talk, where: str, train_on: str = "all"
) -> tuple[str, list[Span]]:
    """A conversation as text, with the spans of the answers, ends of turn included.

    Args:
        template: of `resolve_template`.
        talk: messages and tools.
        where: file and line, for the message.
        train_on: of the recipe; `last` is the last answer, if the conversation ends with one.

    Raises:
        UserError: the template refuses the conversation, or changes its answers.
    """
    try:
        with limits(SECONDS):
            return _rendered_answers(template, talk, train_on)
    except UserError as error:
        raise UserError(error.what, where=where, fix=error.fix) from error
    except (Exception, Limit) as error:  # a template is a program: it can raise anything
        raise UserError(
            f"the chat template refuses this conversation: {_reason(error)}",
            where=where,
            fix="mend the row, or choose another `template`",
        ) from error


def _reason(error: BaseException) -> str:
    """What a template says, which may be the whole conversation."""
    text = str(error) or type(error).__name__
    return text if len(text) <= REASON_CHARACTERS else text[:REASON_CHARACTERS] + " …"


def _rendered_answers(template: Template, talk: Talk, train_on: str) -> tuple[str, list[Span]]:
    roles = [ROLES.get(part, part) for part in train_on.split("+")]
    learnt = [i for i, message in enumerate(talk.messages) if message["role"] in roles]
    if train_on == "last":
        learnt = [i for i in learnt if i == len(talk.messages) - 1]
    answers = [i for i in learnt if talk.messages[i]["role"] == "assistant"]
    others = [i for i in learnt if i not in answers]
    text, spans = _answers(template, talk, answers, train_on == "last")
    return text, sorted([*spans, *_others(template, talk, text, others)])


def _answers(
    template: Template, talk: Talk, learnt: list[int], last: bool
) -> tuple[str, list[Span]]:
    """The text, and the spans of these answers: all there are, or the last alone."""
    if MARK.search(template.text):
        text, spans = template.render_marked(talk)
        return text, (spans[-1:] if last else spans) if learnt else []
    text = template.render(talk)
    found = _by_prefix(template, talk, text, learnt)
    return text, _by_probe(template, talk, text, learnt) if found is None else found


def _others(template: Template, talk: Talk, text: str, learnt: list[int]) -> list[Span]:
    """What the user or a tool says, and the end of the turn where it ends as an answer does."""
    spans = []
    for index in learnt:
        if not talk.messages[index]["content"]:
            continue
        before, probe, after = _with_content(template, talk, index, PROBE).partition(PROBE)
        stop = len(text) - len(after)
        if not (probe and text.startswith(before) and text.endswith(after) and len(before) <= stop):
            raise _lost(index)
        ending = end_of_turn(template)
        spans.append((len(before), stop + len(ending) * text.startswith(ending, stop)))
    return spans


def _by_prefix(template: Template, talk: Talk, text: str, learnt: list[int]) -> list[Span] | None:
    """Each answer is what a rendering with it has beyond the prompt for it.

    None if the template writes earlier turns in another way once later ones follow.
    """
    spans = []
    for index in learnt:
        if index == 0:
            return None  # few templates render a prompt from nothing
        prompt = template.render(replace(talk, messages=talk.messages[:index]), prompt=True)
        last = index == len(talk.messages) - 1
        upto = text if last else template.render(replace(talk, messages=talk.messages[: index + 1]))
        if not (upto.startswith(prompt) and text.startswith(upto)):
            return None
        answer = _without_blank_end(upto[len(prompt) :], talk.messages[index]["content"])
        spans.append((len(prompt), len(prompt) + len(answer)))
    return spans


def _without_blank_end(answer: str, content: str) -> str:
    """The answer without the line break behind its end of turn: a model stops before it."""
    bare, core = answer.rstrip(), content.strip()
    content_end = answer.rfind(core) + len(core) if core else 0
    return bare if len(bare) > content_end else answer


def _by_probe(template: Template, talk: Talk, text: str, learnt: list[int]) -> list[Span]:
    """Each answer is found by rendering another one in its place; the end of turn is added."""
    ending = end_of_turn(template)
    spans = []
    for index in learnt:
        has_calls = bool(talk.messages[index].get("tool_calls"))
        start, stop = (_replaced if has_calls else _marked)(template, talk, text, index)
        blanks = len(text) - stop - len(text[stop:].lstrip())  # of an answer that ends with some
        if text.startswith(ending, stop + blanks):
            stop += blanks + len(ending)
        spans.append((start, stop))
    return spans


def _marked(template: Template, talk: Talk, text: str, index: int) -> Span:
    """Where an answer stands that is a text: rendered with marks around it, within its blanks."""
    content = talk.messages[index]["content"]
    core = content.strip()
    head, tail = content.split(core, 1) if core else (content, "")
    probed = _with_content(template, talk, index, f"{head}{BEGIN}{core}{END}{tail}")
    before, _, rest = probed.partition(BEGIN)
    answer, _, after = rest.partition(END)
    if before + answer + after != text:
        raise _lost(index)
    return len(before), len(before) + len(answer)


def _replaced(template: Template, talk: Talk, text: str, index: int) -> Span:
    """Where an answer with calls of tools stands: between what surrounds a text in its place."""
    before, _, after = _with_content(template, talk, index, BEGIN).partition(BEGIN)
    stop = len(text) - len(after)
    if not (text.startswith(before) and text.endswith(after) and len(before) <= stop):
        raise _lost(index)
    return len(before), stop


def _with_content(template: Template, talk: Talk, index: int, content: str) -> str:
    message = {**talk.messages[index], "content": content}
    for beside in ("tool_calls", "instruction", "input"):  # some templates print these instead
        message.pop(beside, None)
    messages = [*talk.messages[:index], message, *talk.messages[index + 1 :]]
    return template.render(replace(talk, messages=messages))


def _lost(index: int) -> UserError:
    return UserError(
        f"the chat template changes the answer in message {index + 1}, so it cannot be "
        "told from the prompt",
        fix="choose another `template`, or one with {% generation %} marks, or `train_on: last`",
    )


@lru_cache(maxsize=8)
def end_of_turn(template: Template) -> str:
    """What the template writes behind an answer, without blanks at its end."""
    first = [{"role": "user", "content": BEGIN}, {"role": "assistant", "content": f"a{END}"}]
    last = template.render(Talk(first)).partition(END)[2].rstrip()
    more = template.render(Talk([*first, {"role": "user", "content": BEGIN}]))
    before, middle = more.partition(BEGIN)[0], more.partition(END)[2].partition(BEGIN)[0]
    if middle.startswith(last):
        return last
    # Phi 3 closes the whole conversation with one more token: the end of a turn is then what
    # stands between an answer and the head of the next question.
    same = 0
    while same < min(len(before), len(middle)) and before[-1 - same] == middle[-1 - same]:
        same += 1
    return middle[: len(middle) - same].rstrip()
