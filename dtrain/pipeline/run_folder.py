"""The run folder: who works in it, which stages are complete, what each was made from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoints.identity import require_same
from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.core.files import FolderLock, read_json, write_json
from dtrain.core.hashes import fingerprint
from dtrain.pipeline.inputs import Inputs

# What changes neither the numbers nor their order, so a run may go on with another value.
FREE_KEYS = ("micro_batch_sequences", "checkpoint_every_steps")


@dataclass(frozen=True)
class StageFolder:
    """One stage's part of a run folder.

    Attributes:
        inputs: what the stage is made from; its identity is their hash.
    """

    path: Path
    inputs: dict[str, Any]

    @property
    def identity(self) -> str:
        """Hash of settings, data and parent."""
        return fingerprint(self.inputs)

    @property
    def adapter(self) -> Path:
        """Final adapter in PEFT layout."""
        return self.path / "adapter"

    @property
    def merged(self) -> Path:
        """Plain Hugging Face model."""
        return self.path / "merged"

    @property
    def checkpoints(self) -> Path:
        """Folder of the checkpoints."""
        return self.path / "checkpoints"

    def known(self) -> dict[str, Any] | None:
        """What the stage's own record says, if it was ever begun."""
        record = self.path / "stage.json"
        return read_json(record) if record.exists() else None

    def is_complete(self) -> bool:
        """Whether the stage was finished under this very identity."""
        known = self.known()
        return bool(known and known["complete"] and known["identity"] == self.identity)

    def begin(self, allowed: set[str]) -> None:
        """Start or go on; what was begun from other inputs is not touched.

        Raises:
            UserError: the folder holds a stage made from something else.
        """
        known = self.known()
        if known is not None:
            require_same(known["inputs"], self.inputs, allowed)
        self._write({"complete": False})

    def finish(self, facts: dict[str, Any]) -> None:
        """Record the stage as complete, with what is worth knowing of it."""
        self._write({"complete": True, "facts": facts})

    def _write(self, more: dict[str, Any]) -> None:
        write_json(
            self.path / "stage.json", {"identity": self.identity, "inputs": self.inputs, **more}
        )


def stage_folder(
    run: Path, recipe: Recipe, stage: Stage, inputs: Inputs, parent: str
) -> StageFolder:
    """The folder of a stage whose base is the artefact with identity `parent`."""
    settings = stage.model_dump(mode="json", exclude={"data": {"sources"}})
    # In strict mode a micro-batch is the unit of the sums' fixed order.
    for key in FREE_KEYS if recipe.determinism == "off" else FREE_KEYS[1:]:
        settings["train"].pop(key)
    made_from = {
        "parent": parent,
        "tokenizer": inputs.tokenizer_fingerprint,
        "rows": inputs.stages[stage.name].fingerprint,
        "seed": recipe.seed,
        "determinism": recipe.determinism,
        "dtype": recipe.model.dtype,
        **settings,
    }
    return StageFolder(run / stage.name, made_from)


def lock_run(run: Path) -> FolderLock:
    """Take the run folder for this process.

    Raises:
        UserError: another run is using it.
    """
    lock = FolderLock(run)
    if not lock.acquire():
        raise UserError(
            f"another run is using this folder ({lock.holder()})",
            where=str(run),
            fix="wait for it, or choose another output.folder",
        )
    return lock
