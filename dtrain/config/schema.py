"""The recipe's schema: small groups, each owned by the part that reads it; units in the names."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dtrain.config.engines import EngineKind, engines_with
from dtrain.config.group import Count, Group, Share, Text
from dtrain.config.methods import Method

Dtype = Literal["auto", "float32", "bfloat16"]

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


class Model(Group):
    """The base model and how it computes."""

    base: Text = Field(description="folder, hub id, or `dtrain:NAME` for a shipped sample")
    dtype: Dtype = Field(
        "auto",
        description=(
            "of the frozen base and of compute; auto: bfloat16 on a GPU, float32 on a CPU. "
            "What trains is kept in float32"
        ),
    )
    attention: Literal["auto", "sdpa", "eager", "flash_attention_2"] = Field(
        "auto",
        description="attention implementation of transformers",
    )
    kernels: Literal["auto", "off"] = Field(
        "auto",
        description=(
            "auto: exact layers that compute and keep less, where the model's code allows; off: "
            "those of transformers and PEFT"
        ),
    )
    gradient_checkpointing: bool = Field(
        False,
        description="recompute activations: a third more time, half the memory",
    )
    trust_remote_code: bool = Field(False, description="run Python code that lies beside the model")


def _for(capability: str, meaning: str) -> str:
    return f"{', '.join(engines_with(capability))}: {meaning}"


class Engine(Group):
    """Who holds which part of the model."""

    kind: Literal["auto", EngineKind] = Field(
        "auto",
        description="auto: the launcher's own if it names one, else the plan's choice; ddp on CPUs",
    )
    shard: Literal["all", "node"] | Count = Field(
        "all",
        description=_for("shard_group", "ranks that share one copy of the model"),
    )
    offload: bool = Field(
        False, description=_for("offload", "keep parameters and optimizer in host memory")
    )
    config: str | None = Field(
        None,
        description=_for("zero_stage", "a DeepSpeed JSON file instead of the one in ds_configs/"),
    )


class Launch(Group):
    """What `dtrain run` starts on this machine."""

    processes: Literal["auto"] | Count = Field(
        "auto",
        description="ranks; auto: one a GPU, or one on a CPU",
    )

    def ranks_on_node(self, otherwise: int) -> int:
        """Ranks of each node of a job; `otherwise` where the recipe leaves it open."""
        return otherwise if self.processes == "auto" else self.processes


class Weight(Group):
    """A source's weight from a step on."""

    after_steps: Annotated[int, Field(ge=0)] = Field(
        description="optimizer steps before it holds; 0 for the first, then rising"
    )
    weight: Annotated[float, Field(ge=0)] = Field(description="0: no row of the source")


class Source(Group):
    """One place rows come from."""

    path: Text = Field(
        description=(
            "file, glob, folder, address of fsspec (s3://…), hub dataset id, or `dtrain:NAME/FILE`"
        )
    )
    format: Literal[
        "auto",
        "text",
        "alpaca",
        "messages",
        "sharegpt",
        "prompt_completion",
        "preference",
        "kto",
    ] = Field(
        "auto",
        description=(
            "what a row is: a text; instruction/input/output; messages of role/content; "
            "conversations of from/value; prompt/completion; chosen/rejected; label (kto); auto: "
            "found by looking at the first row"
        ),
    )
    columns: dict[Column, Text] = Field(
        default_factory=dict,
        description="what a column is called in the files, such as {instruction: question}",
    )
    weight: Annotated[float, Field(gt=0)] | Annotated[list[Weight], Field(min_length=1)] | None = (
        Field(
            None,
            description="share of the mixture, relative to the other sources' weights; a list of "
            "`{after_steps: 1000, weight: 0.3}` where it changes",
        )
    )
    split: str = Field("train", description="split of a hub dataset")

    def weight_after(self, steps: int) -> float | None:
        """The weight that holds after so many steps."""
        if not isinstance(self.weight, list):
            return self.weight
        return [entry.weight for entry in self.weight if entry.after_steps <= steps][-1]


