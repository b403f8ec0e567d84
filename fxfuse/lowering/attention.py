"""Attention in words in which engines compute what torch does."""

from __future__ import annotations

import copy
import inspect
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfuse.calls import arguments, operator_name
from fxfuse.errors import UnsupportedError
from fxfuse.lowering.specialised import at
from fxfuse.tree import attribute

# The largest product of queries and keys, in elements: torch's kernel has it in parts, this has all of it.
_LARGEST = 1 << 23


def write_out(module: fx.GraphModule) -> None:
    """Writes attention without a mask, or under a constant one, as softmax(scale · Q Kᵀ + mask) V.

    Kernels for several operators are made of that. torch has one kernel for all of it, which takes longer on
    a CPU, and for a mask of three axes none: then it looks in each call for rows that are masked altogether,
    which a constant mask tells before.

    Attention Is All You Need, equation 1; the scale is that of ``F.scaled_dot_product_attention``.

    Args:
        module: the graph, which is changed. Values are known by ``meta["val"]``.
    """
    for node in [*module.graph.nodes]:
        given = arguments(node) if operator_name(node) == "scaled_dot_product_attention" else None
        if given and _is_plain(module, given):
            with module.graph.inserting_before(node):
                made = _written(module.graph, given)
            made.meta = {**node.meta}
            node.replace_all_uses_with(made)
            module.graph.erase_node(node)
    module.recompile()


def without_masked_rows(module: fx.GraphModule) -> fx.GraphModule:
    """A copy in which rows of attention are 0 where a mask that is computed leaves nothing to attend to.

    They are in torch; runtimes have other numbers there, or none.

    Raises:
        UnsupportedError: such a mask is given to a module that attends.
    """
    own = copy.deepcopy(module)
    for node in own.graph.find_nodes(op="call_module"):
        layer = own.get_submodule(str(node.target))
        if any(isinstance(each, nn.MultiheadAttention) for each in layer.modules()):
            bound = inspect.signature(layer.forward).bind(*node.args, **node.kwargs).arguments
            masks = [value for name, value in bound.items() if "mask" in name and isinstance(value, fx.Node)]
            if any(mask.op != "get_attr" for mask in masks):
                raise UnsupportedError(f"it attends under masks that are computed its own way, {at(node)}")
    for node in [*own.graph.nodes]:
        given = arguments(node) if operator_name(node) == "scaled_dot_product_attention" else None
        mask = given and given["attn_mask"]
        if isinstance(mask, fx.Node) and mask.op != "get_attr":
            with own.graph.inserting_after(node):
                made = own.graph.call_function(_zero_where_masked, (node, mask))
            made.meta = {**node.meta}
            node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
    own.recompile()
    return own


def _zero_where_masked(attended: Tensor, mask: Tensor) -> Tensor:
    allowed = mask if mask.dtype is torch.bool else mask != -torch.inf
    return attended.masked_fill(~allowed.any(-1, keepdim=True), 0.0)


def _is_plain(module: fx.GraphModule, given: dict[str, Any]) -> bool:
    """Whether it is computed in float32, for each head and sample apart, and no row is masked altogether."""
    query, key, value = (given[name].meta["val"] for name in ("query", "key", "value"))
    mask = given["attn_mask"]
    if mask is not None:
        if mask.op != "get_attr" or mask.meta["val"].dtype != query.dtype:
            return False
        tensor = attribute(module, mask.target)
        if tensor.dim() > query.dim() or not tensor.isfinite().all():
            return False
    return (
        query.dtype is torch.float32
        and query.shape[-2] > 1  # oneDNN Graph gives other numbers for products of single rows
        and query.shape[:-2] == key.shape[:-2] == value.shape[:-2]
        and query.shape[:-1].numel() * key.shape[-2] <= _LARGEST
        and not (given["dropout_p"] or given["is_causal"])
    )


def _written(graph: fx.Graph, given: dict[str, Any]) -> fx.Node:
    query, key, value = (given[name] for name in ("query", "key", "value"))
    scale = query.meta["val"].shape[-1] ** -0.5 if given["scale"] is None else given["scale"]
    product = graph.call_function(torch.matmul, (query, graph.call_method("transpose", (key, -2, -1))))
    logits = graph.call_function(torch.mul, (product, scale))
    if given["attn_mask"] is not None:
        logits = graph.call_function(torch.add, (logits, given["attn_mask"]))
    return graph.call_function(torch.matmul, (graph.call_method("softmax", (logits, -1)), value))
