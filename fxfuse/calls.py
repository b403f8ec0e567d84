"""How a node's call is written: its function's name, its arguments by name, what it writes to."""

from __future__ import annotations

import inspect
import keyword
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx

# The operators that have an in-place form, ``x += y``.
IN_PLACE = [
    "add",
    "sub",
    "mul",
    "truediv",
    "floordiv",
    "mod",
    "pow",
    "matmul",
    "and",
    "or",
    "xor",
    "lshift",
    "rshift",
]
_IN_PLACE_OPERATORS = {"setitem", "__setitem__"}.union(*({f"i{name}", f"__i{name}__"} for name in IN_PLACE))
_SPACES: tuple[Any, ...] = (torch, F, torch._C._nn)
# numpy's names of arguments, which torch takes as well.
_NUMPY = {"axis": "dim", "keepdims": "keepdim"}
# Methods that take their numbers one by one or as a tuple.
_PACKED = {"view", "reshape", "permute"}
# Modules whose functions write to their arguments only if their name says so.
_HARMLESS = ("torch", "_operator", "math", "builtins", "None")


def arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments of a call by name, defaults filled in, from the schema or signature of its target."""
    bound = _bound(node)
    bound.apply_defaults()
    return bound.arguments


def given_arguments(node: fx.Node) -> dict[str, Any]:
    """The arguments that the call gives, by name."""
    return _bound(node).arguments


def set_argument(node: fx.Node, name: str, value: fx.Node) -> None:
    """Gives a call another argument of that name; the others stay as they are."""
    call = _bound(node)
    call.arguments[name] = value
    node.args, node.kwargs = call.args, call.kwargs


def _bound(node: fx.Node) -> inspect.BoundArguments:
    """Raises a TypeError if the call fits none of the signatures that are known for its target."""
    args = node.args
    if node.target in _PACKED and (len(args) > 2 or (len(args) == 2 and type(args[1]) is int)):
        args = (args[0], args[1:])  # x.view(2, 3) is x.view((2, 3))
    kwargs = {_NUMPY.get(name, name): value for name, value in node.kwargs.items()}
    for signature in _signatures(node.target):
        try:
            return signature.bind(*args, **kwargs)
        except TypeError:
            continue
    raise TypeError(f"{node.format_node()} fits no known signature")


@cache
def _signatures(target: Callable[..., Any] | str) -> list[inspect.Signature]:
    if isinstance(target, torch._ops.OpOverload):
        return [_from_schema(target._schema)]
    if inspect.isfunction(target):
        # torch.nn.functional chooses between two functions of this name by an argument, return_indices.
        plain = getattr(F, f"_{target.__name__}", target) if torch_name(target) else target
        return [inspect.signature(plain if "kwargs" in inspect.signature(target).parameters else target)]
    name = target if isinstance(target, str) else torch_name(target) or ""
    return [_from_schema(schema) for schema in _schemas(name)]


def _from_schema(schema: torch.FunctionSchema) -> inspect.Signature:
    parameter = inspect.Parameter
    return inspect.Signature(
        [
            parameter(
                f"{argument.name}_" if keyword.iskeyword(argument.name) else argument.name,
                parameter.KEYWORD_ONLY if argument.kwarg_only else parameter.POSITIONAL_OR_KEYWORD,
                default=argument.default_value if argument.has_default_value() else parameter.empty,
            )
            for argument in schema.arguments
        ]
    )


def operator_name(node: fx.Node) -> str:
    """What a node computes, whatever its dialect: "add" for ``x + y``, ``x += y``, torch.add, x.add_(y)."""
    target: Any = node.target
    if target is getattr and node.args[1] == "mT":
        return "mT"
    if node.op == "call_function" and getattr(target, "__module__", "") == "_operator":
        name = str(target.__name__)
        return name[1:] if name[1:] in IN_PLACE else name
    return called_name(node).removesuffix("_")


def called_name(node: fx.Node) -> str:
    """The name of the method, or of the function of torch's own, that a node calls; empty for any other."""
    if node.op not in ("call_function", "call_method"):
        return ""
    return str(node.target) if node.op == "call_method" else torch_name(node.target) or ""


