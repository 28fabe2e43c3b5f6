"""Where answers start and end in tokens, whatever characters and tokens stand at their edges."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from dtrain.data.tokenise import supervised_runs

PIECES = st.text(st.sampled_from("ab fox\n éß漢👩🏽‍🚀<|>\u0301"), max_size=12)


@given(st.lists(st.tuples(PIECES, PIECES), min_size=1, max_size=4), st.booleans())
def test_every_token_with_a_character_of_an_answer_is_learnt(tokenizer, turns, closed) -> None:
    text, spans = "", []
    for question, answer in turns:
        end = "<|im_end|>" if closed else ""
        spans.append((len(text + question), len(text + question + answer + end)))
        text += question + answer + end
    encoding = tokenizer([text], add_special_tokens=False).encodings[0]
    wanted = [
        place > 0 and any(first < stop and last > start for start, stop in spans)
        for place, (first, last) in enumerate(encoding.offsets)
    ]
    runs = supervised_runs(encoding, text, spans).tolist()
    found = [False] * len(encoding)
    for start, stop in zip(runs[::2], runs[1::2], strict=True):
        assert start < stop
        found[start:stop] = [True] * (stop - start)
    assert found == wanted
    assert runs == sorted(set(runs))  # no run touches the next
