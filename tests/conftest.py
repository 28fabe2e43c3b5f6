"""What every test needs: no network, no display, as many threads as a shared machine bears."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hypothesis import settings

from dtrain.core import known_hashes

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# The same examples every time, and no time limit on a busy machine.
settings.register_profile("dtrain", deadline=None, derandomize=True, database=None)
settings.load_profile("dtrain")


@pytest.fixture(scope="session", autouse=True)
def _hashes(tmp_path_factory: pytest.TempPathFactory) -> None:
    """Hashes of files that are gone tomorrow do not stay in the user's cache."""
    folder: Path = tmp_path_factory.mktemp("hashes")
    known_hashes._folder = lambda: folder  # type: ignore[assignment]
