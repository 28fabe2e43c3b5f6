"""Format bytes, counts and durations for people."""

from __future__ import annotations

import time


def size(number_of_bytes: float) -> str:
    """12_345_678 → '12.3 MB' (decimal units)."""
    for unit in ("B", "kB", "MB", "GB"):
        if abs(number_of_bytes) < 1000:
            return f"{number_of_bytes:.3g} {unit}" if unit != "B" else f"{number_of_bytes:.0f} B"
        number_of_bytes /= 1000
    return f"{number_of_bytes:.3g} TB"


def count(number: float) -> str:
    """12_345_678 → '12.3M'."""
    for unit in ("", "k", "M"):
        if abs(number) < 1000:
            return f"{number:.0f}" if not unit else f"{number:.3g}{unit}"
        number /= 1000
    return f"{number:.3g}B"


def duration(seconds: float) -> str:
    """3_725 → '1 h 02 min'."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def local_time(seconds: float) -> str:
    """Seconds since 1970 → '2026-05-17 09:30', in this machine's time zone."""
    return time.strftime("%Y-%m-%d %H:%M", time.localtime(seconds))
