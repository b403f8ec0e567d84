"""A trace, a graph of TorchScript, in two halves: where it fails as a whole, parts of it may not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

_jit: Any = torch._C


def writes(graph: Any) -> bool:
    """Whether an operator writes to its input: then no half of the graph knows all who hold that."""
    return any("!" in node.schema() for node in graph.nodes())


def halves(graph: Any) -> tuple[Any, Any] | None:
    """Two graphs of about as many operators each: what the first gives, the second takes behind its inputs.

    None: it has a single operator.

    Args:
        graph: from tensors to one value, without branches, that writes to nothing.
    """
    nodes = [*graph.nodes()]
    steps = [place for place, node in enumerate(nodes) if node.schema() != "(no schema)"]
    if len(steps) < 2:
        return None
    middle = steps[len(steps) // 2]
    passed = _passed(nodes, middle, graph.outputs())
    first, second = graph.copy(), graph.copy()
    _give(first, _values(first, passed))
    for value in _values(second, passed):
        given = second.addInput()
        given.setType(value.type())
        value.replaceAllUsesWith(given)
    for half in (first, second):
        _jit._jit_pass_dce(half)
    return first, second


def _passed(nodes: Sequence[Any], middle: int, results: Sequence[Any]) -> list[tuple[int, int]]:
    """Where the tensors come from that are computed before `middle` and read later, by node and output.

    Lists of them and of numbers are made again.
    """
    places = {
        value.debugName(): (number, place)
        for number, node in enumerate(nodes[:middle])
        for place, value in enumerate(node.outputs())
    }
    needed = [*results, *(value for node in nodes[middle:] for value in node.inputs())]
    passed: dict[tuple[int, int], None] = {}
    while needed:
        value = needed.pop()
        if value.debugName() not in places:
            continue
        if value.type().kind() == "TensorType" and value.node().kind() != "prim::Constant":
            passed[places[value.debugName()]] = None
        else:
            needed += value.node().inputs()
    return sorted(passed)


def _give(graph: Any, values: Sequence[Any]) -> None:
    """Has it give a tuple of these."""
    given = graph.create("prim::TupleConstruct", values, 1)
    given.output().setType(_jit.TupleType([value.type() for value in values]))
    graph.appendNode(given)
    graph.eraseOutput(0)
    graph.registerOutput(given.output())


def _values(graph: Any, places: Sequence[tuple[int, int]]) -> list[Any]:
    """What the nodes of a graph give at these places."""
    nodes = [*graph.nodes()]
    return [[*nodes[number].outputs()][place] for number, place in places]
