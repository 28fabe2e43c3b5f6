"""What the driver tells of a node's GPUs, without torch."""

from __future__ import annotations

import shutil
import subprocess

FIELDS = ("index", "name", "memory.total", "memory.used", "ecc.errors.uncorrected.volatile.total")


def gpus() -> list[dict[str, str]] | None:
    """What nvidia-smi tells of each GPU of this job; None where there is no nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    query = ["nvidia-smi", f"--query-gpu={','.join(FIELDS)}", "--format=csv,noheader,nounits"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=20, check=True)
    except (OSError, subprocess.SubprocessError) as error:
        return [{"problem": f"nvidia-smi failed: {error}"}]
    lines = [line.split(", ") for line in done.stdout.strip().splitlines()]
    return [dict(zip(FIELDS, line, strict=False)) for line in lines]
