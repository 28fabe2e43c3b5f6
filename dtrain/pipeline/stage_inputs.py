"""Everything a run reads, made ready by the first rank, never inside a collective."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dtrain.config.schema import Data, Recipe
from dtrain.core.cache_paths import cache_folder, local_path, sample_name
from dtrain.core.errors import EmptyDataError, UserError
from dtrain.core.log import say
from dtrain.data.prepare import DatasetSpec, PackedDataset, check_vocabulary, prepare, prepare_share
from dtrain.data.shards import WorkShare
from dtrain.distributed.world import World
from dtrain.merge.provenance import model_fingerprint
from dtrain.models.hub import base_folder
from dtrain.models.load import read_config
from dtrain.models.packing_probe import Layout, probe_packing
from dtrain.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from dtrain.objectives.base import build_objective
from dtrain.pipeline.evaluator import read_questions
from dtrain.pipeline.position_checks import check_positions
from dtrain.samples.make import ensure


@dataclass(frozen=True)
class Inputs:
    """A run's base, tokenizer and packed data.

    Attributes:
        layout: how documents go through the base, and so through what is made of it.
        stages: mixture of each stage, by the stage's name.
        sets: mixture of each evaluation set, by its name.
    """

    base: Path
    base_fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    tokenizer_fingerprint: str
    layout: Layout
    stages: dict[str, PackedDataset]
    sets: dict[str, PackedDataset]

    @property
    def fingerprints(self) -> dict[str, str]:
        """What was read, by the key of the recipe that names it."""
        return {
            "model.base": self.base_fingerprint,
            "the tokenizer of model.base": self.tokenizer_fingerprint,
            "the code of model.base": repr(self.layout),
            **{f"stages.{name}.data": data.fingerprint for name, data in self.stages.items()},
            **{f"evaluation.sets.{name}": data.fingerprint for name, data in self.sets.items()},
        }


def check_same_on_all_ranks(inputs: Inputs, world: World) -> None:
    """Check that every rank has read what the first one has: files may differ from node to node.

    Raises:
        UserError: this rank has read something else.
    """
    own = inputs.fingerprints
    first = json.loads(world.broadcast_text(json.dumps(own)))
    if others := [key for key in own if own[key] != first.get(key)]:
        what = f"rank {world.rank} reads something else than rank 0 there"
        fix = "put the same files on every node, and let nothing write to them during a run"
        raise UserError(what, where=", ".join(others), fix=fix)


def prepare_inputs(recipe: Recipe, *, verify: bool = False, processes: int | None = None) -> Inputs:
    """Make samples, find the base, tokenise and pack all data.

    Args:
        verify: hash the prepared data again; one rank is enough.
        processes: that tokenise; None for as many as cores and memory allow.

    Raises:
        UserError: base or data cannot be used, or the base has too few positions for the data.
    """
    base, tokenizer, mark = _base_of(recipe)
    config = read_config(base, trust_remote_code=recipe.model.trust_remote_code)
    layout = layout_of(recipe, config)
    base_fingerprint = model_fingerprint(base)
    datasets: dict[str, PackedDataset] = {}
    for group in _groups(recipe):
        dataset = _prepared(group, tokenizer, mark, processes)
        check_vocabulary(dataset, config.get_text_config().vocab_size)
        if verify:
            dataset.verify()
        datasets[group.key] = dataset
    check_positions(recipe, config, tokenizer, datasets)
    return Inputs(
        base=base,
        base_fingerprint=base_fingerprint,
        tokenizer=tokenizer,
        tokenizer_fingerprint=mark,
        layout=layout,
        stages={stage.name: datasets[f"stages.{stage.name}.data"] for stage in recipe.stages},
        sets={name: datasets[f"evaluation.sets.{name}"] for name in recipe.evaluation.sets},
    )


@dataclass(frozen=True)
class _Group:
    """The data of a stage or of an evaluation set.

    Attributes:
        key: of the recipe.
        name: for a message.
        global_batch: sequences of a step.
    """

    key: str
    name: str
    data: Data
    spec: DatasetSpec
    global_batch: int = 1


def _groups(recipe: Recipe) -> Iterator[_Group]:
    """All data that a recipe names."""
    for stage in recipe.stages:
        key, name = f"stages.{stage.name}.data", f"the data of stage {stage.name}"
        spec = build_objective(stage).dataset
        yield _Group(key, name, stage.data, spec, stage.train.global_batch_size)
    for name, data in recipe.evaluation.sets.items():
        spec = build_objective(data).dataset
        yield _Group(f"evaluation.sets.{name}", f"the evaluation set {name}", data, spec)


def _prepared(
    group: _Group, tokenizer: PreTrainedTokenizerBase, mark: str, processes: int | None
) -> PackedDataset:
    """The data of one group.

    Raises:
        UserError: it cannot be used.
    """
    try:
        return prepare(
            group.data, group.spec, tokenizer, mark, store_folder(), processes, group.global_batch
        )
    except EmptyDataError as error:
        what = f"{group.name} is empty: {error.message}"
        raise EmptyDataError(what, where=error.where, fix=error.fix) from error


def prepare_inputs_partly(recipe: Recipe, share: WorkShare, processes: int | None = None) -> bool:
    """Do one share of the work on all data, beside others that do the rest.

    Returns:
        Whether all of it is ready; if not, others are still at work, or were killed.

    Raises:
        UserError: base or data cannot be used.
    """
    base, tokenizer, mark = _base_of(recipe)
    layout_of(recipe, read_config(base, trust_remote_code=recipe.model.trust_remote_code))
    done = [
        prepare_share(one.data, one.spec, tokenizer, mark, store_folder(), share, processes)
        for one in _groups(recipe)
    ]
    return all(done)


def _base_of(recipe: Recipe) -> tuple[Path, PreTrainedTokenizerBase, str]:
    """Base, tokenizer and the tokenizer's fingerprint; samples are made first."""
    for name in sorted(samples_of(recipe)):
        ensure(name)
    if wanted := recipe.evaluation.questions:
        read_questions(local_path(wanted.path), wanted.count)  # not after days of training
    base = base_folder(recipe.model.base)
    tokenizer = load_tokenizer(base, recipe.model.trust_remote_code)
    return base, tokenizer, tokenizer_fingerprint(tokenizer)


