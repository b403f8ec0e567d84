"""What those who edit traces, graphs of TorchScript, have in common.

A view of a whole value is no operator that oneDNN Graph knows: it keeps what comes before it and what comes
after it in pieces of their own.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

BINARY = {f"aten::{name}" for name in ("add", "mul", "div")}
PRODUCTS = {f"aten::{name}" for name in ("linear", "addmm", "matmul", "mm", "bmm")}
ACTIVATIONS = {
    f"aten::{name}"
    for name in (
        *("relu", "relu6", "hardtanh", "clamp", "leaky_relu", "elu", "sigmoid", "silu", "tanh", "gelu"),
        *("hardswish", "exp", "log", "sqrt", "square", "abs", "round"),
    )
}
"""Functions of single numbers that oneDNN Graph knows, or takes apart into such."""


def insert(graph: Any, before: Any, kind: str, inputs: Sequence[Any], of_type: Any) -> Any:
    """The value of a new node."""
    node = graph.create(kind, inputs, 1)
    node.insertBefore(before)
    node.output().setType(of_type)
    return node.output()


def may_write(node: Any) -> bool:
    """Whether its schema says so, or nothing about it."""
    return "!" in node.schema() or node.schema() == "(no schema)"


def rank(value: Any) -> int:
    """How many axes it has, as far as the trace tells."""
    return (value.type().dim() or 0) if value.type().kind() == "TensorType" else 0


def read_through_view(graph: Any, node: Any, place: int) -> None:
    """Has a node read a view of an input."""
    value = [*node.inputs()][place]
    node.replaceInput(place, insert(graph, node, "aten::alias", [value], value.type()))
