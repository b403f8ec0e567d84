"""A multiplication or addition of a constant, read as an affine map."""

from __future__ import annotations

from typing import Any, Literal

from torch import Tensor, fx

from fxfuse.constants import Constants
from fxfuse.nodes import Affine
from fxfuse.replica import is_plain

_ROLES: dict[str, Literal["times", "over", "plus"]] = {
    **dict.fromkeys(("add", "sub", "subtract", "rsub"), "plus"),
    **dict.fromkeys(("mul", "multiply", "neg"), "times"),
    **dict.fromkeys(("div", "divide", "true_divide", "truediv"), "over"),
}

_KNOWN = {"input", "self", "other", "alpha", "rounding_mode"}


def read_arithmetic(node: fx.Node, name: str, constants: Constants) -> Affine | None:
    """The node, which computes the operator `name`, as an affine map; None if it is none."""
    named = [node.kwargs[key] for key in ("input", "self", "other") if key in node.kwargs]
    operands: list[Any] = [*node.args, *named]
    operands += [-1.0] if name == "neg" else []
    factor: Any = node.kwargs.get("alpha", 1)
    if name not in _ROLES or len(operands) != 2 or not _KNOWN.issuperset(node.kwargs):
        return None
    if node.kwargs.get("rounding_mode") is not None:
        return None
    if name == "rsub":  # rsub(a, b) is b − a
        operands, name = operands[::-1], "sub"
        if factor != 1:
            return None
    left, right = operands
    constant_first = not isinstance(left, fx.Node) or left in constants
    value, constant = (right, left) if constant_first else (left, right)
    if not isinstance(value, fx.Node) or value in constants or not _is_number(constant, constants):
        return None
    role, subtracts = _ROLES[name], name in ("sub", "subtract")
    if type(factor) not in (int, float) or (constant_first and (role == "over" or factor != 1)):
        return None  # c/x is no affine map; c + α·x could be one, if anybody wrote it
    tensor = constants.value(constant) if isinstance(constant, fx.Node) else None
    return Affine(
        input=value,
        constant=constant,
        role=role,
        shape=() if tensor is None else tuple(tensor.shape),
        dtype=tensor.dtype if tensor is not None and tensor.dim() else None,
        negative=subtracts and constant_first,
        factor=-factor if subtracts and not constant_first else factor,
        norm=constants.statistics_of(constant) if isinstance(constant, fx.Node) else None,
    )


def _is_number(value: Any, constants: Constants) -> bool:
    """Whether `value` is a real number or a constant tensor of such."""
    if not isinstance(value, fx.Node):
        return type(value) in (int, float)
    tensor = constants.value(value) if value in constants else None
    return isinstance(tensor, Tensor) and is_plain(tensor) and not tensor.is_complex()
