"""A checkpoint → what a merge needs to write its model, whatever engine and ranks saved it.

The checkpoint holds what trains; everything else is in the base that the stage started from. No
ranks are started, and one block of rows is in memory.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock

from torch import Tensor

from dtrain.checkpoints.reader import Checkpoint
from dtrain.config.load import load_recipe
from dtrain.config.methods import parse_method
from dtrain.core.errors import UserError
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.run_dir import RunDir
from dtrain.core.stage_dir import ADAPTER, CHECKPOINT_MANIFEST
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.base_tensors import BaseTensors
from dtrain.merge.merge import TrainedWeights
from dtrain.merge.provenance import TrainingOrigin, origin_from_inputs
from dtrain.models.added_tokens import open_base, open_tokenizer, token_ids
from dtrain.models.peft_format import file_key


@dataclass(frozen=True)
class StageCheckpoint:
    """A checkpoint in its run folder.

    Attributes:
        run: the run's folder.
        stage: name of the stage.
    """

    checkpoint: Checkpoint
    origin: TrainingOrigin
    run: Path
    stage: str


def open_checkpoint(folder: Path) -> StageCheckpoint:
    """Open RUN/STAGE/checkpoints/step-….

    Raises:
        UserError: it is not a complete checkpoint (every file is hashed), or not in a run folder.
    """
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    stage = folder.resolve().parents[1]
    inputs = checkpoint.state.get("inputs")
    if not isinstance(inputs, dict) or not RunDir(stage.parent).recipe.is_file():
        raise UserError("is not in a stage's folder of a run", where=str(folder))
    dtype = str(checkpoint.state.get("dtype", inputs["dtype"]))
    origin = origin_from_inputs(inputs, fingerprint(inputs), dtype, stage.parent)
    return StageCheckpoint(checkpoint, origin, stage.parent, stage.name)


def stage_base(saved: StageCheckpoint) -> Path:
    """Return the model that the stage started from: the recipe's base, or the previous stage's.

    Raises:
        UserError: it is missing.
    """
    run = RunDir(saved.run)
    recipe = load_recipe(str(run.recipe))
    stage = next((stage for stage in recipe.stages if stage.name == saved.stage), None)
    if stage is None:
        raise UserError(f"has no stage {saved.stage!r}", where=str(run.recipe))
    if (parent := recipe.parent_of(stage)) is None:
        return open_base(recipe.model)
    base = run.stage(parent.name).merged
    if not base.is_dir():
        raise UserError("is missing, but the stage started from it", where=str(base))
    return base


def trained_weights(checkpoint: Checkpoint) -> TrainedWeights:
    """Return the weights that a checkpoint of full fine-tuning holds."""
    lock = Lock()  # a checkpoint opens and closes its shards at every read

    def read(name: str, start: int, stop: int) -> Tensor:
        with lock:
            return checkpoint.read(name, "weight", start, stop)

    return TrainedWeights(
        checkpoint.names, read, file_hash(checkpoint.folder / CHECKPOINT_MANIFEST)
    )


def read_parameter(checkpoint: Checkpoint, name: str) -> Tensor:
    """Return a whole parameter in its global shape, float32."""
    shape = checkpoint.names[name]
    return checkpoint.read(name, "weight", 0, prod(shape)).view(shape)


class CheckpointAdapter:
    """An adapter's tensors in a checkpoint, by the keys that they have in PEFT's layout."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = {file_key(name): name for name in checkpoint.names}
        self.shapes = {k: list(checkpoint.names[name]) for k, name in self._names.items()}
        self._lock = Lock()

    def get(self, key: str) -> Tensor:
        """Return a tensor in float32."""
        with self._lock:
            return read_parameter(self._checkpoint, self._names[key])

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Return rows of a tensor."""
        name = self._names[key]
        shape = self._checkpoint.names[name]
        width = prod(shape[1:])
        with self._lock:
            flat = self._checkpoint.read(name, "weight", start * width, stop * width)
        return flat.view(stop - start, *shape[1:])

    def fingerprint(self) -> str:
        """Return a hash of the content."""
        return file_hash(self._checkpoint.folder / CHECKPOINT_MANIFEST)


def _new_token_rows(saved: StageCheckpoint) -> dict[str, list[int]]:
    """Which rows of the embeddings and the output matrix a stage trained alone."""
    model = load_recipe(str(RunDir(saved.run).recipe)).model
    tokens = token_ids(open_tokenizer(model), model.tokens) if model.tokens else []
    return {"trainable_token_indices": tokens} if tokens else {}


def checkpoint_adapter(saved: StageCheckpoint, base: BaseTensors) -> MergeableAdapter:
    """Return the adapter that a checkpoint holds.

    Raises:
        UserError: its method trains no adapter, or one that cannot be merged.
    """
    settings = parse_method(saved.origin.method)
    if reason := settings.traits.cannot_merge:
        message = f"{settings.kind} cannot be merged: {reason}"
        where = str(saved.checkpoint.folder)
        raise UserError(message, where=where, fix="serve the adapter unmerged")
    if settings.adapter is None:
        message = f"method {settings.kind} trains no adapter"
        raise UserError(message, where=str(saved.checkpoint.folder))
    if settings.traits.counts_from_start:
        raise UserError(
            f"a checkpoint of {settings.kind} lacks the first values that its adapter counts from",
            where=str(saved.checkpoint.folder),
            fix=f"resume the run to its end, and merge {saved.run / saved.stage / ADAPTER}",
        )
    tensors = CheckpointAdapter(saved.checkpoint)
    # A checkpoint holds tied modules that train whole once.
    whole = {"modules_to_save": settings.adapter.whole_modules, "ensure_weight_tying": True}
    targets = settings.adapter.target_modules
    named = {} if isinstance(targets, str) else {"target_parameters": targets}
    config = settings.adapter.peft_config() | whole | named | _new_token_rows(saved)
    return MergeableAdapter(config, tensors, base, saved.checkpoint.folder)
