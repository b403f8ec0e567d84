"""Folds as a part of the graph: the folded weights are computed from the others on every call.

What computes them is the trace of the solver itself. It can be differentiated, and compiled with the rest.
Moves that depend on a map's numbers cannot be made so; whether a dtype holds the weights is checked once.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, fx
from torch.fx.experimental.proxy_tensor import make_fx

from fxfuse.lifting import Lifted
from fxfuse.ops import Reader
from fxfuse.plan import Plan
from fxfuse.solve import Solution, solve_unchecked
from fxfuse.tree import attribute, put


def inline(
    lifted: Lifted, plan: Plan, reader: Reader, solution: Solution, tensors: Mapping[str, Tensor]
) -> None:
    """Computes the folded weights in the graph, in place of the attributes that hold them.

    Args:
        lifted: the folded graph; it is edited.
        plan: what was folded.
        reader: reads the graph as it was before.
        solution: the folded tensors.
        tensors: the parameters and buffers from which they come.
    """
    graph, root = lifted.capture.graph, lifted.capture.root
    places = {id(tensor): place for place, tensor in enumerate(_given(solution.tensors, solution))}
    folded = {
        node: places[id(attribute(root, str(node.target)))]
        for node in graph.find_nodes(op="get_attr")
        if id(attribute(root, str(node.target))) in places
    }
    recipe = _recipe(plan, reader, solution, tensors)
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        sources = [graph.get_attr(name) for name in tensors]
        inputs = dict(zip(recipe.find_nodes(op="placeholder"), sources, strict=True))
        results: Any = graph.graph_copy(recipe, inputs)
    for node, place in folded.items():
        node.replace_all_uses_with(results[place])
        graph.erase_node(node)
    for name, tensor in tensors.items():
        put(root, name, tensor)


def _recipe(plan: Plan, reader: Reader, solution: Solution, tensors: Mapping[str, Tensor]) -> fx.Graph:
    """A graph: parameters and buffers like `tensors` → the folded ones, in the order of `_given`."""

    def folded(*values: Tensor) -> list[Tensor]:
        for name, value in zip(tensors, values, strict=True):
            put(reader.root, name, value)
        reader.forget_tensors()
        return _given(solve_unchecked(plan, reader), solution)

    module = make_fx(folded)(*tensors.values())
    for node in module.graph.nodes:
        node.meta.clear()
        if node.op == "get_attr":  # numbers of the trace, which must not become inputs of the compiled graph
            value = attribute(module, str(node.target))
            options = {"dtype": value.dtype, "device": value.device}
            with module.graph.inserting_before(node):
                constant = module.graph.call_function(torch.tensor, (value.tolist(),), options)
            node.replace_all_uses_with(constant)
            module.graph.erase_node(node)
    return module.graph


def _given(tensors: Mapping[fx.Node, tuple[Any, ...]], solution: Solution) -> list[Any]:
    """The weights and biases that the operators of `solution` have, out of `tensors`."""
    return [
        tensors[node][part]
        for node, pair in solution.tensors.items()
        for part, tensor in enumerate(pair)
        if tensor is not None
    ]
