"""Each fold, tried out: what the folded operator gives is what the operators of the source gave.

The source's side is computed as a sum of products and by torch's own batch norm, and not by the arithmetic of
`fxfuse.affine` and `fxfuse.fold`. Everything is in float64, on a small random input: one that covers the
kernel once and is zero in all but a few input channels, so that little of a large weight has to be read. All
output channels are looked at. Operators that become one are run by torch's own functions, whole, on an input
that is as small as may be for every tap and the border to be seen. Two things are asked:

* algebra: folded in float64, does the operator give the same? That does not depend on the model's dtype.
* rounding: are the folded weight and bias those numbers, each rounded once?

What the graph was read as, and where a map was found to go, is taken as given: ``verify`` looks at that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from functools import partial

import torch
from torch import Tensor, fx

from fxfuse.affine import exact
from fxfuse.channels import Channels
from fxfuse.eager import Part, applied, averaged, is_near, is_rounded, mapped
from fxfuse.fold import Absorption, absorb_unchecked
from fxfuse.forms import Form, Total
from fxfuse.geometry import Axis, Geometry, Window
from fxfuse.nodes import Affine, Linear, Norm
from fxfuse.ops import Reader
from fxfuse.plan import Change, Merge, Move, Plan, Site
from fxfuse.solve import Solution, merged_kernel

# In-channels, of each group, in which the input is not zero.
_CHANNELS = 4
# Sums in float64 may differ by this, relative to what is summed.
_SUMS = 2.0**-42


def errors(plan: Plan, solution: Solution, reader: Reader) -> dict[Change, float]:
    """How far the folds of each are from the source: relative L2 distance; infinite if they are wrong.

    What has no numbers (tensors on the meta device) is left out.
    """
    taken: dict[fx.Node, list[tuple[Move, Site]]] = defaultdict(list)
    for move in plan.moves:
        for site in move.sites:
            taken[site.node].append((move, site))
    generator = torch.Generator("cpu").manual_seed(0)
    found: dict[Change, float] = {}
    hosts = {merge.host for merge in plan.merges}
    with torch.no_grad():
        for node, (weight, bias) in solution.tensors.items():
            if not weight.is_meta and node not in hosts:
                trial = _Trial(solution.absorptions[node], taken[node], reader, generator)
                error = trial.error(weight, bias)
                found |= {move: max(error, found.get(move, 0.0)) for move, _ in taken[node]}
        for merge in plan.merges:
            if not solution.tensors[merge.host][0].is_meta:
                error = _MergeTrial(merge, solution, taken, reader, generator).error()
                found |= dict.fromkeys((merge, *merge.moves), error)
                inside = 0.0 if error == math.inf else error
                for move in (move for node in merge.operators for move, _ in taken[node]):
                    found[move] = max(inside, found.get(move, 0.0))
    return found


class _Trial:
    """One operator of the source, the norms and constants that it takes up, and an input for it."""

    def __init__(
        self,
        what: Absorption,
        taken: Sequence[tuple[Move, Site]],
        reader: Reader,
        generator: torch.Generator,
    ) -> None:
        self.operator = taken[0][1].operator
        self.reader = reader
        self.before = [each for each in reversed(taken) if each[1].side == "input"]
        self.after = [each for each in taken if each[1].side == "output"]
        groups, count = what.groups, self.operator.in_channels // what.groups
        # What a shift before the operator adds comes out of all channels.
        size = count if self.before else min(count, _CHANNELS)
        start = int(torch.randint(count - size + 1, (), generator=generator, device="cpu"))
        self.channels = slice(start, start + size)
        bias = None if what.bias is None else exact(what.bias)
        self.source = replace(what, weight=self._some(what.weight), bias=bias)
        seen = 1 if what.transposed else math.prod(what.weight.shape[2:])
        x = torch.rand((1, groups * size, seen), dtype=torch.float64, generator=generator, device="cpu") - 0.5
        self.x = x.to(self.source.weight.device)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """The relative L2 distance of the operator with these from the source; infinite if they are wrong."""
        right = absorb_unchecked(self.source)
        changes = self._some(weight) - right[0], (0.0 if bias is None else exact(bias)) - right[1]
        return _error(partial(self._run, self.x), self._expected, right, changes, weight.dtype)

    def _expected(self, part: Part) -> Tensor:
        """What the source gives; with ``part=abs`` the magnitudes of what is summed on the way."""
        value = part(self.x)
        for move, site in self.before:
            value = mapped(value, move.source, site.channels, self.reader, part)
        bias = None if self.source.bias is None else part(self.source.bias)
        value = self._run(value, part(self.source.weight), bias)
        for move, site in self.after:
            value = mapped(value, move.source, site.channels, self.reader, part)
        return value

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """At one place: (1, in, kernel) → (1, out, 1), or transposed (1, in, 1) → (1, out, kernel)."""
        groups, channels = self.operator.groups, self.operator.channels
        if self.operator.transposed:
            rows = x.view(groups, 1, -1) @ weight.reshape(groups, weight.shape[0] // groups, -1)
        else:
            rows = weight.reshape(groups, channels // groups, -1) @ x.view(groups, -1, 1)
        value = rows.view(1, channels, -1)
        # The bias of a linear function may have a batch axis, or be one number.
        return value if bias is None else value + bias.view(-1, bias.shape[-1] if bias.dim() else 1, 1)

    def _some(self, weight: Tensor) -> Tensor:
        """The weights of the channels in which the input is not zero, in float64."""
        if not self.operator.transposed:
            return exact(weight[:, self.channels])
        grouped = weight.view(self.operator.groups, -1, *weight.shape[1:])
        return exact(grouped[:, self.channels].flatten(0, 1))


class _MergeTrial:
    """Operators of the source that become one, with the norms and constants that each takes up."""

    def __init__(
        self,
        merge: Merge,
        solution: Solution,
        taken: Mapping[fx.Node, Sequence[tuple[Move, Site]]],
        reader: Reader,
        generator: torch.Generator,
    ) -> None:
        self.form = merge.form
        self.host = merge.operators[merge.host]
        self.reader = reader
        self.taken = taken
        self.folded = solution.tensors[merge.host]
        self.exactly = merged_kernel(merge, solution.absorptions, reader)
        geometry, channels = self.form.geometry, self.form.in_channels
        assert geometry is not None and channels is not None
        sizes = [_size(axis, geometry) for axis in geometry.axes]
        x = torch.rand((2, channels, *sizes), dtype=torch.float64, generator=generator, device="cpu") - 0.5
        self.x = x.to(self.exactly.weight.device)

    def error(self) -> float:
        """The relative L2 distance of the one operator from those of the source; infinite if it is wrong."""
        right, (weight, bias) = (self.exactly.weight, self.exactly.bias), self.folded
        changes = exact(weight) - right[0], (0.0 if bias is None else exact(bias)) - right[1]
        run, source = partial(applied, self.host, self.x), partial(self._value, self.form)
        return _error(run, source, right, changes, weight.dtype)

    def _value(self, form: Form, part: Part) -> Tensor:
        """What the source makes of x; with ``part=abs`` the magnitudes of what is summed on the way."""
        step = form.step
        if not form.parts:
            return part(self.x)
        values = [self._value(each, part) for each in form.parts]
        if isinstance(step, Total):
            factors = [part(value.new_tensor(each)) for value, each in zip(values, step.factors, strict=True)]
            return torch.stack([f * v for f, v in zip(factors, values, strict=True)]).sum(0)
        (value,) = values
        if isinstance(step, Linear):
            return self._linear(form.node, step, value, part)
        if isinstance(step, Norm | Affine):
            assert form.acts is not None
            index = form.acts.index if form.acts.axes else form.acts.index * value.shape[1]
            return self._mapped(value, step, replace(form.acts, index=index), part)
        return averaged(step, value) if isinstance(step, Window) else value

    def _linear(self, node: fx.Node, linear: Linear, value: Tensor, part: Part) -> Tensor:
        taken = self.taken.get(node, ())
        for move, site in reversed(taken):
            if site.side == "input":
                value = self._mapped(value, move.source, site.channels, part)
        bias = None if linear.bias is None else part(exact(self.reader.tensor(linear.bias)))
        value = applied(linear, value, part(exact(self.reader.tensor(linear.weight))), bias)
        for move, site in taken:
            if site.side == "output":
                value = self._mapped(value, move.source, site.channels, part)
        return value

    def _mapped(self, value: Tensor, source: Norm | Affine, channels: Channels, part: Part) -> Tensor:
        places = value.reshape(*value.shape[:2], -1)
        return mapped(places, source, channels, self.reader, part).view(value.shape)


def _size(axis: Axis, geometry: Geometry) -> int:
    """Of an input that is as small as may be for every tap to meet some of it, and the border."""
    if geometry.transposed:
        return 2 + max(0, -(-(2 * axis.padding - axis.reach - axis.extra) // axis.stride))
    if geometry.fill == "zeros":
        return axis.stride + max(1, axis.reach + 1 - 2 * axis.padding)
    return axis.stride + max(axis.reach, axis.padding) + 1


def _error(
    run: Callable[[Tensor, Tensor], Tensor],
    source: Callable[[Part], Tensor],
    right: tuple[Tensor, Tensor],
    changes: tuple[Tensor, Tensor],
    dtype: torch.dtype,
) -> float:
    """The relative L2 distance of a folded operator from the source; infinite if it is wrong.

    Args:
        run: gives what the operator makes of x with a weight and a bias.
        source: gives what the source makes of x; of `abs` the magnitudes of what is summed on the way.
        right: the weight and bias in float64.
        changes: what rounding added to them.
        dtype: to which they were rounded.
    """
    expected = source(lambda part: part)
    difference = run(*right) - expected
    # Where large numbers cancel, it is these that count.
    if not is_near(difference, expected, _SUMS) and not is_near(difference, source(abs), _SUMS):
        return math.inf
    if not all(is_rounded(change, each, dtype) for change, each in zip(changes, right, strict=True)):
        return math.inf
    size = torch.linalg.vector_norm(expected)
    distance = torch.linalg.vector_norm(difference + run(*changes))
    return float(distance / size) if size else 0.0
