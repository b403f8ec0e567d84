"""Who may write to the memory of a value."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial

from torch import fx

from fxfuse.aliases import Roots, roots
from fxfuse.ops import Reader


class Memory:
    """The writes of one graph.

    Args:
        graph: the graph.
        reader: reads its nodes.
        gone: the nodes that are to go, and what is read in the place of each; may grow, not change.

    Attributes:
        order: the place of each node in the graph.
    """

    def __init__(self, graph: fx.Graph, reader: Reader, gone: Mapping[fx.Node, fx.Node]) -> None:
        self._roots = partial(roots, graph, reader.root, reader.written_inputs, gone)
        self._gone = gone
        self._found: tuple[int, Roots] = (-1, {})  # of so many nodes that are to go
        self.order = {node: number for number, node in enumerate(graph.nodes)}
        writes = ((node, {*reader.written_inputs(node)}) for node in graph.nodes)
        self._writes: list[tuple[fx.Node, set[fx.Node]]] = [each for each in writes if each[1]]

    def is_written_after(self, value: fx.Node) -> bool:
        """Whether anybody may write to `value`, or to what it is a view of, once there is one."""
        return any(self._writers(value, self.order[value] + 1, len(self.order)))

    def writer_between(self, value: fx.Node, first: fx.Node, last: Iterable[fx.Node]) -> fx.Node | None:
        """Who may write to `value` after `first` has read it, and before all of `last` have."""
        end = max(self.order[node] for node in last)
        return next(self._writers(value, self.order[first] + 1, end), None)

    def _writers(self, value: fx.Node, first: int, last: int) -> Iterator[fx.Node]:
        writes = [each for each in self._writes if first <= self.order[each[0]] <= last]
        if writes and self._found[0] != len(self._gone):
            self._found = len(self._gone), self._roots()
        found = self._found[1]
        for writer, written in writes:
            if any(found[each] & found[value] for each in written):
                yield writer
