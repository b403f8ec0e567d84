"""Whether wrong folds are found, and right ones left in peace.

A wrong fold is planted in one layer of a network, a different kind and place each time. Planted in the
arithmetic, it has to be undone and named by the check of each fold; planted behind that check, in the
rewriter, it has to be found by ``fuse`` with example inputs, and named by ``bisect`` on the model in float64,
where a fold may change the largest output by 1e-9. And right folds of many networks, in three dtypes, have to
pass. The norms have the statistics of what they get, disturbed, as in a trained network: with any others some
layers would do next to nothing to the output.
"""

from __future__ import annotations

import argparse
import random
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from rich.progress import track
from torch import Tensor, nn

import fxfuse
from benchmarks.families import settle
from benchmarks.record import surroundings, write
from fxfuse import pipeline, rewrite, solve, zoo
from fxfuse.fold import Absorption, absorb

COMMAND = "python -m benchmarks.trust"
MODELS = ("torchvision:resnet50", "torchvision:mobilenet_v2", "torchvision:efficientnet_b0")
RIGHT = (
    *(*MODELS, "torchvision:resnet18", "torchvision:regnet_y_400mf", "torchvision:shufflenet_v2_x1_0"),
    *("torchvision:mnasnet0_5", "torchvision:densenet121", "timm:regnety_002", "timm:mobilenetv3_small_050"),
)
DTYPES = (torch.float32, torch.bfloat16, torch.float16)
SIZE = (8, 3, 64, 64)  # in a batch few channels are zero behind all activations, where no mistake shows
Mistake = Callable[[Absorption, Tensor, Tensor, random.Random], tuple[Tensor, Tensor]]


def _one_channel(_: Absorption, weight: Tensor, bias: Tensor, draw: random.Random) -> tuple[Tensor, Tensor]:
    changed = weight.clone()
    changed[draw.randrange(len(weight))] *= 1.05
    return changed, bias


def _swapped(_: Absorption, weight: Tensor, bias: Tensor, draw: random.Random) -> tuple[Tensor, Tensor]:
    one, other = draw.sample(range(len(weight)), 2)
    order = list(range(len(weight)))
    order[one], order[other] = other, one
    return weight[order], bias


def _old_channel(
    what: Absorption, weight: Tensor, bias: Tensor, draw: random.Random
) -> tuple[Tensor, Tensor]:
    changed = weight.clone()
    channel = draw.randrange(len(weight))
    changed[channel] = what.weight[channel]
    return changed, bias


def _no_eps(what: Absorption, weight: Tensor, bias: Tensor, _: random.Random) -> tuple[Tensor, Tensor]:
    factor = 1 + 0.5e-5 * what.after.scale.square()  # type: ignore[union-attr]
    return (weight.double() * factor.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype), bias


def _shifted(_: Absorption, weight: Tensor, bias: Tensor, draw: random.Random) -> tuple[Tensor, Tensor]:
    changed = bias.clone()
    changed[draw.randrange(len(bias))] += 0.05 * bias.abs().max()
    return weight, changed


MISTAKES: dict[str, Mistake] = {
    "one channel 5 % off": _one_channel,
    "two channels swapped": _swapped,
    "one channel not scaled": _old_channel,
    "ε forgotten": _no_eps,
    "β − μ·s: sign of μ": lambda what, weight, bias, _: (weight, 2 * what.after.shift.abs().to(bias) - bias),  # type: ignore[union-attr]
    "one bias shifted": _shifted,
    "no bias": lambda _, weight, bias, __: (weight, torch.zeros_like(bias)),
    "weight not scaled": lambda what, _, bias, __: (what.weight.detach().clone(), bias),
    "scaled twice": lambda what, weight, bias, _: (
        (weight.double() * what.after.scale.view(-1, *[1] * (weight.dim() - 1))).to(weight.dtype),  # type: ignore[union-attr]
        bias,
    ),
    "channels reversed": lambda _, weight, bias, __: (weight.flip(0), bias.flip(0)),
}


