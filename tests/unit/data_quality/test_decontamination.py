"""A leak is a copy of a held-out question or answer; another question of its template is none."""

from __future__ import annotations

import pytest

from dtrain.data.text_checks import RowText
from dtrain.data_quality.content_tokens import tokens
from dtrain.data_quality.decontamination import find_leak, index_held_out

LOAVES = (
    "A baker has {} loaves of bread and sells {} of them in the morning. How many loaves are left "
    "at the end of the day if he bakes no more?"
)
CAPITAL = "What is the capital of {}, and in which part of the country does it lie?"
PARIS = "The capital of France is Paris, which lies in the north of the country on the Seine."
OSLO = "The capital of Norway is Oslo, which lies in the south of the country on the fjord."
SUBTRACT = "Subtract the loaves that he sold from those that he had in the morning."
ARTICLE = (
    "In 1874 the town of Vell built a bridge over its river. The masons came from the coast; they "
    "brought granite, lime and four cranes that no one in the valley had seen before. Work stopped "
    "twice, once for a flood and once because the mayor had spent the money on a clock tower. When "
    "the last stone was laid, 312 people crossed together, and the oldest of them, a weaver, threw "
    "her shoes into the water so that she would never have to leave again. The bridge stood for 71 "
    "years. Nobody agrees on who drew its plans, although a folder in the archive names a student."
)


def leak(held_out, row):
    def text(sides):
        return RowText("", *sides, is_text=True) if len(sides) == 1 else RowText(*sides)

    return find_leak(text(row), index_held_out([("held:1", text(held_out))]))


@pytest.mark.parametrize(
    ("held_out", "row"),
    [
        (("What is 12 + 34?", "46"), ("What is 1 + 234?", "235")),
        (("What is 12 + 34?", "46"), ("What is 12 - 34?", "-22")),
        (("What is 3/4 of it?", "9"), ("What is 34 of it?", "9")),
        (("Is -5 + 12 above 0?", "Yes"), ("Is 5 + 12 above 0?", "Yes")),
        (("Compute 1.5 times 4, step by step.", "6"), ("Compute 15 times 4, step by step.", "60")),
        ((LOAVES.format(734, 215), "519"), (LOAVES.format(735, 215), "520")),
        ((LOAVES.format(12, 7), "5"), (LOAVES.format(7, 12), "-5")),
        ((LOAVES.format(12, 7), SUBTRACT), (LOAVES.format(14, 9), SUBTRACT)),
        (("Is 7 a prime number? Say yes or no.", "Yes"), ("Is 5 a prime number? Say yes.", "Yes")),
        (("Is the sky blue?", "Yes"), ("Is Ann tall?", "Yes")),
        ((CAPITAL.format("France"), PARIS), (CAPITAL.format("Norway"), OSLO)),
        ((CAPITAL.format("France"), "It is Paris."), (CAPITAL.format("Norway"), "It is Oslo.")),
        (
            ("北京是中国的首都吗？请用一句话回答这个问题并说明理由。", "是的"),
            ("东京是日本的首都吗？请用一句话回答这个问题并说明理由。", "是的"),
        ),
        (
            ("Write a function that returns the largest element of a list.", "return max(x)"),
            ("Write a function that returns the smallest element of a list.", "return min(x)"),
        ),
    ],
)
def test_another_question_of_the_same_template_is_no_leak(held_out, row) -> None:
    assert leak(held_out, row) is None


@pytest.mark.parametrize(
    ("held_out", "row"),
    [
        ((CAPITAL.format("France"), PARIS), (f"Q: {CAPITAL.format('FRANCE').upper()}", "No idea.")),
        ((CAPITAL.format("France"), PARIS), (f"**{CAPITAL.format('France')}**", "- No idea.")),
        ((CAPITAL.format("France"), PARIS), ("Tell me about France.", f"Sure! {PARIS} More?")),
        ((CAPITAL.format("France"), PARIS), ("Which town is the capital of France?", PARIS)),
        ((LOAVES.format(12, 7), "5"), (LOAVES.format(12, 7).replace("the day", "a long day"), "?")),
        (("What is 1,000 + 34?", "1034"), ("what is 1000+34", "1034")),
        ((ARTICLE,), (f"Read this. {ARTICLE}",)),
        ((ARTICLE,), (f"{ARTICLE[:350]} And so on, as the others tell it.",)),
        ((ARTICLE,), (ARTICLE.replace("312", "313"),)),
    ],
)
def test_a_copy_is_a_leak_whatever_its_form(held_out, row) -> None:
    found = leak(held_out, row)
    assert found is not None and found[0] == "held:1"


def test_the_share_is_that_of_the_words_and_100_percent_means_all() -> None:
    _, share = leak((ARTICLE,), (f"{ARTICLE[:350]} And so on.",))
    assert 0.5 < share < 0.75
    assert leak((ARTICLE,), (ARTICLE,))[1] == 1
    assert leak((ARTICLE,), (ARTICLE.replace("weaver", "miller"),))[1] < 1


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("What is 12 + 34?", "what is 12 + 34"),
        ("12-34, 3/4 of x + 3; **bold** text - item", "12 - 34 3 / 4 of x + 3 bold text item"),
        ("-5 degrees\n- 3 well-known apples", "-5 degrees 3 well known apples"),
        ("1,000 or 1000 or 1.5", "1000 or 1000 or 1.5"),
        ("北京是首都吗？", "北 京 是 首 都 吗"),
    ],
)
def test_tokens_are_words_numbers_and_operators(text: str, expected: str) -> None:
    assert tokens(text) == expected.split()
