"""Operators that a per-channel affine map can pass, and what becomes of the map on the way.

``op(s·x + t) = s'·op(x) + t'``: read from left to right the map moves forward, from input to output; from
right to left it moves backward. There are five kinds, and `fxfuse.table` says which operator is which.

Each kind has `inputs`, the nodes whose values it reads, and answers three questions, given what is known of
shapes: `shape`, that of its output; `backward`, what has to act on each input, so that `channels` act on the
output; `forward`, what acts on the output if `channels` act on one input. The answer may be a `Code`: they do
not get through, for that reason.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Protocol

from torch import fx

from fxfuse.channels import KEPT, Channels, Pattern, Shape, Size, sizes_after, through
from fxfuse.geometry import Window
from fxfuse.refusals import Code


class Shapes(Protocol):
    """What is known of shapes; see `fxfuse.shapes`."""

    def of(self, node: fx.Node) -> Shape | None:
        """The shape of a node's value; None if not even its number of axes is known."""

    def size(self, value: Any) -> Size:
        """The number that an argument of a call is."""


@dataclass(frozen=True)
class Within:
    """Works within some axes, the same way for every channel: identity, pooling, upsampling, padding, mean.

    Attributes:
        input: the node whose value it reads.
        axes: its axes, given the number of axes of the input, which may be None; counted from either end.
            None if they cannot be told.
        removes: whether the axes are gone afterwards.
        stops_shift: the reason why only a scale passes, if it does not map constants to themselves.
        size: how many elements there are afterwards along each of the axes, if that is known.
        monotone: it is not linear, but passes any map that keeps the order, as a maximum does.
        view: whether it may give a view, which lies in memory in another order than that of its axes.
        window: what it averages over, if it is an average that counts what is beyond the border as zeros.
        is_identity: whether it gives the elements as they are.
    """

    input: fx.Node
    axes: Callable[[int | None], Sequence[int] | None] = lambda _: ()
    removes: bool = False
    stops_shift: Code | None = None
    monotone: bool = False
    size: int | None = None
    view: bool = False
    window: Window | None = None
    is_identity: bool = False

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The input."""
        return (self.input,)

    def shape(self, shapes: Shapes) -> Shape | None:
        """The input's; the axes within which it works are of unknown size, or gone."""
        shape, touched = shapes.of(self.input), self._touched(shapes)
        if shape is None or touched is None:
            return None
        places = range(-len(shape), 0)
        if self.removes:
            return tuple(shape[place] for place in places if place not in touched)
        return tuple(self.size if place in touched else shape[place] for place in places)

    def backward(self, channels: Channels, shapes: Shapes) -> list[Channels] | Code:
        """The same channels."""
        touched = self._touched(shapes)
        if touched is None:
            return Code.RANK_UNKNOWN
        axes = channels.axes
        if self.removes and axes:
            far = range(-1, min(axes) - len(touched) - 1, -1)
            untouched = [place for place in far if place not in touched]
            axes = tuple(untouched[-axis - 1] for axis in axes)
        passed = self._passed(replace(channels, axes=axes), touched)
        return passed if isinstance(passed, Code) else [passed]

    def forward(self, source: fx.Node, channels: Channels, shapes: Shapes) -> Channels | Code:
        """The same channels."""
        touched = self._touched(shapes)
        passed = Code.RANK_UNKNOWN if touched is None else self._passed(channels, touched)
        if isinstance(passed, Code) or not self.removes or touched is None:
            return passed
        return replace(
            passed, axes=tuple(axis + sum(place > axis for place in touched) for axis in passed.axes)
        )

    def _touched(self, shapes: Shapes) -> set[int] | None:
        """The axes within which it works, counted from the end."""
        axes = self.axes(None)
        if axes is not None and all(axis < 0 for axis in axes):
            return {*axes}
        shape = shapes.of(self.input)
        axes = None if shape is None else self.axes(len(shape))
        if shape is None or axes is None:
            return None
        return {axis - len(shape) if axis >= 0 else axis for axis in axes}

    def _passed(self, channels: Channels, touched: set[int]) -> Channels | Code:
        if not touched.isdisjoint(channels.axes):
            return Code.MIXED
        if self.stops_shift is not None:
            channels = channels.linearly(self.stops_shift)
        return channels.needing(Code.NEGATIVE_SCALE) if self.monotone else channels


