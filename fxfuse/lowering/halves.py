"""A trace, a graph of TorchScript, in two halves: where it fails as a whole, parts of it may not."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxfuse.lowering.traces import may_write

_jit: Any = torch._C
# What puts values together and takes them apart again. It is no operator, and may be in both halves.
_PLAIN = {
    f"prim::{name}" for name in ("Constant", "ListConstruct", "ListUnpack", "TupleConstruct", "TupleUnpack")
}


def halves(graph: Any) -> tuple[Any, Any] | None:
    """Two graphs of about as many operators each: what the first gives, the second takes behind its inputs.

    None: there are less than two operators, or one may write to what both halves hold, or what is no tensor
    is computed once for both, so that a half is no smaller.

    Args:
        graph: from tensors to one value.
    """
    nodes = [*graph.nodes()]
    places = [place for place, node in enumerate(nodes) if is_operator(node)]
    if len(places) < 2 or any(may_write(nodes[place]) for place in places):
        return None
    middle = places[len(places) // 2]
    passed = _passed(nodes, middle, graph.outputs())
    first, second = graph.copy(), graph.copy()
    _give(first, _values(first, passed))
    for value in _values(second, passed):
        given = second.addInput()
        given.setType(value.type())
        value.replaceAllUsesWith(given)
    for half in (first, second):
        _jit._jit_pass_dce(half)
        if sum(map(is_operator, half.nodes())) >= len(places):
            return None
    return first, second


def is_operator(node: Any) -> bool:
    """Whether it computes something."""
    return node.kind() not in _PLAIN


def _passed(nodes: Sequence[Any], middle: int, results: Sequence[Any]) -> list[tuple[int, int]]:
    """Where the tensors come from that are computed before `middle` and read later, by node and output.

    What is no tensor is computed again.
    """
    places = {
        value.debugName(): (number, place)
        for number, node in enumerate(nodes[:middle])
        for place, value in enumerate(node.outputs())
    }
    needed = [*results, *(value for node in nodes[middle:] for value in node.inputs())]
    passed = set()
    while needed:
        value = needed.pop()
        if value.debugName() not in places:
            continue
        if value.type().kind() == "TensorType" and value.node().kind() != "prim::Constant":
            passed.add(places[value.debugName()])
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
