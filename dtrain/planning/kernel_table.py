"""The kernels that each known architecture gets, as far as memory depends on them."""

from __future__ import annotations

ADAPTED_LAYERS, NORMS, MLPS, LOSS = "adapted layers", "norms", "MLPs", "chunked loss"
"""Kernels of dtrain/models/kernels that change what is kept for the backward pass.

Adapted layers share one input and recompute it where a norm or an MLP made it; norms keep their
input in its dtype; MLPs keep their two inputs; the loss computes its logits chunk by chunk.
"""

KERNELS_OF_MEMORY = frozenset({ADAPTED_LAYERS, NORMS, MLPS, LOSS})
# The kernels that each architecture gets; a test compares them with what is really patched.
KERNELS: dict[str, frozenset[str]] = {
    "llama": KERNELS_OF_MEMORY,
    "mistral": KERNELS_OF_MEMORY,
    "qwen2": KERNELS_OF_MEMORY,
    "qwen3": KERNELS_OF_MEMORY,
    "gemma": frozenset({ADAPTED_LAYERS, LOSS}),
    "gemma2": frozenset({ADAPTED_LAYERS, LOSS}),
    "gemma3_text": frozenset({ADAPTED_LAYERS, LOSS}),
    "phi3": frozenset({ADAPTED_LAYERS, NORMS, LOSS}),
    "smollm3": KERNELS_OF_MEMORY,
    "granite": KERNELS_OF_MEMORY,
    "qwen3_moe": frozenset({ADAPTED_LAYERS, NORMS, LOSS}),
    "qwen2_moe": KERNELS_OF_MEMORY,
    "mixtral": frozenset({ADAPTED_LAYERS, NORMS, LOSS}),
    "gpt_oss": frozenset({ADAPTED_LAYERS, LOSS}),
    "glm4_moe": KERNELS_OF_MEMORY,
}
