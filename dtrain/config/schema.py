"""The recipe's schema: small groups of keys, with units in their names."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from dtrain.config.data import Data
from dtrain.config.distill import DistillSettings
from dtrain.config.engines import EngineKind, engines_with
from dtrain.config.gates import Gate
from dtrain.config.generation import GenerationSet
from dtrain.config.group import Count, Group, PathText, Text
from dtrain.config.methods import Method
from dtrain.config.objectives import KINDS_HELP, OBJECTIVES, ObjectiveKind
from dtrain.config.preference import PreferenceSettings
from dtrain.config.regularize import Regularize
from dtrain.config.tasks import Tasks
from dtrain.config.tokens import Tokens
from dtrain.config.trackers import TRACKERS, TrackerKind
from dtrain.config.train import Train

Dtype = Literal["auto", "float32", "bfloat16"]


class Model(Group):
    """The base model and how it computes."""

    base: PathText = Field(
        description=(
            "folder, hub id, or `dtrain:NAME` for a shipped sample; its weights are floats, MXFP4 "
            "(gpt-oss) or fp8 with scales, of which the values are read"
        )
    )
    revision: Text | None = Field(
        None, description="branch, tag or commit of a hub id; default: its main branch"
    )
    dtype: Dtype = Field(
        "auto",
        description=(
            "dtype of the frozen base and of computation; auto: bfloat16 on a GPU, float32 on a "
            "CPU. Trainable parameters are float32"
        ),
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="attention implementation of transformers",
    )
    kernels: Literal["auto", "off"] = Field(
        "auto",
        description=(
            "auto: exact layers that need less time and memory, where the model's code allows; "
            "off: the layers of transformers and PEFT"
        ),
    )
    gradient_checkpointing: bool = Field(
        False,
        description="recompute activations: a third more time, half the memory",
    )
    trust_remote_code: bool = Field(False, description="run the Python code in the model's folder")
    tokens: Tokens | None = Field(
        None,
        description=(
            "new tokens for the base's tokenizer, with rows in its embeddings and output matrix "
            "that every stage trains"
        ),
    )


def _for(capability: str, meaning: str) -> str:
    return f"{', '.join(engines_with(capability))}: {meaning}"


class EngineSettings(Group):
    """How the model is distributed over the ranks."""

    kind: Literal["auto", EngineKind] = Field(
        "auto",
        description="auto: the launcher's engine, else the plan's choice; ddp on CPUs",
    )
    shard: Literal["all", "node"] | Count = Field(
        "all",
        description=_for("shard_group", "ranks that share one copy of the model"),
    )
    offload: bool = Field(
        False, description=_for("offload", "keep parameters and optimizer in host memory")
    )
    config: PathText | None = Field(
        None,
        description=_for("zero_stage", "a DeepSpeed JSON file instead of the one in ds_configs/"),
    )


class Launch(Group):
    """What `dtrain run` starts on this machine."""

    processes: Literal["auto"] | Count = Field(
        "auto",
        description="ranks; auto: one per GPU, or one on a CPU",
    )

    def ranks_on_node(self, otherwise: int) -> int:
        """Ranks on each node of a job; `otherwise` if the recipe says auto."""
        return otherwise if self.processes == "auto" else self.processes


Name = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", max_length=100)]
SetName = Annotated[str, Field(min_length=1, max_length=100)]  # in metrics, and in trackers' keys


class Stage(Group):
    """A stage of the chain; its base is the merged model of the stage before."""

    name: Name = Field(description="name of its folder in the run folder")
    kind: ObjectiveKind = Field(description=KINDS_HELP)
    adapter_name: Name | None = Field(
        None,
        description="name of one of several adapters that start from the same model, at the end of "
        "the chain, to be served together. `adapters: {legal: {sources: [...]}, code: {sources: "
        "[...]}}` in a stage, instead of `data.sources`, stands for one such stage per name",
    )
    method: Method = Field(description="which parameters train")
    data: Data
    train: Train
    preference: PreferenceSettings = PreferenceSettings()
    distill: DistillSettings | None = None
    regularize: Regularize | None = Field(
        None, description="a term against forgetting, added to the loss"
    )

    @property
    def stores_reference(self) -> bool:
        """Whether the reference computes once, before the training, instead of in each step."""
        is_needed = OBJECTIVES[self.kind].needs_reference
        is_gone = not self.method.base_when_disabled
        return is_needed and (self.preference.precompute_reference or is_gone)


class EvaluationSet(Data):
    """Held-out rows; their loss is measured before the first stage and after each stage."""

    kind: ObjectiveKind = Field(description=KINDS_HELP)
    calibration: bool = Field(
        False,
        description=(
            "cpt, sft: measure `ece` too, the expected calibration error of the next token's "
            "probability, in 15 bins"
        ),
    )
    preference: PreferenceSettings = PreferenceSettings()
    distill: DistillSettings | None = None


GENERAL = "general"
GENERAL_SET: dict[str, Any] = {
    "kind": "cpt",
    "sequence_length": 128,
    "sources": [{"path": "dtrain:general/heldout.jsonl", "format": "text"}],
}


class Evaluation(Group):
    """What is measured, on the ranks that train."""

    sets: dict[SetName, EvaluationSet] = Field(default_factory=dict)
    tasks: Tasks | None = None
    generation: dict[SetName, GenerationSet] = Field(
        default_factory=dict, description="prompts that the base and every stage answer"
    )
    gates: dict[str, Gate] = Field(
        default_factory=dict,
        description=(
            "by set or task: limits on how much worse than the base a stage may make it; a stage "
            "beyond them ends the run before its merge. `general` without a set of that name "
            "measures general texts that are shipped"
        ),
    )

    @model_validator(mode="before")
    @classmethod
    def _with_general_set(cls, values: Any) -> Any:
        """Add the shipped texts where a gate asks for them."""
        if not isinstance(values, dict):
            return values
        sets, generation, gates = (values.get(k) or {} for k in ("sets", "generation", "gates"))
        if not all(isinstance(value, dict) for value in (sets, generation, gates)):
            return values  # each is refused with its own name
        if GENERAL in gates and GENERAL not in generation:
            return values | {"sets": sets | {GENERAL: sets.get(GENERAL, GENERAL_SET)}}
        return values

    @property
    def measured_names(self) -> list[str]:
        """Names that a gate can have."""
        tasks = self.tasks.names if self.tasks else []
        return [*self.sets, *tasks, *self.generation]


class Monitoring(Group):
    """Where metrics are sent, in addition to the run folder."""

    report_to: list[TrackerKind] = Field(
        default_factory=list,
        description=(
            "trackers, each with the client's own environment variables: "
            + "; ".join(f"{kind} ({client.settings})" for kind, client in TRACKERS.items())
        ),
    )
    project: Text | None = Field(
        None, description="name of the project in the trackers; default: the recipe's name"
    )


class Output(Group):
    """The run folder and what is kept in it."""

    folder: PathText = Field(description="run folder; created if missing")
    reuse: PathText | None = Field(
        None,
        description="a run folder whose finished stages count as this run's, where settings, seed, "
        "data and base are the same",
    )
    merge: bool = Field(
        True,
        description="merge the last stage's adapter; the others are always merged",
    )
    keep_every_steps: Count | None = Field(
        None, description="keep every checkpoint whose step is a multiple of this"
    )
    keep_checkpoints: Count = Field(
        2, description="checkpoints kept per stage, the newest; the best is kept too"
    )
    use: Literal["last", "best"] = Field(
        "last",
        description=(
            "checkpoint of a stage that is evaluated, merged and handed to the next stage: its "
            "last step's, or the best one by `train.evaluate_on`"
        ),
    )


class Recipe(Group):
    """A run: a base model and a chain of stages."""

    name: Text = Field(description="shown in the report")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="seed of the data order, the initial adapter weights and dropout"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: GPUs if there are any"
    )
    determinism: Literal["off", "strict"] = Field(
        "off", description="strict: bitwise identical weights on 1, 2, 4, … ranks"
    )
    model: Model
    engine: EngineSettings = EngineSettings()
    launch: Launch = Launch()
    stages: list[Stage] = Field(min_length=1)
    evaluation: Evaluation = Evaluation()
    monitoring: Monitoring = Monitoring()
    output: Output

    @property
    def teachers(self) -> dict[str, str]:
        """Key → folder or hub id of each model that a stage or a held-out set distills from."""
        groups = {f"stages.{stage.name}": stage.distill for stage in self.stages}
        groups |= {f"evaluation.sets.{n}": s.distill for n, s in self.evaluation.sets.items()}
        return {
            f"{key}.distill.teacher": group.teacher_folder
            for key, group in groups.items()
            if group is not None and group.teacher_folder is not None
        }

    @property
    def models(self) -> Iterator[tuple[str, str, str | None]]:
        """Key, address and revision of the base and of every teacher."""
        yield "model.base", self.model.base, self.model.revision
        yield from ((key, address, None) for key, address in self.teachers.items())

    @property
    def chat_template(self) -> str:
        """The template of conversations: that of the last stage that trains on answers."""
        named = [s.data.template for s in self.stages if OBJECTIVES[s.kind].trains_on_answers]
        return named[-1] if named else "auto"

    def merges(self, stage: Stage) -> bool:
        """Whether a stage is merged: for a later stage, or because `output.merge` asks for it."""
        is_parent = any(self.parent_of(other) == stage for other in self.stages)
        return is_parent or (self.output.merge and stage == self.stages[-1])

    def parent_of(self, stage: Stage) -> Stage | None:
        """The stage whose merged model a stage starts from; None for the recipe's base."""
        before = self.stages[: self.stages.index(stage)]
        if stage.adapter_name is not None:
            before = [other for other in before if other.adapter_name is None]
        return before[-1] if before else None