@cache
def torch_name(target: Any) -> str | None:
    """The name under which ``torch``, ``F``, or what lies below them, has this very function."""
    if isinstance(target, torch._ops.OpOverload):
        return torch_name(target.overloadpacket)
    if isinstance(target, torch._ops.OpOverloadPacket):
        namespace, _, name = target._qualified_op_name.partition("::")
        return name if namespace == "aten" else None
    name = getattr(target, "__name__", "")
    return name if name and any(getattr(space, name, None) is target for space in _SPACES) else None


def layer_input(node: fx.Node) -> fx.Node:
    """The input of a torch.nn layer, by position or by the one name that they all give it."""
    source = node.args[0] if node.args else node.kwargs["input"]
    assert isinstance(source, fx.Node)
    return source


def gives_several(node: fx.Node) -> bool:
    """Whether the operator of that name may give a tuple of values."""
    target: Any = node.target
    if inspect.isfunction(target) or getattr(target, "__module__", "") == "_operator":
        return False
    name = called_name(node)
    schemas = [target._schema] if isinstance(target, torch._ops.OpOverload) else _schemas(name)
    return any(len(schema.returns) > 1 for schema in schemas)


def _schemas(name: str) -> list[torch.FunctionSchema]:
    packet = getattr(torch.ops.aten, name, None)
    return [] if packet is None else [getattr(packet, overload)._schema for overload in packet.overloads()]


def attribute_name(value: Any) -> str | None:
    """The qualified name of the parameter or buffer that an argument is; None for any other argument."""
    return str(value.target) if isinstance(value, fx.Node) and value.op == "get_attr" else None


def named(node: fx.Node) -> str:
    """What a report calls a node: the module that it calls, by its qualified name, or its own name."""
    return str(node.target) if node.op == "call_module" else node.name


def switches_mode(node: fx.Node) -> bool:
    """Whether what comes after it computes in another way: with gradients or without, in another dtype."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name.endswith(("_grad_enabled", "_autocast", "_inference_mode"))


def written_inputs(node: fx.Node) -> list[fx.Node]:
    """The inputs that `node` may write to. A function that is not torch's own may write to any."""
    if node.op not in ("call_function", "call_method") or not _may_write(node):
        return []
    if node.op == "call_method" or getattr(node.target, "__module__", "") == "_operator":
        # x.add_(y), x += y, x[i] = y write to x, and to the tensor given as out.
        written = (*node.args[:1], node.kwargs.get("input"), node.kwargs.get("out"))
        return [value for value in written if isinstance(value, fx.Node)]
    if not _is_norm_call(node):
        return node.all_input_nodes
    statistics = [value for name, value in arguments(node).items() if name.startswith("running_")]
    return [value for value in statistics if isinstance(value, fx.Node)]


def _given(node: fx.Node) -> Mapping[str, Any]:
    """The arguments by name, as far as names are known."""
    if not inspect.isfunction(node.target):
        return node.kwargs
    try:
        return given_arguments(node)
    except (TypeError, ValueError):
        return node.kwargs


def _is_norm_call(node: fx.Node) -> bool:
    name = torch_name(node.target) or ""
    return "batch_norm" in name or name == "instance_norm"


def _may_write(node: fx.Node) -> bool:
    target: Any = node.target
    name = str(torch_name(target) or (target if isinstance(target, str) else getattr(target, "__name__", "")))
    if _is_norm_call(node):
        bound = arguments(node)
        updates = "no_training" not in name and "no_update" not in name
        return bound.get("training", bound.get("use_input_stats", updates)) is not False
    if isinstance(target, torch._ops.HigherOrderOperator):
        return True  # what its graphs do is not looked at
    if isinstance(target, torch._ops.OpOverload):
        return bool(target._schema.is_mutable) and name != "detach_"  # which writes no values
    if isinstance(target, torch._ops.OpOverloadPacket) and torch_name(target) is None:
        return any(getattr(target, overload)._schema.is_mutable for overload in target.overloads())  # type: ignore[no-untyped-call]
    given = _given(node)
    if given.get("inplace") not in (None, False) or any(
        given.get(each) is not None for each in ("out", "max_norm")
    ):
        return True
    package = str(getattr(target, "__module__", None)).partition(".")[0]
    if node.op == "call_function" and package not in _HARMLESS:
        return torch_name(target) is None
    return name in _IN_PLACE_OPERATORS or (name.endswith("_") and not name.endswith("__"))
