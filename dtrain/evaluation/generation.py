"""Answers of a model in its engine to sets of prompts, and their scores.

A batch holds the same prompts whatever the number of ranks, since a matrix product may round
differently in another batch: so any number of ranks gives the same answers.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerBase

from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.core.files import json_line, write_atomic
from dtrain.core.log import progress, warn
from dtrain.core.run_dir import RunDir
from dtrain.data.chat_templates import answering_template
from dtrain.data.end_of_turn import find_ends
from dtrain.distributed.world import World
from dtrain.engines.base import Engine
from dtrain.evaluation.metric import MetricFailure, RowScores
from dtrain.evaluation.prompts import PromptSet
from dtrain.evaluation.scorer import shared_forward
from dtrain.models.generation import Decoding, generate_texts
from dtrain.models.load import silence_transformers
from dtrain.monitoring.scores import Score


@dataclass(frozen=True)
class Batch:
    """Prompts that are answered at once: the name of their set and the numbers of their rows."""

    name: str
    rows: list[int]


class GenerationScorer:
    """Lets a model answer sets of prompts on all ranks, and scores the answers on the first.

    Args:
        sets: by name.
        tokenizer: of the base.
    """

    every_steps: int | None = None

    def __init__(
        self, recipe: Recipe, sets: Mapping[str, PromptSet], tokenizer: PreTrainedTokenizerBase
    ) -> None:
        self._run, self._seed, self._sets = Path(recipe.output.folder), recipe.seed, sets
        self._template = answering_template(recipe.chat_template, tokenizer)
        self._tokenizer = deepcopy(tokenizer)  # generation pads it on the left
        self.inputs: Mapping[str, str] = {n: prompts.fingerprint for n, prompts in sets.items()}

    def check_metrics(self, world: World) -> None:
        """Check what metrics need from other machines, such as a judge's endpoint.

        Raises:
            UserError: it cannot be used, and no stage of the run has begun. Later it is a warning.
        """
        text = ""
        if world.is_first:
            has_begun = bool(RunDir(self._run).progress())
            for metric in (m for s in self._sets.values() for m in s.metrics.values()):
                if problem := metric.problem():
                    if has_begun:
                        warn(f"{metric.where}: {problem}")
                    else:
                        text = json.dumps([metric.where, problem])
        if text := world.broadcast_text(text):
            where, problem = json.loads(text)
            raise UserError(problem, where=where, fix="start it, or remove judge from metrics")

    def measure(self, engine: Engine, model: str) -> dict[str, dict[str, Score]]:
        """Answer every set and score the answers; see `Scorer`."""
        answers = self._answers(engine, model)
        scores: dict[str, dict[str, Any]] = {}
        if engine.world.is_first:
            lines: list[str] = []
            for name, prompts in self._sets.items():
                rows, measured = score_answers(name, prompts, answers[name], self._run)
                scores[name] = {metric: score.dump() for metric, score in measured.items()}
                lines += _prediction_lines(name, prompts, answers[name], rows)
            path = RunDir(self._run).predictions(model)
            path.parent.mkdir(exist_ok=True)
            write_atomic(path, "".join(lines))
        scores = json.loads(engine.world.broadcast_text(json.dumps(scores)))
        return {
            name: {metric: Score(**content) for metric, content in by_metric.items()}
            for name, by_metric in scores.items()
        }

    def _answers(self, engine: Engine, model: str) -> dict[str, list[str]]:
        """The answers to all rows of each set, on every rank."""
        world = engine.world
        batches = [batch for name, s in self._sets.items() for batch in batches_of(name, s)]
        answered: list[tuple[str, int, str]] = []
        total = sum(len(prompts.rows) for prompts in self._sets.values())
        with (
            progress(f"answers, {model}", total) as meter,
            silence_transformers(),
            shared_forward(engine) as transformer,
        ):
            config = transformer.generation_config
            ends, stops = find_ends(config, self._template, self._tokenizer)
            for batch in batches[world.rank :: world.size]:
                texts = [self._sets[batch.name].texts[row] for row in batch.rows]
                settings = self._sets[batch.name].settings
                decoding = Decoding(
                    settings.max_new_tokens,
                    ends,
                    stops,
                    settings.temperature,
                    settings.top_p,
                    self._seed,
                )
                replies = generate_texts(transformer, self._tokenizer, texts, decoding, batch.rows)
                answered += [(batch.name, *pair) for pair in zip(batch.rows, replies, strict=True)]
                meter.advance(len(texts) * world.size)
        answers = {name: [""] * len(prompts.rows) for name, prompts in self._sets.items()}
        for part in world.gather_bytes(json.dumps(answered).encode()):
            for name, row, text in json.loads(part):
                answers[name][row] = text
        return answers


def batches_of(name: str, prompts: PromptSet) -> list[Batch]:
    """The batches of a set: prompts of similar length, so that little is padded."""
    order = sorted(range(len(prompts.texts)), key=lambda row: len(prompts.texts[row]))
    size = prompts.settings.batch_size
    return [Batch(name, order[start : start + size]) for start in range(0, len(order), size)]


def score_answers(
    name: str, prompts: PromptSet, answers: Sequence[str], run: Path
) -> tuple[list[RowScores], dict[str, Score]]:
    """Score the answers to a set; a metric that fails has no score, and is named in a warning.

    Returns:
        The scores of each row, and of the set.
    """
    rows: list[RowScores] = [{} for _ in answers]
    scores: dict[str, Score] = {}
    for kind, metric in prompts.metrics.items():
        try:
            result = metric.measure(prompts.rows, answers, run)
        except MetricFailure as failure:
            warn(f"evaluation.generation.{name}: no score of {kind}: {failure}")
            continue
        except Exception as error:  # of a library; the training matters more
            cause = f"{type(error).__name__}: {error}"
            warn(f"evaluation.generation.{name}: no score of {kind}: {cause}")
            continue
        if result.note:
            warn(f"evaluation.generation.{name}: {kind}: {result.note}")
        scores |= result.scores
        for known, added in zip(rows, result.rows, strict=True):
            known |= added
    return rows, scores


def _prediction_lines(
    name: str, prompts: PromptSet, answers: Sequence[str], scores: Sequence[RowScores]
) -> Iterator[str]:
    for row, answer, row_scores in zip(prompts.rows, answers, scores, strict=True):
        line = {
            "set": name,
            "prompt": row.prompt_text,
            "reference": row.shown_reference,
            "answer": answer,
            "scores": row_scores,
        }
        yield json_line(line)
