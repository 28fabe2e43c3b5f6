"""What a run folder has to answer with: its base, and the adapter and merged model of each stage.

No torch: a login node asks this too.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from dtrain.config.load import load_recipe
from dtrain.config.schema import Recipe, Stage
from dtrain.core.cache_paths import local_path, sample_name, user_path
from dtrain.core.errors import UserError
from dtrain.core.files import read_json
from dtrain.core.folder_kind import FolderKind, folder_kind
from dtrain.core.hashes import file_hash
from dtrain.core.run_dir import BASE_MODEL, RunDir
from dtrain.core.stage_dir import ADAPTER, ADAPTER_CONFIG, MERGE_MANIFEST, read_merge_manifest
from dtrain.models.peft_format import CHAT_TEMPLATE, WEIGHTS, adapter_base, read_adapter_origin
from dtrain.monitoring.run_files import Lineage


@dataclass(frozen=True)
class ServedModel:
    """What answers: a model, with adapters one on top of the other.

    Attributes:
        base: folder or hub id.
        quantized: the base is held in NF4.
        adapters: folders; the later ones were trained on the earlier ones' results.
        template: of conversations, as a recipe names it.
    """

    base: str
    quantized: bool = False
    adapters: tuple[Path, ...] = ()
    template: str = "auto"

    @property
    def fingerprint(self) -> str:
        """Identifies the content at this path; empty for a base without a record."""
        if self.adapters:
            last = self.adapters[-1]
            return (read_adapter_origin(last).identity or file_hash(last / WEIGHTS))[:12]
        base = user_path(self.base)
        is_merged = (base / MERGE_MANIFEST).is_file()
        return str(read_merge_manifest(base).get("result", ""))[:12] if is_merged else ""


@dataclass(frozen=True)
class ServedRun:
    """A run folder at its current path."""

    folder: Path
    recipe: Recipe

    @property
    def base(self) -> str:
        """The first stage's base: the folder that was used, else what the recipe names."""
        lineage = RunDir(self.folder).lineage
        used = (read_json(lineage, Lineage).get("base") or {}) if lineage.is_file() else {}
        # The recipe names a base without its new tokens.
        is_only = self.recipe.model.tokens is not None and used.get("path")
        if is_only or user_path(used.get("path") or "-").is_dir():
            return str(used["path"])
        path = local_path(self.recipe.model.base)
        known = path.is_dir() or sample_name(self.recipe.model.base) is not None
        return str(path.absolute()) if known else self.recipe.model.base

    def adapter(self, stage: Stage) -> Path:
        """Return the path of a stage's adapter."""
        return RunDir(self.folder).stage(stage.name).adapter

    def merged(self, stage: Stage) -> Path:
        """Return the path of a stage's merged model."""
        return RunDir(self.folder).stage(stage.name).merged

    def has_merged(self, stage: Stage) -> bool:
        """Whether the stage's merged model is there, whole."""
        return (self.merged(stage) / MERGE_MANIFEST).is_file()

    def base_of(self, stage: Stage) -> str:
        """What a stage was trained on: the base, or the merged model of an earlier stage."""
        parent = self.recipe.parent_of(stage)
        return str(self.merged(parent)) if parent else self.base

    def extra_adapters(self) -> list[Path]:
        """Adapters right in the run folder, such as combined ones."""
        return sorted(path.parent for path in self.folder.glob(f"*/{ADAPTER_CONFIG}"))

    def choices(self) -> dict[str, ServedModel]:
        """What can answer, by name: the base, the extras, then each stage that is there.

        A stage's adapter is added to the earlier ones, so that one base in memory serves all;
        it stands on the merged model before it where that is another model than base + adapters:
        after full fine-tuning, if one of the methods does not stack, or if it was itself trained
        over that model in NF4.
        """
        models = {BASE_MODEL: ServedModel(self.base, template=self.recipe.chat_template)}
        for folder in self.extra_adapters():
            models[folder.name] = served_adapter(folder, self.base, self.recipe.chat_template)
        below: dict[str, ServedModel | None] = {}  # what the next stage's adapter can be added to
        for stage in self.recipe.stages:
            parent = self.recipe.parent_of(stage)
            model = self._after(stage, below[parent.name] if parent else models[BASE_MODEL])
            below[stage.name] = model if self._stacks(stage) else None
            if model is not None:
                models[stage.adapter_name or stage.name] = model
        return models

    def _stacks(self, stage: Stage) -> bool:
        """Whether a stage's adapter can be on one base with others: trained rows are in one."""
        return stage.method.stacks and self.recipe.model.tokens is None

    def _after(self, stage: Stage, before: ServedModel | None) -> ServedModel | None:
        if not stage.method.traits.adds_adapter:
            template = trained_template([self.merged(stage)], self.recipe.chat_template)
            merged = ServedModel(str(self.merged(stage)), template=template)
            return merged if self.has_merged(stage) else None
        if not (self.adapter(stage) / ADAPTER_CONFIG).is_file():
            return None
        quantized, first = stage.method.traits.quantizes_base, self.recipe.parent_of(stage) is None
        base, folders = self.base_of(stage), [self.adapter(stage)]
        if not (first or quantized or before is None) and self._stacks(stage):
            base, quantized = before.base, before.quantized
            folders = [*before.adapters, *folders]
        return ServedModel(
            base, quantized, tuple(folders), trained_template(folders, self.recipe.chat_template)
        )


def is_run(address: str) -> bool:
    """Whether an address is a run folder's."""
    return folder_kind(user_path(address)) is FolderKind.RUN


def open_run(folder: Path) -> ServedRun:
    """A run folder.

    Raises:
        UserError: it is none, or its recipe cannot be read.
    """
    run = RunDir(folder)
    run.check_exists()
    return ServedRun(folder.absolute(), load_recipe(str(run.recipe)))


def served_adapter(folder: Path, base: str | None = None, template: str = "auto") -> ServedModel:
    """An adapter's folder on `base`; on the base that its config names if None.

    Raises:
        UserError: it is no adapter, or names no base.
    """
    base = base or adapter_base(folder)
    if not base:
        raise UserError(
            "does not say which base it belongs to",
            where=str(folder / ADAPTER_CONFIG),
            fix="name the model, and this folder as --adapter",
        )
    template = trained_template([folder], template)
    return ServedModel(base, read_adapter_origin(folder).base_in_nf4, (folder,), template)


def trained_template(folders: Sequence[Path], otherwise: str) -> str:
    """The template that the last of these results brings along; else what a recipe names."""
    brought = [folder / CHAT_TEMPLATE for folder in folders]
    return next((str(path) for path in reversed(brought) if path.is_file()), otherwise)


def served_models(address: str) -> dict[str, ServedModel]:
    """What can answer at an address: of a run, of an adapter's folder, or of a model.

    The last one is what is meant if none is named.
    """
    path = user_path(address)
    if is_run(address):
        return open_run(path).choices()
    template = _template_beside(path)
    if folder_kind(path) is FolderKind.ADAPTER:
        adapter = served_adapter(path, template=template)
        name = path.absolute().parent.name if path.name == ADAPTER else path.name
        return {BASE_MODEL: ServedModel(adapter.base, template=template), name: adapter}
    return {BASE_MODEL: ServedModel(address, template=template)}


def _template_beside(result: Path) -> str:
    """The template of a stage's adapter or merged model: its own, else its run's recipe's."""
    run = result.absolute().parent.parent
    otherwise = open_run(run).recipe.chat_template if is_run(str(run)) else "auto"
    return trained_template([result], otherwise)
