"""The objectives and row formats that a recipe may name, as far as no torch is needed.

`dtrain.objectives` computes their losses, `dtrain.data.formats` reads the formats. A new objective
is one entry here and the class that it names; a new format is one here and one in
`dtrain.data.formats`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

ObjectiveKind = Literal["cpt", "sft", "distill", "dpo", "kto", "orpo", "simpo", "cpo"]
RowFormat = Literal[
    "text", "alpaca", "messages", "sharegpt", "prompt_completion", "preference", "kto"
]
Column = Literal[
    "text",
    "instruction",
    "input",
    "output",
    "history",
    "messages",
    "conversations",
    "system",
    "tools",
    "prompt",
    "completion",
    "chosen",
    "rejected",
    "label",
]
ContentKind = Literal["text", "conversation", "preference", "labeled answer"]

CONTENT: dict[str, ContentKind] = {
    "text": "text",
    "alpaca": "conversation",
    "messages": "conversation",
    "sharegpt": "conversation",
    "prompt_completion": "conversation",
    "preference": "preference",
    "kto": "labeled answer",
}


class Forwards(NamedTuple):
    """Forward passes in a step, in addition to those that have a backward pass.

    Attributes:
        share: of the tokens of a micro-batch that they compute, over all of them.
        runs: number of passes, each of which gathers the weights where ranks share them.
    """

    share: float
    runs: int


NO_FORWARDS = Forwards(0.0, 0)


@dataclass(frozen=True)
class ObjectiveTraits:
    """What is known of an objective without torch.

    Attributes:
        title: name in reports.
        implementation: "module:class" of its `dtrain.objectives.base.Objective`.
        description: one clause for the recipe reference.
        contents: what a row may hold.
        trains_on_answers: only turns of a conversation are trained, which the chat template
            renders; otherwise every token is.
        sums_token_losses: the loss is the cross-entropy of each target, which
            `train.label_smoothing` can smooth and a source's `loss_weight` can scale.
        preference_keys: keys of the `preference` group that it reads.
        needs_teacher: the `distill` group names another model, or the one that the stage started
            from, which computes each batch too.
        own_forwards, reference_forwards: without a backward pass, by the model itself and by its
            reference; the reference's are none in a step where they are computed once.
    """

    title: str
    implementation: str
    description: str
    contents: frozenset[ContentKind]
    trains_on_answers: bool
    sums_token_losses: bool = False
    preference_keys: frozenset[str] = frozenset()
    needs_teacher: bool = False
    own_forwards: Forwards = NO_FORWARDS
    reference_forwards: Forwards = NO_FORWARDS

    @property
    def needs_reference(self) -> bool:
        """Whether the model that the stage started from computes each batch too."""
        return self.reference_forwards.runs > 0


OBJECTIVES: dict[str, ObjectiveTraits] = {
    "cpt": ObjectiveTraits(
        title="continued pretraining",
        implementation="dtrain.objectives.causal_lm:ContinuedPretraining",
        description="loss on every token",
        contents=frozenset({"text", "conversation"}),
        trains_on_answers=False,
        sums_token_losses=True,
    ),
    "sft": ObjectiveTraits(
        title="supervised fine-tuning",
        implementation="dtrain.objectives.causal_lm:SupervisedFinetuning",
        description="loss on answers only",
        contents=frozenset({"conversation"}),
        trains_on_answers=True,
        sums_token_losses=True,
    ),
    "distill": ObjectiveTraits(
        title="distillation",
        implementation="dtrain.objectives.distill:Distillation",
        description="probabilities of a teacher for answers",
        contents=frozenset({"conversation"}),
        trains_on_answers=True,
        needs_teacher=True,
    ),
    "dpo": ObjectiveTraits(
        title="direct preference optimization",
        implementation="dtrain.objectives.preference:Dpo",
        description="chosen over rejected answers, against the stage's base",
        contents=frozenset({"preference"}),
        trains_on_answers=True,
        preference_keys=frozenset(
            {"loss", "beta", "label_smoothing", "length_normalized", "sft_weight"}
            | {"precompute_reference"}
        ),
        reference_forwards=Forwards(1.0, 1),
    ),
    "kto": ObjectiveTraits(
        title="Kahneman-Tversky optimization",
        implementation="dtrain.objectives.kto:Kto",
        description="answers rated true or false, against the stage's base",
        contents=frozenset({"labeled answer"}),
        trains_on_answers=True,
        preference_keys=frozenset(
            {"beta", "desirable_weight", "undesirable_weight", "precompute_reference"}
        ),
        own_forwards=Forwards(0.5, 1),  # of unrelated answers, half of the tokens: the baseline
        reference_forwards=Forwards(1.5, 2),  # of all answers, and of the unrelated ones
    ),
    "orpo": ObjectiveTraits(
        title="odds ratio preference optimization",
        implementation="dtrain.objectives.preference:Orpo",
        description="fine-tuning on chosen answers with a penalty on rejected ones",
        contents=frozenset({"preference"}),
        trains_on_answers=True,
        preference_keys=frozenset({"beta"}),
    ),
    "simpo": ObjectiveTraits(
        title="simple preference optimization",
        implementation="dtrain.objectives.preference:SimPo",
        description="chosen over rejected answers by log-probability per token, no reference",
        contents=frozenset({"preference"}),
        trains_on_answers=True,
        preference_keys=frozenset({"beta", "target_margin"}),
    ),
    "cpo": ObjectiveTraits(
        title="contrastive preference optimization",
        implementation="dtrain.objectives.preference:Cpo",
        description="chosen over rejected answers and fine-tuning on chosen ones, no reference",
        contents=frozenset({"preference"}),
        trains_on_answers=True,
        preference_keys=frozenset({"beta", "sft_weight"}),
    ),
}
KINDS_HELP = "; ".join(f"{kind}: {traits.description}" for kind, traits in OBJECTIVES.items())

# Why rows of this content do not suit another objective, and what to do about it.
_MISMATCH: dict[ContentKind, tuple[str, str]] = {
    "text": ("plain text has no answers", "kind=cpt, or format=alpaca or messages"),
    "conversation": (
        "a conversation has one answer, not two to compare",
        "kind=sft, or rows with chosen and rejected answers",
    ),
    "preference": (
        "each row compares two answers",
        "kind=dpo; or train on the chosen answers: format=prompt_completion with "
        "columns={completion: chosen, prompt: NAME}, where NAME is the prompt's column, such as "
        "prompt or conversations",
    ),
    "labeled answer": (
        "each row rates an answer",
        "kind=kto; or keep the rows with a true label, as format=messages or prompt_completion",
    ),
}


def format_mismatch(kind: str, row_format: str) -> tuple[str, str] | None:
    """Why an objective cannot train on rows of this format, and the fix; None if it can."""
    content = CONTENT[row_format]
    if content in OBJECTIVES[kind].contents:
        return None
    reason, fix = _MISMATCH[content]
    return f"{kind} cannot train on {row_format} rows: {reason}", fix
