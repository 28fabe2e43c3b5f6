"""General texts, written for dtrain, that show what a model forgets; no sample trains on them.

Prose, dialogue, instructions, science, arithmetic, code, letters, and three other languages.
"""

from __future__ import annotations

import shutil
from pathlib import Path

TEXTS = Path(__file__).with_name("general_heldout.jsonl")


def make(folder: Path) -> None:
    """Write the texts into `folder`."""
    shutil.copyfile(TEXTS, folder / "heldout.jsonl")
