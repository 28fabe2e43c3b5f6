"""What the verbs that look at data need of a recipe: its tokenizer, its rows, its held-out sets."""

from __future__ import annotations

from collections.abc import Iterator

from transformers import PreTrainedTokenizerBase

from dtrain.config.schema import Recipe, Source, Stage
from dtrain.core.folders import cache_folder
from dtrain.data.formats import Record
from dtrain.data.prepare import Mixture, prepare
from dtrain.data.quality.leaks import HeldOut, held_out
from dtrain.data.quality.lengths import TokenCounter
from dtrain.data.quality.sample import Sample, sample_of
from dtrain.data.quality.scan import Findings, scan, source_input
from dtrain.models.resolve import base_folder
from dtrain.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from dtrain.pipeline.inputs import samples_of
from dtrain.samples.make import ensure


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """The base's tokenizer; the recipe's samples are made first.

    Raises:
        UserError: the base cannot be had.
    """
    for name in sorted(samples_of(recipe)):
        ensure(name)
    return load_tokenizer(base_folder(recipe.model.base), recipe.model.trust_remote_code)


def stage_mixture(recipe: Recipe, stage: Stage) -> tuple[Mixture, PreTrainedTokenizerBase]:
    """A stage's prepared data, as training opens it.

    Raises:
        UserError: base or data cannot be used.
    """
    tokenizer = recipe_tokenizer(recipe)
    mark = tokenizer_fingerprint(tokenizer)
    batch, folder = stage.train.global_batch_sequences, cache_folder() / "stores"
    mixture = prepare(stage.data, stage.kind, tokenizer, mark, folder, global_batch=batch)
    return mixture, tokenizer


def scan_stage(recipe: Recipe, stage: Stage, processes: int) -> Findings:
    """Scan a stage's rows, against the recipe's held-out sets, in tokens of its base.

    Raises:
        UserError: base or data cannot be had at all; rows that are wrong are findings.
    """
    train_on = stage.data.train_on if stage.kind == "sft" else ""  # cpt learns every token
    data, tokenizer = stage.data, recipe_tokenizer(recipe)
    tokens = TokenCounter(tokenizer, data.template, train_on, data.split_special_tokens)
    return scan(
        [source_input(source) for source in stage.data.all_sources],
        known=held_out_of(recipe),
        tokens=tokens,
        sequence_tokens=stage.data.sequence_tokens,
        processes=processes,
    )


def scan_path(path: str, against: list[str], processes: int) -> Findings:
    """Scan files, whatever their format, against held-out files.

    Raises:
        UserError: there is nothing to read.
    """
    held = [Source(path=address) for address in against]
    return scan([source_input(Source(path=path))], known=read_held_out(held), processes=processes)


def held_out_of(recipe: Recipe) -> HeldOut | None:
    """What a recipe's evaluation sets and questions are known by; None without any."""
    held = [source for one in recipe.evaluation.sets.values() for source in one.sources]
    if recipe.evaluation.questions:
        columns = {"instruction": "question", "output": "answer"}
        path = recipe.evaluation.questions.path
        held.append(Source.model_validate({"path": path, "format": "alpaca", "columns": columns}))
    return read_held_out(held)


def read_held_out(sources: list[Source]) -> HeldOut | None:
    """What held-out rows are known by; None without any."""

    def samples() -> Iterator[tuple[str, Sample]]:
        for source in sources:
            one = source_input(source)
            for item in one.rows():
                if isinstance(item, Record):
                    yield one.parts[item.part].place(item.number), sample_of(item.value)

    return held_out(samples()) if sources else None
