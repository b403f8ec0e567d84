"""A folded module and inputs → a program that has been compared with it; or the reason why there is none."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxfuse.errors import UnsupportedError
from fxfuse.lowering.candidates import Compiler, Outcome
from fxfuse.lowering.engines import Engine
from fxfuse.lowering.kept import Traced
from fxfuse.lowering.slices import in_slices
from fxfuse.precision import no_autocast
from fxfuse.runs import REJECTIONS
from fxfuse.runs import run as run_module

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_SIMPLE = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)


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
            own = pytree.tree_map(_own_copy, tuple(inputs))
            compiler = Compiler(traced.folded, traced.graph_for(own), engine, dtype)
            outcome = in_slices(compiler, own) or compiler.compile(own).verify()
            return _in_layout_of(inputs, own, outcome)
        except UnsupportedError as error:
            return Outcome(None, str(error))
        except REJECTIONS as error:
            run_module(traced.folded, inputs, seed=0)  # raises if it does not take them
            return Outcome(None, f"{type(error).__name__}: {str(error).partition(chr(10))[0]}")


def _in_layout_of(inputs: Sequence[Any], own: tuple[Any, ...], outcome: Outcome) -> Outcome:
    """What was made for copies of inputs, for these: a copy may lie in memory in another way.

    Kernels read the memory that they were compiled for.
    """
    run = outcome.run
    pairs = zip(pytree.tree_leaves(tuple(inputs)), pytree.tree_leaves(own), strict=True)
    others = {place for place, (one, its) in enumerate(pairs) if memory_layout(one) != memory_layout(its)}
    if run is None or not others:
        return outcome
    return replace(
        outcome,
        run=lambda leaves: run([leaf.clone() if n in others else leaf for n, leaf in enumerate(leaves)]),
    )


def memory_layout(leaf: Any) -> Any:
    """How a tensor lies in memory, and how that is to be read; None for anything else."""
    if not isinstance(leaf, Tensor):
        return None
    if not _is_block(leaf):
        return "none that kernels read"
    return leaf.shape, leaf.stride(), leaf.is_neg(), leaf.is_conj()


def _is_block(tensor: Tensor) -> bool:
    """Whether it has numbers of its own in memory: it is not sparse, nested, or a stand-in of torch.func."""
    return tensor.layout is torch.strided and not tensor.is_nested and not _is_wrapped(tensor)


def _own_copy(leaf: Any) -> Any:
    """A tensor of its own memory.

    Raises:
        UnsupportedError: it is no block of memory, or empty, or an object that may change without notice.
    """
    if type(leaf) in (Tensor, nn.Parameter):
        if not _is_block(leaf):
            raise UnsupportedError("an input is sparse, nested or one of torch.func")
        if not leaf.numel():
            raise UnsupportedError("an input is empty")
        return leaf.detach().clone()
    if type(leaf) in _SIMPLE:  # of which each has a text of its own
        return leaf
    raise UnsupportedError(f"an input is a {type(leaf).__name__}")
