"""Times of functions side by side, so that none pays for another.

An engine's threads go on spinning for a while after a call, and who comes next on these cores pays for that.
So the order is drawn anew in every round, each function waits until the others' threads are asleep, and its
first call of a round is not counted.
"""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

_PAUSE = 0.05  # seconds until threads sleep


def samples(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int = 7,
    seconds: float = 10.0,
    pause: float = _PAUSE,
) -> dict[str, list[float]]:
    """Milliseconds of calls, by function: one for each round, of which there are fewer if they take longer.

    Args:
        functions: what to call.
        rounds: how often each is timed.
        seconds: after which no round begins; three are made in any case.
        pause: before each, and before its uncounted call; functions that share their threads need neither.
    """
    order = [*functions]
    found: dict[str, list[float]] = {name: [] for name in functions}
    draw = random.Random(0)
    started = time.perf_counter()
    for number in range(rounds):
        if number >= 3 and time.perf_counter() - started > seconds:
            break
        draw.shuffle(order)
        for name in order:
            if pause:
                time.sleep(pause)
                functions[name]()
                _wait()
            begun = time.perf_counter()
            functions[name]()
            _wait()
            found[name].append(1e3 * (time.perf_counter() - begun))
    return found


def _wait() -> None:
    """Until GPUs that are in use have done all that they were given."""
    if torch.cuda.is_initialized():  # type: ignore[no-untyped-call]
        for device in range(torch.cuda.device_count()):
            torch.cuda.synchronize(device)


def medians(
    functions: Mapping[str, Callable[[], Any]],
    rounds: int = 7,
    seconds: float = 10.0,
    pause: float = _PAUSE,
) -> dict[str, float]:
    """The median time of each, in milliseconds; see `samples`."""
    found = samples(functions, rounds, seconds, pause)
    return {name: statistics.median(times) for name, times in found.items()}
