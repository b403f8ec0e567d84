"""Absorbing affine maps into the weight and bias of a linear operator, before and after it.

    s·(W·(u·x + v) + b) + t = (s·W·u)·x + s·(W·v + b) + t        s, t per output channel, u, v per input

Everything is computed in float64 and rounded once, into the weight's dtype.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from fxfuse.affine import AffineMap, exact
from fxfuse.refusals import Code

# Weights are scaled in pieces of about this many elements, so that the float64 copy stays in the cache.
_PIECE = 1 << 17


@dataclass(frozen=True)
class Absorption:
    """A linear operator, and the maps before and after it that it is to absorb.

    Attributes:
        weight: (out, in/groups, *kernel), any float dtype; transposed: (in, out/groups, *kernel).
        bias: (out,) or None.
        before: the map of the in channels. Its shift is right only where every output sees the whole
            kernel: with zeros beyond the border, and for a transposed convolution, it has to be zero.
        after: the map of the out channels.
        transposed: whether `weight` belongs to a transposed convolution.
        groups: number of groups. A transposed weight holds group g's output channels in its rows
            g·in/groups and following, so the channel of weight[i, j] is (i // (in/groups))·out/groups + j.
    """

    weight: Tensor
    bias: Tensor | None
    before: AffineMap | None = None
    after: AffineMap | None = None
    transposed: bool = False
    groups: int = 1


def absorb(what: Absorption) -> tuple[Tensor, Tensor] | Code:
    """The weight and bias of the operator that has absorbed its maps.

    Returns:
        New tensors on weight's device, in its dtype and memory format, exact but for one rounding; or
        the code of the reason why that dtype cannot hold them.
    """
    weight = what.weight
    shift = _shift(what)
    folded_bias = shift.to(device=weight.device, dtype=weight.dtype)
    scale = _scale(what)
    assert scale is not None
    folded, sums = _scaled(weight, scale)
    if weight.is_meta:
        return folded, folded_bias
    # Sums of numbers may overflow, too.
    if not bool(sums.isfinite().all()) and not bool(folded.isfinite().all()):
        return Code.OVERFLOW
    if not bool(folded_bias.isfinite().all()):
        return Code.OVERFLOW
    is_small = bool((shift.abs() < torch.finfo(weight.dtype).tiny).any())
    if is_small and _is_lost(exact(weight) * scale, shift, what, weight.dtype):
        return Code.UNDERFLOW
    return folded, folded_bias


def absorb_unchecked(what: Absorption) -> tuple[Tensor, Tensor]:
    """As `absorb`, in operators that autograd differentiates and compilers trace; nothing is checked."""
    weight, shift = what.weight, _shift(what)
    scale = _scale(what)
    product = weight if scale is None else exact(weight) * scale
    return product.to(weight.device, weight.dtype), shift.to(weight.device, weight.dtype)


def rounded(exactly: Absorption, like: Tensor) -> tuple[Tensor, Tensor] | Code:
    """A weight and bias in float64, each rounded once to the dtype of `like`, in its memory format.

    Or the code of the reason why that dtype cannot hold them.
    """
    weight, bias = exactly.weight, exactly.bias
    assert bias is not None
    folded = torch.empty(weight.shape, dtype=like.dtype, device=like.device)
    folded = folded.to(memory_format=_memory_format(like)).copy_(weight)
    folded_bias = bias.to(like.device, like.dtype)
    if weight.is_meta:
        return folded, folded_bias
    if not bool(folded.isfinite().all()) or not bool(folded_bias.isfinite().all()):
        return Code.OVERFLOW
    return Code.UNDERFLOW if _is_lost(weight, bias, exactly, like.dtype) else (folded, folded_bias)


def _memory_format(tensor: Tensor) -> torch.memory_format:
    formats = {4: torch.channels_last, 5: torch.channels_last_3d}
    found = formats.get(tensor.dim(), torch.contiguous_format)
    is_other = not tensor.is_contiguous() and tensor.is_contiguous(memory_format=found)
    return found if is_other else torch.contiguous_format


def _is_lost(product: Tensor, shift: Tensor, what: Absorption, dtype: torch.dtype) -> bool:
    """Whether all of a channel is too small for the dtype to hold its digits."""
    limit = torch.finfo(dtype).tiny
    peak = _by_channel(product, what).abs().flatten(2).amax(2).flatten()
    return bool(((peak > 0) & (peak + shift.abs() < limit)).any())


def _shift(what: Absorption) -> Tensor:
    """The folded bias."""
    shift = exact(what.weight.new_zeros(())) if what.bias is None else exact(what.bias)
    if what.before is not None:
        grouped = _by_channel(exact(what.weight), what)
        kernels = grouped.reshape(*grouped.shape[:3], -1).sum(3)
        shift = shift + (kernels @ what.before.shift.view(what.groups, -1, 1)).flatten()
    return shift if what.after is None else what.after.scale * shift + what.after.shift


def _scale(what: Absorption) -> Tensor | None:
    """What each element of the weight is multiplied by, as a tensor that broadcasts to it, if anything."""
    out = None if what.after is None else _spread(what.after.scale, what, per_row=not what.transposed)
    if what.before is None:
        return out
    into = _spread(what.before.scale, what, per_row=what.transposed)
    return into if out is None else into * out


def _by_channel(weight: Tensor, what: Absorption) -> Tensor:
    """A view (groups, out/groups, in/groups, *kernel) of a weight in either layout."""
    grouped = weight.view(what.groups, weight.shape[0] // what.groups, *weight.shape[1:])
    return grouped.transpose(1, 2) if what.transposed else grouped


def _spread(scale: Tensor, what: Absorption, *, per_row: bool) -> Tensor:
    """A number for each row of the weight, (rows, 1, ...), or column of a row's group, (rows, n, ...)."""
    rows, kernel = what.weight.shape[0], [1] * (what.weight.dim() - 2)
    if per_row:
        return scale.view(-1, 1, *kernel)
    by_row = scale.view(what.groups, 1, -1).expand(-1, rows // what.groups, -1)
    return by_row.reshape(rows, -1, *kernel)


def _scaled(weight: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """`weight`·`scale`, computed in float64, rounded once; and sums of it, not finite if a number is not."""
    result = torch.empty_like(weight, requires_grad=False)
    rows = max(1, _PIECE * weight.shape[0] // weight.numel())
    product = torch.empty_like(weight[:rows], dtype=torch.float64, device=scale.device, requires_grad=False)
    pieces = (torch.split(tensor, rows) for tensor in (weight.detach(), scale, result))
    sums: list[Tensor] = []
    for source, factor, target in zip(*pieces, strict=True):
        target.copy_(product[: source.shape[0]].copy_(source).mul_(factor))
        sums.append(target.sum())
    return result, torch.stack(sums)
