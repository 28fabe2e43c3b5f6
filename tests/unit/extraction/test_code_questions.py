"""Questions have one right answer, read off the documentation."""

from __future__ import annotations

import pytest

from dtrain.extraction.code_questions import questions, raised, summary
from dtrain.extraction.python_code import Entry


def _function(name: str, doc: str, arguments: str | None = "(text)") -> Entry:
    return Entry("mod", name, "function", arguments, (), doc)


@pytest.mark.parametrize(
    ("doc", "expected"),
    [
        ("Wrap a text to fit in. More of it.", "Wrap a text to fit in."),
        ("Wrap a text,\nover two lines", "Wrap a text, over two lines."),
        (
            "S.find(sub) -> int\n\nReturn the lowest index there is.",
            "Return the lowest index there is.",
        ),
        ("Use it, e.g. For this one.", "Use it, e.g. For this one."),
        ("Short.", ""),
        ("lower case is no sentence at all", ""),
        ("x" * 400, ""),
        ("(c) Copyright of somebody, all rights.", ""),
        ("Title\n\nA paragraph that belongs to something else.", ""),
    ],
)
def test_summary_is_the_first_sentence(doc: str, expected: str) -> None:
    assert summary(doc) == expected


def test_exceptions_are_read_only_from_sentences_that_say_raise() -> None:
    doc = "Like KeyError. Raises ValueError if bad,\nor OSError. May raise it.\n\nSee EOFError."
    assert raised(doc) == ["ValueError", "OSError"]
    assert raised("Nothing here.") == []


def test_kinds_and_answers() -> None:
    entry = _function("wrap", "Fold a long line of words. Raises ValueError.", "(text, width=70)")
    box = Entry("mod", "Box", "class", None, ("Base", "Mixin"), "A thing with six sides to it.")
    by_kind = {(q.kind, q.entry.name): q for q in questions([entry, box])}
    assert (
        by_kind["does", "wrap"].question == "What does the function `mod.wrap(text, width=70)` do?"
    )
    assert by_kind["does", "wrap"].answer == "Fold a long line of words."
    assert by_kind["call", "wrap"].answer == "`mod.wrap(text, width=70)`"
    assert by_kind["raises", "wrap"].answer == "`ValueError`."
    assert by_kind["which", "wrap"].answer == "`wrap`"
    assert by_kind["base", "Box"].answer == "`Base` and `Mixin`."


def test_every_question_has_one_answer_that_it_does_not_contain() -> None:
    same = [
        _function("one", "Do the very same thing."),
        _function("two", "Do the very same thing."),
    ]
    assert [q for q in questions(same) if q.kind == "which"] == []
    telling = [_function("wrap", "Wrap the text into lines.")]
    assert [q for q in questions(telling) if q.kind == "which"] == []


def test_each_question_is_asked_once() -> None:
    twice = [
        _function("one", "Do the very first thing."),
        _function("one", "Do another thing here."),
    ]
    asked = [q.question for q in questions(twice)]
    assert len(asked) == len(set(asked))
