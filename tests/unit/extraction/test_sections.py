"""Files of documentation are cut at their headings, and only there."""

from __future__ import annotations

import pytest

from dtrain.extraction.sections import Section, sections

MARKDOWN = """\
---
title: Not a heading
---
<!-- a comment -->
# The `tool`

![badge](b.svg) See [the guide](guide.md#x) or [the site](https://example.com/a).

```sh
# not a heading, [nor](a/link.md)
```

Set up
------

> # quoted

### Windows

Run it.
## Why?
Because.
"""

RST = """\
.. _label:

=====
Title
=====

See :ref:`the guide <guide>` and :func:`~pack.run`.

.. toctree::
   :maxdepth: 2

   guide

Set up
------

Example::

    code
    ----

Windows
~~~~~~~
Run it.
"""


def test_sections_of_markdown() -> None:
    top, setup, windows, why = sections(MARKDOWN, ".md")
    assert top.titles == ("The tool",) and top.line == 5
    assert top.text.startswith("See the guide or [the site](https://example.com/a).")
    assert "# not a heading, [nor](a/link.md)" in top.text
    assert (setup.titles, setup.text) == (("The tool", "Set up"), "> # quoted")
    assert windows == Section(("The tool", "Set up", "Windows"), 18, "Run it.")
    assert why == Section(("The tool", "Why?"), 21, "Because.")


def test_sections_of_rst() -> None:
    top, setup, windows = sections(RST, ".rst")
    assert top == Section(("Title",), 3, "See `the guide` and `pack.run`.")
    assert setup == Section(("Title", "Set up"), 14, "Example::\n\n    code\n    ----")
    assert windows == Section(("Title", "Set up", "Windows"), 22, "Run it.")


@pytest.mark.parametrize("suffix", [".md", ".rst"])
@pytest.mark.parametrize(
    "text", ["", "\n", "---\n", "# ", "```\nopen", "====\n====\n====", "text without headings"]
)
def test_odd_files_have_at_most_one_section(text: str, suffix: str) -> None:
    assert len(sections(text, suffix)) <= 1


@pytest.mark.parametrize("suffix", [".md", ".rst"])
@pytest.mark.parametrize("text", ["[" * 9000, "![" * 900 + "\n", "> " * 3000, "# " + "<" * 9000])
def test_nested_markup_takes_no_quadratic_time(text: str, suffix: str) -> None:
    """Each of these took minutes with rules that look back."""
    assert len(sections(text * 20, suffix)) >= 1
