"""The affine maps of norms and constants, as numbers."""

from __future__ import annotations

import torch
from torch import Tensor, fx

from fxfuse.affine import AffineMap, exact
from fxfuse.nodes import Affine, Norm
from fxfuse.ops import Reader


def affine_of(source: Norm | Affine, reader: Reader, device: torch.device) -> AffineMap:
    """The map of a norm, on the norm's device, or of arithmetic with a constant, on `device`."""
    if isinstance(source, Norm):
        weight = None if source.weight is None else reader.tensor(source.weight)
        bias = None if source.bias is None else reader.tensor(source.bias)
        return AffineMap.from_norm(
            reader.tensor(source.mean), reader.tensor(source.var), weight, bias, source.eps
        )
    value = exact(number(source, reader).to(device)).flatten()
    if source.role == "plus":
        return AffineMap(torch.full_like(value, -1.0 if source.negative else 1.0), source.factor * value)
    return AffineMap(value if source.role == "times" else 1 / value, torch.zeros_like(value))


def number(source: Affine, reader: Reader) -> Tensor:
    """The constant that it multiplies or adds."""
    if isinstance(source.constant, fx.Node):
        return reader.tensor(source.constant)
    return torch.tensor(source.constant, dtype=torch.float64)
