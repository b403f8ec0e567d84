"""A copy of a module tree that shares the memory of every tensor, and nothing else.

Tracing runs the model's own Python, which may set attributes; the folded model may later be moved
to another dtype or device. Neither may reach the source, and copying gigabytes of weights to be safe
would be waste. A replica has its own modules, its own ``Parameter`` objects and its own containers,
over the same storage.
"""

from __future__ import annotations

import copy
import weakref
from collections import OrderedDict, defaultdict, deque
from collections.abc import Mapping
from functools import partial
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

_M = TypeVar("_M", bound=nn.Module)
_PLAIN = frozenset({bool, int, float, str, type(None)})
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, list, set, deque})


def replicate(model: _M) -> _M:
    """Copies the module tree of `model`; parameters and buffers are new objects over the same storage.

    Modules and tensors that appear under several names in `model` do so in the copy. Hooks are kept.
    TorchScript modules cannot be copied without their tensors, so these are copied too.
    """
    return cast(_M, _module(model, {}))


def replicated(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same for tensors by their names; what is no tensor stays."""
    memo: dict[int, Any] = {}
    return {
        name: _tensor(value, memo) if isinstance(value, Tensor) else value for name, value in tensors.items()
    }


def isolated(model: _M) -> _M:
    """A replica that may be run, without gradients: what it writes to its tensors stays in it."""
    twin = replicate(model)
    clones: dict[int, Tensor] = {}
    for module in twin.modules():
        for home in (module._parameters, module._buffers, module.__dict__):
            for name, tensor in home.items():
                if isinstance(tensor, Tensor) and is_plain(tensor):
                    copied = tensor.detach().clone()
                    is_parameter = isinstance(tensor, nn.Parameter)
                    clones.setdefault(
                        id(tensor), nn.Parameter(copied, requires_grad=False) if is_parameter else copied
                    )
                    cast(dict[str, Tensor], home)[name] = clones[id(tensor)]
    return twin


def _module(source: Any, memo: dict[int, Any]) -> Any:
    if id(source) in memo:
        return memo[id(source)]
    if isinstance(source, torch.jit.ScriptModule):
        memo[id(source)] = copy.deepcopy(source)
        return memo[id(source)]
    twin = nn.Module.__new__(type(source))  # not type(source).__new__: a GraphModule's makes a new class
    memo[id(source)] = twin
    for tensor in (*source._parameters.values(), *source._buffers.values()):
        _tensor(tensor, memo)
    for name, value in source.__dict__.items():
        twin.__dict__[name] = _own(value, memo)
    twin.__dict__.pop("_compiled_call_impl", None)  # Module.compile() binds it to the source
    return twin


def _own(value: Any, memo: dict[int, Any]) -> Any:
    """What the replica has in place of an attribute: containers, modules and bound methods of its own.

    A model that appends to a list in its forward must append to its own list, however deep it lies.
    """
    kind = type(value)
    if kind in _PLAIN or (kind is tuple and all(type(item) in _PLAIN for item in value)):
        return value
    if kind in _CONTAINERS:
        return memo[id(value)] if id(value) in memo else _container(value, memo)
    if isinstance(value, nn.Module):
        return _module(value, memo)
    if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
        return MethodType(value.__func__, _module(value.__self__, memo))
    if kind is partial:
        return partial(_own(value.func, memo), *_own(value.args, memo), **_own(value.keywords, memo))
    if isinstance(value, (tuple, frozenset)):
        return _same_or_new(value, [_own(item, memo) for item in value])
    if (
        type(value) is weakref.ref and id(value()) in memo
    ):  # as the layers of torch.nn.RNN have of their weights
        return weakref.ref(memo[id(value())])
    return memo.get(id(value), value) if isinstance(value, Tensor) else value


def _container(value: Any, memo: dict[int, Any]) -> Any:
    memo[id(value)] = twin = value.copy()
    if not value:
        return twin
    twin.clear()
    if isinstance(twin, dict):
        twin.update({_own(key, memo): _own(item, memo) for key, item in value.items()})
    else:
        items = [_own(item, memo) for item in value]
        twin.update(items) if isinstance(twin, set) else twin.extend(items)
    return twin


def _same_or_new(value: Any, items: list[Any]) -> Any:
    """`value` with other items; itself if they are the same, or if nobody knows how it is made."""
    if all(item is own for item, own in zip(value, items, strict=True)):
        return value
    if type(value) in (tuple, frozenset):
        return type(value)(items)
    return type(value)._make(items) if hasattr(type(value), "_make") else value


def _tensor(source: Any, memo: dict[int, Any]) -> Any:
    if source is None:
        return None
    if id(source) not in memo:
        memo[id(source)] = alias(source, source.detach())
    return memo[id(source)]


def is_plain(tensor: Tensor) -> bool:
    """Whether operators treat `tensor` as a tensor: no subclass that intercepts them."""
    kind = type(tensor)
    intercepts = (
        kind.__torch_function__ is not nn.Parameter.__torch_function__ or "__torch_dispatch__" in vars(kind)
    )
    return kind in (Tensor, nn.Parameter) or (isinstance(tensor, nn.Parameter) and not intercepts)


def alias(source: Tensor, data: Tensor) -> Tensor:
    """`data` as the same kind of tensor as `source`: a Parameter with its `requires_grad`, or a buffer."""
    if not is_plain(source):
        return source  # it may hold more than data
    if not isinstance(source, nn.Parameter):
        return data
    with torch.inference_mode(source.is_inference()):
        twin = nn.Parameter(data, requires_grad=source.requires_grad)
    twin.__dict__.update(source.__dict__)
    return twin
