"""Models: found, loaded, quantised, given adapters, run on packed rows, saved."""

import logging

# bitsandbytes looks for a kernel that is not needed, and says so at its import, on every rank.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.CRITICAL)
