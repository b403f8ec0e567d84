"""Who may write to the memory of a value."""

from __future__ import annotations

from collections.abc import Container, Iterable

from torch import fx

from fxfuse.nodes import Affine, Linear, Norm
from fxfuse.ops import Reader
from fxfuse.transparent import Concat, Sum


class Memory:
    """The writes of one graph.

    Args:
        graph: the graph.
        reader: reads its nodes.
        gone: the nodes that are to go, so that their input is read in their place; may grow.
    """

    def __init__(self, graph: fx.Graph, reader: Reader, gone: Container[fx.Node]) -> None:
        self._reader = reader
        self._gone = gone
        self._order = {node: number for number, node in enumerate(graph.nodes)}
        writes = ((node, {*reader.written_inputs(node)}) for node in graph.nodes)
        self._writes: list[tuple[fx.Node, set[fx.Node]]] = [each for each in writes if each[1]]

    def is_written(self, value: fx.Node) -> bool:
        """Whether anybody may write to `value`, or to what it is a view of."""
        return any(self._may_share(value, written) for _, written in self._writes)

    def writer_between(self, value: fx.Node, first: fx.Node, last: Iterable[fx.Node]) -> fx.Node | None:
        """Who may write to `value` after `first` has read it, and before all of `last` have."""
        end = max(self._order[node] for node in last)
        writers = (
            writer
            for writer, written in self._writes
            if self._order[first] < self._order[writer] <= end and self._may_share(value, written)
        )
        return next(writers, None)

    def _may_share(self, value: fx.Node, written: set[fx.Node]) -> bool:
        """Whether one of these may be a view of what `value` is, or was made from."""
        return not {self._origin(value), value}.isdisjoint({self._origin(each) for each in written} | written)

    def _origin(self, value: fx.Node) -> fx.Node:
        """Where the memory of `value` may come from: past what may give a view of its first input."""
        while True:
            op, sources = self._reader.read(value), value.all_input_nodes
            computes = isinstance(op, (Norm, Sum, Affine)) and value not in self._gone
            fresh = isinstance(op, (Linear, Concat)) or (computes and not self._reader.written_inputs(value))
            if fresh or not sources or value.op == "get_attr":
                return value
            value = sources[0]
