"""What engines ask of a specialised graph, and do to one before they compile it."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse.aliases import plain_layer
from fxfuse.calls import arguments, operator_name
from fxfuse.errors import UnsupportedError
from fxfuse.layout import as_reshape, demands_order
from fxfuse.lowering.specialised import Specialised, at

# Operators that take integers for indices, make floats or booleans of them, or compare them for being equal.
_TAKE_INTEGERS = {
    *("embedding", "index", "index_select", "gather", "getitem"),
    *("to", "float", "bool", "type", "type_as", "_to_copy", "eq", "ne"),
}
# These may make integers of floats, among other things.
_CONVERSIONS = {"to", "type", "type_as", "_to_copy", "int", "long", "short", "byte", "char"}
_INTEGERS = {torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64}


def check_no_integers(graph: Specialised) -> None:
    """For engines that compute them in their own way.

    Raises:
        UnsupportedError: integers are computed, or are given and read otherwise than as indices or floats.
    """
    for node in graph.module.graph.nodes:
        if node.op == "placeholder" and node.meta["val"].dtype is torch.int64:  # others fit in 32 bits
            for user in node.users:
                is_embedding = isinstance(plain_layer(graph.module, user), nn.Embedding)
                if user.op != "output" and not is_embedding and operator_name(user) not in _TAKE_INTEGERS:
                    raise UnsupportedError(f"it computes integers its own way, {at(user)}")
        values = pytree.tree_leaves(node.meta.get("val")) if node.op.startswith("call") else ()
        for value in values:
            if isinstance(value, Tensor) and not (value.is_floating_point() or value.dtype is torch.bool):
                raise UnsupportedError(f"it computes integers its own way, {at(node)}")


def in_dtype(graph: Specialised, dtype: torch.dtype) -> fx.GraphModule:
    """Its module, computed in `dtype`; what goes in and comes out keeps its dtype.

    Raises:
        UnsupportedError: integers are made of floats, which would be others.
    """
    for node in graph.module.graph.nodes:
        made = node.meta["val"] if operator_name(node) in _CONVERSIONS else None
        is_integer = made is not None and made.dtype in _INTEGERS
        if is_integer and any(each.meta["val"].is_floating_point() for each in node.all_input_nodes):
            raise UnsupportedError(f"floats become integers, {at(node)}")
    twin = copy.deepcopy(graph.module).to(dtype)
    surround(twin, (_cast, dtype), [(_cast, like.dtype) for like in graph.results])
    return twin


def _cast(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.is_floating_point() else tensor


Step = tuple[Any, ...]
"""A function of a tensor, and its further arguments."""


def surround(module: fx.GraphModule, before: Step, after: Sequence[Step]) -> None:
    """Does something to each input of a graph, and to each of its results, in place."""
    graph = module.graph
    for node in graph.find_nodes(op="placeholder"):
        with graph.inserting_before(node.next):
            made = graph.call_function(before[0], (node, *before[1:]))
        made.meta = {**node.meta}
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
    (output,) = graph.find_nodes(op="output")
    results: Any = output.args[0]
    with graph.inserting_before(output):
        made_of = zip(results, after, strict=True)
        output.args = (tuple(graph.call_function(step[0], (each, *step[1:])) for each, step in made_of),)
    module.recompile()


def put_channels_last(module: fx.GraphModule, contiguous: Sequence[bool]) -> None:
    """Has images their channels last, as kernels have them, so that nothing is reordered in between.

    Args:
        module: the graph, which is changed.
        contiguous: which of its results are.
    """
    for tensor in (*module.parameters(), *module.buffers()):
        tensor.data = _with_channels_last(tensor.data)
    for node in module.graph.nodes:
        if demands_order(node):
            as_reshape(node)
    for node in [*module.graph.nodes]:
        _join_shuffle(node)
    surround(module, (_with_channels_last,), [(_in_order, each) for each in contiguous])


def _join_shuffle(node: fx.Node) -> None:
    """Puts torch's shuffle of channels, which keeps them last, in the place of what ends with `node`.

    That is a reshape (batch, channels, height, width) → (batch, groups, channels/groups, height, width), a
    transposition of its axes 1 and 2, and a reshape back, which would copy in the order of the axes.
    """
    copied = _producer(node, "contiguous", "clone") or node
    turned = _producer(copied, "transpose")
    split = turned and _producer(turned, "reshape")
    x = split and split.args[0]
    if operator_name(node) != "reshape" or not (turned and split and isinstance(x, fx.Node)):
        return
    if copied is not node and len(copied.users) > 1:  # who may write to it
        return
    outer, inner, result = (tuple(each.meta["val"].shape) for each in (x, split, node))
    given = arguments(turned)
    axes = {given[name] % len(inner) for name in ("dim0", "dim1")}
    if len(outer) != 4 or result != outer or axes != {1, 2} or inner != (outer[0], *inner[1:3], *outer[2:]):
        return
    with node.graph.inserting_before(node):
        made = node.graph.call_function(F.channel_shuffle, (x, inner[1]))
    made.meta = {**node.meta}
    node.replace_all_uses_with(made)
    for step in dict.fromkeys((node, copied, turned, split)):
        if not step.users:
            node.graph.erase_node(step)


def _producer(node: fx.Node, *names: str) -> fx.Node | None:
    """What `node` is a call on, if that is one of these operators."""
    given = node.args[0] if node.args else None
    return given if isinstance(given, fx.Node) and operator_name(given) in names else None


def _with_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


def _in_order(tensor: Tensor, is_contiguous: bool) -> Tensor:
    return tensor.contiguous() if is_contiguous else tensor
