"""Concurrent requests within spending limits; every reply is on disk before the next request."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.augmentation.endpoint import Endpoint, RequestError, TokenUsage
from dtrain.core.errors import UserError
from dtrain.core.files import json_line, write_all
from dtrain.core.log import Meter
from dtrain.core.ownership import open_in_place
from dtrain.data.conversations import Messages

MAX_CONSECUTIVE_FAILURES = 5  # then the endpoint is at fault, not a row
MAX_FAILURE_NOTES = 3


@dataclass(frozen=True)
class SpendingLimits:
    """Limits on everything ever requested for one output folder; None for no limit.

    Attributes:
        prices: of a million prompt tokens and completion tokens, in the currency of `cost`.
        per_minute: requests started per minute.
    """

    requests: int | None = None
    tokens: int | None = None
    cost: float | None = None
    prices: tuple[float, float] = (0.0, 0.0)
    per_minute: float | None = None

    def price(self, usage: TokenUsage) -> float:
        """The cost of some usage."""
        return (usage.tokens_in * self.prices[0] + usage.tokens_out * self.prices[1]) / 1e6

    def allows(self, usage: TokenUsage) -> bool:
        """Whether some usage is within the limits."""
        tokens = usage.tokens_in + usage.tokens_out
        return (
            (self.requests is None or usage.requests <= self.requests)
            and (self.tokens is None or tokens <= self.tokens)
            and (self.cost is None or self.price(usage) <= self.cost)
        )


class Budget:
    """What was consumed, and the most that pending requests can still consume.

    A request starts only if its maximum fits, so no limit is ever exceeded.
    """

    def __init__(self, limits: SpendingLimits, spent: TokenUsage) -> None:
        self.limits, self.spent, self.reserved = limits, spent, TokenUsage()
        self.exhausted = False
        self._changed = asyncio.Condition()
        self._next_start = 0.0

    async def reserve(self, maximum: TokenUsage) -> bool:
        """Reserve the maximum of a request; False if it does not fit and never will."""
        async with self._changed:
            while not self.limits.allows(self.spent + self.reserved + maximum):
                if self.exhausted or not self.reserved.requests:
                    self.exhausted = True
                    self._changed.notify_all()
                    return False
                await self._changed.wait()  # pending requests may consume less than reserved
            self.reserved += maximum
        await self._pace()
        return True

    async def settle(self, maximum: TokenUsage, actual: TokenUsage) -> None:
        """Replace the reservation of a finished request by what it consumed."""
        async with self._changed:
            self.reserved, self.spent = self.reserved - maximum, self.spent + actual
            self._changed.notify_all()

    async def _pace(self) -> None:
        if not self.limits.per_minute:
            return
        now = asyncio.get_running_loop().time()
        start = max(self._next_start, now)
        self._next_start = start + 60 / self.limits.per_minute
        await asyncio.sleep(start - now)


@dataclass(frozen=True)
class Request:
    """What is sent to an endpoint.

    Attributes:
        key: what identifies it in the journal, in the order of the journal's fields.
        location: what it is about, for messages.
    """

    key: tuple[Any, ...]
    location: str
    messages: Messages
    seed: int = 0


class Journal:
    """An append-only file of replies; a killed process loses at most the line it was writing."""

    def __init__(self, path: Path, fields: Mapping[str, Callable[[Any], Any]]) -> None:
        """Open or create the file; an incomplete last line is dropped.

        Args:
            fields: names of the fields of a line that identify its request, and their types.

        Raises:
            UserError: an earlier line cannot be read.
        """
        self.path, self.fields = path, fields
        handle = open_in_place(path, os.O_RDWR | os.O_CREAT)
        with open(handle, "rb+") as file:
            complete = file.read().rfind(b"\n") + 1
            file.truncate(complete)
        self.done = {self.key_of(line) for line in self.replies()}
        self._file = open_in_place(path, os.O_WRONLY | os.O_APPEND)

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines in order: replies, and failures that consumed tokens."""
        with open(self.path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = json.loads(text)
                    yield line | {name: kind(line[name]) for name, kind in self.fields.items()}
                except (ValueError, KeyError, TypeError, RecursionError) as error:
                    message = "not a line that dtrain wrote"
                    fix = "remove the line; its reply is requested again"
                    raise UserError(message, where=f"{self.path}:{number}", fix=fix) from error

    def replies(self) -> Iterator[dict[str, Any]]:
        """The lines of replies, without the failures."""
        return (line for line in self.lines() if "failed" not in line)

    def write(self, line: dict[str, Any]) -> None:
        """Append a line; it is on disk when this returns."""
        write_all(self._file, memoryview(json_line(line).encode()))
        os.fsync(self._file)
        if "failed" not in line:
            self.done.add(self.key_of(line))

    def key_of(self, line: Mapping[str, Any]) -> tuple[Any, ...]:
        """The key of the request that a line belongs to."""
        return tuple(line[name] for name in self.fields)

    def close(self) -> None:
        """Close the file."""
        os.close(self._file)


class RequestPool:
    """Sends requests to an endpoint and records the replies.

    Attributes:
        failed: number of requests without a reply; the next run repeats them. Failures that
            consumed tokens are in the journal, so that they count against the limits.
        failure_notes: the last errors.
        error: why the pool stopped early, if it did.
    """

    def __init__(
        self, endpoint: Endpoint, limits: SpendingLimits, journal: Journal, meter: Meter
    ) -> None:
        spent = sum((TokenUsage(1, *line["tokens"]) for line in journal.lines()), TokenUsage())
        self.endpoint, self.journal, self.meter = endpoint, journal, meter
        self.budget = Budget(limits, spent)
        self.failed = self._consecutive_failures = 0
        self.failure_notes: list[str] = []
        self.error: UserError | None = None

    async def run(self, requests: Iterator[Request], concurrency: int) -> None:
        """Send the requests that the journal has no reply to, `concurrency` at a time."""
        missing = (request for request in requests if request.key not in self.journal.done)
        await asyncio.gather(*(self._work(missing) for _ in range(concurrency)))
        await self.endpoint.close()

    async def _work(self, requests: Iterator[Request]) -> None:
        for request in requests:
            if self.error or not await self._send(request):
                return

    async def _send(self, request: Request) -> bool:
        """Send one request and record its reply; False if the limits allow no more."""
        maximum, actual = self.endpoint.max_usage(request.messages), TokenUsage(1)
        if not await self.budget.reserve(maximum):
            return False
        try:
            reply = await self.endpoint.complete(request.messages, seed=request.seed)
            actual = reply.usage
            line = self._journal_line(request, actual)
            self.journal.write(line | {"finish": reply.finish, "text": reply.text})
            self._consecutive_failures = 0
            self.meter.advance(1, f"{self.budget.spent.tokens_out:,} tokens out")
        except UserError as error:
            self.error = self.error or error
        except RequestError as error:
            actual = error.usage
            if actual != TokenUsage(1):
                self.journal.write(self._journal_line(request, actual) | {"failed": str(error)})
            self._note_failure(f"{request.location}: {error}")
        finally:
            await self.budget.settle(maximum, actual)
        return True

    def _note_failure(self, note: str) -> None:
        self.failed += 1
        self._consecutive_failures += 1
        self.failure_notes = [*self.failure_notes, note][-MAX_FAILURE_NOTES:]
        if self._consecutive_failures >= MAX_CONSECUTIVE_FAILURES and not self.error:
            message = f"{MAX_CONSECUTIVE_FAILURES} requests in a row failed; the last: {note}"
            fix = "check the endpoint; the same command continues with the missing replies"
            self.error = UserError(message, where=self.endpoint.url, fix=fix)

    def _journal_line(self, request: Request, usage: TokenUsage) -> dict[str, Any]:
        key = dict(zip(self.journal.fields, request.key, strict=True))
        return key | {"location": request.location, "tokens": [usage.tokens_in, usage.tokens_out]}
