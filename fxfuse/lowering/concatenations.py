"""Concatenations that go on, as in DenseNet: each part is copied once, not again by every one of them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import fx

from fxfuse.memory import Memory
from fxfuse.nodes import LeftNorm, Norm
from fxfuse.ops import Reader
from fxfuse.transparent import Concat

Parts = Mapping[fx.Node, Sequence[fx.Node]]
"""What is in each concatenation; one that begins with another one begins with the parts of that."""


def grow(module: fx.GraphModule) -> bool:
    """Has images that are concatenated again with more channels grow in one block, channels last.

    What reads them reads a view with gaps. That is done where only norms do, which give a block of their own.

    Args:
        module: the graph, which is changed. Values are known by ``meta["val"]``.

    Returns:
        Whether there are any. Then the graph writes in place.
    """
    reader = Reader(module, module.graph)
    memory = Memory(module.graph, reader, {})
    parts: dict[fx.Node, list[fx.Node]] = {}
    for node in module.graph.nodes:
        tensors = _concatenated(reader, node)
        if tensors and _may_grow(reader, memory, node, tensors):
            first, *more = tensors
            parts[node] = [*parts.get(first, [first]), *more]
    chains = [*_chains(parts)]
    for chain in chains:
        _write_to_one_block(chain, parts)
    module.recompile()
    return bool(chains)


def _concatenated(reader: Reader, node: fx.Node) -> tuple[fx.Node, ...]:
    """The images that `node` concatenates by their channels; none if it does something else."""
    op = reader.read(node)
    if isinstance(op, Concat) and op.axis in {1, -3} and node.meta["val"].dim() == 4:
        return op.inputs
    return ()


def _may_grow(reader: Reader, memory: Memory, node: fx.Node, tensors: Sequence[fx.Node]) -> bool:
    """Whether norms and longer concatenations read it, of one dtype, and nobody writes to any of it later."""
    for user in node.users:
        longer = _concatenated(reader, user)
        goes_on = longer[:1] == (node,) and node not in longer[1:]
        if not goes_on and not isinstance(reader.read(user), (Norm, LeftNorm)):
            return False
    values = {node, *tensors}
    is_written = reader.written_inputs(node) or any(map(memory.is_written_after, values))
    return len({value.meta["val"].dtype for value in values}) == 1 and not is_written


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
