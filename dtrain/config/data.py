"""The recipe's group `data`: the training rows and what cleaning does with them."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field

from dtrain.config.group import Group, PathText, Text
from dtrain.config.objectives import Column, RowFormat


class Weight(Group):
    """A source's weight from a given step."""

    after_steps: Annotated[int, Field(ge=0)] = Field(
        description="optimizer steps before it applies; 0 for the first entry, then increasing"
    )
    weight: Annotated[float, Field(ge=0)] = Field(description="0: no rows of the source")


class Source(Group):
    """A source of training rows."""

    path: PathText = Field(
        description=(
            "file, glob, folder, fsspec URL (s3://…), hub dataset id, or `dtrain:NAME/FILE`; "
            "file types: .txt, .md, .rst, .jsonl, .json, .csv, .tsv (each also .gz or .zst), "
            ".parquet, .arrow; a folder's other files are skipped and counted"
        )
    )
    format: Literal["auto", RowFormat] = Field(
        "auto",
        description=(
            "columns of a row: text; instruction/input/output (alpaca); messages with "
            "role/content; conversations with from/value (sharegpt); prompt/completion; "
            "chosen/rejected (preference); label (kto); auto: detected from the first row"
        ),
    )
    columns: dict[Column, Text] = Field(
        default_factory=dict,
        description="names of the columns in the files, such as {instruction: question}",
    )
    weight: Annotated[float, Field(gt=0)] | Annotated[list[Weight], Field(min_length=1)] | None = (
        Field(
            None,
            description="share of the mixture, relative to the other sources' weights; a list of "
            "`{after_steps: 1000, weight: 0.3}` to change it during training",
        )
    )
    loss_weight: Annotated[float, Field(gt=0)] = Field(
        1.0,
        description=(
            "cpt, sft: factor of the loss of its tokens; the loss of a step is the weighted mean "
            "over the global batch, so only the ratios of the sources' factors count"
        ),
    )
    split: str = Field("train", description="split of a hub dataset")

    def weight_after(self, steps: int) -> float | None:
        """The weight after this many optimizer steps."""
        if not isinstance(self.weight, list):
            return self.weight
        return [entry.weight for entry in self.weight if entry.after_steps <= steps][-1]


RowAction = Literal["keep", "drop", "quarantine"]


class Clean(Group):
    """What `dtrain data clean` does with each finding; quarantine keeps a copy of the row."""

    broken: Literal["stop", "quarantine"] = Field("stop", description="rows that cannot be read")
    template: RowAction = Field("quarantine", description="rows that the chat template refuses")
    empty: RowAction = Field("drop", description="no question or no answer")
    same: RowAction = Field("drop", description="the answer repeats the question")
    exact_duplicate: RowAction = Field("drop", description="identical to an earlier row")
    near_duplicate: RowAction = Field(
        "quarantine",
        description="at least 80 % similar to an earlier row, and asks or answers the same",
    )
    leak: RowAction = Field(
        "drop",
        description="contains a question or answer of an evaluation set, with the same numbers",
    )
    personal: Literal["keep", "mask", "drop", "quarantine"] = Field(
        "mask", description="email and IP addresses, phone, identity and card numbers, API keys"
    )
    garbled: RowAction = Field("quarantine", description="mojibake (wrong text encoding)")
    inconsistent: RowAction = Field("keep", description="a different answer to the same question")
    repeated_lines: RowAction = Field("keep", description="the same lines or words many times")
    symbols: RowAction = Field("keep", description="mostly neither letters nor digits")
    refusal: RowAction = Field("keep", description="answers that refuse")
    cut_off: RowAction = Field(
        "keep", description="answers that end in the middle of a sentence or of code"
    )
    short: RowAction = Field("keep", description="answers shorter than 10 characters")
    long: RowAction = Field("keep", description="answers longer than 4,096 characters")
    overlong: RowAction = Field(
        "keep",
        description="more tokens than `sequence_length`; `cpt` loses nothing of such a row",
    )
    special_tokens: RowAction = Field(
        "keep", description="text with special tokens of the base, such as `<|im_end|>`"
    )


class Replay(Source):
    """Rows of a domain that the model knows already, mixed in against forgetting."""

    weight: None = Field(None, description="not used: `ratio` is the share")
    ratio: Annotated[float, Field(gt=0, lt=1)] = Field(
        0.05, description="share of all sequences; the sources keep their proportions in the rest"
    )


class Data(Group):
    """The training rows, and how they become sequences of tokens."""

    sources: list[Source] = Field(min_length=1)
    replay: Replay | None = Field(None, description="rows mixed in against forgetting")
    sequence_length: Annotated[int, Field(ge=8)] = Field(
        2048,
        description="tokens in a packed sequence",
    )
    packing: bool = Field(
        True,
        description=(
            "pack several documents into a sequence; the model is tested for keeping them apart. "
            "false: one document per sequence, for every model"
        ),
    )
    overlong: Literal["truncate", "drop", "fail"] = Field(
        "truncate",
        description="what to do with a conversation longer than a sequence",
    )
    train_on: Literal["all", "last", "user", "all+tool", "all+user", "all+user+tool"] = Field(
        "all",
        description=(
            "sft and distill: which turns of a conversation have loss: all answers, the last "
            "answer, or the user's turns; + adds the turns of tools or of the user. A row's own "
            "flags (`weight`, `train`, `loss`, `loss_weight`: 0 or 1, `masked`) take precedence"
        ),
    )
    template: PathText = Field(
        "auto",
        description=(
            "auto: the tokenizer's chat template; instruction: Alpaca's '### Instruction' "
            "template; or a jinja file"
        ),
    )
    split_special_tokens: bool = Field(
        True,
        description=(
            "encode a special token in the text of a row, such as `<|im_end|>`, as plain text; "
            "false: as that token. Special tokens from the template are always tokens"
        ),
    )
    clean: Clean = Clean()

    @property
    def all_sources(self) -> list[Source]:
        """The sources, then the replay source if there is one."""
        return [*self.sources, *([self.replay] if self.replay else [])]

    @property
    def loss_weights(self) -> list[float]:
        """The factor of the loss of each of `all_sources`."""
        return [source.loss_weight for source in self.all_sources]

    @property
    def weights_by_step(self) -> dict[int, list[float | None]]:
        """Optimizer steps, ascending from 0 → the sources' weights after them."""
        lists = [source.weight for source in self.sources if isinstance(source.weight, list)]
        after = {0, *(entry.after_steps for entries in lists for entry in entries)}
        return {steps: [s.weight_after(steps) for s in self.sources] for steps in sorted(after)}
