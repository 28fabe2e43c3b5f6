"""A rendered row contains all its content with complete targets, or is refused by name."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

from dtrain.core.errors import UserError
from dtrain.data.assistant_spans import render_answers
from dtrain.data.chat_templates import resolve_template
from dtrain.data.conversations import Conversation, parse_messages
from dtrain.data.end_of_turn import end_of_turn
from dtrain.data.formats import convert_row

FAMILIES = Path(__file__).with_name("templates")
ASKED = {"role": "user", "content": "Two and two?"}
AGAIN = {"role": "user", "content": "And two?"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
CALL = {"type": "function", "function": {"name": "add", "arguments": {"a": 2, "city": 'R "x"\n'}}}
RESULT = {"role": "tool", "content": "4"}
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' %}{% generation %}{{ m.content + '<|im_end|>' }}"
    "{% endgeneration %}{% else %}{{ m.content + '<|im_end|>' }}{% endif %}{{ '\n' }}{% endfor %}"
)


def assistant_turn(text, **more):
    return {"role": "assistant", "content": text, **more}


@pytest.fixture
def template(make_tokenizer):
    """template(family or jinja text) → the template."""

    def run(name):
        path = FAMILIES / f"{name}.jinja"
        text = path.read_text(encoding="utf-8") if "{" not in name else name
        return resolve_template("auto", make_tokenizer(text, bos_token="<s>", eos_token="</s>"))

    return run


@pytest.fixture
def target_texts(template):
    """learned(template, messages as a row has them) → (texts that are learned, what is counted)."""

    def run(name, messages, tools=None, train_on="all"):
        counts: Counter[str] = Counter()
        talk = Conversation(parse_messages(messages, "messages", "f:1"), tools)
        text, spans = render_answers(template(name), talk, "f:1", train_on, counts)
        return [text[start:stop] for start, stop in spans], +counts

    return run


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


# Roles

SOME = (
    "{%- for m in messages -%}{%- if m.role in ('system', 'user', 'assistant') -%}"
    "{{- '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' -}}{%- endif -%}{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '<|im_start|>assistant\n' -}}{%- endif -%}"
)


@pytest.mark.parametrize(
    ("role", "standard"),
    [("developer", "system"), ("User", "user"), ("human", "user"), ("SYSTEM", "system")],
)
@pytest.mark.parametrize("family", [SOME, "chatml", "qwen2.5", "llama3"])
def test_role_alias_is_replaced_by_the_standard_role(template, family, role, standard) -> None:
    counts: Counter[str] = Counter()
    turns = parse_messages(
        [{"role": role, "content": "HEAR"}, ASKED, assistant_turn("RED")], "messages", "f:1"
    )
    text, _ = render_answers(template(family), Conversation(turns), "f:1", counts=counts)
    same = [{"role": standard, "content": "HEAR"}, ASKED, assistant_turn("RED")]
    assert text == template(family).render(Conversation(same))
    assert counts[f"role `{role}` read as `{standard}`"] == 1


@pytest.mark.parametrize("role", ["model", "gpt", "Assistant", "bot", "chatbot"])
@pytest.mark.parametrize("family", [SOME, "chatml", "gemma", "mistral"])
def test_answer_is_a_target_under_any_role_name(target_texts, family, role) -> None:
    (answer,), _ = target_texts(family, [ASKED, {"role": role, "content": "RED"}])
    assert "RED" in answer


def test_role_of_the_template_is_kept(template, target_texts) -> None:
    custom = SOME.replace("'system', ", "'developer', 'model', ")
    turns = [{"role": "developer", "content": "HEAR"}, ASKED, {"role": "model", "content": "RED"}]
    (answer,), counts = target_texts(custom, turns)
    assert answer == "RED<|im_end|>" and not counts
    read = parse_messages(turns, "messages", "f:1")
    assert (
        "<|im_start|>developer\nHEAR"
        in render_answers(template(custom), Conversation(read), "f:1")[0]
    )


@pytest.mark.parametrize("role", ["observation", "function", "tool_response", "ipython", "Tool"])
def test_tool_results_under_role_aliases_are_read(target_texts, role) -> None:
    result = {"role": role, "name": "add", "content": "RESULT"}
    turns = [ASKED, assistant_turn("", tool_calls=[CALL]), result, assistant_turn("Four.")]
    texts, _ = target_texts("qwen2.5", turns, TOOLS, "all+tool")
    assert texts[1] == "RESULT"


@pytest.mark.parametrize(
    ("turns", "message"),
    [
        (
            [{"role": "narrator", "content": "Dusk."}, ASKED, assistant_turn("RED")],
            "message 1 .*`narrator`",
        ),
        (
            [ASKED, {"role": "critic", "content": "No."}, assistant_turn("RED")],
            "message 2 .*`critic`",
        ),
        ([ASKED, assistant_turn("RED"), {"role": "tool", "content": "18"}], "message 3 .*`tool`"),
    ],
)
def test_turn_skipped_by_the_template_is_refused(target_texts, turns, message) -> None:
    with pytest.raises(UserError, match=f"f:1: .* leaves out the text of {message}"):
        target_texts(SOME, turns)


@pytest.mark.parametrize("train_on", ["all", "last", "user", ""])
def test_dropped_system_message_is_refused(target_texts, train_on) -> None:
    turns = [{"role": "system", "content": "HEAR"}, ASKED, assistant_turn("RED")]
    with pytest.raises(UserError, match="message 1"):
        target_texts(SOME.replace("'system', ", ""), turns, train_on=train_on)
    two = [turns[0], {"role": "system", "content": "AND SEE"}, *turns[1:]]
    only_first = SOME.replace("if m.role", "if loop.index != 2 and m.role")
    with pytest.raises(UserError, match="message 2"):
        target_texts(only_first, two, train_on=train_on)


# Turns that a row marks

BAD, GOOD = "BAD", "GOOD<|im_end|>"


@pytest.mark.parametrize(
    ("bad", "good"),
    [
        ({"weight": 0}, {"weight": 1}),
        ({"weight": 0.0}, {}),
        ({"train": False}, {"train": True}),
        ({"training": False}, {}),
        ({"loss": False}, {"loss": True}),
        ({"loss_weight": 0}, {"loss_weight": 1.0}),
        ({"masked": True}, {"masked": False}),
        ({"weight": 0, "train": False}, {"weight": None}),
    ],
)
@pytest.mark.parametrize("sharegpt", [False, True])
@pytest.mark.parametrize("family", ["chatml", MARKED], ids=["chatml", "marked"])
def test_turn_masked_by_the_row_is_not_a_target(target_texts, family, sharegpt, bad, good) -> None:
    turns = [ASKED, assistant_turn(BAD, **bad), AGAIN, assistant_turn("GOOD", **good)]
    if sharegpt:
        names = {"user": "human", "assistant": "gpt"}
        turns = [
            {"from": names[t.pop("role")], "value": t.pop("content"), **t} for t in map(dict, turns)
        ]
    assert target_texts(family, turns)[0] == [GOOD]
    assert target_texts(family, turns, train_on="last")[0] == [GOOD]
    assert target_texts(family, turns[:2])[0] == []


@pytest.mark.parametrize("key", ["train", "weight", "loss"])
def test_turn_enabled_by_the_row_is_a_target(target_texts, key) -> None:
    turns = [
        {**ASKED, key: True},
        assistant_turn("Four.", **{key: True}),
        AGAIN,
        assistant_turn("Six."),
    ]
    assert target_texts("chatml", turns)[0] == [
        "Two and two?<|im_end|>",
        "Four.<|im_end|>",
        "Six.<|im_end|>",
    ]
    assert target_texts("chatml", turns[1:], train_on="last")[0] == ["Six.<|im_end|>"]


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"weight": 0.5}, r"`messages\[1\].weight` must be 0 or 1 .* not 0.5"),
        ({"loss_weight": 2}, "must be 0 or 1"),
        ({"train": "no"}, r"`messages\[1\].train` must be 0 or 1"),
        (
            {"weight": 1, "train": False},
            r"the keys weight, train of `messages\[1\]` contradict each other",
        ),
        ({"train_detail": [{"begin_offset": 0}]}, "train_detail"),
    ],
)
def test_invalid_train_flags_are_refused(marks, message) -> None:
    with pytest.raises(UserError, match=message):
        parse_messages([ASKED, assistant_turn("Four.", **marks)], "messages", "f:1")


# Contents as lists of parts


@pytest.mark.parametrize(
    "block",
    [
        {"type": "text", "text": "Four."},
        {"type": "text", "value": "Four."},
        {"type": "text", "text": "Four.", "image_url": None},
        {"text": "Four."},
        {"type": "output_text", "text": "Four."},
        "Four.",
    ],
)
@pytest.mark.parametrize("family", ["chatml", "parts-only", "qwen3"])
def test_text_block_is_read_as_text(target_texts, family, block) -> None:
    turns = [
        {"role": "system", "content": [block]},
        {"role": "user", "content": [block]},
        assistant_turn([block]),
    ]
    (answer,), _ = target_texts(family, turns)
    assert answer.endswith("Four.<|im_end|>") and "type" not in answer


@pytest.mark.parametrize(
    ("family", "joined"), [("chatml", "a\nb"), ("parts", "ab"), ("parts-only", "ab")]
)
def test_content_blocks_are_joined_as_the_template_does(target_texts, family, joined) -> None:
    blocks = [{"type": "text", "text": text} for text in "ab"]
    (asked, answer), _ = target_texts(
        family, [{"role": "user", "content": blocks}, assistant_turn(blocks)], None, "all+user"
    )
    assert asked.startswith(joined) and answer.startswith(joined)


@pytest.mark.parametrize(
    ("block", "kind"),
    [
        ({"type": "image_url", "image_url": {"url": "x"}}, "image_url"),
        ({"type": "image"}, "image"),
        ({"type": "input_audio", "input_audio": {}}, "input_audio"),
        ({"type": "video", "text": "x"}, "video"),
        ({"image": "x.png"}, "image"),
        ({"type": "text", "text": "x", "image": "x.png"}, "image"),
        ({"text": "x", "image_url": {"url": "x"}}, "image_url"),
        ({"type": "text", "text": None}, "text"),
    ],
)
def test_other_content_blocks_are_refused_by_type(block, kind) -> None:
    turns = [
        {"role": "user", "content": [{"type": "text", "text": "See"}, block]},
        assistant_turn("Four."),
    ]
    with pytest.raises(
        UserError, match=rf"f:1: `messages\[0\].content\[1\]` is not a text: {kind}"
    ):
        parse_messages(turns, "messages", "f:1")


def test_a_row_with_images_is_refused() -> None:
    turns = [{"role": "user", "content": "<image> What?"}, assistant_turn("Four.")]
    with pytest.raises(UserError, match="f:1: the row has images"):
        convert_row({"messages": turns, "images": ["a.png"]}, "messages", {}, "f:1")
    assert isinstance(
        convert_row({"messages": turns, "images": []}, "messages", {}, "f:1"), Conversation
    )


# Ends of turns


def test_turns_without_an_end_are_counted(target_texts, template) -> None:
    open_ended = "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content }}{% endfor %}"
    texts, counts = target_texts(
        open_ended, [ASKED, assistant_turn("Four."), AGAIN, assistant_turn("Six.")]
    )
    assert counts["answers_without_end"] == 2 and texts[-1].endswith("Six.")
    assert end_of_turn(template(open_ended)) == ""


def test_template_that_closes_only_the_last_turn(target_texts, template) -> None:
    once = SOME.replace(" + '<|im_end|>\n'", "") + "{{ eos_token }}"
    texts, counts = target_texts(
        once, [ASKED, assistant_turn("Four."), AGAIN, assistant_turn("Six.")]
    )
    assert counts["answers_without_end"] == 1 and texts[-1].endswith("Six.</s>")
    assert target_texts(once, [ASKED, assistant_turn("Four.")])[1] == {}
    assert end_of_turn(template(once)) == "</s>"


def test_gpt_oss_turn_ends_are_targets(target_texts, template) -> None:
    texts, counts = target_texts(
        "harmony", [ASKED, assistant_turn("Four."), AGAIN, assistant_turn("Six.")]
    )
    final = "<|channel|>final<|message|>"
    assert texts == [f"{final}Four.<|end|>", f"{final}Six.<|return|>"] and not counts
    assert end_of_turn(template("harmony")) == "<|return|>"


# Marks of the template


@pytest.mark.parametrize(
    "marks",
    [
        MARKED.replace(
            "{{ m.content + '<|im_end|>' }}{% endgen", "{{ m.content }}{% endgen", 1
        ).replace("{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"),
        MARKED.replace(
            "{% if m.role == 'assistant' %}", "{% if m.role == 'assistant' and loop.last %}"
        ),
        MARKED.replace("{% generation %}{{ m.content", "{{ m.content }}{% generation %}{{ ''"),
        MARKED.replace(
            "{% generation %}{{ m.content", "{{ m.content[:2] }}{% generation %}{{ m.content[2:]"
        ),
    ],
    ids=["no end", "last only", "none", "half"],
)
def test_generation_tags_that_miss_part_of_an_answer_are_refused(target_texts, marks) -> None:
    with pytest.raises(UserError, match=r"f:1: .*marks leave out"):
        target_texts(marks, [ASKED, assistant_turn("Four."), AGAIN, assistant_turn("Six.")])


def test_generation_tags_may_split_an_answer(target_texts) -> None:
    two = MARKED.replace(
        "{{ m.content + '<|im_end|>' }}{% endgen",
        "{{ m.content }}{% endgeneration %}\n{% generation %}{{ m.tool_calls | tojson }}"
        "{{ '<|im_end|>' }}{% endgen",
        1,
    )
    texts, _ = target_texts(
        two,
        [
            ASKED,
            assistant_turn("See.", tool_calls=[CALL]),
            AGAIN,
            assistant_turn("Six.", tool_calls=[CALL]),
        ],
    )
    assert [text[:5] for text in texts] == ["See.", '[{"ty', "Six.", '[{"ty']


# Templates that change what they are given


@pytest.mark.parametrize(
    ("filter", "kept"),
    [
        ("trim", True),
        ("replace('\n\n', '\n')", True),
        ("replace('u', 'v')", False),
        ("lower", False),
    ],
)
def test_altered_answer_is_refused(target_texts, filter, kept) -> None:
    custom = SOME.replace("m.content", f"(m.content | {filter})")
    turns = [ASKED, assistant_turn("Four.")]
    if kept:
        assert target_texts(custom, turns)[0][0].endswith("Four.<|im_end|>")
    else:
        with pytest.raises(UserError, match="changes the answer in message 2"):
            target_texts(custom, turns)


@pytest.mark.parametrize(
    "change",
    ["m.content[:4]", "m.content[2:]", "m.content | truncate(3)", "m.content.split('d')[0]"],
)
@pytest.mark.parametrize("who", ["user", "assistant", "system"])
def test_truncated_text_is_refused(target_texts, change, who) -> None:
    custom = SOME.replace("m.content", f"(({change}) if m.role == '{who}' else m.content)")
    turns = [
        {"role": "system", "content": "Be kind and brief."},
        ASKED,
        assistant_turn("Four and four and more."),
    ]
    with pytest.raises(UserError, match=r"f:1: the chat template (changes|leaves out)"):
        target_texts(custom, turns)


@pytest.mark.parametrize("role", ["user", "assistant"])
def test_template_that_depends_on_the_text_is_followed(target_texts, role) -> None:
    """Qwen 3 does so: a question in these tags does not begin a new exchange."""
    wrapped = "<tool_response>\n4\n</tool_response>"
    turns = [
        ASKED,
        assistant_turn("x"),
        {"role": "user", "content": wrapped},
        assistant_turn("<think>\nR\n</think>\n\nSix."),
    ]
    assert target_texts("qwen3", turns)[0] == [
        "x<|im_end|>",
        "<think>\nR\n</think>\n\nSix.<|im_end|>",
    ]
    custom = SOME.replace(
        "m.content",
        f"(m.content if m.content.startswith('Two') or m.role != '{role}' else m.content + '!')",
    )
    texts, _ = target_texts(
        custom, [ASKED, assistant_turn("Two is the answer."), AGAIN, assistant_turn("Six.")]
    )
    assert texts[0].endswith("Two is the answer.<|im_end|>")


def test_private_use_characters_in_a_row_are_plain_text(target_texts) -> None:
    odd = "".join(map(chr, range(0xF0000, 0xF0040))) + "\ue000"
    turns = [
        {"role": "user", "content": odd},
        assistant_turn(f"{odd} Four."),
        AGAIN,
        assistant_turn(odd[::-1]),
    ]
    for family in ("chatml", "llama3", "qwen3"):
        texts, _ = target_texts(family, turns)
        assert odd in texts[0] and odd[::-1] in texts[1]


@pytest.mark.parametrize("blank", ["", " ", "\n\n", "<think>\n\n</think>\n\n"])
@pytest.mark.parametrize("family", ["chatml", "llama3", "qwen3", "mistral", "parts-only"])
def test_empty_answer_has_only_its_end_as_target(target_texts, template, family, blank) -> None:
    (answer,), counts = target_texts(family, [ASKED, assistant_turn(blank)])
    assert answer.replace("<think>", "").replace("</think>", "").strip() == end_of_turn(
        template(family)
    )
    first, _ = target_texts(family, [ASKED, assistant_turn(blank), AGAIN, assistant_turn("Six.")])[
        0
    ]
    assert first.endswith(end_of_turn(template(family))) and not counts
