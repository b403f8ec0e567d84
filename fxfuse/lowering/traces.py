"""What those who edit traces, graphs of TorchScript, have in common."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def insert(graph: Any, before: Any, kind: str, inputs: Sequence[Any], of_type: Any) -> Any:
    """The value of a new node."""
    node = graph.create(kind, inputs, 1)
    node.insertBefore(before)
    node.output().setType(of_type)
    return node.output()


def may_write(node: Any) -> bool:
    """Whether its schema says so, or nothing about it."""
    return "!" in node.schema() or node.schema() == "(no schema)"
