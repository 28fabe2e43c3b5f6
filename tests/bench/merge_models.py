"""Random models and adapters of any size, written shard by shard, for the benches of the merge."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors.torch import save_file

PREFIX = "base_model.model."
BLOCK_ELEMENTS = 1 << 20
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def config(gigabytes: float) -> dict[str, object]:
    """A Llama's config.json whose weights in bfloat16 take about so many bytes."""
    sizes = {"hidden_size": 2048, "intermediate_size": 5632, "vocab_size": 32000}
    heads = {"num_attention_heads": 16, "num_key_value_heads": 8}
    if gigabytes < 0.5:
        sizes = {"hidden_size": 512, "intermediate_size": 1408, "vocab_size": 8000}
        heads = {"num_attention_heads": 8, "num_key_value_heads": 4}
    if gigabytes >= 10:
        sizes = {"hidden_size": 4096, "intermediate_size": 14336, "vocab_size": 128256}
        heads = {"num_attention_heads": 32, "num_key_value_heads": 8}
    whole = sizes | heads
    layer = sum(a * b for a, b in layer_shapes(whole).values())
    rest = 2 * whole["vocab_size"] * whole["hidden_size"]
    whole["num_hidden_layers"] = max(round((gigabytes * 1e9 / 2 - rest) / layer), 1)
    named = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "dtype": "bfloat16"}
    return named | whole | {"tie_word_embeddings": False, "max_position_embeddings": 4096}


def layer_shapes(whole: dict[str, int]) -> dict[str, tuple[int, int]]:
    """The linear layers of one block: [out, in]."""
    h, f = whole["hidden_size"], whole["intermediate_size"]
    kv = h // whole["num_attention_heads"] * whole["num_key_value_heads"]
    attention = {"q_proj": (h, h), "k_proj": (kv, h), "v_proj": (kv, h), "o_proj": (h, h)}
    mlp = {"gate_proj": (f, h), "up_proj": (f, h), "down_proj": (h, f)}
    named = {f"self_attn.{name}": shape for name, shape in attention.items()}
    return named | {f"mlp.{name}": shape for name, shape in mlp.items()}


def tensors(whole: dict[str, int]) -> Iterator[tuple[str, tuple[int, ...]]]:
    """Every tensor's name and shape, in the order of the layers."""
    h, vocabulary = whole["hidden_size"], whole["vocab_size"]
    yield "model.embed_tokens.weight", (vocabulary, h)
    for number in range(whole["num_hidden_layers"]):
        for name, shape in layer_shapes(whole).items():
            yield f"model.layers.{number}.{name}.weight", shape
        for name in ("input_layernorm", "post_attention_layernorm"):
            yield f"model.layers.{number}.{name}.weight", (h,)
    yield "model.norm.weight", (h,)
    yield "lm_head.weight", (vocabulary, h)


def make_model(folder: Path, gigabytes: float, shard_bytes: int) -> int:
    """Write a random bfloat16 model; its bytes of weights are returned."""
    folder.mkdir(parents=True)
    whole = config(gigabytes)
    (folder / "config.json").write_text(json.dumps(whole))
    (folder / "tokenizer.json").write_text("{}")
    shards: list[dict[str, tuple[int, ...]]] = [{}]
    filled = 0
    for name, shape in tensors(whole):  # type: ignore[arg-type]
        size = 2 * torch.Size(shape).numel()
        if filled and filled + size > shard_bytes:
            shards.append({})
            filled = 0
        shards[-1][name] = shape
        filled += size
    weight_map, written = {}, 0
    for number, shard in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        weight_map |= dict.fromkeys(shard, file)
        values = {name: values_of(shape, number) for name, shape in shard.items()}
        save_file(values, folder / file, metadata={"format": "pt"})
        written += (folder / file).stat().st_size
    index = {"metadata": {"total_size": written}, "weight_map": weight_map}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return written


def values_of(shape: tuple[int, ...], seed: int) -> torch.Tensor:
    """Random bfloat16 values, one block of them over and over: drawing costs more than merging."""
    torch.manual_seed(seed)
    total = torch.Size(shape).numel()
    block = (torch.randn(min(total, BLOCK_ELEMENTS)) * 0.02).bfloat16()
    return block.repeat(-(-total // len(block)))[:total].view(shape).clone()


def make_adapter(folder: Path, gigabytes: float, r: int = 16) -> None:
    """Write a random float32 LoRA adapter on every linear layer of `make_model`'s."""
    folder.mkdir(parents=True)
    stored: dict[str, torch.Tensor] = {}
    torch.manual_seed(99)
    for name, shape in tensors(config(gigabytes)):  # type: ignore[arg-type]
        if name.split(".")[-2] in TARGETS:
            module = PREFIX + name.removesuffix(".weight")
            stored[f"{module}.lora_A.weight"] = torch.randn(r, shape[1]) * 0.02
            stored[f"{module}.lora_B.weight"] = torch.randn(shape[0], r) * 0.02
    save_file(stored, folder / "adapter_model.safetensors")
    settings = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": r, "lora_alpha": 2 * r}
    settings |= {"target_modules": list(TARGETS), "base_model_name_or_path": None}
    (folder / "adapter_config.json").write_text(json.dumps(settings))
