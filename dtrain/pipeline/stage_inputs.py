"""The inputs of a run: base, tokenizer and prepared data, prepared and checked before training.

No rank waits in a collective meanwhile: preparation may take longer than a collective's timeout.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import PretrainedConfig, PreTrainedTokenizerBase

from dtrain.config.data import Data
from dtrain.config.schema import Recipe
from dtrain.core.cache_paths import store_folder
from dtrain.core.errors import EmptyDataError, UserError
from dtrain.core.lazy_import import LazyModule
from dtrain.core.log import say, warn
from dtrain.data.packed_dataset import PackedDataset, check_vocabulary
from dtrain.data.prepare import DatasetSpec, prepare, prepare_share
from dtrain.data.shards import WorkShare
from dtrain.distributed.world import World
from dtrain.evaluation.prompts import PromptSet, prepare_prompts
from dtrain.merge.provenance import model_fingerprint
from dtrain.models.added_tokens import open_base, token_ids
from dtrain.models.load import read_config
from dtrain.models.packing_probe import Layout, probe_packing
from dtrain.models.positions import position_limit
from dtrain.models.tokenizer import load_tokenizer, tokenizer_fingerprint
from dtrain.objectives.base import build_objective
from dtrain.pipeline.input_checks import check_inputs, samples_of
from dtrain.pipeline.stage_checks import CPU, check_stages
from dtrain.pipeline.teachers import Teacher, find_teachers
from dtrain.planning.known_models import trained_positions
from dtrain.samples.make import ensure

if TYPE_CHECKING:
    from dtrain.evaluation.harness import LoadedTasks

# Only recipes with tasks need the extra that it imports.
harness: Any = LazyModule("dtrain.evaluation.harness")


@dataclass(frozen=True)
class Inputs:
    """A run's base, tokenizer and packed data.

    Attributes:
        layout: how documents go through the base, and through every model trained from it.
        stages: dataset of each stage, by the stage's name.
        sets: dataset of each evaluation set, by its name.
        prompts: set of prompts, by its name.
        teachers: models to distill from, by the recipe's name of them.
        tasks: of lm-evaluation-harness, if the recipe names any.
    """

    base: Path
    base_fingerprint: str
    tokenizer: PreTrainedTokenizerBase
    tokenizer_fingerprint: str
    layout: Layout
    stages: dict[str, PackedDataset]
    sets: dict[str, PackedDataset]
    prompts: dict[str, PromptSet]
    teachers: dict[str, Teacher]
    tasks: LoadedTasks | None = None

    @property
    def fingerprints(self) -> dict[str, str]:
        """Fingerprint of each input, by the recipe key that names it."""
        return {
            "model.base": self.base_fingerprint,
            "the tokenizer of model.base": self.tokenizer_fingerprint,
            "the code of model.base": repr(self.layout),
            **{f"stages.{name}.data": data.fingerprint for name, data in self.stages.items()},
            **{f"evaluation.sets.{name}": data.fingerprint for name, data in self.sets.items()},
            **{
                f"evaluation.tasks: {n}": h
                for n, h in (self.tasks.inputs if self.tasks else {}).items()
            },
            **{f"evaluation.generation.{n}": s.fingerprint for n, s in self.prompts.items()},
            **{f"teacher {name}": model.fingerprint for name, model in self.teachers.items()},
        }


def check_same_on_all_ranks(inputs: Inputs, world: World) -> None:
    """Check that every rank has the inputs of rank 0: files may differ between nodes.

    Raises:
        UserError: this rank has other inputs.
    """
    fingerprints = inputs.fingerprints
    first = json.loads(world.broadcast_text(json.dumps(fingerprints)))
    if different := [key for key in fingerprints if fingerprints[key] != first.get(key)]:
        message = f"rank {world.rank} reads other content than rank 0"
        fix = "put the same files on every node, and let nothing write to them during a run"
        raise UserError(message, where=", ".join(different), fix=fix)


def prepare_inputs(
    recipe: Recipe,
    *,
    verify: bool = False,
    device: torch.device = CPU,
    processes: int | None = None,
) -> Inputs:
    """Create samples, find the base, tokenize and pack all data.

    Args:
        verify: check what one rank checks for all: the inputs of all stages, every stage on its
            model, and the hashes of the prepared data.
        device: that the stages train on.
        processes: that tokenize; None for as many as cores and memory allow.

    Raises:
        UserError: base or data cannot be used, the base has too few positions for the data, or a
            stage does not fit the base.
    """
    if verify:
        check_inputs(recipe).raise_errors()  # the scripts of launch/ and slurm/ have not done it
    settings, gates = recipe.evaluation.tasks, recipe.evaluation.gates
    tasks = harness.load_tasks(settings, gates) if settings else None
    base, tokenizer, tokenizer_hash = _base_and_tokenizer(recipe)
    config = read_config(base, trust_remote_code=recipe.model.trust_remote_code)
    new_tokens = token_ids(tokenizer, recipe.model.tokens)
    layout = check_layout(recipe, config, new_tokens)
    if verify:
        check_stages(recipe, base, device, new_tokens)
    base_fingerprint = model_fingerprint(base)
    prompts = prepare_prompts(recipe, tokenizer)  # seconds; the data may take hours
    datasets: dict[str, PackedDataset] = {}
    for group in _groups(recipe):
        dataset = _prepare_group(group, tokenizer, tokenizer_hash, processes)
        check_vocabulary(dataset, config.get_text_config().vocab_size)
        if verify:
            dataset.verify()
        datasets[group.key] = dataset
    for stage in recipe.stages:
        build_objective(stage).check_data(datasets[f"stages.{stage.name}.data"])
    check_positions(recipe, config, datasets, prompts)
    return Inputs(
        base=base,
        base_fingerprint=base_fingerprint,
        tokenizer=tokenizer,
        tokenizer_fingerprint=tokenizer_hash,
        layout=layout,
        stages={stage.name: datasets[f"stages.{stage.name}.data"] for stage in recipe.stages},
        sets={name: datasets[f"evaluation.sets.{name}"] for name in recipe.evaluation.sets},
        prompts=prompts,
        teachers=find_teachers(recipe, tokenizer, layout, datasets),
        tasks=tasks,
    )


@dataclass(frozen=True)
class DataGroup:
    """A `data` group of a stage, or an evaluation set.

    Attributes:
        key: of the recipe.
        name: for messages.
        spec: from its objective.
        global_batch: sequences of a step.
    """

    key: str
    name: str
    data: Data
    spec: DatasetSpec
    global_batch: int = 1


def _groups(recipe: Recipe) -> Iterator[DataGroup]:
    """All data that a recipe names."""
    for stage in recipe.stages:
        key, name = f"stages.{stage.name}.data", f"the data of stage {stage.name}"
        spec = build_objective(stage).dataset
        yield DataGroup(key, name, stage.data, spec, stage.train.global_batch_size)
    for name, data in recipe.evaluation.sets.items():
        spec = build_objective(data).dataset
        yield DataGroup(f"evaluation.sets.{name}", f"the evaluation set {name}", data, spec)


def _prepare_group(
    group: DataGroup, tokenizer: PreTrainedTokenizerBase, tokenizer_hash: str, processes: int | None
) -> PackedDataset:
    batch = group.global_batch
    try:
        return prepare(
            group.data, group.spec, tokenizer, tokenizer_hash, store_folder(), processes, batch
        )
    except EmptyDataError as error:
        message = f"{group.name} is empty: {error.message}"
        raise EmptyDataError(message, where=error.where, fix=error.fix) from error


def prepare_inputs_share(recipe: Recipe, share: WorkShare, processes: int | None = None) -> bool:
    """Do one share of the preparation of all data, while others do the rest.

    Returns:
        Whether all data is ready; if not, others are still working, or were killed.

    Raises:
        UserError: base or data cannot be used.
    """
    base, tokenizer, tokenizer_hash = _base_and_tokenizer(recipe)
    config = read_config(base, trust_remote_code=recipe.model.trust_remote_code)
    check_layout(recipe, config, token_ids(tokenizer, recipe.model.tokens))
    ready = [
        prepare_share(
            group.data, group.spec, tokenizer, tokenizer_hash, store_folder(), share, processes
        )
        for group in _groups(recipe)
    ]
    return all(ready)


def _base_and_tokenizer(recipe: Recipe) -> tuple[Path, PreTrainedTokenizerBase, str]:
    """Base, tokenizer and the tokenizer's fingerprint; samples are created first."""
    for name in sorted(samples_of(recipe)):
        ensure(name)
    base = open_base(recipe.model)
    tokenizer = load_tokenizer(base, recipe.model.trust_remote_code)
    return base, tokenizer, tokenizer_fingerprint(tokenizer)