@dataclass(frozen=True)
class Rearranged:
    """Puts the same elements into other axes: reshape, flatten, permute, squeeze, pixel shuffle.

    Attributes:
        input: the node whose value it reads.
        pattern: the axes before and after, given the input's shape; None if they cannot be told.
        rank: how many axes there are afterwards, where that does not depend on the input.
        takes: how many axes the input must have, where only one number is possible.
    """

    input: fx.Node
    pattern: Callable[[Shape, Shapes], Pattern | None]
    rank: int | None = None
    takes: int | None = None

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The input."""
        return (self.input,)

    def shape(self, shapes: Shapes) -> Shape | None:
        """The sizes after the rearrangement."""
        pattern = self._pattern(shapes)
        if pattern is None:
            return None if self.rank is None else (None,) * self.rank
        return sizes_after(pattern)

    def backward(self, channels: Channels, shapes: Shapes) -> list[Channels] | Code:
        """The channels where they were before."""
        if not channels.axes:
            return [channels]
        found = self._through(channels, shapes, backward=True)
        return found if isinstance(found, Code) else [found]

    def forward(self, source: fx.Node, channels: Channels, shapes: Shapes) -> Channels | Code:
        """The channels where they are afterwards."""
        if not channels.axes:
            return channels
        return self._through(channels, shapes, backward=False)

    def keeps_order(self, shapes: Shapes) -> bool:
        """Whether the elements certainly come in the same order, row by row, as before."""
        pattern = self._pattern(shapes)
        return pattern is not None and sum(pattern[0], ()) == sum(pattern[1], ())

    def _through(self, channels: Channels, shapes: Shapes, *, backward: bool) -> Channels | Code:
        pattern = self._pattern(shapes)
        if pattern is None:
            return Code.RANK_UNKNOWN if shapes.of(self.input) is None else Code.MIXED
        return through(pattern, channels, backward=backward)

    def _pattern(self, shapes: Shapes) -> Pattern | None:
        shape = shapes.of(self.input)
        return self.pattern(shape, shapes) if shape else None  # nor is there any for a single number


@dataclass(frozen=True)
class Slice:
    """Some of the elements along one axis: slice, narrow, one part of a split.

    Attributes:
        input: the node whose value it reads; of a split the value that was split.
        axis: the axis, counted from either end.
        part: the places that it takes, given how many there are.
    """

    input: fx.Node
    axis: int
    part: Callable[[int], Sequence[int] | None]

    @property
    def inputs(self) -> tuple[fx.Node, ...]:
        """The input."""
        return (self.input,)

    def shape(self, shapes: Shapes) -> Shape | None:
        """The input's, with fewer elements along the axis."""
        shape = shapes.of(self.input)
        axis = self.place(shape)
        if shape is None or axis is None:
            return None
        taken = self.taken(shape[axis])
        return tuple(
            (None if taken is None else len(taken)) if place == axis else shape[place]
            for place in range(-len(shape), 0)
        )

    def backward(self, channels: Channels, shapes: Shapes) -> list[Channels] | Code:
        """The channels among all those of the input; the others are kept."""
        shape = shapes.of(self.input)
        axis = self.place(shape)
        if axis is None or (channels.axes and axis not in channels.axes):
            return [channels]
        if len(channels.axes) > 1:
            return Code.MIXED
        total = None if shape is None else shape[axis]
        taken = self.taken(total)
        if taken is None or not isinstance(total, int):
            return Code.MIXED if channels.axes else [channels]
        index = channels.over(len(taken))
        if index is None:
            return Code.CHANNELS
        among = [KEPT] * total
        for place, entry in zip(taken, index, strict=True):
            among[place] = entry
        return [replace(channels, axes=(axis,), index=tuple(among), spread=None)]

    def forward(self, source: fx.Node, channels: Channels, shapes: Shapes) -> Channels | Code:
        """Those of the channels that are taken."""
        axis = self.place(shapes.of(self.input))
        if not channels.axes or (axis is not None and axis not in channels.axes):
            return channels
        taken = None if channels.axes != (axis,) or channels.spread else self.taken(len(channels.index))
        if not taken:
            return Code.MIXED
        return replace(channels, index=tuple(channels.index[place] for place in taken))

    def place(self, shape: Shape | None) -> int | None:
        """The axis, counted from the end."""
        if self.axis < 0:
            return self.axis
        return None if shape is None else self.axis - len(shape)

    def taken(self, size: Size) -> Sequence[int] | None:
        """The places that it takes out of `size`; None if they cannot be told."""
        return self.part(size) if isinstance(size, int) else None


