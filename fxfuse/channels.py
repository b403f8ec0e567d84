"""Which channel of a value a map acts on, and how that changes on the way through an operator.

A map of n channels travels as an index: channel i of the value is mapped by entry ``index[i]``. Taking a
part of the channels, repeating, reordering and putting them together is the same thing done to the index.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cache
from typing import Literal

from fxfuse.refusals import Code

# The entry of a channel that is left as it is.
KEPT = -1


@cache
def every(count: int) -> tuple[int, ...]:
    """The index of a map that acts on each of its channels in turn; one object, quickly compared."""
    return tuple(range(count))


@dataclass(frozen=True)
class Channels:
    """How a map acts on a value.

    Attributes:
        axes: the axis along which it acts, counted from the end (-1 is the last). After a channel axis has
            been split there are several, whose row-major product are the channels; none: alike everywhere.
        index: the entry of the map for each channel, `KEPT` for none; a single one without axes.
        scale, shift: whether the map's scale acts, and its shift.
        spread: how the index covers an axis of a size that is not known yet: every entry for as many
            channels in a row as it takes ("each"), or all of them again and again ("whole").
        needs: what has to be true of the map's numbers; `fxfuse.solve` knows what each code means.
    """

    axes: tuple[int, ...]
    index: tuple[int, ...]
    scale: bool = True
    shift: bool = True
    spread: Literal["each", "whole"] | None = None
    needs: frozenset[Code] = frozenset()

    def needing(self, code: Code) -> Channels:
        """The same under one condition more."""
        return replace(self, needs=self.needs | {code})

    def linearly(self, code: Code) -> Channels:
        """Through a linear operator that does not map constants to themselves: no shift may pass."""
        return self.needing(code) if self.shift else self

    def over(self, size: int) -> tuple[int, ...] | None:
        """The index for an axis of `size` channels; None if it does not fit."""
        times, rest = divmod(size, len(self.index)) if self.index else (0, 1)
        if rest or (times != 1 and self.axes and self.spread is None):
            return None
        if self.spread == "each":
            return tuple(entry for entry in self.index for _ in range(times))
        return self.index * times


Size = int | tuple[object, int] | None
"""A number of elements: known, or known to be that of a node's axis, or not known."""
Shape = tuple[Size, ...]


class Atom:
    """A part of an axis that a rearrangement moves as a whole. Two atoms are the same only by identity."""

    def __init__(self, size: Size = None) -> None:
        self.size = size


Axes = tuple[tuple[Atom, ...], ...]
Pattern = tuple[Axes, Axes]
"""Axes before and after, each the row-major product of its atoms: b (c r) → b c r, as in einops."""


def through(pattern: Pattern, channels: Channels, *, backward: bool) -> Channels | Code:
    """`channels` of the axes after the rearrangement as those of the axes before, or the other way round."""
    if not channels.axes:
        return channels
    here, there = reversed(pattern) if backward else pattern
    if -min(channels.axes) > len(here):
        return Code.MIXED
    acted = _atoms(here[axis] for axis in channels.axes)
    holding = [place for place, atoms in enumerate(there) if not set(acted).isdisjoint(atoms)]
    found = _atoms(there[place] for place in holding)
    if not acted or not set(acted) <= set(found):
        return Code.MIXED  # the channels are gone
    moved = replace(channels, axes=tuple(place - len(there) for place in holding))
    return moved if found == acted else _repeated(moved, acted, found, backward=backward)


def _repeated(
    channels: Channels, acted: Sequence[Atom], found: Sequence[Atom], *, backward: bool
) -> Channels | Code:
    """`channels`, which act on some atoms, over an axis of these and others, or of these in another order."""
    sizes = _sizes(acted, len(channels.index))
    if sizes is None or channels.spread is not None:
        return Code.MIXED
    index = _reordered(channels.index, acted, found, sizes)
    if index is not None:
        return replace(channels, index=index)
    if backward or len(channels.axes) > 1:
        return Code.MIXED
    if found[: len(acted)] == acted:
        return replace(channels, spread="each")
    return replace(channels, spread="whole") if found[-len(acted) :] == acted else Code.MIXED


def _atoms(axes: Iterable[tuple[Atom, ...]]) -> list[Atom]:
    """The atoms of these axes in row-major order, but for those of size 1, which do not matter."""
    return [atom for atoms in axes for atom in atoms if atom.size != 1]


def _sizes(atoms: Sequence[Atom], total: int) -> dict[Atom, int] | None:
    """The sizes of atoms that make up `total`; one of them need not be known."""
    sizes = {atom: atom.size for atom in atoms if isinstance(atom.size, int)}
    known = math.prod(sizes.values())
    unknown = [atom for atom in atoms if atom not in sizes]
    if len(unknown) > 1 or not known or total % known or (not unknown and total != known):
        return None
    return sizes | dict.fromkeys(unknown, total // known)


def _reordered(
    index: tuple[int, ...], acted: Sequence[Atom], found: Sequence[Atom], sizes: dict[Atom, int]
) -> tuple[int, ...] | None:
    """The index over `found`, row by row; it repeats along atoms that the map does not act on."""
    extents = [sizes.get(atom, atom.size) for atom in found]
    strides, stride = {}, 1
    for atom in reversed(acted):
        strides[atom] = stride
        stride *= sizes[atom]
    places = [0]
    for atom, extent in zip(found, extents, strict=True):
        if not isinstance(extent, int):
            return None
        step = strides.get(atom, 0)
        places = [place + step * number for place in places for number in range(extent)]
    return tuple(index[place] for place in places)


def sizes_after(pattern: Pattern) -> Shape:
    """The shape after a rearrangement, None where it cannot be told."""
    return tuple(_product(atoms) for atoms in pattern[1])


def _product(atoms: Sequence[Atom]) -> Size:
    sizes = [atom.size for atom in atoms if atom.size != 1]
    if len(sizes) == 1:
        return sizes[0]
    numbers = [size for size in sizes if isinstance(size, int)]
    return math.prod(numbers) if len(numbers) == len(sizes) else None
