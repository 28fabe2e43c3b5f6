"""Types of a run folder's files, as far as reports read them."""

from __future__ import annotations

from typing import Annotated, Any, Required

from pydantic import Field
from typing_extensions import TypedDict

from dtrain.core.file_types import Count, Finite, Number, Numbers, Seconds

Step = Annotated[int, Field(ge=0, le=2**50)]
StageName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=200)]
Blocks = list[Number | None]  # of rows


class NumberedLine(TypedDict):
    """A line of metrics.jsonl, whatever else it holds."""

    step: Step


class MetricsLine(NumberedLine, total=False):
    """A line of metrics.jsonl, as far as it is read."""

    total_steps: Step | None
    loss: Number | None
    learning_rate: Number | None
    grad_norm: Number | None
    tokens: Number | None
    supervised_tokens: Number | None
    tokens_per_second: Number | None
    mfu: Number | None
    peak_memory_bytes: Number | None
    communication_seconds: Number | None
    save_seconds: Number | None
    time: Seconds | None
    seconds: Numbers | None
    held_out: Numbers | None
    sources: dict[str, Numbers | None] | None
    experts: dict[str, Numbers | None] | None
    skipped: str | None
    documents: list[str] | None


class _Score(TypedDict, total=False):
    value: Number | None
    stderr: Number | None
    higher_is_better: bool
    blocks: Blocks | None
    items: Blocks | None


class EvaluationFile(TypedDict, total=False):
    """The content of evaluation.json."""

    models: list[StageName] | None  # "base", then stages
    losses: dict[str, Numbers | None] | None
    sets: dict[str, str] | None
    blocks: dict[str, dict[str, Blocks]] | None
    metrics: dict[str, dict[str, dict[str, Finite | None]]] | None  # perplexities too
    sources: dict[str, dict[str, dict[str, Numbers | None]]] | None
    score_inputs: dict[str, str] | None
    scores: dict[str, dict[str, dict[str, _Score] | None]] | None


class _Used(TypedDict):
    metric: str
    set: str
    value: Number | None
    last_value: Number | None
    step: Step


class _MadeFrom(TypedDict, total=False):
    data: str | None
    settings: Any


class _Artifact(TypedDict, total=False):
    name: Required[StageName]
    identity: str | None
    made_from: _MadeFrom | None
    steps: Step | None
    used: _Used | None
    seconds: Seconds | None
    tokens_per_second: Number | None
    planned_tokens_per_second: Number | None
    peak_memory_bytes: Number | None
    planned_peak_bytes: Number | None
    trainable_parameters: Count | None
    total_parameters: Count | None
    adapter: str | None
    merged: str | None


class _Base(TypedDict, total=False):
    identity: str | None
    path: str | None


class Lineage(TypedDict, total=False):
    """The content of lineage.json."""

    name: str | None
    base: _Base | None
    artifacts: list[_Artifact] | None


class _Stage(TypedDict, total=False):
    name: Required[StageName]
    kind: str
    adapter_name: str | None
    method: dict[str, Any] | None
    train: dict[str, Any] | None
    data: dict[str, Any] | None


class _Gates(TypedDict, total=False):
    gates: dict[str, dict[str, Any]] | None


class RecipeValues(TypedDict, total=False):
    """A resolved recipe; it may be an older dtrain's, so that the schema does not fit."""

    name: str | None
    seed: Count | None
    model: dict[str, Any] | None
    engine: dict[str, Any] | None
    stages: list[_Stage] | None
    evaluation: _Gates | None
    output: dict[str, Any] | None


class Prediction(TypedDict, total=False):
    """A line of predictions/MODEL.jsonl."""

    set: Required[str]
    prompt: Required[str]
    reference: str | None
    answer: Required[str]
    scores: Numbers | None