Away = Literal["keep", "drop", "quarantine"]


class Clean(Group):
    """What `dtrain data clean` does for which reason; drop copies the place, quarantine the row."""

    broken: Literal["stop", "quarantine"] = Field("stop", description="rows that cannot be read")
    template: Away = Field("quarantine", description="rows that the chat template refuses")
    empty: Away = Field("drop", description="no question or no answer")
    same: Away = Field("drop", description="the answer is the question")
    exact_duplicate: Away = Field("drop", description="the first of them is kept")
    near_duplicate: Away = Field("quarantine", description="four fifths alike; the first is kept")
    leak: Away = Field("drop", description="rows that hold what an evaluation set asks or answers")
    personal: Literal["keep", "mask", "drop", "quarantine"] = Field(
        "mask", description="addresses, phone, identity and card numbers, IPs, keys"
    )
    garbled: Away = Field("quarantine", description="text decoded with the wrong table")
    inconsistent: Away = Field("keep", description="another answer to the same question")
    repeated_lines: Away = Field("keep", description="lines or words over and over")
    symbols: Away = Field("keep", description="mostly neither letters nor digits")
    refusal: Away = Field("keep", description="answers that refuse")
    cut_off: Away = Field("keep", description="answers that end inside a sentence or code")
    short: Away = Field("keep", description="answers under 10 characters")
    long: Away = Field("keep", description="answers over 4,096 characters")
    overlong: Away = Field("keep", description="more tokens than a sequence holds")
    special_tokens: Away = Field(
        "keep", description="text that holds special tokens of the base, such as `<|im_end|>`"
    )


class Replay(Source):
    """Rows of what the model knows already, mixed in so that it is not forgotten."""

    weight: None = Field(None, description="none: `ratio` says how much")
    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="of all sequences; the sources keep their proportions in the rest"
    )


class Data(Group):
    """Rows into sequences."""

    sources: list[Source] = Field(min_length=1)
    replay: Replay | None = Field(None, description="rows that are mixed in against forgetting")
    sequence_length: Annotated[int, Field(ge=8)] = Field(
        2048,
        description="tokens in a packed sequence",
    )
    packing: bool = Field(
        True,
        description=(
            "several documents in a sequence, for models that keep them apart, which is probed; "
            "false: one in each, for every model"
        ),
    )
    overlong: Literal["truncate", "drop", "fail"] = Field(
        "truncate",
        description="what to do with a conversation longer than a sequence",
    )
    train_on: Literal["all", "last", "user", "all+tool", "all+user", "all+user+tool"] = Field(
        "all",
        description=(
            "sft: which turns of a conversation are learnt: all answers, the last one, what the "
            "user says; or all answers and what tools or the user say; a turn that its row marks "
            "(`weight`, `train`, `loss`, `loss_weight`: 0 or 1, `masked`) is learned as marked"
        ),
    )
    template: str = Field(
        "auto",
        description=(
            "auto: the tokenizer's chat template; instruction: the '### Instruction' form; or "
            "a jinja file"
        ),
    )
    split_special_tokens: bool = Field(
        True,
        description=(
            "encode a special token that stands in the text of a row, such as `<|im_end|>`, as "
            "plain text; false: as that token. What the template writes is always the token"
        ),
    )
    clean: Clean = Clean()

    @property
    def all_sources(self) -> list[Source]:
        """The sources, and the replay behind them."""
        return [*self.sources, *([self.replay] if self.replay else [])]

    @property
    def weights_by_step(self) -> dict[int, list[float | None]]:
        """The sources' weights, by the steps after which they hold: rising, the first 0."""
        lists = [source.weight for source in self.sources if isinstance(source.weight, list)]
        after = {0, *(entry.after_steps for entries in lists for entry in entries)}
        return {steps: [s.weight_after(steps) for s in self.sources] for steps in sorted(after)}


