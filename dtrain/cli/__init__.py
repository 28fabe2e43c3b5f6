"""The command `dtrain`: one file a verb, nothing but argument handling and printing.

Verbs import what they need when they run, so that help, check and recipes answer without torch.
"""

from __future__ import annotations

from dtrain.cli.root import app, main

__all__ = ["app", "main"]
