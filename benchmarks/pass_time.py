"""How long folding takes, and how much memory: ``fxfuse.fuse`` against ``torch.fx``'s own ``fuse``.

Time is measured with tracing, both tools in turn in one process, in a random order in every round,
without the collector of reference cycles running in between; medians and ratios. Memory is what the
process needs beyond what it had, at its peak, each tool in a fresh process.
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

MODELS = ("resnet50", "resnet152", "efficientnet_b7", "regnet_y_32gf")
TOOLS: dict[str, Callable[[nn.Module], nn.Module]] = {"fxfuse": fxfuse.fuse, "torch.fx": optimization.fuse}
COMMAND = "python -m benchmarks.pass_time"


def measure_times(model: nn.Module, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call, by tool; a first call of each is not counted."""
    times: dict[str, list[float]] = {tool: [] for tool in TOOLS}
    for tool in TOOLS.values():
        tool(model)
    for _ in range(rounds):
        for name in random.sample(list(TOOLS), len(TOOLS)):
            gc.collect()
            gc.disable()
            start = time.perf_counter()
            TOOLS[name](model)
            times[name].append(time.perf_counter() - start)
            gc.enable()
    return times


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
    times = measure_times(model, rounds)
    medians = {tool: statistics.median(taken) for tool, taken in times.items()}
    with multiprocessing.get_context("spawn").Pool(1, maxtasksperchild=1) as pool:
        peaks = pool.map(peak_memory, [(name, tool) for tool in TOOLS], chunksize=1)
    weights, layer = folded_megabytes(model)
    return {
        "norms": fxfuse.explain(model).norms,
        "seconds": times,
        "median": medians,
        "ratio": medians["fxfuse"] / medians["torch.fx"],
        "peak_mib": dict(zip(TOOLS, peaks, strict=True)),
        "folded_weights_mib": weights,
        "largest_layer_mib": layer,
    }


def page(record: dict[str, Any]) -> str:
    """The results as a page for the documentation."""
    rows = [
        [
            name,
            m["norms"],
            f"{1000 * m['median']['torch.fx']:.0f} ms",
            f"{1000 * m['median']['fxfuse']:.0f} ms",
            f"{m['ratio']:.2f}",
            f"{m['peak_mib']['torch.fx']:.0f} MiB",
            f"{m['peak_mib']['fxfuse']:.0f} MiB",
            f"{m['folded_weights_mib']:.0f} + {m['largest_layer_mib']:.0f} MiB",
        ]
        for name, m in record["models"].items()
    ]
    heads = ("model", "norms", "torch.fx", "fxfuse", "ratio")
    memory = ("torch.fx, peak", "fxfuse, peak", "folded weights + largest layer")
    table = [[*heads, *memory], ["---"] * 8, *rows]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"]
    return f"""# How long the pass takes

Made by `{record["command"]}` at commit {record["commit"]}: {machine["processor"]}, {machine["cores"]} cores,
{machine["threads"]} threads, {versions}.

Medians of {record["rounds"]} calls each, tracing included, both tools in random order in one process. Memory
is the peak beyond what the process had before, each tool in a process of its own.

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
