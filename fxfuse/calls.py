"""How a node's call is written: its function's name, its arguments by name, what it writes to."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

_IN_PLACE_OPERATORS = {"setitem", "iadd", "isub", "imul", "itruediv", "ifloordiv", "imod", "ipow", "imatmul"}


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in, from the schema or signature of its target."""
    bound = _signature(node.target).bind(*node.args, **node.kwargs)
    bound.apply_defaults()
    return bound.arguments


def given_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments that the call gives, by name."""
    return _signature(node.target).bind(*node.args, **node.kwargs).arguments


@cache
def _signature(target: Callable[..., Any] | str) -> inspect.Signature:
    if inspect.isfunction(target):
        return inspect.signature(target)
    schema = target._schema if isinstance(target, torch._ops.OpOverload) else _schema(torch_name(target))
    parameter = inspect.Parameter
    return inspect.Signature(
        [
            parameter(
                argument.name,
                parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value if argument.has_default_value() else parameter.empty,
            )
            for argument in schema.arguments
        ]
    )


def _schema(name: str | None) -> torch.FunctionSchema:
    packet = getattr(torch.ops.aten, str(name))
    overload: torch._ops.OpOverload = getattr(packet, packet.overloads()[0])
    return overload._schema


@cache
def torch_name(target: Any) -> str | None:
    """The name under which ``torch``, ``F`` or ``torch.ops.aten`` has this very function."""
    if isinstance(target, torch._ops.OpOverload):
        return target.overloadpacket.__name__ if target.namespace == "aten" else None
    name: str = getattr(target, "__name__", "")
    return name if name and any(getattr(space, name, None) is target for space in (torch, F)) else None


def layer_input(node: fx.Node) -> fx.Node:
    """The input of a torch.nn layer, by position or by the one name that they all give it."""
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, fx.Node)
    return source


def attribute_name(value: Any) -> str | None:
    """The qualified name of the parameter or buffer that an argument is; None for any other argument."""
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def written_attributes(node: fx.Node) -> list[str]:
    """Names of the parameters and buffers that `node` writes to: in place, through a view, or as ``out=``."""
    name = node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
    in_place = isinstance(name, str) and (
        (name.endswith("_") and not name.endswith("__"))
        or name in _IN_PLACE_OPERATORS
        or node.kwargs.get("inplace") is True
    )
    written = [node.args[0]] if in_place and node.args else []
    written += [
        node.kwargs[key]
        for key in ("out", "input", "self")
        if key in node.kwargs and (in_place or key == "out")
    ]
    return [source for value in written if (source := _viewed_attribute(value)) is not None]


def _viewed_attribute(value: Any) -> str | None:
    """The attribute at the beginning of a chain of calls on their first arguments, as views are."""
    while isinstance(value, fx.Node) and value.op in ("call_method", "call_function") and value.args:
        value = value.args[0]
    return attribute_name(value)
