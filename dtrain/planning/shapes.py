"""The sizes of a decoder's tensors, from its config.json alone, for each known architecture.

Letters: h hidden size, q and kv widths of the queries and of the keys or values, d head size,
f width of the MLP, V vocabulary.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from dtrain.core.errors import UserError
from dtrain.core.files import read_json


@dataclass(frozen=True)
class LinearShape:
    """A linear layer; `name` is its name inside the decoder layer, such as self_attn.q_proj."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def elements(self) -> int:
        """Elements of the weight matrix."""
        return self.inputs * self.outputs

    @property
    def biases(self) -> int:
        """Elements of the bias."""
        return self.outputs if self.bias else 0


@dataclass(frozen=True)
class ModelShape:
    """The sizes of a decoder that memory, time and communication depend on.

    Attributes:
        kind: model_type of its config.json, a key of `ARCHITECTURES`.
        linears: linear layers of one decoder layer; all decoder layers are alike.
        norm_elements: weights of the norms of one decoder layer.
        norms: norms over h in one decoder layer.
        tied: the output matrix is the embedding matrix.
        soft_cap: attention scores are capped, which needs the attention that stores all scores.
    """

    kind: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_size: int
    mlp: int
    vocabulary: int
    tied: bool
    linears: tuple[LinearShape, ...]
    norm_elements: int
    norms: int
    soft_cap: bool = False

    @property
    def q(self) -> int:
        """Width of the queries."""
        return self.heads * self.head_size

    @property
    def kv(self) -> int:
        """Width of the keys, and of the values."""
        return self.kv_heads * self.head_size

    @property
    def linear_elements(self) -> int:
        """Weights of the linear layers of all decoder layers: what NF4 quantizes."""
        return self.layers * sum(linear.elements for linear in self.linears)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        return self.norm_elements + sum(x.elements + x.biases for x in self.linears)

    @property
    def outer_elements(self) -> dict[str, int]:
        """Parameter outside the decoder layers → its elements; tied matrices have one name."""
        matrix = self.vocabulary * self.hidden
        head = {} if self.tied else {"lm_head.weight": matrix}
        return {"model.embed_tokens.weight": matrix, "model.norm.weight": self.hidden, **head}

    @property
    def outer_parameters(self) -> int:
        """Parameters outside the decoder layers: embeddings, output matrix, final norm."""
        return sum(self.outer_elements.values())

    @property
    def parameters(self) -> int:
        """Number of parameters; tied matrices count once."""
        return self.layers * self.layer_parameters + self.outer_parameters


def select_linears(
    shape: ModelShape, target_modules: str | Sequence[str]
) -> tuple[LinearShape, ...]:
    """The linear layers of one decoder layer that get an adapter, and lm_head where it is named.

    Args:
        target_modules: as in a recipe; a name matches the whole name or its end after a dot, as in
            PEFT.

    Raises:
        UserError: no linear layer has one of the names.
    """
    if isinstance(target_modules, str):
        return shape.linears
    head = LinearShape("lm_head", shape.hidden, shape.vocabulary)
    known = [*shape.linears, *([] if shape.tied else [head])]
    for target in target_modules:
        if not any(_matches(linear.name, target) for linear in known):
            names = sorted({linear.name.rpartition(".")[2] for linear in known})
            fix = f"choose from: {', '.join(names)}"
            raise UserError(
                f"no linear layer is named {target!r}", where="method.target_modules", fix=fix
            )
    return tuple(x for x in known if any(_matches(x.name, target) for target in target_modules))


def layer_names(shape: ModelShape, linear: LinearShape) -> list[str]:
    """The names of a linear layer in the model, one for each decoder layer that has it."""
    if linear.name == "lm_head":
        return [linear.name]
    return [f"model.layers.{number}.{linear.name}" for number in range(shape.layers)]


