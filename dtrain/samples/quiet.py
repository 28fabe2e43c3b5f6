"""Keep libraries from drawing bars of their own over ours."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, redirect_stderr

from transformers.utils import logging

from dtrain.core.log import console


@contextmanager
def quiet_transformers() -> Iterator[None]:
    """Switch the bars of transformers off; some of them heed no switch, and would fill a log."""
    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        with nullcontext() if console.is_terminal else redirect_stderr(io.StringIO()):
            yield
    finally:
        if enabled:
            logging.enable_progress_bar()
