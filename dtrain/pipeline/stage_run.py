"""One stage from its base to its adapter and merged model."""

from __future__ import annotations

import gc
import shutil
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel

from dtrain.checkpoints.reader import Checkpoint
from dtrain.config.checks import accumulation
from dtrain.config.engines import ENGINES
from dtrain.config.schema import Recipe, Stage
from dtrain.core.cache_paths import cache_folder
from dtrain.core.log import say, warn
from dtrain.core.units import count, duration, size
from dtrain.data.loader import Loader
from dtrain.data.prepare import PackedDataset
from dtrain.distributed.hang_watchdog import Watch
from dtrain.distributed.memory import peak_memory_bytes, reset_peak_memory
from dtrain.distributed.world import World
from dtrain.engines.base import Engine, MaterializeFn
from dtrain.engines.build import build_engine
from dtrain.merge.adapter import MergeableAdapter
from dtrain.merge.chat_files import adapter_chat_files, merged_chat_files
from dtrain.merge.from_checkpoint import read_parameter, trained_weights
from dtrain.merge.merge import MergeJob, check_mergeable
from dtrain.merge.merge_inputs import adapter_input
from dtrain.merge.nf4 import Nf4Base
from dtrain.methods.base import Method, build_method
from dtrain.models.kernels import compiled
from dtrain.models.kernels.patch import apply_kernels
from dtrain.models.kernels.warm_up import compile_ahead
from dtrain.models.load import load_base, resolve_dtype
from dtrain.models.sharded_loading import stream_base
from dtrain.models.tensor_utils import parameter_counts
from dtrain.objectives.base import Objective, StageContext, build_objective
from dtrain.pipeline.auto_settings import remember
from dtrain.pipeline.distributed_merge import merge_together
from dtrain.pipeline.evaluator import Evaluations
from dtrain.pipeline.stage_inputs import Inputs
from dtrain.pipeline.stage_record import StageRecord
from dtrain.training.callbacks import (
    Callback,
    HangWatchdogCallback,
    NonFiniteStop,
    ProgressBar,
)
from dtrain.training.checkpointer import Checkpointer
from dtrain.training.held_out import HeldOutEvaluator
from dtrain.training.lr_schedule import total_sequences
from dtrain.training.preemption import StopFlag
from dtrain.training.progress import StageProgress
from dtrain.training.trackers import TrackerContext, build_trackers
from dtrain.training.trainer import Trainer

ROWS_TO_MEASURE = 4096


