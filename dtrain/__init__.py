"""dtrain: fine-tunes large language models in a chain of stages, from one recipe, on any engine.

    from dtrain import load_recipe, plan, run

    recipe = load_recipe("quickstart", ["stages.task.train.steps=20"])
    print(plan(recipe, gpu="a100-80g").verdict)
    print(run(recipe).losses())

`dtrain.api` describes them; they are imported at their first use.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from dtrain.api import Recipe, Run, UserError, load_recipe, plan, run, submit

__version__ = "0.1.0"
__all__ = ["Recipe", "Run", "UserError", "load_recipe", "plan", "run", "submit"]


def __getattr__(name: str) -> Any:
    if name in __all__:
        return getattr(import_module("dtrain.api"), name)
    raise AttributeError(f"module 'dtrain' has no attribute {name!r}")
