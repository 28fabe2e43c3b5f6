"""Many requests at once, each reply on the disk before the next question."""

from __future__ import annotations

import asyncio
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.augmentation.budget import Budget, Limits, Spent
from dtrain.augmentation.endpoint import Endpoint, Failed
from dtrain.augmentation.prompts import How, Row, request
from dtrain.core.errors import UserError
from dtrain.core.log import Meter
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


Id = tuple[int, int]  # number of the row, number of the reply to it


class Journal:
    """A file that only grows; a process that is killed loses at most the line it was writing."""

    def __init__(self, path: Path) -> None:
        """Open or make it; a torn last line is dropped.

        Raises:
            UserError: a line before the last cannot be read.
        """
        self.path = path
        path.touch()
        with open(path, "rb+") as file:
            whole = file.read().rfind(b"\n") + 1
            file.truncate(whole)
        self.done: set[Id] = {(line["row"], line["copy"]) for line in self.replies()}
        self._file = os.open(path, os.O_WRONLY | os.O_APPEND)

    def lines(self) -> Iterator[dict[str, Any]]:
        """All lines, of replies and of failures that were paid for, in the order they came."""
        with open(self.path, encoding="utf-8") as file:
            for number, text in enumerate(file, start=1):
                try:
                    line = json.loads(text)
                    yield {**line, "row": int(line["row"]), "copy": int(line["copy"])}
                except (ValueError, KeyError, TypeError) as error:
                    what = "not a line that dtrain wrote"
                    fix = "remove the line: what it held is asked again"
                    raise UserError(what, where=f"{self.path}:{number}", fix=fix) from error

    def replies(self) -> Iterator[dict[str, Any]]:
        """The lines of replies; what failed is neither done nor of use."""
        return (line for line in self.lines() if "failed" not in line)

    def write(self, line: dict[str, Any]) -> None:
        """Add a line, on the disk when this returns."""
        os.write(self._file, json.dumps(line, ensure_ascii=False).encode() + b"\n")
        os.fsync(self._file)
        if "failed" not in line:
            self.done.add((line["row"], line["copy"]))

    def close(self) -> None:
        """Nothing is written any more."""
        os.close(self._file)
