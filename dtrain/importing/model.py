"""The base model, how it computes, and the engine."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.files import read_json
from dtrain.importing.foreign_config import ForeignConfig

BASE = ("base_model", "model_name_or_path")
ATTENTION = (
    *("attn_implementation", "flash_attn", "flash_attention", "use_flash_attn"),
    *("sdp_attention", "eager_attention", "xformers_attention"),
)
FLASH = ("fa2", "fa3", "flash_attention_2", "flash_attention_3", "auto")
FILE_SETTINGS = "dtrain's own file in ds_configs/; engine.config names another"


def model(config: ForeignConfig, *, checkpointing: bool) -> None:
    """Set the recipe's group `model`.

    Args:
        checkpointing: the tool recomputes activations if its file does not say.

    Raises:
        UserError: the file names no base model.
    """
    if not config.name(*BASE):
        raise UserError("names no base model", where=str(config.path), fix=f"set {BASE[1]}")
    config.put("model.base", config.get(*BASE), *BASE)
    _dtype(config)
    _attention(config)
    _checkpointing(config, checkpointing)
    if config.get("trust_remote_code"):
        config.copy("trust_remote_code")
    config.leave("trust_remote_code")
    _tokens(config)
    _engine(config)


def _tokens(config: ForeignConfig) -> None:
    plain, special = config.names("tokens", "add_tokens"), config.names("add_special_tokens")
    if not plain and not special:
        return
    why = "as plain added tokens, which decoding keeps" if special else ""
    keys = ("tokens", "add_tokens", "add_special_tokens")
    names = list(dict.fromkeys([*plain, *special]))
    config.put("model.tokens.add", names, *keys, why=why, changed=bool(special))


def _dtype(config: ForeignConfig) -> None:
    names = ("dtype", "torch_dtype")
    written = str(config.get(*names) or "").rpartition(".")[2]
    if config.get("bf16", "bfloat16", "pure_bf16") is True or written in ("bfloat16", "bf16"):
        config.put("model.dtype", "bfloat16", "bf16", "bfloat16", "pure_bf16", *names)
    elif config.get("fp16", "float16") is True or written in ("float16", "fp16"):
        why = "float16 is not supported; auto: bfloat16 on a GPU"
        config.put("model.dtype", "auto", "fp16", "float16", *names, why=why, changed=True)
    elif written in ("float32", "fp32"):
        config.put("model.dtype", "float32", *names)
    elif config.get("bf16", *names) == "auto":
        config.put("model.dtype", "auto", "bf16", *names)


def _attention(config: ForeignConfig) -> None:
    keys = [key for key in ATTENTION if config.get(key) is not None]
    if not keys:
        return
    key, value = keys[0], config.get(keys[0])
    if value is False and key != "flash_attn":
        config.leave(key)
    elif value is False or value == "disabled" or (key, value) == ("eager_attention", True):
        config.put("model.attention", "eager", key)
    elif value in ("eager", "sdpa"):
        config.put("model.attention", value, key)
    elif key == "sdp_attention":
        config.put("model.attention", "sdpa", key)
    else:
        is_flash = value in FLASH or (value is True and key != "xformers_attention")
        why = "flash attention on a GPU" if is_flash else f"dtrain has no {value}"
        config.put("model.attention", "auto", key, why=why, changed=not is_flash)
    config.leave(*ATTENTION)


def _checkpointing(config: ForeignConfig, default: bool) -> None:
    path = "model.gradient_checkpointing"
    if config.get("disable_gradient_checkpointing") is not None:
        off = bool(config.get("disable_gradient_checkpointing"))
        config.put(path, not off, "disable_gradient_checkpointing")
        return
    value = config.get("gradient_checkpointing")
    if isinstance(value, str):  # axolotl: offload, unsloth
        why = "activations are recomputed, not offloaded"
        config.put(path, True, "gradient_checkpointing", why=why, changed=True)
    else:
        config.put(path, default if value is None else bool(value), "gradient_checkpointing")


def _engine(config: ForeignConfig) -> None:
    launcher = str(config.get("accelerate_config") or "")  # of TRL's command: zero2, fsdp2, …
    if config.get("deepspeed"):
        _deepspeed(config, "deepspeed")
    elif "zero" in launcher:
        _deepspeed(config, "accelerate_config")
    elif "fsdp" in launcher:
        config.put("engine.kind", "fsdp2", "accelerate_config")
    elif config.get("fsdp") or config.get("fsdp_config") or config.number("dp_shard_size"):
        _fsdp(config)


def _deepspeed(config: ForeignConfig, key: str) -> None:
    stage, offloads = _zero(config, key)
    if stage not in ("0", "1", "2", "3"):
        config.leave(key, why="it is not here to read; set engine.kind to zero2 or zero3")
        return
    kind = "zero3" if stage == "3" else "zero2" if stage in ("1", "2") else "ddp"
    why = f"zero2 also shards the gradients; {FILE_SETTINGS}" if stage == "1" else FILE_SETTINGS
    config.put("engine.kind", kind, key, why=why)
    if offloads and kind == "zero3":
        config.put("engine.offload", True, key)
    elif offloads:
        why = f"{kind} does not offload"
        config.put("engine.offload", False, key, why=why, changed=True)


def _zero(config: ForeignConfig, key: str) -> tuple[str, bool]:
    """The ZeRO stage and whether it offloads, from the file, the group or the file's name."""
    value = config.get(key)
    content = value if isinstance(value, dict) else _json_beside(config, str(value))
    if content is not None:
        zero = content.get("zero_optimization")
        zero = zero if isinstance(zero, dict) else {}
        return str(zero.get("stage", 0)), any(
            isinstance(zero.get(name), dict) and zero[name].get("device", "none") != "none"
            for name in ("offload_param", "offload_optimizer")
        )
    name = Path(str(value)).name.lower()
    stage = re.search(r"z(?:ero)?[-_]?([0-3])", name)
    return stage.group(1) if stage else "", "offload" in name


def _json_beside(config: ForeignConfig, name: str) -> dict[str, Any] | None:
    """The content of a JSON file, in this folder or the config's; None if it is not there."""
    for path in (Path(name), config.path.parent / name):
        if path.is_file():
            content = read_json(path)
            return content if isinstance(content, dict) else None
    return None


def _fsdp(config: ForeignConfig) -> None:
    groups = ("fsdp", "fsdp_config", "fsdp_version", "dp_shard_size", "dp_replicate_size")
    keys = (config.name(*groups),)
    config.put("engine.kind", "fsdp2", *keys, why="torch's fully_shard of every layer")
    config.leave(*groups, why="fsdp2 wraps every layer by itself")
    words = f"{config.get('fsdp')} {config.get('fsdp_config')}".lower()
    if "hybrid" in words or (config.number("dp_replicate_size") or 1) > 1:
        config.put("engine.shard", "node", *keys, why="a copy per node")
    offloads = r"offload(_params|_parameters)?['\"]?: true|cpu_offload|\boffload\b(?!['\"_:])"
    if re.search(offloads, words):
        why = "fsdp2 does not offload; zero3 can: engine: {kind: zero3, offload: true}"
        config.put("engine.offload", False, *keys, why=why, changed=True)
