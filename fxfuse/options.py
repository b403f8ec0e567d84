"""The choices that a forward leaves to its caller; a trace follows one, and shows nothing of the others.

Code chooses branches by arguments that default to None, a bool, a string, a dtype or a device; and by any
argument that it compares with None.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Iterable
from types import CodeType
from typing import Any

import torch
from torch import fx, nn

from fxfuse.errors import CaptureError
from fxfuse.functions import compared_by_identity, compared_with_values
from fxfuse.objects import is_torch

_MOST_VARIANTS = 16
_GIVEN = object()
_OPTIONS = (bool, str, type(None), torch.dtype, torch.device)


def defaults(model: nn.Module) -> dict[str, Any]:
    """The arguments of forward with defaults of the kinds by which code chooses branches."""
    parameters = _parameters(type(model).forward)
    return {each.name: each.default for each in parameters if isinstance(each.default, _OPTIONS)}


def choices(model: nn.Module) -> list[str]:
    """The arguments of forward of which a graph could hold one choice only."""
    return [*dict.fromkeys([*defaults(model), *_asked(type(model).forward)])]


def variants(module: nn.Module, asked: Iterable[str]) -> list[dict[str, Any]]:
    """Values for the options of forward that stand for every choice of them.

    Args:
        module: the module.
        asked: more arguments that may be None.

    Raises:
        CaptureError: there are options of which not all values can be tried, or too many of them.
    """
    if isinstance(module, fx.GraphModule):
        return [{}]
    name, forward = type(module).__name__, type(module).forward
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in _parameters(forward)):
        raise CaptureError(
            f"forward of {name} takes any number of arguments, so its calls cannot all be traced"
        )
    values: dict[str, tuple[Any, ...]] = dict.fromkeys([*_asked(forward), *asked], (None, _GIVEN))
    for option, default in defaults(module).items():
        if default is not None and not isinstance(default, bool):
            raise CaptureError(
                f"forward of {name} takes an option {option}={default!r}, of which not every choice can be "
                "traced, as it can of None, True and False"
            )
        values[option] = (None, _GIVEN) if default is None else (False, True)
        if option in _compared(forward, with_none=default is not None):
            values[option] = (None, False, True, _GIVEN)
    combinations = [*itertools.product(*values.values())]
    if len(combinations) > _MOST_VARIANTS:
        raise CaptureError(
            f"forward of {name} takes {len(values)} options ({', '.join(values)}), which makes "
            f"{len(combinations)} choices; up to {_MOST_VARIANTS} are traced"
        )
    return [
        {option: value for option, value in zip(values, chosen, strict=True) if value is not _GIVEN}
        for chosen in combinations
    ]


def _asked(forward: Callable[..., Any]) -> list[str]:
    """The arguments, less those with None or a bool for a default, that the code compares with None."""
    others = (each for each in _parameters(forward) if not isinstance(each.default, _OPTIONS))
    code = _code(forward)
    compared = frozenset[str]() if code is None else compared_by_identity(code)
    return [each.name for each in others if each.name in compared]


def _compared(forward: Callable[..., Any], *, with_none: bool) -> frozenset[str]:
    """The variables that the code compares with values, `with_none` or without."""
    code = _code(forward)
    if code is None:
        return frozenset()
    return compared_with_values(code) | (compared_by_identity(code) if with_none else frozenset())


def _code(forward: Callable[..., Any]) -> CodeType | None:
    found: CodeType | None = getattr(inspect.unwrap(forward), "__code__", None)
    return found


def _parameters(forward: Callable[..., Any]) -> list[inspect.Parameter]:
    """Those that can be given: decorators by torch hand all arguments on, others may keep some."""
    while hasattr(forward, "__wrapped__") and is_torch(getattr(forward, "__globals__", {}).get("__name__")):
        forward = forward.__wrapped__
    try:
        return [*inspect.signature(forward, follow_wrapped=False).parameters.values()][1:]
    except (TypeError, ValueError) as error:
        raise CaptureError(f"the arguments of {forward} are not known: {error}") from error
