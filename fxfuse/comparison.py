"""Compares two models: the same structure, the same function, the same numbers but for rounding.

Three questions, apart from one another. Structure: are the outputs of the same kind and shape? Algebra
(`fxfuse.algebra`): are the two the same function, rounding aside? Rounding: is the candidate, in its own
dtype, about as near to a float64 run of the reference as the reference is?
"""

from __future__ import annotations

import contextlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfuse.algebra import ZERO, Truth, UnmeasurableError, least_explained, others_than_rounded
from fxfuse.arguments import check_eval, check_inputs, check_module, rejection
from fxfuse.errors import UsageError
from fxfuse.inputs import DISTRIBUTIONS, sample
from fxfuse.layers import has_statistics
from fxfuse.precision import precise, setting
from fxfuse.rounding import Measured, Tolerances, measure, top1, units
from fxfuse.runs import REJECTIONS, Outputs, run
from fxfuse.tree import as_module
from fxfuse.verdict import Comparison

# A reference that is further than this from its own float64 run is no measure of rounding.
_FAR = 0.25

_INCONCLUSIVE = "inconclusive:"
_SECOND_RUN = "the reference's rounding is that of a second run, without oneDNN"

Refold = Callable[[], nn.Module]


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

    Algebra: in float64 the two may differ by three times what changing the candidate's weights, those that
    are not the reference's own, by about half a unit in the last place of their dtype does to its outputs, by
    four units in the last place of float32 (for constants in code), and by 1e-11 of the largest output for
    each norm of the reference. A mistake that is smaller than the rounding of the weights is not seen here;
    ``fuse`` with example inputs sees it, because it folds once more in float64.

    Rounding: an element may differ by ``atol + rtol·|reference|``, with the tolerances of ``torch.testing``
    for the dtype (atol taken relative to outputs that are smaller than 1), by four times the largest distance
    of the reference from its float64 run, and by what algebra allows; integers and bools must be equal. In
    relative L2 distance from that run the candidate may be four times as far as the reference, and an eps of
    the dtype. Given tolerances replace all of that.

    TF32, reduced-precision sums, autocast and nondeterministic algorithms are switched off meanwhile. Of each
    model one copy in float64 exists at a time.

    Args:
        reference: the model that counts as right: a module in eval mode, or an exported program.
        candidate: the model to be checked, either of the two.
        inputs: positional inputs. A ``torch.Size`` stands for random float tensors of that shape, in the
            dtype and on the device of the reference: normal, heavy-tailed, constant, zero and image-like
            ones, drawn with `seed`, and normal ones with one more along the first axis.
        rtol: relative tolerance instead of the default one.
        atol: absolute tolerance instead of the default one.
        seed: for drawn inputs, and for random numbers that the models draw.

    Raises:
        UsageError: a model is in training mode or none at all, the reference rejects the inputs, or a
            tolerance is no number from 0 on.
    """
    for name, tolerance in (("rtol", rtol), ("atol", atol)):
        if tolerance is not None and not tolerance >= 0:
            raise UsageError(f"{name} is {tolerance!r}, no tolerance; pass a number from 0 on")
    return compared(as_module(reference), as_module(candidate), inputs, (rtol, atol), seed)


def same_numbers(
    folded: nn.Module, candidate: Callable[..., Any], inputs: Sequence[Any], reference: Callable[..., Any]
) -> Comparison:
    """Whether two functions are about equally near to `folded` in float64; see `verify` on rounding.

    By chance, one run of `folded` may be unusually near. If the candidate is further away, `folded` runs once
    more, on the kernels that torch has without oneDNN. If that run would be right itself, the candidate may
    be about as far away.

    Args:
        folded: the module that both compute.
        candidate: the function that is to be checked.
        inputs: positional inputs.
        reference: the function that counts as right but for rounding.
    """
    actual = run(candidate, inputs, seed=0, is_own=True)  # both with TF32 if it is on, as they run later
    expected = run(reference, inputs, seed=0, is_own=True)
    with precise():
        mismatch = _structural_mismatch(expected, actual)
        if mismatch:
            return _unmeasured(mismatch, ok=False)
        exact: Outputs = {}
        notes = []
        try:
            exact = Truth(folded, inputs, 0, expected).outputs
        except UnmeasurableError as error:
            notes = [f"{error}, so rounding could not be measured"]
        found = _rounding(expected, actual, exact, notes)
    again = _without_onednn(folded, inputs) if not found.ok and exact and reference is folded else {}
    if again and not _structural_mismatch(expected, again):
        with precise():
            second = _rounding(again, actual, exact, [_SECOND_RUN])
            if second.ok and _rounding(expected, again, exact, []).ok:
                found = second
    return replace(found, inputs=(f"given: {_shapes(inputs)}",))


def _without_onednn(folded: nn.Module, inputs: Sequence[Any]) -> Outputs:
    """What it gives on the kernels that torch has beside oneDNN's; nothing if it needs these."""
    enabled = torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled
    with contextlib.suppress(*REJECTIONS), setting(*enabled, False):
        return run(folded, inputs, seed=0, is_own=True)
    return {}


