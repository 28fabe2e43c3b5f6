"""The run folder and the ranks that a recipe asks for."""

from __future__ import annotations

from pathlib import Path

from dtrain.config.checks import accumulation
from dtrain.config.schema import Recipe
from dtrain.core.run_dir import RunDir


def run_dir_of(recipe: Recipe) -> RunDir:
    """The recipe's run folder, by its absolute path."""
    return RunDir(Path(recipe.output.folder).expanduser().absolute())


def with_run_dir(recipe: Recipe, run: RunDir) -> Recipe:
    """The recipe with the path of its run folder."""
    output = recipe.output.model_copy(update={"folder": str(run.path)})
    return recipe.model_copy(update={"output": output})


def ranks_per_node(recipe: Recipe, gpus: int) -> int | str:
    """Processes on each node: the recipe's; for auto one a GPU of the node.

    Args:
        recipe: of the run.
        gpus: on a node; 0 leaves "auto" to the launcher, which counts them.
    """
    if recipe.launch.processes == "auto":
        return 1 if recipe.device == "cpu" else gpus or "auto"
    return recipe.launch.processes


def check_batches(recipe: Recipe, nodes: int, ranks: int | str) -> None:
    """Check that every stage's batch can be divided among the ranks, before any of them starts.

    Raises:
        UserError: it cannot.
    """
    if isinstance(ranks, str):
        return
    for stage in recipe.stages:
        train = stage.train
        accumulation(train.global_batch_size, nodes * ranks, train.micro_batch)
