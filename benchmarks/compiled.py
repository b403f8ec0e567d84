"""What folding before compiling brings: ``backend="fxfuse"`` against Inductor, and Inductor with freezing.

For each model: norms that are folded, seconds of the first call, milliseconds of later ones, what the check
for changed weights costs, and whether the answer is right after the weights have changed.

All are compiled in one process, each a copy of the model. They are timed in turn, in a random order in every
round, with a pause and an uncounted call before each counted one, since threads of the one before may still
spin. Medians and ratios.
"""

from __future__ import annotations

import argparse
import copy
import random
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, nn

import fxfuse
from benchmarks.record import surroundings, write
from fxfuse import zoo
from fxfuse.following import Followers

COMMAND = "python -m benchmarks.compiled"
MODELS = ("torchvision:resnet50", "torchvision:efficientnet_b0", "timm:repvgg_a2")
FREEZING = "inductor, freezing"
# What stands in the table → the arguments of torch.compile; None: not compiled.
WAYS: dict[str, dict[str, Any] | None] = {
    "eager": None,
    "inductor": {"backend": "inductor"},
    FREEZING: {"backend": "inductor", "options": {"freezing": True}},
    "fxfuse": {"backend": "fxfuse"},
    "fxfuse, always": {"backend": "fxfuse", "options": {"refold": "always"}},
}
PAUSE = 0.05  # seconds
# A change of weights after which a compiled model is stale, if its answer is this far from the source's.
STALE = 1e-3
Call = Callable[[Tensor], Tensor]


def compiled(model: nn.Module, way: dict[str, Any] | None) -> Call:
    """A copy of `model`, compiled in that way."""
    return model if way is None else torch.compile(model, **way)


@contextmanager
def checks() -> Iterator[list[float]]:
    """Seconds of every check for changed weights that is made meanwhile."""
    original, spent = Followers.follow, list[float]()

    def follow(self: Followers, inputs: Any) -> Any:
        start = time.perf_counter()
        result = original(self, inputs)
        spent.append(time.perf_counter() - start)
        return result

    Followers.follow = follow  # type: ignore[method-assign]
    try:
        yield spent
    finally:
        Followers.follow = original  # type: ignore[method-assign]


def timed(calls: dict[str, Call], x: Tensor, rounds: int) -> dict[str, list[float]]:
    """Seconds of each call."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for _ in range(rounds):
        for name in random.sample(list(calls), len(calls)):
            time.sleep(PAUSE)
            calls[name](x)
            start = time.perf_counter()
            calls[name](x)
            times[name].append(time.perf_counter() - start)
    return times


def distance(one: Tensor, other: Tensor) -> float:
    """Relative L2."""
    return float((one - other).norm() / other.norm())


@torch.no_grad()
def change(model: nn.Module) -> None:
    """What an epoch of training does to each weight and statistic, in place, exaggerated."""
    generator = torch.Generator().manual_seed(1)
    for tensor in (*model.parameters(), *model.buffers()):
        if tensor.is_floating_point():
            tensor.mul_(1 + 0.2 * torch.rand(tensor.shape, generator=generator))


@torch.no_grad()
def measure(name: str, rounds: int, batch: int, step: Callable[[str], None]) -> dict[str, Any]:
    """Everything about one model."""
    torch.compiler.reset()
    loaded = zoo.load(name)
    source = loaded.model
    assert isinstance(source, nn.Module) and loaded.inputs is not None
    x = torch.randn(batch, *loaded.inputs[0].shape[1:], generator=torch.Generator().manual_seed(0))
    models = {way: copy.deepcopy(source) for way in WAYS}
    calls = {way: compiled(models[way], options) for way, options in WAYS.items()}
    first: dict[str, float] = {}
    with checks() as spent:
        for way, call in calls.items():
            step(f"{name}: {way}")
            # Dynamo asks this setting too, and does not see `options`.
            with torch._inductor.config.patch(freezing=way == FREEZING):
                start = time.perf_counter()
                call(x)
                first[way] = time.perf_counter() - start
        step(f"{name}: timing")
        times = timed(calls, x, rounds)
    medians = {way: statistics.median(taken) for way, taken in times.items()}
    before = {way: distance(call(x), source(x)) for way, call in calls.items()}
    for model in (source, *models.values()):
        change(model)
    after = {way: distance(call(x), source(x)) for way, call in calls.items()}
    report = fxfuse.report(calls["fxfuse"])  # type: ignore[arg-type]
    return {
        "norms": report.norms,
        "folded": len(report.folded),
        "seconds": times,
        "first_call_seconds": first,
        "median": medians,
        "speed": {way: medians["eager"] / median for way, median in medians.items()},
        "check_seconds": statistics.median(spent),
        "check_share": statistics.median(spent) / medians["fxfuse"],
        "error": before,
        "error_after_a_change": after,
        "stale": [way for way, error in after.items() if error > STALE],
    }


def page(record: dict[str, Any]) -> str:
    """The results as a page for the documentation."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"]
    text = f"""# Folding before compiling

Made by `{record["command"]}` at commit {record["commit"]}: {machine["processor"]}, {machine["cores"]} cores,
{machine["threads"]} threads, {versions}.

Batch {record["batch"]}, float32; medians of {record["rounds"]} rounds, all in random order in one process.
*inductor, freezing* is `torch.compile(model)` under `torch._inductor.config.freezing`, *fxfuse* is
`torch.compile(model, backend="fxfuse")`, which has Inductor compile the folded graph, *fxfuse, always* the
same with `options={{"refold": "always"}}`. The errors are relative L2 distances from what the eager model
gives: before, and after all weights and statistics were changed in place.
"""
    for name, m in record["models"].items():
        text += f"""
## {name}

{m["folded"]} of {m["norms"]} norms folded. The check whether weights have changed takes
{1e6 * m["check_seconds"]:.0f} µs, {100 * m["check_share"]:.2f} % of a call.

| | first call | later calls | speed, eager = 1 | error | error after a change |
| --- | --- | --- | --- | --- | --- |
"""
        for way in WAYS:
            cells = [
                way,
                f"{m['first_call_seconds'][way]:.1f} s",
                f"{1000 * m['median'][way]:.1f} ms",
                f"{m['speed'][way]:.2f}",
                f"{m['error'][way]:.1e}",
                f"{m['error_after_a_change'][way]:.1e}" + " **stale**" * (way in m["stale"]),
            ]
            text += f"| {' | '.join(cells)} |\n"
    return text


def main() -> None:
    """Measures, prints the page and writes it beside the numbers."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="counted calls of each way")
    parser.add_argument("--batch", type=int, default=1, help="images in a call")
    parser.add_argument("--model", action="append", help="torchvision:NAME or timm:NAME, once for each")
    parser.add_argument("--dry-run", action="store_true", help="print the page, write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    torch._dynamo.config.recompile_limit = 64  # the copies of a model share their code
    torch._inductor.config.force_disable_caches = True  # a first call is one
    names = options.model or MODELS
    with Progress(disable=not sys.stderr.isatty()) as bar:
        task = bar.add_task("", total=len(names) * (len(WAYS) + 1))
        models = {
            name: measure(
                name,
                options.rounds,
                options.batch,
                lambda what: bar.update(task, advance=1, description=what),
            )
            for name in names
        }
    record = {**surroundings(COMMAND), "rounds": options.rounds, "batch": options.batch, "models": models}
    text = page(record)
    print(text)
    if not options.dry_run:
        write("compiled", record, text)


if __name__ == "__main__":
    main()
