"""Loads a base model from a folder of safetensors, frozen and prepared for training."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModel, PretrainedConfig, PreTrainedModel
from transformers.dynamic_module_utils import get_class_from_dynamic_module
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.utils import is_flash_attn_2_available, logging

from dtrain.config import schema
from dtrain.core.errors import UserError, first_line
from dtrain.core.log import warn
from dtrain.core.weight_files import check_complete, read_headers, warn_incomplete
from dtrain.distributed.out_of_memory import is_out_of_memory
from dtrain.models import attention, attention_probe
from dtrain.models.by_document import separate_states, skip_hooks_of_experts
from dtrain.models.conversion import check_conversions
from dtrain.models.expert_layers import check_experts, fix_routers
from dtrain.models.finite_weights import check_finite
from dtrain.models.kernels import varlen
from dtrain.models.meta_model import (
    TOKENS,
    MetaValueDefaults,
    auto_class,
    build_meta_model,
    linear_layers,
    unused_towers,
    without_modules,
)
from dtrain.models.peft_format import read_generation
from dtrain.models.positions import rotate_by_document
from dtrain.models.quantize import (
    check_quantized,
    forbid_repacking,
    nf4_config,
    nf4_layers,
    pack_natively,
)
from dtrain.models.state_dict_names import match_state_dict
from dtrain.models.stored_tensors import ModelTensors
from dtrain.planning import architectures

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def resolve_dtype(name: str, device: torch.device) -> torch.dtype:
    """The compute dtype that `model.dtype` names; auto: bfloat16 on a GPU, float32 on a CPU."""
    if name == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return DTYPES[name]


def load_base(
    folder: Path,
    settings: schema.Model,
    *,
    quantized: bool,
    dtype: torch.dtype,
    device: torch.device,
    all_gpus: bool = False,
) -> PreTrainedModel:
    """Load a frozen base model, tensor by tensor from memory-mapped safetensors.

    The base's own dropout is turned off, as its masks would depend on the number of ranks.

    Args:
        folder: from `hub.base_folder`.
        quantized: keep the linear layers in NF4, with `dtype` for storage and compute.
        dtype: float32 for full fine-tuning.
        all_gpus: spread the model over all GPUs of this machine, for a process that runs only
            forward passes.

    Raises:
        UserError: no safetensors, code that is not allowed, missing tensors, or an architecture
            that dtrain does not train.
    """
    config = load_config(folder, settings, dtype, device)
    packed: set[str] = set()
    spared: set[str] = set()
    if quantized:
        described = build_meta_model(config, settings.trust_remote_code)
        packed = nf4_layers(described)
        spared = linear_layers(described).keys() - packed
        if settings.kernels != "off":
            pack_natively()
    model, info = _from_pretrained(
        folder,
        config,
        dtype=dtype,
        attn_implementation=config._attn_implementation,
        trust_remote_code=settings.trust_remote_code,
        quantization_config=nf4_config(dtype, spared) if quantized else None,
        device_map="auto" if all_gpus else {"": device},
    )
    reshaped = (str(name) for name, *_ in info["mismatched_keys"])
    unexpected, of_towers = info["unexpected_keys"], set[str]()
    if unused_towers(config):  # whose tensors are not loaded
        stored = (name for entries in read_headers(folder).values() for name in entries)
        matched = match_state_dict(build_meta_model(config), stored)
        unexpected, of_towers = matched.unexpected, {*matched.missing} - model.state_dict().keys()
    check_complete(folder, info["missing_keys"], unexpected, reshaped)
    warn_incomplete(folder, of_towers)
    check_quantized(model, packed)
    check_finite(folder, model, packed=quantized)
    return freeze_for_training(model, settings)


def load_config(
    folder: Path, settings: schema.Model, dtype: torch.dtype, device: torch.device
) -> PretrainedConfig:
    """Read a model's config and prepare it for training, after checking the weight files.

    Raises:
        UserError: as `load_base`.
    """
    read_headers(folder)  # raises if a file is cut short, or a tensor is missing
    config = read_config(folder, trust_remote_code=settings.trust_remote_code)
    return prepare_config(config, settings, dtype, device)


def prepare_config(
    config: PretrainedConfig, settings: schema.Model, dtype: torch.dtype, device: torch.device
) -> PretrainedConfig:
    """Turn off a config's dropout and set its attention implementation."""
    _disable_dropout(config)
    config._attn_implementation = resolve_attention(
        settings.attention, config, device, dtype, settings.trust_remote_code
    )
    return config


def freeze_for_training(model: PreTrainedModel, settings: schema.Model) -> PreTrainedModel:
    """Freeze a model and apply the settings that all training needs."""
    forbid_repacking(model)
    rotate_by_document(model)
    separate_states(model)
    skip_hooks_of_experts(model)
    fix_routers(model)
    model.config.use_cache = model.config.get_text_config().use_cache = False
    model.requires_grad_(False)
    if settings.gradient_checkpointing:
        _checkpoint_activations(model)
    return model


