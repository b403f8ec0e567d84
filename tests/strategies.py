"""Random models of one linear operator and one norm; `programs` holds those of many.

Both are drawn as plain data (frozen dataclasses), which Hypothesis prints and shrinks, and built from it.
All tensors are moderate, so that neither a small dtype nor float64 drowns a property in rounding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support import randomise

EPSILONS = (1e-5, 1e-3, 1e-1)
SEEDS = st.integers(0, 999)
_FUNCTIONS = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def applied(operator: Any, x: Tensor, *, functional: bool) -> Tensor:
    """`operator` on `x`: as a module, or by the function with the parameters that the module holds."""
    if not functional:
        return operator(x)
    function = _FUNCTIONS[type(operator)]
    tensors = (operator.weight, operator.bias)
    if isinstance(operator, nn.Linear):
        return function(x, *tensors)
    stride, padding, dilation, groups = operator.stride, operator.padding, operator.dilation, operator.groups
    if operator.transposed:
        return function(x, *tensors, stride, padding, operator.output_padding, groups, dilation)
    if operator.padding_mode != "zeros":
        x = F.pad(x, operator._reversed_padding_repeated_twice, mode=operator.padding_mode)
        padding = 0
    return function(x, *tensors, stride=stride, padding=padding, dilation=dilation, groups=groups)


def normalised(norm: Any, x: Tensor, form: str) -> Tensor:
    """`norm` on `x`; form: "module", "function", "native", "training" for batch statistics in this call."""
    if form == "module":
        return norm(x)
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if isinstance(norm, nn.modules.instancenorm._InstanceNorm):
        return F.instance_norm(x, *statistics, use_input_stats=False, eps=norm.eps)
    training = form == "training" or norm.training or norm.running_mean is None
    if form == "native":
        return torch.batch_norm(x, norm.weight, norm.bias, *statistics[:2], training, 0.1, norm.eps, False)
    return F.batch_norm(x, *statistics, training=training, eps=norm.eps)


def moderate(model: nn.Module, seed: int) -> None:
    """As `randomise`, with magnitudes in [1/4, 1] and operators that do not enlarge their input much."""
    randomise(model, seed)
    with torch.no_grad():
        for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.sign() * tensor.abs().clamp(0.25, 1.0))
            if tensor.dim() > 1:
                tensor.div_(math.sqrt(tensor[0].numel()))


def noise(shape: Sequence[int], seed: int) -> Tensor:
    """A standard normal tensor in float64."""
    return torch.randn(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


@dataclass(frozen=True)
class Pair:
    """A linear operator and the norm after it.

    Attributes:
        operator: class name in torch.nn, and its arguments.
        norm: class name in torch.nn, and its arguments.
        forms: how the operator is called (functional or not), and how the norm is.
        shape: of the input.
        overrides: values of the first channels of the norm's tensors, by name; the rest is random.
    """

    operator: tuple[str, dict[str, Any]]
    norm: tuple[str, dict[str, Any]]
    forms: tuple[bool, str]
    shape: tuple[int, ...]
    overrides: dict[str, list[float]]
    channels_last: bool
    dtype: torch.dtype
    seed: int

    def model(self) -> PairModel:
        """The model, in eval mode."""
        operator, norm = (getattr(nn, name)(**arguments) for name, arguments in (self.operator, self.norm))
        model = PairModel(operator, norm, self.forms)
        moderate(model, self.seed)
        with torch.no_grad():
            for name, values in self.overrides.items():
                tensor = getattr(norm, name)
                if tensor is not None:
                    tensor[: len(values)] = torch.tensor(values[: len(tensor)], dtype=tensor.dtype)
        model.to(self.dtype)
        return model.to(memory_format=_CHANNELS_LAST[len(self.shape)]) if self.channels_last else model

    def inputs(self) -> tuple[Tensor]:
        """The one input."""
        x = noise(self.shape, self.seed).to(self.dtype)
        return (x.to(memory_format=_CHANNELS_LAST[len(self.shape)]) if self.channels_last else x,)

    def example_inputs(self) -> tuple[Tensor] | None:
        """What fuse has to be given: inputs where only they say which axis is normalised.

        They are zero: where W·x and b cancel, as they may by chance, a small dtype cannot hold s·W well
        enough for fuse's own verification, which is about the given inputs and not about axes.
        """
        return (torch.zeros_like(self.inputs()[0]),) if self.operator[0] == "Linear" else None


class PairModel(nn.Module):
    def __init__(self, operator: nn.Module, norm: nn.Module, forms: tuple[bool, str]) -> None:
        super().__init__()
        self.operator, self.norm, self.forms = operator, norm, forms

    def forward(self, x: Tensor) -> Tensor:
        x = applied(self.operator, x, functional=self.forms[0])
        return normalised(self.norm, x, self.forms[1])


@st.composite
def pairs(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = (torch.float64,)) -> Pair:
    """Any linear operator with any norm over running statistics."""
    kind = draw(st.sampled_from(("Conv", "ConvTranspose", "Linear")))
    dims = 0 if kind == "Linear" else draw(st.sampled_from((2, 1, 3)))
    groups, before, after = (draw(st.integers(1, 3)) for _ in range(3))
    if dims:
        channels = {"in_channels": groups * before, "out_channels": groups * after, "groups": groups}
        geometry, sizes = draw(_transposed(dims) if kind == "ConvTranspose" else _convolved(dims))
    else:
        channels, geometry, sizes = {"in_features": before, "out_features": groups * after}, {}, ()
    arguments = {**channels, **geometry, "bias": draw(st.booleans())}
    return Pair(
        operator=(f"{kind}{dims}d" if dims else kind, arguments),
        norm=draw(_norms(dims, groups * after)),
        forms=(draw(st.booleans()), draw(st.sampled_from(("module", "function")))),
        shape=(draw(st.integers(1, 2)), groups * before if dims else before, *sizes),
        overrides=draw(_overrides()),
        channels_last=dims > 1 and draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(SEEDS),
    )


@st.composite
def _norms(draw: st.DrawFn, dims: int, channels: int) -> tuple[str, dict[str, Any]]:
    batch = f"BatchNorm{max(dims, 1)}d"
    # An instance norm after a linear layer takes the batch for channels, which is another property.
    kinds = (batch, "SyncBatchNorm", f"InstanceNorm{dims}d") if dims else (batch, "SyncBatchNorm")
    arguments = {"eps": draw(st.sampled_from(EPSILONS)), "affine": draw(st.booleans())}
    return draw(st.sampled_from(kinds)), {"num_features": channels, "track_running_stats": True, **arguments}


def _overrides() -> st.SearchStrategy[dict[str, list[float]]]:
    def some(*values: float) -> st.SearchStrategy[list[float]]:
        return st.lists(st.sampled_from(values), max_size=3)

    return st.fixed_dictionaries(
        {
            "weight": some(0.0, -0.75, 1.0),
            "bias": some(0.0, -1.0),
            "running_mean": some(0.0, -1.0),
            "running_var": some(0.0, 1e-7, 1.0),
        }
    )


Geometry = tuple[dict[str, Any], tuple[int, ...]]


def _axes(draw: st.DrawFn, dims: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(dims))


@st.composite
def _convolved(draw: st.DrawFn, dims: int) -> Geometry:
    """Arguments of a convolution, and image sizes that it takes."""
    kernel, dilation = _axes(draw, dims, 1, 3), _axes(draw, dims, 1, 2)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    named = draw(st.sampled_from((None, "valid", "same")))
    stride = (1,) * dims if named == "same" else _axes(draw, dims, 1, 3)
    padding = (0,) * dims if named else _axes(draw, dims, 0, 2)
    # Reflection needs an image larger than the padding.
    least = [max(r + 1 - 2 * p, p + 1, r + 1 if named else 1) for r, p in zip(reach, padding, strict=True)]
    sizes = tuple(size + draw(st.integers(0, 2)) for size in least)
    mode = draw(st.sampled_from(("zeros", "reflect", "replicate", "circular")))
    return {
        "kernel_size": kernel,
        "stride": stride,
        "padding": named or padding,
        "dilation": dilation,
        "padding_mode": mode,
    }, sizes


@st.composite
def _transposed(draw: st.DrawFn, dims: int) -> Geometry:
    """Arguments of a transposed convolution, and image sizes with which something comes out of it."""
    kernel, dilation = _axes(draw, dims, 1, 3), _axes(draw, dims, 1, 2)
    stride, padding = _axes(draw, dims, 1, 3), _axes(draw, dims, 0, 2)
    # The largest output padding that torch takes.
    extra = tuple(draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True))
    sizes = []
    for k, d, s, p, e in zip(kernel, dilation, stride, padding, extra, strict=True):
        lacking = max(0, 2 * p - d * (k - 1) - e)
        sizes.append(1 + -(-lacking // s) + draw(st.integers(0, 2)))
    return {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "output_padding": extra,
    }, tuple(sizes)