def _rounding(expected: Outputs, actual: Outputs, exact: Outputs, notes: list[str]) -> Comparison:
    """How far two runs are from one in float64, as far as that is known."""
    measured = [
        measure(place, value, actual[place], exact.get(place), None, (None, None))
        for place, value in expected.items()
        if isinstance(value, Tensor) and value.numel()
    ]
    found = _summary(measured, [*_doubts_about(expected)], notes)
    return replace(found, ulps=units(expected, actual), top1=top1(expected, actual))


def compared(
    reference: nn.Module,
    candidate: nn.Module,
    inputs: Sequence[Any],
    tolerances: Tolerances = (None, None),
    seed: int = 0,
    refold: Refold | None = None,
) -> Comparison:
    """As `verify`, with the source folded once more in float64 by `refold`."""
    for name, model in (("reference", reference), ("candidate", candidate)):
        check_module(model, name)
        check_eval(model, name)
    check_inputs(inputs, "inputs")
    if any(tensor.is_meta for model in (reference, candidate) for tensor in model.parameters()):
        return _unmeasured("the model is on the meta device: nothing to compare", ok=True)
    with precise():
        return _together([*_comparisons(reference, candidate, inputs, tolerances, seed, refold)])


def _comparisons(
    reference: nn.Module,
    candidate: nn.Module,
    inputs: Sequence[Any],
    tolerances: Tolerances,
    seed: int,
    refold: Refold | None,
) -> Iterator[Comparison]:
    """One for each set of inputs; the source is folded once more for the first."""
    for number, (label, values) in enumerate(_cases(reference, inputs, seed)):
        try:
            expected = run(reference, values, seed)
        except REJECTIONS as error:
            if number == 0:
                raise UsageError(
                    f"the reference rejects the inputs {rejection(values, error, reference)}"
                ) from error
            continue  # it need not take all that can be drawn
        case = _Case(values, expected, label, seed)
        yield case.comparison(reference, candidate, tolerances, refold if number == 0 else None)


def _cases(reference: nn.Module, inputs: Sequence[Any], seed: int) -> Iterator[tuple[str, list[Any]]]:
    """What the models are run on, and what that is called."""
    if not any(isinstance(value, torch.Size) for value in inputs):
        yield f"given: {_shapes(inputs)}", list(inputs)
        return
    one_more = [torch.Size((v[0] + 1, *v[1:])) if isinstance(v, torch.Size) and v else v for v in inputs]
    for shapes, distribution in (*((inputs, each) for each in DISTRIBUTIONS), (one_more, DISTRIBUTIONS[0])):
        values = sample(reference, shapes, seed, distribution)
        yield f"{distribution}: {_shapes(values)}, seed {seed}", values


def _shapes(values: Sequence[Any]) -> str:
    return ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in values)


@dataclass(frozen=True)
class _Case:
    """A set of inputs, and what the reference gives for it."""

    inputs: Sequence[Any]
    expected: Outputs
    label: str
    seed: int

    def comparison(
        self,
        reference: nn.Module,
        candidate: nn.Module,
        tolerances: Tolerances,
        refold: Refold | None,
    ) -> Comparison:
        try:
            actual = run(candidate, self.inputs, self.seed)
        except REJECTIONS as error:
            why = rejection(self.inputs, error, candidate)
            return _unmeasured(f"the candidate rejects the inputs {why}", ok=False)
        mismatch = _structural_mismatch(self.expected, actual)
        if mismatch:
            return _unmeasured(mismatch, ok=False)
        truth, algebra, again, unlike, notes = None, {}, {}, [], []
        try:
            truth = Truth(reference, self.inputs, self.seed, self.expected)
            if tolerances == (None, None):
                algebra = truth.agreements(candidate, _least_precise(self.expected))
            if refold is not None:
                folded = refold()
                again = truth.agreements(folded, torch.float64)
                unlike = others_than_rounded(candidate, folded)
        except UnmeasurableError as error:
            missing = "the fold in float64" if algebra else "algebra" if truth else "rounding"
            notes = [f"{error}, so {missing} could not be measured"]
        exact = truth.outputs if truth else {}
        measured = [
            measure(place, value, actual[place], exact.get(place), algebra.get(place), tolerances)
            for place, value in self.expected.items()
            if isinstance(value, Tensor) and value.numel()
        ]
        given = {"rtol": tolerances[0], "atol": tolerances[1]}
        told = ", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None)
        found = _summary(measured, [*_doubts(reference, self.expected)], notes)
        if unlike:
            note = f"not the weights of the fold in float64, rounded: {', '.join(unlike)}"
            found = replace(found, ok=False, notes=(*found.notes, note))
        return replace(
            found,
            ok=found.ok and all(each.ok for each in (*algebra.values(), *again.values())),
            algebra=least_explained(algebra.values()),
            refolded=least_explained(again.values()),
            ulps=units(self.expected, actual),
            top1=top1(self.expected, actual),
            inputs=(self.label,),
            tolerances=told,
        )