def _checkpoint_activations(model: PreTrainedModel) -> None:
    """Recompute each layer in backward, with the implementation that keeps module names."""
    if not model.supports_gradient_checkpointing:
        raise UserError("this model does not support it", where="model.gradient_checkpointing")
    # newer transformers deprecate the older name
    enable = getattr(model, "activation_checkpointing_enable", model.gradient_checkpointing_enable)
    # the base has no dropout and adapters have keyed dropout: no random state to save
    enable({"use_reentrant": False, "preserve_rng_state": False})


def _from_pretrained(
    folder: Path, config: PretrainedConfig, **settings: Any
) -> tuple[PreTrainedModel, dict[str, Any]]:
    loader, towers = auto_class(config), unused_towers(config)
    if towers:
        loader = without_modules(loader._model_mapping[type(config)], towers)
    try:
        with silence_transformers():
            result: Any = loader.from_pretrained(
                folder,
                config=config,
                use_safetensors=True,
                output_loading_info=True,
                ignore_mismatched_sizes=True,  # reported in `info`; `check_complete` raises
                **settings,
            )
    except RuntimeError as error:  # of a device, or a conversion, whose report is not printed
        if not is_out_of_memory(error):
            tensors = ModelTensors(folder)
            names = match_state_dict(build_meta_model(config), tensors)
            check_conversions(folder, names.conversions, tensors)
        raise
    except (TypeError, ValueError, LookupError, AttributeError) as error:
        raise UserError(
            f"cannot be loaded: {first_line(error)}",
            where=str(folder),
            fix="weights and config.json must belong to the same model; download them again",
        ) from error
    model, info = result
    return model, info


def needs_own_code(config: dict[str, Any]) -> bool:
    """Whether only Python code next to a config.json can build its model."""
    return bool(config.get("auto_map")) and config.get("model_type") not in CONFIG_MAPPING


def read_config(folder: Path, *, trust_remote_code: bool) -> PretrainedConfig:
    """Read a model's config.

    Raises:
        UserError: it is missing or broken, needs code that is not allowed, is unknown to
            transformers, or belongs to a model that dtrain does not train.
    """
    raw = architectures.read_config(folder / "config.json")
    architectures.check_not_quantized(raw, str(folder / "config.json"))
    config = parse_config(folder, raw, trust_remote_code)
    read_generation(folder)  # transformers takes any types in it
    config.__dict__.pop("quantization_config", None)  # the values of its codes are loaded
    _check_trainable(folder, config, has_code=needs_own_code(raw))
    check_experts(build_meta_model(config, trust_remote_code), str(folder / "config.json"))
    return config


def parse_config(folder: Path, raw: dict[str, Any], trust_remote_code: bool) -> PretrainedConfig:
    """A config of any model that transformers knows, or that has code of its own.

    Args:
        raw: from `architectures.read_config`.

    Raises:
        UserError: it is broken, needs code that is not allowed, or is unknown to transformers.
    """
    kind, needs_code = raw.get("model_type"), needs_own_code(raw)
    if needs_code and not trust_remote_code:
        raise UserError(
            "this model comes with its own Python code",
            where=str(folder),
            fix="read that code, then set model.trust_remote_code: true",
        )
    if not needs_code and kind not in CONFIG_MAPPING:
        raise UserError(f"unknown model_type {kind!r}", where=str(folder / "config.json"))
    try:
        config: PretrainedConfig = AutoConfig.from_pretrained(
            folder, trust_remote_code=trust_remote_code
        )
    except Exception as error:  # architectures check their configs in many ways
        raise UserError(first_line(error), where=str(folder / "config.json")) from error
    return config


def resolve_attention(
    name: str,
    config: PretrainedConfig,
    device: torch.device,
    dtype: torch.dtype,
    trust_remote_code: bool = False,
) -> str:
    """Choose the fastest attention implementation that separates packed documents.

    flash_attention_2 takes document boundaries; "documents" is dtrain's own; eager and sdpa mask
    the whole sequence, for models that the others do not support.

    Raises:
        UserError: the named implementation is not available for this model or machine.
    """
    arguments, largest_head = attention_arguments(config, trust_remote_code)
    usable = _supported_attentions(config, arguments)
    if name != "auto":
        if name not in usable:
            raise UserError(
                f"{config.model_type!r} has no attention {name!r}",
                where="model.attention",
                fix=f"auto, or one of: {', '.join(n for n in usable if n != attention.NAME)}",
            )
        runs_flash = device.type == "cuda" and is_flash_attn_2_available()
        if name == "flash_attention_2" and not runs_flash:
            raise UserError(
                "flash_attention_2 needs a GPU and the package flash-attn",
                where="model.attention",
                fix="auto, which chooses one that this machine supports",
            )
        if name == "flash_attention_2" and largest_head > varlen.MAX_HEAD_SIZE:
            raise UserError(
                f"{config.model_type!r} has heads of {largest_head}, and flash_attention_2 takes "
                f"at most {varlen.MAX_HEAD_SIZE}",
                where="model.attention",
                fix="auto",
            )
        return name
    on_flash = device.type == "cuda" and dtype == torch.bfloat16 and is_flash_attn_2_available()
    on_flash = on_flash and {"flash_attention_2", attention.NAME} <= usable.keys()
    if on_flash and largest_head <= varlen.MAX_HEAD_SIZE:
        return "flash_attention_2"
    text = config.get_text_config(decoder=True)
    if getattr(text, "attn_logit_softcapping", None) is not None:
        return "eager"  # sdpa has no soft cap
    return next(name for name in (attention.NAME, "sdpa", "eager") if name in usable)


