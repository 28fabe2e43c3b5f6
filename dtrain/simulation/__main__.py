"""Start of the child process of `dtrain plan`: its imports are most of its time."""

from __future__ import annotations

from dtrain.core.lazy_import import import_fast

if __name__ == "__main__":
    import_fast("dtrain.simulation.child").main()
