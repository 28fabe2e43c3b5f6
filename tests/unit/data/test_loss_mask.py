"""Where answers start and end in tokens, whatever characters and tokens stand at their edges."""

from __future__ import annotations

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import AddedToken, normalizers, pre_tokenizers, processors

from dtrain.data.chat_templates import resolve_template
from dtrain.data.conversations import Conversation
from dtrain.data.loss_mask import TokenByteLengths, target_runs
from dtrain.data.records import Record
from dtrain.data.sources import SourceFile
from dtrain.data.tokenize import AnswerEncoder

PIECES = st.text(st.sampled_from("ab fox\n éß漢👩🏽‍🚀<|>\u0301"), max_size=12)


@given(st.lists(st.tuples(PIECES, PIECES), min_size=1, max_size=4), st.booleans())
def test_every_token_with_a_character_of_an_answer_is_a_target(tokenizer, turns, closed) -> None:
    text, spans = "", []
    for question, answer in turns:
        end = "<|im_end|>" if closed else ""
        spans.append((len(text + question), len(text + question + answer + end)))
        text += question + answer + end
    encoding = tokenizer([text], add_special_tokens=False).encodings[0]
    expected = [
        index > 0 and any(first < stop and last > start for start, stop in spans)
        for index, (first, last) in enumerate(encoding.offsets)
    ]
    runs = target_runs(encoding, text, spans).tolist()
    actual = [False] * len(encoding)
    for start, stop in zip(runs[::2], runs[1::2], strict=True):
        assert start < stop
        actual[start:stop] = [True] * (stop - start)
    assert actual == expected
    assert runs == sorted(set(runs))  # no run touches the next
    ((tokens, quick),) = TokenByteLengths.of(tokenizer).encode([text], [spans])
    assert tokens.tolist() == encoding.ids and quick.tolist() == runs


@pytest.mark.parametrize("change", ["blank in front", "composed", "trimmed"])
def test_lengths_are_not_used_if_they_differ_from_offsets(make_tokenizer, change) -> None:
    tokenizer = make_tokenizer()
    core = tokenizer.backend_tokenizer
    if change == "blank in front":
        core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    elif change == "composed":
        core.normalizer = normalizers.NFKC()
    else:
        core.post_processor = processors.ByteLevel(trim_offsets=True)
    assert TokenByteLengths.of(tokenizer) is None


def test_token_that_strips_spaces_is_detected(make_tokenizer) -> None:
    tokenizer = make_tokenizer()
    greedy = AddedToken("<|greedy|>", lstrip=True, rstrip=True)
    tokenizer.backend_tokenizer.add_special_tokens([greedy])
    texts, spans = ["a <|greedy|> b", "a b"], [[(0, 3)], [(1, 3)]]
    taken, plain = TokenByteLengths.of(tokenizer).encode(texts, spans)
    assert taken is None and plain is not None


def test_lengths_and_offsets_give_the_same_documents(tokenizer, monkeypatch) -> None:
    talks = [
        Conversation([{"role": "user", "content": q}, {"role": "assistant", "content": a}])
        for q, a in [("Hi 漢", "so <|im_end|> é"), ("a", "👩🏽‍🚀"), ("b\n\n", "\n c ")]
    ]
    records = [Record(talk, 0, n) for n, talk in enumerate(talks)]
    template, source_files = (
        resolve_template("auto", tokenizer),
        [SourceFile("a.jsonl", ".jsonl", "")],
    )

    def documents():
        encoder = AnswerEncoder(tokenizer, template, 999, "fail", source_files)
        encoded = encoder.documents(records, Counter())
        return [(document.tokens.tolist(), document.target_runs.tolist()) for document in encoded]

    quick = documents()
    monkeypatch.setattr(TokenByteLengths, "of", lambda tokenizer: None)
    assert documents() == quick and len(quick) == 3
