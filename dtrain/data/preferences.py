"""The sides of a preference row, and what makes a pair of them unusable."""

from __future__ import annotations

from dtrain.data.conversations import Conversation, Messages, Preference

ASKING_ROLES = ("user", "system")
SAME_ANSWERS, OTHER_PROMPTS = "same_answers", "other_prompts"  # why a pair is left out


def both_sides(value: object) -> tuple[Conversation, Conversation]:
    """The chosen and the rejected conversation of a row with both."""
    assert isinstance(value, Preference) and value.chosen and value.rejected
    return value.chosen, value.rejected


def only_side(value: object) -> tuple[Conversation, bool]:
    """The conversation of a row with one answer, and whether it is desirable."""
    assert isinstance(value, Preference)
    side = value.chosen or value.rejected
    assert side is not None
    return side, value.chosen is not None


def shared_turns(chosen: Conversation, rejected: Conversation) -> int:
    """Number of turns that both sides begin with."""
    for index, (left, right) in enumerate(zip(chosen.messages, rejected.messages, strict=False)):
        if left != right:
            return index
    return min(len(chosen.messages), len(rejected.messages))


def pair_problem(chosen: Conversation, rejected: Conversation) -> str | None:
    """Why a pair cannot be compared: SAME_ANSWERS, OTHER_PROMPTS or None."""
    if chosen.messages == rejected.messages:
        return SAME_ANSWERS
    shared = shared_turns(chosen, rejected)
    next_turns = [turn for side in (chosen, rejected) for turn in side.messages[shared:][:1]]
    return OTHER_PROMPTS if any(turn["role"] in ASKING_ROLES for turn in next_turns) else None


def prompt_length(messages: Messages) -> int:
    """Number of messages before the answer: up to the last one of the user or the system."""
    asked = [i for i, message in enumerate(messages) if message["role"] in ASKING_ROLES]
    return asked[-1] + 1 if asked else 0
