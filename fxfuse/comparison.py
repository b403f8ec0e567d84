"""Compares two models: the same structure, the same numbers but for rounding.

The yardstick is a run of the reference in float64. What rounding does to the reference itself, it may do
to the candidate; what goes beyond that and beyond the tolerances of ``torch.testing`` is an error.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.testing._comparison import default_tolerances
from torch.utils import _pytree as pytree

from fxfuse.arguments import check_eval, check_inputs, check_module, rejection
from fxfuse.errors import UsageError
from fxfuse.records import Comparison, Worst
from fxfuse.replica import isolated
from fxfuse.tree import as_module

# A folded model rounds in other places than its source, so its error is like the source's but not equal.
_ROUNDING_FACTOR = 4.0
# A reference that is further than this from its own float64 run is no measure of rounding.
_FAR = 0.25
# Differences up to this count as none: in float64 the reference's own rounding cannot be measured.
_ZERO = 1e-12


# What a model's forward raises when it gets inputs that it cannot take.
REJECTIONS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)


def verify(
    reference: nn.Module | ExportedProgram,
    candidate: nn.Module | ExportedProgram,
    inputs: Sequence[Any],
    *,
    rtol: float | None = None,
    atol: float | None = None,
    seed: int = 0,
) -> Comparison:
    """Runs both models on the same inputs and compares all their outputs.

    An element may differ by ``atol + rtol·|reference|``, with the tolerances of ``torch.testing`` for the
    dtype (atol taken relative to outputs that are smaller than 1), and by four times the largest
    distance of the reference from its own float64 run; integers and bools must be equal. Given
    tolerances replace all of that.

    Args:
        reference: the model that counts as right: a module in eval mode, or an exported program.
        candidate: the model to be checked, either of the two.
        inputs: positional inputs. A ``torch.Size`` stands for a standard normal float tensor of that shape,
            drawn with `seed`, in the dtype and on the device of the reference.
        rtol: relative tolerance instead of the default one.
        atol: absolute tolerance instead of the default one.
        seed: for drawn inputs, and for random numbers that the models draw.

    Raises:
        UsageError: a model is in training mode or none at all, or the reference rejects the inputs.
    """
    reference = as_module(reference)
    candidate = as_module(candidate)
    for name, model in (("reference", reference), ("candidate", candidate)):
        check_module(model, name)
        check_eval(model, name)
    check_inputs(inputs, "inputs")
    values = drawn(reference, inputs, seed)
    if any(tensor.is_meta for model in (reference, candidate) for tensor in model.parameters()):
        return _unmeasured(ok=True, note="the model is on the meta device: nothing to compare")
    try:
        expected = _run(isolated(reference), values, seed)
    except REJECTIONS as error:
        raise UsageError(f"the reference rejects the inputs {rejection(values, error, reference)}") from error
    try:
        actual = _run(isolated(candidate), values, seed)
    except REJECTIONS as error:
        why = rejection(values, error, candidate)
        return _unmeasured(ok=False, note=f"the candidate rejects the inputs {why}")
    mismatch = _structural_mismatch(expected, actual)
    if mismatch:
        return _unmeasured(ok=False, note=mismatch)
    truth, note = _float64_run(reference, values, seed, expected)
    return _compared(expected, actual, truth, (rtol, atol), [*_doubts(reference, expected)], note)


def _unmeasured(*, ok: bool, note: str) -> Comparison:
    nan = math.nan
    return Comparison(ok, not ok, nan, nan, nan, nan, None, (note,))


def drawn(model: nn.Module, inputs: Sequence[Any], seed: int) -> list[Any]:
    """`inputs`, with a standard normal tensor in the dtype of `model` for each that is a torch.Size."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(seed)
    return [
        torch.randn(value, generator=generator).to(device=like.device, dtype=like.dtype)
        if isinstance(value, torch.Size)
        else value
        for value in inputs
    ]


Outputs = dict[str, Any]
Tolerances = tuple[float | None, float | None]


