"""Programs for slices of a batch, compared with the folded module on two samples.

The program runs once for each binary digit of the places of its samples, with the first sample where that is
0 and the second where it is 1. So of any two places some run has another sample in the one than in the other,
and the folded module, which treats each sample by itself, need not compute more than two.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxfuse.inputs import drawn_like
from fxfuse.lowering.candidates import Candidate, compared
from fxfuse.lowering.specialised import Output, Program
from fxfuse.replica import replicate
from fxfuse.verdict import Comparison

Order = Sequence[int]
"""Which of two samples is at each place of a slice."""

Slices = Callable[[Sequence[Any]], Iterator[list[Any]]]
"""Gives, for inputs of two samples, the leaves of those for slices of these."""


def compared_on_pairs(candidate: Candidate, size: int) -> tuple[str, Comparison]:
    """Why a program for slices of `size` samples may not be used, empty if it may, and how it compares.

    Raises:
        UnsupportedError: it raises something.
    """
    digits = max(1, (size - 1).bit_length())
    orders = [[place >> digit & 1 for place in range(size)] for digit in range(digits)]
    leaves = pytree.tree_leaves(candidate.inputs)
    strides = [leaf.stride() if isinstance(leaf, Tensor) else () for leaf in leaves]
    slices = partial(_slices, orders=orders, strides=strides)
    pair = pytree.tree_map_only(Tensor, lambda tensor: tensor[:2], candidate.inputs)
    if all(torch.equal(*leaf) for leaf in pytree.tree_leaves(pair) if isinstance(leaf, Tensor)):
        pair = drawn_like(pair, seed=3)
    folded, outputs = replicate(candidate.compiler.folded), candidate.graph.outputs
    of_program = partial(_run, candidate, candidate.program, slices)
    of_pair = _OfPair(folded, outputs, orders)
    reference = candidate.reference()
    if reference is not None:
        return compared(of_pair, of_program, pair, partial(_run, candidate, reference, slices))
    reason, found = compared(of_pair, of_program, pair, of_pair)
    if not reason or size == 2:
        return reason, found
    # For so many samples it may run on other kernels than for two, which round more.
    of_slices = _OfSlices(folded, outputs, slices)
    return compared(of_slices, of_program, pair, of_slices)


class _OfPair(nn.Module):
    """A module that is called with two samples, and gives what it does for slices of these in some orders.

    Args:
        module: the module.
        outputs: the leaves of what it gives; those that are no places are left out, as they may depend on how
            many samples there are.
        orders: of the samples.
    """

    def __init__(self, module: nn.Module, outputs: Sequence[Any], orders: Sequence[Order]) -> None:
        super().__init__()
        self.module = module
        self.outputs = outputs
        self.orders = orders
        self.training = False

    def forward(self, *pair: Any) -> list[Tensor]:
        leaves = _places(self.module(*pair), self.outputs)
        return [torch.cat([_in_order(leaf, order) for order in self.orders]) for leaf in leaves]


class _OfSlices(nn.Module):
    """The same of a module that is called with the slices.

    Args:
        module: the module.
        outputs: as before.
        slices: gives the leaves of the inputs for each slice.
    """

    def __init__(self, module: nn.Module, outputs: Sequence[Any], slices: Slices) -> None:
        super().__init__()
        self.module = module
        self.outputs = outputs
        self.slices = slices
        self.training = False

    def forward(self, *pair: Any) -> list[Tensor]:
        structure = pytree.tree_structure(pair)
        given = (pytree.tree_unflatten(leaves, structure) for leaves in self.slices(pair))
        found = [_places(self.module(*each), self.outputs) for each in given]
        return [torch.cat(leaves) for leaves in zip(*found, strict=True)]


def _run(candidate: Candidate, program: Program, slices: Slices, *pair: Any) -> list[Tensor]:
    """The same by a program."""
    results = [program(candidate.graph.tensors(leaves)) for leaves in slices(pair)]
    places = [output.number for output in candidate.graph.outputs if isinstance(output, Output)]
    return [torch.cat([each[place] for each in results]) for place in places]


def _places(result: Any, outputs: Sequence[Any]) -> list[Tensor]:
    """The leaves of a result that are places among `outputs`."""
    pairs = zip(pytree.tree_leaves(result), outputs, strict=True)
    return [leaf for leaf, output in pairs if isinstance(output, Output)]


def _slices(
    pair: Sequence[Any], orders: Sequence[Order], strides: Sequence[Sequence[int]]
) -> Iterator[list[Any]]:
    """For each order the leaves of inputs for its samples, in copies with these strides.

    Kernels read what they were compiled for.
    """
    for order in orders:
        leaves = zip(pytree.tree_leaves(pair), strides, strict=True)
        yield [
            _laid_out(_in_order(leaf, order), stride) if isinstance(leaf, Tensor) else leaf
            for leaf, stride in leaves
        ]


def _in_order(tensor: Tensor, order: Order) -> Tensor:
    """Of a tensor for two samples, in one place each or several in a row, that for samples in an order."""
    return tensor.reshape(2, -1, *tensor.shape[1:])[[*order]].flatten(0, 1)


def _laid_out(tensor: Tensor, stride: Sequence[int]) -> Tensor:
    return torch.empty_strided(tensor.shape, stride, dtype=tensor.dtype).copy_(tensor)
