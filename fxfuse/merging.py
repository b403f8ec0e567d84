"""A merge → the kernel of its one operator, in float64."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import fx

from fxfuse.affine import exact
from fxfuse.fold import Absorption, absorb_unchecked
from fxfuse.forms import Form, Total
from fxfuse.geometry import Geometry, Window, point
from fxfuse.kernels import Kernel
from fxfuse.maps import affine_of
from fxfuse.nodes import Affine, Linear, Norm
from fxfuse.ops import Reader


@dataclass(frozen=True)
class Merger:
    """Computes what forms are.

    Attributes:
        reader: reads the tensors.
        absorptions: what operators, and sums that become one with others, have absorbed by then.
        dims: number of spatial axes.
        device: where the weights are in float64.
    """

    reader: Reader
    absorptions: Mapping[fx.Node, Absorption]
    dims: int
    device: torch.device

    def kernel(self, form: Form, channels: int) -> Kernel:
        """The kernel of a form, of whose channels there are so many where that is open."""
        channels = channels if form.channels is None else form.channels
        if not form.parts:
            return Kernel.alike(1.0, point(self.dims, channels), self.device)
        found, absorbed = self._kernel(form, channels), self.absorptions.get(form.node)
        if absorbed is None or absorbed.after is None or not takes_up(form, self.reader):
            return found
        return found.mapped(absorbed.after)

    def _kernel(self, form: Form, channels: int) -> Kernel:
        """The same without the maps that are absorbed after it."""
        step = form.step
        if isinstance(step, Total):
            wide = point(self.dims, channels) if form.geometry is None else form.geometry
            parts = [self.kernel(part, channels).held(wide) for part in form.parts]
            total = parts[0].times(step.factors[0])
            for part, factor in zip(parts[1:], step.factors[1:], strict=True):
                total = total.plus(part.times(factor))
            return total
        (inner,) = form.parts
        if isinstance(step, Form):
            middle = next(each for each in (inner.channels, step.in_channels, channels) if each is not None)
            return self.kernel(inner, middle).then(self.kernel(step, channels))
        if isinstance(step, Linear):
            return self.kernel(inner, step.in_channels).then(self._linear(form.node, step))
        before = self.kernel(inner, channels)
        if isinstance(step, Norm | Affine):
            assert form.acts is not None
            index = form.acts.index if form.acts.axes else form.acts.index * channels
            affine = affine_of(step, self.reader, self.device)
            return before.mapped(affine.taken(index, shift=form.acts.shift))
        if isinstance(step, Window):
            window = Kernel.alike(1 / step.divisor, Geometry(step.axes, channels), self.device)
            return before.then(window)
        return before

    def _linear(self, node: fx.Node, linear: Linear) -> Kernel:
        """The operator at `node`, with all that it absorbs."""
        assert linear.geometry is not None
        what = self.absorptions.get(node) or absorption(linear, self.reader)
        bias = what.weight.new_zeros(linear.channels) if what.bias is None else what.bias
        exactly = replace(what, weight=exact(what.weight), bias=exact(bias))
        return Kernel(*absorb_unchecked(exactly), linear.geometry)


def takes_up(form: Form, reader: Reader) -> bool:
    """Whether what is absorbed at its node acts after its last step.

    What an operator has absorbed is a part of it, and what a part with the same node has, of that part.
    """
    inside = isinstance(form.step, Form) or any(part.node is form.node for part in form.parts)
    return not inside and not isinstance(reader.read(form.node), Linear)


def absorption(linear: Linear, reader: Reader) -> Absorption:
    """An operator that absorbs nothing yet."""
    bias = None if linear.bias is None else reader.tensor(linear.bias)
    return Absorption(reader.tensor(linear.weight), bias, transposed=linear.transposed, groups=linear.groups)
