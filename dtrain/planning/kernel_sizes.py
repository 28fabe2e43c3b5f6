"""Which of dtrain's kernels (dtrain/models/kernels) stand in which architecture; a test compares.

They keep less: adapted layers share one input and make it anew where a norm or an MLP made it,
norms keep what they normalise, MLPs their two inputs, and logits live a chunk at a time.
"""

from __future__ import annotations

LAYERS, NORMS, MLPS, LOSS = "adapted layers", "norms", "MLPs", "chunked loss"

CHUNK_BYTES = 1 << 28  # of float32 logits; each chunk reads the whole output matrix


def chunk_rows(vocabulary: int) -> int:
    """Rows of logits at once: as matrix products of a GPU like them, the same on every rank."""
    most = CHUNK_BYTES // (4 * vocabulary)
    multiple = next((n for n in (256, 128) if n <= most), 1)
    return max(1, most - most % multiple)


_ALL = frozenset({LAYERS, NORMS, MLPS, LOSS})
KERNELS: dict[str, frozenset[str]] = {
    "llama": _ALL,
    "mistral": _ALL,
    "qwen2": _ALL,
    "qwen3": _ALL,
    "gemma": frozenset({LAYERS, LOSS}),
    "gemma2": frozenset({LAYERS, LOSS}),
    "gemma3_text": frozenset({LAYERS, LOSS}),
    "phi3": frozenset({LAYERS, NORMS, LOSS}),
    "smollm3": _ALL,
    "granite": _ALL,
}