def layout_of(recipe: Recipe, config: PretrainedConfig) -> Layout:
    """How documents must go through the base, after a look at what the recipe packs.

    Raises:
        UserError: it packs documents that the model would mix, or the model cannot be trained.
    """
    layout = probe_packing(config, recipe.model)
    packs = [f"{group.key}.packing" for group in _groups(recipe) if group.data.packing]
    if packs and not layout.packed:
        raise UserError(
            f"{config.model_type!r} cannot be packed: {layout.reason}",
            where=", ".join(packs),
            fix="packing: false, one document in a row",
        )
    return layout


def one_document_each(recipe: Recipe, layout: Layout) -> Recipe:
    """The recipe as it is run: a model that is not packed computes one sequence at once."""
    if layout.packed:
        return recipe
    stages = []
    for stage in recipe.stages:
        if stage.train.micro_batch > 1:
            say(f"stage {stage.name}: one sequence at once, as {layout.reason}")
        train = stage.train.model_copy(update={"micro_batch_size": 1})
        stages.append(stage.model_copy(update={"train": train}))
    return recipe.model_copy(update={"stages": stages})


def store_folder() -> Path:
    """Where prepared data lies."""
    return cache_folder() / "stores"


def samples_of(recipe: Recipe) -> set[str]:
    """Names of the shipped samples that a recipe asks for."""
    addresses = [recipe.model.base]
    addresses += [source.path for one in _groups(recipe) for source in one.data.all_sources]
    if recipe.evaluation.questions:
        addresses.append(recipe.evaluation.questions.path)
    return {name for address in addresses if (name := sample_name(address))}


def prepare_recipe(recipe: Recipe, share: WorkShare, processes: int | None = None) -> None:
    """Prepare all data of a recipe, or a share of it, and say what there is.

    Raises:
        UserError: base or data cannot be used.
    """
    if share.of > 1 and not prepare_inputs_partly(recipe, share, processes):
        say("others still make what is missing; the last of them packs, or else the next start")
        return
    inputs = prepare_inputs(recipe, processes=processes)
    for name, dataset in {**inputs.stages, **inputs.sets}.items():
        say(f"{name}: {dataset.describe()}")


def share_of_array(environ: Mapping[str, str]) -> WorkShare:
    """The share of this task of a Slurm array; all of the work outside of one.

    Of an array with gaps (3,7) two tasks may begin at the same place: each makes what is left.
    """
    try:
        number, first, count = (
            int(environ[f"SLURM_ARRAY_TASK_{n}"]) for n in ("ID", "MIN", "COUNT")
        )
        step = int(environ.get("SLURM_ARRAY_TASK_STEP", "1"))
        return WorkShare((number - first) // step % count, count)
    except (KeyError, ValueError, ZeroDivisionError):
        return WorkShare()


def parse_share(text: str) -> WorkShare:
    """'2/8' → the second of eight shares.

    Raises:
        UserError: it is not of that form.
    """
    found = re.fullmatch(r"(\d+)/(\d+)", text)
    number, of = (int(group) for group in found.groups()) if found else (0, 0)
    if not 1 <= number <= of:
        raise UserError("not a share", where=f"--shard {text}", fix="write 1/8 to 8/8 for eight")
    return WorkShare(number - 1, of)
