"""Who may find a value in another memory layout once a norm before it is gone.

A batch norm gives a value that is laid out in the order of its axes, whatever lay before it: a transposed or
sliced one for instance. `view` demands that order of what it is given; without the norm `reshape` has to take
its place, which is the same wherever `view` is possible, and copies elsewhere.
"""

from __future__ import annotations

from collections.abc import Callable, Container, Mapping
from dataclasses import dataclass, field

import torch
from torch import fx

from fxfuse.calls import operator_name
from fxfuse.layers import is_known
from fxfuse.nodes import LeftNorm, Linear, Norm, Opaque, Query
from fxfuse.ops import Reader
from fxfuse.shapes import GraphShapes
from fxfuse.table import LAYERS
from fxfuse.transparent import Concat, Rearranged, Slice, Within

_VIEWS = {"view": "reshape", "_unsafe_view": "reshape", "view_as": "reshape_as"}
_MINDING = {
    *("as_strided", "view_as_complex", "stride", "is_contiguous", "storage_offset", "data_ptr"),
    *("storage", "untyped_storage"),
}
_COPYING = {
    *("reshape", "reshape_as", "flatten", "unflatten", "ravel", "contiguous", "to", "type_as"),
    *("pixel_shuffle", "pixel_unshuffle", "channel_shuffle", "native_channel_shuffle"),
}
# What gives values in the order of their axes, or channels-last, as a batch norm leaves them; or no values.
_ORDERED = (Linear, Norm, LeftNorm, Concat, Query)


@dataclass
class Layouts:
    """What the nodes that go leave behind.

    Attributes:
        views: the calls of `view` that have to become `reshape`, by whose going.
        stuck: the nodes that may not go, since code that is not traced, or a view that somebody writes to,
            comes after them.
    """

    views: dict[fx.Node, frozenset[fx.Node]] = field(default_factory=dict)
    stuck: set[fx.Node] = field(default_factory=set)


def layouts(
    graph: fx.Graph,
    reader: Reader,
    shapes: GraphShapes,
    gone: Mapping[fx.Node, fx.Node],
    merged: Container[fx.Node],
    is_written: Callable[[fx.Node], bool],
) -> Layouts:
    """What becomes of memory layouts in `graph`.

    Args:
        graph: the graph.
        reader: reads its nodes.
        shapes: what is known of the shapes of its values.
        gone: the nodes that are to go, and what those who read them get instead.
        merged: the nodes whose values another operator is to give.
        is_written: whether anybody may write to a value, or to what it is a view of, once there is one.
    """
    found = Layouts()
    remaining = {*gone}
    other_order: dict[fx.Node, bool] = {}
    changed: dict[fx.Node, frozenset[fx.Node]] = {}
    for node in graph.nodes:
        op, inputs = reader.read(node), node.all_input_nodes
        before = frozenset[fx.Node]().union(*(changed[each] for each in inputs))
        if node in gone:
            remaining.discard(node)
            other_order[node] = other_order[gone[node]]
            # An instance norm alone gives no channels-last memory.
            moves = other_order[node] or (isinstance(op, Norm) and op.unbatched)
            changed[node] = before | ({node} if moves else frozenset())
            continue
        matters = bool(remaining) and not isinstance(op, _ORDERED)
        other_order[node] = matters and (
            any(other_order[each] for each in inputs) or _reorders(node, reader, shapes)
        )
        changed[node] = frozenset({node}) if node in merged else frozenset() if _orders(node, op) else before
        may_copy = before and _may_copy(node, reader) and is_written(node)
        if before and (may_copy or _minds(node) or _is_unknown(node, reader)):
            found.stuck |= before
        elif before and demands_order(node):
            found.views[node] = before
    return found


def demands_order(node: fx.Node) -> bool:
    """Whether it is a `view`, which fails where `reshape` would copy."""
    return operator_name(node) in _VIEWS and not _is_of_bits(node)


def as_reshape(view: fx.Node) -> None:
    """Makes a `view` a `reshape`, in place."""
    name = _VIEWS[operator_name(view)]
    view.target = name if view.op == "call_method" else getattr(torch.ops.aten, name).default
    view.kwargs = {"shape" if name == "size" else name: value for name, value in view.kwargs.items()}


def _orders(node: fx.Node, op: object) -> bool:
    """Whether the layout of what `node` gives does not depend on that of its input."""
    name = operator_name(node)
    if name == "contiguous":
        return len(node.args) == 1 and not node.kwargs
    return (isinstance(op, Query) and not name.endswith("_like")) or (isinstance(op, Linear) and op.dims == 0)


def _may_copy(node: fx.Node, reader: Reader) -> bool:
    """Whether it depends on the layout of its input if it gives a view or a copy."""
    layer = reader.layer(node)
    name = LAYERS.get(type(layer), "") if layer is not None else operator_name(node)
    return name in _COPYING or name in _VIEWS


def _is_of_bits(node: fx.Node) -> bool:
    """Whether it is a view of the same memory as another dtype."""
    return any(isinstance(value, torch.dtype) for value in (*node.args, *node.kwargs.values()))


def _minds(node: fx.Node) -> bool:
    """Whether it asks for the layout, or demands one that no other operator could make."""
    name = operator_name(node)
    return node.op != "call_module" and (name in _MINDING or (name in _VIEWS and _is_of_bits(node)))


def _reorders(node: fx.Node, reader: Reader, shapes: GraphShapes) -> bool:
    """Whether the value of `node` may lie in memory in another order than that of its axes."""
    op = reader.read(node)
    if isinstance(op, Rearranged):
        return not op.keeps_order(shapes)
    if isinstance(op, Within):
        return op.removes or op.view
    if isinstance(op, Opaque) and node.op == "call_module":
        return _is_unknown(node, reader)
    if isinstance(op, Opaque):
        return node.op in ("placeholder", "call_function", "call_method") and not op.like
    return isinstance(op, Slice)


def _is_unknown(node: fx.Node, reader: Reader) -> bool:
    if node.op == "call_module":
        layer = reader.layer(node)
        return layer is None or not is_known(layer)
    foreign = node.op == "call_function" and not operator_name(node)
    return foreign and not isinstance(reader.read(node), Query)
