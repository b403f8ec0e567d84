"""The engine "auto": those that are installed are timed on the example inputs, and the fastest is taken."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import nn

from fxfuse.errors import UsageError
from fxfuse.lowering.engines import ENGINES
from fxfuse.lowering.lowered import Lowered, lowered
from fxfuse.lowering.records import Timing
from fxfuse.lowering.timing import medians


def fastest(
    folded: nn.Module, inputs: Sequence[Any], dtype: torch.dtype | None, seconds: float, cuda_graphs: bool
) -> Lowered:
    """The fastest of the engines that are installed, for inputs like these.

    Engines are tried in the order of their table, until the time is over; the first is tried in any case.
    """
    started = time.perf_counter()
    ready: dict[str, Lowered] = {}
    timings: list[Timing] = []
    for name, engine in ENGINES.items():
        if engine.missing or (dtype is not None and dtype not in engine.dtypes):
            continue
        if timings and time.perf_counter() - started > seconds:
            timings.append(Timing(name, math.nan, math.nan, "not tried: the time was over"))
            continue
        candidate = lowered(folded, inputs, name, dtype, cuda_graphs)
        ready[name] = candidate
        timings.append(Timing(name, math.nan, candidate.lowering.seconds, candidate.lowering.reason))
    if not ready:
        raise UsageError(f"no engine that is installed computes in {dtype}; leave out dtype=...")
    chosen, times = fastest_of(ready, folded, inputs)
    timings = [replace(each, milliseconds=times.get(each.engine, math.nan)) for each in timings]
    if times:
        timings.append(Timing("folded", times["folded"], 0.0))
    timings.sort(key=lambda each: (math.isnan(each.milliseconds), each.milliseconds))
    chosen.lowering = replace(chosen.lowering, seconds=time.perf_counter() - started, timings=tuple(timings))
    return chosen


def fastest_of(
    ready: Mapping[str, Lowered], folded: nn.Module, inputs: Sequence[Any]
) -> tuple[Lowered, dict[str, float]]:
    """The fastest of some, the first if no engine runs; and the times of those that run, and of `folded`."""
    running = {name: each for name, each in ready.items() if not each.lowering.reason}
    if not running:
        return next(iter(ready.values())), {}
    with torch.no_grad():
        calls = {name: partial(each, *inputs) for name, each in running.items()}
        times = medians(calls | {"folded": partial(folded, *inputs)}, rounds=15)
    return running[min(running, key=times.__getitem__)], times
