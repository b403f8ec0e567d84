"""Whether the outputs of two models are in the same places, and of the same types, sizes and dtypes."""

from __future__ import annotations

import math

from torch import Tensor

from fxfuse.runs import Outputs


def mismatch(expected: Outputs, actual: Outputs) -> str:
    """Where they are not, in words; empty if they are. What is no tensor has to be equal."""
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
