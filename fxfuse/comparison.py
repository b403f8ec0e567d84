"""Compares two models: the same structure, the same function, the same numbers but for rounding.

Three questions, apart from one another. Structure: are the outputs of the same kind and shape? Algebra
(`fxfuse.algebra`): are the two the same function, rounding aside? Rounding: is the candidate, in its own
dtype, about as near to a float64 run of the reference as the reference is?
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfuse.algebra import Truth, UnmeasurableError, least_explained, others_than_rounded
from fxfuse.arguments import check_eval, check_inputs, check_module, rejection
from fxfuse.errors import UsageError
from fxfuse.inputs import DISTRIBUTIONS, described, sample
from fxfuse.layers import has_statistics
from fxfuse.precision import precise
from fxfuse.rounding import Tolerances, rounding
from fxfuse.runs import REJECTIONS, Outputs, run
from fxfuse.structure import mismatch
from fxfuse.tree import as_module
from fxfuse.verdict import INCONCLUSIVE, Comparison

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
        return Comparison.unmeasured("the model is on the meta device: nothing to compare", ok=True)
    pair = _Pair(reference, candidate, tolerances, seed)
    with precise():
        return _together([*pair.comparisons(inputs, refold)])


@dataclass(frozen=True)
class _Pair:
    """Two models that are to be compared, and how."""

    reference: nn.Module
    candidate: nn.Module
    tolerances: Tolerances
    seed: int

    def comparisons(self, inputs: Sequence[Any], refold: Refold | None) -> Iterator[Comparison]:
        """One for each set of inputs; the source is folded once more for the first."""
        for number, (label, values) in enumerate(_cases(self.reference, inputs, self.seed)):
            try:
                expected = run(self.reference, values, self.seed)
            except REJECTIONS as error:
                if number == 0:
                    raise UsageError(
                        f"the reference rejects the inputs {rejection(values, error, self.reference)}"
                    ) from error
                continue  # it need not take all that can be drawn
            found = self._comparison(values, expected, refold if number == 0 else None)
            yield replace(found, inputs=(label,))

    def _comparison(self, inputs: Sequence[Any], expected: Outputs, refold: Refold | None) -> Comparison:
        """That for inputs with which the reference gives these outputs."""
        try:
            actual = run(self.candidate, inputs, self.seed)
        except REJECTIONS as error:
            why = rejection(inputs, error, self.candidate)
            return Comparison.unmeasured(f"the candidate rejects the inputs {why}", ok=False)
        unlike = mismatch(expected, actual)
        if unlike:
            return Comparison.unmeasured(unlike, ok=False)
        truth, algebra, again, notes = None, {}, {}, [*_doubts(self.reference)]
        others: list[str] = []
        try:
            truth = Truth(self.reference, inputs, self.seed, expected)
            if self.tolerances == (None, None):
                algebra = truth.agreements(self.candidate, _least_precise(expected))
            if refold is not None:
                folded = refold()
                again = truth.agreements(folded, torch.float64)
                others = others_than_rounded(self.candidate, folded)
        except UnmeasurableError as error:
            missing = "the fold in float64" if algebra else "algebra" if truth else "rounding"
            notes.append(f"{error}, so {missing} could not be measured")
        if others:
            notes.append(f"not the weights of the fold in float64, rounded: {', '.join(others)}")
        exact = truth.outputs if truth else {}
        found = rounding(expected, actual, exact, algebra=algebra, given=self.tolerances, notes=notes)
        given = {"rtol": self.tolerances[0], "atol": self.tolerances[1]}
        return replace(
            found,
            ok=found.ok and not others and all(each.ok for each in (*algebra.values(), *again.values())),
            algebra=least_explained(algebra.values()),
            refolded=least_explained(again.values()),
            tolerances=", ".join(f"{name} {value:g}" for name, value in given.items() if value is not None),
        )


def _cases(reference: nn.Module, inputs: Sequence[Any], seed: int) -> Iterator[tuple[str, list[Any]]]:
    """What the models are run on, and what that is called."""
    if not any(isinstance(value, torch.Size) for value in inputs):
        yield f"given: {described(inputs)}", list(inputs)
        return
    one_more = [torch.Size((v[0] + 1, *v[1:])) if isinstance(v, torch.Size) and v else v for v in inputs]
    for shapes, distribution in (*((inputs, each) for each in DISTRIBUTIONS), (one_more, DISTRIBUTIONS[0])):
        values = sample(reference, shapes, seed, distribution)
        yield f"{distribution}: {described(values)}, seed {seed}", values


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
        notes=tuple(note for note in notes if not (conclusive and note.startswith(INCONCLUSIVE))),
        algebra=least_explained(each.algebra for each in found if each.algebra is not None),
        refolded=least_explained(each.refolded for each in found if each.refolded is not None),
        ulps=tuple(map(sum, ulps)),
        top1=found[0].top1,
        inputs=tuple(label for each in found for label in each.inputs),
        tolerances=found[0].tolerances,
    )


def _known(error: float) -> float:
    return -1.0 if math.isnan(error) else error


def _doubts(reference: nn.Module) -> Iterator[str]:
    """Why a mistake might not be seen with such a model."""
    norms = [module for module in reference.modules() if has_statistics(module)]
    if norms and all(_is_initial(norm) for norm in norms):
        yield f"{INCONCLUSIVE} all norms have their initial statistics, with which a norm does nothing"


def _is_initial(norm: Any) -> bool:
    parts = (
        (norm.running_mean, 0),
        (norm.running_var, 1),
        (getattr(norm, "weight", None), 1),
        (getattr(norm, "bias", None), 0),
    )
    return all(tensor is None or bool((tensor == initial).all()) for tensor, initial in parts)
