"""Edits of a trace, a graph of TorchScript, that spare oneDNN Graph what it fails on or computes wrongly.

What torch 2.13 makes of it is in ``torch/csrc/jit/codegen/onednn``. A view of a whole value is no operator
that oneDNN Graph knows: it keeps what comes before it and what comes after it in pieces of their own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

_passes: Any = torch._C
# Their kernels write to new memory, unless something follows that does not.
_TO_NEW_MEMORY = {
    *("_convolution", "convolution", "conv1d", "conv2d", "conv3d", "linear", "addmm", "matmul", "mm", "bmm"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "cat", "mean", "layer_norm", "batch_norm"),
}
_BINARY = {f"aten::{name}" for name in ("add", "sub", "mul", "div")}


def edited(graph: Any) -> tuple[Any, list[Tensor]]:
    """A function for a trace without branches, and tensors that it takes behind the inputs of the trace.

    What is written in place in the trace is written to new memory then, and what is computed twice, once:
    both would be done later anyway.
    """
    _passes._jit_pass_remove_mutation(graph)
    _know_sizes(graph)
    _passes._jit_pass_cse(graph)
    constants = _as_inputs(graph)
    _keep_what_is_read_later(graph)
    return _passes._create_function_from_graph("edited", graph), constants


def _know_sizes(graph: Any) -> None:
    """Computes what depends on sizes: oneDNN Graph fails on products with numbers that it does not know."""
    for node in graph.findAllNodes("aten::size"):
        value, *axis = node.inputs()
        if axis and value.type().sizes() and axis[0].toIValue() is not None:
            graph.setInsertPoint(node)
            size = graph.insertConstant(value.type().sizes()[axis[0].toIValue()])
            node.output().replaceAllUsesWith(size)
    _passes._jit_pass_constant_propagation(graph)


def _as_inputs(graph: Any) -> list[Tensor]:
    """Makes constants that are added or multiplied inputs of the graph, with all axes that the result has.

    oneDNN Graph fails on constants behind a linear layer or a product, and computes something else if their
    elements lie in another order. It fails on numbers that are computed, unless they have axes, too. Nor can
    it add anything to a layer norm, or tensors of which one has fewer axes; and where it adds to the product
    of a long row and a matrix, it writes to memory that is not its own. These are read through views.
    """
    constants = []
    for node in [*graph.nodes()]:
        if node.kind() not in _BINARY:
            continue
        rank = _rank(node.output())
        computed = {}
        for place, value in enumerate([*node.inputs()][:2]):
            if not _rank(value):
                if _is_computed(value, node.output()):
                    graph.setInsertPoint(node)
                    ones = graph.insertConstant([1] * rank)
                    spread = graph.insertNode(graph.create("aten::reshape", [value, ones], 1))
                    node.replaceInput(place, spread.output())
                continue
            if value.node().kind() != "prim::Constant":
                computed[place] = value
                continue
            constant = value.toIValue()
            constants.append(constant[(None,) * (rank - constant.dim())].contiguous())
            given = graph.addInput()
            given.setType(value.type().with_sizes([*constants[-1].shape]))
            node.replaceInput(place, given)
        is_apart = _is_row(node.output()) or any(_rank(value) < rank for value in computed.values())
        for place, value in computed.items():
            if is_apart or value.node().kind() == "aten::layer_norm":
                _read_through_view(graph, node, place)
    return constants


def _is_computed(value: Any, result: Any) -> bool:
    """Whether a single number is a tensor that is computed, of the dtype of the result."""
    is_tensor = value.type().kind() == "TensorType" and value.node().kind() != "prim::Constant"
    return bool(is_tensor and value.type().scalarType() == result.type().scalarType())


def _is_row(value: Any) -> bool:
    """Whether it is one row, or one for each of a batch."""
    sizes = value.type().sizes()
    return sizes is None or len(sizes) < 2 or sizes[-2] == 1


def _rank(value: Any) -> int:
    """How many axes it has, as far as the trace tells."""
    return (value.type().dim() or 0) if value.type().kind() == "TensorType" else 0


def _read_through_view(graph: Any, node: Any, place: int) -> None:
    """Has a node read a view of an input."""
    value = [*node.inputs()][place]
    view = graph.create("aten::alias", [value], 1)
    view.insertBefore(node)
    view.output().setType(value.type())
    node.replaceInput(place, view.output())


def _keep_what_is_read_later(graph: Any) -> None:
    """Has each value that might be overwritten too early read by a view, too.

    What a kernel gives is in a layout of its own if nobody but such kernels reads it. Then one that reads it
    may write its result to the same memory; whether another one is still to read that, it does not ask.
    """
    made: dict[str, int] = {}  # by the name of a value, the number of the node that gives it
    before: list[int] = []  # for each node, a bit for each that it depends on, and for itself
    nodes = [*graph.nodes()]
    for number, node in enumerate(nodes):
        depends = 1 << number
        for value in node.inputs():
            depends |= before[made[value.debugName()]] if value.debugName() in made else 0
        made |= {value.debugName(): number for value in node.outputs()}
        before.append(depends)
    for node in nodes:
        for value in node.outputs():
            if node.kind() == "prim::Constant" or value.type().kind() != "TensorType":
                continue
            later = next(_read_later(value, made, before), None)
            if later is not None:
                _read_through_view(graph, *later)


def _read_later(value: Any, made: dict[str, int], before: list[int]) -> Iterator[tuple[Any, int]]:
    """The nodes that read `value`, and as which input, perhaps after another one has overwritten it."""
    readers = []
    for use in value.uses():
        name = next((each.debugName() for each in use.user.outputs()), None)
        if name not in made:  # the result of the graph is no kernel
            return
        readers.append((use.user, made[name], use.offset))
    for node, number, _ in readers:
        if node.kind().partition("::")[2] not in _TO_NEW_MEMORY:
            for other, its_number, place in readers:
                if its_number != number and not before[number] >> its_number & 1:
                    yield other, place
