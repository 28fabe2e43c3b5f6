"""The `dtrain` command: one file per group of subcommands, only argument handling and printing.

Subcommands import what they need when they run, so that help, check and recipes work without torch.
"""

from __future__ import annotations

from dtrain.cli.root import app, main

__all__ = ["app", "main"]