def check_layout(
    recipe: Recipe, config: PretrainedConfig, new_tokens: Sequence[int] = ()
) -> Layout:
    """Return how documents must go through the base, and check that the recipe allows it.

    Args:
        new_tokens: numbers of the tokens that the run has added.

    Raises:
        UserError: the recipe packs documents and the model would let them attend to each other, or
            the model cannot be trained.
    """
    layout = probe_packing(config, recipe.model, new_tokens)
    packs = [f"{group.key}.packing" for group in _groups(recipe) if group.data.packing]
    if packs and not layout.packed:
        raise UserError(
            f"{config.model_type!r} cannot be packed: {layout.reason}",
            where=", ".join(packs),
            fix="packing: false, one document per sequence",
        )
    pairs = [group.key for group in _groups(recipe) if group.spec.encoder.documents_per_row > 1]
    if pairs and not layout.packed:
        raise UserError(
            f"{config.model_type!r} cannot be packed ({layout.reason}), but both answers of a row "
            "share a sequence",
            where=", ".join(pairs),
            fix="use another base model, or train on the better answers with kind: sft",
        )
    return layout


def limit_micro_batches(recipe: Recipe, layout: Layout) -> Recipe:
    """Return the recipe with micro-batches of one sequence for a model that cannot be packed."""
    if layout.packed:
        return recipe
    stages = []
    for stage in recipe.stages:
        if stage.train.micro_batch > 1:
            say(f"stage {stage.name}: micro-batches of one sequence, as {layout.reason}")
        train = stage.train.model_copy(update={"micro_batch_size": 1})
        stages.append(stage.model_copy(update={"train": train}))
    return recipe.model_copy(update={"stages": stages})


