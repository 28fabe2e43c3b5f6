"""Quality problems of single rows: truncated answers, refusals, repetition."""

from __future__ import annotations

import numpy as np
import pytest

from dtrain.data.text_checks import RowText, check_quality, is_cut_off


@pytest.mark.parametrize(
    ("text", "cut"),
    [
        ("It was a dark night. The wind blew hard and nobody in the house could", True),
        ("It was a dark night. The wind blew hard and nobody in the house slept.", False),
        ("Three things matter here. They are:\n- apples\n- pears\n- plums and peaches", False),
        ("今天天气很好。我们一起去公园散步，看到了很多美丽的花朵，还有", True),
        ("```python\nprint(1)", True),
        ("Use this code.\n```python\nprint(1)\n```", False),
        ("船长在日出之前出售航海图。女医生在深秋时节整理旧钟表。养蜂人在山谷对面搬运8", True),
    ],
)
def test_truncated_answers_are_detected(text, cut) -> None:
    prefix = "A sentence that is complete and long enough to count. "
    assert is_cut_off(prefix + text) is cut


@pytest.mark.parametrize(
    ("answer", "refuses"),
    [
        ("As an AI assistant, I'd be more than happy to help you with the plan.", False),
        ("As an AI language model, I do not have a favourite colour.", True),
        ("As an AI, I can't see pictures.", True),
        ("As an AI I love maths. It is not hard.", False),
    ],
)
def test_an_assistant_that_introduces_itself_does_not_refuse(answer, refuses) -> None:
    kinds = {kind for kind, _, _ in check_quality(RowText("What is it?", answer))}
    assert ("refusal" in kinds) is refuses


def test_a_long_text_with_a_small_vocabulary_is_not_repetitive() -> None:
    rng = np.random.default_rng(0)
    words = [f"word{n}" for n in range(60)]
    long = " ".join(rng.choice(words, 900))
    kinds = {kind for kind, _, _ in check_quality(RowText("Tell me.", f"{long}."))}
    assert "repeated_lines" not in kinds
    repetitive = {kind for kind, _, _ in check_quality(RowText("Tell me.", "over and " * 40))}
    assert "repeated_lines" in repetitive


def test_full_text_of_a_conversation_has_question_and_answer() -> None:
    assert RowText("a", "b").full == "a\nb"
