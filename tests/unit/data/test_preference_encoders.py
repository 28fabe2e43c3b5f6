"""Rows of two answers or of a rated answer: which tokens are trained, and what is left out."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from dtrain.config.data import Data
from dtrain.core.errors import UserError
from dtrain.data.chat_templates import ChatTemplate, resolve_template
from dtrain.data.formats import convert_row
from dtrain.data.preference_encoders import (
    CHOSEN,
    REJECTED,
    UNRELATED,
    PairEncoder,
    RatedAnswerEncoder,
    share_sequence,
)
from dtrain.data.preferences import OTHER_PROMPTS, SAME_ANSWERS
from dtrain.data.prepare import prepare
from dtrain.data.records import Record
from dtrain.data.tokenize import (
    DESIRABLE,
    MASKED,
    NO_ROOM,
    TOO_LONG,
    TRUNCATED,
    UNDESIRABLE,
    Document,
)
from dtrain.objectives.base import objective_class

ADD = {"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}
Encode = Callable[..., tuple[list[Document], Counter[str]]]


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def pair(chosen: Any, rejected: Any, prompt: Any = "Who?") -> dict[str, Any]:
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


@pytest.fixture
def encode(tokenizer) -> Encode:
    """encode(rows, encoder, …) → documents and counts."""

    def run(rows, encoder=PairEncoder, length=512, overlong="fail", train_on="all", tools=False):
        kind = "preference" if encoder is PairEncoder else "kto"
        values = [convert_row(row, kind, {}, "a row") for row in rows]
        records = [Record(value, 0, number) for number, value in enumerate(values)]
        source = SimpleNamespace(location=lambda row: f"a.jsonl:{row + 1}")
        template = resolve_template("auto", tokenizer)
        if tools:
            listed = "{% if tools %}{{ tools | tojson }}{% endif %}"
            template = ChatTemplate(listed + template.source, template.specials)
        own = encoder(tokenizer, template, length, overlong, [source], train_on)
        counts: Counter[str] = Counter()
        return own.documents(records, counts), +counts

    return run


@pytest.fixture
def trained(tokenizer) -> Callable[[Document], list[str]]:
    """The texts of a document that are trained."""

    def texts(document: Document) -> list[str]:
        return [
            tokenizer.decode(document.tokens[start:stop])
            for start, stop in document.target_runs.reshape(-1, 2)
        ]

    return texts


def test_the_answers_of_a_pair_are_trained_and_nothing_else(encode, trained) -> None:
    (chosen, rejected), counts = encode([pair("the fox", "a dog")])
    assert (chosen.label, rejected.label) == (CHOSEN, REJECTED)
    assert (
        (chosen.file_index, chosen.row_number)
        == (rejected.file_index, rejected.row_number)
        == (0, 0)
    )
    assert trained(chosen) == ["the fox<|im_end|>"]
    assert trained(rejected) == ["a dog<|im_end|>"]
    assert not counts


def test_only_turns_after_the_shared_beginning_are_trained(encode, trained) -> None:
    prompt = [user("Who?"), assistant("fox"), user("Sure?")]
    row = pair([assistant("Yes."), user("Why?"), assistant("Seen.")], "No.", prompt)
    (chosen, rejected), _ = encode([row])
    assert trained(chosen) == ["Yes.<|im_end|>", "Seen.<|im_end|>"]
    assert trained(rejected) == ["No.<|im_end|>"]
    (chosen, _), _ = encode([row], train_on="last")
    assert trained(chosen) == ["Seen.<|im_end|>"]


def test_a_shared_beginning_needs_no_prompt(encode, trained) -> None:
    shared = [user("Who?"), assistant("fox"), user("Sure?")]
    row = {
        "chosen": [*shared, assistant("Yes.")],
        "rejected": [*shared, assistant("No."), user("Why?"), assistant("So.")],
    }
    (chosen, rejected), _ = encode([row])
    assert trained(chosen) == ["Yes.<|im_end|>"]
    assert trained(rejected) == ["No.<|im_end|>", "So.<|im_end|>"]


def test_equal_answers_and_other_prompts_are_left_out_and_counted(encode) -> None:
    other = {"chosen": [user("A"), assistant("b")], "rejected": [user("C"), assistant("d")]}
    documents, counts = encode([pair("fox", "fox"), pair("fox", "dog"), other])
    assert [document.row_number for document in documents] == [1, 1]
    assert counts == {SAME_ANSWERS: 1, OTHER_PROMPTS: 1}


def test_a_pair_with_an_answer_that_is_not_trained_is_left_out(encode) -> None:
    shared = [user("Who?"), assistant("fox")]
    row = {"chosen": shared, "rejected": [*shared, user("Why?"), assistant("So.")]}
    documents, counts = encode([row])
    assert not documents and sum(counts.values()) == 1
    muted = pair([assistant("fox") | {"weight": 0}], "dog")
    documents, counts = encode([muted])
    assert not documents and counts == {MASKED: 1}


def test_a_pair_too_long_for_a_sequence(encode, trained) -> None:
    row = pair("fox " * 40, "dog")
    (chosen, rejected), _ = encode([row])
    total = chosen.tokens.size + rejected.tokens.size
    with pytest.raises(UserError, match=f"has {total} tokens, a sequence holds {total - 9}"):
        encode([row], length=total - 9)
    documents, counts = encode([row], length=total - 9, overlong="drop")
    assert not documents and counts == {TOO_LONG: 1}
    (cut, whole), counts = encode([row], length=total - 9, overlong="truncate")
    assert counts == {TRUNCATED: 1}
    assert np.array_equal(cut.tokens, chosen.tokens[:-9])
    assert np.array_equal(whole.tokens, rejected.tokens)
    assert cut.target_runs.tolist() == [chosen.target_runs[0], cut.tokens.size]


def test_truncation_never_removes_a_whole_answer(encode) -> None:
    row = pair("fox", "dog", "Who? " * 40)
    (chosen, _), _ = encode([row])
    documents, counts = encode([row], length=chosen.tokens.size, overlong="truncate")
    assert not documents and counts == {TOO_LONG: 1}


def test_the_longest_documents_are_cut_first() -> None:
    assert share_sequence([10, 90], 60) == [10, 50]
    assert share_sequence([90, 10], 60) == [50, 10]
    assert share_sequence([90, 90], 61) == [30, 31]
    assert share_sequence([10, 20], 60) == [10, 20]


def test_tools_may_be_used_in_an_answer(encode, trained) -> None:
    chosen = [assistant("calling"), {"role": "tool", "content": "4"}, assistant("Four.")]
    row = pair(chosen, "Five.", [user("2+2?")]) | {"tools": [ADD]}
    (good, bad), _ = encode([row], tools=True)
    assert trained(good) == ["calling<|im_end|>", "Four.<|im_end|>"]
    assert trained(bad) == ["Five.<|im_end|>"]
    label = {"messages": [user("2+2?"), *chosen], "label": True, "tools": [ADD]}
    (good, _), _ = encode([label], RatedAnswerEncoder, tools=True)
    assert trained(good) == ["calling<|im_end|>", "Four.<|im_end|>"]


def rated(prompt: str, answer: str, label: bool) -> dict[str, Any]:
    return {"prompt": prompt, "completion": answer, "label": label}


def test_rated_answers_and_those_of_the_next_row(encode, trained, tokenizer) -> None:
    rows = [rated("A?", "one", True), rated("B?", "two", False), rated("C?", "six", True)]
    documents, counts = encode(rows, RatedAnswerEncoder)
    assert counts == {DESIRABLE: 2, UNDESIRABLE: 1}
    labels = [document.label for document in documents]
    assert labels == [CHOSEN, UNRELATED, REJECTED, UNRELATED, CHOSEN, UNRELATED]
    assert [document.row_number for document in documents] == [0, 0, 1, 1, 2, 2]
    texts = [trained(document)[0].removesuffix("<|im_end|>") for document in documents]
    assert texts == ["one", "two", "two", "six", "six", "one"]
    prompts = [
        tokenizer.decode(document.tokens[: document.target_runs[0]]) for document in documents
    ]
    assert [p.count("A?") for p in prompts] == [1, 1, 0, 0, 0, 0]


def test_only_the_last_answer_of_a_rated_conversation_is_trained(encode, trained) -> None:
    messages = [user("A?"), assistant("one"), user("B?"), assistant("two")]
    (answer, _), _ = encode([{"messages": messages, "label": True}], RatedAnswerEncoder)
    assert trained(answer) == ["two<|im_end|>"]


@pytest.mark.parametrize("overlong", ["truncate", "drop", "fail"])
def test_only_the_unrelated_answer_is_cut_for_a_rated_one(encode, overlong) -> None:
    rows = [rated("A?", "one " * 30, True), rated("B?", "two " * 30, False)]
    whole, _ = encode(rows, RatedAnswerEncoder)
    first, other, labels = whole[0], whole[1], {DESIRABLE: 1, UNDESIRABLE: 1}
    room_for_some, no_room = first.tokens.size + other.tokens.size - 5, first.tokens.size + 1
    documents, counts = encode(rows, RatedAnswerEncoder, room_for_some, overlong)
    assert [document.label for document in documents] == [CHOSEN, UNRELATED, REJECTED, UNRELATED]
    assert documents[0].tokens.tolist() == first.tokens.tolist() and counts == labels
    assert documents[1].tokens.tolist() == other.tokens[:-5].tolist()
    documents, counts = encode(rows, RatedAnswerEncoder, no_room, overlong)
    assert [document.label for document in documents] == [CHOSEN, REJECTED]
    assert documents[0].tokens.tolist() == first.tokens.tolist()
    assert counts == {NO_ROOM: 2, **labels}
    if overlong == "fail":
        with pytest.raises(UserError, match="a sequence holds"):
            encode(rows, RatedAnswerEncoder, first.tokens.size - 1, overlong)
    else:
        documents, counts = encode(rows, RatedAnswerEncoder, first.tokens.size - 1, overlong)
        assert len(documents) == (0 if overlong == "drop" else 2)
        assert counts[TOO_LONG if overlong == "drop" else TRUNCATED] == 2


@pytest.mark.parametrize("kind", ["dpo", "kto"])
def test_documents_of_a_row_share_a_sequence_for_any_number_of_processes(
    kind, tmp_path, tokenizer, write_rows
) -> None:
    texts = [f"fox {'jumps ' * (n % 7)}" for n in range(40)]
    rows = [pair(text, "dog", f"{n}?") for n, text in enumerate(texts)]
    if kind == "kto":
        rows = [rated(f"{n}?", text, n % 3 > 0) for n, text in enumerate(texts)]
    source = {"path": write_rows("rows.jsonl", rows)}
    data = Data.model_validate({"sources": [source], "sequence_length": 256})
    spec, contents = objective_class(kind).dataset, []
    for processes in (1, 2):
        cache = tmp_path / f"cache-{processes}"
        dataset = prepare(data, spec, tokenizer, "tokenizer-1", cache, processes)
        numbers = np.arange(dataset.sequences_per_epoch)
        assert dataset.counts(numbers).examples == 40
        batches = [dataset.read(np.array([number])) for number in numbers]
        for batch in batches:
            assert (batch.documents[::2] + 1 == batch.documents[1::2]).all()
            assert (batch.documents[::2] % 2 == 0).all()
        contents.append(json.dumps([batch.ids.tolist() for batch in batches]))
    assert contents[0] == contents[1] and 1 < len(numbers) < 40
