"""Modules that `fuse` kept, as graphs.

It does so where forward takes options, as that of vision transformers, of which a graph holds one choice:
here the defaults. Forward itself does not run then, so nothing else may depend on it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from fxfuse.capture import capture
from fxfuse.errors import CaptureError, UnsupportedError, UsageError
from fxfuse.lowering.state import held, is_same
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
            with torch.inference_mode(False):
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
            before = held(own)  # what it keeps from the first time on is no state
            second = _outputs(own, inputs)
            if not is_same(before, held(own)):
                raise UnsupportedError("forward changes what the module holds, which no kernel does")
            if not _is_equal(first, second):
                raise UnsupportedError("forward gives other numbers the second time")
            if not _is_equal(first, _outputs(isolated(self.graph), inputs)):
                raise UnsupportedError("its trace gives others than forward, or other containers of them")
        return self.graph


def _outputs(module: nn.Module, inputs: Sequence[Any]) -> tuple[list[Any], pytree.TreeSpec]:
    with clean_run(inputs, seed=0) as copies:
        return pytree.tree_flatten(module(*copies))


def _is_equal(one: tuple[list[Any], pytree.TreeSpec], other: tuple[list[Any], pytree.TreeSpec]) -> bool:
    """Bit by bit, in the same containers."""
    return one[1] == other[1] and all(
        torch.equal(a, b) if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor) else a == b
        for a, b in zip(one[0], other[0], strict=True)
    )
