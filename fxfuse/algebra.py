"""Whether two models are the same function, rounding aside: both run in float64.

The candidate's weights have been rounded to its dtype, so even in float64 the two differ by what that does to
the outputs. How much it can be is measured: the candidate runs again with each of these weights changed at
random by about half a unit in the last place of its dtype. Of a mistake these runs know nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.distances import ZERO, distance, finite, rms, wide
from fxfuse.errors import first_line
from fxfuse.inputs import in_float64
from fxfuse.layers import has_statistics
from fxfuse.precision import LeastPrecision
from fxfuse.replica import isolated
from fxfuse.runs import REJECTIONS, Outputs, run
from fxfuse.tree import named_tensors
from fxfuse.verdict import Agreement

# Runs with changed weights.
_RUNS = 3
# The difference may be so many times as large as what the changes do, since by chance they may cancel.
_FACTOR = 3.0
# In float64 sums differ by their order: relative to the largest output, for each norm of a model.
_SUMS = 1e-11
# The code of a model may hold constants that are rounded, to float32 at worst: so many units in its last
# place, relative to the outputs, count as none.
_OWN = 4.0
_FLOAT32 = torch.finfo(torch.float32).eps
_FLOAT64 = torch.finfo(torch.float64).eps
# A weight that was rounded in several steps may be so many units in the last place off.
_STEPS = 8.0
# Parts of an output, of at least so many elements, are looked at by themselves: larger values elsewhere do
# not hide them. There are many of them, and in one the changes may cancel by chance.
_PART = 64
_PART_FACTOR = 4 * _FACTOR


Measure = Callable[[Tensor], Tensor]


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
        twin = _doubled(reference)
        with LeastPrecision() as least:
            self.outputs = self._run(twin)
        # A model may compute something in another dtype all the same.
        self._eps = least.eps
        norms = sum(map(has_statistics, reference.modules()))
        self._sums = _SUMS * (1 + norms)
        if _shapes(self.outputs) != _shapes(expected):
            raise UnmeasurableError("in float64 the reference gives other outputs")

    def agreements(self, candidate: nn.Module, dtype: torch.dtype) -> dict[str, Agreement]:
        """How the candidate, in float64, agrees with the reference, by output.

        Args:
            candidate: the other model.
            dtype: of its outputs, and of the constants in its code.

        Raises:
            UnmeasurableError: it does not run in float64, or gives other outputs there.
        """
        outputs = self._run(_doubled(candidate))
        if _shapes(outputs) != _shapes(self.outputs):
            raise UnmeasurableError("in float64 the two models give different outputs")
        changed = [self._run(each) for each in self._changed(candidate)]
        eps = max(min(torch.finfo(dtype).eps, _FLOAT32), self._eps)
        return {
            place: _agreement(
                place, value, outputs[place], [each[place] for each in changed], self._sums, eps
            )
            for place, value in self.outputs.items()
            if isinstance(value, Tensor) and value.numel()
        }

    def _run(self, model: nn.Module) -> Outputs:
        try:
            return run(model, self._inputs, self._seed, is_own=True)
        except REJECTIONS as error:
            reason = first_line(error)
            raise UnmeasurableError(f"{type(model).__name__} does not run in float64: {reason}") from error

    def _changed(self, candidate: nn.Module) -> Iterator[nn.Module]:
        """The candidate in float64, its weights changed that are not the reference's own."""
        own = defaultdict(list)
        for _, tensor in _strided(self._reference):
            own[tensor.dtype, tensor.shape].append(tensor)
        rounded = {
            name: torch.finfo(tensor.dtype)
            for name, tensor in _strided(candidate)
            if tensor.is_floating_point()
            and max(torch.finfo(tensor.dtype).eps, self._eps) > _FLOAT64
            and not any(_equal(tensor, other) for other in own[tensor.dtype, tensor.shape])
        }
        generator = torch.Generator().manual_seed(self._seed)
        for _ in range(_RUNS if rounded else 0):
            twin = _doubled(candidate)
            tensors = {id(tensor): (tensor, rounded.get(name)) for name, tensor in named_tensors(twin)}
            for tensor, limits in tensors.values():
                if limits is not None:
                    # As large as rounding is at most, and never zero, which would hide a lone weight.
                    steps = torch.rand(tensor.shape, generator=generator).sub_(0.5)
                    steps = steps.add_(steps.sign()).mul_(max(limits.eps, self._eps) / 3).to(tensor.device)
                    tensor.data = tensor.detach() + steps * (tensor.abs() + limits.tiny) * (tensor != 0)
            yield twin