@dataclass
class StageRun:
    """What a stage is run with.

    Attributes:
        base: folder of the model that the stage starts from.
    """

    recipe: Recipe
    stage: Stage
    folder: StageRecord
    base: Path
    inputs: Inputs
    evaluations: Evaluations
    world: World
    stop: StopFlag
    watch: Watch
    counts: tuple[int, int] = (0, 0)  # parameters that train, and all
    load_peak: int = 0  # bytes, while base and engine were built
    speed: float = 0.0  # tokens a second of this start; 0 if it made no step

    @cached_property
    def method(self) -> Method[Any]:
        """The stage's method."""
        return build_method(self.stage.method)

    def run(self) -> bool:
        """Train, save the adapter, merge; return False if it was stopped to go on later."""
        trained = self.train()
        # Every rank's share of the last checkpoint is on disk: a launcher kills those that are
        # not through half a minute after the first has ended.
        self.world.barrier()
        if trained is None:
            return False
        model, facts = trained
        checkpoint = self.checkpointer.open_final(facts["steps"])
        if self.world.is_first:
            self.write_adapter(model, checkpoint)
        del trained, model
        free_memory()
        self.world.barrier()
        if self.recipe.merges(self.stage):
            merge_together(
                self.world,
                self.base,
                self.folder.merge_locks,
                lambda at: self.merge(checkpoint, at),
            )
        if self.world.is_first:
            self.finish(facts, checkpoint)
        self.world.barrier()
        return True

    def train(self) -> tuple[torch.nn.Module, dict[str, Any]] | None:
        """Train to the end; return the model and facts for the record, None if interrupted."""
        reset_peak_memory(self.world.device)
        checkpoint = self.checkpointer.find_resumable(self.folder.allowed_changes())
        engine = self.build(checkpoint)
        free_memory()
        self.load_peak = peak_memory_bytes(self.world.device)
        reset_peak_memory(self.world.device)  # what the steps need is compared with the plan
        trainer = self.trainer(engine, checkpoint)
        untrained = trainer.progress.step == 0 and self.base == self.inputs.base
        if untrained and self.evaluations.wants_base():
            self.evaluations.record_base(engine, self.base)
        finished = trainer.fit()
        self.speed = trainer.tokens_per_second
        if not finished:
            return None
        self.evaluations.record(self.stage.name, engine, self.base)
        facts = self.facts(trainer.progress)
        engine.close()
        return engine.module, facts

    def build(self, checkpoint: Checkpoint | None) -> Engine:
        """Base, adapter, engine; with the state of `checkpoint` where there is one."""
        method, world = self.method, self.world
        dtype = resolve_dtype(self.recipe.model.dtype, world.device)
        base, fill = self.open_base(dtype)
        model = method.attach(base, seed=self.recipe.seed, device=world.device)
        self.check_merge(model)

        def materialize(block: torch.nn.Module) -> None:
            fill(block)
            method.on_weights_loaded(block)

        if not ENGINES[self.recipe.engine.kind].shards_base:
            materialize(model)
        self.counts = trainable, total = parameter_counts(model)
        say(
            f"stage {self.stage.name}: {self.stage.kind}, {self.stage.method.kind}, "
            f"{count(trainable)} of {count(total)} parameters train ({trainable / total:.2%}), "
            f"{self.recipe.engine.kind} on {world.size} x {world.device.type}, {dtype}"
        )
        compiled.switch(on=self.recipe.determinism != "strict")
        say(f"kernels: {apply_kernels(model, self.recipe.model)}")
        if self.recipe.model.kernels != "off":
            compile_ahead(world.device, dtype, trains_base=method.traits.trains_base)
        if checkpoint is not None:
            load_trainable(model, checkpoint)
        engine = build_engine(model, self.recipe, self.stage, world, materialize)
        if checkpoint is not None:
            checkpoint.restore(engine.parameter_shards())
            engine.on_state_loaded(checkpoint.state["updates"])
        return engine

    def open_base(self, dtype: torch.dtype) -> tuple[PreTrainedModel, MaterializeFn]:
        """The base without storage, and what fills it, block by block for an engine that shards."""
        method = self.method
        settings: dict[str, Any] = {
            "quantised": method.traits.quantizes_base,
            "dtype": method.base_dtype(dtype),
            "device": self.world.device,
        }
        streamed = stream_base(self.base, self.recipe.model, **settings)
        if not streamed.converted:
            return streamed.model, streamed.fill
        self.check_merge(method.attach(streamed.model, seed=0))  # before the load
        if ENGINES[self.recipe.engine.kind].shards_base:
            warn(
                f"{self.base}: {len(streamed.converted)} tensors are stored in another form "
                f"({streamed.converted[0]}, …): every rank loads the whole base before it is "
                "sharded"
            )
        return load_base(self.base, self.recipe.model, **settings), lambda block: None

    def check_merge(self, model: torch.nn.Module) -> None:
        """Refuse now what the merge after the training could not write."""
        if self.recipe.merges(self.stage):
            check_mergeable(self.base, self.method.changed_tensors(model))

    @cached_property
    def checkpointer(self) -> Checkpointer:
        """The stage's checkpoints; made once, by all ranks together."""
        return Checkpointer(
            self.folder.checkpoints,
            self.world,
            inputs=self.folder.inputs,
            dtype=self.dtype_name(),
            every_steps=self.stage.train.checkpoint_every_steps,
            output=self.recipe.output,
        )

    def trainer(self, engine: Engine, checkpoint: Checkpoint | None) -> Trainer:
        """A trainer at the checkpoint's step, or at the start."""
        state = checkpoint.state["progress"] if checkpoint else {}
        progress, loader = StageProgress(**state), self.loader()
        return Trainer(
            engine=engine,
            objective=self.objective(engine, loader),
            loader=loader,
            checkpointer=self.checkpointer,
            evaluator=self.evaluator(engine),
            stop=self.stop,
            callbacks=self.callbacks(progress),
            progress=progress,
            seed=self.recipe.seed,
        )

    def loader(self) -> Loader:
        """The stage's training batches."""
        train, dataset = self.stage.train, self.inputs.stages[self.stage.name]
        accumulation(train.global_batch_size, self.world.size, train.micro_batch)
        loader = Loader(
            dataset,
            seed=self.recipe.seed,
            global_batch=train.global_batch_size,
            total_sequences=total_sequences(
                train, dataset.sequences_in_epochs, tokens_per_row(dataset)
            ),
            alone=not self.inputs.layout.packed,
        )
        say(f"{dataset.describe()}; {loader.steps} steps of {train.global_batch_size} sequences")
        return loader

    def objective(self, engine: Engine, loader: Loader) -> Objective:
        """What the stage minimizes, with all it needs besides batches."""
        objective = build_objective(self.stage)
        cache = cache_folder() / "objectives"
        objective.begin_stage(StageContext(self.base, cache, engine.model, loader, self.world))
        return objective

    def evaluator(self, engine: Engine) -> HeldOutEvaluator:
        """Evaluation during the stage, if the recipe asks for it."""
        train = self.stage.train
        evaluates = train.evaluate_every_steps is not None
        sets = self.evaluations.held_out_sets(engine, self.base) if evaluates else {}
        for note in (
            note for held_out in sets.values() for note in held_out.loader.dataset.notes()
        ):
            say(f"evaluation: {note}")
        return HeldOutEvaluator(sets, train)

    def callbacks(self, progress: StageProgress) -> list[Callback]:
        """Callbacks of this rank."""
        stage = self.stage
        callbacks: list[Callback] = [
            HangWatchdogCallback(self.watch),
            NonFiniteStop(stage.name, stage.train.max_non_finite_steps),
        ]
        if self.world.is_first:
            callbacks += build_trackers(
                TrackerContext(self.recipe, stage, self.folder, progress.step)
            )
        return [*callbacks, ProgressBar(f"stage {stage.name}")]

    def dtype_name(self) -> str:
        """What the base is held in here, where the recipe may say `auto`."""
        return str(resolve_dtype(self.recipe.model.dtype, self.world.device)).split(".")[-1]

    def facts(self, progress: StageProgress) -> dict[str, Any]:
        """Facts of the finished stage, for its record."""
        trainable, total = self.counts
        return {
            "engine": self.recipe.engine.kind,
            "ranks": self.world.size,
            "dtype": self.dtype_name(),
            "steps": progress.step,
            "non_finite_steps": progress.non_finite,
            "tokens": progress.tokens,
            "supervised_tokens": progress.supervised_tokens,
            "seconds": round(progress.seconds, 1),
            "tokens_per_second": round(progress.tokens / max(progress.seconds, 1e-9), 1),
            "trainable_parameters": trainable,
            "total_parameters": total,
            "load_peak_memory_bytes": self.load_peak,
            "peak_memory_bytes": peak_memory_bytes(self.world.device),
        }

    def write_adapter(self, model: torch.nn.Module, checkpoint: Checkpoint) -> None:
        """The adapter; what is there may be of fewer steps, or damaged, and is made again."""
        if self.method.traits.adds_adapter:
            tensors = {n: read_parameter(checkpoint, n) for n in checkpoint.names}
            files = adapter_chat_files(self.stage, self.base, self.inputs.tokenizer)
            self.method.save(self.folder.adapter, model, tensors, base=str(self.base), files=files)
        if self.recipe.merges(self.stage):
            shutil.rmtree(self.folder.merged, ignore_errors=True)

    def merge(self, checkpoint: Checkpoint, processes: int) -> None:
        """Write the merged model; into the 4-bit base if the adapter was trained on that."""
        chat_files = adapter_chat_files(self.stage, self.base, self.inputs.tokenizer)
        job = MergeJob(
            self.base,
            self.folder.merged,
            source=self.folder.identity,
            processes=processes,
            files=merged_chat_files(self.base, chat_files),
        )
        traits = self.method.traits
        if traits.trains_base:
            job.replace_weights(trained_weights(checkpoint))
            return
        quantized_base = None
        if traits.quantizes_base:
            dtype = resolve_dtype(self.recipe.model.dtype, self.world.device)
            trusts = self.recipe.model.trust_remote_code
            quantized_base = Nf4Base(job.tensors, dtype, trusts, self.world.device)
        adapter = MergeableAdapter.open(self.folder.adapter, job.tensors)
        job.merge_adapters([adapter_input(adapter, quantized_base=quantized_base)])

    def finish(self, facts: dict[str, Any], checkpoint: Checkpoint) -> None:
        """The stage is complete."""
        facts["checkpoint_bytes"] = checkpoint.size_bytes
        if self.speed:
            measured = facts | {"tokens_per_second": self.speed}
            remember(self.recipe, self.stage, self.base, measured, self.world)
        self.folder.finish(facts)
        say(
            f"stage {self.stage.name}: {facts['steps']} steps in {duration(facts['seconds'])}, "
            f"{facts['tokens_per_second']:.0f} tokens/s, peak {size(facts['peak_memory_bytes'])} "
            f"a rank, checkpoint {size(checkpoint.size_bytes)}"
        )


@torch.no_grad()
def load_trainable(model: torch.nn.Module, checkpoint: Checkpoint) -> None:
    """Put a checkpoint's weights into the model before an engine takes it.

    DeepSpeed makes its own copies of what it finds at the start, and would go on with those.
    """
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and not parameter.is_meta and name in checkpoint.names:
            parameter.copy_(read_parameter(checkpoint, name))


def tokens_per_row(dataset: PackedDataset) -> float:
    """Mean number of tokens in a row, from the first ones of the stream."""
    rows = dataset.sequence_ids_at(0, min(dataset.sequences_per_epoch, ROWS_TO_MEASURE), seed=0)
    return float(dataset.tokens(rows).mean())


def free_memory() -> None:
    """Give a released model's memory back before the next stage loads its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
