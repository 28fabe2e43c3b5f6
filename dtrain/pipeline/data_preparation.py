"""A recipe's data made ready ahead of training, by one process or by many that share the work."""

from __future__ import annotations

import re
from collections.abc import Mapping

from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.core.log import say
from dtrain.data.shards import Share
from dtrain.pipeline.stage_inputs import prepare_inputs, prepare_inputs_share


def prepare_recipe(recipe: Recipe, share: Share, processes: int | None = None) -> None:
    """Prepare all data of a recipe, or a share of it, and say what there is.

    Raises:
        UserError: base or data cannot be used.
    """
    if share.of > 1 and not prepare_inputs_share(recipe, share, processes):
        say("others still make what is missing; the last of them packs, or else the next start")
        return
    inputs = prepare_inputs(recipe, processes=processes)
    for name, mixture in {**inputs.stages, **inputs.sets}.items():
        say(f"{name}: {mixture.describe()}")


def share_of_array(environ: Mapping[str, str]) -> Share:
    """The share of this task of a Slurm array; all of the work outside of one.

    Of an array with gaps (3,7) two tasks may begin at the same place: each makes what is left.
    """
    try:
        number, first, count = (
            int(environ[f"SLURM_ARRAY_TASK_{n}"]) for n in ("ID", "MIN", "COUNT")
        )
        step = int(environ.get("SLURM_ARRAY_TASK_STEP", "1"))
        return Share((number - first) // step % count, count)
    except (KeyError, ValueError, ZeroDivisionError):
        return Share()


def parse_share(text: str) -> Share:
    """'2/8' → the second of eight shares.

    Raises:
        UserError: it is not of that form.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, of = (int(group) for group in found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise UserError("not a share", where=f"--shard {text}", fix="write 1/8 to 8/8 for eight")
    return Share(number - 1, of)