@contextmanager
def clean_run(inputs: Sequence[Any], seed: int) -> Iterator[list[Any]]:
    """Copies of the inputs, to which a model may write; no gradients, and random numbers of the run's own."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        yield pytree.tree_map_only(Tensor, torch.clone, list(inputs))


def _run(model: nn.Module, inputs: Sequence[Any], seed: int) -> Outputs:
    """The outputs by place."""
    with clean_run(inputs, seed) as copies:
        leaves, _ = pytree.tree_flatten_with_path(model(*copies))
    return {pytree.keystr(path): leaf for path, leaf in leaves}


def _float64_run(
    reference: nn.Module, inputs: Sequence[Any], seed: int, expected: Outputs
) -> tuple[Outputs | None, list[str]]:
    def double(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    try:
        truth = _run(isolated(reference).double(), pytree.tree_map_only(Tensor, double, list(inputs)), seed)
    except REJECTIONS as error:
        reason = str(error).partition("\n")[0]
        return None, [f"the reference does not run in float64 ({reason}), so rounding could not be measured"]
    shapes = [{k: getattr(v, "shape", None) for k, v in outputs.items()} for outputs in (expected, truth)]
    if shapes[0] != shapes[1]:
        return None, ["in float64 the reference gives other outputs, so rounding could not be measured"]
    return truth, []


def _structural_mismatch(expected: Outputs, actual: Outputs) -> str:
    if list(expected) != list(actual):
        return f"the outputs have other places: {list(expected)} and {list(actual)}"
    for place, value in expected.items():
        other = actual[place]
        if type(value) is not type(other):
            return f"output{place} is of another type: {type(value).__name__} and {type(other).__name__}"
        if isinstance(value, Tensor):
            if (value.shape, value.dtype, value.device) != (other.shape, other.dtype, other.device):
                found = [f"{tuple(t.shape)} {t.dtype} {t.device}" for t in (value, other)]
                return f"output{place} has another shape, dtype or device: {found[0]} and {found[1]}"
        elif value != other:
            return f"output{place} differs: {value!r} and {other!r}"
    return ""


def _doubts(reference: nn.Module, expected: Outputs) -> Iterator[str]:
    """Why a mistake might not have been seen."""
    norms = [m for m in reference.modules() if isinstance(getattr(m, "running_var", None), Tensor)]
    if norms and all(_is_initial(norm) for norm in norms):
        yield "inconclusive: all norms have their initial statistics, with which a norm does nothing"
    tensors = [value for value in expected.values() if isinstance(value, Tensor)]
    if not any(tensor.numel() for tensor in tensors):
        yield "inconclusive: the model returns no tensors, or empty ones"
    for place, value in expected.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            if not bool(value.isfinite().all()):
                yield f"inconclusive: output{place} holds infinities or NaN"
            elif value.numel() and float(value.detach().abs().amax()) < 100 * _ZERO:
                yield f"inconclusive: output{place} is zero everywhere"


def _is_initial(norm: Any) -> bool:
    parts = (
        (norm.running_mean, 0),
        (norm.running_var, 1),
        (getattr(norm, "weight", None), 1),
        (getattr(norm, "bias", None), 0),
    )
    return all(tensor is None or bool((tensor == initial).all()) for tensor, initial in parts)


@dataclass(frozen=True)
class _Measured:
    """One output: how far its worst element is beyond what is allowed, and sums of squares for the errors."""

    worst: Worst
    excess: float
    max_abs: float
    max_rel: float
    squares: tuple[float, float, float]


def _compared(
    expected: Outputs,
    actual: Outputs,
    truth: Outputs | None,
    tolerances: Tolerances,
    doubts: list[str],
    notes: list[str],
) -> Comparison:
    measured = [
        _measure(place, value, actual[place], None if truth is None else truth[place], tolerances)
        for place, value in expected.items()
        if isinstance(value, Tensor) and value.numel()
    ]
    conclusive, notes = not doubts, [*doubts, *notes]
    if not measured:
        return Comparison(True, conclusive, 0.0, 0.0, math.nan, math.nan, None, tuple(notes))
    worst = max(measured, key=lambda output: output.excess)
    reference, candidate, total = (
        math.sqrt(sum(parts)) for parts in zip(*(m.squares for m in measured), strict=True)
    )
    errors = (reference / total, candidate / total) if total else (math.nan, math.nan)
    if errors[0] > _FAR:
        conclusive, notes = False, [*notes, "inconclusive: in float64 the reference computes something else"]
    max_abs, max_rel = max(m.max_abs for m in measured), max(m.max_rel for m in measured)
    ok = worst.excess <= 0
    return Comparison(ok, conclusive or not ok, max_abs, max_rel, *errors, worst.worst, tuple(notes))


def _measure(
    place: str, value: Tensor, other: Tensor, truth: Tensor | None, tolerances: Tolerances
) -> _Measured:
    left, right = _wide(value), _wide(other)
    exact = None if truth is None else _wide(truth)
    difference = _difference(left, right)
    if not (value.is_floating_point() or value.is_complex()):
        difference = torch.where(
            (value == other).cpu(), 0.0, difference.clamp_min(1.0)
        )  # float64 may not tell
    allowed = _allowed(value, left, exact, tolerances)
    excess = difference - allowed
    index = tuple((excess == excess.amax()).nonzero()[0].tolist())
    worst = Worst(place, index, float(left[index]), float(right[index]), float(allowed[index]))
    largest = float(_finite(left).abs().amax())
    max_abs = float(difference.amax())
    squares = (0.0, 0.0, 0.0)
    if exact is not None:
        distances = (_difference(exact, left), _difference(exact, right))
        squares = (_square(distances[0]), _square(distances[1]), _square(_finite(exact)))
    return _Measured(worst, float(excess.amax()), max_abs, max_abs / largest if largest else 0.0, squares)


def _square(tensor: Tensor) -> float:
    return float((tensor * tensor).sum())


def _finite(tensor: Tensor) -> Tensor:
    return tensor.nan_to_num(0.0, 0.0, 0.0)


def _wide(tensor: Tensor) -> Tensor:
    """The values in float64 on the CPU; complex numbers as pairs."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().to(device="cpu", dtype=torch.float64)


def _difference(left: Tensor, right: Tensor) -> Tensor:
    """|left - right|; 0 where both are the same infinity or both NaN, infinite where only one is."""
    same = (left == right) | (left.isnan() & right.isnan())
    return torch.where(same, 0.0, (left - right).abs()).nan_to_num(nan=math.inf, posinf=math.inf)


def _allowed(value: Tensor, left: Tensor, exact: Tensor | None, given: Tolerances) -> Tensor:
    rtol, atol = default_tolerances(value.dtype)
    magnitude = _finite(left).abs()
    if given != (None, None):
        return (given[1] or 0.0) + (given[0] or 0.0) * magnitude
    rounding = 0.0
    if exact is not None and (value.is_floating_point() or value.is_complex()):
        rounding = float(_difference(exact, left).amax())
    rounding = _ROUNDING_FACTOR * rounding if math.isfinite(rounding) else 0.0
    return max(atol * min(1.0, float(magnitude.amax())), _ZERO) + rtol * magnitude + rounding
