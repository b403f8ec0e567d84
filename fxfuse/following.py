"""Folded weights that follow those that they were folded from."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook
from torch.utils.weak import WeakTensorKeyDictionary

from fxfuse.dynamo import Key
from fxfuse.nodes import Norm
from fxfuse.ops import Reader
from fxfuse.plan import Move, Plan
from fxfuse.solve import Solution, solve, sources
from fxfuse.tree import put

_LOG = logging.getLogger("fxfuse")


@dataclass(frozen=True)
class _Weights:
    """What was folded from one set of parameters and buffers.

    Attributes:
        tensors: the folded weight, 0, and bias, 1, of each operator; None if these cannot be folded.
        seen: of each source its place among the inputs, itself, its version, which operators that write to it
            count up, its address, and its memory, so that nothing else gets that address.
        buffers: the numbers of those that are buffers: the kernels of batch norm do not count.
        steps: how many steps optimisers had made: their fused kernels do not count either.
    """

    tensors: dict[Key, Tensor] | None
    seen: list[tuple[int | None, weakref.ref[Tensor], int, int, Tensor]]
    buffers: list[Tensor]
    steps: int

    def is_stale(self, inputs: Sequence[Any]) -> bool:
        """Whether a source is another tensor than it was, or may have been written to."""
        for place, reference, version, address, _ in self.seen:
            tensor: Any = reference()
            now = tensor if place is None else inputs[place]
            if now is not tensor or now._version != version or now.data_ptr() != address:
                return True
        return self.steps != _optimiser_steps().count


class Followers:
    """The folded tensors of a plan, folded again whenever a tensor that they come from has changed.

    Instances of one class share their compiled code; each has folded tensors of its own.

    Args:
        plan: what is folded.
        solution: the folded tensors of the first instance.
        reader: reads the graph in which they are, as it was before.
        tensors: its parameters and buffers, by their names.
        places: the places among the inputs of those that are inputs; the others are attributes for good.
    """

    def __init__(
        self,
        plan: Plan,
        solution: Solution,
        reader: Reader,
        tensors: Mapping[str, Tensor],
        places: Mapping[str, int],
    ) -> None:
        self._plan = plan
        self._reader = reader
        self._places = places
        self._attributes = {name: tensor for name, tensor in tensors.items() if name not in places}
        self._sources = sorted(sources(plan, reader))
        buffers = {name for name in self._sources if not isinstance(tensors[name], nn.Parameter)}
        moves = [change for change in plan.changes if isinstance(change, Move)]
        norms = [move.source for move in moves if isinstance(move.source, Norm)]
        # Whoever trains writes the mean with the variance.
        self._buffers = sorted(buffers - {norm.var for norm in norms if norm.mean in buffers})
        # Instances may share a weight, but hardly statistics.
        self._key = min(self._sources, key=lambda name: name not in buffers)
        self._sets: Any = WeakTensorKeyDictionary()
        self._sets[tensors[self._key]] = self._weights(tensors, lambda: solution)
        self._folding = threading.Lock()
        self._let_go()

    def follow(self, inputs: Sequence[Any]) -> dict[Key, Tensor] | None:
        """The tensors that are folded from the weights among `inputs`; None if these cannot be folded.

        They are new ones where something has changed: threads and backward passes may use the old ones yet.
        """
        key = self._tensor(self._key, inputs)
        weights: _Weights | None = self._sets.get(key)
        if weights is None or weights.is_stale(inputs) or self._have_changed(weights, inputs):
            with self._folding:
                weights = self._sets[key] = self._folded(inputs)
        return weights.tensors

    def _have_changed(self, weights: _Weights, inputs: Sequence[Any]) -> bool:
        """Whether buffers have other numbers: a norm that trains writes statistics and counts no version."""
        now = _joined([self._tensor(name, inputs) for name in self._buffers])
        return not all(map(torch.equal, weights.buffers, now))

    def _tensor(self, name: str, inputs: Sequence[Any]) -> Tensor:
        tensor: Tensor = inputs[self._places[name]] if name in self._places else self._attributes[name]
        return tensor

    def _folded(self, inputs: Sequence[Any]) -> _Weights:
        tensors = {name: self._tensor(name, inputs) for name in (*self._places, *self._attributes)}
        for name, tensor in tensors.items():
            put(self._reader.root, name, tensor)
        try:
            with torch.inference_mode(False), torch.no_grad():
                return self._weights(tensors, lambda: solve(self._plan, self._reader, {}))
        finally:
            self._let_go()

    def _weights(self, tensors: Mapping[str, Tensor], solution: Callable[[], Solution]) -> _Weights:
        """What is folded of `tensors`. Before it is, they are looked at: who writes meanwhile is noticed."""
        watched = ((self._places.get(name), tensors[name]) for name in self._sources)
        seen = [
            (place, weakref.ref(tensor), tensor._version, tensor.data_ptr(), tensor.detach())
            for place, tensor in watched
        ]
        buffers, steps = _joined([tensors[name] for name in self._buffers]), _optimiser_steps().count
        solved = solution()
        if solved.failed:
            reasons = "; ".join(dict.fromkeys(code.value.reason for code in solved.failed.values()))
            _LOG.warning("the new weights cannot be folded, so the norms run as they are: %s", reasons)
        return _Weights(None if solved.failed else keyed(solved), seen, buffers, steps)

    def _let_go(self) -> None:
        """Keeps no model alive: between folds nothing reads its tensors."""
        self._reader.root = nn.Module()
        self._reader.forget_tensors()


def keyed(solution: Solution) -> dict[Key, Tensor]:
    """The folded weight, 0, and bias, 1, of each operator, which ask for no gradients."""
    found = {
        (node, part): tensor.detach()
        for node, pair in solution.tensors.items()
        for part, tensor in enumerate(pair)
        if tensor is not None
    }
    for tensor in found.values():
        torch._dynamo.mark_static_address(tensor, guard=False)
    return found


def _joined(tensors: Sequence[Tensor]) -> list[Tensor]:
    """The tensors end to end, in one for each device and dtype."""
    kinds = dict.fromkeys((tensor.device, tensor.dtype) for tensor in tensors)
    return [
        torch.cat([tensor.detach().flatten() for tensor in tensors if (tensor.device, tensor.dtype) == kind])
        for kind in kinds
    ]


class _Steps:
    """Counts the steps of all optimisers."""

    def __init__(self) -> None:
        self.count = 0
        register_optimizer_step_post_hook(self._step)

    def _step(self, *_: Any) -> None:
        self.count += 1


@cache
def _optimiser_steps() -> _Steps:
    return _Steps()
