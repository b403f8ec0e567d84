"""Graphs whose parameters and buffers are inputs, as compilers make them: to attributes, and back."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

from torch import Tensor, fx, nn

from fxfuse.capture import Capture
from fxfuse.tree import attribute, put


@dataclass(frozen=True)
class Lifted:
    """A copy of a graph, in which parameters and buffers are attributes.

    Attributes:
        capture: the copy. The inputs are still there, read by nobody.
        inputs: the inputs of the copy that stood for the attributes of these names.
    """

    capture: Capture
    inputs: Mapping[str, fx.Node]


def lift(source: fx.GraphModule, places: Mapping[str, int], tensors: Mapping[str, Tensor]) -> Lifted:
    """Makes attributes of inputs.

    Args:
        source: the module, which is not changed; what else it reads as an attribute is shared.
        places: the places of parameters and buffers among the inputs, by their qualified names.
        tensors: their values.
    """
    graph, root = fx.Graph(), nn.Module()
    copies: dict[fx.Node, fx.Node] = {}
    output = graph.graph_copy(source.graph, copies, return_output_node=True)
    assert isinstance(output, tuple)
    graph.output(output[0]).meta = dict(output[1].meta)
    for node, twin in copies.items():
        twin.name = node.name  # also a name that fx would not give, such as that of a builtin
    for node in graph.find_nodes(op="get_attr"):
        put(root, str(node.target), attribute(source, str(node.target)))
    placeholders = graph.find_nodes(op="placeholder")
    inputs = {name: placeholders[place] for name, place in places.items()}
    first = next(node for node in graph.nodes if node.op != "placeholder")
    with graph.inserting_before(first):
        for name, placeholder in inputs.items():
            put(root, name, tensors[name])
            placeholder.replace_all_uses_with(graph.get_attr(name))
    return Lifted(Capture(root, graph, type(source).__name__), inputs)


def lower(lifted: Lifted, new_input: Callable[[str, Tensor], fx.Node]) -> dict[fx.Node, str]:
    """Makes inputs of the attributes again.

    Args:
        lifted: what `lift` gave, edited since.
        new_input: makes an input for an attribute of that name and value that has come in.

    Returns:
        The inputs that somebody reads in the place of attributes, and their names; the others are gone.
    """
    graph, inputs = lifted.capture.graph, dict(lifted.inputs)
    for node in graph.find_nodes(op="get_attr"):
        name, value = str(node.target), attribute(lifted.capture.root, str(node.target))
        if not isinstance(value, Tensor):
            continue
        if name not in inputs:
            inputs[name] = new_input(name, value)
        node.replace_all_uses_with(inputs[name])
        graph.erase_node(node)
    for name, placeholder in lifted.inputs.items():
        if not placeholder.users:
            graph.erase_node(placeholder)
            del inputs[name]
    return {placeholder: name for name, placeholder in inputs.items()}
