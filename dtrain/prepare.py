"""Tokenize and pack a recipe's data on a machine without GPUs: `python -m dtrain.prepare RECIPE`.

The packed dataset is written to the cache folder, which training must see under the same path. The
tasks of a Slurm array share the work: each tokenizes other shards, and the last one packs.
"""

from __future__ import annotations

import os
import sys

from dtrain.config.load import load_recipe
from dtrain.core.errors import UserError
from dtrain.core.os_errors import explained_os_errors
from dtrain.core.output import protect_output
from dtrain.core.ownership import keep_private
from dtrain.pipeline.stage_inputs import prepare_recipe, share_of_array


def main(argv: list[str] | None = None) -> int:
    """Prepare; return the exit status."""
    address, *overrides = sys.argv[1:] if argv is None else argv
    protect_output()
    keep_private()
    try:
        with explained_os_errors():
            prepare_recipe(load_recipe(address, overrides), share_of_array(os.environ))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return error.status
    return 0


if __name__ == "__main__":
    sys.exit(main())