def _least_precise(outputs: Outputs) -> torch.dtype:
    dtypes = [
        each.dtype for each in outputs.values() if isinstance(each, Tensor) and each.is_floating_point()
    ]
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps, default=torch.float64)


def _together(found: Sequence[Comparison]) -> Comparison:
    """What several sets of inputs brought: the worst of each, and all that was noted."""
    unmeasured = next((each for each in found if not each.ok and each.worst is None), None)
    if unmeasured is not None:
        return unmeasured
    conclusive = any(each.conclusive for each in found)
    notes = dict.fromkeys(note for each in found for note in each.notes)
    worst = [each.worst for each in found if each.worst is not None]
    ulps = zip_longest(*(each.ulps for each in found), fillvalue=0)
    ok = all(each.ok for each in found)
    return Comparison(
        ok=ok,
        conclusive=conclusive or not ok,
        max_abs=max(each.max_abs for each in found),
        max_rel=max(each.max_rel for each in found),
        reference_error=max((each.reference_error for each in found), key=_known),
        candidate_error=max((each.candidate_error for each in found), key=_known),
        worst=max(worst, key=lambda each: each.share, default=None),
        notes=tuple(note for note in notes if not (conclusive and note.startswith(_INCONCLUSIVE))),
        algebra=least_explained(each.algebra for each in found if each.algebra is not None),
        refolded=least_explained(each.refolded for each in found if each.refolded is not None),
        ulps=tuple(map(sum, ulps)),
        top1=found[0].top1,
        inputs=tuple(label for each in found for label in each.inputs),
        tolerances=found[0].tolerances,
    )


def _known(error: float) -> float:
    return -1.0 if math.isnan(error) else error


def _unmeasured(note: str, *, ok: bool) -> Comparison:
    return Comparison(ok=ok, conclusive=not ok, notes=(note,))


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
        elif not _same(value, other):
            return f"output{place} differs: {value!r} and {other!r}"
    return ""


def _same(value: object, other: object) -> bool:
    are_nan = (
        isinstance(value, float) and isinstance(other, float) and math.isnan(value) and math.isnan(other)
    )
    return value is other or are_nan or bool(value == other)


def _doubts(reference: nn.Module, expected: Outputs) -> Iterator[str]:
    """Why a mistake might not have been seen."""
    norms = [module for module in reference.modules() if has_statistics(module)]
    if norms and all(_is_initial(norm) for norm in norms):
        yield f"{_INCONCLUSIVE} all norms have their initial statistics, with which a norm does nothing"
    yield from _doubts_about(expected)


def _doubts_about(expected: Outputs) -> Iterator[str]:
    """The same for what outputs are."""
    tensors = [value for value in expected.values() if isinstance(value, Tensor)]
    if not any(tensor.numel() for tensor in tensors):
        yield f"{_INCONCLUSIVE} the model returns no tensors, or empty ones"
    for place, value in expected.items():
        if isinstance(value, Tensor) and value.is_floating_point():
            if not bool(value.isfinite().all()):
                yield f"{_INCONCLUSIVE} output{place} holds infinities or NaN"
            elif value.numel() and float(value.detach().abs().amax()) < 100 * ZERO:
                yield f"{_INCONCLUSIVE} output{place} is zero everywhere"


def _is_initial(norm: Any) -> bool:
    parts = (
        (norm.running_mean, 0),
        (norm.running_var, 1),
        (getattr(norm, "weight", None), 1),
        (getattr(norm, "bias", None), 0),
    )
    return all(tensor is None or bool((tensor == initial).all()) for tensor, initial in parts)


def _summary(measured: Sequence[Measured], doubts: list[str], notes: list[str]) -> Comparison:
    conclusive, notes = not doubts, [*doubts, *notes]
    if not measured:
        return Comparison(ok=True, conclusive=conclusive, max_abs=0.0, max_rel=0.0, notes=tuple(notes))
    sums = (sum(parts) for parts in zip(*(each.squares for each in measured), strict=True))
    reference, candidate, total = map(math.sqrt, sums)
    reference_error, candidate_error = (
        (reference / total, candidate / total) if total else (math.nan, math.nan)
    )
    if reference_error > _FAR:
        conclusive = False
        notes = [*notes, f"{_INCONCLUSIVE} in float64 the reference computes something else"]
    return Comparison(
        ok=all(each.ok for each in measured),
        conclusive=conclusive,
        max_abs=max(each.max_abs for each in measured),
        max_rel=max(each.max_rel for each in measured),
        reference_error=reference_error,
        candidate_error=candidate_error,
        worst=max((each.worst for each in measured), key=lambda each: each.share),
        notes=tuple(notes),
    )
