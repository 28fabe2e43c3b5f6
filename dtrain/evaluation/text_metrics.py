"""Metrics that compare the text of an answer with the reference."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from dtrain.core.lazy_import import LazyModule
from dtrain.evaluation.metric import Metric, MetricResult, PromptRow, RowMetric, RowScores
from dtrain.monitoring.scores import Score

rouge_scorer: Any = LazyModule("rouge_score.rouge_scorer")
sacrebleu: Any = LazyModule("sacrebleu.metrics")

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
BOOTSTRAP_SAMPLES = 1000
_ARTICLES = re.compile(r"\b(a|an|the)\b")
_PUNCTUATION = str.maketrans("", "", string.punctuation)


def normalize_words(text: str) -> list[str]:
    """The words of a text without case, punctuation and articles, as SQuAD's evaluation does."""
    return _ARTICLES.sub(" ", text.lower().translate(_PUNCTUATION)).split()


class ExactMatch(RowMetric):
    """Whether an answer has the words of the reference (SQuAD, arXiv:1606.05250)."""

    def score(self, row: PromptRow, answer: str) -> RowScores:
        same = normalize_words(answer) == normalize_words(row.reference_text)
        return {"exact_match": float(same)}


class F1(RowMetric):
    """Harmonic mean of precision and recall of an answer's words (SQuAD, arXiv:1606.05250)."""

    def score(self, row: PromptRow, answer: str) -> RowScores:
        words, expected = normalize_words(answer), normalize_words(row.reference_text)
        if not words or not expected:  # as SQuAD 2.0 does
            return {"f1": float(words == expected)}
        shared = (Counter(words) & Counter(expected)).total()
        return {"f1": 2 * shared / (len(words) + len(expected))}


class Rouge(RowMetric):
    """F measures of ROUGE, by rouge-score with its own words and without stemming."""

    @cached_property
    def _scorer(self) -> Any:
        return rouge_scorer.RougeScorer(ROUGE_TYPES)

    def score(self, row: PromptRow, answer: str) -> RowScores:
        scores = self._scorer.score(row.reference_text, answer)
        return {name: scores[name].fmeasure for name in ROUGE_TYPES}


class CorpusMetric(Metric):
    """A metric of sacrebleu, computed over the corpus; a row gets the score of its sentence.

    Attributes:
        name: of the score.
        kind: sacrebleu's class.
        sentence_settings: of the scores of sentences.
    """

    name: str
    kind: str
    sentence_settings: dict[str, Any] = {}  # noqa: RUF012 (constants of the classes)

    def measure(self, rows: Sequence[PromptRow], answers: Sequence[str], run: Path) -> MetricResult:
        metric_class, texts = getattr(sacrebleu, self.kind), list(answers)
        references = [row.reference_text for row in rows]
        corpus, sentence = metric_class(), metric_class(**self.sentence_settings)
        pairs = zip(texts, references, strict=True)
        scores: list[RowScores] = [
            {self.name: float(sentence.sentence_score(text, [reference]).score)}
            for text, reference in pairs
        ]
        value = float(corpus.corpus_score(texts, [references]).score)
        total = Score(value, _bootstrap_error(corpus, texts, references))
        return MetricResult(scores, {self.name: total})


def _bootstrap_error(metric: Any, texts: list[str], references: list[str]) -> float | None:
    """Standard deviation of a corpus score over samples of the rows, drawn with replacement.

    `corpus_score(n_bootstrap=…)` gives a confidence interval, but keeps all samples in memory and
    fails where a score is exactly 0 in some of them (sacrebleu 2.6).
    """
    rows = np.array(metric._extract_corpus_statistics(texts, [references]), dtype=np.float64)
    if len(rows) < 2:
        return None
    draw = np.random.default_rng(0)
    values = []
    for _ in range(BOOTSTRAP_SAMPLES):
        sums = rows[draw.integers(len(rows), size=len(rows))].sum(0)
        values.append(float(metric._compute_score_from_stats(sums.tolist()).score))
    return float(np.std(values, ddof=1))


class Bleu(CorpusMetric):
    """BLEU of the corpus, 0 to 100."""

    name, kind = "bleu", "BLEU"
    sentence_settings = {"effective_order": True}  # noqa: RUF012


class Chrf(CorpusMetric):
    """chrF of the corpus, 0 to 100."""

    name, kind = "chrf", "CHRF"
