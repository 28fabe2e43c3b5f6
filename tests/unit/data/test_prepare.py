"""Preparation: loss masks, truncation, counts, fingerprints and refusals."""

from __future__ import annotations

import shutil
from dataclasses import astuple
from pathlib import Path

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from tokenizers.processors import TemplateProcessing

from dtrain.config.data import Data
from dtrain.core import hash_cache
from dtrain.core.errors import UserError
from dtrain.data import prepare as module
from dtrain.data import shards
from dtrain.data.loader import Loader
from dtrain.data.packed_dataset import PackedDataset, check_vocabulary
from dtrain.data.prepare import prepare
from dtrain.objectives.base import objective_class


def conversation(question: str, *answers: str) -> dict:
    messages = []
    for answer in answers:
        messages += [{"role": "user", "content": question}]
        messages += [{"role": "assistant", "content": answer}]
    return {"messages": messages}


def all_rows(dataset):
    return [dataset.sequence(number) for number in range(sum(dataset.sampling.sequences))]


def documents(dataset):
    """(position, tokens, targets) of every segment of every sequence."""
    for row in all_rows(dataset):
        start = 0
        for location, length in zip(row.documents, row.lengths.tolist(), strict=True):
            span = slice(start, start + length)
            yield location, row.input_ids[span].tolist(), row.is_target[span].tolist()
            start += length


def target_text(tokenizer, ids, is_target):
    return tokenizer.decode([i for i, s in zip(ids, is_target, strict=True) if s])


def test_sft_targets_are_the_answers(prepared, write_rows, tokenizer) -> None:
    path = write_rows("a.jsonl", [conversation("Who?", "Me, é 😀", "You."), conversation("a", "a")])
    source = {"path": path, "format": "messages"}
    dataset = prepared("sft", [source], sequence_length=256)
    texts = {location: target_text(tokenizer, i, s) for location, i, s in documents(dataset)}
    assert texts == {
        f"{path}:1": "Me, é 😀<|im_end|>You.<|im_end|>",
        f"{path}:2": "a<|im_end|>",
    }
    expected = tokenizer.apply_chat_template(conversation("a", "a")["messages"]).input_ids
    assert [ids for location, ids, _ in documents(dataset) if location == f"{path}:2"] == [expected]


def test_cpt_keeps_every_token_and_ends_documents(prepared, write_rows, tokenizer) -> None:
    texts = ["The quick brown fox " * n for n in (1, 30, 2, 7)]
    path = write_rows("a.jsonl", [{"text": text} for text in texts])
    dataset = prepared("cpt", [{"path": path, "format": "text"}])
    rows = all_rows(dataset)
    assert all(row.input_ids.size == 64 for row in rows[:-1])
    stream = np.concatenate([row.input_ids for row in rows])
    assert tokenizer.decode(stream) == "<|endoftext|>".join([*texts, ""])
    for row in rows:
        starts = np.cumsum(row.lengths) - row.lengths
        assert np.flatnonzero(~row.is_target).tolist() == starts.tolist()


def test_cpt_reads_conversations_as_texts(prepared, write_rows, tokenizer) -> None:
    path = write_rows("a.jsonl", [{"instruction": "Who?", "output": "Me."}])
    dataset = prepared("cpt", [{"path": path, "format": "alpaca"}])
    (row,) = all_rows(dataset)
    assert tokenizer.decode(row.input_ids).endswith("Me.<|im_end|>\n<|endoftext|>")
    assert row.is_target[1:].all()


def test_begin_token_of_the_tokenizer_is_kept(prepared, write_rows, make_tokenizer) -> None:
    from_llama = make_tokenizer(bos_token="<|begin_of_text|>")
    begin = from_llama.bos_token_id
    from_llama.backend_tokenizer.post_processor = begin_processor(begin)
    path = write_rows("a.jsonl", [{"text": "fox"}])
    dataset = prepared("cpt", [{"path": path, "format": "text"}], tokenizer=from_llama)
    ids = dataset.sequence(0).input_ids.tolist()
    assert (ids[0], ids[-1]) == (begin, from_llama.eos_token_id)
    assert ids.count(begin) == 1


def begin_processor(begin: int):
    return TemplateProcessing(single="<b> $A", special_tokens=[("<b>", begin)])


def test_without_packing_each_sequence_is_one_document(prepared, write_rows) -> None:
    rows = [conversation("Who?", f"Number {n}.") for n in range(5)]
    source = {"path": write_rows("a.jsonl", rows), "format": "messages"}
    dataset = prepared("sft", [source], packing=False, sequence_length=256)
    assert [row.lengths.size for row in all_rows(dataset)] == [1] * 5
    packed = prepared("sft", [source], sequence_length=256)
    assert sorted(documents(packed)) == sorted(documents(dataset))
    assert packed.sequences_per_epoch < 5


