"""Batch, length, learning rate, optimizer and intervals, which the tools hand to one Trainer."""

from __future__ import annotations

from dataclasses import dataclass
from math import lcm
from typing import Any

from dtrain.config.engines import engines_with
from dtrain.config.optimizers import OPTIMIZERS
from dtrain.importing.foreign_config import ForeignConfig

TRAIN = "stages[].train."
MICRO_BATCH = ("per_device_train_batch_size", "micro_batch_size", "per_gpu_train_batch_size")
STEPS_UNKNOWN = "the number of steps follows from the data"

# The tools' names; what is not exact has a reason.
SCHEDULERS: dict[str, tuple[str, str]] = {
    "cosine": ("cosine", ""),
    "cosine_with_min_lr": ("cosine", ""),
    "linear": ("linear", ""),
    "constant": ("constant", ""),
    "constant_with_warmup": ("constant", ""),
    "warmup_stable_decay": ("warmup_stable_decay", ""),
    "cosine_with_restarts": ("cosine", "without restarts"),
    "polynomial": ("linear", "a polynomial of degree 1"),
    "one_cycle": ("cosine", "one cosine after the warm-up"),
}
EXACT_OPTIMIZERS = {
    **dict.fromkeys(
        ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw_apex_fused", "adamw"), "adamw"
    ),
    **dict.fromkeys(("adamw_bnb_8bit", "adamw_8bit", "ao_adamw_8bit"), "adamw_8bit"),
    "paged_adamw_8bit": "paged_adamw_8bit",
    **dict.fromkeys(("lion_32bit", "lion"), "lion"),
    "lion_8bit": "lion_8bit",
    "adafactor": "adafactor",
    "muon": "muon",
    "schedule_free_adamw": "schedule_free",
}
SIMILAR_OPTIMIZERS = {
    "paged_adamw_32bit": ("adamw", "the same steps; its state is not paged to the host"),
    "paged_adamw": ("adamw", "the same steps; its state is not paged to the host"),
    "paged_lion_8bit": ("lion_8bit", "the same steps; its state is not paged to the host"),
    "paged_lion_32bit": ("lion", "the same steps; its state is not paged to the host"),
}


@dataclass(frozen=True)
class TrainerDefaults:
    """What the tool uses for keys that its file leaves out, where dtrain's default is another."""

    micro_batch_size: int = 8
    learning_rate: float = 5e-5
    lr_scheduler: str = "linear"
    warmup_ratio: float = 0.0
    weight_decay: float = 0.0
    epochs: float = 3.0
    save_steps: int | None = 500


def training(config: ForeignConfig, defaults: TrainerDefaults, processes: int) -> None:
    """Set the stage's group `train`."""
    _batch(config, defaults, processes)
    _length(config, defaults)
    _learning_rate(config, defaults)
    _optimizer(config)
    config.copy("seed")
    config.copy("label_smoothing_factor")
    config.copy("neftune_noise_alpha")
    if (clip := config.number("max_grad_norm")) is not None and clip > 0:
        config.put(TRAIN + "max_grad_norm", clip, "max_grad_norm")
    elif clip == 0:
        config.leave("max_grad_norm", why="gradients are always clipped, here at the default of 1")


def intervals(config: ForeignConfig, defaults: TrainerDefaults) -> None:
    """Set when checkpoints are saved and held-out sets evaluated; the sets are there already."""
    _checkpoints(config, defaults)
    _evaluations(config)
    train = config.stage["train"]
    both = [train.get("evaluate_every_steps"), train.get("checkpoint_every_steps")]
    steps = train.get("steps")
    if config.get("load_best_model_at_end"):
        if all(both) and (steps is None or lcm(*both) < steps):
            config.put("output.use", "best", "load_best_model_at_end")
        else:
            why = "no step before the last is both evaluated and saved; see output.use"
            config.leave("load_best_model_at_end", why=why)
    patience = ("early_stopping_patience", "early_stopping_steps")
    if both[0]:
        config.copy(*patience, path=TRAIN + "early_stopping_patience")
    else:
        config.leave(*patience, why="nothing is evaluated during training")


