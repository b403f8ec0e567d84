"""Functions that oneDNN Graph fails on, or takes for others, in words that it knows.

And one that loses digits with channels last.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode


class Legalised(TorchFunctionMode):
    """Calls functions in words that oneDNN Graph knows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "").partition(".")[0]  # aten's have an overload behind it
        if name == "batch_norm" and func is not F.batch_norm:
            x, weight, bias, mean, var, *rest = args  # in an order of its own
            args = (x, mean, var, weight, bias, *rest)
        return _LEGAL.get(name, func)(*args, **(kwargs or {}))


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """The approximation by tanh: oneDNN Graph computes the exact function in its place.

    (1 + tanh z)/2 is the logistic function of 2z, and takes fewer steps.
    """
    if approximate == "none":
        return F.gelu(x)
    root = math.sqrt(2 / math.pi)
    return x * torch.sigmoid(x * (2 * root + 2 * root * 0.044715 * (x * x)))


def _layer_norm(
    x: Tensor, shape: Any, weight: Any = None, bias: Any = None, *args: Any, **kwargs: Any
) -> Tensor:
    """oneDNN Graph fails where there is no weight and bias."""
    weight = x.new_ones(shape) if weight is None else weight
    bias = x.new_zeros(shape) if bias is None else bias
    return torch.layer_norm(x, shape, weight, bias, *args, **kwargs)


def _batch_norm(  # noqa: PLR0913, PLR0917 - they are the function's
    x: Tensor,
    mean: Tensor | None,
    var: Tensor | None,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    training: bool = False,
    momentum: float = 0.1,
    eps: float = 1e-5,
    *_: Any,
) -> Tensor:
    """oneDNN Graph fails without weight and bias, and takes another axis than 1 where there are not four."""
    if training or mean is None or var is None:
        return F.batch_norm(x, mean, var, weight, bias, training, momentum, eps)
    scale = (var + eps).rsqrt() * (1 if weight is None else weight)
    shift = (0 if bias is None else bias) - mean * scale
    axes = (-1, *(1,) * (x.dim() - 2))
    return x * scale.view(axes) + shift.view(axes)


def _group_norm(
    x: Tensor,
    num_groups: int,
    weight: Tensor | None = None,
    bias: Tensor | None = None,
    eps: float = 1e-5,
    cudnn_enabled: bool = True,
) -> Tensor:
    """With channels last torch takes E[x²] - E[x]² for the variance: no digit is left far from zero.

    The norm does not depend on what is added to a group: its mean is taken away before.
    """
    if x.dim() in (4, 5):
        means = x.mean(tuple(range(2, x.dim())))  # of channels
        size = means.shape[1] // num_groups
        of_groups = means.view(-1, num_groups, size).mean(2, keepdim=True).expand(-1, -1, size)
        x = x - of_groups.reshape(*means.shape, *(1,) * (x.dim() - 2))
    return torch.group_norm(x, num_groups, weight, bias, eps, cudnn_enabled)


def _round(x: Tensor, *, decimals: int = 0) -> Tensor:
    """oneDNN Graph takes no notice of decimals."""
    if decimals == 0:
        return torch.round(x)
    factor = 10.0 ** abs(decimals)
    return torch.round(x * factor) / factor if decimals > 0 else torch.round(x / factor) * factor


def _elu(
    x: Tensor, alpha: float = 1.0, scale: float = 1.0, input_scale: float = 1.0, *, inplace: bool = False
) -> Tensor:
    """Nor of the two scales, which only exported graphs give."""
    if scale == input_scale == 1:
        return F.elu(x, alpha, inplace)
    return scale * torch.where(x > 0, x, alpha * torch.expm1(x * input_scale))


def _log(input: Tensor, *, out: Tensor | None = None) -> Tensor:
    """oneDNN's has an error of 10⁻⁶ around 1, where it is 0. oneDNN Graph does not know x · log(y)."""
    if out is not None or input.is_complex():
        return torch.log(input, out=out)
    return torch.xlogy(1.0, input)


_POOLINGS = [f"{kind}_pool{dims}d" for kind in ("max", "avg") for dims in (1, 2, 3)]


def _with_stride(pool: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """oneDNN Graph does not know that the stride of a pooling is its size where none is given."""

    def call(x: Tensor, kernel_size: Any, stride: Any = None, *args: Any, **kwargs: Any) -> Tensor:
        return pool(x, kernel_size, stride or kernel_size, *args, **kwargs)

    return call


_LEGAL: dict[str, Callable[..., Tensor]] = {
    "gelu": _gelu,
    "layer_norm": _layer_norm,
    "batch_norm": _batch_norm,
    "group_norm": _group_norm,
    "round": _round,
    "elu": _elu,
    "log": _log,
    "log_": lambda x: x.copy_(_log(x)),
    **{name: _with_stride(getattr(F, name)) for name in _POOLINGS},
}