def others_than_rounded(candidate: nn.Module, folded: nn.Module) -> list[str]:
    """The weights of `candidate` that are not those of `folded`, which is in float64, but for rounding.

    What only one of the two has is left out. A model may compute weights in its own dtype, in a few steps.
    """
    exact = dict(_strided(folded))
    found = []
    for name, tensor in _strided(candidate):
        if tensor.is_floating_point() and name in exact and exact[name].shape == tensor.shape:
            limits = torch.finfo(tensor.dtype)
            apart = distance(wide(tensor), wide(exact[name]))
            if bool((apart > _STEPS * limits.eps * (wide(exact[name]).abs() + limits.tiny)).any()):
                found.append(name)
    return found


def least_explained(agreements: Iterable[Agreement]) -> Agreement | None:
    """Of several the one that fails, or comes nearest to that."""
    return max(agreements, key=lambda each: (not each.ok, each.difference / each.allowed), default=None)


def _doubled(model: nn.Module) -> nn.Module:
    """A copy in float64, which a run may write to."""
    return isolated(model).double()


def _strided(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Its parameters and buffers that are not sparse."""
    return ((name, tensor) for name, tensor in named_tensors(model) if tensor.layout is torch.strided)


def _equal(tensor: Tensor, other: Tensor) -> bool:
    return tensor is other or torch.equal(tensor, other.to(tensor.device))


def _shapes(outputs: Outputs) -> dict[str, Any]:
    return {place: getattr(value, "shape", None) for place, value in outputs.items()}


def _agreement(
    place: str, value: Tensor, other: Tensor, changed: Sequence[Tensor], sums: float, eps: float
) -> Agreement:
    left, right = wide(value), wide(other)
    if value.is_floating_point() or value.is_complex():
        sizes = finite(left).abs()
        difference = distance(left, right)
        changes = [distance(right, wide(each)) for each in changed]
    else:  # other numbers are equal or not
        sizes, eps = torch.ones_like(left), 0.0
        difference = (left != right).double()
        changes = [(right != wide(each)).double() for each in changed]
    largest = float(sizes.amax())

    def allowed(measure: Measure, factor: float) -> Tensor:
        of_weights = torch.stack([measure(each) for each in (torch.zeros_like(left), *changes)]).amax(0)
        return max(sums * largest, ZERO) + _OWN * eps * measure(sizes) + factor * of_weights

    measures: list[tuple[Measure, float]] = [(torch.amax, _FACTOR), (rms, _FACTOR)]
    parted = [axis for axis in range(left.dim()) if left.numel() >= _PART * left.shape[axis]]
    measures += [(partial(_by_part, axis=axis), _PART_FACTOR) for axis in parted]
    ok = all(bool((measure(difference) <= allowed(measure, factor)).all()) for measure, factor in measures)
    scale = largest or 1.0
    most, limit = float(difference.amax()) / scale, float(allowed(torch.amax, _FACTOR)) / scale
    return Agreement(ok, place, most, limit)


def _by_part(tensor: Tensor, axis: int) -> Tensor:
    """The root of the mean square of each part with one index along `axis`."""
    return tensor.movedim(axis, 0).flatten(1).square().mean(1).sqrt()
