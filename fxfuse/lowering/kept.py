"""Modules that `fuse` kept, as graphs.

It does so where forward takes options, as that of vision transformers, of which a graph holds one choice:
here the defaults. Forward itself does not run then, so nothing else may depend on it.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse.capture import capture
from fxfuse.errors import CaptureError, UnsupportedError, UsageError
from fxfuse.lowering.state import held, is_same
from fxfuse.replica import isolated
from fxfuse.runs import clean_run

COMPILES = threading.RLock()
"""Held by tracers and compilers, which set what concerns the whole process."""


@dataclass(frozen=True)
class Traced:
    """What is lowered.

    Attributes:
        folded: the folded module.
        graph: what it computes, options at their defaults; itself, if it is a graph. None: it is not known.
        reason: why not.
    """

    folded: nn.Module
    graph: fx.GraphModule | None
    reason: str = ""

    @classmethod
    def of(cls, folded: nn.Module) -> Traced:
        """A folded module, traced if it is no graph. torch's tracer patches modules of the whole process."""
        if isinstance(folded, fx.GraphModule):
            return cls(folded, folded)
        try:
            with COMPILES, torch.inference_mode(False):
                return cls(folded, capture(folded).module())
        except (CaptureError, UsageError) as error:
            return cls(folded, None, f"{type(folded).__name__} is no graph: {error}")

    def graph_for(self, inputs: Sequence[Any]) -> fx.GraphModule:
        """The graph, if it gives what the folded module does.

        Raises:
            UnsupportedError: there is none; or the folded module gives other numbers or containers than the
                graph, or others the second time, or changes what it holds.
        """
        if self.graph is None:
            raise UnsupportedError(self.reason)
        if self.graph is not self.folded:
            own = isolated(self.folded)
            first = _outputs(own, inputs)
            before, writes = _state(own)  # what it keeps from the first time on is no state
            second = _outputs(own, inputs)
            after, more_writes = _state(own)
            if not is_same(before, after) or writes != more_writes:
                raise UnsupportedError("forward changes what the module holds, which no kernel does")
            if not _is_equal(first, second):
                raise UnsupportedError("forward gives other numbers the second time")
            if not _is_equal(first, _outputs(isolated(self.graph), inputs)):
                raise UnsupportedError("its trace gives others than forward, or other containers of them")
        return self.graph


def _state(module: nn.Module) -> tuple[list[Any], list[int]]:
    """What it holds, and how often each tensor in that was written to."""
    found = held(module)
    return found, [each._version for each in found if isinstance(each, Tensor)]


def _outputs(module: nn.Module, inputs: Sequence[Any]) -> tuple[list[Any], pytree.TreeSpec]:
    with clean_run(inputs, seed=0) as copies:
        return pytree.tree_flatten(module(*copies))


def _is_equal(one: tuple[list[Any], pytree.TreeSpec], other: tuple[list[Any], pytree.TreeSpec]) -> bool:
    """The same numbers in the same containers."""
    return one[1] == other[1] and all(map(_is_same_leaf, one[0], other[0]))


def _is_same_leaf(one: Any, other: Any) -> bool:
    if not (isinstance(one, Tensor) and isinstance(other, Tensor)):
        return type(one) is type(other) and bool(one == other)
    if (one.shape, one.dtype) != (other.shape, other.dtype):
        return False
    return bool(((one == other) | (one.isnan() & other.isnan())).all())
