"""The speeds of inference as a page and pictures."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import matplotlib as mpl
from matplotlib.figure import Figure

from benchmarks.pages import table

Record = dict[str, Any]
AUTO = "fxfuse, auto"
OWN = "fxfuse, torch"
# What the engine "torch" is held against, and what "auto" is.
TORCHS = ("eager", "eager, channels_last", "torch.fx", "inductor", "inductor, freezing")
RUNTIMES = ("onnxruntime", "openvino")
PEERS = (*TORCHS, *RUNTIMES)
BEHIND = ("eager", "eager, channels_last", "inductor", "inductor, freezing", *RUNTIMES)
COLUMNS = (OWN, AUTO, *PEERS)
BRANCHES = ("repvgg", "mobileone", "fastvit", "repvit")


def median(cell: Record, way: str) -> float | None:
    """Milliseconds; None if it did not run, or was wrong."""
    found: float | None = cell["ways"].get(way, {}).get("median")
    return found


def best(cell: Record, ways: tuple[str, ...]) -> float:
    """The time of the fastest of them; NaN if none ran."""
    return min((each for way in ways if (each := median(cell, way)) is not None), default=math.nan)


def page(record: Record) -> str:
    """The results as a page for the documentation."""
    cells: Mapping[str, Record] = record["models"]
    made = next(iter(cells.values()))["made"]
    versions = ", ".join(f"{name} {version}" for name, version in made["versions"].items())
    machine = made["machine"]
    batches = sorted({cell["batch"] for cell in cells.values()})
    instructions = record["instructions"]
    text = f"""# How fast inference is, with {instructions}

Made by `{record["command"]}`, each batch at the commit that its section names: {machine["processor"]},
{machine["cores"]} cores, {machine["threads"]} threads, {versions}.

