"""A stage's model: built in an engine at a checkpoint's state, and exported when it has trained."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes.nn import Linear4bit
from torch import nn
from transformers import GenerationConfig, PreTrainedModel

from dtrain.checkpoints.reader import Checkpoint
from dtrain.config.engines import ENGINES
from dtrain.core.cache_paths import computed_folder, hub_id
from dtrain.core.hashes import fingerprint
from dtrain.core.locks import ShardLocks
from dtrain.core.log import say, warn
from dtrain.core.units import count
from dtrain.core.weight_files import weight_files
from dtrain.distributed.world import World
from dtrain.engines.base import Engine, build_engine
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.chat_files import (
    adapter_chat_files,
    generation_config,
    merged_chat_files,
    tokenizer_texts,
)
from dtrain.merge.from_checkpoint import read_parameter, trained_weights
from dtrain.merge.merge import MergeJob, check_mergeable, default_processes
from dtrain.merge.merge_inputs import adapter_input
from dtrain.merge.nf4 import Nf4Base
from dtrain.methods.base import MethodContext, summarize_names
from dtrain.methods.new_tokens import check_new_tokens
from dtrain.models.by_document import missing_packages
from dtrain.models.embedding_noise import add_embedding_noise
from dtrain.models.expert_nf4 import holds_nf4
from dtrain.models.kernels import compiled
from dtrain.models.kernels.patch import apply_kernels, compile_ahead
from dtrain.models.loss import transformers_model
from dtrain.models.meta_model import linear_layers
from dtrain.models.parameter_counts import parameter_counts
from dtrain.models.peft_format import GENERATION, base_reference
from dtrain.models.sharded_loading import StreamedModel, stream_base
from dtrain.pipeline.initial_adapter import open_initial_adapter
from dtrain.pipeline.stage_checks import check_rate_scales
from dtrain.pipeline.stage_record import StageSetup


def build_model_in_engine(setup: StageSetup) -> tuple[Engine, tuple[int, int]]:
    """Load the base, attach the method, apply kernels, wrap it in the engine.

    Returns:
        The engine, and the numbers of trainable and of all parameters.
    """
    recipe, stage, world, method = setup.recipe, setup.stage, setup.world, setup.method
    base = _open_base(setup)
    model = method.attach(base.model, seed=recipe.seed, device=world.device)
    if method.new_tokens:
        check_new_tokens(model)
    _check_merge(setup, model)
    method.on_attached(model, _method_context(setup))
    initial = open_initial_adapter(setup, model)
    check_rate_scales(stage, model)

    def materialize(block: torch.nn.Module) -> None:
        base.materialize(block)
        method.on_weights_loaded(block)

    if not ENGINES[recipe.engine.kind].shards_base:
        materialize(model)
    trainable, total = parameter_counts(model)
    say(
        f"stage {stage.name}: {stage.kind}, {stage.method.kind}, "
        f"{count(trainable)} of {count(total)} parameters train ({trainable / total:.2%}), "
        f"{recipe.engine.kind} on {world.size} x {world.device.type}, {setup.dtype}"
    )
    compiled.set_enabled(on=recipe.determinism != "strict")
    say(f"kernels: {apply_kernels(model, recipe.model)}")
    if world.device.type == "cuda" and (packages := missing_packages(model)):
        warn(f"layers with a state are slow without {', '.join(packages)}: install them")
    if alpha := stage.train.neftune_noise_alpha:
        add_embedding_noise(model, alpha)
    if recipe.model.kernels != "off":
        compile_ahead(world.device, setup.dtype, trains_base=method.traits.trains_base)
    engine = build_engine(model, recipe, stage, world, materialize)
    if initial is not None:
        initial.restore(engine.parameter_shards())
        engine.on_weights_changed()
    return engine, (trainable, total)


def _method_context(setup: StageSetup) -> MethodContext:
    return MethodContext(
        base=setup.base,
        base_identity=setup.folder.inputs["parent"],
        dtype=setup.method.base_dtype(setup.dtype),
        cache=computed_folder("methods", setup.folder.path),
        world=setup.world,
    )


def _open_base(setup: StageSetup) -> StreamedModel:
    """The base without storage, whose blocks are loaded one by one."""
    method = setup.method
    streamed = stream_base(
        setup.base,
        setup.recipe.model,
        quantized=method.traits.quantizes_base,
        dtype=method.base_dtype(setup.dtype),
        device=setup.world.device,
    )
    if method.traits.quantizes_base:
        _say_what_is_packed(streamed.model)
    return streamed


def _say_what_is_packed(model: PreTrainedModel) -> None:
    layers, output = linear_layers(model), model.get_output_embeddings()
    packed = [name for name, layer in layers.items() if isinstance(layer, Linear4bit)]
    others = [name for name in layers.keys() - packed if layers[name] is not output]
    experts = " and the experts" if any(map(holds_nf4, model.modules())) else ""
    kept = f"; not in NF4 ({len(others)}): {summarize_names(sorted(others))}"
    say(f"{len(packed)} linear layers{experts} are in NF4{kept if others else ''}")


def _check_merge(setup: StageSetup, model: torch.nn.Module) -> None:
    """Check before the training that the result can be merged."""
    if setup.is_merged:
        check_mergeable(setup.base, setup.method.changed_tensors(model))


def set_generation_config(setup: StageSetup, model: nn.Module, *, is_trained: bool) -> None:
    """Let the model generate with the settings of its base, or of what the stage will merge.

    The latter end an answer at the end of a turn of the stage's chat template.
    """
    base, files = setup.base, dict[str, str]()
    if is_trained:
        files = adapter_chat_files(setup.stage, base, setup.inputs.tokenizer)
    settings = json.loads(files.get(GENERATION) or generation_config(base, []))
    transformers_model(model).generation_config = GenerationConfig.from_dict(settings)


def export_adapter(setup: StageSetup, model: nn.Module, checkpoint: Checkpoint) -> None:
    """Write the adapter and remove an old merged model (first rank only).

    Results of an earlier attempt may come from fewer steps, or be damaged: they are replaced.
    """
    if setup.method.traits.adds_adapter:
        tensors = {name: read_parameter(checkpoint, name) for name in checkpoint.names}
        files = adapter_chat_files(setup.stage, setup.base, setup.inputs.tokenizer)
        if setup.recipe.model.tokens is not None:
            files = tokenizer_texts(setup.base) | files
        named = _base_reference(setup)
        setup.method.save(setup.folder.adapter, model, tensors, base=named, files=files)
    if setup.is_merged:
        shutil.rmtree(setup.folder.merged, ignore_errors=True)


def _base_reference(setup: StageSetup) -> str:
    """How the stage's adapter names its base."""
    model = setup.recipe.model
    is_given = setup.base == setup.inputs.base and model.tokens is None
    hub = hub_id(model.base) if is_given else None
    folder = str(setup.base.absolute())
    return hub or base_reference(folder, setup.folder.adapter, setup.folder.path.parent)


