"""Images with their channels last, as kernels read them, through a whole graph."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxfuse.calls import arguments, operator_name
from fxfuse.layout import as_reshape, demands_order
from fxfuse.lowering.specialised import surround


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
