"""The teachers that a recipe names: checked before the training, and loaded for it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dtrain.config.distill import OWN_BASE
from dtrain.config.engines import ENGINES
from dtrain.config.schema import Recipe
from dtrain.core.errors import UserError
from dtrain.core.lazy_import import LazyModule
from dtrain.core.log import say
from dtrain.core.units import count
from dtrain.data.packed_dataset import PackedDataset, check_vocabulary
from dtrain.distributed.world import World
from dtrain.merge.provenance import model_fingerprint
from dtrain.models.compute_dtype import limit_autocast
from dtrain.models.hub import base_folder
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.load import read_config, resolve_dtype
from dtrain.models.packing_probe import Layout, probe_packing
from dtrain.models.parameter_counts import parameter_counts
from dtrain.models.positions import position_limit
from dtrain.models.sharded_loading import stream_base
from dtrain.models.tokenizer import load_tokenizer, tokenizer_difference

# Only a sharded teacher needs it, and its import takes a second.
fsdp2: Any = LazyModule("dtrain.engines.fsdp2")


@dataclass(frozen=True)
class Teacher:
    """A model that a stage or a held-out set distills from.

    Attributes:
        fingerprint: of its weights and config.
    """

    folder: Path
    fingerprint: str


def find_teachers(
    recipe: Recipe,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    datasets: Mapping[str, PackedDataset],
) -> dict[str, Teacher]:
    """Find every teacher, by the recipe's name of it, and check that it can teach.

    Args:
        tokenizer: of the base.
        layout: how documents go through the base.
        datasets: prepared data, by the key of the recipe.

    Raises:
        UserError: a teacher cannot be loaded, reads other tokens than the base, lets packed
            documents attend to each other, or has too few positions.
    """
    teachers = dict[str, Teacher]()
    for key, address in recipe.teachers.items():
        folder = base_folder(address, where=key)
        _check_tokenizer(recipe, folder, tokenizer, key)
        config = read_config(folder, trust_remote_code=recipe.model.trust_remote_code)
        _check_layout(recipe, config, layout, key)
        owner = key.removesuffix(".distill.teacher")
        dataset = datasets.get(f"{owner}.data") or datasets[owner]
        check_vocabulary(dataset, config.get_text_config().vocab_size)
        _check_positions(recipe, config, dataset, key)
        teachers[address] = Teacher(folder, model_fingerprint(folder))
    return teachers


def _check_tokenizer(
    recipe: Recipe, folder: Path, tokenizer: PreTrainedTokenizerBase, key: str
) -> None:
    other = load_tokenizer(folder, recipe.model.trust_remote_code)
    if difference := tokenizer_difference(tokenizer, other):
        raise UserError(
            f"the teacher {folder} reads other tokens than model.base: {difference}",
            where=key,
            fix="choose a teacher with the base's tokenizer; or let it write answers, with "
            "`dtrain data augment`, and train on those with kind: sft",
        )


def _check_layout(recipe: Recipe, config: PretrainedConfig, layout: Layout, key: str) -> None:
    if not layout.packed:  # one document at a time
        return
    own = probe_packing(config, recipe.model)
    if not own.packed:
        raise UserError(
            f"the teacher, {config.model_type!r}, cannot be packed: {own.reason}",
            where=key,
            fix="choose another teacher",
        )


def _check_positions(
    recipe: Recipe, config: PretrainedConfig, dataset: PackedDataset, key: str
) -> None:
    longest = dataset.longest_segment
    limit = position_limit(config, longest, recipe.model.trust_remote_code)
    if limit is not None:
        raise UserError(
            f"a document has {longest:,} tokens, but the teacher has {limit:,} positions",
            where=key,
            fix=f"sequence_length: {limit} or less",
        )


class TeacherModels:
    """The loaded teachers of a stage, which its objective and its held-out sets share."""

    def __init__(self, recipe: Recipe, world: World, teachers: Mapping[str, Teacher]) -> None:
        self._recipe, self._world, self._teachers = recipe, world, teachers
        self._loaded: dict[Path, nn.Module] = {}

    def load(self, address: str) -> nn.Module:
        """A frozen model in the compute dtype, by the recipe's name of it; for all ranks together.

        Where the engine shards the base, fully_shard shards this model's decoder layers, so that
        a rank keeps its output matrix whole. Other engines keep all of it on every rank.

        Raises:
            UserError: the model cannot be loaded.
        """
        folder = self._teachers[address].folder
        if folder not in self._loaded:
            self._loaded[folder] = _load(self._recipe, self._world, folder)
        return self._loaded[folder]

    def fingerprint(self, address: str) -> str:
        """What identifies the content of a teacher; the name itself for the stage's own base."""
        return address if address == OWN_BASE else self._teachers[address].fingerprint

    def release(self) -> None:
        """Forget the models, on all ranks at the same point of the run."""
        self._loaded.clear()


def _load(recipe: Recipe, world: World, folder: Path) -> nn.Module:
    settings = recipe.model.model_copy(update={"gradient_checkpointing": False})
    dtype, device = resolve_dtype(recipe.model.dtype, world.device), world.device
    is_sharded = ENGINES[recipe.engine.kind].shards_base
    streamed = stream_base(folder, settings, quantized=False, dtype=dtype, device=device)
    model: nn.Module = streamed.model
    if not is_sharded:
        streamed.materialize(model)
    parameters = parameter_counts(model)[1]
    kernels = apply_kernels(model, settings)
    if dtype != torch.float32:
        limit_autocast(model, device, dtype)
    if is_sharded:
        ranks = recipe.engine.shard if ENGINES[recipe.engine.kind].shard_group else "all"
        fsdp2.shard_frozen(model, streamed.materialize, ranks, world)
    kept = "sharded over the ranks" if is_sharded else "whole on every rank"
    say(f"{folder}: {count(parameters)} parameters in {dtype}, frozen, {kept}; kernels: {kernels}")
    return model.eval()
