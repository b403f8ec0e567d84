"""Traces of torch's that may have missed something."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fxfuse.lowering.specialised import UnsupportedError

_TracerWarning = torch.jit._trace.TracerWarning
_OF_SIZES = "torch/nn/functional.py"  # which reads no numbers but sizes


@contextmanager
def followed() -> Iterator[None]:
    """Holds a trace by TorchScript, whose warnings nobody is to see.

    Raises:
        UnsupportedError: numbers are read, of which the trace has one case only.
    """
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        yield
    missed = [
        str(each.message)
        for each in noted
        if issubclass(each.category, _TracerWarning) and not each.filename.endswith(_OF_SIZES)
    ]
    if missed:
        raise UnsupportedError(f"a trace cannot follow forward: {missed[0].partition('.')[0]}")
