"""Merging: an adapter or trained weights into a base's safetensors, one tensor at a time."""

from dtrain.merge.merge import merge

__all__ = ["merge"]
