"""Operands that oneDNN has only kernels of reference for, or reads wrongly, kept from it in a trace.

A kernel of reference takes one element after the other, a hundred times as long as others, and oneDNN Graph
takes it all the same. Which operands have no other was seen by trying: oneDNN's verbose mode names its
kernels. So was which operands of products it reads from elsewhere in memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from fxfuse.lowering.traces import ACTIVATIONS, insert

# Left to torch: the same by names that oneDNN Graph does not know; a sum is the difference with −α.
_NAMES = {
    "aten::mul": "aten::multiply",
    "aten::div": "aten::divide",
    "aten::add": "aten::sub",
    "aten::softmax": "aten::special_softmax",
}
_MATRIX_PRODUCTS = {"aten::matmul", "aten::bmm"}
_POOLINGS = {"aten::max_pool2d", "aten::avg_pool2d"}
_READERS = {*_MATRIX_PRODUCTS, *_POOLINGS, "aten::softmax"}
# What has a layout of its choice, and what keeps that of what it reads.
_IMAGES = {"aten::_convolution", *_POOLINGS}
_LAID_OUT_ALIKE = {*ACTIVATIONS, *_NAMES, "aten::cat", "prim::ListConstruct"}
# The axes of images with channels last, from the slowest in memory to the fastest.
_CHANNELS_LAST = [0, 2, 3, 1]

Shape = tuple[Sequence[int], Sequence[int]]
"""Sizes and strides."""


def lay_out_operands(graph: Any) -> None:
    """Has operators computed by torch, or read a copy, where oneDNN reads operands slowly or wrongly."""
    images: set[str] = set()  # names of what oneDNN Graph may lay out as it does images, channels last
    for node in [*graph.nodes()]:
        is_rounded = node.kind() == "aten::div" and len([*node.inputs()]) > 2  # which it takes no notice of
        if is_rounded or (node.kind() in _NAMES and _has_only_a_reference(node)):
            _rename(graph, node)
            continue
        if node.kind() in _READERS:
            for place in range(2 if node.kind() in _MATRIX_PRODUCTS else 1):
                _read_copy(graph, node, place, images)
        is_alike = node.kind() in _LAID_OUT_ALIKE
        if node.kind() in _IMAGES or (is_alike and any(each.debugName() in images for each in node.inputs())):
            images |= {value.debugName() for value in node.outputs()}


def _has_only_a_reference(node: Any) -> bool:
    """Whether that is so of operands that lie in memory like these, as far as the trace tells."""
    tensors = [value.type() for value in node.inputs() if value.type().kind() == "TensorType"]
    result = node.output().type()
    kinds = [*tensors, result]
    if any(kind.sizes() is None or kind.strides() is None for kind in kinds) or not result.sizes():
        return False
    dtypes = {kind.scalarType() for kind in kinds if kind.sizes()}
    if not dtypes <= {"Float", "BFloat16"} or "Bool" in (kind.scalarType() for kind in kinds):
        return False  # it computes nothing of others
    shapes = [(kind.sizes(), kind.strides()) for kind in tensors]
    if not all(_is_dense(*shape) for shape in shapes):
        return True
    if node.kind() == "aten::softmax":
        order = _order(*shapes[0])
        return order != sorted(order)
    whole = next((shape for shape in shapes if shape[0] == result.sizes()), None)
    if whole is None or (node.kind() == "aten::div" and shapes[0] != whole):
        return True
    return not all(_is_spread(shape, whole) for shape in shapes if shape[0] != result.sizes())


def _is_spread(part: Shape, whole: Shape) -> bool:
    """Whether the smaller of two operands varies as oneDNN's kernels know it.

    That is along the last axes, maybe along the first as well, and along the second alone or with the first.
    """
    missing = len(whole[0]) - len(part[0])
    first, *others = [*[False] * missing, *(size > 1 for size in part[0])]
    if not any(others[1:]):  # a number for each channel, maybe of each sample
        return others[:1] == [True] or not first or len(others) == 1
    own_order = [axis + missing for axis in _order(*part)]
    is_alike = own_order == [axis for axis in _order(*whole) if axis in own_order]
    return others == sorted(others) and (first or not others[0] or is_alike)


def _is_dense(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether it is a block of memory without gaps, whatever the order of the axes."""
    expected = 1
    for axis in reversed(_order(sizes, strides)):
        if strides[axis] != expected:
            return False
        expected *= sizes[axis]
    return True


