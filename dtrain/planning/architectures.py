"""The sizes of a decoder from its config.json alone, for each known architecture.

Letters: h hidden size, q and kv widths of the queries and of the keys or values, d head size,
f width of the MLP, V vocabulary.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from dataclasses import replace
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from dtrain.core.coded_tensors import FORMATS
from dtrain.core.errors import UserError
from dtrain.core.file_types import check_type
from dtrain.core.files import read_json
from dtrain.planning.kernel_table import KERNELS
from dtrain.planning.shapes import LinearShape, ModelShape, join_layers


class _Config(TypedDict, total=False):
    model_type: str
    text_config: dict[str, Any] | None


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        UserError: the file cannot be read, does not contain an object, describes more layers than
            can be built, or has sizes that no model of its architecture has.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError("this is not a model's config", where=str(path))
    for key, layers in _layer_counts(config):
        if layers >= MAX_LAYERS:
            raise UserError(f"{key} is not below {MAX_LAYERS:,}: {layers}", where=str(path))
    for group in (config, config.get("text_config")):
        if isinstance(group, dict) and str(group.get("model_type")) in ARCHITECTURES:
            _check_sizes(group, str(path))
    return check_type(config, _Config, str(path))


def _layer_counts(config: dict[str, Any]) -> Iterator[tuple[str, int]]:
    """Numbers of layers, under any of their names, of a model and of the models in it."""
    for key, value in config.items():
        if isinstance(value, dict):
            yield from _layer_counts(value)
        elif isinstance(value, int) and LAYER_COUNT.fullmatch(key):
            yield key, value


def shape_of(config: dict[str, Any], where: str) -> ModelShape:
    """The shape that a config of transformers describes.

    Args:
        where: source of the config, for messages.

    Raises:
        UserError: the config lacks a size, or has an architecture that the plan does not know.
    """
    kind = str(config.get("model_type"))
    if kind not in ARCHITECTURES:
        close = get_close_matches(kind, ARCHITECTURES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        fix = f"{hint}it knows {', '.join(ARCHITECTURES)}; dtrain run needs no plan"
        raise UserError(f"the plan does not know model_type {kind!r}", where=where, fix=fix)
    try:
        shape = ARCHITECTURES[kind](kind, DEFAULTS.get(kind, {}) | _without_nulls(config))
        return replace(shape, kernels=KERNELS[kind])
    except KeyError as error:
        raise UserError(f"{error.args[0]} is missing", where=where) from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"a size is not a number: {error}", where=where) from error


def check_not_quantized(config: dict[str, Any], where: str) -> None:
    """Check that a config does not describe quantized weights that are not read.

    Raises:
        UserError: it does; the message names their format.
    """
    for group in (config, config.get("text_config")):
        settings = group.get("quantization_config") if isinstance(group, dict) else None
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            if method in FORMATS:  # what the files hold then counts
                continue
            raise UserError(
                f"the base is already quantized ({method or 'unknown method'}); "
                f"{' and '.join(FORMATS)} are read",
                where=where,
                fix="use the original model in 16 bits; method.kind: qlora quantizes it",
            )


SIZES = (
    "num_hidden_layers",
    "hidden_size",
    "num_attention_heads",
    "num_key_value_heads",
    "intermediate_size",
    "vocab_size",
    "head_dim",
)
MAX_SIZE = 2**40  # a larger value is not a size of a model
MAX_LAYERS = 2_000  # each is built by itself, even without weights
MAX_EXPERTS = 2**16
# transformers 5 saves some configs under another name than their own.
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
ACTIVE_EXPERTS = "num_experts_per_tok"
MAY_BE_DENSE = ("qwen2_moe", "qwen3_moe")  # with 0 experts
LIMITS = {"num_hidden_layers": MAX_LAYERS} | dict.fromkeys(EXPERT_COUNTS, MAX_EXPERTS)
LAYER_COUNT = re.compile(
    r"n_layer|num_layer|layers|(n|num)_(\w+_)?layers|\w+_num_layers|(\w+_)?(en|de)coder_layers"
)


def _check_sizes(config: dict[str, Any], where: str) -> None:
    """Check that sizes are whole numbers above 0, and that a token uses no more experts than exist.

    Of other architectures the model itself is asked, once it is built.
    """
    defaults = DEFAULTS.get(config["model_type"], {})
    has_experts = ACTIVE_EXPERTS in defaults
    count = next((key for key in EXPERT_COUNTS if key in config), EXPERT_COUNTS[0])
    if config.get(count) == 0 and config["model_type"] in MAY_BE_DENSE:
        has_experts = False
    expert_keys = (count, ACTIVE_EXPERTS, "moe_intermediate_size") if has_experts else ()
    for key in (*SIZES, *expert_keys):
        value, limit = config.get(key), LIMITS.get(key, MAX_SIZE)
        if value is None and (key in SIZES or key not in config):
            continue  # transformers' default
        if type(value) is not int or not 0 < value < limit:
            large = f" below {limit:,}" if type(value) is int and value > 0 else ""
            message = f"{key} is not a whole number above 0{large}: {json.dumps(value)[:40]}"
            raise UserError(message, where=where)
    sizes = defaults | config
    experts = next((sizes[key] for key in EXPERT_COUNTS if key in sizes), None)
    if has_experts and experts is not None and sizes[ACTIVE_EXPERTS] > experts:
        message = f"{ACTIVE_EXPERTS} is {sizes[ACTIVE_EXPERTS]}, of {experts} experts"
        raise UserError(message, where=where)


def _without_nulls(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


# What transformers assumes where config.json has no value.
DEFAULTS: dict[str, dict[str, Any]] = {
    "mistral": {"num_key_value_heads": 8},
    "qwen2": {"num_key_value_heads": 32},
    "qwen3": {"num_key_value_heads": 32, "head_dim": 128},
    "gemma": {"head_dim": 256, "tie_word_embeddings": True},
    "gemma2": {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    "gemma3_text": {"num_key_value_heads": 4, "head_dim": 256, "tie_word_embeddings": True},
    "qwen3_moe": {"num_key_value_heads": 4, "num_experts_per_tok": 8, "moe_intermediate_size": 768},
    "qwen2_moe": {"num_key_value_heads": 16, "num_experts_per_tok": 4},
    "mixtral": {"num_key_value_heads": 8, "num_experts_per_tok": 2, "num_local_experts": 8},
    "gpt_oss": {"num_key_value_heads": 8, "head_dim": 64, "num_experts_per_tok": 4},
    "glm4_moe": {"num_key_value_heads": 8, "num_experts_per_tok": 8, "head_dim": 128},
    "smollm3": {"num_key_value_heads": 4, "tie_word_embeddings": True},
}


def _decoder(kind: str, config: dict[str, Any], **choices: Any) -> ModelShape:
    """A Llama-like decoder.

    Args:
        choices: how the architecture differs. qkv_bias, o_bias, mlp_bias: layers with a bias;
            fused: q, k, v are one matrix, and gate, up are one; norms: norms over h in a decoder
            layer; head_norms: norms over d in a decoder layer.
    """
    hidden, heads = int(config["hidden_size"]), int(config["num_attention_heads"])
    kv_heads = int(config.get("num_key_value_heads", heads))
    size = int(config.get("head_dim", hidden // heads))
    mlp = int(config["intermediate_size"])
    norms = choices.get("norms", 2)
    return ModelShape(
        kind=kind,
        layers=int(config["num_hidden_layers"]),
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_size=size,
        mlp=mlp,
        vocabulary=int(config["vocab_size"]),
        tied=bool(config.get("tie_word_embeddings", False)),
        linears=_linears(hidden, heads * size, kv_heads * size, mlp, choices),
        norm_elements=norms * hidden + choices.get("head_norms", 0) * size,
        norms=norms,
        soft_cap=config.get("attn_logit_softcapping") is not None,
    )


def _linears(h: int, q: int, kv: int, f: int, choices: dict[str, Any]) -> tuple[LinearShape, ...]:
    in_bias = bool(choices.get("qkv_bias"))
    out_bias, mlp_bias = bool(choices.get("o_bias")), bool(choices.get("mlp_bias"))
    output = LinearShape("self_attn.o_proj", q, h, out_bias)
    down = LinearShape("mlp.down_proj", f, h, mlp_bias)
    if choices.get("fused"):
        into = LinearShape("self_attn.qkv_proj", h, q + 2 * kv, in_bias)
        return into, output, LinearShape("mlp.gate_up_proj", h, 2 * f, mlp_bias), down
    return (
        LinearShape("self_attn.q_proj", h, q, in_bias),
        LinearShape("self_attn.k_proj", h, kv, in_bias),
        LinearShape("self_attn.v_proj", h, kv, in_bias),
        output,
        LinearShape("mlp.gate_proj", h, f, mlp_bias),
        LinearShape("mlp.up_proj", h, f, mlp_bias),
        down,
    )


def _llama(kind: str, config: dict[str, Any]) -> ModelShape:
    bias, mlp_bias = config.get("attention_bias", False), config.get("mlp_bias", False)
    return _decoder(kind, config, qkv_bias=bias, o_bias=bias, mlp_bias=mlp_bias)


def _plain(kind: str, config: dict[str, Any]) -> ModelShape:
    return _decoder(kind, config)


def _qwen2(kind: str, config: dict[str, Any]) -> ModelShape:
    return _decoder(kind, config, qkv_bias=True)


def _qwen3(kind: str, config: dict[str, Any]) -> ModelShape:
    bias = config.get("attention_bias", False)
    return _decoder(kind, config, qkv_bias=bias, o_bias=bias, head_norms=2)


def _gemma(kind: str, config: dict[str, Any]) -> ModelShape:
    bias = config.get("attention_bias", False)
    return _decoder(kind, config, qkv_bias=bias, o_bias=bias)


def _gemma2(kind: str, config: dict[str, Any]) -> ModelShape:
    bias = config.get("attention_bias", False)
    capped = {"attn_logit_softcapping": 50.0} | config
    return _decoder(kind, capped, qkv_bias=bias, o_bias=bias, norms=4)


def _gemma3(kind: str, config: dict[str, Any]) -> ModelShape:
    bias = config.get("attention_bias", False)
    return _decoder(kind, config, qkv_bias=bias, o_bias=bias, norms=4, head_norms=2)


def _phi3(kind: str, config: dict[str, Any]) -> ModelShape:
    return _decoder(kind, config, fused=True)


def _with_experts(
    shape: ModelShape,
    config: dict[str, Any],
    number: int,
    *,
    width: int,
    shared: int = 0,
    shared_name: str = "shared_experts",
    bias: bool = False,
    router: tuple[str, ...] = ("mlp.gate.weight",),
    more_rows: int = 0,
    dense: Callable[[int], bool] = lambda _: False,
) -> ModelShape:
    """The same decoder with experts in place of its MLP.

    Args:
        number: of experts.
        width: f of an expert.
        shared: f of the experts that all tokens get.
        bias: router and experts have one.
        router: names of its parameters.
        more_rows: rows of a gate of the shared experts.
        dense: whether the layer of a number keeps its MLP.
    """
    h, active = shape.hidden, int(config[ACTIVE_EXPERTS])
    routed = (
        LinearShape("mlp.experts.gate_up_proj", h, 2 * width, bias, number, active),
        LinearShape("mlp.experts.down_proj", width, h, bias, number, active),
    )
    of_all = (
        LinearShape(f"mlp.{shared_name}.gate_proj", h, shared),
        LinearShape(f"mlp.{shared_name}.up_proj", h, shared),
        LinearShape(f"mlp.{shared_name}.down_proj", shared, h),
    )
    gate = (LinearShape(f"mlp.{shared_name}_gate", h, more_rows),) if more_rows else ()
    others = tuple(x for x in shape.linears if not x.name.startswith("mlp."))
    routed_layer = replace(
        shape,
        mlp=active * width + shared,
        linears=(*others, *routed, *(of_all if shared else ()), *gate),
        router=(number, h + bias),
        router_names=router,
    )
    layers = (shape if dense(n) else routed_layer for n in range(shape.layers))
    return join_layers([replace(layer, layers=1) for layer in layers])


def _experts(config: dict[str, Any]) -> int:
    """The number of routed experts."""
    found = [name for name in EXPERT_COUNTS if name in config]
    return int(config[found[0] if found else EXPERT_COUNTS[0]])


def _dense_layers(config: dict[str, Any]) -> Callable[[int], bool]:
    """The layers without experts, as Qwen's configs say."""
    step, dense = int(config.get("decoder_sparse_step", 1)), config.get("mlp_only_layers") or ()
    is_dense = not _experts(config)
    return lambda n: is_dense or n in dense or (n + 1) % step > 0


