"""Modules that `fuse` kept, as graphs.

It does so where forward takes options, as that of vision transformers, of which a graph holds one choice:
here the defaults. Forward itself does not run then, so nothing else may depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse.capture import capture
from fxfuse.errors import CaptureError, UnsupportedError, UsageError
from fxfuse.held import held, is_same
from fxfuse.inputs import drawn_like
from fxfuse.lowering.lock import COMPILES
from fxfuse.replica import isolated
from fxfuse.runs import clean_run


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
            UnsupportedError: there is none; or the folded module changes what it holds, or gives other
                numbers or containers than the graph.
        """
        if self.graph is None:
            raise UnsupportedError(self.reason)
        if self.graph is not self.folded:
            self._check_trace(self.graph, tuple(inputs))
        return self.graph

    def _check_trace(self, graph: fx.GraphModule, inputs: tuple[Any, ...]) -> None:
        """Raises an UnsupportedError where the graph and forward were seen to differ.

        What forward keeps from the first run on, of other numbers, is no state, if it has no effect.
        """
        own = isolated(self.folded)
        _outputs(own, drawn_like(inputs, seed=1))
        before, writes = _state(own)
        outputs = _outputs(own, inputs)
        after, more_writes = _state(own)
        if not is_same(before, after) or writes != more_writes:
            raise UnsupportedError("forward changes what the module holds, which no kernel does")
        if not _is_equal(outputs, _outputs(isolated(graph), inputs)):
            raise UnsupportedError("forward gives other numbers or containers than its trace")


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
    is_like = (one.shape, one.dtype) == (other.shape, other.dtype)
    return is_like and torch.allclose(one, other, rtol=0, atol=0, equal_nan=True)