def _order(sizes: Sequence[int], strides: Sequence[int]) -> list[int]:
    """The axes of more than one element, from the slowest in memory to the fastest."""
    axes = (axis for axis, size in enumerate(sizes) if size > 1)
    return sorted(axes, key=lambda axis: -strides[axis])


def _rename(graph: Any, node: Any) -> None:
    """Puts the same function by its other name in the place of a node."""
    inputs = [*node.inputs()]
    if node.kind() == "aten::add":
        graph.setInsertPoint(node)
        inputs[2] = graph.insertConstant(-inputs[2].toIValue())
    other = insert(graph, node, _NAMES[node.kind()], inputs, node.output().type())
    node.output().replaceAllUsesWith(other)
    node.destroy()


def _read_copy(graph: Any, node: Any, place: int, images: set[str]) -> None:
    """Has a node read a copy of an operand that lies in memory as no kernel for it reads it.

    Products and softmax read a copy, too, of what lies as it should but may be laid out otherwise by oneDNN
    Graph: a copy that lies as it did is none of its operators.
    """
    value = [*node.inputs()][place]
    kind = value.type()
    if kind.kind() != "TensorType" or not kind.sizes() or kind.strides() is None:
        return
    shape = kind.sizes(), kind.strides()
    layout = torch.contiguous_format
    if node.kind() in _POOLINGS:
        is_read = _is_pooled(*shape)
        if len(kind.sizes()) == 4 and _order(*shape)[-1:] == [1]:
            layout = torch.channels_last
    else:
        is_read = _is_multiplied(*shape) and value.debugName() not in images
    if is_read:
        return
    like = torch.empty(kind.sizes(), dtype=kind.dtype(), memory_format=layout)
    graph.setInsertPoint(node)
    written = 2 if layout is torch.channels_last else 0  # as TorchScript writes memory formats
    given = [value, graph.insertConstant(written)]
    copy = insert(graph, node, "aten::contiguous", given, torch._C.TensorType.create_from_tensor(like))
    node.replaceInput(place, copy)


def _is_pooled(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether poolings read it: a block, with its channels the fastest axis or all axes in order."""
    order = _order(sizes, strides)
    return _is_dense(sizes, strides) and order in (sorted(order), sorted(order, key=_CHANNELS_LAST.index))


def _is_multiplied(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether kernels of products and softmax read it, and read it right.

    Its last or its last but one axis is the fastest. Of two axes of matrices, the kernels of oneDNN 3.12 step
    along the slower one by the wrong stride if that is the faster one's times both sizes, as it is of
    (batch, tokens, heads, width) for as many tokens as there are samples, but for some blocks. With a single
    element in one of these axes, or in the rows, more goes wrong, but for blocks in order and single samples
    outermost.
    """
    order = _order(sizes, strides)
    if order and order[-1] < len(sizes) - 2:
        return False
    if len(sizes) != 4 or _is_in_order(sizes, strides):  # oneDNN Graph takes no batches of another rank
        return True
    samples, heads, rows, _ = sizes
    if heads == 1 or rows == 1:
        return False
    if samples == 1:
        return all(strides[0] >= size * stride for size, stride in zip(sizes, strides, strict=True))
    slow, fast = sorted(strides[:2], reverse=True)
    return slow != samples * heads * fast


def _is_in_order(sizes: Sequence[int], strides: Sequence[int]) -> bool:
    """Whether it is a block with its axes in order, but maybe for the last two."""
    axes = [min(axis, len(sizes) - 2) for axis in _order(sizes, strides)]
    return _is_dense(sizes, strides) and axes == sorted(axes)
