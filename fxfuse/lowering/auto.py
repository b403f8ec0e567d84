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
from fxfuse.lowering.records import Lowering, Timing
from fxfuse.lowering.timing import medians

# Engines that take less than so many times as long as the fastest are timed once more, by themselves.
_CLOSE = 1.15


def fastest(
    folded: nn.Module, inputs: Sequence[Any], dtype: torch.dtype | None, seconds: float, cuda_graphs: bool
) -> Lowered:
    """The fastest of the engines that are installed, for inputs like these.

    Engines are tried in the order of their table, until the time is over; the first is tried in any case.
    """
    started = time.perf_counter()
    ready: dict[str, Lowered] = {}
    untried: list[Timing] = []
    for name, engine in ENGINES.items():
        if engine.missing or not engine.computes_in(dtype):
            continue
        if ready and time.perf_counter() - started > seconds:
            untried.append(Timing(name, math.nan, math.nan, "not tried: the time was over"))
            continue
        ready[name] = lowered(folded, inputs, name, dtype, cuda_graphs)
    if not ready:
        raise UsageError(f"no engine that is installed computes in {dtype}; leave out dtype=...")
    times = times_of(ready, folded, inputs)
    chosen = fastest_of(ready, times)
    told = timings(ready, times)
    chosen.lowering = replace(
        chosen.lowering, seconds=time.perf_counter() - started, timings=(*told, *untried)
    )
    return chosen


def times_of(ready: Mapping[str, Lowered], folded: nn.Module, inputs: Sequence[Any]) -> dict[str, float]:
    """Milliseconds of those that run on an engine, and of `folded`; none of them if none does."""
    calls = {name: partial(each, *inputs) for name, each in ready.items() if not each.lowering.reason}
    if not calls:
        return {}
    with torch.no_grad():
        times = medians(calls | {"folded": partial(folded, *inputs)}, rounds=15)
        least = min(times[name] for name in calls)
        close = {name: call for name, call in calls.items() if times[name] < _CLOSE * least}
        return times | (medians(close, rounds=31) if len(close) > 1 else {})


def fastest_of(ready: Mapping[str, Lowered], times: Mapping[str, float]) -> Lowered:
    """The fastest of those that run on an engine; the first if none does."""
    return min(ready.items(), key=lambda each: times.get(each[0], math.inf))[1]


def timings(ready: Mapping[str, Lowered], times: Mapping[str, float]) -> tuple[Timing, ...]:
    """What is told of these, and of the folded module if it was timed: the fastest first."""
    told = {name: each.lowering for name, each in ready.items()}
    if "folded" in times:
        told["folded"] = Lowering("folded")
    found = [
        Timing(name, times.get(name, math.nan), each.seconds, each.reason) for name, each in told.items()
    ]
    return tuple(sorted(found, key=lambda each: (math.isnan(each.milliseconds), each.milliseconds)))
