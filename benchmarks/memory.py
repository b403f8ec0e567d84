"""How much memory something needs beyond what the process has, at its peak. Linux only."""

from __future__ import annotations

import ctypes
import gc
from collections.abc import Callable
from pathlib import Path


def trimmed() -> float:
    """MiB of the process, after what it no longer needs has been given back to the system."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return _resident("VmRSS")


def peak(call: Callable[[], object], before: float) -> float:
    """MiB beyond `before` that the process has at most while `call` runs."""
    Path("/proc/self/clear_refs").write_text("5")  # begins the peak anew
    call()
    return _resident("VmHWM") - before


def _resident(field: str) -> float:
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(field)).split()[1]) / 1024
