"""Assistant spans under the templates of common families and under hostile templates."""

from __future__ import annotations

from pathlib import Path

import pytest

from dtrain.core.errors import UserError
from dtrain.data.assistant_spans import render_answers
from dtrain.data.chat_templates import resolve_template
from dtrain.data.conversations import Conversation
from dtrain.data.end_of_turn import LightTemplate, end_of_turn

FAMILIES = Path(__file__).with_name("templates")
SYSTEM = {"role": "system", "content": "Be brief."}
TURNS = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "Four."},
    {"role": "user", "content": "And two?"},
    {"role": "assistant", "content": "Six."},
]
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "b": 2}}}
CALLING = [
    {"role": "user", "content": "Two and two?"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "4"},
    {"role": "assistant", "content": "Four."},
]
# family → target texts of the answers "Four." and "Six."
ENDS = {
    "chatml": "{}<|im_end|>",
    "smollm2": "{}<|im_end|>",
    "llama3": "{}<|eot_id|>",
    "qwen2.5": "{}<|im_end|>",
    "qwen3": "{}<|im_end|>",
    "mistral": " {}</s>",
    "gemma": "{}<end_of_turn>",
    "phi3": "{}<|end|>",
    "phi4": "{}<|im_end|>",
    "deepseek": "{}<｜end▁of▁sentence｜>",
    "mistral-tools": " {}</s>",
    "glm4": "{}",
    "command-r": "{}<|END_OF_TURN_TOKEN|>",
    "parts": "{}<|eot_id|>",
    "parts-only": "{}<|im_end|>",
    "reasoning": "{}<|im_end|>",
}
CLOSING = {"phi3": "\n</s>"}  # of the whole conversation


def target_texts(template, messages, train_on="all", tools=None):
    text, spans = render_answers(template, Conversation(messages, tools), "f:1", train_on)
    return [text[start:stop] for start, stop in spans]


def test_every_template_file_is_in_the_table() -> None:
    stems = {path.stem for path in FAMILIES.glob("*.jinja")}
    assert stems == {*ENDS, "harmony"}  # of gpt-oss, whose turns end in three ways


@pytest.mark.parametrize("family", [*ENDS, "harmony"])
def test_login_node_finds_the_same_turn_ends(template, family) -> None:
    family_template = template(family)
    light = LightTemplate(family_template.text, family_template.specials)
    assert light.render(Conversation([SYSTEM, *TURNS])) == family_template.render(
        Conversation([SYSTEM, *TURNS])
    )
    assert end_of_turn(light) == end_of_turn(family_template)


def without_empty_thought(answer: str) -> str:
    """Without the empty thought that Qwen 3 writes before the last answer only."""
    return answer.removeprefix("<think>\n\n</think>\n\n")


@pytest.mark.parametrize("system", [[], [SYSTEM]], ids=["plain", "system"])
@pytest.mark.parametrize("family", ENDS)
def test_answers_and_their_turn_ends_are_targets(template, family, system) -> None:
    texts = target_texts(template(family), [*system, *TURNS])
    assert [without_empty_thought(a) for a in texts] == [
        ENDS[family].format(t) for t in ("Four.", "Six.")
    ]


@pytest.mark.parametrize("family", ENDS)
def test_train_on_last_answer_only(template, family) -> None:
    (text,) = target_texts(template(family), TURNS, "last")
    assert without_empty_thought(text).removesuffix(CLOSING.get(family, "")) == ENDS[family].format(
        "Six."
    )
    assert target_texts(template(family), TURNS[:3], "last") == []


@pytest.mark.parametrize("family", ENDS)
def test_spaces_and_repeated_words_do_not_move_the_mask(template, family) -> None:
    same = [{"role": "user", "content": "Four."}, {"role": "assistant", "content": "Four.\n"}]
    (text,) = target_texts(template(family), same)
    text = without_empty_thought(text).removesuffix(CLOSING.get(family, ""))
    assert text.replace("\n", "") == ENDS[family].format("Four.")


QWEN_CALL = '<tool_call>\n{"name": "add", "arguments": {"a": 2, "b": 2}}\n</tool_call>'
CALLS = {
    "llama3": '{"name": "add", "parameters": {"a": 2, "b": 2}}<|eot_id|>',
    "qwen2.5": f"{QWEN_CALL}<|im_end|>",
    "qwen3": f"{QWEN_CALL}<|im_end|>",
}


@pytest.mark.parametrize("family", CALLS)
def test_tool_calls_are_targets_and_tool_results_are_not(template, family) -> None:
    ready = template(family)
    call, answer = target_texts(ready, CALLING, tools=TOOLS)
    assert call.strip() == CALLS[family]
    assert without_empty_thought(answer) == ENDS[family].format("Four.")
    text, _ = render_answers(ready, Conversation(CALLING, TOOLS), "f:1")
    assert '"type": "object"' in text and "4" in text


def test_template_that_expects_json_arguments_gets_json(template) -> None:
    text, _ = render_answers(template("deepseek"), Conversation(CALLING[:2]), "f:1", "last")
    assert '```json\n{"a": 2, "b": 2}\n```' in text


