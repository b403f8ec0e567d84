r"""Affine maps per channel, y = s·x + t, in float64.

An eval-mode batch norm is one (Ioffe & Szegedy 2015, algorithm 2):

    y = γ·(x − μ) / √(σ² + ε) + β        s = γ / √(σ² + ε)        t = β − μ·s

and two in a row are one: s₂·(s₁·x + t₁) + t₂ = (s₂·s₁)·x + (s₂·t₁ + t₂).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxfuse.channels import every


@dataclass(frozen=True)
class AffineMap:
    """y = scale·x + shift. scale, shift: (channels,), float64."""

    scale: Tensor
    shift: Tensor

    @classmethod
    def from_norm(
        cls, mean: Tensor, var: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float
    ) -> AffineMap:
        """The map of an eval-mode batch norm. mean, var, weight γ, bias β: (channels,), any float dtype."""
        scale = torch.rsqrt(exact(var) + eps)
        if weight is not None:
            scale = scale * exact(weight)
        shift = -exact(mean) * scale
        return cls(scale, shift if bias is None else shift + exact(bias))

    def taken(self, index: Sequence[int], *, shift: bool) -> AffineMap:
        """Entry ``index[i]`` for channel i, the identity where it is negative; without `shift` the scale."""
        if index == every(len(self.scale)):
            return self if shift else AffineMap(self.scale, torch.zeros_like(self.shift))
        places = torch.tensor(index, device=self.scale.device)
        acts = places >= 0
        scale = torch.where(acts, self.scale[places.clamp_min(0)], 1.0)
        return AffineMap(scale, torch.where(acts & shift, self.shift[places.clamp_min(0)], 0.0))

    def then(self, after: AffineMap) -> AffineMap:
        """The map that applies this one first, then `after`."""
        return AffineMap(after.scale * self.scale, after.scale * self.shift + after.shift)


def exact(tensor: Tensor) -> Tensor:
    """`tensor` in float64; on the CPU where the device has no float64 (Apple's MPS)."""
    return tensor.cpu().double() if tensor.is_mps else tensor.double()
