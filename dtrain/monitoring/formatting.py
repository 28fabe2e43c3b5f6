"""Losses and fingerprints as the report and the summary show them."""

from __future__ import annotations

from jinja2 import Undefined

SAME = 0.0005  # a difference that three decimals do not show


def loss_text(value: object) -> str:
    """A loss with three decimals, or a dash for one that was not measured."""
    return f"{value:.3f}" if isinstance(value, int | float) else "—"


def tone(change: float) -> str:
    """How a change of a loss is to be taken: better, worse or same."""
    if abs(change) < SAME:
        return "same"
    return "better" if change < 0 else "worse"


def short(identity: object) -> str:
    """The first twelve digits of a fingerprint."""
    return "—" if identity is None or isinstance(identity, Undefined) else str(identity)[:12]
