"""The graphs of Dynamo.

Which of their inputs are parameters, what is known of their values, and what it takes to give a graph on that
looks as if Dynamo had made it.
"""

from __future__ import annotations

import re
from collections.abc import Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, fx
from torch._dynamo.symbolic_convert import tls
from torch._guards import TracingContext
from torch._subclasses import FakeTensor
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fxfuse.capture import Capture
from fxfuse.lifting import Lifted, lower
from fxfuse.ops import Reader
from fxfuse.solve import Solution
from fxfuse.tree import attribute, is_below, storage

Key = tuple[fx.Node, int]
"""A folded tensor: the operator, and 0 for its weight or 1 for its bias."""
Given = int | Key | Tensor
"""What an input of a folded graph is: Dynamo's at that place, a folded tensor, or always that tensor."""

_PARTS = re.compile(r"\['(\w+)'\]")
# How Dynamo marks inputs that are the same tensor in every call, unless the user puts another in its place.
_STATIC = "_dynamo_static_input_type"


def is_static(value: Any) -> bool:
    """Whether an example input is a parameter or buffer."""
    return bool(getattr(value, _STATIC, None)) and not isinstance(value, FakeTensor)


def static_inputs(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """The places of parameters and buffers by their names, which are qualified ones if Dynamo tells them."""
    found: dict[str, int] = {}
    # A weight may be passed to forward, too, and be written to as such.
    passed = [
        each for each in inputs if not getattr(each, _STATIC, None) and not isinstance(each, FakeTensor)
    ]
    others = {storage(each) for each in passed}
    for place, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        if is_static(inputs[place]) and storage(inputs[place]) not in others:
            name = ".".join(_PARTS.findall(node.meta["grapharg"].source.name)[1:])
            clashes = any(is_below(name, other) or is_below(other, name) for other in found)
            found[node.name if clashes or not name else name] = place
    return found


def tensors_of(capture: Capture) -> dict[str, Tensor]:
    """The parameters and buffers by their names; Dynamo, too, can be asked to make attributes of them."""
    names = dict.fromkeys(str(node.target) for node in capture.graph.find_nodes(op="get_attr"))
    values = {name: attribute(capture.root, name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def changes_unseen(tensor: Tensor) -> bool:
    """Whether a write may count up no version: it was made in inference mode, or other processes share it."""
    return tensor.is_inference() or (tensor.device.type == "cpu" and bool(tensor.is_shared()))  # type: ignore[no-untyped-call]


def observed(capture: Capture) -> dict[fx.Node, Any]:
    """What Dynamo saw: it guards numbers of axes, sizes and dtypes, and compiles anew for others."""
    return {node: node.meta["example_value"] for node in capture.graph.nodes if "example_value" in node.meta}


def gives_gradients(capture: Capture, reader: Reader, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a value of the graph may give gradients of parameters, or takes tangents of them with it."""
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
        for tensor in tensors.values()
    ):
        return True
    seen_of = observed(capture).items()
    values = [seen for node, seen in seen_of if node.op != "placeholder" and node not in reader.constants]
    asks = any(tensor.requires_grad for tensor in tensors.values())
    return asks and any(each.requires_grad for each in pytree.tree_leaves(values) if isinstance(each, Tensor))


def code_compiled() -> Hashable:
    """What stands for the piece of Python code that is being compiled, each time it is."""
    transaction = getattr(tls, "current_tx", None)
    if transaction is None:
        return object()
    code = transaction.f_code
    return code.co_filename, code.co_name, code.co_firstlineno


def lowered(lifted: Lifted, places: Mapping[fx.Node, int], solution: Solution) -> list[Given]:
    """Makes inputs of the attributes.

    Returns:
        For each input its place among those of Dynamo, what folded tensor it is, or an attribute for good.
    """
    graph, root = lifted.capture.graph, lifted.capture.root

    def new_input(name: str, _: Tensor) -> fx.Node:
        with graph.inserting_before():  # the beginning
            return graph.placeholder(f"folded_{name.replace('.', '_')}")

    names = lower(lifted, new_input)
    keys = {
        id(each): (node, part) for node, pair in solution.tensors.items() for part, each in enumerate(pair)
    }
    given: list[Given] = []
    for node in graph.find_nodes(op="placeholder"):
        value = attribute(root, names[node]) if node in names else None
        if value is not None and id(value) in keys:
            given.append(keys[id(value)])
        elif node in places:
            given.append(places[node])
        else:
            assert isinstance(value, Tensor)
            given.append(value)
        if not isinstance(given[-1], int):
            node.meta = {"tensor_dict": {_STATIC: "unguarded"}}
    return given


@contextmanager
def static_sizes(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Keeps AOTAutograd from taking the sizes of inputs that it does not know from Dynamo for dynamic."""
    context = TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    # What the mode has made of a tensor it gives again, as long as it lives.
    fakes = [] if mode is None else [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]
    yield
    fakes.clear()


def as_dynamo_does(capture: Capture, original: fx.GraphModule, given: Sequence[Given]) -> fx.GraphModule:
    """The folded graph with what AOTAutograd reads of one that Dynamo made: the sources of its inputs."""
    module = fx.GraphModule(capture.root, capture.graph, capture.name)
    module.meta = dict(original.meta)
    module.__dict__["_param_name_to_source"] = {}
    inputs: Any = original.graph.find_nodes(op="placeholder")
    for node, each in zip(capture.graph.find_nodes(op="placeholder"), given, strict=True):
        node._dynamo_source = inputs[each]._dynamo_source if isinstance(each, int) else None
    return module
