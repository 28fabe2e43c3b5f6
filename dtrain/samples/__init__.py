"""Small models and data that dtrain builds once, on demand, in its cache folder."""

from __future__ import annotations

from dtrain.samples.make import ensure

__all__ = ["ensure"]