def test_unpacked_long_texts_are_not_truncated(prepared, write_rows, tokenizer) -> None:
    text = "The lazy dog. " * 60
    source = {"path": write_rows("a.jsonl", [{"text": text}]), "format": "text"}
    rows = all_rows(prepared("cpt", [source], packing=False))
    stream = np.concatenate([row.input_ids for row in rows])
    assert len(rows) > 1 and tokenizer.decode(stream) == text + "<|endoftext|>"


@pytest.fixture
def long_rows(write_rows):
    return {
        "path": write_rows(
            "long.jsonl",
            [
                conversation("short", "yes"),
                conversation("short", "A long answer. " * 20),
                conversation("A long question. " * 20, "never reached"),
            ],
        ),
        "format": "messages",
    }


def test_overlong_truncate_truncates_and_counts(prepared, long_rows) -> None:
    dataset = prepared("sft", [long_rows], sequence_length=80)
    assert sorted(p.rsplit(":", 1)[1] for p, _, _ in documents(dataset)) == ["1", "2"]
    assert {len(ids) for location, ids, _ in documents(dataset) if location.endswith(":2")} == {80}
    report = dataset.describe()
    assert "2 truncated to a sequence" in report
    assert "1 left out, no answer in them" in report


def test_overlong_drop_leaves_out_and_counts(prepared, long_rows) -> None:
    dataset = prepared("sft", [long_rows], sequence_length=80, overlong="drop")
    assert len(list(documents(dataset))) == 1
    assert "2 left out, longer than a sequence" in dataset.describe()


def test_overlong_fail_names_the_row(prepared, long_rows) -> None:
    with pytest.raises(UserError, match=r"long\.jsonl:2: the conversation has \d+ tokens") as e:
        prepared("sft", [long_rows], sequence_length=80, overlong="fail")
    assert "sequence_length" in e.value.fix


def test_data_without_targets_is_rejected(prepared, write_rows) -> None:
    rows = [{"messages": [{"role": "user", "content": "Anyone?"}]}] * 3
    path = write_rows("a.jsonl", rows)
    for _ in range(2):  # the second time too, although shards are there
        with pytest.raises(
            UserError, match=r"no trainable tokens in this source: .* 3 without an answer"
        ):
            prepared("sft", [{"path": path, "format": "messages"}])
    assert not list(Path(path).parent.rglob("store.json"))


def test_empty_data_is_rejected(prepared, write_rows) -> None:
    path = write_rows("a.jsonl", [])
    with pytest.raises(UserError, match=r"a\.jsonl: the source has no rows"):
        prepared("cpt", [{"path": path, "format": "text"}])


def test_empty_texts_are_counted_and_left_out(prepared, write_rows) -> None:
    path = write_rows("a.jsonl", [{"text": ""}, {"text": "fox"}])
    dataset = prepared("cpt", [{"path": path, "format": "text"}])
    assert [location for location, _, _ in documents(dataset)] == [f"{path}:2"]
    assert "1 left out, empty" in dataset.describe()


def test_sft_rejects_texts(prepared, write_rows) -> None:
    path = write_rows("a.jsonl", [{"text": "fox"}])
    with pytest.raises(
        UserError, match="sft cannot train on text rows: plain text has no answers"
    ) as error:
        prepared("sft", [{"path": path, "format": "text"}])
    assert "kind=cpt" in error.value.fix


def test_a_tokenizer_without_template_is_rejected(prepared, write_rows, make_tokenizer) -> None:
    path = write_rows("a.jsonl", [conversation("a", "b")])
    source = {"path": path, "format": "messages"}
    with pytest.raises(UserError, match="no chat template"):
        prepared("sft", [source], tokenizer=make_tokenizer(None))
    base = prepared("sft", [source], tokenizer=make_tokenizer(None), template="instruction")
    assert base.sequence(0).is_target.any()


def test_a_tokenizer_without_end_of_text_is_rejected(prepared, write_rows, make_tokenizer) -> None:
    path = write_rows("a.jsonl", [{"text": "fox"}])
    endless = make_tokenizer(eos_token=None)
    with pytest.raises(UserError, match="no end-of-text token"):
        prepared("cpt", [{"path": path, "format": "text"}], tokenizer=endless)


def test_a_token_beyond_the_vocabulary_is_rejected(prepared, write_rows) -> None:
    path = write_rows("a.jsonl", [{"text": "fox"}])
    dataset = prepared("cpt", [{"path": path, "format": "text"}])
    largest = max(dataset.sequence(0).input_ids.tolist())
    check_vocabulary(dataset, largest + 1)
    with pytest.raises(UserError, match=f"token id {largest} is beyond the model's vocabulary"):
        check_vocabulary(dataset, largest)


