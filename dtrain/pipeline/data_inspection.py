"""Tokenizer, rows and held-out sets of a recipe, for the commands that inspect data."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain

from transformers import PreTrainedTokenizerBase

from dtrain.config.data import Source
from dtrain.config.objectives import OBJECTIVES
from dtrain.config.schema import Recipe, Stage
from dtrain.core.cache_paths import store_folder
from dtrain.data.packed_dataset import PackedDataset
from dtrain.data.packing import Packing
from dtrain.data.prepare import prepare
from dtrain.data.records import Record, open_source
from dtrain.data.text_checks import RowText, row_text
from dtrain.data_quality.decontamination import HeldOutIndex, index_held_out
from dtrain.data_quality.scan import TokenCounter, scan
from dtrain.data_quality.scan_result import ScanResult
from dtrain.evaluation.prompts import read_prompts
from dtrain.models.added_tokens import open_tokenizer
from dtrain.models.tokenizer import tokenizer_fingerprint
from dtrain.objectives.base import build_objective
from dtrain.pipeline.input_checks import samples_of
from dtrain.samples.make import ensure


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, after creating the recipe's samples.

    Raises:
        UserError: the base cannot be found or downloaded.
    """
    for name in sorted(samples_of(recipe)):
        ensure(name)
    return open_tokenizer(recipe.model)


def stage_dataset(recipe: Recipe, stage: Stage) -> tuple[PackedDataset, PreTrainedTokenizerBase]:
    """Open a stage's prepared data, as training does.

    Raises:
        UserError: base or data cannot be used.
    """
    tokenizer = recipe_tokenizer(recipe)
    dataset = prepare(
        stage.data,
        build_objective(stage).dataset,
        tokenizer,
        tokenizer_fingerprint(tokenizer),
        store_folder(),
        global_batch=stage.train.global_batch_size,
    )
    return dataset, tokenizer


def scan_stage(recipe: Recipe, stage: Stage, processes: int) -> ScanResult:
    """Scan a stage's rows against the recipe's held-out sets, and count tokens of its base.

    Raises:
        UserError: base or data cannot be read at all; bad rows are findings.
    """
    train_on = stage.data.train_on if OBJECTIVES[stage.kind].trains_on_answers else ""
    data, tokenizer = stage.data, recipe_tokenizer(recipe)
    tokens = TokenCounter(tokenizer, data.template, train_on, data.split_special_tokens)
    return scan(
        [open_source(source) for source in stage.data.all_sources],
        held_out=held_out_of(recipe),
        token_counter=tokens,
        sequence_length=longest_row(stage),
        processes=processes,
    )


def longest_row(stage: Stage) -> int | None:
    """Tokens above which a row is a finding; None if longer rows go on in the next sequence."""
    continues = build_objective(stage).dataset.packing is Packing.STREAM
    is_asked_for = stage.data.clean.overlong != "keep"
    return None if continues and not is_asked_for else stage.data.sequence_length


def scan_path(path: str, against: list[str], processes: int) -> ScanResult:
    """Scan files, whatever their format, against held-out files.

    Raises:
        UserError: there is nothing to read.
    """
    held_out = index_sources([Source(path=address) for address in against])
    return scan([open_source(Source(path=path))], held_out=held_out, processes=processes)


def held_out_of(recipe: Recipe) -> HeldOutIndex | None:
    """Build an index of a recipe's evaluation sets and prompts; None if there are none."""
    evaluation = recipe.evaluation
    sources = [source for data in evaluation.sets.values() for source in data.sources]
    prompts = (
        (row.location, row_text(row.conversation))
        for name, settings in evaluation.generation.items()
        for row in read_prompts(settings, f"evaluation.generation.{name}")
    )
    if not sources and not evaluation.generation:
        return None
    return index_held_out(chain(_texts(sources), prompts))


def index_sources(sources: list[Source]) -> HeldOutIndex | None:
    """Build an index of the rows of held-out sources; None if there are none."""
    return index_held_out(_texts(sources)) if sources else None


def _texts(sources: list[Source]) -> Iterator[tuple[str, RowText]]:
    for source in sources:
        rows = open_source(source)
        for item in rows.rows():
            if isinstance(item, Record):
                yield rows.location(item), row_text(item.value)