class Train(Group):
    """How long, how fast."""

    global_batch_size: Count = Field(
        description="sequences in one optimizer step, over all ranks",
    )
    micro_batch_size: Literal["auto"] | Count = Field(
        1, description="sequences a rank computes at once; auto: as many as the plan says"
    )
    epochs: Annotated[float, Field(gt=0)] | None = Field(
        None,
        description="passes over the data (over the heaviest source of a mixture)",
    )
    steps: Count | None = Field(None, description="optimizer steps, instead of epochs")
    tokens: Count | None = Field(
        None,
        description="tokens, instead of epochs; rounded up to a whole step",
    )
    learning_rate: Annotated[float, Field(gt=0)] = Field(
        2e-4, description="greatest, after the warm-up; lower it when the loss oscillates"
    )
    lr_scheduler: Literal["cosine", "linear", "constant"] = Field(
        "cosine", description="how the learning rate falls after the warm-up"
    )
    warmup_ratio: Share = Field(0.03, description="share of the steps with a rising learning rate")
    optimizer: Literal["adamw", "adamw_8bit", "paged_adamw_8bit"] = Field(
        "adamw",
        description="8bit: a quarter of the state; paged: it leaves the GPU when memory is short",
    )
    weight_decay: Annotated[float, Field(ge=0)] = Field(0.01, description="decoupled, as in AdamW")
    max_grad_norm: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description="greatest global gradient norm",
    )
    evaluate_every_steps: Count | None = Field(None, description="held-out loss in between")
    evaluate_on: str | None = Field(
        None,
        description="name of the evaluation set that is watched; the first if not given",
    )
    early_stopping_patience: Count | None = Field(
        None,
        description="stop after this many evaluations without a better held-out loss",
    )
    max_non_finite_steps: Count = Field(
        3,
        description="stop after this many NaN or infinite steps in a row",
    )
    checkpoint_every_steps: Count | None = Field(
        None,
        description="save in between; the end is always saved",
    )

    @property
    def micro_batch(self) -> int:
        """Sequences at once; 1, which any choice is a multiple of, as long as it is `auto`."""
        return 1 if self.micro_batch_size == "auto" else self.micro_batch_size


class Stage(Group):
    """One stage of the chain: its base is the merged model of the stage before."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")] = Field(
        description="its folder in the run folder"
    )
    kind: Literal["cpt", "sft"] = Field(description="cpt: every token is learnt; sft: answers only")
    method: Method = Field(description="what trains")
    data: Data
    train: Train


class EvaluationSet(Data):
    """Held-out rows whose loss is measured before the first stage and after each."""

    kind: Literal["cpt", "sft"] = Field(description="cpt: the loss of every token; sft: of answers")


class Questions(Group):
    """Questions that the base and the final model answer side by side."""

    path: Text = Field(description="JSON lines with `question` and `answer`")
    count: Count = Field(3, description="how many of them, from the head of the file")
    max_new_tokens: Count = Field(64, description="longest answer")


class Evaluation(Group):
    """What is measured, by the same ranks that train."""

    sets: dict[str, EvaluationSet] = Field(default_factory=dict)
    questions: Questions | None = None


class Output(Group):
    """Where the run lies and what it keeps."""

    folder: Text = Field(description="run folder; made if it is not there")
    merge: bool = Field(
        True,
        description="merge the last stage's adapter too; the others always are",
    )
    keep_every_steps: Count | None = Field(
        None, description="keep the checkpoints of these steps for good"
    )
    keep_checkpoints: Count = Field(2, description="newest checkpoints kept of each stage")


class Recipe(Group):
    """One run: a base model and a chain of stages."""

    name: Text = Field(description="for people; it shows in the report")
    seed: Annotated[int, Field(ge=0, lt=2**63)] = Field(
        0, description="of the order of the data, the first adapter weights and dropout"
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        "auto", description="auto: GPUs if there are any"
    )
    determinism: Literal["off", "strict"] = Field(
        "off", description="strict: the same weights to the bit on 1, 2, 4, … ranks (ddp)"
    )
    model: Model
    engine: Engine = Engine()
    launch: Launch = Launch()
    stages: list[Stage] = Field(min_length=1)
    evaluation: Evaluation = Evaluation()
    output: Output
