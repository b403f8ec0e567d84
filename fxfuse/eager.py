"""What the operators of the source give, in float64, by torch's own functions: what a fold is compared with.

Nothing here uses the arithmetic of the folds.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from fxfuse.affine import exact
from fxfuse.channels import KEPT, Channels, every
from fxfuse.geometry import Window
from fxfuse.maps import number
from fxfuse.nodes import Affine, Linear, Norm, TensorName
from fxfuse.ops import Reader

Part = Callable[[Tensor], Tensor]


def mapped(value: Tensor, source: Norm | Affine, channels: Channels, reader: Reader, part: Part) -> Tensor:
    """What a norm or constant makes of a value (batch, channels, places), by torch's own batch norm.

    Args:
        value: the value.
        source: what is applied.
        channels: to which channels.
        reader: reads the tensors.
        part: what is done to all numbers first: `abs` gives the magnitudes of what is summed on the way.
    """
    index = channels.index
    places = None if index == every(len(index)) else torch.tensor(index, device=value.device)

    def taken(tensor: Tensor) -> Tensor:
        numbers = exact(tensor)
        return part(numbers[: len(index)] if places is None else numbers[places.clamp_min(0)])

    def named(name: TensorName | None) -> Tensor | None:
        return None if name is None else taken(reader.tensor(name))

    if isinstance(source, Norm):
        var = taken(reader.tensor(source.var))
        centred, bias = value, None
        if channels.shift:
            centred = value + part(-taken(reader.tensor(source.mean))).view(-1, 1)
            bias = named(source.bias)
        zero, weight = torch.zeros_like(var), named(source.weight)
        # F.batch_norm of some torch versions takes no ε of zero.
        result = torch.batch_norm(centred, weight, bias, zero, var, False, 0.0, source.eps, False)
    else:
        constant = taken(number(source, reader).to(value.device).flatten()).view(-1, 1)
        if source.role == "times":
            result = value * constant
        elif source.role == "over":
            result = value / constant
        else:
            result = part(-value if source.negative else value)
            if channels.shift:
                result = result + part(source.factor * constant)
    if places is not None and KEPT in index:
        result = torch.where((places >= 0).view(-1, 1), result, value)
    return result


def applied(linear: Linear, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """What torch's operator makes of x, (batch, channels, *spatial), with these."""
    geometry = linear.geometry
    assert geometry is not None
    axes = geometry.axes
    if not axes:
        flat: Tensor = F.linear(x, weight.t() if linear.transposed else weight, bias)
        return flat
    strides, paddings, dilations, extras = (
        [getattr(axis, name) for axis in axes] for name in ("stride", "padding", "dilation", "extra")
    )
    if geometry.fill != "zeros":
        widths = [width for width in reversed(paddings) for _ in (0, 1)]
        x, paddings = F.pad(x, widths, geometry.fill), [0] * len(axes)
    settings = (strides, paddings, dilations, linear.transposed, extras, geometry.groups)
    result: Tensor = torch.convolution(x, weight, bias, *settings)
    return result


def averaged(window: Window, x: Tensor) -> Tensor:
    """What torch's pooling makes of x, (batch, channels, *spatial)."""
    sizes, strides, paddings = (
        [getattr(axis, name) for axis in window.axes] for name in ("size", "stride", "padding")
    )
    pool: Any = (F.avg_pool1d, F.avg_pool2d, F.avg_pool3d)[len(sizes) - 1]
    padded = F.pad(x, [width for width in reversed(paddings) for _ in (0, 1)])
    sums: Tensor = pool(padded, sizes, strides) * math.prod(sizes)
    return sums / window.divisor


def is_near(difference: Tensor, magnitude: Tensor, relative: float) -> bool:
    """Whether no element differs by more than that; NaN does."""
    return bool((difference.abs() <= relative * magnitude.abs()).all())


def is_rounded(change: Tensor, right: Tensor, dtype: torch.dtype) -> bool:
    """Whether numbers differ from the right ones by `change` because they were rounded once to `dtype`."""
    limits = torch.finfo(dtype)
    # Half a unit in the last place; float16 and bfloat16 are rounded by way of float32.
    unit = 0.5 * (1 + 2.0**-12) * limits.eps + 2.0**-51
    return is_near(change, right.abs() + limits.tiny, unit)