@contextmanager
def in_the_arithmetic(weight: Tensor, mistake: Mistake, seed: int) -> Iterator[None]:
    """A mistake in the fold into the operator with that weight."""
    right = absorb

    def wrong(what: Absorption) -> Any:
        folded = right(what)
        if what.weight.shape == weight.shape and torch.equal(what.weight.to(weight.dtype), weight):
            assert isinstance(folded, tuple)
            return mistake(what, *folded, random.Random(seed))
        return folded

    with mock.patch.object(solve, "absorb", wrong):
        yield


@contextmanager
def in_the_rewriter(norm: str, mistake: Mistake, seed: int) -> Iterator[None]:
    """A mistake in the fold of that norm, after it has been tried out."""
    right = rewrite.rewrite

    def wrong(captured: Any, plan: Any, solution: Any, reader: Any) -> Any:
        for node in {site.node for move in plan.moves if move.name == norm for site in move.sites}:
            weight, bias = (tensor.detach() for tensor in solution.tensors[node])
            changed = mistake(solution.absorptions[node], weight, bias, random.Random(seed))
            solution.tensors[node] = tuple(nn.Parameter(tensor) for tensor in changed)
        return right(captured, plan, solution, reader)

    with mock.patch.object(pipeline, "rewrite", wrong):
        yield


def plant(name: str, fold: fxfuse.Fold, kind: str, number: int) -> dict[str, Any]:
    """Plants one mistake in both places, and tells how it was found."""
    model, precise = _model(name, torch.float32), _model(name, torch.float64)
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(number))
    expected = precise(x.double())
    mistake = MISTAKES[kind]

    def is_right(fused: Any) -> bool:
        return bool((fused(x.double()) - expected).abs().amax() <= 1e-9 * expected.abs().amax())

    with in_the_arithmetic(model.get_parameter(f"{fold.into[0]}.weight"), mistake, number):
        made = fxfuse.explain(model)
    with in_the_rewriter(fold.norm, mistake, number):
        verification = fxfuse.report(pipeline.folded(model, example_inputs=(x,))).verification
        found = fxfuse.bisect(precise, is_right)
    assert verification is not None
    return {
        "model": name,
        "norm": fold.norm,
        "mistake": kind,
        "undone": all((other.norm, other.into) != (fold.norm, fold.into) for other in made.folded),
        "folded_otherwise": not made.refused,
        "verified_wrong": not verification.ok,
        "named": list(found.culprits),
        "is_right": found.culprits == (fold.norm,),
        "checks": found.checks,
    }


def right(name: str, dtype: torch.dtype, seed: int) -> dict[str, Any]:
    """Folds a model rightly, and tells what the verification says."""
    model = _model(name, dtype, seed)
    x = torch.randn(SIZE, generator=torch.Generator().manual_seed(seed)).to(dtype)
    fused = pipeline.folded(model, example_inputs=(x,))
    report = fxfuse.report(fused)
    found = report.verification
    assert found is not None and found.algebra is not None and found.refolded is not None
    return {
        "model": name,
        "dtype": str(dtype).removeprefix("torch."),
        "seed": seed,
        "folded": len(report.folded),
        "undone": sum(left.code == "FXF403" for left in report.refused),
        "ok": found.ok,
        "algebra": found.algebra.difference / found.algebra.allowed,
        "refolded": found.refolded.difference / found.refolded.allowed,
        "candidate_error": found.candidate_error,
        "reference_error": found.reference_error,
    }


def _model(name: str, dtype: torch.dtype, seed: int = 0) -> nn.Module:
    model = zoo.load(name, seed=seed).model
    assert isinstance(model, nn.Module)
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(seed)
        settle(model, (torch.randn(SIZE),))
    return model.to(dtype)


