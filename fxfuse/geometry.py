"""Where a convolution looks, and when one kernel can hold another.

Output i of a convolution along an axis sums over its taps j: it reads input i·stride − padding + j·dilation.
The tap of a 1×1 kernel lies in the middle of a 3×3 kernel whose padding is 1; in general a kernel holds
another if that one's taps are among its own, and both give outputs of the same size for every input.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import starmap
from math import gcd, prod
from typing import Any


@dataclass(frozen=True)
class Axis:
    """One spatial axis of a kernel: its taps, and how it goes over the input.

    Attributes:
        size: number of taps.
        stride, padding, dilation: in elements; padding on either side.
        extra: what a transposed convolution adds to its output on one side (output_padding).
    """

    size: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    extra: int = 0

    @property
    def reach(self) -> int:
        """From the first tap to the last."""
        return self.dilation * (self.size - 1)

    def holds(self, other: Axis) -> bool:
        """Whether the taps of `other` are among these, and the outputs have the same size."""
        if self == other:
            return True
        alike = (self.stride, self.extra, 2 * self.padding - self.reach)
        steps = other.dilation if other.size > 1 else 0
        return (
            alike == (other.stride, other.extra, 2 * other.padding - other.reach)
            and self.padding >= other.padding
            and (self.padding - other.padding) % self.dilation == steps % self.dilation == 0
        )

    def places(self, other: Axis) -> slice:
        """Which taps those of `other`, which it holds, are."""
        first = (self.padding - other.padding) // self.dilation
        step = max(1, other.dilation // self.dilation) if other.size > 1 else 1
        return slice(first, first + step * (other.size - 1) + 1, step)


@dataclass(frozen=True)
class Window:
    """An average over windows, zeros beyond the border among them.

    Attributes:
        axes: of the window.
        divisor: by which the sum of a window is divided.
    """

    axes: tuple[Axis, ...]
    divisor: int


@dataclass(frozen=True)
class Geometry:
    """Where a linear operator looks.

    Attributes:
        axes: the spatial axes; none for a linear layer.
        groups: number of groups.
        transposed: whether it is a transposed convolution.
        fill: what it sees beyond the border, if there is padding: "zeros", "reflect", ..., as torch has it.
    """

    axes: tuple[Axis, ...]
    groups: int = 1
    transposed: bool = False
    fill: str = "zeros"

    def __str__(self) -> str:
        """As "3×3, stride 2, groups 4": what is not 1 or 0."""
        parts = ["×".join(map(str, self.kernel))] if self.axes else ["linear"]
        for name, usual in (("stride", 1), ("padding", 0), ("dilation", 1), ("extra", 0)):
            values = [getattr(axis, name) for axis in self.axes]
            if any(value != usual for value in values):
                parts.append(f"{name} {'×'.join(map(str, dict.fromkeys(values)))}")
        parts += [f"groups {self.groups}"] if self.groups != 1 else []
        parts += ["transposed"] if self.transposed else []
        parts += [self.fill] if self.fill != "zeros" else []
        return ", ".join(parts)

    @property
    def kernel(self) -> tuple[int, ...]:
        """The number of taps along each axis."""
        return tuple(axis.size for axis in self.axes)

    @property
    def is_bordered(self) -> bool:
        """Whether some outputs are made of fewer inputs than others, or of zeros that are no inputs."""
        return self.transposed or (self.fill == "zeros" and any(axis.padding for axis in self.axes))

    @property
    def is_point(self) -> bool:
        """Whether every output is made of the one input at its place."""
        return not self.transposed and all(axis == Axis(1) for axis in self.axes)

    def holds(self, other: Geometry) -> bool:
        """Whether a kernel of this geometry can be the same function as any kernel of the other.

        Both have the same numbers of channels in and out.
        """
        if self.transposed or other.transposed:
            return self == other
        return (
            len(self.axes) == len(other.axes)
            and (self.fill == other.fill or not any(axis.padding for axis in other.axes))
            and other.groups % self.groups == 0
            and all(one.holds(two) for one, two in zip(self.axes, other.axes, strict=True))
        )

    def then(self, after: Geometry) -> Geometry | None:
        """That of both in a row, where one of them looks at single places; None where none does.

        Where `after` sees zeros beyond the border, what comes out of this one must be zero for zeros.
        """
        groups = gcd(self.groups, after.groups)
        if self.transposed or after.transposed or len(self.axes) != len(after.axes):
            return None
        if after.is_point:
            return replace(self, groups=groups)
        return replace(after, groups=groups) if self.is_point else None


def point(dims: int, groups: int) -> Geometry:
    """That of a kernel with one tap."""
    return Geometry((Axis(1),) * dims, groups)


def multiplications(geometry: Geometry, channels: int, in_channels: int) -> int:
    """How many multiplications each place of the output takes, all channels together.

    Of a transposed convolution it is each place of the input.
    """
    return channels * in_channels // geometry.groups * prod(geometry.kernel)


def read_geometry(
    settings: Mapping[str, Any], kernel: Sequence[int], groups: int, *, transposed: bool
) -> Geometry | None:
    """The geometry of a call with these settings; None if they are not fixed, or the paddings differ."""
    fill = settings.get("padding_mode", "zeros")
    dilations = _numbers(settings.get("dilation", 1), len(kernel))
    strides, extras = (_numbers(settings.get(name, each), len(kernel)) for name, each in _DEFAULTS)
    padding = settings.get("padding", 0)
    if dilations is None or strides is None or extras is None:
        return None
    if padding == "same":
        reaches = [dilation * (size - 1) for dilation, size in zip(dilations, kernel, strict=True)]
        if any(reach % 2 for reach in reaches):
            return None
        padding = tuple(reach // 2 for reach in reaches)
    paddings = _numbers(0 if padding == "valid" else padding, len(kernel))
    if paddings is None:
        return None
    dilations = tuple(1 if size == 1 else each for size, each in zip(kernel, dilations, strict=True))
    axes = starmap(Axis, zip(kernel, strides, paddings, dilations, extras, strict=True))
    return Geometry(tuple(axes), groups, transposed, fill)


# The settings that say where a convolution looks, besides its groups.
GEOMETRY = ("stride", "padding", "dilation", "output_padding", "padding_mode")
_DEFAULTS = (("stride", 1), ("output_padding", 0))


def _numbers(value: Any, count: int) -> tuple[int, ...] | None:
    """A number for each axis."""
    numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
    if not all(type(number) is int for number in numbers) or len(numbers) not in (1, count):
        return None
    return numbers * count if len(numbers) == 1 else numbers
