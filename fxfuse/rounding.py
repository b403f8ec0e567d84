"""What rounding does to the outputs of two models, each in its own dtype.

The yardstick is a run of the reference in float64. What rounding does to the reference itself, it may do to
the candidate; what goes beyond that and beyond the tolerances of ``torch.testing`` is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest

import torch
from torch import Tensor
from torch.testing._comparison import default_tolerances

from fxfuse.distances import ZERO, distance, finite, units_apart, wide
from fxfuse.runs import Outputs
from fxfuse.verdict import INCONCLUSIVE, Agreement, Comparison, Worst

# A folded model rounds in other places than its source, so its error is like the source's but not equal.
_FACTOR = 4.0
# A reference that is further than this from its own float64 run is no measure of rounding.
_FAR = 0.25

Tolerances = tuple[float | None, float | None]


def rounding(
    expected: Outputs,
    actual: Outputs,
    exact: Outputs,
    *,
    algebra: Mapping[str, Agreement],
    given: Tolerances = (None, None),
    notes: Sequence[str] = (),
) -> Comparison:
    """How two runs differ, of which the outputs are in the same places.

    Args:
        expected: what the reference gives.
        actual: what the candidate gives.
        exact: what the reference gives in float64, as far as that is known.
        algebra: how the two agree in float64, as far as that is known: what it allows is allowed here.
        given: tolerances, relative and absolute, that replace all others.
        notes: what is to be said about it already; one that begins with `INCONCLUSIVE` makes it so.
    """
    measured = [
        _measure(place, value, actual[place], exact.get(place), algebra.get(place), given)
        for place, value in expected.items()
        if isinstance(value, Tensor) and value.numel()
    ]
    sums = [sum(parts) for parts in zip(*(each.squares for each in measured), strict=True)]
    reference, candidate, total = map(math.sqrt, sums or (0.0, 0.0, 0.0))
    errors = (reference / total, candidate / total) if total else (math.nan, math.nan)
    notes = [*notes, *_doubts(expected)]
    if errors[0] > _FAR:
        notes.append(f"{INCONCLUSIVE} in float64 the reference computes something else")
    return Comparison(
        ok=all(each.ok for each in measured),
        conclusive=not any(note.startswith(INCONCLUSIVE) for note in notes),
        max_abs=max((each.max_abs for each in measured), default=0.0),
        max_rel=max((each.max_rel for each in measured), default=0.0),
        reference_error=errors[0],
        candidate_error=errors[1],
        worst=max((each.worst for each in measured), key=lambda each: each.share, default=None),
        notes=tuple(notes),
        ulps=_units(expected, actual),
        top1=_top1(expected, actual),
    )


@dataclass(frozen=True)
class _Measured:
    """One output: its worst element, whether it is right, and sums of squares for the errors."""

    worst: Worst
    ok: bool
    max_abs: float
    max_rel: float
    squares: tuple[float, float, float]


def _measure(
    place: str,
    value: Tensor,
    other: Tensor,
    truth: Tensor | None,
    algebra: Agreement | None,
    given: Tolerances,
) -> _Measured:
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
    return _Measured(worst, ok, max_abs, max_abs / largest if largest else 0.0, squares)


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


def _units(expected: Outputs, actual: Outputs) -> tuple[int, ...]:
    """The histogram of units in the last place, of all outputs."""
    histograms = [
        units_apart(value, actual[place])
        for place, value in expected.items()
        if isinstance(value, Tensor) and value.is_floating_point()
    ]
    return tuple(map(sum, zip_longest(*histograms, fillvalue=0)))


def _top1(expected: Outputs, actual: Outputs) -> float | None:
    """In how many rows, of the only output, if it looks like a classifier's, both put one class first."""
    if list(expected) != [""]:
        return None
    scores, others = expected[""], actual[""]
    is_classifier = isinstance(scores, Tensor) and scores.dim() == 2 and scores.shape[1] > 1 and len(scores)
    if not is_classifier or not scores.is_floating_point():
        return None
    return float((scores.argmax(1) == others.argmax(1)).double().mean())


def _doubts(expected: Outputs) -> Iterator[str]:
    """Why a mistake might not be seen in such outputs."""
    tensors = [value for value in expected.values() if isinstance(value, Tensor)]
    if not any(tensor.numel() for tensor in tensors):
        yield f"{INCONCLUSIVE} the model returns no tensors, or empty ones"
    for place, value in expected.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            if not bool(value.isfinite().all()):
                yield f"{INCONCLUSIVE} output{place} holds infinities or NaN"
            elif value.numel() and float(value.detach().abs().amax()) < 100 * ZERO:
                yield f"{INCONCLUSIVE} output{place} is zero everywhere"