def measure(plantings: int, rights: int) -> dict[str, Any]:
    """Everything."""
    draw = random.Random(0)
    places = {name: list(fxfuse.explain(_model(name, torch.float32)).folded) for name in MODELS}
    for folds in places.values():
        draw.shuffle(folds)
    kinds = list(MISTAKES)
    todo = []
    for number in range(plantings):
        name = MODELS[number % len(MODELS)]
        todo.append((name, places[name].pop(), kinds[number // len(MODELS) % len(kinds)], number))
    shown = track(todo, description="planting", disable=not sys.stderr.isatty())
    with torch.no_grad():
        planted = [plant(*each) for each in shown]
    cases = []
    for number in range(rights):
        rounds, place = divmod(number, len(RIGHT))
        cases.append((RIGHT[place], DTYPES[rounds % len(DTYPES)], rounds // len(DTYPES)))
    shown_too = track(cases, description="folding", disable=not sys.stderr.isatty())
    return {"planted": planted, "right": [right(*each) for each in shown_too]}


def page(record: dict[str, Any]) -> str:
    """The results as a page for the documentation."""
    planted, rights = record["planted"], record["right"]
    rows: list[list[Any]] = [
        ["mistake", "planted", "undone by the check of the fold", "found by fuse", "named by bisect"],
        ["---"] * 5,
    ]
    for kind in MISTAKES:
        own = [each for each in planted if each["mistake"] == kind]
        counts = (sum(each[key] for each in own) for key in ("undone", "verified_wrong", "is_right"))
        rows.append([kind, len(own), *counts])
    totals = (sum(each[key] for each in planted) for key in ("undone", "verified_wrong", "is_right"))
    rows.append(["**all**", len(planted), *totals])
    checks = sorted(each["checks"] for each in planted)
    otherwise = sum(each["folded_otherwise"] for each in planted)
    dtypes: list[list[Any]] = [
        ["dtype", "folded models", "false alarms", "algebra, highest share", "refolded, highest share"],
        ["---"] * 5,
    ]
    for dtype in (str(each).removeprefix("torch.") for each in DTYPES):
        own = [each for each in rights if each["dtype"] == dtype]
        alarms = sum(not each["ok"] or each["undone"] > 0 for each in own)
        shares = (f"{max((each[key] for each in own), default=0):.3f}" for key in ("algebra", "refolded"))
        dtypes.append([dtype, len(own), alarms, *shares])
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"]

    def table(lines: list[list[Any]]) -> str:
        return "".join(f"| {' | '.join(map(str, line))} |\n" for line in lines)

    return f"""# Wrong folds found, right ones left in peace

Made by `{record["command"]}` at commit {record["commit"]}: {machine["processor"]}, {machine["cores"]} cores,
{machine["threads"]} threads, {versions}.

Mistakes planted in one layer each of {", ".join(name.partition(":")[2] for name in MODELS)}, every one in
another place. In the arithmetic, the check of each fold has to undo it (the norm then stays, or goes into
another operator, as {otherwise} did); behind that check,
`fuse(model, example_inputs=(x,))` has to find it, in float32, and `bisect` to name that fold and no other. A
search took {checks[len(checks) // 2]} checks in the median, {checks[-1]} at most.

{table(rows)}
Right folds of {len({each["model"] for each in rights})} networks. The share is the difference of the two
models in float64, relative to what is allowed; 1 would be an alarm.

{table(dtypes)}"""


def main() -> None:
    """Measures, prints the page and writes it beside the numbers."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--plantings", type=int, default=100)
    parser.add_argument("--rights", type=int, default=102, help="right folds, over all models and dtypes")
    parser.add_argument("--dry-run", action="store_true", help="print the page, write nothing")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    record = {**surroundings(COMMAND), **measure(options.plantings, options.rights)}
    print(page(record))
    if not options.dry_run:
        write("trust", record, page(record))


if __name__ == "__main__":
    main()
