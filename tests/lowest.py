"""Print the constraints of the second environment of the tests.

The lower bounds that pyproject.toml states for the libraries whose interfaces move most, with a
torch newer than that of constraints.txt; everything else is as in constraints.txt.
"""

from __future__ import annotations

import re
import tomllib
from pathlib import Path

ROOT = Path(__file__).parents[1]
AT_THEIR_BOUNDS = ("transformers", "huggingface_hub", "peft", "accelerate", "datasets")
UNPINNED = ("trl", "fsspec")  # pip takes releases that agree with the bounds
NEWER_TORCH = "torch==2.14.1"


def lowest_constraints() -> list[str]:
    """One requirement a line, as pip reads a constraints file."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    bounds = [
        re.sub(r"(\[.*\])?>=([^,]+).*", r"==\2", requirement)
        for requirement in project["dependencies"]
        if re.match(r"[\w-]+", requirement)[0] in AT_THEIR_BOUNDS  # type: ignore[index]
    ]
    assert len(bounds) == len(AT_THEIR_BOUNDS), bounds
    replaced = {"torch", *AT_THEIR_BOUNDS, *UNPINNED}
    pins = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [pin for pin in pins if pin.partition("==")[0] not in replaced]
    return [*kept, *bounds, NEWER_TORCH]


if __name__ == "__main__":
    print("\n".join(lowest_constraints()))
