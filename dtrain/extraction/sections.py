"""Divide Markdown and reStructuredText at their headings, without markup that is no text."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import pairwise

from markdown_it import MarkdownIt

MARKDOWN, RST = (".md", ".markdown"), (".rst",)
FRONT_MATTER = re.compile(r"\A---[ \t]*\n.*?^(?:---|\.\.\.)[ \t]*\n", re.DOTALL | re.MULTILINE)
RELATIVE_LINK = re.compile(
    r"(?<!!)\[([^\[\]\n]+)\]\((?!\w+://|mailto:)[^()\s]*(?:\s+\"[^\"\n]*\")?\)"
)
IMAGE = re.compile(r"\[?!\[[^\[\]\n]*\](?:\([^()\n]*\)|\[[^\[\]\n]*\])(?:\]\([^()\n]*\))?[ \t]*")
UNDERLINE = re.compile(r"([=\-`:.'\"~^_*+#<>])\1{2,}[ \t]*")
ROLE = re.compile(r":(?:[\w+.-]+:)?[\w+.-]+:`~?([^`<\n]+?)(?:\s*<[^`\n]*>)?`")
NO_TEXT = re.compile(
    r"\.\. (?:_[^\n]*:|\|[^|\n]+\| |(?:toctree|contents|index|image|figure|raw|meta|highlight"
    r"|rubric|currentmodule|module|include|literalinclude|autofunction|autoclass|automodule)::)"
)
MAX_LINE = 2_000  # characters in which links are looked for
# Only blocks matter; the inline rules take quadratic time for some texts.
PARSER = MarkdownIt("commonmark").disable(["inline", "text_join"])


@dataclass(frozen=True)
class Section:
    """A heading and the text up to the next one.

    Attributes:
        titles: the headings around it and its own, from the outermost; () before the first one.
        line: of the heading in the file, from 1.
        text: without the heading.
    """

    titles: tuple[str, ...]
    line: int
    text: str

    @property
    def heading(self) -> str:
        """Its heading in Markdown; "" before the first one."""
        return f"{'#' * len(self.titles)} {self.titles[-1]}" if self.titles else ""

    @property
    def full(self) -> str:
        """Heading and text."""
        return "\n\n".join(filter(None, (self.heading, self.text)))


Heading = tuple[int, int, int, str]  # first line, line after it, level, title


def sections(text: str, suffix: str) -> list[Section]:
    """The sections of a file of documentation, in order."""
    lines = text.split("\n")
    if suffix in RST:
        return _sections(lines, _rst_headings(lines), _rst_text(lines))
    skipped = FRONT_MATTER.match(text)
    first = text[: skipped.end()].count("\n") if skipped else 0
    tokens = PARSER.parse("\n" * first + "\n".join(lines[first:]))
    headings, code, dropped = list[Heading](), set[int](), set(range(first))
    for index, token in enumerate(tokens):
        start, stop = token.map or (0, 0)
        if token.type == "heading_open" and token.level == 0:
            headings.append((start, stop, int(token.tag[1:]), _plain(tokens[index + 1].content)))
        elif token.type in ("fence", "code_block"):
            code.update(range(start, stop))
        elif token.type == "html_block":
            dropped.update(range(start, stop))
    kept = [
        "" if n in dropped else line if n in code else _without_links(line)
        for n, line in enumerate(lines)
    ]
    return _sections(lines, headings, kept)


def _without_links(line: str) -> str:
    """A line without images and without links into the folder, which mean nothing elsewhere."""
    if len(line) > MAX_LINE:
        return line
    return RELATIVE_LINK.sub(r"\1", IMAGE.sub("", line))


def _sections(lines: list[str], headings: list[Heading], kept: list[str]) -> list[Section]:
    """Cut `kept` at the headings; the first heading of a level closes all deeper ones."""
    result, path = list[Section](), list[tuple[int, str]]()
    ends = [*headings, (len(lines), len(lines), 0, "")]
    bounds = [((0, 0, 0, ""), ends[0]), *pairwise(ends)]
    for (first, start, level, title), (stop, *_) in bounds:
        if title:
            path = [*((n, t) for n, t in path if n < level), (level, title)]
        body = re.sub(r"\n{3,}", "\n\n", "\n".join(line.rstrip() for line in kept[start:stop]))
        titles = tuple(t for _, t in path)
        if body.strip() or title:
            result.append(Section(titles, first + 1, body.strip("\n")))
    return result


def _plain(title: str) -> str:
    """The text of a heading without markup."""
    title = re.sub(r"\[([^\[\]]+)\]\([^()]*\)", r"\1", _without_links(title[:MAX_LINE]))
    title = re.sub(r"\s*\{#[\w.-]+\}$|<[^<>]*>|[*`]+|¶", "", title)
    return " ".join(title.replace("\\", "").split())


def _rst_headings(lines: list[str]) -> list[Heading]:
    """Headings with an underline; the order of their styles gives the levels."""
    styles, headings = list[tuple[str, bool]](), list[Heading]()
    for number, (title, line) in enumerate(pairwise(lines)):
        is_title = title.strip() and not UNDERLINE.fullmatch(title) and not title[0].isspace()
        over = number > 0 and UNDERLINE.fullmatch(lines[number - 1]) is not None
        over = over and lines[number - 1].rstrip() == line.rstrip()
        if over and title.strip() and UNDERLINE.fullmatch(line):
            is_title = True  # such titles may be indented
        if not (is_title and UNDERLINE.fullmatch(line)) or len(line.rstrip()) < len(title.strip()):
            continue
        style = (line[0], over)
        if style not in styles:
            styles.append(style)
        plain = " ".join(ROLE.sub(r"\1", title).replace("`", "").replace("*", "").split())
        headings.append((number - over, number + 2, styles.index(style) + 1, plain))
    return headings


def _rst_text(lines: list[str]) -> list[str]:
    """The lines without comments, labels and directives that show no text."""
    return [ROLE.sub(r"`\1`", line) for line in _without_directives(lines)]


def _without_directives(lines: list[str]) -> Iterator[str]:
    hidden: int | None = None  # indentation of a directive that is left out
    for line in lines:
        indent = len(line) - len(line.lstrip())
        if hidden is not None and line.strip() and indent <= hidden:
            hidden = None
        if hidden is None and NO_TEXT.match(line.lstrip()):
            hidden = indent
        yield "" if hidden is not None else line
