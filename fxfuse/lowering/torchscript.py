"""Edits of a trace, a graph of TorchScript, that spare oneDNN Graph what it fails on or computes wrongly.

What torch 2.13 makes of it is in ``torch/csrc/jit/codegen/onednn``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from fxfuse.lowering.operands import lay_out_operands
from fxfuse.lowering.reuse import keep_what_is_read_later
from fxfuse.lowering.traces import (
    ACTIVATIONS,
    BINARY,
    PRODUCTS,
    insert,
    may_write,
    rank,
    read_through_view,
)

_jit: Any = torch._C
# To these it can add nothing, nor multiply them.
_NOTHING_ADDED = {"aten::layer_norm", "aten::max_pool2d", "aten::avg_pool2d"}
# What activations are joined to.
_JOINED = {"aten::_convolution", *PRODUCTS, *BINARY}
# With AVX2 these take registers in which the kernel of a product keeps its sums.
_NEEDING_REGISTERS = {f"aten::{name}" for name in ("gelu", "silu", "tanh")}


def calls_others(graph: Any) -> bool:
    """Whether a trace calls functions or modules of TorchScript, of whose values it knows no sizes."""
    return any(node.kind() in {"prim::CallFunction", "prim::CallMethod"} for node in graph.nodes())


def has_empty_values(graph: Any) -> bool:
    """Whether a tensor in a trace has no elements."""
    values = (value for node in graph.nodes() for value in node.outputs())
    return any(value.type().kind() == "TensorType" and 0 in (value.type().sizes() or ()) for value in values)


def edit(graph: Any) -> list[Tensor]:
    """Edits a trace; tensors that it takes behind its inputs then.

    What is written in place is written to new memory then, and what is computed twice, once: both would be
    done later anyway.
    """
    _jit._jit_pass_remove_mutation(graph)
    _know_sizes(graph)
    _jit._jit_pass_cse(graph)
    _join_swish(graph)
    lay_out_operands(graph)
    constants: list[Tensor] = []
    for node in [*graph.nodes()]:
        if node.kind() in BINARY:
            constants += _as_inputs(graph, node)
            _give_axes(graph, node)
            _keep_apart(graph, node)
    if torch.backends.cpu.get_cpu_capability() == "AVX2":
        _leave_registers_to_products(graph)
    keep_what_is_read_later(graph)
    for node in [*graph.nodes()]:
        if node.kind() in BINARY:
            _keep_from_activations(graph, node)
    return constants


def _know_sizes(graph: Any) -> None:
    """Computes what depends on sizes: oneDNN Graph fails on products with numbers that it does not know."""
    for node in graph.findAllNodes("aten::size"):
        value, *axis = node.inputs()
        if axis and value.type().sizes() and axis[0].toIValue() is not None:
            graph.setInsertPoint(node)
            size = graph.insertConstant(value.type().sizes()[axis[0].toIValue()])
            node.output().replaceAllUsesWith(size)
    _jit._jit_pass_constant_propagation(graph)


def _join_swish(graph: Any) -> None:
    """Puts SiLU in the place of x · σ(x), whose sigmoid would be kept apart from what gives x.

    Where nothing is written in place: x may be another one in the product than in the sigmoid.
    """
    if any(map(may_write, graph.nodes())):
        return
    for node in graph.findAllNodes("aten::mul"):
        one, other = node.inputs()
        for x, gate in ((one, other), (other, one)):
            if _is_sigmoid_of(x, gate) and x.type().dtype().is_floating_point:
                node.output().replaceAllUsesWith(insert(graph, node, "aten::silu", [x], node.output().type()))
                break
    _jit._jit_pass_dce(graph)


def _is_sigmoid_of(x: Any, gate: Any) -> bool:
    return bool(gate.node().kind() == "aten::sigmoid" and gate.node().input().debugName() == x.debugName())


def _leave_registers_to_products(graph: Any) -> None:
    """Keeps functions that need many registers apart from products: joined they take 40 % longer."""
    joined: set[str] = set()  # names of what is computed together with a product
    for node in [*graph.nodes()]:
        read = {value.debugName() for value in node.inputs()}
        if node.kind() in _NEEDING_REGISTERS and read & joined:
            read_through_view(graph, node, 0)
        elif node.kind() in PRODUCTS or (node.kind() in BINARY | ACTIVATIONS and read & joined):
            joined.add(node.output().debugName())


def _operands(node: Any) -> dict[int, Any]:
    """The two of a sum, product or quotient, by their places."""
    return dict(enumerate([*node.inputs()][:2]))


def _as_inputs(graph: Any, node: Any) -> Iterator[Tensor]:
    """Makes constants among the operands inputs of the graph, with all axes that the result has.

    oneDNN Graph fails on constants behind a linear layer or a product, and computes something else if their
    elements lie in another order.
    """
    for place, value in _operands(node).items():
        if value.node().kind() == "prim::Constant" and rank(value):
            constant = value.toIValue()
            constant = constant[(None,) * (rank(node.output()) - constant.dim())].contiguous()
            given = graph.addInput()
            given.setType(_jit.TensorType.create_from_tensor(constant))
            node.replaceInput(place, given)
            yield constant


def _give_axes(graph: Any, node: Any) -> None:
    """Has a number among the operands, if it is computed, as many axes as the result: else that fails."""
    for place, value in _operands(node).items():
        if not rank(value) and rank(node.output()) and _is_computed(value, node.output()):
            graph.setInsertPoint(node)
            ones = [1] * rank(node.output())
            sizes = graph.insertConstant(ones)
            spread = insert(graph, node, "aten::reshape", [value, sizes], value.type().with_sizes(ones))
            node.replaceInput(place, spread)


def _keep_apart(graph: Any, node: Any) -> None:
    """Has it read views where oneDNN Graph may not join it to what comes before.

    It may if both operands have the shape of the result. One may have a single element for each channel of
    images that have their channels last; behind a linear layer, whose results have not, it is added along
    another axis. Not even then may it join single rows: where it adds to the product of a long row and a
    matrix, it writes beyond its memory. Nor can it add to layer norms and poolings.
    """
    sizes = node.output().type().sizes()
    is_apart = sizes is None or len(sizes) < 2 or sizes[-2] == 1
    for value in _operands(node).values():
        own = value.type().sizes() if rank(value) else sizes
        is_for_channels = own is not None and len(own) == len(sizes or ()) > 3 and set(own[2:]) == {1}
        has_channels_last = (node.output().type().strides() or [0, 0])[1:2] == [1]
        is_apart |= own != sizes and not (is_for_channels and has_channels_last)
    for place, value in _operands(node).items():
        is_given = value.node().kind() in ("prim::Param", "prim::Constant")
        if rank(value) and not is_given and (is_apart or value.node().kind() in _NOTHING_ADDED):
            read_through_view(graph, node, place)


def _keep_from_activations(graph: Any, node: Any) -> None:
    """Has it read a view of an activation that is joined to nothing: both would be a kernel of reference."""
    for place, value in _operands(node).items():
        if value.node().kind() in ACTIVATIONS:
            (source, *_) = value.node().inputs()
            if source.node().kind() not in _JOINED | ACTIVATIONS:
                read_through_view(graph, node, place)


def _is_computed(value: Any, result: Any) -> bool:
    """Whether a single number is a tensor that is computed, of the dtype of the result."""
    is_tensor = value.type().kind() == "TensorType" and value.node().kind() != "prim::Constant"
    return bool(is_tensor and value.type().scalarType() == result.type().scalarType())
