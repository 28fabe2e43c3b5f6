"""What every test needs: no network, no display, as many threads as a shared machine bears."""

from __future__ import annotations

import os

from hypothesis import settings

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["MPLBACKEND"] = "Agg"

# The same examples every time, and no time limit on a busy machine.
settings.register_profile("dtrain", deadline=None, derandomize=True, database=None)
settings.load_profile("dtrain")
