"""Answers a file of prompts in batches; the file of answers records how far it got."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import IO, Any

from dtrain.core.errors import UserError, UserErrors
from dtrain.core.files import bounded_lines, open_text
from dtrain.core.locks import lock_file
from dtrain.core.log import progress, say
from dtrain.core.ownership import open_in_place
from dtrain.data.conversations import Messages, parse_messages
from dtrain.serving.generator import TextGenerator

QUESTIONS = ("prompt", "question", "instruction")
ANSWER, BY = "generated", "generated_by"
PROBLEMS_SHOWN = 10


@dataclass(frozen=True)
class Prompt:
    """One row of the file, and the conversation to continue."""

    row: dict[str, Any]
    messages: Messages


def read_prompts(path: Path) -> Iterator[Prompt | UserError]:
    """The rows of a JSON-lines file, or what is wrong with one; empty lines do not count.

    A row has `messages`, or one of `prompt`, `question` and `instruction` (with `input`).
    """
    try:
        with open_text(path) as file:
            for number, line in bounded_lines(file, str(path)):
                if line.strip():
                    yield _prompt(line, f"{path}:{number}")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot be read: {error}", where=str(path)) from error


def _prompt(line: str, where: str) -> Prompt | UserError:
    try:
        row = json.loads(line)
        _line({"row": row})
    except UnicodeEncodeError:
        return UserError("contains an unpaired surrogate", where=where, fix="fix the row")
    except (ValueError, RecursionError) as error:
        return UserError(f"is not JSON: {error}", where=where)
    if not isinstance(row, dict):
        return UserError("is not a JSON object", where=where)
    if ANSWER in row or BY in row:
        return UserError(f"has a `{ANSWER}` already", where=where, fix="rename it")
    if "messages" in row:
        try:
            return Prompt(row, parse_messages(row["messages"], "messages", where))
        except UserError as error:
            return error
    key = next((key for key in QUESTIONS if isinstance(row.get(key), str)), None)
    if key is None:
        fix = f"a text under one of {', '.join(QUESTIONS)}; or `messages`"
        return UserError("contains no prompt", where=where, fix=fix)
    extra_input = row.get("input") if key == "instruction" else None
    fields = {"instruction": row[key], "input": extra_input} if extra_input else {}
    text = f"{row[key]}\n\n{extra_input}" if extra_input else row[key]
    return Prompt(row, [{"role": "user", "content": text, **fields}])


def count_prompts(path: Path) -> int:
    """How many prompts a file holds.

    Raises:
        UserError: it cannot be read, or holds none.
        UserErrors: the first broken lines, with `file:line`.
    """
    rows, broken = 0, list[UserError]()
    for prompt in read_prompts(path):
        rows += 1
        if isinstance(prompt, UserError):
            broken.append(prompt)
            if len(broken) == PROBLEMS_SHOWN:
                break
    if broken:
        raise UserErrors(broken)
    if not rows:
        raise UserError("contains no prompts", where=str(path))
    return rows


@dataclass
class Answers:
    """The file of answers: a line for each prompt answered so far, in the order of the prompts.

    Attributes:
        by: what answers, written into each line.
        done: lines that are there.
    """

    path: Path
    by: str
    file: IO[bytes]
    done: int = 0

    @classmethod
    def open(cls, path: Path, prompts: Path, by: str) -> Answers:
        """Open for more; a line that was cut off when it was written is removed.

        Raises:
            UserError: another process writes it, or it holds answers to other prompts or of
                another model.
        """
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            handle = open_in_place(path, os.O_RDWR | os.O_CREAT | os.O_APPEND, 0o600)
            file = open(handle, "a+b")  # noqa: SIM115 - open until all is answered
        except OSError as error:
            raise UserError(f"cannot be written: {error.strerror}", where=str(path)) from error
        if not lock_file(file, path):
            file.close()
            raise UserError("another process is writing it", where=str(path))
        answers = cls(path, by, file)
        try:
            answers.done = answers._check(read_prompts(prompts))
        except UserError:
            file.close()
            raise
        return answers

    def _check(self, prompts: Iterator[Prompt | UserError]) -> int:
        self.file.seek(0)
        number, whole = 0, 0
        for line in self.file:
            prompt = next(prompts, None)
            if not line.endswith(b"\n") and _begins(line, prompt):
                self.file.truncate(whole)
                break
            number, whole = number + 1, whole + len(line)
            expected = {**prompt.row, BY: self.by} if isinstance(prompt, Prompt) else None
            if _without_answer(line) != expected:
                raise UserError(
                    f"answers another prompt, or was not answered by {self.by}",
                    where=f"{self.path}:{number}",
                    fix="name another --out, or move this file away",
                )
        return number

    def append(self, prompts: list[Prompt], texts: list[str]) -> None:
        """Add a batch; it is on disk when this returns."""
        rows = (
            {**p.row, ANSWER: text, BY: self.by} for p, text in zip(prompts, texts, strict=True)
        )
        self.file.write(b"".join(_line(row) + b"\n" for row in rows))
        self.file.flush()
        os.fsync(self.file.fileno())
        self.done += len(prompts)


def _begins(line: bytes, prompt: Prompt | UserError | None) -> bool:
    """Whether a cut line is the start of this prompt's answer, and not other text."""
    if not isinstance(prompt, Prompt):
        return False
    start = _line({**prompt.row, ANSWER: ""})[: -len('"}')]
    return line.startswith(start) or start.startswith(line)


def _line(row: dict[str, Any]) -> bytes:
    return json.dumps(row, ensure_ascii=False).encode()


def _without_answer(line: bytes) -> Any:
    try:
        row = json.loads(line)
        del row[ANSWER]
    except (ValueError, KeyError, TypeError, RecursionError):
        return {}
    return row


def generate(
    speaker: TextGenerator, prompts: Path, answers: Answers, batch_size: int, max_new_tokens: int
) -> None:
    """Answer what is not answered yet."""
    total = count_prompts(prompts)
    if answers.done:
        say(f"{answers.path}: {answers.done} of {total} are answered already")
    rest = islice(read_prompts(prompts), answers.done, None)
    with progress("answers", total, answers.done) as bar:
        while batch := [p for p in islice(rest, batch_size) if isinstance(p, Prompt)]:
            texts = speaker.answers([speaker.prompt(p.messages) for p in batch], max_new_tokens)
            answers.append(batch, texts)
            bar.advance(len(batch))
