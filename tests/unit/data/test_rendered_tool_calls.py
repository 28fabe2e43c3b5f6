"""Reasoning and tool calls are rendered with complete targets, or refused by name."""

from __future__ import annotations

import pytest

from dtrain.core.errors import UserError
from tests.unit.data.turns import ASKED, CALL, RESULT, TOOLS, assistant_turn

# Reasoning


def thoughts(form, *answers):
    """A conversation whose answers have reasoning R1, R2, … in one of the ways rows write it."""
    turns = []
    for number, answer in enumerate(answers, start=1):
        thought = f"R{number}"
        fields = {"content": f"<think>\n{thought}\n</think>\n\n{answer}"}
        if form == "parts":
            fields = {"content": [{"type": "reasoning", "value": thought}, answer]}
        elif form != "inside":
            fields = {"content": answer, form: thought}
        turns += [ASKED, {"role": "assistant", **fields}]
    return turns


ROW_FORMATS = ["reasoning_content", "reasoning", "thinking", "parts"]
LAST = {
    "reasoning": "<think>\nR2\n</think>\n\nSix.<|im_end|>",
    "harmony": "<|channel|>analysis<|message|>R2<|end|><|start|>assistant<|channel|>final"
    "<|message|>Six.<|return|>",
}


@pytest.mark.parametrize("family", LAST)
@pytest.mark.parametrize("form", ROW_FORMATS)
def test_last_reasoning_is_a_target_and_earlier_ones_are_counted(
    target_texts, family, form
) -> None:
    turns = thoughts(form, "Four.", "Six.")
    every, counts = target_texts(family, turns)
    assert "R1" not in every[0] and "Four." in every[0]
    assert every[1] == LAST[family]
    assert counts["reasoning_left_out"] == 1
    assert target_texts(family, turns, train_on="last")[0] == every[1:]


def test_reasoning_tags_in_the_content_are_read(target_texts) -> None:
    turns = thoughts("inside", "Four.", "Six.")
    every, counts = target_texts("qwen3", turns)
    assert every == ["Four.<|im_end|>", LAST["reasoning"]]
    assert counts["reasoning_left_out"] == 1
    kept, counts = target_texts("chatml", turns)
    assert "R1" in kept[0] and "R2" in kept[1] and not counts


@pytest.mark.parametrize(
    ("family", "form"),
    [("chatml", "reasoning_content"), ("llama3", "thinking"), ("deepseek", "inside")],
)
@pytest.mark.parametrize("turns", [("Four.",), ("Four.", "Six.")])
def test_reasoning_dropped_from_the_last_answer_is_refused(
    target_texts, family, form, turns
) -> None:
    with pytest.raises(UserError, match=r"f:1: .* leaves out the reasoning of the last answer"):
        target_texts(family, thoughts(form, *turns))


def test_reasoning_around_tool_calls_is_a_target(target_texts) -> None:
    turns = [
        ASKED,
        assistant_turn("", reasoning_content="R1", tool_calls=[CALL]),
        RESULT,
        assistant_turn("Four.", reasoning_content="R2"),
    ]
    for family in LAST:
        (call, answer), counts = target_texts(family, turns, TOOLS)
        assert "R1" in call and '"city"' in call and "R2" in answer and not counts


def test_equal_reasoning_under_two_keys_is_accepted(target_texts) -> None:
    turns = [ASKED, assistant_turn("Four.", reasoning="R", reasoning_content="R")]
    assert target_texts("reasoning", turns)[0] == ["<think>\nR\n</think>\n\nFour.<|im_end|>"]


# Calls of tools


@pytest.mark.parametrize("family", ["chatml", "gemma", "phi3", "command-r", "smollm2", "parts"])
@pytest.mark.parametrize(
    "answer",
    [
        assistant_turn("", tool_calls=[CALL]),
        assistant_turn(None, tool_calls=[CALL]),
        assistant_turn("Adding.", function_call={"name": "add", "arguments": '{"a": 2}'}),
        {"from": "function_call", "value": '{"name": "add", "arguments": {"a": 2}}'},
        {"role": "assistant", "content": [{"type": "tool_call", "value": '{"name": "add"}'}]},
    ],
)
def test_tool_call_is_refused_by_a_template_without_tool_calls(
    target_texts, family, answer
) -> None:
    with pytest.raises(UserError, match=r"f:1: the chat template .*message 2"):
        target_texts(family, [ASKED, answer])


@pytest.mark.parametrize("family", ["chatml", "gemma", "deepseek"])
def test_tools_that_the_template_does_not_render_are_refused(target_texts, family) -> None:
    with pytest.raises(UserError, match=r"f:1: the chat template leaves out the row's tools"):
        target_texts(family, [ASKED, assistant_turn("Four.")], TOOLS)


