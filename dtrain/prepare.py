"""Tokenise and pack a recipe's data, on a machine without GPUs: `python -m dtrain.prepare RECIPE`.

What it makes lies in the cache folder, which the training must see under the same path.
"""

from __future__ import annotations

import sys

from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.core.log import say
from dtrain.pipeline.inputs import prepare_inputs


def main(argv: list[str] | None = None) -> int:
    """Prepare; return the exit status."""
    address, *overrides = sys.argv[1:] if argv is None else argv
    try:
        inputs = prepare_inputs(load_recipe(address, overrides))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    for name, mixture in {**inputs.stages, **inputs.sets}.items():
        say(f"{name}: {mixture.describe()}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
