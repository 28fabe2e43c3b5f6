"""Memory of one GPU at one moment of a step, and the moments of a micro-batch."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes of one GPU at one moment of a step.

    Attributes:
        weights, gradients, optimizer: present at all times (gradients: until the update).
        gathered: weights of other ranks' shares.
        activations: saved for the backward pass.
        working: what the moment itself needs: logits, a recomputed layer, an update's copies.
        buffers: the engine's buffers for communication.
        moment: loading, teacher, gather (of the first weights), forward, loss, backward or update.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    working: float
    buffers: float
    moment: str

    @property
    def peak(self) -> float:
        """Sum of all terms."""
        return sum(self.terms().values())

    def terms(self) -> dict[str, float]:
        """Bytes by name, in the order in which they are shown."""
        names = ("weights", "gradients", "optimizer", "gathered", "activations")
        return {name: getattr(self, name) for name in (*names, "working", "buffers")}


@dataclass(frozen=True)
class GatherPoint:
    """A point of a micro-batch that could be the peak.

    Attributes:
        phase: first (embeddings are looked up), arrival (a layer's weights are copied), forward,
            loss, backward (inside a layer's MLP) or attention (backward, after the MLP).
        depth: fraction of the decoder layers whose activations are saved.
        gathered: bytes of gathered weights.
    """

    phase: str
    depth: float
    gathered: float


MOMENTS = {"first": "gather", "arrival": "forward", "attention": "backward"}
"""Phases of a `GatherPoint` that have another name as a moment of a `MemoryEstimate`."""
