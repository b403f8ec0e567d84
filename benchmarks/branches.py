"""Models with parallel branches: folded by fxfuse, and by the method that timm has for them.

For each model of timm with a method of its own (``reparameterize`` or ``fuse``): linear operators, norms,
additions and all operators that a run dispatches, for the source, timm's form and fxfuse's; how far either is
from the source in float64; and milliseconds of the three, timed in turn in a random order in every round.
"""

from __future__ import annotations

import argparse
import re
import sys
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from statistics import median
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

import fxfuse
from benchmarks.compiled import timed
from benchmarks.families import build_without_memory, specs
from benchmarks.record import surroundings, write
from fxfuse import zoo
from fxfuse.errors import with_type

COMMAND = "python -m benchmarks.branches"
METHODS = ("reparameterize", "fuse", "switch_to_deploy")
WAYS = ("source", "timm", "fxfuse")
LINEAR = {"convolution", "addmm", "mm", "bmm", "baddbmm"}
ADDING = {"add", "add_", "sub", "sub_"}


class _Calls(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts the operators that run."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.names: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names[func.overloadpacket.__name__] += 1
        return func(*args, **(kwargs or {}))


def has_method(spec: str) -> bool:
    """Whether timm can merge the branches of that model."""
    model = build_without_memory(spec)
    return any(hasattr(module, name) for module in model.modules() for name in METHODS)


def with_branches(pattern: str) -> list[str]:
    """The models of timm that have a method of their own."""
    return [spec for spec in specs("timm:") if re.search(pattern, spec) and has_method(spec)]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """New modules are of that dtype: timm's methods make some."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def forms(model: nn.Module, dtype: torch.dtype) -> dict[str, nn.Module]:
    """The source, what timm makes of it, and what fxfuse does."""
    reparameterize_model: Any = zoo.timm().utils.reparameterize_model
    model = model.to(dtype)
    with default_dtype(dtype):
        return {
            "source": model,
            "timm": reparameterize_model(model, inplace=False).eval(),
            "fxfuse": fxfuse.fuse(model),
        }


@torch.no_grad()
def measure(spec: str, rounds: int) -> dict[str, Any]:
    """Everything about one model."""
    loaded = zoo.load(spec, seed=0)
    assert isinstance(loaded.model, nn.Module) and loaded.inputs is not None
    x = torch.randn(loaded.inputs[0].shape, generator=torch.Generator().manual_seed(0))
    models = forms(loaded.model, torch.float32)
    calls: dict[str, Callable[[Tensor], Tensor]] = dict(models)
    counts = {way: count(model, x) for way, model in models.items()}
    times = timed(calls, x, rounds)
    exact = {way: model(x.double()) for way, model in forms(loaded.model, torch.float64).items()}
    size = exact["source"].abs().amax()
    report = fxfuse.report(models["fxfuse"])
    return {
        "norms": report.norms,
        "folded": len(report.folded),
        "merged": len(report.merged),
        "counts": counts,
        "seconds": times,
        "median": {way: median(taken) for way, taken in times.items()},
        "distance": {way: float((exact[way] - exact["source"]).abs().amax() / size) for way in WAYS},
    }


def count(model: nn.Module, x: Tensor) -> dict[str, int]:
    """What a run dispatches."""
    with _Calls() as calls:
        model(x)
    names = calls.names
    return {
        "linear": sum(names[name] for name in LINEAR),
        "norms": sum(number for name, number in names.items() if "batch_norm" in name),
        "additions": sum(names[name] for name in ADDING),
        "all": sum(names.values()),
    }


def page(record: dict[str, Any]) -> str:
    """The results as a page for the documentation."""
    models = record["models"]
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"]
    more = [name for name, m in models.items() if m["counts"]["fxfuse"]["all"] > m["counts"]["timm"]["all"]]
    slower = [name for name, m in models.items() if m["median"]["fxfuse"] > 1.05 * m["median"]["timm"]]
    text = f"""# Branches

Made by `{record["command"]}` at commit {record["commit"]}: {machine["processor"]}, {machine["cores"]} cores,
{machine["threads"]} threads, {versions}.

{len(models)} models of timm that have a method of their own to merge their branches; random weights and
statistics, one image, float32; medians of {record["rounds"]} rounds, the three in a random order in each. The
numbers in a cell are those of the source, of timm's form and of fxfuse's. *Operators* are all that a run
dispatches, *linear* convolutions and products of matrices. The distances, timm's and fxfuse's, are from the
source, in float64, relative to its largest output.

fxfuse leaves more operators than timm in {_named(more)}; it is more than 5 % slower in {_named(slower)}.

| model | norms | operators | linear | additions | ms | fxfuse / timm | distance |
| --- | --- | --- | --- | --- | --- | --- | --- |
"""
    for name, m in models.items():
        parts = [
            ", ".join(str(m["counts"][way][kind]) for way in WAYS) for kind in ("all", "linear", "additions")
        ]
        cells = [
            name.removeprefix("timm:"),
            f"{m['folded']} of {m['norms']}",
            *parts,
            ", ".join(f"{1000 * m['median'][way]:.1f}" for way in WAYS),
            f"{m['median']['fxfuse'] / m['median']['timm']:.2f}",
            f"{m['distance']['timm']:.0e}, {m['distance']['fxfuse']:.0e}",
        ]
        text += f"| {' | '.join(cells)} |\n"
    for name, reason in record["failures"].items():
        text += f"\n{name} was not measured: {reason}\n"
    return text


def _named(names: list[str]) -> str:
    return f"{len(names)} models: {', '.join(names)}" if names else "no model"


def main() -> None:
    """Measures, prints the page and writes it beside the numbers."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--rounds", type=int, default=9, help="counted calls of each form")
    parser.add_argument("--pattern", default="", help="only models whose names this expression matches")
    parser.add_argument("--dry-run", action="store_true", help="print the page, write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    names = with_branches(options.pattern)
    shown = track(names, description="branches", disable=not sys.stderr.isatty())
    models, failures = {}, {}
    for name in shown:
        try:
            models[name] = measure(name, options.rounds)
        except Exception as error:
            failures[name] = with_type(error)
            print(name, failures[name], file=sys.stderr)
    pattern = f" --pattern '{options.pattern}'" if options.pattern else ""
    record = {
        **surroundings(COMMAND + pattern),
        "rounds": options.rounds,
        "models": models,
        "failures": failures,
    }
    text = page(record)
    print(text)
    if not options.dry_run:
        write("branches", record, text)


if __name__ == "__main__":
    main()
