"""What rounding does to the outputs of two models, each in its own dtype.

The yardstick is a run of the reference in float64. What rounding does to the reference itself, it may do to
the candidate; what goes beyond that and beyond the tolerances of ``torch.testing`` is an error.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.testing._comparison import default_tolerances

from fxfuse.algebra import ZERO
from fxfuse.distances import distance, finite, units_apart, wide
from fxfuse.runs import Outputs
from fxfuse.verdict import Agreement, Worst

# A folded model rounds in other places than its source, so its error is like the source's but not equal.
_FACTOR = 4.0

Tolerances = tuple[float | None, float | None]


@dataclass(frozen=True)
class Measured:
    """One output: its worst element, whether it is right, and sums of squares for the errors."""

    worst: Worst
    ok: bool
    max_abs: float
    max_rel: float
    squares: tuple[float, float, float]


def measure(
    place: str,
    value: Tensor,
    other: Tensor,
    truth: Tensor | None,
    algebra: Agreement | None,
    given: Tolerances,
) -> Measured:
    """How `other` differs from `value`, the reference's.

    Args:
        place: of the output.
        value: what the reference gives.
        other: what the candidate gives.
        truth: `value` in float64; None if that is not known.
        algebra: how they agree in float64, if that is known: what it allows is allowed here.
        given: tolerances that replace all others.
    """
    left, right = wide(value), wide(other)
    is_float = value.is_floating_point() or value.is_complex()
    difference = distance(left, right)
    if not is_float:  # float64 may not tell large integers apart
        difference = torch.where((value == other).cpu(), 0.0, difference.clamp_min(1.0))
        if truth is not None and _count(right, truth) <= _FACTOR * _count(left, truth):
            difference = torch.zeros_like(difference)  # rounding turns as many of the reference's
    largest = float(finite(left).abs().amax())
    squares, of_weights, rounding = (0.0, 0.0, 0.0), 0.0, 0.0
    if truth is not None:
        exact = wide(truth)
        distances = (distance(exact, left), distance(exact, right))
        squares = (_square(distances[0]), _square(distances[1]), _square(finite(exact)))
        of_weights = algebra.allowed * largest if algebra is not None and algebra.ok else 0.0
        if is_float:
            rounding = _FACTOR * float(distances[0].amax()) + of_weights
    allowed = _allowed(value.dtype, finite(left).abs(), rounding, given)
    # A reference that overflows measures nothing, and leaves the verdict to algebra.
    share = torch.where((difference == 0) | allowed.isinf(), 0.0, difference / allowed)
    index = tuple((share == share.amax()).nonzero()[0].tolist())
    worst = Worst(place, index, float(left[index]), float(right[index]), float(allowed[index]))
    ok = float(share.amax()) <= 1
    if is_float and given == (None, None) and truth is not None:
        reference, candidate, total = map(math.sqrt, squares)
        eps = torch.finfo(value.dtype).eps
        ok = (
            ok
            and candidate <= _FACTOR * reference + eps * total + of_weights * math.sqrt(left.numel()) + ZERO
        )
    max_abs = float(difference.amax())
    return Measured(worst, ok, max_abs, max_abs / largest if largest else 0.0, squares)


def _allowed(dtype: torch.dtype, magnitude: Tensor, rounding: float, given: Tolerances) -> Tensor:
    if given != (None, None):
        return (given[1] or 0.0) + (given[0] or 0.0) * magnitude
    rtol, atol = default_tolerances(dtype)
    return max(atol * min(1.0, float(magnitude.amax())), ZERO) + rtol * magnitude + rounding


def _count(numbers: Tensor, truth: Tensor) -> int:
    """How many integers are others than in float64."""
    return int((numbers != wide(truth)).sum())


def _square(tensor: Tensor) -> float:
    return float((tensor * tensor).sum())


def units(expected: Outputs, actual: Outputs) -> tuple[int, ...]:
    """The histogram of units in the last place, of all outputs."""
    histograms = [
        units_apart(value, actual[place])
        for place, value in expected.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    return tuple(map(sum, zip_longest(*histograms, fillvalue=0)))


def top1(expected: Outputs, actual: Outputs) -> float | None:
    """In how many rows, of the only output, if it looks like a classifier's, both put one class first."""
    if list(expected) != [""]:
        return None
    scores, others = expected[""], actual[""]
    is_classifier = isinstance(scores, Tensor) and scores.dim() == 2 and scores.shape[1] > 1 and len(scores)
    if not is_classifier or not scores.is_floating_point():
        return None
    return float((scores.argmax(1) == others.argmax(1)).double().mean())