def test_ambiguous_tool_call_is_refused_with_a_fix(template) -> None:
    numbered = template("qwen3").text.replace(
        "message.role + '\\n' + content", "message.role + '\\n' + content + messages|string"
    )
    with pytest.raises(UserError, match="f:1: the chat template changes the answer") as error:
        target_texts(template(numbered), [*CALLING, *TURNS[2:]], tools=TOOLS)
    assert "train_on: last" in error.value.fix


@pytest.mark.parametrize("when", ["true", "messages | length > 3"], ids=["always", "later"])
@pytest.mark.parametrize(
    "harm",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{{ 'a' * 10 ** 11 }}",
        "{{ '%99999999999d' % 1 }}",
        "{% for a in range(9999) %}{{ 'a' * 100000 }}{% endfor %}",
        "{{ 9 ** (9 ** 9) }}",
        "{% set ns = namespace(x=['a']) %}{% for a in range(99) %}{% set ns.x = ns.x + ns.x %}"
        "{% endfor %}",
    ],
    ids=["endless", "huge", "padded", "long", "power", "doubling"],
)
def test_hostile_template_is_refused_with_a_reason(template, harm, when) -> None:
    text = f"{{% if {when} %}}{harm}{{% endif %}}" + (FAMILIES / "chatml.jinja").read_text()
    with pytest.raises(UserError) as error:
        target_texts(template(text), TURNS)
    assert any(limit in str(error.value) for limit in ("seconds", "memory", "characters"))


# What the user says and what tools say, with the end of the turn where it is that of an answer.
SAID = {
    "chatml": "{}<|im_end|>",
    "smollm2": "{}<|im_end|>",
    "llama3": "{}<|eot_id|>",
    "qwen2.5": "{}<|im_end|>",
    "qwen3": "{}<|im_end|>",
    "mistral": "{}",
    "gemma": "{}<end_of_turn>",
    "phi3": "{}<|end|>",
    "phi4": "{}<|im_end|>",
    "deepseek": "{}",
    "mistral-tools": "{}",
    "glm4": "{}",
    "command-r": "{}<|END_OF_TURN_TOKEN|>",
    "parts": "{}<|eot_id|>",
    "parts-only": "{}<|im_end|>",
    "reasoning": "{}<|im_end|>",
}
QUESTIONS = ["Two and two?", "And two?"]


@pytest.mark.parametrize("family", ENDS)
def test_user_turns_are_targets_if_configured(template, family) -> None:
    ready = template(family)
    said = [SAID[family].format(text) for text in QUESTIONS]
    assert target_texts(ready, TURNS, "user") == said
    both = [without_empty_thought(text) for text in target_texts(ready, TURNS, "all+user")]
    answers = [ENDS[family].format(text) for text in ("Four.", "Six.")]
    assert both == [said[0], answers[0], said[1], answers[1]]


def test_training_on_an_absent_role_changes_nothing(template) -> None:
    for family in ENDS:
        ready = template(family)
        assert target_texts(ready, TURNS, "all+tool") == target_texts(ready, TURNS, "all")


TOOL_RESULTS = {
    "llama3": "4",
    "qwen2.5": "4",
    "qwen3": "4",
}


@pytest.mark.parametrize("family", TOOL_RESULTS)
def test_tool_results_are_targets_if_configured(template, family) -> None:
    ready = template(family)
    texts = target_texts(ready, CALLING, "all+tool", TOOLS)
    assert texts[1] == TOOL_RESULTS[family]
    assert texts[::2] == target_texts(ready, CALLING, "all", TOOLS)
    everything = target_texts(ready, CALLING, "all+user+tool", TOOLS)
    assert everything == [SAID[family].format("Two and two?"), *texts]


def test_tool_results_are_targets_under_a_template_for_any_role(template) -> None:
    plain = [CALLING[0], {"role": "assistant", "content": "Adding."}, *CALLING[2:]]
    texts = target_texts(template("chatml"), plain, "all+tool")
    assert texts == ["Adding.<|im_end|>", "4<|im_end|>", "Four.<|im_end|>"]


def test_generation_tags_apply_only_to_answers(template) -> None:
    text = (
        "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' }}"
        "{% if message.role == 'assistant' %}{% generation %}{{ message.content + '<|im_end|>' }}"
        "{% endgeneration %}{% else %}{{ message.content + '<|im_end|>' }}{% endif %}{{ '\n' }}"
        "{% endfor %}"
    )
    ready = template(text)
    assert target_texts(ready, TURNS) == ["Four.<|im_end|>", "Six.<|im_end|>"]
    assert target_texts(ready, TURNS, "last") == ["Six.<|im_end|>"]
    assert target_texts(ready, TURNS, "user") == [f"{text}<|im_end|>" for text in QUESTIONS]


def test_instruction_and_input_are_targets_together(make_tokenizer) -> None:
    user = {"role": "user", "content": "Add\n\n2 2", "instruction": "Add", "input": "2 2"}
    ready = resolve_template("instruction", make_tokenizer(None))
    assert target_texts(ready, [user, TURNS[1]], "user") == ["Add\n\n### Input:\n2 2"]


def test_template_that_drops_a_turn_is_reported(template) -> None:
    deaf = "{% for m in messages %}{% if m.role != 'tool' %}{{ m.content }}{% endif %}{% endfor %}"
    with pytest.raises(UserError, match="message 3"):
        target_texts(template(deaf), CALLING, "all+tool")
