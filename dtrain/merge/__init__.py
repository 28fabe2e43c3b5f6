"""Merging: what was trained into a base's safetensors, a block of rows at a time."""
