"""The inputs on which models are compared: drawn from several distributions, and the same in float64."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree

DISTRIBUTIONS = ("normal", "heavy-tailed", "constant", "zeros", "image-like")
_COARSE = 4  # the size of the random image that is enlarged


def sample(model: nn.Module, inputs: Sequence[Any], seed: int, distribution: str = "normal") -> list[Any]:
    """`inputs`, with a random tensor in the dtype of `model` in place of each that is a torch.Size."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(seed)
    return [
        _sample(value, distribution, generator).to(device=like.device, dtype=like.dtype)
        if isinstance(value, torch.Size)
        else value
        for value in inputs
    ]


def _sample(shape: torch.Size, distribution: str, generator: torch.Generator) -> Tensor:
    if distribution == "zeros":
        return torch.zeros(shape)
    if distribution == "constant":
        return torch.ones(shape) * torch.randn((), generator=generator)
    if distribution == "image-like":
        return _image_like(shape, generator)
    values = torch.randn(shape, generator=generator)
    return values**3 if distribution == "heavy-tailed" else values


def _image_like(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Smooth, and between 0 and 1, along up to three axes after the first two."""
    spatial = shape[2:]
    if not 1 <= len(spatial) <= 3:
        return torch.rand(shape, generator=generator)
    coarse = torch.rand(*shape[:2], *(min(_COARSE, size) for size in spatial), generator=generator)
    return F.interpolate(coarse, spatial, mode=("linear", "bilinear", "trilinear")[len(spatial) - 1])


def described(values: Sequence[Any]) -> str:
    """Their shapes, or types."""
    return ", ".join(str(tuple(v.shape)) if isinstance(v, Tensor) else type(v).__name__ for v in values)


def in_float64(inputs: Sequence[Any]) -> list[Any]:
    """The inputs in float64, as far as they are floats."""

    def double(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return list(pytree.tree_map_only(Tensor, double, list(inputs)))


def drawn_like(inputs: tuple[Any, ...], seed: int) -> tuple[Any, ...]:
    """Random numbers in the place of floats, laid out like these; others than torch.randn gives."""
    generator = torch.Generator().manual_seed(seed)

    def drawn(tensor: Tensor) -> Tensor:
        if not tensor.is_floating_point():
            return tensor
        like = torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype)
        return like.normal_(0.25, 1.25, generator=generator).to(tensor.device)

    return cast(tuple[Any, ...], pytree.tree_map_only(Tensor, drawn, inputs))
