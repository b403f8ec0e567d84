"""The engine "torch" on a CUDA device: cuDNN's convolutions, with what is done to their results.

The graph is written down in operators of aten, without writes: then any value may have its channels last,
which is the layout of cuDNN's fastest kernels. It has one kernel for a convolution, a sum and ReLU.
"""

from __future__ import annotations

import copy
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch.func import functionalize
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse.lowering.channels_last import put_channels_last
from fxfuse.lowering.dtypes import in_dtype
from fxfuse.lowering.specialised import Program, Specialised
from fxfuse.lowering.timing import medians

_ATEN = torch.ops.aten


def compile(graph: Specialised, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> Program:
    """A function of a list of tensors, with kernels for several operators where these are faster."""
    module = graph.module if dtype is None else in_dtype(graph, dtype)
    with torch.no_grad():
        apart = copy.deepcopy(make_fx(functionalize(module))(*inputs)).requires_grad_(False)
    put_channels_last(apart, [result.is_contiguous() for result in graph.results])
    faster = _faster(apart, joined(apart), inputs)
    return lambda tensors: faster(*tensors)


def _faster(
    apart: fx.GraphModule, together: fx.GraphModule | None, inputs: Sequence[Tensor]
) -> fx.GraphModule:
    """`together`, if there is one, its kernels are allowed and run, and it takes less time than `apart`."""
    settings: Any = torch.backends.cudnn
    deterministic = settings.deterministic or torch.are_deterministic_algorithms_enabled()
    if together is None or deterministic or not settings.enabled:
        return apart
    try:
        with torch.no_grad():
            calls = {"apart": partial(apart, *inputs), "together": partial(together, *inputs)}
            times = medians(calls, rounds=3)
    except RuntimeError:  # as on ROCm, or where cuDNN has no kernel for a shape
        return apart
    return together if times["together"] < times["apart"] else apart


def joined(module: fx.GraphModule) -> fx.GraphModule | None:
    """`module` with one call for each convolution, sum and ReLU that cuDNN has one kernel for; None if none.

    Args:
        module: operators of aten that write to nothing. Values are known by ``meta["val"]``.
    """
    twin = fx.GraphModule(module, copy.deepcopy(module.graph))
    found = False
    for relu in twin.graph.find_nodes(op="call_function", target=_ATEN.relu.default):
        conv, addend = _convolution(relu.args[0])
        if conv is None:
            continue
        x, weight, bias, *how, _, _, groups = conv.args
        kernel = _ATEN.cudnn_convolution_relu if addend is None else _ATEN.cudnn_convolution_add_relu
        added = () if addend is None else (addend, 1)
        relu.target, relu.args = kernel.default, (x, weight, *added, bias, *how, groups)
        found = True
    if not found:
        return None
    twin.graph.eliminate_dead_code()
    twin.recompile()
    return twin


def _convolution(value: Any) -> tuple[fx.Node | None, fx.Node | None]:
    """The convolution that gives `value`, or a summand of it and then also what it is added to."""
    if len(value.users) == 1 and value.target is _ATEN.add.Tensor and not value.kwargs:
        for conv, other in (value.args, value.args[::-1]):
            if _has_kernel(conv) and isinstance(other, fx.Node) and other is not conv:
                # cuDNN broadcasts neither of them.
                return (conv, other) if _kind(conv) == _kind(other) == _kind(value) else (None, None)
    return (value if _has_kernel(value) else None), None


def _has_kernel(value: Any) -> bool:
    """Whether it is a convolution of images that cuDNN has such a kernel for, and nobody else reads it."""
    if not isinstance(value, fx.Node) or value.target is not _ATEN.convolution.default:
        return False
    how: Any = value.args
    transposed, groups, kind = how[6], how[8], _kind(value)
    if transposed or groups != 1 or kind is None or len(value.users) != 1:
        return False
    # It expands no stride, padding or dilation that is given as one number.
    whole = all(len(each) == 2 for each in how[3:6])
    return whole and len(kind[0]) == 4 and 0 not in kind[0] and kind[1] in (torch.float32, torch.float16)


def _kind(node: fx.Node) -> tuple[torch.Size, torch.dtype] | None:
    value = node.meta.get("val")
    return None if value is None else (value.shape, value.dtype)