def _batch(config: ForeignConfig, defaults: TrainerDefaults, processes: int) -> None:
    micro = int(config.number(*MICRO_BATCH) or defaults.micro_batch_size)
    accumulation = config.number("gradient_accumulation_steps")
    keys = ["gradient_accumulation_steps"]
    if accumulation is None and (total := config.number("batch_size")):
        accumulation, keys = max(1, int(total) // micro), ["batch_size"]
    accumulated = int(accumulation or 1)
    ranks = "1 process" if processes == 1 else f"{processes} processes"
    why = f"{micro} at once x {accumulated} accumulated x {ranks}"
    config.put(TRAIN + "global_batch_size", micro * accumulated * processes, *keys, why=why)
    config.put(TRAIN + "micro_batch_size", micro, *MICRO_BATCH)
    config.put("launch.processes", processes, why="these files do not say; --processes N")


def _length(config: ForeignConfig, defaults: TrainerDefaults) -> None:
    epochs = ("num_train_epochs", "num_epochs")
    steps = config.number("max_steps")
    if steps is not None and steps > 0:
        config.put(TRAIN + "steps", int(steps), "max_steps")
        config.leave(*epochs, why="max_steps decides the length")
    else:
        config.put(TRAIN + "epochs", config.number(*epochs) or defaults.epochs, *epochs)
        config.leave("max_steps", why="the epochs decide the length")


def _learning_rate(config: ForeignConfig, defaults: TrainerDefaults) -> None:
    rate = float(config.number("learning_rate") or defaults.learning_rate)
    config.put(TRAIN + "learning_rate", rate, "learning_rate")
    name = str(config.get("lr_scheduler_type", "lr_scheduler") or defaults.lr_scheduler)
    kind, why = SCHEDULERS.get(name, ("cosine", f"dtrain has no {name}"))
    is_free = config.get("optim", "optimizer") == "schedule_free_adamw"
    if is_free:
        kind, why = "constant", "schedule_free averages the weights instead"
    keys = ("lr_scheduler_type", "lr_scheduler")
    config.put(TRAIN + "lr_scheduler", kind, *keys, why=why, changed=bool(why) and not is_free)
    _warmup(config, defaults, name)
    _minimum(config, rate, kind)
    _scales(config, rate)
    config.put(
        TRAIN + "weight_decay",
        config.number("weight_decay") or defaults.weight_decay,
        "weight_decay",
    )


def _warmup(config: ForeignConfig, defaults: TrainerDefaults, scheduler: str) -> None:
    path, steps = TRAIN + "warmup_ratio", config.stage["train"].get("steps")
    given = config.number("warmup_steps")
    if scheduler == "constant":
        config.put(path, 0.0, why="`constant` has no warm-up")
        config.leave("warmup_steps", "warmup_ratio", why="`constant` has no warm-up")
    elif given and given < 1:
        config.put(path, given, "warmup_steps")
    elif given and steps:
        share = round(min(1.0, given / steps), 6)
        config.put(path, share, "warmup_steps", why=f"of {steps} steps")
    elif given:
        why = f"{STEPS_UNKNOWN}: set it to {given:g} / steps"
        config.put(path, 0.03, "warmup_steps", why=why, changed=True)
    else:
        ratio = config.number("warmup_ratio")
        config.put(path, defaults.warmup_ratio if ratio is None else ratio, "warmup_ratio")
    config.leave("warmup_steps", "warmup_ratio", why="the other key decides the warm-up")


def _minimum(config: ForeignConfig, rate: float, kind: str) -> None:
    extra = config.group("lr_scheduler_kwargs", config.mapping("lr_scheduler_kwargs"))
    ratio = config.number("cosine_min_lr_ratio")
    key = "cosine_min_lr_ratio" if ratio is not None else "lr_scheduler_kwargs"
    if ratio is None:
        ratio, lowest = extra.number("min_lr_rate"), extra.number("min_lr")
        ratio = lowest / rate if ratio is None and lowest is not None else ratio
    if ratio is not None and kind != "constant":
        config.put(TRAIN + "min_lr_ratio", round(ratio, 6), key)


def _scales(config: ForeignConfig, rate: float) -> None:
    """Learning rates of some parameters, as factors of the common one."""
    path, scales = TRAIN + "learning_rate_scales", dict[str, float]()
    embedding = config.number("embedding_lr_scale")
    if embedding is None and (own := config.number("embedding_lr")):
        embedding = own / rate
    if embedding:
        scales["embed_tokens"] = round(embedding, 6)
    for group in config.groups("lr_groups"):
        own = group.number("lr") or rate
        scales |= {module: round(own / rate, 6) for module in group.names("modules")}
    method = config.stage.get("method", {})
    if scales and method.get("kind") != "full" and not method.get("modules_to_save"):
        why = "an adapter trains on linear layers only"
        config.leave("embedding_lr_scale", "embedding_lr", "lr_groups", why=why)
    elif scales:
        keys = ("embedding_lr_scale", "embedding_lr", "lr_groups")
        config.put(path, scales, *keys, why="factors of learning_rate")


def _optimizer(config: ForeignConfig) -> None:
    name = str(config.get("optim", "optimizer") or "adamw_torch")
    kind, why = SIMILAR_OPTIMIZERS.get(name, ("", ""))
    kind = kind or EXACT_OPTIMIZERS.get(name, "")
    changed = not kind
    if not kind:
        kind, why = "adamw", f"dtrain has no {name}"
    engine = config.recipe.get("engine", {}).get("kind", "auto")
    method = config.stage.get("method", {}).get("kind")
    able = engines_with("whole_parameters")
    if OPTIMIZERS[kind].whole_parameters and engine not in ("auto", *able):
        kind, why, changed = "adamw", f"{engine} shards what {kind} needs whole", True
    elif not OPTIMIZERS[kind].trains_adapters and method != "full":
        kind, why, changed = "adamw", f"{kind} needs whole weight matrices", True
    config.put(TRAIN + "optimizer", kind, "optim", "optimizer", why=why, changed=changed)


def _checkpoints(config: ForeignConfig, defaults: TrainerDefaults) -> None:
    keys, limit = ("save_steps", "save_strategy", "saves_per_epoch"), "save_total_limit"
    if (kept := config.number(limit)) and kept >= 1:
        config.put("output.keep_checkpoints", int(kept), limit)
    strategy = str(config.get("save_strategy") or "steps")
    every = config.number("save_steps") or defaults.save_steps
    if strategy == "steps" and not config.name("saves_per_epoch") and every:
        _every(config, "checkpoint_every_steps", every, "save_steps", "save_strategy")
    config.leave(*keys, why=f"{STEPS_UNKNOWN}; the last step is always saved")


def _evaluations(config: ForeignConfig) -> None:
    keys = ("eval_steps", "eval_strategy", "evaluation_strategy", "evals_per_epoch", "do_eval")
    if not config.recipe.get("evaluation", {}).get("sets"):
        config.leave(*keys, why="there is no held-out set; see evaluation.sets")
        return
    strategy = str(config.get("eval_strategy", "evaluation_strategy") or "")
    every = config.number("eval_steps")
    if every is not None and strategy not in ("no", "epoch", "False"):
        _every(config, "evaluate_every_steps", every, "eval_steps", *keys[1:3])
    config.leave(*keys, why=f"{STEPS_UNKNOWN}; the sets are evaluated after the stage")


def _every(config: ForeignConfig, name: str, every: float, *keys: str) -> None:
    """Set an interval in steps; below 1 it is a share of all steps."""
    steps: Any = config.stage["train"].get("steps")
    if every < 1 and not steps:
        return
    interval = max(1, round(every * steps)) if every < 1 else int(every)
    config.put(TRAIN + name, interval, keys[0])
    config.leave(*keys[1:], why=f"{name} says it")