@dataclass(frozen=True)
class Concat:
    """Several values one after another along an axis.

    Attributes:
        inputs: the nodes whose values it reads.
        axis: the axis, counted from either end.
    """

    inputs: tuple[fx.Node, ...]
    axis: int

    def shape(self, shapes: Shapes) -> Shape | None:
        """The first input's; along the axis the sum of all sizes."""
        found = [shapes.of(node) for node in self.inputs]
        known = next((shape for shape in found if shape is not None), None)
        axis = self._place(shapes)
        if known is None or axis is None or -axis > len(known):
            return None
        sizes = self._sizes(shapes, axis)
        total = None if sizes is None else sum(sizes)
        return tuple(total if place == axis else known[place] for place in range(-len(known), 0))

    def backward(self, channels: Channels, shapes: Shapes) -> list[Channels] | Code:
        """To each input its part of the channels; all of them if they lie along another axis."""
        axis = self._place(shapes)
        if axis is None:
            return Code.RANK_UNKNOWN
        if axis not in channels.axes:
            return [channels] * len(self.inputs)
        sizes = self._sizes(shapes, axis)
        index = None if sizes is None else channels.over(sum(sizes))
        if sizes is None or index is None or channels.axes != (axis,):
            return Code.MIXED
        ends = [sum(sizes[: number + 1]) for number in range(len(sizes))]
        return [
            replace(channels, index=index[end - size : end], spread=None)
            for size, end in zip(sizes, ends, strict=True)
        ]

    def forward(self, source: fx.Node, channels: Channels, shapes: Shapes) -> Channels | Code:
        """The channels where `source` lies among the inputs; those of the others are kept."""
        axis = self._place(shapes)
        if axis is None or channels.spread:
            return Code.RANK_UNKNOWN if axis is None else Code.MIXED
        if set(self.inputs) == {source} and axis not in channels.axes:
            return channels
        if set(self.inputs) == {source} and channels.axes == (axis,):
            return replace(channels, index=channels.index * len(self.inputs))
        sizes = self._sizes(shapes, axis)
        if sizes is None or channels.axes not in ((), (axis,)):
            return Code.MIXED
        index: list[int] = []
        for node, size in zip(self.inputs, sizes, strict=True):
            part = channels.over(size) if node is source else (KEPT,) * size
            if part is None:
                return Code.MIXED
            index += part
        return replace(channels, axes=(axis,), index=tuple(index))

    def _place(self, shapes: Shapes) -> int | None:
        if self.axis < 0:
            return self.axis
        found = [shapes.of(node) for node in self.inputs]
        ranks = {len(shape) for shape in found if shape is not None}
        return self.axis - ranks.pop() if len(ranks) == 1 else None

    def _sizes(self, shapes: Shapes, axis: int) -> list[int] | None:
        found = [shapes.of(node) for node in self.inputs]
        sizes = [None if shape is None or -axis > len(shape) else shape[axis] for shape in found]
        numbers = [size for size in sizes if isinstance(size, int)]
        return numbers if len(numbers) == len(sizes) else None


@dataclass(frozen=True)
class Sum:
    """a + b, a − b, a + α·b: s·(a + b) + t = (s·a + t) + s·b.

    Attributes:
        inputs: a and b.
        factors: what each is multiplied by; None if that is not fixed.
    """

    inputs: tuple[fx.Node, ...]
    factors: tuple[float, ...] | None

    def shape(self, shapes: Shapes) -> Shape | None:
        """That to which both are broadcast."""
        return broadcast([shapes.of(node) for node in self.inputs])

    def backward(self, channels: Channels, shapes: Shapes) -> list[Channels] | Code:
        """The scale to both, the shift to the first."""
        kept = replace(channels, index=(KEPT,) * len(channels.index))
        others = replace(channels, shift=False) if channels.scale else kept
        return [channels, *[others] * (len(self.inputs) - 1)]

    def forward(self, source: fx.Node, channels: Channels, shapes: Shapes) -> Channels | Code:
        """A map of one summand alone is none of the sum."""
        return Code.OPAQUE_PRODUCER


Transparent = Within | Rearranged | Slice | Concat | Sum


def broadcast(shapes: Sequence[Shape | None]) -> Shape | None:
    """The shape of an element-by-element operator's output."""
    known = [shape for shape in shapes if shape is not None]
    if len(known) < len(shapes) or not known:
        return None
    rank = max(map(len, known))
    padded = [(1,) * (rank - len(shape)) + shape for shape in known]
    return tuple(_common({size for size in sizes if size != 1}) for sizes in zip(*padded, strict=True))


def _common(sizes: set[Size]) -> Size:
    if not sizes:
        return 1
    return sizes.pop() if len(sizes) == 1 else None
