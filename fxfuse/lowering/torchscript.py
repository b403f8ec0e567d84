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
# To these it can add nothing, nor multiply them.
_NOTHING_ADDED = {"aten::layer_norm", "aten::max_pool2d", "aten::avg_pool2d"}
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
    elements lie in another order. It fails on numbers that are computed, unless they have axes, too. What it
    computes wrongly, or beyond the end of its memory, is read through views: see `_is_apart`.
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
        is_apart = _is_apart(node)
        for place, value in computed.items():
            if is_apart or value.node().kind() in _NOTHING_ADDED:
                _read_through_view(graph, node, place)
    return constants


def _is_apart(node: Any) -> bool:
    """Whether oneDNN Graph may not join a sum or product of two tensors to what comes before it.

    It may if both have the same shape, or one has a number for each channel of images. Not even then if they
    are single rows: where it adds to the product of a long row and a matrix, it writes beyond its memory.
    """
    sizes = node.output().type().sizes()
    if sizes is None or len(sizes) < 2 or sizes[-2] == 1:
        return True
    for value in [*node.inputs()][:2]:
        own = value.type().sizes() if _rank(value) else sizes
        is_for_channels = own is not None and len(own) == len(sizes) > 3 and set(own[2:]) == {1}
        if own != sizes and not is_for_channels:
            return True
    return False


def _is_computed(value: Any, result: Any) -> bool:
    """Whether a single number is a tensor that is computed, of the dtype of the result."""
    is_tensor = value.type().kind() == "TensorType" and value.node().kind() != "prim::Constant"
    return bool(is_tensor and value.type().scalarType() == result.type().scalarType())


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
    """Has values read through views by who might overwrite them too early.

    What a kernel gives is in a layout of its own if nobody but such kernels reads it. Then one that reads it
    may write its result to the same memory; whether another one is still to read that, it does not ask. And
    it gives too few results if it does so and is joined to what it reads, which is a second one then.
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
            if node.kind() != "prim::Constant" and value.type().kind() == "TensorType":
                for early, place in [*_too_early(value, made, before)]:
                    _read_through_view(graph, early, place)


def _too_early(value: Any, made: dict[str, int], before: list[int]) -> Iterator[tuple[Any, int]]:
    """The nodes that might overwrite `value` before others have read it, and as which input they read it."""
    readers = []
    for use in value.uses():
        name = next((each.debugName() for each in use.user.outputs()), "")
        readers.append((use.user, made.get(name, -1), use.offset))  # -1: it is a result of the graph
    for node, number, place in readers:
        if number < 0 or node.kind().partition("::")[2] in _TO_NEW_MEMORY:
            continue
        others = {other for _, other, _ in readers if other != number}
        if any(other < 0 or not before[number] >> other & 1 for other in others):
            yield node, place