def prepare_recipe(recipe: Recipe, share: WorkShare, processes: int | None = None) -> None:
    """Prepare all data of a recipe, or a share of it, and describe it.

    Raises:
        UserError: base or data cannot be used.
    """
    if share.of > 1 and not prepare_inputs_share(recipe, share, processes):
        say("other shares are not finished; the last of them packs, or else the next start")
        return
    check_stages(recipe, _base_and_tokenizer(recipe)[0])
    inputs = prepare_inputs(recipe, processes=processes)
    for name, dataset in inputs.stages.items():
        say(f"stage {name}: {dataset.describe()}")
    for name, dataset in inputs.sets.items():
        say(f"evaluation set {name}: {dataset.describe()}")


# Recipe key, description, tokens, and the fix if there are too many.
Length = tuple[str, str, int, str]


def check_positions(
    recipe: Recipe,
    config: PretrainedConfig,
    datasets: dict[str, PackedDataset],
    prompts: dict[str, PromptSet],
) -> None:
    """Check that the base has a position for every token that is trained, evaluated or asked.

    In a packed sequence, each document counts by itself.

    Args:
        datasets: prepared data, by the key of the recipe.
        prompts: sets of prompts, by name.

    Raises:
        UserError: the number of positions is fixed and too small.
    """
    added = max(stage.method.added_tokens for stage in recipe.stages)
    lengths = [*_documents(datasets, added), *_prompts(recipe, prompts)]
    longest = max(tokens for _, _, tokens, _ in lengths)
    limit = position_limit(config, longest, recipe.model.trust_remote_code)
    known = trained_positions(config.get_text_config(decoder=True).to_dict())
    for where, description, tokens, fix in lengths:
        if limit is not None and tokens > limit:
            message = f"{description}, but the model has {limit:,} positions"
            raise UserError(message, where=where, fix=fix.format(limit))
        if limit is None and known is not None and tokens > known:
            warn(
                f"{where}: {description}, but the model was trained for {known:,} positions "
                f"(max_position_embeddings), and its config scales no rope beyond them"
            )


def _documents(datasets: dict[str, PackedDataset], added: int) -> Iterator[Length]:
    for key, dataset in datasets.items():
        longest = dataset.longest_segment
        description = (
            f"a document of {longest:,} tokens (sequence_length {dataset.sequence_length})"
        )
        fix = "sequence_length: {} or less"
        if added:
            description += f" and {added} virtual ones"
            fix = "sequence_length and virtual_tokens: {} or less together"
        yield key, description, longest + added, fix


def _prompts(recipe: Recipe, prompts: dict[str, PromptSet]) -> Iterator[Length]:
    """The longest prompt of each set, with its answer."""
    for name, settings in recipe.evaluation.generation.items():
        prompt, answer = prompts[name].longest_prompt, settings.max_new_tokens
        description = f"a prompt of {prompt:,} tokens and an answer of max_new_tokens {answer}"
        fix = "shorter prompts, or fewer max_new_tokens"
        yield f"evaluation.generation.{name}", description, prompt + answer, fix
