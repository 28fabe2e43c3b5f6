"""The settings and inputs of a stage, and its record: whether its results are complete."""

from __future__ import annotations

import shlex
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from dtrain.checkpoints.folder import complete_folders
from dtrain.checkpoints.identity import check_same_inputs
from dtrain.checkpoints.reader import Checkpoint
from dtrain.config.schema import Recipe, Stage
from dtrain.core.cache_paths import local_path
from dtrain.core.errors import UserError
from dtrain.core.files import OldFormat, read_sealed, write_sealed
from dtrain.core.hashes import file_hash, fingerprint
from dtrain.core.log import warn
from dtrain.core.ownership import Untrusted, check_no_link, check_own_folder, share_with_group
from dtrain.core.run_dir import RunDir, remove_partial_files
from dtrain.core.stage_dir import NOT_TRAINED, StageDir, read_merge_manifest
from dtrain.distributed.hang_watchdog import HangWatchdog
from dtrain.distributed.world import World
from dtrain.merge.adapter_tensors import AdapterFile
from dtrain.methods.base import Method, build_method
from dtrain.models.added_tokens import token_ids
from dtrain.models.load import resolve_dtype
from dtrain.models.peft_format import read_adapter_config
from dtrain.pipeline.evaluator import Evaluations
from dtrain.pipeline.stage_inputs import Inputs
from dtrain.pipeline.teachers import TeacherModels
from dtrain.training.held_out import watched_set
from dtrain.training.preemption import StopFlag

# They change neither the numbers nor their order, so a run may resume with another value.
FREE_KEYS = ("micro_batch_size", "checkpoint_every_steps", "on_divergence")


@dataclass(frozen=True)
class StageRecord(StageDir):
    """A stage's folder, and what the stage is made from.

    Attributes:
        inputs: settings, data and parent; the stage's identity is their hash.
    """

    inputs: dict[str, Any]

    @property
    def identity(self) -> str:
        """Hash of settings, data and parent."""
        return fingerprint(self.inputs)

    def read(self) -> dict[str, Any] | None:
        """The record on disk; None if the stage was never started, or the record is damaged.

        A damaged record is no loss: every checkpoint contains the inputs that it was made from.

        Raises:
            OldFormat: an older dtrain wrote it.
        """
        try:
            return read_sealed(self.record)
        except OldFormat:
            raise
        except UserError:
            return None

    def is_complete(self) -> bool:
        """Whether the stage was finished under this identity."""
        record = self.read()
        return bool(record and record["complete"] and record["identity"] == self.identity)

    def find_corruption(self, *, with_merged: bool) -> str:
        """Hash a complete stage's results; return what is wrong, or an empty text.

        Args:
            with_merged: hash the merged model too.
        """
        record = self.read() or {}
        if with_merged and not self.merge_manifest.is_file():
            return f"{self.merged} is missing"
        for path, digest in self._result_files(record.get("files", {}), with_merged):
            if not path.is_file():
                return f"{path} is missing"
            if file_hash(path) != digest:
                return f"{path} is not what was written"
        return ""

    def _result_files(self, files: dict[str, str], with_merged: bool) -> Iterator[tuple[Path, str]]:
        manifest = str(self.merge_manifest.relative_to(self.path))
        for name, digest in files.items():
            if with_merged or name != manifest:
                yield self.path / name, digest
        if with_merged and manifest in files:
            for name, digest in read_merge_manifest(self.merged, "files")["files"].items():
                yield self.merged / name, digest

    def allowed_changes(self) -> set[str]:
        """Keys that were ever allowed to change after this stage was started."""
        return set((self.read() or {}).get("allowed", []))

    def check_same_inputs(self, allowed: set[str]) -> None:
        """Check that what this stage has trained so far was made from these inputs.

        A stage without a complete checkpoint has nothing that other inputs could spoil.

        Args:
            allowed: keys of the inputs that may differ.

        Raises:
            UserError: it was made from other inputs, or others may write to its folder.
        """
        if self.progress() == NOT_TRAINED or self.path.is_symlink():  # a link: of another run
            return
        check_own_folder(self.path.resolve())
        record = self.read() or {"complete": False, "inputs": self.inputs}
        saved = self.inputs if record["complete"] else self._inputs_of_checkpoint()
        try:
            check_same_inputs(record["inputs"], self.inputs, allowed)
            check_same_inputs(saved, self.inputs, allowed | self.allowed_changes())
        except Untrusted:
            raise
        except UserError as error:
            reuse = shlex.join(["--fresh", f"output.reuse={self.path.parent}"])
            fix = f"{error.fix}; or take over equal stages in a new run: {reuse}"
            where = f"stage {self.path.name}"
            raise UserError(error.message, where=where, fix=fix) from error

    def _inputs_of_checkpoint(self) -> dict[str, Any]:
        """The inputs recorded in the newest readable checkpoint, or these if there is none.

        Raises:
            Untrusted: a checkpoint may have been tampered with.
        """
        check_own_folder(self.checkpoints.resolve())
        for path in complete_folders(self.checkpoints):
            try:
                inputs: dict[str, Any] = Checkpoint.open(path).state["inputs"]
            except Untrusted:
                raise
            except UserError:
                continue
            return inputs
        return self.inputs

    def begin(self, allowed: set[str]) -> None:
        """Start or resume the stage, which `check_same_inputs` has passed.

        Raises:
            UserError: others may write to the folder, or it leads elsewhere.
        """
        if not self.path.exists():
            self.path.mkdir(mode=0o700)
            share_with_group(self.path, self.path.parent)
        check_own_folder(check_no_link(self.path))
        for entry in self.path.iterdir():
            if entry.is_dir():  # a link in place of a file is replaced, not written through
                check_no_link(entry)
        if self.record.exists() and self.read() is None:
            warn(f"{self.record} is damaged; the inputs recorded in the checkpoints count")
        remove_partial_files(self.path)
        self._write({"complete": False, "allowed": sorted(self.allowed_changes() | allowed)})

    def finish(self, facts: dict[str, Any]) -> None:
        """Record the stage as complete, with `facts` for the lineage."""
        results = [*self.adapter.glob("*"), self.merge_manifest]
        files = {
            str(path.relative_to(self.path)): file_hash(path) for path in results if path.is_file()
        }
        allowed = sorted(self.allowed_changes())
        self._write({"complete": True, "allowed": allowed, "files": files, "facts": facts})

    def _write(self, more: dict[str, Any]) -> None:
        write_sealed(self.record, {"identity": self.identity, "inputs": self.inputs, **more})


