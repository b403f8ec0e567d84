"""Concatenations that go on, as in DenseNet: each part is copied once, not again by every one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import fx
from torch.nn.modules.batchnorm import _BatchNorm

from fxfuse.aliases import plain_layer
from fxfuse.calls import arguments, operator_name
from fxfuse.layers import NORM_FUNCTIONS
from fxfuse.lowering.specialised import WRITES

Parts = Mapping[fx.Node, Sequence[fx.Node]]
"""What concatenations are made of; one that begins with another one, of the parts of that."""


def grow(module: fx.GraphModule) -> None:
    """Has images that are concatenated again with more channels grow in one block, channels last.

    What reads them reads a view with gaps. That is done where norms do, which write a block of their own.

    Args:
        module: the graph, which is changed. Values are known by ``meta["val"]``.
    """
    parts: dict[fx.Node, list[fx.Node]] = {}
    for node in module.graph.nodes:
        if tensors := _growing(module, node):
            first, *more = tensors
            parts[node] = [*parts.get(first, [first]), *more]
    for chain in _chains(parts):
        _write_to_one_block(chain, parts)
    module.recompile()


def _growing(module: fx.GraphModule, node: fx.Node) -> Sequence[fx.Node]:
    """The images that are concatenated by their channels, if nothing speaks against that they grow."""
    tensors = _concatenated(node)
    if not tensors:
        return []
    values = [node, *tensors]
    users = {user for value in values for user in value.users if user.op != "output"}
    is_read = (_is_norm(module, user) or _concatenated(user)[:1] == [node] for user in node.users)
    is_written = any(user.meta.get(WRITES, True) for user in users)
    dtypes = {value.meta["val"].dtype for value in values}
    return tensors if len(dtypes) == 1 and not is_written and all(is_read) else []


def _concatenated(node: fx.Node) -> list[fx.Node]:
    """The images that `node` concatenates by their channels; none if it does something else."""
    if operator_name(node) not in {"cat", "concat", "concatenate"} or node.meta["val"].dim() != 4:
        return []
    given = arguments(node)
    return [*given["tensors"]] if given["dim"] in (1, -3) else []


def _is_norm(module: fx.GraphModule, node: fx.Node) -> bool:
    return operator_name(node) in NORM_FUNCTIONS or isinstance(plain_layer(module, node), _BatchNorm)


def _chains(parts: Parts) -> Iterator[list[fx.Node]]:
    """Two or more of which each is the one before with more parts."""
    chains: dict[tuple[fx.Node, ...], list[fx.Node]] = {}  # by the parts of their last
    for node, own in parts.items():
        starts = (tuple(own[:count]) for count in range(len(own) - 1, 0, -1))
        chain = next((chains.pop(start) for start in starts if start in chains), [])
        chains[tuple(own)] = [*chain, node]
    return (chain for chain in chains.values() if len(chain) > 1)


def _write_to_one_block(chain: Sequence[fx.Node], parts: Parts) -> None:
    """Puts views of one block, to which each part is written once, in the place of concatenations."""
    graph = chain[0].graph
    images, channels, *size = chain[-1].meta["val"].shape
    with graph.inserting_before(chain[0]):
        rows = graph.call_method("new_empty", (parts[chain[0]][0], (images, *size, channels)))
        block = graph.call_method("permute", (rows, (0, 3, 1, 2)))
    written: Sequence[fx.Node] = []
    end = 0
    for node in chain:
        with graph.inserting_before(node):
            for part in parts[node][len(written) :]:
                count = part.meta["val"].shape[1]
                room = graph.call_function(torch.narrow, (block, 1, end, count))
                graph.call_method("copy_", (room, part))
                end += count
            grown = graph.call_function(torch.narrow, (block, 1, 0, end))
        grown.meta = {**node.meta}
        node.replace_all_uses_with(grown)
        graph.erase_node(node)
        written = parts[node]
