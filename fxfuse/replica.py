"""A copy of a module tree that shares the memory of every tensor, and nothing else.

Tracing runs the model's own Python, which may set attributes; the folded model may later be moved
to another dtype or device. Neither may reach the source, and copying gigabytes of weights to be safe
would be waste. A replica has its own modules, its own ``Parameter`` objects and its own containers,
over the same storage.
"""

from __future__ import annotations

import copy
from collections import OrderedDict, defaultdict, deque
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

_M = TypeVar("_M", bound=nn.Module)
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set, deque})


def replicate(model: _M) -> _M:
    """Copies the module tree of `model`; parameters and buffers are new objects over the same storage.

    Modules and tensors that appear under several names in `model` do so in the copy. Hooks are kept.
    TorchScript modules cannot be copied without their tensors, so these are copied too.
    """
    return cast(_M, _module(model, {}))


def isolated(model: _M) -> _M:
    """A replica that may be run: what it writes to its buffers stays in it. Parameters are shared."""
    twin = replicate(model)
    for module in twin.modules():
        for name, buffer in module._buffers.items():
            module._buffers[name] = None if buffer is None else buffer.clone()
    return twin


def _module(source: Any, memo: dict[int, Any]) -> Any:
    if source is None:
        return None
    if id(source) in memo:
        return memo[id(source)]
    if isinstance(source, torch.jit.ScriptModule):
        memo[id(source)] = copy.deepcopy(source)
        return memo[id(source)]
    twin = nn.Module.__new__(type(source))  # not type(source).__new__: a GraphModule's makes a new class
    memo[id(source)] = twin
    for name, value in source.__dict__.items():
        if isinstance(value, MethodType) and value.__self__ is source:
            value = MethodType(value.__func__, twin)  # noqa: PLW2901
        twin.__dict__[name] = _container(value)
    for tensors in (twin._parameters, twin._buffers):
        for name, tensor in tensors.items():
            tensors[name] = _tensor(tensor, memo)
    for name, child in twin._modules.items():
        twin._modules[name] = _module(child, memo)
    return twin


def _container(value: Any) -> Any:
    """A model that appends to a list in its forward must append to its own list, however deep it lies."""
    if type(value) not in _CONTAINERS:
        return value
    twin = value.copy()
    if isinstance(twin, (list, deque)):
        for place, item in enumerate(twin):
            twin[place] = _container(item)
    elif isinstance(twin, dict):
        for key, item in twin.items():
            twin[key] = _container(item)
    return twin


def _tensor(source: Any, memo: dict[int, Any]) -> Any:
    if source is None:
        return None
    if id(source) not in memo:
        memo[id(source)] = alias(source, source.detach())
    return memo[id(source)]


def alias(source: Tensor, data: Tensor) -> Tensor:
    """`data` as the same kind of tensor as `source`: a Parameter with its `requires_grad`, or a buffer."""
    if not isinstance(source, nn.Parameter):
        return data
    with torch.inference_mode(source.is_inference()):
        twin = nn.Parameter(data, requires_grad=source.requires_grad)
    twin.__dict__.update(source.__dict__)
    return twin
