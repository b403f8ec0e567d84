"""How long folding takes, and how much memory: ``fxfuse.fuse`` against ``torch.fx``'s own ``fuse``.

Time is measured with tracing, without the collector of reference cycles running in between: of the first
call of a process, each in a fresh one, as whoever folds a network waits for it; and of further calls, both
tools in one process, in a random order in every round, where memory that the one has freed serves the other.
Medians and ratios. Memory is what the process needs beyond what it had, at its peak, each tool in a fresh
process.
"""

from __future__ import annotations

import argparse
import gc
import multiprocessing
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable
from typing import Any

from rich.progress import track
from torch import nn
from torch.fx.experimental import optimization

import fxfuse
from benchmarks.memory import peak, trimmed
from benchmarks.record import surroundings, write
from fxfuse import zoo

MODELS = (
    *("resnet50", "resnet152", "efficientnet_b7", "regnet_y_32gf"),
    *("efficientnet_b0", "mobilenet_v3_large"),  # many norms, few weights
)
TOOLS: dict[str, Callable[[nn.Module], nn.Module]] = {"fxfuse": fxfuse.fuse, "torch.fx": optimization.fuse}
COMMAND = "python -m benchmarks.pass_time"


Times = dict[str, list[float]]


def timed(tool: Callable[[nn.Module], nn.Module], model: nn.Module) -> float:
    """Seconds of one call."""
    gc.collect()
    gc.disable()
    start = time.perf_counter()
    tool(model)
    taken = time.perf_counter() - start
    gc.enable()
    return taken


def first_time(arguments: tuple[str, str]) -> float:
    """Seconds of the first call of `tool` in this process, on `model`."""
    name, tool = arguments
    warnings.simplefilter("ignore")
    return timed(TOOLS[tool], load(name))


def first_times(name: str, rounds: int) -> Times:
    """Seconds of each tool's first call, each in a process of its own."""
    times: Times = {tool: [] for tool in TOOLS}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        for _ in range(rounds):
            for tool in random.sample(list(TOOLS), len(TOOLS)):
                times[tool].append(pool.apply(first_time, ((name, tool),)))
    return times


def further_times(model: nn.Module, rounds: int) -> Times:
    """Seconds of each call, by tool; a first call of each is not counted."""
    times: Times = {tool: [] for tool in TOOLS}
    for fold in TOOLS.values():
        fold(model)
    for _ in range(rounds):
        for tool in random.sample(list(TOOLS), len(TOOLS)):
            times[tool].append(timed(TOOLS[tool], model))
    return times


def summary(times: Times) -> dict[str, Any]:
    """What `times` come to."""
    medians = {tool: statistics.median(taken) for tool, taken in times.items()}
    return {"seconds": times, "median": medians, "ratio": medians["fxfuse"] / medians["torch.fx"]}


def load(name: str) -> nn.Module:
    """A torchvision model."""
    model = zoo.load(f"torchvision:{name}").model
    assert isinstance(model, nn.Module)
    return model


def peak_memory(arguments: tuple[str, str]) -> float:
    """MiB beyond what the process had before `tool` folded `model`. Linux only."""
    name, tool = arguments
    model = load(name)
    TOOLS[tool](load("resnet18"))  # what is loaded on first use is not counted
    return peak(lambda: TOOLS[tool](model), trimmed())


def folded_megabytes(model: nn.Module) -> tuple[float, float]:
    """MiB of all weights that are folded, and of the largest one."""
    fused = fxfuse.fuse(model)
    names = {name for fold in fxfuse.report(fused).folded for name in fold.into}
    sizes = [sum(p.nbytes for p in fused.get_submodule(name).parameters()) / 2**20 for name in names]
    return sum(sizes), max(sizes)


def measure(name: str, rounds: int) -> dict[str, Any]:
    """Everything about one model."""
    model = load(name)
    first, further = (summary(times) for times in (first_times(name, rounds), further_times(model, rounds)))
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = pool.map(peak_memory, [(name, tool) for tool in TOOLS], chunksize=1)
    weights, layer = folded_megabytes(model)
    return {
        "norms": fxfuse.explain(model).norms,
        "first": first,
        "further": further,
        "peak_mib": dict(zip(TOOLS, peaks, strict=True)),
        "folded_weights_mib": weights,
        "largest_layer_mib": layer,
    }


def told(seconds: list[float]) -> str:
    """Median and quartiles."""
    first, median, third = (f"{1000 * each:.0f}" for each in statistics.quantiles(seconds, n=4))
    return f"{median} ({first}–{third})"


def page(record: dict[str, Any]) -> str:
    """The results as a page for the documentation."""
    rows = [
        [
            name,
            m["norms"],
            *(told(m["first"]["seconds"][tool]) for tool in ("torch.fx", "fxfuse")),
            f"{m['first']['ratio']:.2f}",
            *(told(m["further"]["seconds"][tool]) for tool in ("torch.fx", "fxfuse")),
            f"{m['further']['ratio']:.2f}",
            f"{m['peak_mib']['torch.fx']:.0f} MiB",
            f"{m['peak_mib']['fxfuse']:.0f} MiB",
            f"{m['folded_weights_mib']:.0f} + {m['largest_layer_mib']:.0f} MiB",
        ]
        for name, m in record["models"].items()
    ]
    calls = [
        head for call in ("first", "further") for head in (f"torch.fx, {call}", f"fxfuse, {call}", "ratio")
    ]
    memory = ("torch.fx, peak", "fxfuse, peak", "folded weights + largest layer")
    table = [["model", "norms", *calls, *memory], ["---"] * 11, *rows]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"]
    return f"""# How long the pass takes

Made by `{record["command"]}` at commit {record["commit"]}: {machine["processor"]}, {machine["cores"]} cores,
{machine["threads"]} threads, {versions}.

Milliseconds, medians of {record["rounds"]} calls each and their quartiles, tracing included. *First*: the
first call of a process, each in a process of its own, after all imports. *Further*: calls in one process,
both tools in random order, where memory that was freed can be used again. Memory is the peak beyond what the
process had before, each tool in a process of its own.

""" + "".join(f"| {' | '.join(map(str, row))} |\n" for row in table)


def main() -> None:
    """Measures, prints the page and writes it beside the numbers."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="calls of each tool on each model")
    parser.add_argument("--dry-run", action="store_true", help="print the page, write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    shown = track(MODELS, description="measuring", disable=not sys.stderr.isatty())
    models = {name: measure(name, options.rounds) for name in shown}
    record = {**surroundings(COMMAND), "rounds": options.rounds, "models": models}
    print(page(record))
    if not options.dry_run:
        write("pass_time", record, page(record))


if __name__ == "__main__":
    main()
