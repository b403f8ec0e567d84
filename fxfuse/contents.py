"""What the modules of a tree hold, before and after forward has run in a trace."""

from __future__ import annotations

import functools
import inspect
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.proxy import Proxy

from fxfuse.held import held, is_same
from fxfuse.objects import own_attributes


class Contents:
    """What the modules of a tree hold, for telling whether forward has changed it; see `fxfuse.held`.

    A constant in a place that was empty, or held None, is a cache, and no change.

    Args:
        root: the tree.
        before: what it held before, if it did.
    """

    def __init__(self, root: nn.Module, before: Contents | None = None) -> None:
        self._before = before
        self._places: set[tuple[int, Any]] = set()
        self._seen: dict[int, Any] = {id(module): module for module in root.modules()}
        self._held = {
            path: self._of(path, module)
            for path, module in root.named_modules()
            if not isinstance(module, torch.jit.ScriptModule)  # which keeps its methods when they are called
        }

    def changed(self) -> dict[str, str]:
        """The modules that held something else before, each with an attribute."""
        earlier = {} if self._before is None else self._before._held
        found = {}
        for path in earlier.keys() & self._held.keys():
            one, other = earlier[path], self._held[path]
            names = [name for name in one | other if not is_same(one.get(name, []), other.get(name, []))]
            if names:
                found[path] = names[0]
        return found

    def _of(self, path: str, module: nn.Module) -> dict[str, list[Any]]:
        earlier = None if self._before is None else self._before._held.get(path, {})
        own = chain(own_attributes(module), module._parameters.items(), module._buffers.items())
        found = {name: [id(child)] for name, child in module._modules.items()}
        for name, value in own:
            is_empty = value is None or name.startswith("_tensor_constant")  # which torch.fx gives the root
            if not is_empty and (
                earlier is None or name in earlier or not _is_kept_constant(module, name, value)
            ):
                found[name] = held(value, self._is_left_out, self._seen)
        return found

    def _is_left_out(self, holder: Any, name: Any, value: Any) -> bool:
        """Whether a place in a dict is empty, or was so before and has a constant now."""
        if value is None:
            return True
        place = (id(holder), name)
        self._places.add(place)
        is_new = self._before is not None and place not in self._before._places
        return is_new and _is_kept_constant(holder, name, value)


def _is_kept_constant(holder: Any, name: Any, value: Any) -> bool:
    """Whether what is in a place that was empty changes nothing: a constant, or the value of a property."""
    property_ = inspect.getattr_static(type(holder), name, None) if isinstance(name, str) else None
    if isinstance(property_, functools.cached_property):
        return not any(issubclass(type(part), Proxy) and not is_constant(part) for part in held(value))
    return issubclass(type(value), Tensor) or is_constant(value)


def is_constant(value: Any) -> bool:
    """Whether `value` is computed from parameters alone: then keeping it is a cache, and changes nothing."""
    if not issubclass(type(value), Proxy):
        return False
    seen, waiting = set(), [value.node]
    while waiting:
        node = waiting.pop()
        if node.op == "placeholder":
            return False
        waiting += [each for each in node.all_input_nodes if each not in seen]
        seen |= {*node.all_input_nodes}
    return True
