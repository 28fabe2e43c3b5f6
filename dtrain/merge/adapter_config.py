"""What every setting of PEFT's LoRA config means for a merge.

A field that is not listed here, or is refused, must be empty: with it, PEFT would compute something
that a merge does not.
"""

from __future__ import annotations

import math
import re
from pathlib import Path
from typing import Any

from dtrain.core.errors import UserError
from dtrain.merge.weight_delta import LayerDelta

PEFT_TYPES = ("LORA", "ADALORA")
# The merge uses these.
USED = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "lora_bias", "bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying", "init_lora_weights", "init_r",
}  # fmt: skip
# These say where adapters were put (as the tensors' names do), or how they were trained or loaded;
# settings of an initialization matter only with an initialization that is refused.
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size",
    "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip
# With these, PEFT computes differently or changes the base itself.
REFUSED = {
    "megatron_config": "its layers are sharded by Megatron",
    "use_qalora": "its layers take the mean of groups of inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "alora_invocation_tokens": "it applies only after an invocation; merged, it would always apply",
    "arrow_config": "it routes between several adapters",
    "kasa_config": "it removes a component from the base",
    "monteclora_config": "it samples its weights",
    "velora_config": "its adapters have a third matrix, for the backward pass",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it changes parameters that are not in a layer, such as experts",
}
# Initializations that leave the base unchanged; with others PEFT changes the base at loading.
INITIALIZATIONS = (True, False, None, "gaussian", "eva", "orthogonal")


def check_config(config: Any, path: Path) -> None:
    """Check that a merge with this config computes what PEFT computes.

    Raises:
        UserError: not the config of a LoRA adapter, or it has a setting that cannot be merged.
    """
    if not isinstance(config, dict) or config.get("peft_type") not in PEFT_TYPES:
        fix = "give the folder of an adapter that PEFT saved, with peft_type LORA or ADALORA"
        raise UserError("is not the config of a LoRA adapter", where=str(path), fix=fix)
    for name, value in config.items():
        if name not in USED and name not in WITHOUT_EFFECT and value:
            reason = REFUSED.get(name, f"this version of dtrain does not know {name}")
            message = f"an adapter with {name} cannot be merged: {reason}"
            raise UserError(message, where=str(path), fix="serve base and adapter unmerged")
    initialization = config.get("init_lora_weights")
    if initialization not in INITIALIZATIONS:
        raise UserError(
            f"init_lora_weights {initialization!r} removes a component from the base",
            where=str(path),
            fix="save_pretrained(…, path_initial_model_for_weight_conversion=…) makes a plain LoRA",
        )
    rank_key = "init_r" if config["peft_type"] == "ADALORA" else "r"
    required = (rank_key, "lora_alpha")
    if missing := [key for key in required if not isinstance(config.get(key), int | float)]:
        fix = "save the adapter again with PEFT's save_pretrained"
        raise UserError(f"no {missing[0]} in it", where=str(path), fix=fix)


def layer_from_config(
    config: dict[str, Any], module: str, keys: dict[str, str], rank: int
) -> LayerDelta:
    """Return a layer with rank and scale as PEFT finds them: by pattern, else the adapter's own."""
    if config["peft_type"] == "ADALORA":
        alpha = config["lora_alpha"]
        return LayerDelta(keys, None, alpha if alpha > 0 else float(rank), config["init_r"])
    r = _match_pattern(config.get("rank_pattern"), module, config["r"])
    alpha = _match_pattern(config.get("alpha_pattern"), module, config["lora_alpha"])
    return LayerDelta(keys, r, alpha / (math.sqrt(r) if config.get("use_rslora") else r))


def _match_pattern(patterns: dict[str, Any] | None, module: str, default: Any) -> Any:
    """Return the value of the first pattern that matches, as peft's get_pattern_key chooses it."""
    for pattern, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            return value
    return default
