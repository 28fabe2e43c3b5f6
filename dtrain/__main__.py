"""The command `dtrain`, also `python -m dtrain`."""

import signal
import sys
from typing import Any

from dtrain.core.interrupts import end_on_interrupt
from dtrain.core.lazy_import import LazyModule

cli: Any = LazyModule("dtrain.cli")


def main() -> int:
    """Run the command line; return its exit status. Ctrl-C ends the imports without a traceback."""
    handler = signal.getsignal(signal.SIGINT)
    end_on_interrupt()
    run = cli.main
    signal.signal(signal.SIGINT, handler)
    status: int = run()
    return status


if __name__ == "__main__":
    sys.exit(main())
