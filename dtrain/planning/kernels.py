"""Which of dtrain's kernels (dtrain/models/kernels) stand in which architecture; a test compares.

They keep less: adapted layers share one input and make it anew where a norm or an MLP made it,
norms keep what they normalise, MLPs their two inputs, and logits live a chunk at a time.
"""

from __future__ import annotations

LAYERS, NORMS, MLPS, LOSS = "adapted layers", "norms", "MLPs", "chunked loss"

CHUNK_BYTES = 1 << 28  # of float32 logits; dtrain/models/kernels/head.py

_MOST = frozenset({LAYERS, NORMS, MLPS})
KERNELS: dict[str, frozenset[str]] = {
    "llama": _MOST | {LOSS},
    "mistral": _MOST,
    "qwen2": _MOST,
    "qwen3": _MOST,
    "gemma": frozenset({LAYERS}),
    "gemma2": frozenset({LAYERS}),
    "gemma3_text": frozenset({LAYERS}),
    "phi3": frozenset({LAYERS, NORMS}),
    "smollm3": _MOST,
    "granite": _MOST,
}
