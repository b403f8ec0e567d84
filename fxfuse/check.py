"""Each fold, tried out: what the folded operator gives is what the operators of the source gave.

The source's side is computed as a sum of products and by torch's own batch norm, and not by the arithmetic of
`fxfuse.affine` and `fxfuse.fold`. Everything is in float64, on a small random input: one that covers the
kernel once and is zero in all but a few input channels, so that little of a large weight has to be read. All
output channels are looked at. Operators of one shape are tried together, side by side, which makes them one
with more groups. Operators that become one are run by torch's own functions, whole, on an input that is as
small as may be for every tap and the border to be seen. Two things are asked:

* algebra: folded in float64, does the operator give the same? That does not depend on the model's dtype.
* rounding: are the folded weight and bias those numbers, each rounded once?

What the graph was read as, and where a map was found to go, is taken as given: ``verify`` looks at that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse.affine import AffineMap, exact
from fxfuse.channels import Channels
from fxfuse.eager import Part, applied, averaged, is_near, is_rounded, mapped
from fxfuse.fold import Absorption, absorb_unchecked
from fxfuse.forms import Form, Total
from fxfuse.geometry import Axis, Geometry, Window
from fxfuse.merging import takes_up
from fxfuse.nodes import Affine, Linear, Norm
from fxfuse.ops import Reader
from fxfuse.plan import Change, Merge, Move, Plan, Site
from fxfuse.solve import Folded, Solution, merged_kernel

# In-channels, of each group, in which the input is not zero.
_CHANNELS = 4
# So many weights at most are tried together: memory of larger temporaries is given back each time.
_TOGETHER = 1 << 15
# Sums in float64 may differ by this, relative to what is summed.
_SUMS = 2.0**-42

Taken = Mapping[fx.Node, Sequence[tuple[Move, Site]]]


def errors(plan: Plan, solution: Solution, reader: Reader) -> dict[Change, float]:
    """How far the folds of each are from the source: relative L2 distance; infinite if they are wrong.

    What has no numbers (tensors on the meta device) is left out.
    """
    taken: dict[fx.Node, list[tuple[Move, Site]]] = defaultdict(list)
    for move in plan.moves:
        for site in move.sites:
            taken[site.node].append((move, site))
    noise = _Noise()
    found: dict[Change, float] = {}
    with torch.no_grad():
        for nodes in _alike(plan, solution):
            for node, error in _tried(nodes, solution, taken, reader, noise).items():
                found |= {move: max(error, found.get(move, 0.0)) for move, _ in taken[node]}
        for merge in plan.merges:
            if not solution.tensors[merge.host][0].is_meta:
                error = _MergeTrial(merge, solution, taken, reader, noise).error()
                found |= dict.fromkeys((merge, *merge.moves), error)
                inside = 0.0 if error == math.inf else error
                for move in (move for node in merge.form.nodes for move, _ in taken[node]):
                    found[move] = max(inside, found.get(move, 0.0))
    return found


class _Noise:
    """Random numbers, the same in every run; inputs share them, so that few have to be drawn."""

    def __init__(self) -> None:
        self._generator = torch.Generator("cpu").manual_seed(0)
        self._numbers = self._drawn(_TOGETHER)

    def of(self, shape: Sequence[int]) -> Tensor:
        """A tensor of numbers between -1/2 and 1/2, in float64."""
        count = math.prod(shape)
        if count > len(self._numbers):
            self._numbers = self._drawn(count)
        return self._numbers[:count].view(shape)

    def below(self, limit: int) -> int:
        """A whole number from 0, below `limit`."""
        return int(torch.randint(limit, (), generator=self._generator, device="cpu"))

    def _drawn(self, count: int) -> Tensor:
        return torch.rand(count, dtype=torch.float64, generator=self._generator, device="cpu") - 0.5


def _alike(plan: Plan, solution: Solution) -> Iterator[list[fx.Node]]:
    """The folded operators that can be tried together."""
    hosts = {merge.host for merge in plan.merges}
    found: dict[Any, list[fx.Node]] = defaultdict(list)
    for node, (weight, _) in solution.tensors.items():
        if not weight.is_meta and node not in hosts:
            what = solution.absorptions[node]
            bias = None if what.bias is None or what.bias.dim() < 2 else what.bias.shape
            maps = what.before is None, what.after is None
            found[weight.shape, weight.dtype, weight.device, what.transposed, what.groups, bias, maps] += [
                node
            ]
    for nodes in found.values():
        what = solution.absorptions[nodes[0]]
        seen = what.weight.numel() * _width(what) // _in_channels(what)
        count = max(1, _TOGETHER // seen)
        yield from (nodes[start : start + count] for start in range(0, len(nodes), count))


def _in_channels(what: Absorption) -> int:
    """Of each group."""
    return what.weight.shape[0] // what.groups if what.transposed else what.weight.shape[1]


def _width(what: Absorption) -> int:
    """In how many in-channels of each group the input is not zero."""
    # What a shift before the operator adds comes out of all channels.
    return _in_channels(what) if what.before is not None else min(_in_channels(what), _CHANNELS)


def _tried(
    nodes: Sequence[fx.Node], solution: Solution, taken: Taken, reader: Reader, noise: _Noise
) -> dict[fx.Node, float]:
    """The errors of folded operators, tried together, or each by itself where that does not hold."""
    whats, moves = [solution.absorptions[node] for node in nodes], [taken[node] for node in nodes]
    errors = _Trial(whats, moves, reader, noise).errors([solution.tensors[node] for node in nodes])
    if len(nodes) > 1 and math.inf in errors:
        alone = (_tried([node], solution, taken, reader, noise) for node in nodes)
        return {node: error for each in alone for node, error in each.items()}
    return dict(zip(nodes, errors, strict=True))


class _Trial:
    """Operators of one shape, side by side, the norms and constants that each takes up, and an input."""

    def __init__(
        self,
        whats: Sequence[Absorption],
        taken: Sequence[Sequence[tuple[Move, Site]]],
        reader: Reader,
        noise: _Noise,
    ) -> None:
        self.count, self.reader = len(whats), reader
        self.before = [[each for each in reversed(moves) if each[1].side == "input"] for moves in taken]
        self.after = [[each for each in moves if each[1].side == "output"] for moves in taken]
        first, operator = whats[0], taken[0][0][1].operator
        self.channels, self.groups = operator.channels, first.groups
        self.transposed = first.transposed
        width = _width(first)
        start = noise.below(_in_channels(first) - width + 1)
        self.seen = slice(start, start + width)
        weight = self._weights([what.weight for what in whats])
        self.device = weight.device
        self.source = Absorption(
            weight,
            self._biases([what.bias for what in whats]),
            _side_by_side([what.before for what in whats]),
            _side_by_side([what.after for what in whats]),
            first.transposed,
            self.count * first.groups,
        )
        places = 1 if first.transposed else math.prod(first.weight.shape[2:])
        self.x = noise.of((1, self.source.groups * width, places)).to(self.device)

    def errors(self, folded: Sequence[Folded]) -> list[float]:
        """The relative L2 distance of each operator with these from the source; infinite if one is wrong."""
        right = absorb_unchecked(self.source)
        weights = self._weights([weight for weight, _ in folded])
        changes = weights - right[0], self._biases([bias for _, bias in folded]) - right[1]
        dtype = folded[0][0].dtype
        return _errors(partial(self._run, self.x), self._expected, right, changes, dtype, self.count)

    def _expected(self, part: Part) -> Tensor:
        """What the source gives; with ``part=abs`` the magnitudes of what is summed on the way."""
        assert self.source.bias is not None
        value = self._mapped(part(self.x), self.before, part)
        value = self._run(value, part(self.source.weight), part(self.source.bias))
        return self._mapped(value, self.after, part)

    def _mapped(self, value: Tensor, taken: Sequence[Sequence[tuple[Move, Site]]], part: Part) -> Tensor:
        if not any(taken):
            return value
        parts = [*value.chunk(self.count, 1)]
        for number, moves in enumerate(taken):
            for move, site in moves:
                parts[number] = mapped(parts[number], move.source, site.channels, self.reader, part)
        return torch.cat(parts, 1)

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        """At one place: (1, in, kernel) → (1, out, 1), or transposed (1, in, 1) → (1, out, kernel)."""
        groups = self.source.groups
        if self.transposed:
            rows = x.view(groups, 1, -1) @ weight.reshape(groups, weight.shape[0] // groups, -1)
        else:
            rows = weight.reshape(groups, weight.shape[0] // groups, -1) @ x.view(groups, -1, 1)
        channels = self.count * self.channels
        return rows.view(1, channels, -1) + bias.view(-1, channels, 1)

    def _weights(self, weights: Sequence[Tensor]) -> Tensor:
        """Of the channels in which the input is not zero, in float64."""
        if not self.transposed:
            return exact(torch.cat([weight[:, self.seen] for weight in weights]))
        grouped = [weight.view(self.groups, -1, *weight.shape[1:])[:, self.seen] for weight in weights]
        return exact(torch.cat(grouped).flatten(0, 1))

    def _biases(self, biases: Sequence[Tensor | None]) -> Tensor:
        """In float64: (out,), or (batch, out), since the bias of a linear function may have a batch axis."""
        zero = torch.zeros((), dtype=torch.float64, device=self.device)
        each = [zero if bias is None else exact(bias) for bias in biases]
        return torch.cat([bias.expand(*bias.shape[:-1], self.channels) for bias in each], -1)


class _MergeTrial:
    """Operators of the source that become one, with the norms and constants that each takes up."""

    def __init__(
        self,
        merge: Merge,
        solution: Solution,
        taken: Taken,
        reader: Reader,
        noise: _Noise,
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
        self.x = noise.of((2, channels, *sizes)).to(self.exactly.weight.device)

    def error(self) -> float:
        """The relative L2 distance of the one operator from those of the source; infinite if it is wrong."""
        right, (weight, bias) = (self.exactly.weight, self.exactly.bias), self.folded
        changes = exact(weight) - right[0], (0.0 if bias is None else exact(bias)) - right[1]
        run = partial(applied, self.host, self.x)

        def source(part: Part) -> Tensor:
            return self._value(self.form, part(self.x), part)

        return _errors(run, source, right, changes, weight.dtype)[0]

    def _value(self, form: Form, x: Tensor, part: Part) -> Tensor:
        """What the source makes of x; with ``part=abs`` the magnitudes of what is summed on the way."""
        if not form.parts:
            return x
        value = self._step(form, x, part)
        for move, site in self.taken.get(form.node, ()) if takes_up(form, self.reader) else ():
            value = self._mapped(value, move.source, site.channels, part)
        return value

    def _step(self, form: Form, x: Tensor, part: Part) -> Tensor:
        """The same without the maps that are absorbed after it."""
        step = form.step
        values = [self._value(each, x, part) for each in form.parts]
        if isinstance(step, Total):
            factors = [part(value.new_tensor(each)) for value, each in zip(values, step.factors, strict=True)]
            return torch.stack([f * v for f, v in zip(factors, values, strict=True)]).sum(0)
        (value,) = values
        if isinstance(step, Form):
            return self._value(step, value, part)
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


def _side_by_side(maps: Sequence[AffineMap | None]) -> AffineMap | None:
    """Of maps that are there for all, or for none."""
    if maps[0] is None:
        return None
    each = [affine for affine in maps if affine is not None]
    assert len(each) == len(maps)
    return AffineMap(
        torch.cat([affine.scale for affine in each]), torch.cat([affine.shift for affine in each])
    )


def _errors(
    run: Callable[[Tensor, Tensor], Tensor],
    source: Callable[[Part], Tensor],
    right: tuple[Tensor, Tensor],
    changes: tuple[Tensor, Tensor],
    dtype: torch.dtype,
    count: int = 1,
) -> list[float]:
    """The relative L2 distances of folded operators from the source; all infinite if one is wrong.

    Args:
        run: gives what the operator makes of x with a weight and a bias.
        source: gives what the source makes of x; of `abs` the magnitudes of what is summed on the way.
        right: the weight and bias in float64.
        changes: what rounding added to them.
        dtype: to which they were rounded.
        count: how many operators stand side by side.
    """
    expected = source(lambda part: part)
    difference = run(*right) - expected
    # Where large numbers cancel, it is these that count.
    if not is_near(difference, expected, _SUMS) and not is_near(difference, source(abs), _SUMS):
        return [math.inf] * count
    if not all(is_rounded(change, each, dtype) for change, each in zip(changes, right, strict=True)):
        return [math.inf] * count
    distances, sizes = (
        torch.linalg.vector_norm(value.reshape(len(value), count, -1), dim=(0, 2))
        for value in (difference + run(*changes), expected)
    )
    relative: list[float] = (distances / sizes.where(sizes > 0, math.inf)).tolist()
    return relative