def test_a_bad_row_is_reported_before_any_work(prepared, write_rows, monkeypatch) -> None:
    monkeypatch.setattr(shards, "BLOCK_ROWS", 1)
    path = write_rows("a.jsonl", [{"text": "fox"}, {"txt": "dog"}])
    with pytest.raises(UserError, match=r"a\.jsonl:2: column `text` is missing"):
        prepared("cpt", [{"path": path, "format": "text"}])
    assert not list(Path(path).parent.rglob("*.arrow"))


def test_counts_match_the_sequences(prepared, write_rows) -> None:
    many = write_rows("a.jsonl", [conversation("Who?", "Me. " * n) for n in range(1, 30)])
    few = write_rows("b.jsonl", [conversation("What?", "That.")])
    sources = [{"path": path, "format": "messages"} for path in (many, few)]
    dataset = prepared("sft", sources, sequence_length=200)
    rows = all_rows(dataset)
    indices = np.arange(len(rows))[::-1]
    assert dataset.tokens(indices).tolist() == [r.input_ids.size for r in rows[::-1]]
    targets = [dataset.counts(indices[[n]]).supervised_tokens for n in range(len(rows))]
    assert targets == [r.is_target.sum() for r in rows[::-1]]
    examples = [dataset.counts(indices[[n]]).examples for n in range(len(rows))]
    assert examples == [len(r.documents) for r in rows[::-1]]
    assert rows[-1].documents == [f"{few}:1"]


def test_replay_is_prepared_mixed_and_counted(prepared, write_rows) -> None:
    new_sources = [write_rows(f"{n}.jsonl", [{"text": "fox " * 30}] * 40) for n in range(2)]
    old = write_rows("old.jsonl", [{"text": "dog " * 30}] * 9)
    sources = [{"path": path, "format": "text"} for path in new_sources]
    plain = prepared("cpt", sources)
    mixed = prepared("cpt", sources, replay={"path": old, "format": "text", "ratio": 0.25})
    assert mixed.fingerprint != plain.fingerprint
    swapped = prepared("cpt", sources, replay={"path": old, "format": "text", "ratio": 0.5})
    assert mixed.fingerprint != swapped.fingerprint
    loader = Loader(
        mixed, seed=3, global_batch=8, total_sequences=mixed.sequences_per_epoch // 8 * 8
    )
    for step in range(loader.steps):
        counts = loader.counts_by_source(step)
        assert list(counts) == [*new_sources, old]
        assert counts[old].sequences == 2
        totals = [sum(column) for column in zip(*map(astuple, counts.values()), strict=True)]
        assert tuple(totals) == astuple(loader.counts(step))
        (batch,) = loader.micro_batches(step, 0, 1, 8)
        indices = loader.batch(step).tolist()
        ids = np.concatenate([mixed.sequence(number).input_ids for number in indices])
        assert batch.input_ids[0].tolist() == ids.tolist()
    assert Loader(plain, seed=3, global_batch=8, total_sequences=8).counts_by_source(0) != {}


def test_weights_change_after_steps(prepared, write_rows) -> None:
    a, b = (write_rows(f"{n}.jsonl", [{"text": f"{n} " * 30}] * 40) for n in ("fox", "dog"))
    later = [{"after_steps": 0, "weight": 0}, {"after_steps": 3, "weight": 3}]

    def mixed(weight: object) -> PackedDataset:
        sources = [{"path": a, "weight": 1.0}, {"path": b, "weight": weight}]
        return prepared("cpt", [s | {"format": "text"} for s in sources], global_batch=8)

    dataset = mixed(later)
    loader = Loader(dataset, seed=1, global_batch=8, total_sequences=48)
    counts = [loader.counts_by_source(step)[b].sequences for step in range(6)]
    assert counts == [0, 0, 0, 6, 6, 6]
    assert "from sequence 25 on: 25.00%, 75.00%" in dataset.describe()
    marks = {mixed(weight).fingerprint for weight in (1.0, 3.0, later)}
    assert len(marks) == 3  # a checkpoint of another order is not gone on with


def test_many_shards_give_the_sequences_of_one(prepared, write_rows, tmp_path, monkeypatch) -> None:
    path = write_rows("a.jsonl", [{"text": "fox and dog " * (n % 9 + 1)} for n in range(50)])
    source = {"path": path, "format": "text"}
    single = prepared("cpt", [source], cache=tmp_path / "one")
    monkeypatch.setattr(shards, "BLOCK_ROWS", 7)
    many = prepared("cpt", [source], cache=tmp_path / "many")
    assert len(list((tmp_path / "many").rglob("*.arrow"))) == 8
    assert list(documents(single)) == list(documents(many))
    monkeypatch.setattr(shards, "BLOCK_ROWS", 1000)
    monkeypatch.setattr(shards, "BLOCK_CHARACTERS", 100)
    long = prepared("cpt", [source], cache=tmp_path / "long")
    assert len(list((tmp_path / "long").rglob("*.arrow"))) > 8
    assert list(documents(single)) == list(documents(long))