def _qwen3_moe(kind: str, config: dict[str, Any]) -> ModelShape:
    return _with_experts(
        _qwen3(kind, config),
        config,
        _experts(config),
        width=int(config["moe_intermediate_size"]),
        dense=_dense_layers(config),
    )


def _qwen2_moe(kind: str, config: dict[str, Any]) -> ModelShape:
    return _with_experts(
        _decoder(kind, config, qkv_bias=config.get("qkv_bias", True)),
        config,
        _experts(config),
        width=int(config["moe_intermediate_size"]),
        shared=int(config["shared_expert_intermediate_size"]),
        shared_name="shared_expert",
        more_rows=1,
        dense=_dense_layers(config),
    )


def _mixtral(kind: str, config: dict[str, Any]) -> ModelShape:
    number, width = _experts(config), int(config["intermediate_size"])
    return _with_experts(_plain(kind, config), config, number, width=width)


def _gpt_oss(kind: str, config: dict[str, Any]) -> ModelShape:
    biased = config.get("attention_bias", True)
    shape = _decoder(kind, config, qkv_bias=biased, o_bias=biased)
    number, width = _experts(config), int(config["intermediate_size"])
    router = ("mlp.router.weight", "mlp.router.bias")
    shape = _with_experts(shape, config, number, width=width, bias=True, router=router)
    return replace(
        shape,
        others=((shape.heads, 1),),
        other_names=("self_attn.sinks",),
        mlp_saved=6,  # both halves, the clamped gate, its sigmoid, their product, and up + 1
    )


def _glm4_moe(kind: str, config: dict[str, Any]) -> ModelShape:
    head_norms = 2 if config.get("use_qk_norm") else 0
    width = int(config["moe_intermediate_size"])
    return _with_experts(
        _decoder(kind, config, qkv_bias=config.get("attention_bias"), head_norms=head_norms),
        config,
        _experts(config),
        width=width,
        shared=width * int(config.get("n_shared_experts", 1)),
        dense=lambda n: n < int(config.get("first_k_dense_replace", 1)),
    )


ARCHITECTURES: dict[str, Callable[[str, dict[str, Any]], ModelShape]] = {
    "llama": _llama,
    "mistral": _plain,
    "qwen2": _qwen2,
    "qwen3": _qwen3,
    "gemma": _gemma,
    "gemma2": _gemma2,
    "gemma3_text": _gemma3,
    "phi3": _phi3,
    "smollm3": _llama,
    "granite": _llama,
    "qwen3_moe": _qwen3_moe,
    "qwen2_moe": _qwen2_moe,
    "mixtral": _mixtral,
    "gpt_oss": _gpt_oss,
    "glm4_moe": _glm4_moe,
}
