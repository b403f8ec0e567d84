"""Rearrangements of axes: given a shape, which atoms are on which axis before and after.

They are written as in einops: an axis is the row-major product of its atoms. None: it cannot be told.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence

from fxfuse.channels import Atom, Axes, Pattern, Shape, Size


def _axes(shape: Shape) -> Axes:
    return tuple((Atom(size),) for size in shape)


def _merged(axes: Axes) -> tuple[Atom, ...]:
    return tuple(atom for atoms in axes for atom in atoms)


def flattened(shape: Shape, start: int, end: int) -> Pattern:
    """The axes from `start` to `end` become one."""
    axes, first, last = _axes(shape), start % len(shape), end % len(shape)
    return axes, (*axes[:first], _merged(axes[first : last + 1]), *axes[last + 1 :])


def permuted(shape: Shape, places: Sequence[int]) -> Pattern | None:
    """Axis i of the result is axis ``places[i]``."""
    axes = _axes(shape)
    if sorted(place % len(shape) for place in places) != [*range(len(shape))]:
        return None
    return axes, tuple(axes[place] for place in places)


def with_ones(shape: Shape, places: Sequence[int]) -> Pattern:
    """New axes of size 1, at these places of the result."""
    axes = _axes(shape)
    after = list(axes)
    for place in sorted(place % (len(shape) + len(places)) for place in places):
        after.insert(place, ())
    return axes, tuple(after)


def squeezed(shape: Shape, places: Sequence[int]) -> Pattern | None:
    """Without those of the axes whose size is 1; None if nobody knows whether it is."""
    axes, asked = _axes(shape), {place % len(shape) for place in places}
    if any(not isinstance(shape[place], int) for place in asked):
        return None
    gone = {place for place in asked if shape[place] == 1}
    return axes, tuple(atoms for place, atoms in enumerate(axes) if place not in gone)


def pixel_shuffled(shape: Shape, factor: int) -> Pattern | None:
    """The pattern ... (c i j) h w → ... c (h i) (w j)."""
    if len(shape) < 3:
        return None
    channels, height, width = shape[-3:]
    c, h, w = Atom(_divided(channels, factor**2)), Atom(height), Atom(width)
    i, j, others = Atom(factor), Atom(factor), _axes(shape[:-3])
    return (*others, (c, i, j), (h,), (w,)), (*others, (c,), (h, i), (w, j))


def pixel_unshuffled(shape: Shape, factor: int) -> Pattern | None:
    """The pattern ... c (h i) (w j) → ... (c i j) h w."""
    if len(shape) < 3:
        return None
    channels, height, width = shape[-3:]
    c, h, w = Atom(channels), Atom(_divided(height, factor)), Atom(_divided(width, factor))
    i, j, others = Atom(factor), Atom(factor), _axes(shape[:-3])
    return (*others, (c,), (h, i), (w, j)), (*others, (c, i, j), (h,), (w,))


def channel_shuffled(shape: Shape, groups: int) -> Pattern | None:
    """The pattern b (g c) ... → b (c g) ..."""
    if len(shape) < 3:
        return None
    g, c = Atom(groups), Atom(_divided(shape[1], groups))
    first, others = _axes(shape[:1]), _axes(shape[2:])
    return (*first, (g, c), *others), (*first, (c, g), *others)


def _divided(size: Size, factor: int) -> Size:
    return size // factor if isinstance(size, int) else None


def aligned(before: Shape, after: Sequence[Size]) -> Pattern:
    """The pattern of a row-major reshape; -1 stands for the one size that torch works out.

    Equal sizes at the front, and at the back, are the same axes, whatever lies between them. What lies
    between is one axis split, or several merged, or mixed: then it is new.
    """
    axes = _axes(before)
    shortest = min(len(before), len(after))
    front = _equal(zip(before, after, strict=False))
    back = min(_equal(zip(before[::-1], after[::-1], strict=False)), shortest - front)
    source, target = axes[front : len(axes) - back], after[front : len(after) - back]
    if len(source) == 1:
        between = _split(source[0][0], target)
    elif len(target) == 1:
        between = (_merged(source),)
    else:
        source, between = _grouped(source, target)
    whole = (_merged(between),) if len(source) == 1 else source
    pattern_before = (*axes[:front], *whole, *axes[len(axes) - back :])
    return pattern_before, (*axes[:front], *between, *axes[len(axes) - back :])


def _grouped(source: Axes, sizes: Sequence[Size]) -> tuple[Axes, Axes]:
    """Several axes and the several that come of them: apart where both have had as many elements by then.

    That can be told if all sizes are numbers; else, and of what cannot be told apart, all axes are new.
    """
    known = [atoms[0].size for atoms in source if isinstance(atoms[0].size, int)]
    total = math.prod(known)
    fixed = math.prod(size for size in sizes if isinstance(size, int) and size != -1)
    given = [total // fixed if size == -1 and fixed else size for size in sizes if isinstance(size, int)]
    is_told = len(known) == len(source) and len(given) == len(sizes)
    if not is_told or not total or math.prod(given) != total:
        return source, _new(sizes)
    before: list[tuple[Atom, ...]] = []
    after: list[tuple[Atom, ...]] = []
    while known and given:
        many, few = (1, 0) if known[0] == 1 else (0, 1) if given[0] == 1 else _group(known, given)
        if many == 0 or few == 0:  # an axis of one element is by itself
            made = _new(given[:few])
            before += source[:many]
        elif many == 1:
            made = _split(source[0][0], given[:few])
            before.append(_merged(made))
        else:
            made = (_merged(source[:many]),) if few == 1 else _new(given[:few])
            before += source[:many]
        after += made
        source, known, given = source[many:], known[many:], given[few:]
    return (*before, *source), (*after, *_new(given))  # what is left has one element along each axis


def _group(one: Sequence[int], other: Sequence[int]) -> tuple[int, int]:
    """How many of each, from the first on, have the same product: the fewest."""
    many, few = 1, 1
    while math.prod(one[:many]) != math.prod(other[:few]):
        if math.prod(one[:many]) < math.prod(other[:few]):
            many += 1
        else:
            few += 1
    return many, few


def _new(sizes: Sequence[Size]) -> Axes:
    return tuple((Atom(None if size == -1 else size),) for size in sizes)


def _equal(pairs: Iterable[tuple[Size, Size]]) -> int:
    """How many pairs of sizes are equal for certain, from the first one on."""
    count = 0
    for one, other in pairs:
        if one is None or one != other:
            break
        count += 1
    return count


def _split(atom: Atom, sizes: Sequence[Size]) -> Axes:
    """The atoms of one axis of that size; a single size that is not given follows from the others."""
    fixed = [size for size in sizes if isinstance(size, int) and size != -1]
    rest = atom.size
    if math.prod(fixed) != 1:
        rest = atom.size // math.prod(fixed) if isinstance(atom.size, int) and all(fixed) else None
    single = len(fixed) == len(sizes) - 1
    return tuple((Atom(size if size in fixed else rest if single else None),) for size in sizes)
