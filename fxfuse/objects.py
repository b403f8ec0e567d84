"""What Python objects lead to: modules, and others, that can be reached past the module tree."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterator
from types import FunctionType, ModuleType
from typing import Any

from torch import nn

# The attributes of every module that hold its parts and its hooks.
STATE = {*vars(nn.Module())} - {"training"}


def own_classes(module: nn.Module) -> list[type]:
    """The classes from which it has what not every module has."""
    return [kind for kind in type(module).__mro__ if kind not in (nn.Module, object)]


def user_classes(module: nn.Module) -> list[type]:
    """Those of them that are not torch's."""
    return [kind for kind in own_classes(module) if not is_torch(kind.__module__)]


def is_torch(name: Any) -> bool:
    """Whether a module of that name is a part of torch."""
    return str(name).partition(".")[0] == "torch"


def own_attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module holds itself, beside what every module has."""
    return ((name, value) for name, value in vars(module).items() if name not in STATE)


def attributes(module: nn.Module) -> Iterator[tuple[str, Any]]:
    """What a module holds, itself and by its classes, less its submodules and the hooks of its state_dict."""
    for kind in user_classes(module):
        yield from vars(kind).items()
    for name, value in vars(module).items():
        if name != "_modules" and not (name in STATE and "state_dict" in name):
            yield name, value


def modules_in(value: Any) -> Iterator[nn.Module]:
    """The modules that objects lead to without passing through a module, a class or a global variable."""
    return (each for each in objects_in(value) if isinstance(each, nn.Module))


def objects_in(value: Any) -> Iterator[Any]:
    """All that objects lead to without passing through a module, a class or a global variable."""
    seen: dict[int, Any] = {}
    found = [value]
    while found:
        each = found.pop()
        if id(each) in seen or isinstance(each, (type, ModuleType)):
            continue
        seen[id(each)] = each
        yield each
        if isinstance(each, FunctionType):
            found += [each.__closure__, each.__defaults__, each.__kwdefaults__, each.__dict__]
        elif not isinstance(each, nn.Module):
            found += [each()] if isinstance(each, weakref.ref) else gc.get_referents(each)


def modules_outside(module: nn.Module) -> set[nn.Module]:
    """The modules that the attributes of `module`, or of one below it, lead to and that do not lie in it."""
    inside = {*module.modules()}
    held = (each for holder in inside for _, value in attributes(holder) for each in modules_in(value))
    return {below for each in held for below in each.modules()} - inside
