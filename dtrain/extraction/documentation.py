"""Rows from a folder of documentation.

Texts: each file. Questions: each section with prose, whose headings are the question; and the
opening paragraph of a page as its summary.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from pathlib import Path

from dtrain.core.log import progress
from dtrain.extraction.sections import MARKDOWN, RST, Section, sections
from dtrain.extraction.text_files import (
    DOMAIN,
    TASK,
    ExtractedRow,
    TextFile,
    find_files,
    read_file,
)

SUFFIXES = (*MARKDOWN, *RST)
ANSWER_CHARACTERS = (40, 4096)
TEXT_CHARACTERS = 100
SUMMARY_CHARACTERS = (60, 800)
SUMMARIZED_CHARACTERS = 6000
SUMMARIZED_TIMES = 4  # a page is at least so many times as long as its summary
PROSE_WORDS = 8
HAS_WORD = re.compile(r"[^\W\d_]{3}|[\u2e80-\uffff]{2}")
WORD = re.compile(r"[^\W\d_]+|[\u2e80-\uffff]")


def extract_documentation(root: Path, left_out: Counter[str]) -> Iterator[ExtractedRow]:
    """Rows of all Markdown and reStructuredText files; `left_out` counts the rest by reason.

    Raises:
        UserError: there are no such files.
    """
    paths = find_files(root, SUFFIXES, left_out)
    with progress(f"reading {root}", len(paths)) as meter:
        for path in paths:
            if file := read_file(path, root, left_out):
                yield from _rows(file, left_out)
            meter.advance()


def _rows(file: TextFile, left_out: Counter[str]) -> Iterator[ExtractedRow]:
    parts = sections(file.text, file.path.suffix.lower())
    text = "\n\n".join(part.full for part in parts).strip()
    if len(text) < TEXT_CHARACTERS:
        left_out[f"texts shorter than {TEXT_CHARACTERS} characters"] += 1
    else:
        yield ExtractedRow(file.name, DOMAIN, {"text": text + "\n", "origin": file.name})
    title = next((part.titles[0] for part in parts if part.titles), file.path.stem)
    if summary := _summary(title, parts):
        yield _row(file, parts[0].line, *summary)
    for part in parts:
        if reason := _no_answer(part):
            left_out[reason] += 1
        else:
            yield _row(file, part.line, _question(title, part), part.text)


def _row(file: TextFile, line: int, question: str, answer: str) -> ExtractedRow:
    messages = [
        {"role": "user", "content": question},
        {"role": "assistant", "content": answer},
    ]
    return ExtractedRow(file.name, TASK, {"messages": messages, "origin": f"{file.name}:{line}"})


def _no_answer(part: Section) -> str:
    """Why a section answers no question; "" if it does."""
    shortest, longest = ANSWER_CHARACTERS
    if not part.text.strip():
        return "sections without text of their own"
    if len(part.text) < shortest or len(WORD.findall(part.text)) < PROSE_WORDS:
        return f"sections shorter than {shortest} characters or {PROSE_WORDS} words"
    if len(part.text) > longest:
        return f"sections longer than {longest:,} characters"
    if part.titles and not HAS_WORD.search(part.titles[-1]):
        return "sections whose heading has no word"
    return ""


def _question(title: str, part: Section) -> str:
    inner = [name for name in part.titles if name != title]
    if not inner:
        return f"What is “{title}” about?"
    if inner[-1].endswith(("?", "？")):
        return inner[-1]
    return f"What does “{title}” say about “{' › '.join(inner)}”?"


def _summary(title: str, parts: list[Section]) -> tuple[str, str] | None:
    """A request to summarize the page and its opening paragraph, if that is one of prose."""
    opening = next((part for part in parts if part.text.strip()), None)
    if opening is None or len(opening.titles) > 1:
        return None
    lead, _, more = opening.text.partition("\n\n")
    rest = "\n\n".join([more.strip(), *(part.full for part in parts if part is not opening)])
    shortest, longest = SUMMARY_CHARACTERS
    is_prose = lead[0].isalnum() and lead.rstrip().endswith((".", "!", "?", "。"))
    if not (is_prose and shortest <= len(lead) <= longest):
        return None
    if not SUMMARIZED_TIMES * len(lead) <= len(rest) <= SUMMARIZED_CHARACTERS:
        return None
    return f"Summarize this page in a few sentences.\n\n# {title}\n\n{rest.strip()}", lead
