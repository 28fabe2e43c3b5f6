"""A base model from a folder of safetensors, frozen, ready for an adapter or for full training."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils import is_flash_attn_2_available, logging

from dtrain.config import schema
from dtrain.core.errors import UserError
from dtrain.core.log import warn
from dtrain.models import attention
from dtrain.models.kernels.nf4_pack import pack_fast
from dtrain.models.outline import check_dense, first_line, linear_layers, outline
from dtrain.models.positions import rotate_by_document
from dtrain.models.quantize import check_quantised, forbid_repacking, nf4_config, nf4_layers
from dtrain.models.weight_files import check_complete, read_header, weight_files
from dtrain.planning import shapes

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The dtype of the frozen base and of compute; `auto`: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def load_base(
    folder: Path,
    settings: schema.Model,
    *,
    quantised: bool,
    dtype: torch.dtype,
    device: torch.device,
    spread: bool = False,
) -> PreTrainedModel:
    """Load a base model, frozen, tensor by tensor from memory-mapped safetensors.

    Full fine-tuning wants `dtype=torch.float32`. The base's own dropouts are switched off: their
    masks would depend on the number of ranks.

    Args:
        folder: from `resolve.base_folder`.
        quantised: hold the linear layers in NF4, with `dtype` for storage and compute.
        spread: over all GPUs of this machine, for one process that only computes forward.

    Raises:
        UserError: no safetensors, code that is not allowed, tensors missing, an architecture that
            dtrain does not train.
    """
    config = configured(folder, settings, dtype, device)
    packed: set[str] = set()
    spared: set[str] = set()
    if quantised:
        described = outline(config, settings.trust_remote_code)
        packed = nf4_layers(described)
        spared = linear_layers(described).keys() - packed
        if settings.kernels != "off":
            pack_fast()
    model, info = _from_pretrained(
        folder,
        config=config,
        dtype=dtype,
        attn_implementation=config._attn_implementation,
        trust_remote_code=settings.trust_remote_code,
        quantization_config=nf4_config(dtype, spared) if quantised else None,
        device_map="auto" if spread else {"": device},
    )
    reshaped = (str(name) for name, *_ in info["mismatched_keys"])
    check_complete(folder, info["missing_keys"], info["unexpected_keys"], reshaped)
    check_quantised(model, packed)
    return freeze_for_training(model, settings)


def configured(
    folder: Path, settings: schema.Model, dtype: torch.dtype, device: torch.device
) -> PretrainedConfig:
    """The model's config as it will be trained: whole files, no dropouts, attention chosen.

    Raises:
        UserError: as `load_base`.
    """
    for path in weight_files(folder):
        read_header(path)  # a file cut short is said here, with its name
    config = read_config(folder, trust_remote_code=settings.trust_remote_code)
    return for_training(config, settings, dtype, device)


def for_training(
    config: PretrainedConfig, settings: schema.Model, dtype: torch.dtype, device: torch.device
) -> PretrainedConfig:
    """A config without dropouts, with its attention chosen."""
    _switch_off_dropout(config)
    config._attn_implementation = resolve_attention(settings.attention, config, device, dtype)
    return config


def freeze_for_training(model: PreTrainedModel, settings: schema.Model) -> PreTrainedModel:
    """Freeze, and set what holds for every model that is trained."""
    forbid_repacking(model)
    rotate_by_document(model)
    model.config.use_cache = model.config.get_text_config().use_cache = False
    model.requires_grad_(False)
    if settings.gradient_checkpointing:
        _checkpoint_activations(model)
    return model


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer in the backward pass, by the kind that leaves module names alone."""
    if not model.supports_gradient_checkpointing:
        raise UserError("this model cannot do it", where="model.gradient_checkpointing")
    # the newer name; transformers warns of the older one
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    # the base has no dropout and an adapter's is keyed: no random state to keep
    enable({"use_reentrant": False, "preserve_rng_state": False})


def _from_pretrained(folder: Path, **settings: Any) -> tuple[PreTrainedModel, dict[str, Any]]:
    with quiet():
        result: Any = AutoModelForCausalLM.from_pretrained(
            folder,
            use_safetensors=True,
            output_loading_info=True,
            ignore_mismatched_sizes=True,  # reported, and then refused by us
            **settings,
        )
    model, info = result
    return model, info


