"""A checkpoint → a plain Hugging Face model, whatever engine and ranks saved it.

What trains lies in the checkpoint, everything else in the base that the stage began with. No rank
is started, and one block of rows is in memory.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path
from threading import Lock

from torch import Tensor

from dtrain.checkpoints.manifest import MANIFEST
from dtrain.checkpoints.reader import Checkpoint
from dtrain.config.load import load_recipe
from dtrain.config.methods import parse_method
from dtrain.core.errors import UserError
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.run_dir import RunDir
from dtrain.merge.adapter import Adapter
from dtrain.merge.merge import replace
from dtrain.merge.provenance import Origin, origin_from
from dtrain.merge.tied_weights import Shapes
from dtrain.models.hub import base_folder

SAVED_AS = ".default."  # PEFT's name of the adapter that trains, inside a parameter's name


@dataclass(frozen=True)
class Saved:
    """A run's checkpoint, and what it says of itself.

    Attributes:
        run: the run's folder.
        stage: name of the stage.
    """

    checkpoint: Checkpoint
    origin: Origin
    run: Path
    stage: str


def open_saved(folder: Path) -> Saved:
    """Open RUN/STAGE/checkpoints/step-….

    Raises:
        UserError: it is no whole checkpoint (every file is hashed), or lies in no run folder.
    """
    checkpoint = Checkpoint.open(folder)
    checkpoint.verify()
    stage = folder.resolve().parents[1]
    inputs = checkpoint.state.get("inputs")
    if not isinstance(inputs, dict) or not RunDir(stage.parent).recipe.is_file():
        raise UserError("lies in no stage of a run", where=str(folder))
    dtype = str(checkpoint.state.get("dtype", inputs["dtype"]))
    origin = origin_from(inputs, fingerprint(inputs), dtype, stage.parent)
    return Saved(checkpoint, origin, stage.parent, stage.name)


def base_of(saved: Saved) -> Path:
    """The model that the checkpoint's stage began with: the recipe's, or the stage before's.

    Raises:
        UserError: it is not there any more.
    """
    recipe = load_recipe(str(RunDir(saved.run).recipe))
    names = [stage.name for stage in recipe.stages]
    if saved.stage not in names:
        raise UserError(f"has no stage {saved.stage!r}", where=str(RunDir(saved.run).recipe))
    if (number := names.index(saved.stage)) == 0:
        return base_folder(recipe.model.base)
    base = RunDir(saved.run).stage(names[number - 1]).merged
    if not base.is_dir():
        raise UserError("is missing, and the stage began with it", where=str(base))
    return base


def replace_with(
    checkpoint: Checkpoint,
    base: Path,
    out: Path,
    source: str,
    *,
    processes: int = 1,
    known: Sequence[str] = (),
    files: Mapping[str, str] | None = None,
) -> None:
    """Write the model that full fine-tuning made.

    Raises:
        UserError: see `replace`.
    """
    one_at_a_time = Lock()  # a checkpoint opens and closes its shards at every read

    def read(name: str, start: int, stop: int) -> Tensor:
        with one_at_a_time:
            return checkpoint.read(name, "weight", start, stop)

    mark = file_hash(checkpoint.folder / MANIFEST)
    replace(
        base,
        checkpoint.names,
        read,
        out,
        content=mark,
        source=source,
        processes=processes,
        known=known,
        files=files,
    )


def read_whole(checkpoint: Checkpoint, name: str) -> Tensor:
    """A parameter in its global shape, float32."""
    shape = checkpoint.names[name]
    return checkpoint.read(name, "weight", 0, prod(shape)).view(shape)


class AdapterSaved:
    """An adapter's tensors in a checkpoint, by the keys that they have in PEFT's layout."""

    def __init__(self, checkpoint: Checkpoint) -> None:
        self._checkpoint = checkpoint
        self._names = {name.replace(SAVED_AS, "."): name for name in checkpoint.names}
        self.shapes = {k: list(checkpoint.names[name]) for k, name in self._names.items()}
        self._one_at_a_time = Lock()

    def get(self, key: str) -> Tensor:
        """A tensor in float32."""
        with self._one_at_a_time:
            return read_whole(self._checkpoint, self._names[key])

    def rows(self, key: str, start: int, stop: int) -> Tensor:
        """Rows of a tensor."""
        return self.get(key)[start:stop]

    def mark(self) -> str:
        """Hash of the content."""
        return file_hash(self._checkpoint.folder / MANIFEST)


def saved_adapter(saved: Saved, shapes: Shapes) -> Adapter:
    """The adapter that a checkpoint holds."""
    settings = parse_method(saved.origin.method).adapter
    assert settings is not None
    tensors = AdapterSaved(saved.checkpoint)
    return Adapter(settings.peft_config(), tensors, shapes, saved.checkpoint.folder)
