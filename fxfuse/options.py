"""The choices that a forward leaves to its caller; a trace follows one, and shows nothing of the others.

Code chooses branches by arguments that default to None, a bool, a string, a dtype or a device; and by any
argument that it compares with None.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable
from types import FunctionType
from typing import Any

import torch
from torch import fx, nn

from fxfuse.errors import CaptureError
from fxfuse.functions import compared_with_none
from fxfuse.objects import is_torch, own_classes

_MOST_VARIANTS = 16
_GIVEN = object()
_EMPTY = inspect.Parameter.empty
_NOT_CALLED = ("__init__", "extra_repr")


def defaults(model: nn.Module) -> dict[str, Any]:
    """The arguments of forward with defaults of the kinds by which code chooses branches."""
    fixed = (bool, str, type(None), torch.dtype, torch.device)
    return {
        parameter.name: parameter.default
        for parameter in _parameters(type(model).forward)
        if isinstance(parameter.default, fixed)
    }


def choices(model: nn.Module) -> list[str]:
    """The arguments of forward of which a graph could hold one choice only."""
    forward = type(model).forward
    asked = _asked(forward)
    required = [parameter.name for parameter in _parameters(forward) if parameter.default is _EMPTY][1:]
    # An argument may be compared further below. Of a single one nobody expects that it may be None.
    if len(required) > 1 and any(map(_asked, _functions_below(model))):
        asked = {*required}
    return [*defaults(model), *(name for name in required if name in asked)]


def variants(module: nn.Module) -> list[dict[str, Any]]:
    """Values for the options of forward that stand for every choice of them.

    Raises:
        CaptureError: there are options of which not all values can be tried, or too many of them.
    """
    if isinstance(module, fx.GraphModule):
        return [{}]
    name, forward = type(module).__name__, type(module).forward
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in _parameters(forward)):
        raise CaptureError(f"forward of {name} takes any number of arguments")
    for function in _functions_below(module):
        if _asked(function):
            raise CaptureError(f"{function.__qualname__} asks whether an argument is None")
    values: dict[str, tuple[Any, ...]] = dict.fromkeys(_asked(forward), (None, _GIVEN))
    for option, default in defaults(module).items():
        if default is not None and not isinstance(default, bool):
            raise CaptureError(f"forward of {name} takes an option {option}={default!r}")
        values[option] = (None, _GIVEN) if default is None else (False, True)
    combinations = [*itertools.product(*values.values())]
    if len(combinations) > _MOST_VARIANTS:
        raise CaptureError(f"forward of {name} takes {len(values)} options")
    return [
        {option: value for option, value in zip(values, chosen, strict=True) if value is not _GIVEN}
        for chosen in combinations
    ]


def _functions_below(model: nn.Module) -> set[FunctionType]:
    """The methods to which forward may hand its arguments on."""
    own = _methods(model) - {vars(type(model)).get("forward")}
    return own.union(*(_methods(each) for each in model.modules() if each is not model))


def _methods(module: nn.Module) -> set[Any]:
    kinds = [kind for kind in own_classes(module) if not is_torch(kind.__module__)]
    found = (value for kind in kinds for name, value in vars(kind).items() if name not in _NOT_CALLED)
    return {value for value in found if isinstance(value, FunctionType)}


def _asked(function: Callable[..., Any]) -> set[str]:
    """The arguments without default that `function` compares with None."""
    function = inspect.unwrap(function)
    if not inspect.isfunction(function):
        return set()
    required = {parameter.name for parameter in _parameters(function) if parameter.default is _EMPTY}
    return required & compared_with_none(function)


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    return [*inspect.signature(function).parameters.values()]