@pytest.mark.parametrize("family", ["qwen2.5", "qwen3", "reasoning"])
def test_parallel_tool_calls_and_their_text_are_targets(target_texts, family) -> None:
    second_call = {
        "function": {"name": "mul", "arguments": {"rows": ["a", 1, {"k": "v"}], "b": None}}
    }
    turns = [
        ASKED,
        assistant_turn("Let me see.", tool_calls=[CALL, second_call]),
        RESULT,
        RESULT,
        assistant_turn("Four."),
    ]
    (calls, answer), counts = target_texts(family, turns, TOOLS)
    assert calls.startswith("Let me see.") and calls.endswith("</tool_call><|im_end|>")
    assert '"city": "R \\"x\\"\\n"' in calls and '"rows": ["a", 1, {"k": "v"}]' in calls
    assert answer.endswith("Four.<|im_end|>") and not counts


@pytest.mark.parametrize(
    ("family", "call"),
    [
        ("mistral-tools", '[TOOL_CALLS] [{{"name": "add", "arguments": {}}}]</s>'),
        ("glm4", "add\n{}"),
        ("harmony", " to=functions.add<|channel|>commentary json<|message|>{}<|call|>"),
        ("llama3", '{{"name": "add", "parameters": {}}}<|eot_id|>'),
    ],
)
def test_tool_calls_of_each_template_family_are_targets(target_texts, family, call) -> None:
    turns = [ASKED, assistant_turn("", tool_calls=[CALL]), RESULT, assistant_turn("Four.")]
    texts, _ = target_texts(family, turns, TOOLS)
    assert texts[0] == call.format('{"a": 2, "city": "R \\"x\\"\\n"}')
    assert target_texts(family, turns, TOOLS, "last")[0] == texts[1:]


@pytest.mark.parametrize("family", ["llama3", "mistral-tools", "harmony"])
def test_text_dropped_next_to_a_tool_call_is_refused(target_texts, family) -> None:
    turns = [
        ASKED,
        assistant_turn("Let me see.", tool_calls=[CALL]),
        RESULT,
        assistant_turn("Four."),
    ]
    with pytest.raises(UserError, match="leaves out the text of message 2"):
        target_texts(family, turns, TOOLS)


CALLS = (
    "{%- for m in messages -%}{{ '<|im_start|>' + m.role + '\n' }}{{ m.content }}"
    "{%- for call in m.tool_calls or [] -%}<call>CALL</call>{%- endfor -%}"
    "{{ '<|im_end|>\n' }}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{ '<|im_start|>assistant\n' }}{%- endif -%}"
)


@pytest.mark.parametrize(
    ("writes", "whole"),
    [
        ("{{ call.function }}", True),
        ("{{ call.function | tojson(ensure_ascii=True) }}", True),
        (
            "{{ call.function.name }}{% for k, v in call.function.arguments.items() %}"
            "<{{ k }}>{{ v }}</{{ k }}>{% endfor %}",
            True,
        ),
        ("{{ call.function.name }}", False),
        ("{{ call.function.arguments | tojson }}", False),
        ("{{ call.function.name }}{{ call.function.arguments.city }}", False),
        ("{{ call.function.name }}{{ call.function.arguments.keys() | list }}", False),
        ("{{ call.function.name }}{{ (call.function.arguments | tojson)[:9] }}", False),
    ],
)
def test_every_field_of_a_tool_call_must_be_rendered(target_texts, writes, whole) -> None:
    turns = [ASKED, assistant_turn("", tool_calls=[CALL]), RESULT, assistant_turn("é. Four.")]
    custom = CALLS.replace("CALL", writes)
    if whole:
        (call, answer), _ = target_texts(custom, turns)
        assert call.startswith("<call>") and call.endswith("</call><|im_end|>")
        assert answer == "é. Four.<|im_end|>"
    else:
        with pytest.raises(UserError, match=r"f:1: the chat template .* message 2"):
            target_texts(custom, turns)


@pytest.mark.parametrize("role", ["observation", "function", "tool_response", "ipython", "Tool"])
def test_tool_results_under_role_aliases_are_read(target_texts, role) -> None:
    result = {"role": role, "name": "add", "content": "RESULT"}
    turns = [ASKED, assistant_turn("", tool_calls=[CALL]), result, assistant_turn("Four.")]
    texts, _ = target_texts("qwen2.5", turns, TOOLS, "all+tool")
    assert texts[1] == "RESULT"
