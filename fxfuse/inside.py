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

from fxfuse.lifting import Lifted, put
from fxfuse.ops import Reader
from fxfuse.plan import Plan
from fxfuse.solve import Solution, solve_unchecked
from fxfuse.tree import attribute


def traced(plan: Plan, reader: Reader, tensors: Mapping[str, Tensor]) -> fx.Graph:
    """A graph: parameters and buffers like `tensors` → the folded weights and biases of `plan`."""

    def folded(*values: Tensor) -> list[Tensor]:
        for name, value in zip(tensors, values, strict=True):
            put(reader.root, name, value)
        reader.forget_tensors()
        return [tensor for pair in solve_unchecked(plan, reader).values() for tensor in pair]

    module = make_fx(folded)(*tensors.values())
    graph = module.graph
    for node in graph.nodes:
        node.meta.clear()
        if node.op == "get_attr":  # a list of channels
            value = attribute(module, str(node.target))
            with graph.inserting_before(node):
                options = {"dtype": value.dtype, "device": value.device}
                constant = graph.call_function(torch.tensor, (value.tolist(),), options)
            node.replace_all_uses_with(constant)
            graph.erase_node(node)
    return graph


def inline(lifted: Lifted, recipe: fx.Graph, solution: Solution, tensors: Mapping[str, Tensor]) -> None:
    """Computes the folded weights in the graph, in place of the attributes that hold them.

    Args:
        lifted: the folded graph.
        recipe: what `traced` gave before it was folded.
        solution: the folded tensors.
        tensors: the parameters and buffers from which they come.
    """
    graph, root = lifted.capture.graph, lifted.capture.root
    values = {node: id(attribute(root, str(node.target))) for node in graph.find_nodes(op="get_attr")}
    with graph.inserting_before(next(node for node in graph.nodes if node.op != "placeholder")):
        sources = [graph.get_attr(name) for name in tensors]
        inputs = dict(zip(recipe.find_nodes(op="placeholder"), sources, strict=True))
        results: Any = graph.graph_copy(recipe, inputs)
    old = [tensor for pair in solution.tensors.values() for tensor in pair]
    computed = {id(tensor): node for tensor, node in zip(old, results, strict=True) if tensor is not None}
    for node, value in values.items():
        if value in computed:
            node.replace_all_uses_with(computed[value])
            graph.erase_node(node)
    for name, tensor in tensors.items():
        put(root, name, tensor)
