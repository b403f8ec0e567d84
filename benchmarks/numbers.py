"""Whether a folded model computes what its source does: both in float64, on the same images."""

from __future__ import annotations

import math
import time
import warnings
from collections import defaultdict
from collections.abc import Mapping, Sequence
from itertools import zip_longest

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

import fxfuse
from benchmarks.families import (
    Record,
    Size,
    counted_norms,
    images,
    outputs,
    prepared,
    runnable,
)
from fxfuse.errors import with_type

ALLOWED = 1e-9
VERDICTS = ("exact", "inconclusive", "wrong", "not run")


def choose(models: Mapping[str, Record], count: int) -> list[str]:
    """Models under 40 M parameters in which norms are folded: the smallest of every family, then the next."""
    fit = [name for name, model in models.items() if _is_fit(model)]
    families = defaultdict(list)
    for name in sorted(fit, key=lambda name: (models[name]["parameters"], name)):
        families[models[name]["library"], models[name]["family"]].append(name)
    rounds = zip_longest(*(families[family] for family in sorted(families)))
    return [name for taken in rounds for name in taken if name][:count]


def _is_fit(model: Record) -> bool:
    return bool(model.get("norms") and model["parameters"] < 40e6 and model["fxfuse"].get("folded"))


def check(spec: str) -> Record:
    """Source and result of one model, on the same images in float64."""
    warnings.simplefilter("ignore")
    torch.manual_seed(0)
    start = time.perf_counter()
    try:
        with torch.no_grad():
            model, source, size = prepared(spec)
            fused = fxfuse.fuse(model)
            found = _compared(spec, size, source, runnable(spec, fused))
    except Exception as error:  # third-party models are built and run, and may raise anything
        return {"verdict": "not run", "why": with_type(error)}
    report = fxfuse.report(fused)
    folds = {"norms": report.norms, "folded": len(report.folded), "size": size}
    return {**folds, **found, "seconds": round(time.perf_counter() - start, 1)}


def _compared(spec: str, size: Size, model: nn.Module, fused: nn.Module) -> Record:
    inputs = [images(spec, batch, size) for batch in (1, 3)]
    norms = counted_norms(model)
    calls: list[None] = []
    hooks = [norm.register_forward_hook(lambda *_: calls.append(None)) for norm in norms]
    expected = outputs(model, inputs)
    for hook in hooks:
        hook.remove()
    called = {"called": len(calls) // len(inputs)}
    try:
        actual = outputs(fused, inputs)
    except Exception as error:  # the source took these inputs
        return {**called, "verdict": "wrong", "why": f"the result raises {with_type(error)}"}
    nudged = outputs(model, pytree.tree_map(lambda image: image * (1 + 1e-15), inputs[:1]))
    other_images = outputs(model, [images(spec, 1, size)])
    for norm in norms:
        norm.get_buffer("running_var").mul_(1.01)
    other_norms = outputs(model, inputs[:1])
    return {**called, **judged(expected, actual, nudged, {"images": other_images, "norms": other_norms})}


def judged(
    expected: Sequence[Tensor],
    actual: Sequence[Tensor],
    nudged: Sequence[Tensor],
    changed: Mapping[str, Sequence[Tensor]],
) -> Record:
    """Whether both models' outputs are the same to 1e-9, and whether a mistake could have been seen at all.

    The other arguments hold the source's first outputs once more: `nudged`, when the image differs by 1e-15;
    `changed`, when something differs that has to move them by a thousand times what is allowed.
    """
    if [a.shape for a in expected] != [b.shape for b in actual]:
        return {"verdict": "wrong", "why": "the outputs have other shapes"}
    sizes = [float(a.abs().amax()) for a in expected]
    allowed = [ALLOWED * max(1.0, size) for size in sizes]
    distances = [_distance(a, b) for a, b in zip(expected, actual, strict=True)]
    relative = max(distance / (size or 1) for distance, size in zip(distances, sizes, strict=True))
    record: Record = {"relative": relative if math.isfinite(relative) else None}
    if not all(map(math.isfinite, sizes)):
        return {**record, "verdict": "inconclusive", "why": "the source's outputs are not finite"}
    if not all(distance <= most for distance, most in zip(distances, allowed, strict=True)):
        own = max(_distance(a, c) / (size or 1) for a, c, size in zip(expected, nudged, sizes, strict=False))
        verdict = "inconclusive" if own > 0.01 * relative else "wrong"
        why = f"relative difference {relative:.0e}; {own:.0e} from itself when the image differs by 1e-15"
        return {**record, "verdict": verdict, "why": why}
    for what, others in changed.items():
        effects = (_distance(a, c) for a, c in zip(expected, others, strict=False))
        if not all(effect >= 1000 * most for effect, most in zip(effects, allowed, strict=False)):
            return {**record, "verdict": "inconclusive", "why": f"an output is the same for other {what}"}
    return {**record, "verdict": "exact"}


def _distance(left: Tensor, right: Tensor) -> float:
    return float((left.double() - right.double()).abs().amax())
