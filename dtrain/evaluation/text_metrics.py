"""Metrics that compare the text of an answer with the reference."""

from __future__ import annotations

import re
import string
from collections import Counter
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

from dtrain.core.lazy_import import LazyModule
from dtrain.evaluation.metric import Metric, MetricResult, PromptRow, RowMetric, RowScores
from dtrain.monitoring.scores import Score

rouge_scorer: Any = LazyModule("rouge_score.rouge_scorer")
sacrebleu: Any = LazyModule("sacrebleu.metrics")

ROUGE_TYPES = ("rouge1", "rouge2", "rougeL")
BOOTSTRAP_SAMPLES = 1000
HALF_WIDTH = 1.96  # standard errors in half of a 95 % confidence interval
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
        metric_class = getattr(sacrebleu, self.kind)
        references = [row.reference_text for row in rows]
        corpus = metric_class().corpus_score(
            list(answers), [references], n_bootstrap=BOOTSTRAP_SAMPLES
        )
        sentence = metric_class(**self.sentence_settings)
        pairs = zip(answers, references, strict=True)
        scores: list[RowScores] = [
            {self.name: sentence.sentence_score(answer, [reference]).score}
            for answer, reference in pairs
        ]
        # sacrebleu draws its samples with a fixed seed
        total = Score(float(corpus.score), float(corpus._ci) / HALF_WIDTH)
        return MetricResult(scores, {self.name: total})


class Bleu(CorpusMetric):
    """BLEU of the corpus, 0 to 100."""

    name, kind = "bleu", "BLEU"
    sentence_settings = {"effective_order": True}  # noqa: RUF012


class Chrf(CorpusMetric):
    """chrF of the corpus, 0 to 100."""

    name, kind = "chrf", "CHRF"