def _matches(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def read_config(path: Path) -> dict[str, Any]:
    """The content of a config.json.

    Raises:
        UserError: the file cannot be read or does not contain an object.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError("this is not a model's config", where=str(path))
    return config


def shape_of(config: dict[str, Any], where: str) -> ModelShape:
    """The shape that a config of transformers describes.

    Args:
        where: source of the config, for messages.

    Raises:
        UserError: the config lacks a size, is a mixture of experts, or has an architecture that
            the plan does not know.
    """
    kind = str(config.get("model_type"))
    check_not_experts(config, where)
    if kind not in ARCHITECTURES:
        close = get_close_matches(kind, ARCHITECTURES, n=1)
        hint = f"did you mean {close[0]}? " if close else ""
        fix = f"{hint}it knows {', '.join(ARCHITECTURES)}; dtrain run needs no plan"
        raise UserError(f"the plan does not know model_type {kind!r}", where=where, fix=fix)
    _require_sizes(config, where)
    try:
        return ARCHITECTURES[kind](kind, DEFAULTS.get(kind, {}) | _without_nulls(config))
    except KeyError as error:
        raise UserError(f"{error.args[0]} is missing", where=where) from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"a size is not a number: {error}", where=where) from error


def check_not_experts(config: dict[str, Any], where: str) -> None:
    """Check that a config does not describe a mixture of experts.

    This check needs no torch; `dtrain.models.meta_model.check_dense` checks the built model.

    Raises:
        UserError: the config, or a config inside it, gives its layers experts.
    """
    if _has_experts(config):
        raise UserError(
            f"{config.get('model_type')!r} is a mixture of experts; dtrain trains dense models",
            where=where,
            fix="choose a dense model: llama, mistral, qwen3, ...",
        )


def check_not_quantized(config: dict[str, Any], where: str) -> None:
    """Check that a config does not describe quantized weights.

    Raises:
        UserError: it does; the message names their format.
    """
    for group in (config, config.get("text_config")):
        settings = group.get("quantization_config") if isinstance(group, dict) else None
        if settings:
            method = settings.get("quant_method") if isinstance(settings, dict) else None
            raise UserError(
                f"the base is already quantized ({method or 'unknown method'})",
                where=where,
                fix="use the original model in 16 bits; method.kind: qlora quantizes it",
            )


def _has_experts(config: dict[str, Any]) -> bool:
    if any(isinstance(inner, dict) and _has_experts(inner) for inner in config.values()):
        return True
    if config.get("is_moe") is False or config.get("enable_moe_block") is False:
        return False
    dense, layers = config.get("first_k_dense_replace"), config.get("num_hidden_layers")
    if isinstance(dense, int) and isinstance(layers, int) and dense >= layers:
        return False
    return any(
        type(value) is int and value > 1
        for key, value in config.items()
        if key.endswith("experts") and "shared" not in key and not key.startswith("top_k")
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


def _require_sizes(config: dict[str, Any], where: str) -> None:
    """Check that every size is a number above 0."""
    for key in SIZES:
        value = config.get(key)
        try:
            is_size = value is None or 0 < int(value) < MAX_SIZE
        except (TypeError, ValueError, OverflowError):
            is_size = False
        if not is_size:
            raise UserError(f"{key} is not a number above 0: {value!r}", where=where)


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
}


ADAPTED_LAYERS, NORMS, MLPS, LOSS = "adapted layers", "norms", "MLPs", "chunked loss"
"""Kernels of dtrain/models/kernels that change what is kept for the backward pass.

Adapted layers share one input and recompute it where a norm or an MLP made it; norms keep their
input in its dtype; MLPs keep their two inputs; the loss computes its logits chunk by chunk.
"""

_ALL = frozenset({ADAPTED_LAYERS, NORMS, MLPS, LOSS})
# The kernels that each architecture gets; a test compares them with what is really patched.
KERNELS: dict[str, frozenset[str]] = {
    "llama": _ALL,
    "mistral": _ALL,
    "qwen2": _ALL,
    "qwen3": _ALL,
    "gemma": frozenset({ADAPTED_LAYERS, LOSS}),
    "gemma2": frozenset({ADAPTED_LAYERS, LOSS}),
    "gemma3_text": frozenset({ADAPTED_LAYERS, LOSS}),
    "phi3": frozenset({ADAPTED_LAYERS, NORMS, LOSS}),
    "smollm3": _ALL,
    "granite": _ALL,
}
