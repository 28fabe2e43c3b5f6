"""Ratings of answers by a model behind an OpenAI-style endpoint, once for each distinct answer.

RUN/judge.jsonl has every reply under the hash of its request: a run that is started again, or a
model that gives the same answer, asks nothing twice, and the limit counts for the whole run.
"""

from __future__ import annotations

import asyncio
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from dtrain.augmentation.endpoint import Endpoint
from dtrain.augmentation.request_pool import Journal, Request, RequestPool, SpendingLimits
from dtrain.config.generation import GenerationSet, Judge
from dtrain.core.errors import UserError
from dtrain.core.hashes import fingerprint
from dtrain.core.log import progress
from dtrain.core.run_dir import RunDir
from dtrain.data.conversations import Messages
from dtrain.evaluation.metric import Metric, MetricFailure, MetricResult, PromptRow, means_of

CONCURRENCY = 8
MAX_TOKENS = 512  # of a reply
# How a rating is asked for follows MT-Bench (arXiv:2306.05685): reasons, then a mark to parse.
FORMAT = (
    "You judge the answer of an assistant. {instructions} Do not let the length of the answer "
    "influence you. Give your reasons in a few sentences, then a rating from 1 to 10 in exactly "
    'this form: "Rating: [[5]]".'
)
RATING = re.compile(r"\[\[(10|[1-9])(?:\.0)?\]\]")


class JudgeMetric(Metric):
    """The mean rating, from 1 to 10."""

    def __init__(self, settings: GenerationSet, where: str) -> None:
        super().__init__(settings, where)
        self._endpoint()

    def _endpoint(self) -> Endpoint:
        where = f"{self.where}.judge.endpoint"
        return Endpoint(self._judge.endpoint, self._judge.model, MAX_TOKENS, 0.0, where)

    @property
    def _judge(self) -> Judge:
        assert self.settings.judge is not None
        return self.settings.judge

    def problem(self) -> str:
        problem = self._endpoint().problem()
        return f"the judge at {self._judge.endpoint} cannot be used: {problem}" if problem else ""

    def measure(self, rows: Sequence[PromptRow], answers: Sequence[str], run: Path) -> MetricResult:
        endpoint = self._endpoint()
        requests = []
        for row, answer in zip(rows, answers, strict=True):
            messages = judge_messages(self._judge, row, answer)
            key = fingerprint([endpoint.url, endpoint.model, messages])
            requests.append(Request((key,), row.location, messages))
        try:
            replies = _replies(endpoint, self._judge.max_requests, requests, run)
        except (UserError, OSError) as error:
            raise MetricFailure(str(error).replace("\n    →", ";")) from error
        ratings = [parse_rating(replies[request.key]) for request in requests]
        if all(rating is None for rating in ratings):
            raise MetricFailure(f"no reply of {endpoint.model} has a rating, such as [[5]]")
        without = sum(rating is None for rating in ratings)
        note = f"{without} of {len(rows)} replies of the judge have no rating" if without else ""
        return means_of([{"judge": rating} for rating in ratings], note)


def judge_messages(judge: Judge, row: PromptRow, answer: str) -> Messages:
    """What the judge is asked about an answer."""
    texts = {
        "Conversation": row.prompt_text,
        "Reference answer": row.reference_text,
        "Answer": answer,
    }
    content = "\n\n".join(
        f"[{title}]\n{text}\n[End of {title.lower()}]"
        for title, text in texts.items()
        if text or title == "Answer"
    )
    system = FORMAT.format(instructions=judge.instructions)
    return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def parse_rating(reply: str) -> float | None:
    """The last rating in a reply; None if it has none."""
    ratings = RATING.findall(reply)
    return float(ratings[-1]) if ratings else None


def _replies(
    endpoint: Endpoint, max_requests: int, requests: list[Request], run: Path
) -> dict[tuple[Any, ...], str]:
    """The reply to every request, by its key.

    Raises:
        UserError: the endpoint fails, or the limit does not allow all requests.
    """
    journal = Journal(RunDir(run).judge_replies, {"request": str})
    distinct = {request.key: request for request in requests}
    missing = [request for key, request in distinct.items() if key not in journal.done]
    try:
        with progress("judge", len(distinct), len(distinct) - len(missing)) as meter:
            pool = RequestPool(endpoint, SpendingLimits(max_requests), journal, meter)
            asyncio.run(pool.run(iter(missing), CONCURRENCY))
        if pool.error:
            raise pool.error
        if pool.budget.exhausted:
            message = f"the run has made {max_requests:,} requests, and needs more"
            raise UserError(message, where=endpoint.url, fix="a larger judge.max_requests")
        if pool.failed:
            note = pool.failure_notes[-1]
            message = f"{pool.failed} of {len(missing)} requests failed; the last: {note}"
            raise UserError(message, where=endpoint.url)
        return {journal.key_of(line): line["text"] for line in journal.replies()}
    finally:
        journal.close()
