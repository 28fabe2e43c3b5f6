"""Settings of `evaluation.generation`: prompts that models answer, and how answers are scored."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal, get_args

from pydantic import Field

from dtrain.config.group import Count, Group, PathText, Text
from dtrain.config.objectives import Column

MetricKind = Literal[
    "exact_match",
    "f1",
    "rouge",
    "bleu",
    "chrf",
    "json_valid",
    "tool_call",
    "regex",
    "function",
    "judge",
]


@dataclass(frozen=True)
class MetricTraits:
    """What a metric needs, and what it reports.

    Attributes:
        implementation: "module:class" of its `dtrain.evaluation.metric.Metric`.
        description: one clause for the recipe reference.
        scores: names of its scores, if they are not the metric's name alone.
        setting: key of the set that it reads.
        needs_setting: whether it cannot be computed without that key.
        module: package that it imports.
        extra: dtrain's extra that installs the package.
        needs_reference: whether every row must have a reference.
    """

    implementation: str
    description: str
    scores: tuple[str, ...] = ()
    setting: str | None = None
    needs_setting: bool = True
    module: str | None = None
    extra: str = "metrics"
    needs_reference: bool = False


_TEXT, _RULES = "dtrain.evaluation.text_metrics", "dtrain.evaluation.rule_metrics"
METRICS: dict[str, MetricTraits] = {
    "exact_match": MetricTraits(
        f"{_TEXT}:ExactMatch",
        "equal to the reference, normalized as in SQuAD",
        needs_reference=True,
    ),
    "f1": MetricTraits(
        f"{_TEXT}:F1", "words shared with the reference, as in SQuAD", needs_reference=True
    ),
    "rouge": MetricTraits(
        f"{_TEXT}:Rouge",
        "F measures of ROUGE-1, ROUGE-2 and ROUGE-L, of rouge-score",
        scores=("rouge1", "rouge2", "rougeL"),
        module="rouge_score",
        needs_reference=True,
    ),
    "bleu": MetricTraits(
        f"{_TEXT}:Bleu", "of the corpus, of sacrebleu", module="sacrebleu", needs_reference=True
    ),
    "chrf": MetricTraits(
        f"{_TEXT}:Chrf", "of the corpus, of sacrebleu", module="sacrebleu", needs_reference=True
    ),
    "json_valid": MetricTraits(
        f"{_RULES}:JsonValid",
        "the answer is JSON, and valid by `json_schema`",
        setting="json_schema",
        needs_setting=False,
        module="jsonschema",
    ),
    "tool_call": MetricTraits(
        f"{_RULES}:ToolCall",
        "names and arguments of all calls equal those of the reference",
        needs_reference=True,
    ),
    "regex": MetricTraits(f"{_RULES}:Regex", "`regex` matches in the answer", setting="regex"),
    "function": MetricTraits(f"{_RULES}:Function", "what `function` returns", setting="function"),
    "judge": MetricTraits(
        "dtrain.evaluation.judge:JudgeMetric",
        "rating of 1 to 10 by `judge`",
        setting="judge",
        module="openai",
        extra="augment",
    ),
}
assert tuple(METRICS) == get_args(MetricKind)

JUDGE_INSTRUCTIONS = (
    "Rate how correct, helpful and complete the answer is. If there is a reference answer, an "
    "answer that contradicts it is wrong."
)


class Judge(Group):
    """A model behind an OpenAI-style endpoint that rates answers; OPENAI_API_KEY is its key."""

    endpoint: Text = Field(description="URL, such as http://localhost:8000/v1")
    model: Text = Field(description="name of the model on the server")
    instructions: Text = Field(JUDGE_INSTRUCTIONS, description="what a good answer is")
    max_requests: Count = Field(
        1000,
        description="largest number of requests of a run; equal answers are rated once",
    )


class GenerationSet(Group):
    """Prompts with references, answered by the base and after each stage."""

    path: PathText = Field(
        description=(
            "file of conversations, whose last answer is the reference, or of rows with `prompt` "
            "and `reference`; as the `path` of a source"
        )
    )
    format: Literal["auto", "messages", "sharegpt", "alpaca", "prompt_completion", "preference"] = (
        Field(
            "auto", description="as the `format` of a source; the reference of preference is chosen"
        )
    )
    columns: dict[Column, Text] = Field(
        default_factory=dict,
        description="names of the columns in the file, such as {prompt: question}",
    )
    limit: Count | None = Field(None, description="rows from the start of the file; default: all")
    max_new_tokens: Count = Field(128, description="longest answer")
    batch_size: Count = Field(8, description="answers that a rank generates at once")
    temperature: Annotated[float, Field(ge=0)] = Field(
        0.0,
        description=(
            "0: the likeliest token; else answers are sampled, each by the recipe's seed and its "
            "row alone"
        ),
    )
    top_p: Annotated[float, Field(gt=0, le=1)] = Field(
        1.0, description="sample from the likeliest tokens with this probability together"
    )
    metrics: list[MetricKind] = Field(
        default_factory=list,
        description="; ".join(f"{kind}: {m.description}" for kind, m in METRICS.items()),
    )
    json_schema: PathText | None = Field(
        None, description="JSON file with the schema of json_valid"
    )
    regex: Text | None = Field(None, description="pattern of google-re2, found anywhere")
    function: Text | None = Field(
        None,
        description=(
            "`package.module:name`, called with (prediction, reference, row), returns a number; "
            "found from the current folder"
        ),
    )
    judge: Judge | None = None

    @property
    def score_names(self) -> list[str]:
        """Names of the scores that the metrics report."""
        kinds = dict.fromkeys(self.metrics)
        return [name for kind in kinds for name in METRICS[kind].scores or (kind,)]
