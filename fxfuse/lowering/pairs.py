"""Programs for slices of a batch, compared with the folded module on two samples.

The program runs once for each binary digit of the places of its samples, with the first sample where that is
0 and the second where it is 1. So of any two places some run has another sample in the one than in the other,
and the folded module, which treats each sample by itself, need not compute more than two.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxfuse.inputs import drawn_like
from fxfuse.lowering.candidates import Candidate, reason_against
from fxfuse.lowering.specialised import Output, Program, flattened
from fxfuse.replica import replicate
from fxfuse.verdict import Comparison

Order = Sequence[int]
"""Which of two samples is at each place of a slice."""


def compared_on_pairs(candidate: Candidate, size: int) -> tuple[str, Comparison]:
    """Why a program for slices of `size` samples may not be used, empty if it may, and how it compares.

    Raises:
        UnsupportedError: it raises something.
    """
    digits = max(1, (size - 1).bit_length())
    orders = [[place >> digit & 1 for place in range(size)] for digit in range(digits)]
    pair = pytree.tree_map_only(Tensor, lambda tensor: tensor[:2], candidate.inputs)
    samples = [tensor for tensor in pytree.tree_leaves(pair) if isinstance(tensor, Tensor)]
    if all(torch.equal(*tensor) for tensor in samples):
        pair = drawn_like(pair, seed=3)
    folded = _ForSlices(replicate(candidate.compiler.folded), candidate.graph.outputs, orders)
    reference = candidate.reference()
    expected = None if reference is None else partial(_run, candidate, reference, orders)
    return reason_against(partial(_run, candidate, candidate.program, orders), folded, pair, expected)


class _ForSlices(nn.Module):
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

    def forward(self, *inputs: Any) -> list[Tensor]:
        leaves, _ = flattened(self.module(*inputs))
        pairs = zip(leaves, self.outputs, strict=True)
        of_samples = [leaf for leaf, output in pairs if isinstance(output, Output)]
        return [torch.cat([_in_order(leaf, order) for order in self.orders]) for leaf in of_samples]


def _run(candidate: Candidate, program: Program, orders: Sequence[Order], *pair: Any) -> list[Tensor]:
    """The same by a program for such slices."""
    samples = candidate.graph.tensors(pytree.tree_leaves(pair))
    likes = candidate.tensors()
    results = []
    for order in orders:
        given = zip(samples, likes, strict=True)
        results.append(program([_laid_out(_in_order(tensor, order), like) for tensor, like in given]))
    places = [output.number for output in candidate.graph.outputs if isinstance(output, Output)]
    return [torch.cat([each[place] for each in results]) for place in places]


def _in_order(tensor: Tensor, order: Order) -> Tensor:
    """Of a tensor for two samples, in one place each or several in a row, that for samples in an order."""
    return tensor.reshape(2, -1, *tensor.shape[1:])[[*order]].flatten(0, 1)


def _laid_out(tensor: Tensor, like: Tensor) -> Tensor:
    """A copy that lies in memory as another tensor does: kernels read what they were compiled for."""
    return torch.empty_strided(like.shape, like.stride(), dtype=tensor.dtype).copy_(tensor)
