"""A decoder's matrices, read from its config.json alone, and how many parameters they hold.

Letters: h hidden size, q and kv width of the queries and of the keys or values, d head size,
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
    """A linear layer; `name` inside its decoder layer, such as self_attn.q_proj."""

    name: str
    inputs: int
    outputs: int
    bias: bool = False

    @property
    def elements(self) -> int:
        """Of the weight matrix."""
        return self.inputs * self.outputs

    @property
    def biases(self) -> int:
        """Elements of the bias."""
        return self.outputs if self.bias else 0


@dataclass(frozen=True)
class ModelShape:
    """What memory, time and bytes depend on.

    Attributes:
        linears: of one decoder layer; all layers are alike.
        norm_elements: of one decoder layer.
        norms: normalisations over h in one decoder layer.
        tied: the output matrix is the embedding matrix.
        soft_cap: attention scores are capped, which only the quadratic kind of attention does.
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
        """Weights of all decoder layers' linear layers: what NF4 holds, what computes."""
        return self.layers * sum(linear.elements for linear in self.linears)

    @property
    def layer_parameters(self) -> int:
        """Parameters of one decoder layer."""
        return self.norm_elements + sum(one.elements + one.biases for one in self.linears)

    @property
    def outer_parameters(self) -> int:
        """Parameters outside the decoder layers: embeddings, output matrix, last norm."""
        return self.vocabulary * self.hidden * (1 if self.tied else 2) + self.hidden

    @property
    def parameters(self) -> int:
        """All of them; what is tied counts once."""
        return self.layers * self.layer_parameters + self.outer_parameters


def adapted(shape: ModelShape, target_modules: str | Sequence[str]) -> tuple[LinearShape, ...]:
    """The linear layers of one decoder layer that get an adapter, and lm_head where it is named.

    Args:
        target_modules: as in a recipe; a name matches whole or after a dot, as in PEFT.

    Raises:
        UserError: no linear layer is named so, or only some decoder layers are meant.
    """
    if isinstance(target_modules, str):
        return shape.linears
    head = LinearShape("lm_head", shape.hidden, shape.vocabulary)
    known = [*shape.linears, *([] if shape.tied else [head])]
    for target in target_modules:
        if not any(_answers(linear.name, target) for linear in known):
            names = sorted({linear.name.rpartition(".")[2] for linear in known})
            fix = f"choose from: {', '.join(names)}"
            raise UserError(
                f"no linear layer is named {target!r}", where="method.target_modules", fix=fix
            )
    return tuple(x for x in known if any(_answers(x.name, target) for target in target_modules))


def _answers(name: str, target: str) -> bool:
    return name == target or name.endswith(f".{target}")


def adapter_parameters(shape: ModelShape, rank: int, target_modules: str | Sequence[str]) -> int:
    """Parameters of a LoRA adapter: r (inputs + outputs) of every adapted layer."""
    chosen = adapted(shape, target_modules)
    return sum(
        rank * (x.inputs + x.outputs) * (1 if x.name == "lm_head" else shape.layers) for x in chosen
    )


def read_config(path: Path) -> dict[str, Any]:
    """What a config.json says.

    Raises:
        UserError: it cannot be read.
    """
    config = read_json(path)
    if not isinstance(config, dict):
        raise UserError("is not a model's config", where=str(path))
    return config


def shape_of(config: dict[str, Any], where: str) -> ModelShape:
    """The shape of a config as transformers writes it.

    Args:
        where: for messages.

    Raises:
        UserError: it lacks a size, is a mixture of experts, or of an architecture not known here.
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
        return ARCHITECTURES[kind](kind, DEFAULTS.get(kind, {}) | _given(config))
    except KeyError as error:
        raise UserError(f"{error.args[0]} is missing in it", where=where) from error
    except (TypeError, ValueError, ZeroDivisionError) as error:
        raise UserError(f"a size in it is not a number: {error}", where=where) from error


def check_not_experts(config: dict[str, Any], where: str) -> None:
    """Refuse what its config alone shows to be a mixture of experts.

    A quick look before torch is at hand; `dtrain.models.outline.check_dense` asks the model.

    Raises:
        UserError: the config, or one inside it, counts experts that its layers have.
    """
    if _has_experts(config):
        what = f"{config.get('model_type')!r} is a mixture of experts; dtrain trains dense models"
        raise UserError(what, where=where, fix="choose a dense model: llama, mistral, qwen3, ...")


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
LARGEST = 2**40  # more is no size of a model


def _require_sizes(config: dict[str, Any], where: str) -> None:
    """Refuse sizes that are none, by their names."""
    for key in SIZES:
        value = config.get(key)
        try:
            is_size = value is None or 0 < int(value) < LARGEST
        except (TypeError, ValueError, OverflowError):
            is_size = False
        if not is_size:
            raise UserError(f"{key} is not a number above 0: {value!r}", where=where)


def _given(config: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in config.items() if value is not None}


# What transformers takes where config.json is silent.
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
    """A Llama-like decoder; `choices` say in what a kind differs.

    Args:
        choices: qkv_bias, o_bias, mlp_bias; fused: q,k,v and gate,up are one matrix each; norms
            over h a layer; head_norms over d a layer.
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
