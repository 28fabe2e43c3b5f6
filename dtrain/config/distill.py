"""Settings of distillation."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dtrain.config.group import Count, Group, PathText

OWN_BASE = "base"
"""The teacher that is the model which the stage starts from."""


class DistillSettings(Group):
    """What a stage of kind distill learns from its teacher."""

    teacher: PathText = Field(
        description=(
            "folder or hub id of a model with the base's tokenizer; or base: the model that the "
            "stage starts from, which is the model without its adapter"
        )
    )
    loss: Literal["forward_kl", "reverse_kl", "jsd"] = Field(
        "forward_kl",
        description=(
            "forward_kl (arXiv:1503.02531): cover all that the teacher may say; reverse_kl "
            "(arXiv:2306.08543): keep to what it would say; jsd (arXiv:2306.13649): between them"
        ),
    )
    beta: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.5, description="jsd: weight of the teacher in the mixture that both are compared with"
    )
    temperature: Annotated[float, Field(gt=0)] = Field(
        1.0, description="divides the logits of both; the divergence is multiplied by its square"
    )
    ce_weight: Annotated[float, Field(ge=0, lt=1)] = Field(
        0.0, description="weight of the rows' own cross-entropy; the divergence has the rest"
    )

    top_k: Count | None = Field(
        None,
        description=(
            "with forward_kl: store the log-probabilities of the teacher's k likeliest tokens "
            "once, before the training, and learn those, which then add up to 1; 8 k bytes for "
            "each token of an answer. Without it the teacher computes every batch"
        ),
    )

    @property
    def teacher_folder(self) -> str | None:
        """Folder or hub id of the teacher; None for the model that the stage starts from."""
        return None if self.teacher == OWN_BASE else self.teacher
