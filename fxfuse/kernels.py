"""Linear operators as their weights, in float64: put into wider kernels, added up, and one after the other.

    (W₁ + W₂)·x = W₁·x + W₂·x        W₂·(W₁·x + b₁) + b₂ = (W₂·W₁)·x + (W₂·b₁ + b₂)

An identity is the kernel with a one for each channel in its middle, an average the one with the same number
everywhere. Nothing is rounded here beyond float64.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from fxfuse.affine import AffineMap
from fxfuse.fold import Absorption, absorb_unchecked
from fxfuse.geometry import Geometry


@dataclass(frozen=True)
class Kernel:
    """A linear operator.

    Attributes:
        weight: (out, in/groups, *kernel), transposed (in, out/groups, *kernel), float64.
        bias: (out,), float64.
        geometry: where it looks.
    """

    weight: Tensor
    bias: Tensor
    geometry: Geometry

    @classmethod
    def alike(cls, value: float, geometry: Geometry, device: torch.device) -> Kernel:
        """The same number at every tap, each channel by itself: an identity, or an average."""
        shape = (geometry.groups, 1, *geometry.kernel)
        weight = torch.full(shape, value, dtype=torch.float64, device=device)
        return cls(weight, weight.new_zeros(geometry.groups), geometry)

    @property
    def channels(self) -> int:
        """How many channels come out."""
        return self.bias.shape[0]

    @property
    def operator(self) -> Absorption:
        """It as an operator that is to absorb maps."""
        geometry = self.geometry
        return Absorption(self.weight, self.bias, transposed=geometry.transposed, groups=geometry.groups)

    def mapped(self, after: AffineMap) -> Kernel:
        """With an affine map of its output."""
        return Kernel(*absorb_unchecked(replace(self.operator, after=after)), self.geometry)

    def held(self, geometry: Geometry) -> Kernel:
        """The same function with a kernel of a geometry that holds this one's."""
        if geometry == self.geometry:
            return self
        joined = self.geometry.groups // geometry.groups
        out, into, *kernel = self.weight.shape
        blocks = self.weight.view(geometry.groups, joined, out // self.geometry.groups, into, *kernel)
        shape = (geometry.groups, joined, out // self.geometry.groups, joined, into, *geometry.kernel)
        wide = self.weight.new_zeros(shape)
        axes = zip(geometry.axes, self.geometry.axes, strict=True)
        taps = [slice(None)] * 5 + [one.places(other) for one, other in axes]
        among = wide[tuple(taps)]
        among.diagonal(0, 1, 3).copy_(blocks.movedim(1, -1))
        return replace(self, weight=wide.view(out, joined * into, *geometry.kernel), geometry=geometry)

    def times(self, factor: float) -> Kernel:
        """The same multiplied by a number."""
        return self if factor == 1 else replace(self, weight=factor * self.weight, bias=factor * self.bias)

    def plus(self, other: Kernel) -> Kernel:
        """The sum with another of the same geometry."""
        return replace(self, weight=self.weight + other.weight, bias=self.bias + other.bias)

    def then(self, after: Kernel) -> Kernel:
        """What `after` makes of what this one gives; see `Geometry.then`."""
        if self._is_map:
            before = replace(after.operator, before=AffineMap(self.weight.flatten(), self.bias))
            return Kernel(*absorb_unchecked(before), after.geometry)
        if after._is_map:
            return self.mapped(AffineMap(after.weight.flatten(), after.bias))
        geometry = self.geometry.then(after.geometry)
        assert geometry is not None
        groups = geometry.groups
        # (groups, middle, in, taps) and (groups, out, middle, taps), one of which has a single tap.
        first, second = self._grouped(groups), after._grouped(groups)
        weight = torch.einsum("gomt,gmis->goits", second, first)
        bias = (second.sum(3) @ self.bias.view(groups, -1, 1)).flatten() + after.bias
        return Kernel(
            weight.reshape(after.channels, first.shape[2], *geometry.kernel).contiguous(), bias, geometry
        )

    @property
    def _is_map(self) -> bool:
        """Whether it maps each channel by itself."""
        return self.geometry.is_point and self.weight.shape[:2] == (self.geometry.groups, 1)

    def _grouped(self, groups: int) -> Tensor:
        """The weight (groups, out/groups, in/groups, taps) with fewer groups."""
        weight = self.held(replace(self.geometry, groups=groups)).weight
        return weight.view(groups, self.channels // groups, weight.shape[1], -1)