Milliseconds of a call, medians, float32, default allocator. All ways of a row ran in one process, in an order
drawn anew in every round, each after a pause and an uncounted call; the machine is shared and noisy, so
compare within a row only. Every output was compared with a float64 run of the source before; what differed is
not timed. *fxfuse, torch* is `fxfuse.lower(folded, (x,))`; *fxfuse, auto* is the engine that `engine="auto"`
chose, named in its column: its time is that engine's. *Floor*: the sum of the least times of all
convolutions and linear layers, each by itself on the fastest of torch's kernels, with what a call costs
(`benchmarks/floor.py`). *Behind fxfuse*: what `fxfuse.fuse` gave, in the same compiler or runtime.
[What was to be reached](#what-was-to-be-reached) is at the end.
"""
    for batch in batches:
        rows = {key: cell for key, cell in cells.items() if cell["batch"] == batch}
        commits = ", ".join(sorted({cell["made"]["commit"] for cell in rows.values()}))
        text += f"""
## Batch {batch}

At {commits}.

![Speed relative to eager](inference-{instructions.lower()}-{batch}.svg)

{table(_times(rows))}
{table(_ratios(rows))}
### How close to the floor: the floor over the time

{table(_floors(rows))}
### Each peer behind fxfuse: its speed alone = 1

{table(_behind(rows))}
### Until ready, seconds

{table(_ready(rows))}
### Memory at its peak, MiB: until ready / in a call

Beyond what the process had before, with weights that were packed or copied; the first use of a package counts
too. Compilers that Inductor starts are processes of their own and not in it.

{table(_memory(rows))}
### Spread: half the interquartile range, % of the median

{table(_spread(rows))}
### bfloat16: speed, *fxfuse, torch* in float32 = 1, and error against float64

{table(_bfloat16(rows))}"""
        failures = [
            f"- `{cell['name']}`, {way}: {found['failed']}\n"
            for cell in rows.values()
            for way, found in cell["ways"].items()
            if "failed" in found
        ]
        wrong = [
            f"- `{cell['name']}`, {way}: relative error {found['error']:.1e}\n"
            for cell in rows.values()
            for way, found in cell["ways"].items()
            if "error" in found and "median" not in found
        ]
        text += f"\n### What did not run\n\n{''.join(failures) or 'Nothing.'}\n" if failures else ""
        text += f"\n### What was wrong, and not timed\n\n{''.join(wrong)}\n" if wrong else ""
    return f"""{text}
## What was to be reached

A number in brackets is a speed, that of the other = 1, so that less than 1 is slower; where it is about the
time until ready, it is how many times shorter that is. `resnet18 × 8` is resnet18 with eight images.

{table(_targets(cells))}"""


def _name(cell: Record) -> str:
    return str(cell["name"]).partition(":")[2]


def _times(cells: Mapping[str, Record]) -> Iterator[list[object]]:
    yield ["model", *COLUMNS]
    for cell in cells.values():
        times = [median(cell, way) for way in COLUMNS]
        fastest = min(each for each in times if each is not None)
        shown = [
            "-" if each is None else f"**{each:.3g}**" if each == fastest else f"{each:.3g}" for each in times
        ]
        shown[COLUMNS.index(AUTO)] += f" ({cell['ways'][AUTO].get('chosen', '')})"
        yield [_name(cell), *shown]


def _ratios(cells: Mapping[str, Record]) -> Iterator[list[object]]:
    yield [
        "model",
        "torch, best of torch's own = 1",
        "torch, best of the runtimes = 1",
        "auto, best peer alone = 1",
    ]
    kept: list[list[float]] = []
    for cell in cells.values():
        own, auto = median(cell, OWN), median(cell, AUTO)
        if own is None or auto is None:
            yield [_name(cell), "-", "-", "-"]
            continue
        ratios = [best(cell, TORCHS) / own, best(cell, RUNTIMES) / own, best(cell, PEERS) / auto]
        if not any(map(math.isnan, ratios)):
            kept.append(ratios)
        yield [_name(cell), *(f"{ratio:.2f}" for ratio in ratios)]
    if kept:
        means = [statistics.geometric_mean(column) for column in zip(*kept, strict=True)]
        yield ["*geometric mean*", *(f"{mean:.2f}" for mean in means)]


def _behind(cells: Mapping[str, Record]) -> Iterator[list[object]]:
    yield ["model", *BEHIND]
    for cell in cells.values():
        yield [_name(cell), *(_speed(median(cell, way), median(cell, f"fxfuse, {way}")) for way in BEHIND)]


def _ready(cells: Mapping[str, Record]) -> Iterator[list[object]]:
    ways = (*PEERS, OWN)
    yield ["model", "fxfuse.fuse", *ways]
    for cell in cells.values():
        seconds = (cell["ways"].get(way, {}).get("ready_seconds") for way in ways)
        yield [
            _name(cell),
            f"{cell['fold_seconds']:.2g}",
            *("-" if each is None else f"{each:.2g}" for each in seconds),
        ]


def _bfloat16(cells: Mapping[str, Record]) -> Iterator[list[object]]:
    ways = [f"fxfuse, {engine}, bfloat16" for engine in ("torch", "openvino")]
    yield ["model", *(part for way in ways for part in (way, "error"))]
    for cell in cells.values():
        parts: list[object] = []
        for way in ways:
            error = cell["ways"][way].get("error")
            parts += [_speed(median(cell, OWN), median(cell, way)), "-" if error is None else f"{error:.1e}"]
        yield [_name(cell), *parts]


def _targets(cells: Mapping[str, Record]) -> Iterator[list[object]]:
    """The targets, how many cells meet each, and those that do not."""
    yield ["target", "met in", "missed by"]
    rest = [cell for cell in cells.values() if median(cell, OWN) is not None]
    branches = [cell for cell in rest if _name(cell).startswith(BRANCHES)]
    yield _target(
        "*fxfuse, torch*: no slower than the best of torch's own",
        {_key(cell): best(cell, TORCHS) / (median(cell, OWN) or math.nan) for cell in rest},
        1.0,
    )
    ready = {
        _key(cell): cell["ways"]["inductor"]["ready_seconds"] / cell["ways"][OWN]["ready_seconds"]
        for cell in rest
        if "ready_seconds" in cell["ways"].get("inductor", {})
    }
    yield _target("*fxfuse, torch*: ready in a tenth of Inductor's time", ready, 10)
    near = {_key(cell): best(cell, RUNTIMES) / (median(cell, OWN) or math.nan) for cell in rest}
    mean = statistics.geometric_mean(near.values())
    yield _target(
        f"*fxfuse, torch*: 0.8 of the better runtime (geometric mean {mean:.2f}, wanted: 0.9)", near, 0.8
    )
    auto = {_key(cell): best(cell, PEERS) / (median(cell, AUTO) or math.nan) for cell in rest}
    yield _target("*fxfuse, auto*: no slower than the best peer alone, but for 3 %", auto, 0.97)
    yield _target(
        "*fxfuse, auto*: 1.15 of the best peer on networks of branches",
        {_key(cell): auto[_key(cell)] for cell in branches},
        1.15,
    )
    behind = {
        f"{_key(cell)} {way}": alone / after
        for cell in cells.values()
        for way in BEHIND
        if (alone := median(cell, way)) and (after := median(cell, f"fxfuse, {way}"))
    }
    yield _target("each peer behind fxfuse: no slower than alone, but for 3 %", behind, 0.97)


def _target(told: str, ratios: Mapping[str, float], least: float) -> list[object]:
    missed = [f"{key} ({ratio:.2f})" for key, ratio in ratios.items() if not ratio >= least]
    return [told, f"{len(ratios) - len(missed)} of {len(ratios)}", ", ".join(missed) or "none"]


def _key(cell: Record) -> str:
    return f"{_name(cell)} × {cell['batch']}"


def _floors(cells: Mapping[str, Record]) -> Iterator[list[object]]:
    yield ["model", "floor, ms", *COLUMNS]
    for cell in cells.values():
        least = cell.get("floor")
        shown = f"{least:.3g}" if least else "-"
        yield [_name(cell), shown, *(_speed(least, median(cell, way)) for way in COLUMNS)]


def _memory(cells: Mapping[str, Record]) -> Iterator[list[object]]:
    ways = (*PEERS, OWN)
    yield ["model", *ways]
    for cell in cells.values():
        known = (cell["ways"].get(way, {}).get("megabytes") for way in ways)
        yield [_name(cell), *(f"{each['ready']:.0f} / {each['call']:.0f}" if each else "-" for each in known)]


def _spread(cells: Mapping[str, Record]) -> Iterator[list[object]]:
    ways = (*PEERS, OWN)
    yield ["model", *ways]
    for cell in cells.values():
        known = [cell["ways"].get(way, {}).get("milliseconds") for way in ways]
        yield [_name(cell), *("-" if times is None else f"{_half_range(times):.1f}" for times in known)]


def _half_range(times: list[float]) -> float:
    low, middle, high = statistics.quantiles(times, n=4)
    return 50 * (high - low) / middle


def _speed(one: float | None, other: float | None) -> str:
    return "-" if one is None or other is None else f"{one / other:.2f}"


def picture(record: Record, batch: int, file: Path) -> None:
    """Draws the speed of each way, relative to eager."""
    cells = [cell for cell in record["models"].values() if cell["batch"] == batch]
    shown = {
        "torch.fx": "#999999",
        "inductor, freezing": "#E69F00",
        "onnxruntime": "#56B4E9",
        "openvino": "#009E73",
        OWN: "#0072B2",
        AUTO: "#D55E00",
    }
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "inference", "font.size": 9})
    figure = Figure(figsize=(7.5, 0.62 * len(cells) + 1.2), layout="constrained")
    axes = figure.subplots()
    height = 0.8 / len(shown)
    for number, (way, colour) in enumerate(shown.items()):
        speeds = []
        for cell in cells:
            eager, own = median(cell, "eager"), median(cell, way)
            speeds.append(0.0 if eager is None or own is None else eager / own)
        places = [row + (number - (len(shown) - 1) / 2) * height for row in range(len(cells))]
        axes.barh(places, speeds, height=0.9 * height, color=colour, label=way)
    axes.axvline(1, color="0.4", linewidth=0.8)
    axes.set_yticks(range(len(cells)), [_name(cell) for cell in cells])
    axes.set(ylim=(len(cells) - 0.5, -0.5), xlabel=f"speed, eager = 1 (batch {batch}, float32)")
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", color="0.85")
    axes.set_axisbelow(True)
    figure.legend(loc="outside upper center", ncols=3, frameon=False)
    figure.savefig(file, metadata={"Date": None} if file.suffix == ".svg" else None, dpi=110)