def read_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """The model's config.

    Raises:
        UserError: it is missing or broken, it needs code that is not allowed, or transformers
            does not know it, or the model is not one that dtrain trains.
    """
    raw = shapes.read_config(folder / "config.json")
    kind = raw.get("model_type")
    needs_code = bool(raw.get("auto_map")) and kind not in CONFIG_MAPPING
    if needs_code and not trust_remote_code:
        raise UserError(
            "this model brings Python code of its own",
            where=str(folder),
            fix="read that code, then set model.trust_remote_code: true",
        )
    if not needs_code and kind not in CONFIG_MAPPING:
        raise UserError(f"unknown model_type {kind!r}", where=str(folder / "config.json"))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # each architecture checks its config in its own way
        raise UserError(first_line(error), where=str(folder / "config.json")) from error
    _check_trainable(folder, config, has_code=needs_code)
    check_dense(outline(config, trust_remote_code), str(folder / "config.json"))
    return config


def resolve_attention(
    wanted: str, config: PretrainedConfig, device: torch.device, dtype: torch.dtype
) -> str:
    """The attention implementation of transformers that keeps packed documents apart, the fastest.

    flash_attention_2 takes the documents' borders themselves; "documents" is ours; eager and sdpa
    mask a whole row, and are for models that the others do not compute rightly.
    """
    usable = _attentions(config)
    if wanted != "auto":
        if wanted not in usable:
            raise UserError(
                f"{config.model_type!r} has no attention {wanted!r}",
                where="model.attention",
                fix=f"auto, or one of: {', '.join(n for n in usable if n != attention.NAME)}",
            )
        runs_flash = device.type == "cuda" and is_flash_attn_2_available()
        if wanted == "flash_attention_2" and not runs_flash:
            raise UserError(
                "flash_attention_2 needs a GPU and the package flash-attn",
                where="model.attention",
                fix="auto, which chooses what this machine has",
            )
        return wanted
    on_flash = device.type == "cuda" and dtype == torch.bfloat16 and is_flash_attn_2_available()
    if on_flash and {"flash_attention_2", attention.NAME} <= usable.keys():
        return "flash_attention_2"
    if getattr(config, "attn_logit_softcapping", None) is not None:
        return "eager"  # sdpa has no soft cap
    return next(name for name in (attention.NAME, "sdpa", "eager") if name in usable)


def causal_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that AutoModelForCausalLM makes of a config that `read_config` allowed."""
    known: Any = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if known is None and reference is not None:
        known = get_class_from_dynamic_module(reference, config._name_or_path)
    found: type[PreTrainedModel] | None = known
    return found


def _attentions(config: PretrainedConfig) -> dict[str, None]:
    """Attention implementations that a model's class says it has."""
    known = causal_class(config)
    has_sdpa = getattr(known, "_supports_sdpa", False)
    takes_any = getattr(known, "_supports_attention_backend", False)
    found = {"eager": True, "sdpa": has_sdpa, attention.NAME: has_sdpa and takes_any}
    found["flash_attention_2"] = getattr(known, "_supports_flash_attn", False)
    return {name: None for name, has in found.items() if has}


@contextmanager
def quiet() -> Iterator[None]:
    """Without the bars and reports that transformers draws on every rank."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_trainable(folder: Path, config: PretrainedConfig, *, has_code: bool) -> None:
    where = str(folder / "config.json")
    known = MODEL_FOR_CAUSAL_LM_MAPPING.get(type(config), None)
    if known is None and not has_code:
        raise UserError(f"{config.model_type!r} is not a causal language model", where=where)
    if config.is_encoder_decoder:
        raise UserError(
            f"{config.model_type!r} is an encoder-decoder model, and dtrain trains decoders",
            where=where,
            fix="choose a causal language model",
        )
    if getattr(config, "quantization_config", None) is not None:
        raise UserError(
            "the base is quantised already", where=where, fix="use the model it was made from"
        )


def _switch_off_dropout(config: PretrainedConfig) -> None:
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    for one in inner:
        _switch_off_dropout(one)
    for name, value in vars(config).items():
        drops = "dropout" in name or name.endswith(("_pdrop", "layerdrop"))
        if drops and isinstance(value, float) and value:
            warn(f"{name} {value} of the base is switched off; method.dropout is what counts")
            setattr(config, name, 0.0)
