"""The small real model and the data that dtrain makes on the spot, once, in its cache folder."""

from __future__ import annotations

from dtrain.samples.make import ensure

__all__ = ["ensure"]
