"""Tokenizer, rows and held-out sets of a recipe, for the commands that inspect data."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from transformers import PreTrainedTokenizerBase

from dtrain.config.objectives import OBJECTIVES
from dtrain.config.schema import Recipe, Source, Stage
from dtrain.core.errors import UserError
from dtrain.data.assistant_spans import render_answers
from dtrain.data.chat_templates import ChatTemplate, resolve_template
from dtrain.data.conversations import Conversation, Preference
from dtrain.data.formats import RowContent
from dtrain.data.prepare import PackedDataset, prepare
from dtrain.data.records import Record, open_source
from dtrain.data.special_tokens import SpecialTokens
from dtrain.data.text_checks import RowText, row_text
from dtrain.data.tokenize import MASKED
from dtrain.data_quality.decontamination import HeldOutIndex, index_held_out
from dtrain.data_quality.scan import REJECTED, scan
from dtrain.data_quality.scan_result import ScanResult
from dtrain.models.hub import base_folder
from dtrain.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from dtrain.objectives.base import build_objective
from dtrain.pipeline.stage_inputs import samples_of, store_folder
from dtrain.samples.make import ensure


def recipe_tokenizer(recipe: Recipe) -> PreTrainedTokenizerBase:
    """Load the base's tokenizer, after creating the recipe's samples.

    Raises:
        UserError: the base cannot be found or downloaded.
    """
    for name in sorted(samples_of(recipe)):
        ensure(name)
    return load_tokenizer(base_folder(recipe.model.base), recipe.model.trust_remote_code)


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
        sequence_length=stage.data.sequence_length,
        processes=processes,
    )


def scan_path(path: str, against: list[str], processes: int) -> ScanResult:
    """Scan files, whatever their format, against held-out files.

    Raises:
        UserError: there is nothing to read.
    """
    held_out = index_sources([Source(path=address) for address in against])
    return scan([open_source(Source(path=path))], held_out=held_out, processes=processes)


def held_out_of(recipe: Recipe) -> HeldOutIndex | None:
    """Build an index of a recipe's evaluation sets and questions; None if there are none."""
    sources = [source for data in recipe.evaluation.sets.values() for source in data.sources]
    if recipe.evaluation.questions:
        columns = {"instruction": "question", "output": "answer"}
        path = recipe.evaluation.questions.path
        source = {"path": path, "format": "alpaca", "columns": columns}
        sources.append(Source.model_validate(source))
    return index_sources(sources)


def index_sources(sources: list[Source]) -> HeldOutIndex | None:
    """Build an index of the rows of held-out sources; None if there are none."""

    def texts() -> Iterator[tuple[str, RowText]]:
        for source in sources:
            rows = open_source(source)
            for item in rows.rows():
                if isinstance(item, Record):
                    yield rows.location(item), row_text(item.value)

    return index_held_out(texts()) if sources else None


class TokenCounter:
    """Renders, checks and tokenizes rows, and keeps only the number of tokens.

    Attributes:
        reasons: why the template rejects a row of the last batch, by the row's index.
        counts: of all batches, for `tokenize.notes`.
    """

    def __init__(
        self,
        tokenizer: PreTrainedTokenizerBase,
        template: str,
        train_on: str = "all",
        split_special_tokens: bool = True,
    ) -> None:
        """Count with the recipe's settings; `train_on` is "" if every token is a target.

        The template is resolved at the first conversation, which may raise a UserError then.
        """
        self.tokenizer, self.setting, self.train_on = tokenizer, template, train_on
        self.template: ChatTemplate | None = None
        self.reasons: dict[int, str] = {}
        self.counts: Counter[str] = Counter()
        self.special_tokens, self.split = SpecialTokens(tokenizer), split_special_tokens

    def __call__(self, values: list[RowContent]) -> NDArray[np.int32]:
        """Return tokens of each row, REJECTED if the template rejects it."""
        self.reasons = {}
        texts = [self._text(number, value) for number, value in enumerate(values)]
        known = [text for text in texts if text is not None]
        special = any(isinstance(value, str) for value in values)
        encoded = self.tokenizer(known, add_special_tokens=special, verbose=False) if known else {}
        lengths = iter([len(ids) for ids in encoded.get("input_ids", [])])
        counts = np.array([REJECTED if t is None else next(lengths) for t in texts], np.int32)
        for number, (value, text) in enumerate(zip(values, texts, strict=True)):
            if self.split and text is not None and self.special_tokens.find(value):
                counts[number] = self._split(number, value, text)
        return counts

    def _split(self, number: int, value: RowContent, text: str) -> int:
        """Tokens of a row whose special tokens are encoded as plain text."""
        shown = (value.chosen or value.rejected) if isinstance(value, Preference) else value
        hidden = self.special_tokens.hidden(shown)
        try:
            if isinstance(hidden, Conversation):
                assert self.template is not None
                hidden = render_answers(self.template, hidden, "", self.train_on, Counter())[0]
            plain = self.special_tokens.template_hidden(text, hidden, "")
            adds = isinstance(value, str)
            return len(self.special_tokens.encode(plain, "", add_special_tokens=adds)[0])
        except UserError as error:
            self.reasons[number] = error.message
            return REJECTED

    def _text(self, number: int, value: RowContent) -> str | None:
        if isinstance(value, str):
            return value
        if self.template is None:
            self.template = resolve_template(self.setting, self.tokenizer)
        sides = (value.chosen, value.rejected) if isinstance(value, Preference) else (value,)
        texts = []
        for talk in sides:
            if talk is None:
                continue
            try:
                text, spans = render_answers(self.template, talk, "", self.train_on, self.counts)
            except UserError as error:
                self.reasons[number] = error.message
                return None
            self.counts[MASKED] += bool(self.train_on) and not spans
            texts.append(text)
        return texts[0]
