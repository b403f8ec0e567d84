"""Folded weights that follow those that they were folded from."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Callable, Iterable, Mapping, Sequence
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


class Watch:
    """Tells whether tensors were written to since, or others are in their places.

    Of each it keeps the memory, so that nothing else gets that address. Kernels of batch norm that train
    write statistics and count no version, so the numbers of buffers are compared; nor do fused optimisers.

    Args:
        tensors: each with its place among the inputs; None if it is an attribute for good.
        buffers: those of them whose numbers are to be compared.
    """

    def __init__(
        self, tensors: Iterable[tuple[int | None, Tensor]], buffers: Iterable[tuple[int | None, Tensor]] = ()
    ) -> None:
        self._seen = [
            (place, weakref.ref(tensor), tensor._version, tensor.data_ptr(), tensor.detach())
            for place, tensor in tensors
        ]
        compared = [*buffers]
        self._buffers: list[tuple[int | None, Any]] = [
            (place, tensor if place is None else None) for place, tensor in compared
        ]
        self._numbers = _joined([tensor for _, tensor in compared])
        self._steps = _optimiser_steps().count

    def is_stale(self, inputs: Sequence[Any]) -> bool:
        """Whether a tensor is another one than it was, or may have been written to."""
        for place, reference, version, address, _ in self._seen:
            tensor: Any = reference()
            now = tensor if place is None else inputs[place]
            if now is not tensor or now._version != version or now.data_ptr() != address:
                return True
        if self._steps != _optimiser_steps().count:
            return True
        buffers = [tensor if place is None else inputs[place] for place, tensor in self._buffers]
        return not all(map(torch.equal, self._numbers, _joined(buffers)))


@dataclass(frozen=True)
class _Weights:
    """What was folded from one set of parameters and buffers.

    Attributes:
        tensors: the folded weight, 0, and bias, 1, of each operator; None if these cannot be folded.
        watch: tells whether they are stale.
    """

    tensors: dict[Key, Tensor] | None
    watch: Watch


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
        if weights is None or weights.watch.is_stale(inputs):
            with self._folding:
                weights = self._sets[key] = self._folded(inputs)
        return weights.tensors

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
        watched = (self._sources, self._buffers)
        watch = Watch(*(((self._places.get(name), tensors[name]) for name in names) for names in watched))
        solved = solution()
        if solved.failed:
            reasons = "; ".join(dict.fromkeys(code.value.reason for code in solved.failed.values()))
            _LOG.warning("the new weights cannot be folded, so the norms run as they are: %s", reasons)
        return _Weights(None if solved.failed else keyed(solved), watch)

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
