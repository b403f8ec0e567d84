"""Whether two models are the same function, rounding aside: both run in float64.

The candidate's weights have been rounded to its dtype, so even in float64 the two differ by what that does to
the outputs. How much it can be is measured: the candidate runs again with each of these weights changed at
random by about a unit in the last place of its dtype. Of a mistake these runs know nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.distances import distance, finite, rms, wide
from fxfuse.replica import replicate
from fxfuse.runs import REJECTIONS, LeastPrecision, Outputs, in_float64, run
from fxfuse.tree import named_tensors
from fxfuse.verdict import Agreement

# Runs with changed weights.
_RUNS = 3
# The difference may be so many times as large as what the changes do, since by chance they may cancel.
_FACTOR = 3.0
# In float64 sums differ by their order: relative to the largest output, for each norm of a model.
_SUMS = 1e-11
# Differences up to this count as none.
ZERO = 1e-12
# Parts of an output, of at least so many elements, are looked at by themselves: larger values elsewhere do
# not hide them. There are many of them, and in one the changes may cancel by chance.
_PART = 64
_PART_FACTOR = 4 * _FACTOR


class UnmeasurableError(Exception):
    """The models cannot be compared in float64; the message says why."""


class Truth:
    """The float64 run of a reference, and what agrees with it.

    Attributes:
        outputs: what it gives.

    Raises:
        UnmeasurableError: it does not run in float64, or gives other outputs there.
    """

    def __init__(self, reference: nn.Module, inputs: Sequence[Any], seed: int, expected: Outputs) -> None:
        self._reference = reference
        self._inputs = in_float64(inputs)
        self._seed = seed
        with LeastPrecision() as least:
            self.outputs = self._run(replicate(reference).double())
        # A model may compute something in another dtype all the same.
        self._eps = least.eps
        norms = sum(hasattr(module, "running_var") for module in reference.modules())
        self._sums = _SUMS * (1 + norms)
        if _shapes(self.outputs) != _shapes(expected):
            raise UnmeasurableError("in float64 the reference gives other outputs")

    def agreements(self, candidate: nn.Module) -> dict[str, Agreement]:
        """How the candidate, in float64, agrees with the reference, by output.

        Raises:
            UnmeasurableError: it does not run in float64, or gives other outputs there.
        """
        outputs = self._run(replicate(candidate).double())
        if _shapes(outputs) != _shapes(self.outputs):
            raise UnmeasurableError("in float64 the two models give different outputs")
        changed = [self._run(each) for each in self._changed(candidate)]
        return {
            place: _agreement(place, value, outputs[place], [each[place] for each in changed], self._sums)
            for place, value in self.outputs.items()
            if isinstance(value, Tensor) and value.numel()
        }

    def _run(self, model: nn.Module) -> Outputs:
        try:
            return run(model, self._inputs, self._seed)
        except REJECTIONS as error:
            reason = str(error).partition("\n")[0] or type(error).__name__
            raise UnmeasurableError(f"{type(model).__name__} does not run in float64: {reason}") from error

    def _changed(self, candidate: nn.Module) -> Iterator[nn.Module]:
        """The candidate in float64, its weights changed that are not the reference's own."""
        own = dict(named_tensors(self._reference))
        rounded = {
            name: torch.finfo(tensor.dtype)
            for name, tensor in named_tensors(candidate)
            if tensor.is_floating_point() and not _equal(tensor, own.get(name))
        }
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(_RUNS if rounded else 0):
            twin = replicate(candidate).double()
            tensors = {id(tensor): (tensor, rounded.get(name)) for name, tensor in named_tensors(twin)}
            for tensor, limits in tensors.values():
                if limits is not None:
                    unit = max(limits.eps, self._eps) * (tensor.abs() + limits.tiny) * (tensor != 0)
                    # Twice as large as rounding may be, and never zero, which would hide a lone weight.
                    steps = torch.rand(tensor.shape, generator=generator, dtype=torch.float64) - 0.5
                    steps = steps + 0.5 * steps.sign()
                    tensor.data = tensor.detach() + unit.detach() * steps.to(tensor.device)
            yield twin


def least_explained(agreements: Iterable[Agreement]) -> Agreement | None:
    """Of several the one that fails, or comes nearest to that."""
    return max(agreements, key=lambda each: (not each.ok, each.difference / each.allowed), default=None)


def _equal(tensor: Tensor, other: Tensor | None) -> bool:
    return other is not None and tensor.dtype == other.dtype and torch.equal(tensor, other.to(tensor.device))


def _shapes(outputs: Outputs) -> dict[str, Any]:
    return {place: getattr(value, "shape", None) for place, value in outputs.items()}


def _agreement(place: str, value: Tensor, other: Tensor, changed: Sequence[Tensor], sums: float) -> Agreement:
    left, right = wide(value), wide(other)
    if value.is_floating_point() or value.is_complex():
        size = float(finite(left).abs().amax())
        difference = distance(left, right)
        changes = [distance(right, wide(each)) for each in changed]
    else:  # other numbers are equal or not
        size = 1.0
        difference = (left != right).double()
        changes = [(right != wide(each)).double() for each in changed]
    least = max(sums * size, ZERO)
    allowed = least + _FACTOR * max((float(each.amax()) for each in changes), default=0.0)
    ok = (
        float(difference.amax()) <= allowed
        and rms(difference) <= least + _FACTOR * max(map(rms, changes), default=0.0)
        and all(_parts_explained(difference, changes, axis, least) for axis in range(left.dim()))
    )
    scale = size or 1.0
    return Agreement(ok, place, float(difference.amax()) / scale, allowed / scale)


def _parts_explained(difference: Tensor, changes: Sequence[Tensor], axis: int, least: float) -> bool:
    """The same for each part of an output with one index along `axis`."""
    if difference.numel() < _PART * difference.shape[axis]:
        return True

    def by_part(tensor: Tensor) -> Tensor:
        return tensor.movedim(axis, 0).flatten(1).square().mean(1).sqrt()

    allowed = torch.stack([torch.zeros(difference.shape[axis]), *map(by_part, changes)]).amax(0)
    return bool((by_part(difference) <= least + _PART_FACTOR * allowed).all())
