"""A rendered row contains all its content with complete targets, or is refused by name."""

from __future__ import annotations

from collections import Counter

import pytest

from dtrain.core.errors import UserError
from dtrain.data.assistant_spans import render_answers
from dtrain.data.conversations import Conversation, parse_messages
from dtrain.data.end_of_turn import end_of_turn
from dtrain.data.formats import convert_row
from tests.unit.data.turns import AGAIN, ASKED, assistant_turn

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
