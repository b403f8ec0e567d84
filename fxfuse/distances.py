"""How far apart two tensors are."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ZERO = 1e-12
"""Differences up to this count as none."""

_BITS = {torch.float64: torch.int64, torch.float32: torch.int32}


def wide(tensor: Tensor) -> Tensor:
    """The values in float64 on the CPU; complex numbers as pairs."""
    tensor = torch.view_as_real(tensor) if tensor.is_complex() else tensor
    return tensor.detach().to(device="cpu", dtype=torch.float64)


def finite(tensor: Tensor) -> Tensor:
    """Zeros in place of infinities and NaN."""
    return tensor.nan_to_num(0.0, 0.0, 0.0)


def distance(left: Tensor, right: Tensor) -> Tensor:
    """|left - right|; 0 where both are the same infinity or both NaN, infinite where only one is."""
    same = (left == right) | (left.isnan() & right.isnan())
    return torch.where(same, 0.0, (left - right).abs()).nan_to_num(nan=math.inf, posinf=math.inf)


def rms(tensor: Tensor) -> Tensor:
    """The root of the mean square, ()."""
    return tensor.square().mean().sqrt()


def units_apart(left: Tensor, right: Tensor) -> list[int]:
    """A histogram of how many representable numbers lie between two tensors of one real float dtype.

    Entry 0 counts the elements that are equal, entry i those that are 2^(i-1) up to 2^i - 1 units in the last
    place apart. Elements that are not finite in either tensor are left out.
    """
    both = left.isfinite() & right.isfinite()
    apart = (_rank(left[both]) - _rank(right[both])).abs()
    powers = torch.frexp(apart.double()).exponent  # 0 → 0, 1 → 1, 2 and 3 → 2, 4 to 7 → 3
    return [int(count) for count in torch.bincount(powers.long())]


def _rank(tensor: Tensor) -> Tensor:
    """The place of each number in the order of all numbers of the dtype."""
    bits = tensor.detach().cpu().contiguous().view(_BITS.get(tensor.dtype, torch.int16)).long()
    lowest = torch.iinfo(_BITS.get(tensor.dtype, torch.int16)).min
    return torch.where(bits < 0, lowest - bits, bits)
