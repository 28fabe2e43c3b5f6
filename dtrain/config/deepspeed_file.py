"""A DeepSpeed JSON file: where it is, what it may set, and what the recipe decides."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from dtrain.config.engines import ENGINES
from dtrain.core.errors import UserError, UserErrors
from dtrain.core.files import read_text, unique_keys

# setting in the file → key of the recipe that decides it
DECIDED_BY_RECIPE = {
    "train_batch_size": "train.global_batch_size",
    "train_micro_batch_size_per_gpu": "train.micro_batch_size",
    "gradient_accumulation_steps": "train.global_batch_size",
    "gradient_clipping": "train.max_grad_norm",
    "bf16.enabled": "model.dtype",
    "fp16.enabled": "model.dtype",
    "optimizer": "train.optimizer",
    "scheduler": "train.lr_scheduler",
    "activation_checkpointing": "model.gradient_checkpointing",
}
# Groups with which DeepSpeed writes files, or calls a service, of its own.
MONITORS = ("tensorboard", "csv_monitor", "wandb", "comet", "nebula", "autotuning")
_PATH_ENDINGS = ("_path", "_file", "_dir")
PREFETCH = "stage3_prefetch_bucket_size"
MAX_PREFETCHED = 50_000_000  # elements, DeepSpeed's default
_OFFLOADS = ("offload_param", "offload_optimizer")


def prefetch_elements(hidden: int) -> int:
    """ZeRO-3's prefetch bucket where the file says "auto", in elements.

    0.9 h² for hidden size h, as in Hugging Face's Accelerate, and at most DeepSpeed's default of
    50M: a bucket of many layers needs memory at each gather and saves no time.
    """
    return min(MAX_PREFETCHED, hidden * hidden * 9 // 10)


def read(path: Path, kind: str, offload: bool) -> dict[str, Any]:
    """Read a DeepSpeed file and check it against `engine.kind` and `engine.offload`.

    Raises:
        UserError: it cannot be read or is not a JSON object.
        UserErrors: it sets what the recipe decides, or is for another engine.
    """
    config = _parse(path)
    faults = [*_decided_by_recipe(config, path), *_zero(config, path, kind, offload)]
    faults += _writes_elsewhere(config, path)
    if faults:
        raise UserErrors(faults)
    return config


def _parse(path: Path) -> dict[str, Any]:
    try:
        config = json.loads(read_text(path), object_pairs_hook=unique_keys)
    except json.JSONDecodeError as error:
        message = f"is not valid JSON: {error.msg}"
        raise UserError(message, where=f"{path}:{error.lineno}") from error
    except (ValueError, RecursionError) as error:
        raise UserError(f"is not valid JSON: {error}", where=str(path)) from error
    if not isinstance(config, dict):
        raise UserError("is not a JSON object", where=str(path))
    return config


def _decided_by_recipe(config: dict[str, Any], path: Path) -> Iterator[UserError]:
    for setting, key in DECIDED_BY_RECIPE.items():
        group, _, name = setting.rpartition(".")
        holder = config.get(group, {}) if group else config
        if not isinstance(holder, dict):
            yield UserError(f"{group} is not a JSON object", where=str(path))
        elif holder.get(name, "auto") != "auto":
            message = f"{setting} is {json.dumps(holder[name])}, but the recipe's {key} decides it"
            yield UserError(message, where=str(path), fix='set it to "auto", or remove it')


def _writes_elsewhere(config: dict[str, Any], path: Path) -> Iterator[UserError]:
    """What DeepSpeed would write by itself; offloading to a disk is asked for in another group."""
    for key, group in config.items():
        if not isinstance(group, dict) or not group.get("enabled", False):
            continue
        path_key = next(_path_keys(group, key), "")
        if key in MONITORS or path_key:
            message = f"{path_key or key} writes outside the run folder"
            fix = "remove it; metrics.jsonl has the metrics, and monitoring.report_to sends them"
            yield UserError(message, where=str(path), fix=fix)


def _path_keys(group: dict[str, Any], name: str) -> Iterator[str]:
    """Names of the settings of a group, and of the groups in it, that are paths."""
    for key, value in group.items():
        if isinstance(value, dict):
            yield from _path_keys(value, f"{name}.{key}")
        elif key.endswith(_PATH_ENDINGS) and value:
            yield f"{name}.{key}"


def _zero(config: dict[str, Any], path: Path, kind: str, offload: bool) -> Iterator[UserError]:
    zero = config.get("zero_optimization")
    if not isinstance(zero, dict):
        yield UserError("has no zero_optimization group", where=str(path))
        return
    stage = zero.get("stage")
    if stage != ENGINES[kind].zero_stage:
        message = f"zero_optimization.stage is {json.dumps(stage)}, but engine.kind is {kind}"
        yield UserError(message, where=str(path), fix=f"set it to {ENGINES[kind].zero_stage}")
    offloaded = [name for name in _OFFLOADS if _device(zero.get(name)) != "none"]
    if offloaded and not offload:
        message = f"zero_optimization.{offloaded[0]} is set, but engine.offload is false"
        yield UserError(message, where=str(path), fix="engine.offload=true, or remove it")
    elif offload and not offloaded:
        message = "zero_optimization has no offload_param, but engine.offload is true"
        yield UserError(message, where=str(path), fix="engine.offload=false, or add the group")


def _device(group: Any) -> str:
    return str(group.get("device", "none")) if isinstance(group, dict) else "none"


def read_stage(path: Path) -> str:
    """The ZeRO stage in a DeepSpeed file, as text; empty if it has none.

    Raises:
        UserError: it cannot be read or is not a JSON object.
    """
    zero = _parse(path).get("zero_optimization")
    return str(zero.get("stage", "")) if isinstance(zero, dict) else ""


_PACKAGE = Path(__file__).parent.parent
_PLACES = (_PACKAGE / "ds_configs", _PACKAGE.parent / "ds_configs")  # a wheel's; a checkout's


def load_ds_config(path: Path | None, kind: str, offload: bool) -> dict[str, Any]:
    """Read and check a DeepSpeed file; every "auto" is left for the engine to fill.

    Args:
        path: the recipe's `engine.config`, or None for the file that comes with dtrain.
        kind: zero2 or zero3.
        offload: the recipe's `engine.offload`.

    Raises:
        UserError: it cannot be read, or says something else than the recipe.
    """
    return read(path or shipped_ds_config(kind, offload), kind, offload)


def shipped_ds_config(kind: str, offload: bool) -> Path:
    """The file in ds_configs/ for an engine."""
    name = f"{kind}_offload.json" if offload else f"{kind}.json"
    for folder in _PLACES:
        if (folder / name).is_file():
            return folder / name
    raise UserError(f"{name} is missing", where=str(_PLACES[0]), fix="install dtrain again")