def stage_record(
    run: Path, recipe: Recipe, stage: Stage, inputs: Inputs, parent: str
) -> StageRecord:
    """The record of a stage whose base is the artifact with identity `parent`."""
    # The data's fingerprint covers what is read, and from where.
    folder = RunDir(run).stage(stage.name).path
    settings = _settings(stage, _recorded_inputs(recipe, folder))
    # In strict mode a micro-batch is the unit of the sums' fixed order.
    for key in FREE_KEYS if recipe.determinism == "off" else FREE_KEYS[1:]:
        settings["train"].pop(key, None)
    settings["data"]["template"] = Path(stage.data.template).name  # its text is in the content
    settings["data"]["loss_weights"] = stage.data.loss_weights
    settings["data"]["content"] = inputs.stages[stage.name].fingerprint
    if stage.distill is not None and stage.distill.teacher_folder is not None:
        settings["distill"]["teacher"] = inputs.teachers[stage.distill.teacher].fingerprint
    if settings["method"].get("from_adapter"):
        settings["method"]["from_adapter"] = _adapter_content(settings["method"]["from_adapter"])
    stage_inputs = {
        "parent": parent,
        "tokenizer": inputs.tokenizer_fingerprint,
        "seed": recipe.seed,
        "determinism": recipe.determinism,
        "dtype": recipe.model.dtype,
        "output": {"use": recipe.output.use},
        **settings,
    }
    if recipe.model.tokens is not None:  # the parent says so too, but nobody can read that
        stage_inputs["model"] = {"tokens": {"add": recipe.model.tokens.words}}
    watched = watched_set(stage.train, inputs.sets)
    if recipe.output.use == "best" and watched is not None:
        stage_inputs["output"]["watched"] = inputs.sets[watched].fingerprint
    return StageRecord(folder, stage_inputs)


def _settings(stage: Stage, recorded: Any) -> dict[str, Any]:
    """A stage's keys; those that its record lacks only if they have another value than by default.

    An older dtrain did not have them, and did what they say by default.

    Args:
        recorded: the inputs in the stage's record.
    """
    excluded: Any = {"data": {"sources", "replay"}}
    chosen = stage.model_dump(mode="json", exclude=excluded, exclude_defaults=True)
    settings: dict[str, Any] = _without_new_defaults(
        stage.model_dump(mode="json", exclude=excluded), chosen, recorded
    )
    return settings


def _without_new_defaults(now: Any, chosen: Any, recorded: Any) -> Any:
    if isinstance(now, list) and isinstance(recorded, list) and len(now) == len(recorded):
        chosen = chosen or now
        return [_without_new_defaults(*item) for item in zip(now, chosen, recorded, strict=True)]
    if not isinstance(now, dict) or not isinstance(recorded, dict):
        return now
    if now.get("kind") != recorded.get("kind"):  # of another method, not of an older dtrain
        return now
    return {
        key: _without_new_defaults(value, (chosen or {}).get(key), recorded.get(key))
        for key, value in now.items()
        if key in recorded or key in (chosen or {})
    }


def _recorded_inputs(recipe: Recipe, folder: Path) -> dict[str, Any] | None:
    """The inputs in the record of a stage, or of the finished stage that it may be taken from."""
    record = StageRecord(folder, {}).read()
    if record is None and recipe.output.reuse is not None:
        record = StageRecord(RunDir(Path(recipe.output.reuse)).stage(folder.name).path, {}).read()
    return record["inputs"] if record else None


def _adapter_content(address: str) -> str:
    """A hash of an adapter's files.

    Raises:
        UserError: it is no adapter in safetensors.
    """
    folder = local_path(address)
    read_adapter_config(folder)
    return AdapterFile(folder).fingerprint()


@dataclass(frozen=True)
class StageSetup:
    """What a stage is run with.

    Attributes:
        base: folder of the model that the stage starts from: the recipe's, or the merged model
            of the stage before.
    """

    recipe: Recipe
    stage: Stage
    folder: StageRecord
    base: Path
    inputs: Inputs
    evaluations: Evaluations
    teachers: TeacherModels
    world: World
    stop: StopFlag
    watchdog: HangWatchdog

    @cached_property
    def method(self) -> Method[Any]:
        """The stage's fine-tuning method."""
        tokens = token_ids(self.inputs.tokenizer, self.recipe.model.tokens)
        return build_method(self.stage.method, tokens)

    @property
    def dtype(self) -> torch.dtype:
        """The compute dtype on this device, where the recipe may say `auto`."""
        return resolve_dtype(self.recipe.model.dtype, self.world.device)

    @property
    def is_merged(self) -> bool:
        """Whether the stage writes a merged model."""
        return self.recipe.merges(self.stage)