# JSON rows with NUL characters are refused.
WITHOUT_NUL = st.characters(exclude_characters="\0", exclude_categories=["Cs"])


@settings(max_examples=10, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    rows=st.lists(
        st.lists(st.text(WITHOUT_NUL, max_size=25), min_size=1, max_size=3), min_size=1, max_size=12
    ),
    capacity=st.integers(120, 300),
)
def test_any_conversation_is_encoded_completely(
    prepared, write_rows, tokenizer, tmp_path, rows, capacity
) -> None:
    path = write_rows("a.jsonl", [conversation("q", *answers) for answers in rows])
    source = {"path": path, "format": "messages"}
    dataset = prepared("sft", [source], sequence_length=capacity, overlong="drop")
    for location, ids, is_target in documents(dataset):
        answers = rows[int(location.rsplit(":", 1)[1]) - 1]
        messages = conversation("q", *answers)["messages"]
        assert ids == tokenizer.apply_chat_template(messages).input_ids
        expected = "".join(f"{answer}<|im_end|>" for answer in answers)
        assert target_text(tokenizer, ids, is_target) == expected


class TestFingerprint:
    """It follows what shapes the rows, and nothing else."""

    @pytest.fixture
    def source(self, write_rows):
        rows = [conversation("Who?", "Me."), conversation("What?", "That.")]
        return {"path": write_rows("a/x.jsonl", rows), "format": "messages"}

    def test_fingerprint_does_not_depend_on_the_path(self, prepared, source, tmp_path) -> None:
        first = prepared("sft", [source]).fingerprint
        shutil.move(tmp_path / "a", tmp_path / "b")
        moved = {**source, "path": str(tmp_path / "b" / "x.jsonl")}
        again = prepared("sft", [moved])
        assert again.fingerprint == first
        assert len(list((tmp_path / "cache").rglob("store.json"))) == 1
        assert again.sequence(0).documents[0].startswith(str(tmp_path / "b"))

    def test_fingerprint_depends_on_the_content(self, prepared, source, write_rows) -> None:
        first = prepared("sft", [source]).fingerprint
        rows = [conversation("Who?", "Me."), conversation("What?", "This.")]
        write_rows("a/x.jsonl", rows)
        assert prepared("sft", [source]).fingerprint != first

    @pytest.mark.parametrize(
        "change",
        [
            {"sequence_length": 300},
            {"packing": False},
            {"overlong": "drop"},
            {"split_special_tokens": False},
            {"template": "instruction"},
        ],
    )
    def test_fingerprint_depends_on_the_settings(self, prepared, source, change) -> None:
        base = {"sequence_length": 256}
        first = prepared("sft", [source], **base).fingerprint
        assert prepared("sft", [source], **{**base, **change}).fingerprint != first

    def test_fingerprint_depends_on_kind_tokenizer_weight_and_code(
        self, source, tokenizer, tmp_path, monkeypatch
    ) -> None:
        def run(kind="sft", fingerprint="t1", **more):
            data = Data.model_validate({"sources": [{**source, **more}]})
            spec, cache = objective_class(kind).dataset, tmp_path / "cache"
            return prepare(data, spec, tokenizer, fingerprint, cache).fingerprint

        fingerprints = [run(), run("cpt"), run(fingerprint="t2"), run(weight=1.0)]
        monkeypatch.setattr(module, "CODE_VERSION", 0)
        fingerprints.append(run())
        assert len(set(fingerprints)) == 5

    def test_new_weight_reuses_the_prepared_data(self, prepared, source, tmp_path) -> None:
        prepared("sft", [source])
        stores = list((tmp_path / "cache").rglob("store.json"))
        prepared("sft", [{**source, "weight": 1.0}])
        assert list((tmp_path / "cache").rglob("store.json")) == stores

    def test_large_files_are_hashed_once_until_they_change(
        self, prepared, source, tmp_path, monkeypatch
    ) -> None:
        monkeypatch.setenv("DTRAIN_CACHE", str(tmp_path / "hashes"))
        monkeypatch.setattr(hash_cache, "CACHE_FROM_BYTES", 1)
        monkeypatch.setattr(hash_cache, "SETTLED_SECONDS", -(10**12))
        hashed = []
        real = hash_cache.file_hash
        monkeypatch.setattr(hash_cache, "file_hash", lambda p: hashed.append(p) or real(p))
        first = prepared("sft", [source]).fingerprint
        assert prepared("sft", [source]).fingerprint == first
        assert len(hashed) == 1
        with open(source["path"], "a") as file:
            file.write("\n\n")
        assert prepared("sft", [source]).fingerprint != first
        assert len(hashed) == 2
