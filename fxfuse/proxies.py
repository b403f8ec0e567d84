"""Proxies that answer questions about types for the values that they stand for.

``isinstance(x, torch.Tensor)`` and ``hasattr(x, "tensors")`` choose branches. fx answers for the proxy, and
the trace silently follows a branch that the model would not take. Here both are answered for the value;
where its type is not known, asking is a TraceError.
"""

from __future__ import annotations

import ast
import dis
import operator
import sys
from collections.abc import Callable, Container
from functools import cache
from types import FrameType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy, TraceError

from fxfuse.calls import IN_PLACE
from fxfuse.functions import definition, steps_of
from fxfuse.tree import attribute, has_hooks

# Where fx and what it is built on ask for the class of a proxy, they mean the proxy.
_INTERNAL = ("torch.fx", "torch.overrides", "torch.utils._pytree", "fxfuse.")
_OWN_ATTRIBUTES = {"tracer", "node", "param", "name", "root", "attr", "_node"}
_LOADS = ("LOAD_GLOBAL", "LOAD_NAME", "LOAD_ATTR", "LOAD_METHOD", "LOAD_FAST", "LOAD_DEREF")
# Statements and functions to which a text is given that changes nothing.
_FOR_PEOPLE = {
    *("assert", "_assert", "print", "warn", "debug", "info", "warning", "error", "exception", "log"),
}


def _is_asking(frame: FrameType, function: str, arguments: int = 2) -> bool:
    """Whether `frame` is calling that function, by the code; if it cannot be told, it is."""
    if frame.f_globals.get("__name__") == "abc":
        return function == "isinstance"
    steps = steps_of(frame.f_code)
    call = next((step for step in steps if step.offset == frame.f_lasti), None)
    if call is None or not call.opname.startswith(("CALL", "PRECALL")):  # code that is hot calls earlier
        return False
    if _place(call) is None:
        return True
    loads = (step for step in steps if step.opname in _LOADS and _place(step) == _place(call))
    return call.arg == arguments and any(step.argval == function for step in loads)


def _place(step: dis.Instruction) -> tuple[int, int | None] | None:
    """Line and column at which the expression begins that an instruction belongs to."""
    place = step.positions
    return None if place is None or place.lineno is None else (place.lineno, place.col_offset)


def _is_internal(frame: FrameType) -> bool:
    return str(frame.f_globals.get("__name__", "")).startswith(_INTERNAL)


