"""A folded module and inputs → a program that has been compared with it; or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch.utils import _pytree as pytree

from fxfuse.errors import UnsupportedError, with_type
from fxfuse.lowering.candidates import Compiler, Outcome
from fxfuse.lowering.engines import Engine
from fxfuse.lowering.kept import Traced
from fxfuse.lowering.leaves import moved, own_copy
from fxfuse.lowering.slices import in_slices
from fxfuse.precision import no_autocast
from fxfuse.runs import REJECTIONS
from fxfuse.runs import run as run_module


def compile_verified(
    traced: Traced, inputs: Sequence[Any], engine: Engine, dtype: torch.dtype | None
) -> Outcome:
    """A program of an engine for inputs like these, compared with the folded module on them, or on slices.

    The outputs of both are held against a run of the folded module in float64. The program may be about as
    far from it as the folded module is, in `dtype` if one is given: see ``fxfuse.verify`` on rounding. Raises
    what the folded module raises if it does not take the inputs.
    """
    # Tensors of inference mode could not become constants.
    with torch.inference_mode(False), torch.no_grad(), no_autocast():
        try:
            own = pytree.tree_map(own_copy, tuple(inputs))
            compiler = Compiler(traced.folded, traced.graph_for(own), engine, dtype)
            outcome = in_slices(compiler, own) or compiler.compile(own).verify()
            return _in_layout_of(inputs, own, outcome)
        except UnsupportedError as error:
            return Outcome(None, str(error))
        except REJECTIONS as error:
            run_module(traced.folded, inputs, seed=0)  # raises if it does not take them
            return Outcome(None, with_type(error))


def _in_layout_of(inputs: Sequence[Any], own: tuple[Any, ...], outcome: Outcome) -> Outcome:
    """What was made for copies of inputs, for these: kernels read the memory that they were compiled for."""
    run = outcome.run
    others = moved(pytree.tree_leaves(tuple(inputs)), pytree.tree_leaves(own))
    if run is None or not others:
        return outcome
    return replace(
        outcome,
        run=lambda leaves: run([leaf.clone() if n in others else leaf for n, leaf in enumerate(leaves)]),
    )
