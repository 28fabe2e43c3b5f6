"""Many requests at once, each reply on the disk before the next question."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.log import Meter
from dtrain.data.augment.asking import How, Row, request
from dtrain.data.augment.budget import Budget, Limits, Spent
from dtrain.data.augment.endpoint import Endpoint, Failed
from dtrain.data.augment.journal import Journal
from dtrain.data.conversations import Messages

GIVE_UP = 5  # requests that fail one after another: it is not the row
NOTES = 3


class Asker:
    """Asks an endpoint and writes what it says.

    Attributes:
        failed: requests without a reply; the next run asks again. Those that cost something all
            the same are in the journal, so that it counts.
        notes: the last of their faults.
        fault: why it stopped early, if it did.
    """

    def __init__(self, endpoint: Endpoint, limits: Limits, journal: Journal, meter: Meter) -> None:
        spent = sum((Spent(1, *line["tokens"]) for line in journal.lines()), Spent())
        self.endpoint, self.journal, self.meter = endpoint, journal, meter
        self.budget = Budget(limits, spent)
        self.failed = self.in_a_row = 0
        self.notes: list[str] = []
        self.fault: UserError | None = None

    async def run(self, rows: Iterator[Row], how: How, copies: int, at_once: int) -> None:
        """Ask for `copies` replies to each row, `at_once` requests at a time."""
        todo = (
            (row, copy, messages)
            for row in rows
            if (messages := request(row.value, how))
            for copy in range(copies)
            if (row.number, copy) not in self.journal.done
        )
        await asyncio.gather(*(self._work(todo) for _ in range(at_once)))
        await self.endpoint.close()

    async def _work(self, todo: Iterator[tuple[Row, int, Messages]]) -> None:
        for row, copy, messages in todo:
            if self.fault or not await self._one(row, copy, messages):
                return

    async def _one(self, row: Row, copy: int, messages: Messages) -> bool:
        """One request and its line; False if the limits allow no more."""
        most, real = self.endpoint.most(messages), Spent(1)
        if not await self.budget.take(most):
            return False
        try:
            reply = await self.endpoint.ask(messages, seed=copy)
            real = reply.spent
            told = {"finish": reply.finish, "text": reply.text}
            self.journal.write(_line(row, copy, real) | told)
            self.in_a_row = 0
            self.meter.advance(1, f"{self.budget.spent.tokens_out:,} tokens out")
        except UserError as error:
            self.fault = self.fault or error
        except Failed as error:
            real = error.spent
            if real != Spent(1):
                self.journal.write(_line(row, copy, real) | {"failed": str(error)})
            self._note(f"{row.place}: {error}")
        finally:
            await self.budget.settle(most, real)
        return True

    def _note(self, what: str) -> None:
        self.failed, self.in_a_row = self.failed + 1, self.in_a_row + 1
        self.notes = [*self.notes, what][-NOTES:]
        if self.in_a_row >= GIVE_UP and not self.fault:
            told = f"{GIVE_UP} requests failed one after another; the last: {what}"
            fix = "see to the endpoint; the same command goes on with what is missing"
            self.fault = UserError(told, where=self.endpoint.address, fix=fix)


def _line(row: Row, copy: int, spent: Spent) -> dict[str, Any]:
    tokens = [spent.tokens_in, spent.tokens_out]
    return {"row": row.number, "copy": copy, "place": row.place, "tokens": tokens}
