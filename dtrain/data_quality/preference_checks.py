"""What preference rows show: unusable pairs, lengths of both answers, the share of each label."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from typing import Any

from dtrain.data.conversations import Conversation, Preference
from dtrain.data.formats import RowContent
from dtrain.data.preferences import OTHER_PROMPTS, SAME_ANSWERS, pair_problem, shared_turns
from dtrain.data.text_checks import EMPTY, Finding, answer_text, excerpt

LENGTH_BIAS = 2 / 3  # share of pairs in which one side is longer, above which length decides
FEW_LABELS = 0.1  # share of the rarer label below which the other one drowns it


def check_pair(value: RowContent) -> Iterator[Finding]:
    """Yield what makes a pair unusable; nothing for other rows."""
    if not (isinstance(value, Preference) and value.chosen and value.rejected):
        return
    answer = _answers(value.rejected, 0).strip()
    problem = pair_problem(value.chosen, value.rejected)
    if problem == SAME_ANSWERS:
        yield Finding(SAME_ANSWERS, f"“{excerpt(answer, 0)}”", len(answer))
    elif problem == OTHER_PROMPTS:
        turn = shared_turns(value.chosen, value.rejected) + 1
        yield Finding(OTHER_PROMPTS, f"they differ in turn {turn}", 1)
    if not answer:
        yield Finding(EMPTY, "no rejected answer", 1)


def count_preferences(values: list[RowContent]) -> Counter[str]:
    """Sums over preference rows, for `describe`."""
    counts: Counter[str] = Counter()
    for value in values:
        if not isinstance(value, Preference):
            continue
        if not (value.chosen and value.rejected):
            counts["desirable" if value.chosen else "undesirable"] += 1
            continue
        shared = shared_turns(value.chosen, value.rejected)
        chosen, rejected = (len(_answers(s, shared)) for s in (value.chosen, value.rejected))
        counts += Counter(pairs=1, chosen_characters=chosen, rejected_characters=rejected)
        counts["chosen_longer"] += chosen > rejected
        counts["rejected_longer"] += rejected > chosen
    return counts


def _answers(side: Conversation, start: int) -> str:
    """The assistant's turns of a side, from turn `start` on."""
    turns = side.messages[start:]
    return "\n".join(answer_text(turn) for turn in turns if turn["role"] == "assistant")


def describe(counts: Counter[str]) -> dict[str, Any]:
    """The report's values on preference rows; empty without such rows."""
    values: dict[str, Any] = {}
    if pairs := counts["pairs"]:
        values |= {
            "pairs": pairs,
            "chosen_longer": counts["chosen_longer"] / pairs,
            "rejected_longer": counts["rejected_longer"] / pairs,
            "mean_characters_chosen": round(counts["chosen_characters"] / pairs),
            "mean_characters_rejected": round(counts["rejected_characters"] / pairs),
        }
    if labels := counts["desirable"] + counts["undesirable"]:
        values |= {"labels": labels, "desirable": counts["desirable"] / labels}
    return values


def verdicts(values: dict[str, Any]) -> Iterator[tuple[bool, str, str]]:
    """Lines of the verdict on what `describe` returns: whether it is severe, text, advice."""
    if "pairs" in values:
        chosen, rejected = values["mean_characters_chosen"], values["mean_characters_rejected"]
        text = (
            f"the chosen answer is longer in {values['chosen_longer']:.0%} of the pairs "
            f"({chosen:,} against {rejected:,} characters on average)"
        )
        is_biased = max(values["chosen_longer"], values["rejected_longer"]) > LENGTH_BIAS
        advice = "the model may learn length: preference.length_normalized: true, or kind: simpo"
        yield False, text, advice if is_biased else ""
    if "labels" in values:
        share = values["desirable"]
        text = f"{share:.0%} of the rated answers are labeled true"
        if share in (0, 1):
            yield True, text, "kto needs both labels; or train on the answers with kind: sft"
        elif min(share, 1 - share) < FEW_LABELS:
            yield False, text, "raise the weight of the rarer one: preference.desirable_weight"
        else:
            yield False, text, ""
