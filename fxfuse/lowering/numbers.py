"""Whether a program gives the numbers of a folded module, but for rounding."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import nn

from fxfuse.algebra import Truth, UnmeasurableError
from fxfuse.inputs import described
from fxfuse.precision import precise, setting
from fxfuse.rounding import rounding
from fxfuse.runs import REJECTIONS, Outputs, run
from fxfuse.structure import mismatch
from fxfuse.verdict import Comparison

_SECOND_RUN = "the reference's rounding is that of a second run, without oneDNN"


def same_numbers(
    folded: nn.Module,
    candidate: Callable[..., Any],
    inputs: Sequence[Any],
    reference: Callable[..., Any] | None = None,
) -> Comparison:
    """Whether a function is about as near to `folded` in float64 as `folded` is; see ``verify`` on rounding.

    By chance, one run of `folded` may be unusually near. If the candidate is further away, `folded` runs once
    more, on the kernels that torch has without oneDNN. If that run would be right itself, the candidate may
    be about as far away.

    Args:
        folded: the module that both compute.
        candidate: the function that is to be checked.
        inputs: positional inputs.
        reference: another function in the place of `folded` that counts as right but for rounding.
    """
    actual = run(candidate, inputs, seed=0, is_own=True)  # both with TF32 if it is on, as they run later
    expected = run(folded if reference is None else reference, inputs, seed=0, is_own=True)
    with precise():
        unlike = mismatch(expected, actual)
        if unlike:
            return Comparison.unmeasured(unlike, ok=False)
        exact: Outputs = {}
        notes = []
        try:
            exact = Truth(folded, inputs, 0, expected).outputs
        except UnmeasurableError as error:
            notes = [f"{error}, so rounding could not be measured"]
        found = rounding(expected, actual, exact, algebra={}, notes=notes)
    again = _without_onednn(folded, inputs) if not found.ok and exact and reference is None else {}
    if again and not mismatch(expected, again):
        with precise():
            second = rounding(again, actual, exact, algebra={}, notes=[_SECOND_RUN])
            if second.ok and rounding(expected, again, exact, algebra={}).ok:
                found = second
    return replace(found, inputs=(f"given: {described(inputs)}",))


def _without_onednn(folded: nn.Module, inputs: Sequence[Any]) -> Outputs:
    """What it gives on the kernels that torch has beside oneDNN's; nothing if it needs these."""
    enabled = torch._C._get_mkldnn_enabled, torch._C._set_mkldnn_enabled
    with contextlib.suppress(*REJECTIONS), setting(*enabled, False):
        return run(folded, inputs, seed=0, is_own=True)
    return {}