def model_class(config: PretrainedConfig) -> type[PreTrainedModel] | None:
    """The class that `auto_class` builds from a config of `read_config`."""
    known: Any = auto_class(config)._model_mapping.get(type(config), None)
    reference = (getattr(config, "auto_map", None) or {}).get("AutoModelForCausalLM")
    if known is None and reference is not None:
        known = get_class_from_dynamic_module(reference, config._name_or_path)
    found: type[PreTrainedModel] | None = known
    return found


def _supported_attentions(config: PretrainedConfig, arguments: set[str]) -> dict[str, None]:
    """The attention implementations that a model's class declares, and that of its text model."""
    text: Any = AutoModel._model_mapping.get(type(config.get_text_config(decoder=True)), None)
    classes = [x for x in (model_class(config), text) if isinstance(x, type)]

    def declare(trait: str) -> bool:
        return bool(classes) and all(getattr(x, trait, False) for x in classes)

    has_sdpa, takes_any = declare("_supports_sdpa"), declare("_supports_attention_backend")
    sinks = "s_aux" in arguments  # sdpa would leave them out
    documents = takes_any and (has_sdpa or sinks) and arguments <= {"s_aux"}
    support = {"eager": True, "sdpa": has_sdpa and not sinks, attention.NAME: documents}
    support["flash_attention_2"] = declare("_supports_flash_attn") and not sinks
    return {name: None for name, has in support.items() if has}


def attention_arguments(config: PretrainedConfig, trust_remote_code: bool) -> tuple[set[str], int]:
    """What a model passes to its attention beyond queries, keys, values and a mask.

    Sparse attention passes the tokens that it chose, or computes with its mask: "documents" would
    see all tokens of a document. The mask is among the names if the model takes none but tensors.

    Returns:
        Names, and the largest size of a query's head.
    """
    key = config.to_json_string(use_diff=False), trust_remote_code
    if key not in _arguments:
        with attention_probe.recording_arguments() as passed:
            is_asked = _computes(config, trust_remote_code, attention_probe.PROBE)
            if not is_asked and _computes(config, trust_remote_code, "eager"):
                passed.names.add("attention_mask")
        _arguments[key] = passed.names, passed.largest_head
    return _arguments[key]


_arguments: dict[tuple[str, bool], tuple[set[str], int]] = {}  # finding them takes a second


def _computes(config: PretrainedConfig, trust_remote_code: bool, name: str) -> bool:
    """Whether a model computes a text on the meta device with an implementation of attention."""
    ids = torch.zeros(1, TOKENS, dtype=torch.long, device="meta")
    try:
        model = build_meta_model(config, trust_remote_code, attention=name)
        with silence_transformers(), MetaValueDefaults(), torch.no_grad():
            model(input_ids=ids, use_cache=False)
    except Exception:  # a model's code may raise anything on tensors without values
        return False
    return True


@contextmanager
def silence_transformers() -> Iterator[None]:
    """Suppress progress bars, reports and deprecations that transformers prints on every rank."""
    bars, level = logging.is_progress_bar_enabled(), logging.get_verbosity()
    logging.disable_progress_bar()
    logging.set_verbosity_error()
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        logging.set_verbosity(level)
        if bars:
            logging.enable_progress_bar()


def _check_trainable(folder: Path, config: PretrainedConfig, *, has_code: bool) -> None:
    where = str(folder / "config.json")
    known = auto_class(config)._model_mapping.get(type(config), None)
    if known is None and not has_code:
        raise UserError(f"{config.model_type!r} is not a causal language model", where=where)
    if config.is_encoder_decoder:
        raise UserError(
            f"{config.model_type!r} is an encoder-decoder model, and dtrain trains decoders",
            where=where,
            fix="choose a causal language model",
        )


def _disable_dropout(config: PretrainedConfig) -> None:
    inner = [value for value in vars(config).values() if isinstance(value, PretrainedConfig)]
    for config_inside in inner:
        _disable_dropout(config_inside)
    for name, value in vars(config).items():
        drops = "dropout" in name or name.endswith(("_pdrop", "layerdrop"))
        if drops and isinstance(value, float) and value:
            warn(f"the base's {name} {value} is turned off; only method.dropout applies")
            setattr(config, name, 0.0)