def _is_for_people(frame: FrameType) -> bool:
    """Whether the text that `frame` makes is one for people: that of an assertion, an error or a log."""
    line, _, column, _ = [*frame.f_code.co_positions()][frame.f_lasti // 2]
    found = definition(frame.f_code)
    for node in ast.walk(found) if found is not None else ():
        if isinstance(node, (ast.Assert, ast.Raise, ast.Call)):
            call = ast.unparse(node.func).rpartition(".")[2] if isinstance(node, ast.Call) else "assert"
            start, end = (node.lineno, node.col_offset), (node.end_lineno or 0, node.end_col_offset or 0)
            if call in _FOR_PEOPLE and start <= (line or 0, column or 0) < end:
                return True
    return False


class TypedProxy(Proxy):
    """A proxy that is taken, by the code of the model, for what it stands for; None if that is not known."""

    stands_for: type | None = None

    @property
    def __class__(self) -> type:
        asker: FrameType | None = sys._getframe(1)
        while asker is not None and asker.f_globals.get("__name__") == "torch.nn.parameter":
            asker = asker.f_back  # isinstance(x, nn.Parameter) asks by way of a metaclass
        if asker is None or _is_internal(asker):
            return type(self)
        if not _is_asking(asker, "isinstance"):
            return type(self)  # C code asks, which would go on to take the proxy for a tensor's memory
        if self.stands_for is not None:
            return self.stands_for
        raise TraceError(f"the type of {self.node.name} is asked for and is known only at run time")

    @__class__.setter
    def __class__(self, _: type) -> None:
        raise TypeError("a proxy keeps its class")

    def __getattr__(self, k: str) -> Any:
        asker = sys._getframe(1)
        asks = _is_asking(asker, "hasattr") or _is_asking(asker, "getattr", arguments=3)
        direct = _is_internal(asker) or not asks
        known = self.stands_for is not None or direct
        if known and hasattr(self.stands_for or Tensor, k):
            return TypedAttribute(self, k)
        if self.stands_for is not None:
            raise AttributeError(f"a tensor has no attribute {k!r}")
        raise TraceError(f"whether {self.node.name} has an attribute {k!r} is known only at run time")

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Raises a TraceError: what is called is not known."""
        raise TraceError(f"{self.node.name} is called, and is known only at run time")

    def __hash__(self) -> int:
        if _is_internal(sys._getframe(1)):
            return object.__hash__(self)
        raise TraceError(f"{self.node.name} is looked up in a dict or set, and is known only at run time")

    def __str__(self) -> str:
        return self._text(sys._getframe(1))

    def __format__(self, _: str) -> str:
        return self._text(sys._getframe(1))

    def _text(self, asker: FrameType) -> str:
        inside = asker.f_globals.get("__name__", "").startswith(("torch", "fxfuse."))
        names_a_cache = type(self) is TypedAttribute and self.attr == "device"  # of constants, mostly
        if inside or names_a_cache or _is_for_people(asker):
            return repr(self)
        raise TraceError(f"{self.node.name} is made a text, and is known only at run time")

    def __setattr__(self, name: str, value: Any) -> None:
        if name not in _OWN_ATTRIBUTES:
            raise TraceError(f"forward sets {name} of a tensor, which a graph does not record")
        super().__setattr__(name, value)


class TypedAttribute(fx.proxy.Attribute, TypedProxy):
    """An attribute of a value, or a method that is about to be called."""


def _in_place(name: str) -> Callable[[TypedProxy, Any], Proxy]:
    """``x += y`` writes to x, and whoever else holds x sees it; fx would trace it as ``x = x + y``."""
    target = getattr(operator, name)

    def write(self: TypedProxy, other: Any) -> Proxy:
        return self.tracer.create_proxy("call_function", target, (self, other), {})

    return write


for _name in IN_PLACE:
    setattr(TypedProxy, f"__i{_name}__", _in_place(f"i{_name}"))


class ParameterProxy(TypedProxy, fx.proxy.ParameterProxy):
    """A parameter; its shape is known."""

    stands_for = nn.Parameter


class TensorProxy(TypedProxy):
    """A tensor."""

    stands_for = Tensor


_SEVERAL = (nn.RNNBase, nn.RNNCellBase, nn.MultiheadAttention, nn.AdaptiveLogSoftmaxWithLoss)


def gives_tensor(node: fx.Node, root: nn.Module, tensors: Container[fx.Node]) -> bool:
    """Whether the value of `node`, in a graph over `root`, is certain to be a single tensor.

    `tensors` are the earlier nodes of which that is known.
    """
    if node.op == "call_module":
        module = attribute(root, str(node.target))
        layer = type(module).__module__.startswith("torch.nn.modules") and not has_hooks(module)
        return layer and not isinstance(module, _SEVERAL) and not getattr(module, "return_indices", False)
    if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
        inputs = node.all_input_nodes
        return node.target is not operator.getitem and any(each in tensors for each in inputs)
    if node.op == "call_function":
        return _returns_tensor(getattr(node.target, "__name__", ""))
    return node.op == "call_method" and _returns_tensor(str(node.target))


@cache
def _returns_tensor(name: str) -> bool:
    """Whether the operator of that name gives one tensor, whatever its arguments."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return bool(overloads) and all(
        [str(r.type) for r in each._schema.returns] == ["Tensor"] for each in overloads
    )
