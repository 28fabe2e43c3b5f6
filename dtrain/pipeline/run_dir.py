"""The run folder: who works in it, which stages are complete, what each was made from."""

from __future__ import annotations

import os
import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dtrain.checkpoints.identity import require_same
from dtrain.config.schema import Recipe, Stage
from dtrain.core.errors import UserError
from dtrain.core.files import FolderLock, OldFormat, read_json, read_sealed, write_sealed
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.log import warn
from dtrain.core.ownership import own_folder
from dtrain.launching.commands import LOCKED_BY_LAUNCHER
from dtrain.merge.merge import MANIFEST as MERGE_MANIFEST
from dtrain.merge.provenance import RECORD
from dtrain.pipeline.stage_inputs import Inputs

# What changes neither the numbers nor their order, so a run may go on with another value.
FREE_KEYS = ("micro_batch_size", "checkpoint_every_steps")
# `.name.random`: what `write_atomic` and `atomic_folder` write before they rename it.
_OURS = r"(recipe|lineage|evaluation|outcome|stage|report|metrics)\.\w+|adapter|merged"
_LEFTOVER = re.compile(rf"\.({_OURS})\.[a-z0-9_]{{8}}")


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
        """What the stage's own record says; None if it was never begun, or the record is damaged.

        A damaged record is no loss: every checkpoint holds the inputs that it was made from.

        Raises:
            OldFormat: an older dtrain wrote it.
        """
        try:
            return read_sealed(self.path / RECORD)
        except OldFormat:
            raise
        except UserError:
            return None

    def is_complete(self) -> bool:
        """Whether the stage was finished under this very identity."""
        known = self.known()
        return bool(known and known["complete"] and known["identity"] == self.identity)

    def damage(self, *, with_merged: bool) -> str:
        """What is wrong with a complete stage's results; empty if they are what was written.

        Args:
            with_merged: hash the merged model too, since it is needed.
        """
        known = self.known() or {}
        if with_merged and not (self.merged / MERGE_MANIFEST).is_file():
            return f"{self.merged} is missing"
        for path, digest in self._results(known.get("files", {}), with_merged):
            if not path.is_file():
                return f"{path} is missing"
            if file_hash(path) != digest:
                return f"{path} is not what was written"
        return ""

    def _results(self, files: dict[str, str], with_merged: bool) -> Iterator[tuple[Path, str]]:
        manifest = str((self.merged / MERGE_MANIFEST).relative_to(self.path))
        for name, digest in files.items():
            if with_merged or name != manifest:
                yield self.path / name, digest
        if with_merged and manifest in files:
            for name, digest in read_json(self.merged / MERGE_MANIFEST)["files"].items():
                yield self.merged / name, digest

    def allowed(self) -> set[str]:
        """Keys that were ever allowed to change while this stage was under way."""
        return set((self.known() or {}).get("allowed", []))

    def begin(self, allowed: set[str]) -> None:
        """Start or go on; what was begun from other inputs is not touched.

        Raises:
            UserError: the folder holds a stage made from something else, or others may write to it.
        """
        self.path.mkdir(mode=0o755, exist_ok=True)
        own_folder(self.path.resolve())
        known = self.known()
        if known is not None:
            require_same(known["inputs"], self.inputs, allowed)
        elif (self.path / RECORD).exists():
            warn(f"{self.path / RECORD} is damaged; the checkpoints say what they were made from")
        remove_leftovers(self.path)
        self._write({"complete": False, "allowed": sorted(self.allowed() | allowed)})

    def finish(self, facts: dict[str, Any]) -> None:
        """Record the stage as complete, with what is worth knowing of it."""
        found = [*self.adapter.glob("*"), self.merged / MERGE_MANIFEST]
        files = {
            str(path.relative_to(self.path)): file_hash(path) for path in found if path.is_file()
        }
        allowed = sorted(self.allowed())
        self._write({"complete": True, "allowed": allowed, "files": files, "facts": facts})

    def _write(self, more: dict[str, Any]) -> None:
        write_sealed(self.path / RECORD, {"identity": self.identity, "inputs": self.inputs, **more})


def stage_folder(
    run: Path, recipe: Recipe, stage: Stage, inputs: Inputs, parent: str
) -> StageFolder:
    """The folder of a stage whose base is the artefact with identity `parent`."""
    # What is read, and from where, is in the data's fingerprint.
    settings = stage.model_dump(mode="json", exclude={"data": {"sources", "replay"}})
    # In strict mode a micro-batch is the unit of the sums' fixed order.
    for key in FREE_KEYS if recipe.determinism == "off" else FREE_KEYS[1:]:
        settings["train"].pop(key)
    settings["data"]["template"] = Path(stage.data.template).name  # its text is in the content
    settings["data"]["content"] = inputs.stages[stage.name].fingerprint
    made_from = {
        "parent": parent,
        "tokenizer": inputs.tokenizer_fingerprint,
        "seed": recipe.seed,
        "determinism": recipe.determinism,
        "dtype": recipe.model.dtype,
        **settings,
    }
    return StageFolder(run / stage.name, made_from)


def lock_run(run: Path) -> FolderLock:
    """Take the run folder for this process.

    Raises:
        UserError: another run is using it, or others may write to it.
    """
    run.mkdir(mode=0o755, parents=True, exist_ok=True)
    own_folder(run.resolve())
    lock = FolderLock(run)
    # `dtrain run` takes the lock before it becomes the launcher, and holds it while that lives.
    if not lock.acquire() and os.environ.get(LOCKED_BY_LAUNCHER) != str(run):
        raise UserError(
            f"another run is using this folder ({lock.holder()})",
            where=str(run),
            fix="wait for it, or choose another output.folder",
        )
    remove_leftovers(run)
    return lock


def remove_leftovers(folder: Path) -> None:
    """Remove what was being written when a run was killed."""
    for path in folder.iterdir():
        if _LEFTOVER.fullmatch(path.name):
            shutil.rmtree(path) if path.is_dir() else path.unlink()
