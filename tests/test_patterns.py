"""Which axes of a reshaped value are which of the value before: held against torch's own reshape."""

from __future__ import annotations

import math

import torch
from hypothesis import event, given
from hypothesis import strategies as st

from fxfuse.channels import Channels, every, through
from fxfuse.patterns import aligned
from fxfuse.refusals import Code


@st.composite
def _reshapes(draw):
    """Two shapes of as many elements, of which one size of the second may be left to torch."""
    factors = draw(st.lists(st.sampled_from([1, 2, 2, 3, 4]), min_size=1, max_size=6))

    def shape():
        sizes = []
        for factor in factors:
            if sizes and draw(st.booleans()):
                sizes[-1] *= factor
            else:
                sizes.append(factor)
        return sizes

    before, after = shape(), shape()
    if draw(st.booleans()):  # in another order they are mixed
        after = draw(st.permutations(after))
    left = draw(st.integers(-1, len(after) - 1))
    return before, after, [-1 if place == left else size for place, size in enumerate(after)]


@given(_reshapes())
def test_what_a_map_on_an_axis_was_before_a_reshape(case):
    before, after, wanted = case
    pattern = aligned(before, wanted)
    ends = {math.prod(before[:place]) for place in range(len(before) + 1)}  # of axes, in elements
    for axis in range(-len(after), 0):
        size = after[axis]
        values = torch.arange(size).view(-1, *[1] * (-axis - 1)).expand(after)
        channels = through(pattern, Channels((axis,), every(size)), backward=True)
        if {math.prod(after[:axis]), math.prod(after[: axis + 1 or None])} <= ends and size > 1:
            assert isinstance(channels, Channels), (before, wanted, axis)
            event("told")
        if isinstance(channels, Code) or (index := _over(channels, before)) is None:
            continue
        assert torch.equal(index.reshape(after), values), (before, wanted, axis)


def _over(channels, shape):
    """The entry for each element of a value of that shape."""
    sizes = [shape[axis] for axis in channels.axes]
    index = channels.over(math.prod(sizes))
    if index is None:
        return None
    found = torch.tensor(index).view(sizes)
    for axis in range(-len(shape), 0):
        if axis not in channels.axes:
            found = found.unsqueeze(len(shape) + axis)
    return found.expand(shape)


def test_axes_that_hold_the_same_elements_are_told_apart():
    pattern = aligned((8, 3, 3, 4, 4, 8), (-1, 16, 8))
    assert [len(atoms) for atoms in pattern[1]] == [3, 2, 1]
    assert [atom for atoms in pattern[1] for atom in atoms] == [atom for (atom,) in pattern[0]]
    pattern = aligned((6, 4, 5, 1), (2, 3, 20, 1, 1))
    assert [len(atoms) for atoms in pattern[0]][:3] == [2, 1, 1]
    assert [len(atoms) for atoms in pattern[1]][:3] == [1, 1, 2]
