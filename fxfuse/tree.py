"""What fxfuse asks of a module tree: who is called what, and who carries hooks."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import chain
from typing import Any

from torch import Tensor, nn

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its forward."""
    return any(getattr(module, hooks, None) for hooks in HOOKS)


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers; one that has several names comes under each of them."""
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def attribute(root: nn.Module, name: str) -> Any:
    """The module, parameter or buffer of that qualified name; `root` itself for the empty name."""
    value: Any = root
    for atom in name.split(".") if name else ():
        value = getattr(value, atom)
    return value
