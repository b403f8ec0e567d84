"""Graphs of Dynamo, whose weights are inputs, on the kernels of the engine "torch"."""

from __future__ import annotations

import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree
from torch.utils.weak import WeakTensorKeyDictionary

from fxfuse.aliases import roots
from fxfuse.calls import written_inputs
from fxfuse.dynamo import is_static
from fxfuse.following import Watch
from fxfuse.lifting import lift
from fxfuse.lowering.lowered import Lowered
from fxfuse.tree import storage


def lower_graph(graph_module: fx.GraphModule, example_inputs: Sequence[Any]) -> Callable[..., Any]:
    """Compiles a graph as a backend of ``torch.compile`` does.

    Weights become constants of the kernels. Whenever one has changed, or is another tensor, the graph is
    lowered again before the next answer. Where gradients are asked for, the graph runs as it is; and where
    its results may share memory, to which code behind the graph may write: those of kernels do not.
    """
    if _may_share_memory(graph_module):
        return graph_module
    placeholders = graph_module.graph.find_nodes(op="placeholder")
    pairs = enumerate(zip(placeholders, example_inputs, strict=True))
    places = {node.name: place for place, (node, example) in pairs if is_static(example)}
    others = [place for place in range(len(placeholders)) if place not in places.values()]
    lowers = threading.Lock()
    # Instances of one class share compiled code. A buffer tells instances apart; parameters may be tied.
    first = min(
        places.values(), key=lambda place: isinstance(example_inputs[place], nn.Parameter), default=None
    )
    without = torch.empty(0)  # stands for the weights of a graph that has none
    known: Any = WeakTensorKeyDictionary()

    def lowered(inputs: Sequence[Any]) -> Lowered:
        key = without if first is None else inputs[first]
        with lowers:
            found: tuple[Watch, Lowered] | None = known.get(key)
            if found is None or found[0].is_stale(inputs):
                tensors = [(place, inputs[place]) for place in places.values()]
                buffers = [pair for pair in tensors if not isinstance(pair[1], nn.Parameter)]
                watch = Watch(tensors, buffers)  # before they are read: who writes meanwhile is noticed
                found = known[key] = watch, Lowered(bound(inputs), "torch", None)
            return found[1]

    def bound(inputs: Sequence[Any]) -> fx.GraphModule:
        lifted = lift(graph_module, places, {name: inputs[place].detach() for name, place in places.items()})
        for placeholder in lifted.inputs.values():
            lifted.capture.graph.erase_node(placeholder)
        return fx.GraphModule(lifted.capture.root, lifted.capture.graph).eval()

    def run(*inputs: Any) -> Any:
        if torch.is_grad_enabled() and any(isinstance(x, Tensor) and x.requires_grad for x in inputs):
            return graph_module(*inputs)
        return lowered(inputs)(*(inputs[place] for place in others))

    return run


def _may_share_memory(graph_module: fx.GraphModule) -> bool:
    """Whether a result may lie in the memory of another one, or of an input."""
    graph = graph_module.graph
    (output,) = graph.find_nodes(op="output")
    results = [each for each in pytree.tree_leaves(output.args) if isinstance(each, fx.Node)]
    inputs = [*graph.find_nodes(op="placeholder")]
    # Dynamo knows, but not of nodes in the place of its own. Folded weights are read by operators only.
    values = {node: node.meta.get("example_value") for node in (*results, *inputs)}
    if any(values[node] is None for node in results):
        memory: Mapping[fx.Node, frozenset[Any]] = roots(graph, graph_module, written_inputs, {})
    else:
        memory = {node: frozenset({storage(each)}) for node, each in values.items() if each is not None}
        inputs = [node for node in inputs if node in memory]
    used = frozenset[Any]().union(*(memory[node] for node in inputs))
    for result in results:
        if not used.isdisjoint(memory[result]):
            return True
        used |= memory[result]
    return False
