"""Absorbing an affine map into the weight and bias of a linear operator, on its output side.

    s·(W·x + b) + t = (s·W)·x + (s·b + t)        s per output channel

Everything is computed in float64 and rounded once, into the weight's dtype.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from fxfuse.affine import AffineMap, exact
from fxfuse.refusals import Code

# Weights are scaled in pieces of about this many elements, so that the float64 copy stays in the cache.
_PIECE = 1 << 18


def absorb_output(
    weight: Tensor, bias: Tensor | None, affine: AffineMap, *, transposed: bool = False, groups: int = 1
) -> tuple[Tensor, Tensor] | Code:
    """The weight and bias of the operator followed by `affine`.

    Args:
        weight: (out, in/groups, *kernel), any float dtype; transposed: (in, out/groups, *kernel).
        bias: (out,) or None.
        affine: the map of the out channels.
        transposed: whether `weight` belongs to a transposed convolution.
        groups: number of groups. A transposed weight holds group g's output channels in its rows
            g·in/groups and following, so the channel of weight[i, j] is (i // (in/groups))·out/groups + j.

    Returns:
        New tensors on weight's device, in its dtype and memory format, exact but for one rounding; or
        the code of the reason why that dtype cannot hold them.
    """
    shift = affine.shift if bias is None else affine.scale * exact(bias) + affine.shift
    folded_bias = shift.to(device=weight.device, dtype=weight.dtype)
    folded, peak = _scaled(weight, _by_row(affine.scale, weight, transposed, groups))
    if weight.is_meta:
        return folded, folded_bias
    if not bool(folded_bias.isfinite().all()) or not bool(peak.to(weight.dtype).isfinite().all()):
        return Code.OVERFLOW
    if transposed:
        peak = peak.view(groups, -1, peak.shape[1]).amax(1)
    lost = (peak > 0) & (peak + shift.abs().view_as(peak) < torch.finfo(weight.dtype).tiny)
    return Code.UNDERFLOW if bool(lost.any()) else (folded, folded_bias)


def _by_row(scale: Tensor, weight: Tensor, transposed: bool, groups: int) -> Tensor:
    """`scale` as the rows of `weight` need it: (out, 1), transposed (in, out/groups)."""
    if not transposed:
        return scale.view(-1, 1)
    return scale.view(groups, 1, -1).expand(-1, weight.shape[0] // groups, -1).reshape(weight.shape[0], -1)


def _scaled(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`weight`·`scale`, and the largest magnitudes that occur in it, in the shape of `scale`, float64."""
    result = torch.empty_like(weight, requires_grad=False)
    peak = torch.empty_like(scale)
    for rows in _pieces(weight):
        product = exact(weight[rows]).reshape(*scale[rows].shape, -1) * scale[rows].unsqueeze(-1)
        result[rows] = product.view_as(weight[rows])
        torch.linalg.vector_norm(product, float("inf"), dim=-1, out=peak[rows])
    return result, peak


def _pieces(weight: Tensor) -> Iterator[slice]:
    step = max(1, _PIECE * weight.shape[0] // max(1, weight.numel()))
    for start in range(0, weight.shape[0], step):
        yield slice(start, start + step)
