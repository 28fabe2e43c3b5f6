"""What each setting of a LoRA adapter means for a merge: a statement on every field of PEFT's.

A field that is not named here, or is refused, may have no value but an empty one: PEFT would
compute something that a merge does not.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

from dtrain.core.errors import UserError

KINDS = ("LORA", "ADALORA")
# The merge computes by these.
USED = {
    "peft_type", "r", "lora_alpha", "rank_pattern", "alpha_pattern", "use_rslora", "use_dora",
    "lora_bias", "bias", "fan_in_fan_out", "modules_to_save", "trainable_token_indices",
    "ensure_weight_tying", "init_lora_weights", "init_r",
}  # fmt: skip
# These say where adapters were put (the tensors' names say it too), how they were trained, or
# with what they were loaded; the settings of a first value count only where that is refused.
WITHOUT_EFFECT = {
    "task_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
    "inference_mode", "target_modules", "exclude_modules", "layers_to_transform", "layers_pattern",
    "lora_dropout", "runtime_config", "megatron_core", "qalora_group_size",
    "eva_config", "corda_config", "loftq_config", "lora_ga_config",
    "target_r", "tinit", "tfinal", "deltaT", "beta1", "beta2", "orth_reg_weight", "total_step",
}  # fmt: skip
# PEFT computes in another way under these, or changes the base itself.
REFUSED = {
    "megatron_config": "its layers are sharded by Megatron",
    "use_qalora": "its layers take the mean of groups of inputs",
    "use_bdlora": "its matrices are block-diagonal",
    "alora_invocation_tokens": "it counts from an invocation on, and a merged model has it always",
    "arrow_config": "it routes between several adapters",
    "kasa_config": "it takes a part out of the base",
    "monteclora_config": "it samples its weights",
    "velora_config": "its adapters have a third matrix, for the backward pass",
    "layer_replication": "it repeats layers of the base",
    "target_parameters": "it changes bare parameters, such as those of experts",
}
# First values that leave the base as it is; PEFT changes the base when it loads one with others.
FIRST_VALUES = (True, False, None, "gaussian", "eva", "orthogonal")


def check_config(config: Any, path: Path) -> None:
    """Refuse the settings under which a merge would compute something else than PEFT does.

    Raises:
        UserError: no config of a LoRA adapter, or one with a setting that cannot be merged.
    """
    if not isinstance(config, dict) or config.get("peft_type") not in KINDS:
        fix = "name the folder of an adapter that PEFT saved, of peft_type LORA or ADALORA"
        raise UserError("is not the config of a LoRA adapter", where=str(path), fix=fix)
    for name, value in config.items():
        if name not in USED and name not in WITHOUT_EFFECT and value:
            reason = REFUSED.get(name, f"this version of dtrain does not know {name}")
            what = f"an adapter with {name} cannot be merged: {reason}"
            raise UserError(what, where=str(path), fix="serve base and adapter unmerged")
    first = config.get("init_lora_weights")
    if first not in FIRST_VALUES:
        raise UserError(
            f"init_lora_weights {first!r} takes a part out of the base",
            where=str(path),
            fix="save_pretrained(…, path_initial_model_for_weight_conversion=…) makes a plain LoRA",
        )
    needed: Iterable[str] = ("r", "lora_alpha")
    if config["peft_type"] == "ADALORA":
        needed = ("init_r", "lora_alpha")
    if missing := [key for key in needed if not isinstance(config.get(key), int | float)]:
        fix = "save the adapter again with PEFT's save_pretrained"
        raise UserError(f"no {missing[0]} in it", where=str(path), fix=fix)
