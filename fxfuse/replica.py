"""A copy of a module tree that shares the memory of every tensor, and nothing else.

Tracing runs the model's own Python, which may set attributes; the folded model may later be moved
to another dtype or device. Neither may reach the source, and copying gigabytes of weights to be safe
would be waste. A replica has its own modules, its own ``Parameter`` objects and its own containers,
over the same storage.
"""

from __future__ import annotations

import copy
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Mapping
from functools import partial
from types import MethodType
from typing import Any, TypeVar, cast

import torch
from torch import Tensor, nn

from fxfuse.held import changes_in_c

_M = TypeVar("_M", bound=nn.Module)
_PLAIN = frozenset({bool, int, float, str, type(None)})
_CONTAINERS = frozenset({dict, OrderedDict, defaultdict, Counter, list, set, deque})


def replicate(model: _M) -> _M:
    """Copies the module tree of `model`; parameters and buffers are new objects over the same storage.

    Modules and tensors that appear under several names in `model` do so in the copy. Hooks are kept.
    TorchScript modules cannot be copied without their tensors, so these are copied too.
    """
    return cast(_M, _Replica(_aliased).module(model))


def replicated(tensors: Mapping[str, Any]) -> dict[str, Any]:
    """The same for tensors by their names; what is no tensor stays."""
    replica = _Replica(_aliased)
    return {
        name: replica.own(value) if isinstance(value, Tensor) else value for name, value in tensors.items()
    }


def isolated(model: _M) -> _M:
    """A replica that may be run, without gradients: what it writes to its tensors stays in it."""
    return cast(_M, _Replica(_cloned).module(model))


class _Replica:
    """Makes what a copy has in place of modules, containers and tensors, once of each.

    Attributes:
        tensor: makes it of a tensor.
    """

    def __init__(self, tensor: Callable[[Tensor], Tensor]) -> None:
        self.tensor = tensor
        self._made: dict[int, Any] = {}

    def module(self, source: Any) -> Any:
        """A module."""
        if id(source) in self._made:
            return self._made[id(source)]
        if isinstance(source, torch.jit.ScriptModule):
            self._made[id(source)] = copy.deepcopy(source)
            return self._made[id(source)]
        twin = nn.Module.__new__(type(source))  # not type(source).__new__: a GraphModule's makes a new class
        self._made[id(source)] = twin
        for name, value in source.__dict__.items():
            twin.__dict__[name] = self.own(value)
        twin.__dict__.pop("_compiled_call_impl", None)  # Module.compile() binds it to the source
        return twin

    def own(self, value: Any) -> Any:
        """What is in place of an attribute: containers, modules, bound methods and tensors of the copy's own.

        A model that appends to a list in its forward must append to its own list, however deep it lies.
        """
        kind = type(value)
        if kind in _PLAIN or (kind is tuple and all(type(item) in _PLAIN for item in value)):
            return value
        if id(value) in self._made:
            return self._made[id(value)]
        if isinstance(value, Tensor):
            self._made[id(value)] = self.tensor(value)
            return self._made[id(value)]
        if kind in _CONTAINERS:
            return self._container(value)
        if changes_in_c(value):
            return self._written_in_c(value)
        return self.module(value) if isinstance(value, nn.Module) else self._holder(value)

    def _holder(self, value: Any) -> Any:
        """What holds others, and is never written to."""
        kind = type(value)
        if isinstance(value, MethodType) and isinstance(value.__self__, nn.Module):
            return MethodType(value.__func__, self.module(value.__self__))
        if kind is partial:
            return partial(self.own(value.func), *self.own(value.args), **self.own(value.keywords))
        if isinstance(value, (tuple, frozenset)):
            return _same_or_new(value, [self.own(item) for item in value])
        if kind is weakref.ref and id(value()) in self._made:  # as the layers of torch.nn.RNN have of weights
            return weakref.ref(self._made[id(value())])
        return value

    def _written_in_c(self, value: Any) -> Any:
        """An array or a generator of random numbers."""
        holds_objects = getattr(getattr(value, "dtype", None), "hasobject", False)
        self._made[id(value)] = twin = value.copy() if holds_objects else copy.deepcopy(value)
        for place, item in enumerate(value.flat if holds_objects else ()):
            twin.flat[place] = self.own(item)
        return twin

    def _container(self, value: Any) -> Any:
        self._made[id(value)] = twin = value.copy()
        if not value:
            return twin
        twin.clear()
        if isinstance(twin, dict):
            twin.update({self.own(key): self.own(item) for key, item in value.items()})
        else:
            items = [self.own(item) for item in value]
            twin.update(items) if isinstance(twin, set) else twin.extend(items)
        return twin


def _same_or_new(value: Any, items: list[Any]) -> Any:
    """`value` with other items; itself if they are the same, or if nobody knows how it is made."""
    if all(item is own for item, own in zip(value, items, strict=True)):
        return value
    if type(value) in (tuple, frozenset):
        return type(value)(items)
    return type(value)._make(items) if hasattr(type(value), "_make") else value


def _aliased(tensor: Tensor) -> Tensor:
    return alias(tensor, tensor.detach()) if is_plain(tensor) else tensor


def _cloned(tensor: Tensor) -> Tensor:
    if not is_plain(tensor):
        return tensor
    copied = tensor.detach().clone()
    twin = nn.Parameter(copied, requires_grad=False) if isinstance(tensor, nn.Parameter) else copied
    twin.__dict__.update(tensor.__dict__)
    return twin


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
        data.__dict__.update(source.__dict__)
        return data
    with torch.inference_mode(source.is_inference()):
        twin = nn.Parameter(data, requires_grad=source.requires_grad)
    twin.__dict__.update(source.__dict__)
    return twin