def export_merged_model(setup: StageSetup, checkpoint: Checkpoint) -> None:
    """Write the merged model, on all ranks together."""

    def merge(processes: int) -> None:
        chat_files = adapter_chat_files(setup.stage, setup.base, setup.inputs.tokenizer)
        job = MergeJob(
            setup.base,
            setup.folder.merged,
            source=setup.folder.identity,
            processes=processes,
            files=merged_chat_files(setup.base, chat_files),
        )
        traits = setup.method.traits
        if traits.trains_base:
            job.replace_weights(trained_weights(checkpoint))
            return
        quantized_base = None
        if traits.quantizes_base:  # the adapter was trained on the 4-bit weights
            trust_code = setup.recipe.model.trust_remote_code
            quantized_base = Nf4Base(job.tensors, setup.dtype, trust_code, setup.world.device)
        adapter = MergeableAdapter.open(setup.folder.adapter, job.tensors)
        job.merge_adapters([adapter_input(adapter, quantized_base=quantized_base)])

    merge_on_ranks(setup.world, setup.base, setup.folder.merge_locks, merge)


def merge_on_ranks(world: World, base: Path, lock_file: Path, merge: Callable[[int], None]) -> None:
    """Call `merge` on every rank that can share the work; return when all shards are written.

    A rank takes no part if its files of the base have other modification times, as in another
    node's own cache, or if it does not see the first rank's locks, as on a file system whose locks
    are local to a node.

    Args:
        lock_file: in a folder that all ranks write to.
        merge: takes the number of shards that this rank may rewrite at once.
    """
    locks = ShardLocks(lock_file)
    try:
        if world.is_first:
            locks.acquire(0)
        local_state = _file_state(base)
        is_same = world.broadcast_text(local_state) == local_state
        if world.is_first or (is_same and not locks.acquire(0)):
            merge(max(default_processes() // world.local_size, 1))
        world.barrier()
    finally:
        locks.close()
    if world.is_first:
        lock_file.unlink(missing_ok=True)


def _file_state(base: Path) -> str:
    files = [(path.name, path.stat()) for path in weight_files(base)]
    return fingerprint([(name, stat.st_size, stat.st_mtime_ns) for name, stat in files])
