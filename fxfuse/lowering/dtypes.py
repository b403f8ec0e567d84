"""What engines ask of the dtypes in a specialised graph, and a graph that computes in another one."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse.aliases import plain_layer
from fxfuse.calls import operator_name
from fxfuse.errors import UnsupportedError
from fxfuse.lowering.specialised import Specialised, at, surround

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
