"""What a module holds in its attributes, however deep, so that what a run has changed is seen."""

from __future__ import annotations

import sys
from collections import deque
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

# Two of these are the same if they are equal.
_PLAIN = (
    bool,
    int,
    float,
    complex,
    str,
    bytes,
    frozenset,
    type,
    torch.dtype,
    torch.device,
    torch.memory_format,
)


def held(module: nn.Module) -> list[Any]:
    """All that it holds, in an order of its own: tensors, numbers, keys, and what cannot be looked into."""
    found: list[Any] = []
    _collect(module, found, set())
    return found


def is_same(before: list[Any], after: list[Any]) -> bool:
    """Whether nothing was set, added or removed in between; writes to tensors are not seen."""
    return len(before) == len(after) and all(
        one is other or (type(one) is type(other) and isinstance(one, _PLAIN) and one == other)
        for one, other in zip(before, after, strict=True)
    )


def _collect(value: Any, found: list[Any], seen: set[int]) -> None:
    parts = _parts(value)
    if parts is None:
        found.append(value)
    elif id(value) not in seen:
        seen.add(id(value))
        found.append(type(value))
        for part in parts:
            _collect(part, found, seen)


def _parts(value: Any) -> Iterable[Any] | None:
    """What is in it; None: it is no container, or one that is not known."""
    if isinstance(value, (Tensor, *_PLAIN)):
        return None
    if isinstance(value, (set, frozenset)):
        return [frozenset(value)]
    parts: list[Any] = []
    if isinstance(value, Mapping):
        parts += [*value.keys(), *value.values()]
    elif isinstance(value, (list, tuple, deque)):
        parts += value
    elif not (isinstance(value, nn.Module) or _is_own(value)):
        return None
    return [*parts, *getattr(value, "__dict__", {}).values()]


def _is_own(value: Any) -> bool:
    """Whether it is an object of a class that belongs neither to torch nor to Python."""
    home = (getattr(type(value), "__module__", None) or "builtins").partition(".")[0]
    return hasattr(value, "__dict__") and home != "torch" and home not in sys.stdlib_module_names
