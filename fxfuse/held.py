"""What an object holds, however deep, so that what a run has changed is seen.

Not seen are classes, objects of torch and of Python's library but for containers, functions, arrays and
generators of random numbers, and writes to tensors, for which there are modes of torch.
"""

from __future__ import annotations

import copyreg
import random
import sys
import zlib
from array import array
from collections import deque
from collections.abc import Callable
from functools import partial
from types import CellType, FunctionType, MethodType
from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.proxy import Proxy

# Two of these are the same if they are equal.
_PLAIN = (
    *(bool, int, float, complex, str, bytes, range, slice, type),
    *(torch.dtype, torch.device, torch.memory_format),
)
# Parts of Python whose objects have attributes of the user's own.
_OPEN = {"argparse", "collections", "types"}


def held(
    holder: Any, without: Callable[[Any, Any, Any], bool] | None = None, seen: dict[int, Any] | None = None
) -> list[Any]:
    """All that it holds, in an order of its own: modules, tensors, numbers, keys, sizes of containers.

    Args:
        holder: a module, a container, a function, or an object that has attributes.
        without: whether a key of a dict, or an attribute, is left out, given the dict, the key and its value.
        seen: what is known already by other holders, which is not looked into again. Others are added.
    """
    if type(holder) in _PLAIN or (type(holder) is tuple and all(type(each) in _PLAIN for each in holder)):
        return [holder]  # as most attributes are
    found: list[Any] = []
    seen = {} if seen is None else seen
    waiting: list[Any] = [holder]
    while waiting:
        value = waiting.pop()
        parts = [] if id(value) in seen else _parts(value, without)
        if parts:
            seen[id(value)] = value
        found += [value if isinstance(value, nn.Module) else type(value), len(parts)] if parts else [value]
        waiting += parts
    return found


def is_same(before: list[Any], after: list[Any]) -> bool:
    """Whether nothing was set, added or removed in between."""
    return len(before) == len(after) and all(
        one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and one == other)
        for one, other in zip(before, after, strict=True)
    )


def _parts(value: Any, without: Callable[[Any, Any, Any], bool] | None) -> list[Any]:
    """What is in it; nothing, if it is no container or one that is not known."""
    if issubclass(type(value), (Proxy, Tensor, *_PLAIN)):  # a proxy may say that it is a tensor
        return []
    if isinstance(value, FunctionType):
        cells = [cell.cell_contents for cell in value.__closure__ or () if cell != CellType()]
        return [*cells, value.__defaults__, value.__kwdefaults__, vars(value)]
    if isinstance(value, MethodType):
        return [value.__func__, value.__self__]
    parts = _written_in_c(value)
    if isinstance(value, dict):
        pairs = (pair for pair in dict.items(value) if without is None or not without(value, *pair))
        parts += [each for pair in pairs for each in pair]
    elif isinstance(value, (list, tuple, set, frozenset, deque)):
        parts += value
    elif isinstance(value, partial):
        parts += [value.func, value.args, value.keywords]
    if isinstance(value, nn.Module) or _is_open(type(value)):
        slots: list[str] = copyreg._slotnames(type(value))  # type: ignore[attr-defined]
        parts += [vars(value)] if hasattr(value, "__dict__") else []
        parts += [getattr(value, name) for name in slots if hasattr(value, name)]
    return parts


def changes_in_c(value: Any) -> bool:
    """Whether it is written in C and changes in place: an array, or a generator of random numbers."""
    numpy = sys.modules.get("numpy")  # which need not be installed
    theirs = (numpy.ndarray, numpy.random.Generator, numpy.random.RandomState) if numpy is not None else ()
    return isinstance(value, (bytearray, array, random.Random, *theirs))


def _written_in_c(value: Any) -> list[Any]:
    """What is in it, of what is written in C."""
    if not changes_in_c(value):
        return []
    if isinstance(value, (bytearray, array)):
        return [bytes(value)]
    if isinstance(value, random.Random):
        return [] if isinstance(value, random.SystemRandom) else [value.getstate()]
    if hasattr(value, "bit_generator"):
        return [value.bit_generator.state]
    if hasattr(value, "get_state"):
        return [value.get_state()]
    numbers = [value.tolist()] if value.dtype.hasobject else [zlib.crc32(value.copy("C").data.cast("B"))]
    return [*value.shape, str(value.dtype), *numbers]


def _is_open(kind: type) -> bool:
    """Whether it is neither torch's nor Python's, or one that attributes are given to."""
    home = str(kind.__module__).partition(".")[0]
    return home in _OPEN or not (home == "torch" or home in sys.stdlib_module_names)
