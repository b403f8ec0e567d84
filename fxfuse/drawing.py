"""The graphs of a model and of its folded form side by side, as data: rows of nodes, lanes of values.

It is laid out as ``git log --graph`` is. Both graphs share the rows, in the order of execution, so that a
norm that is gone leaves its row empty in the folded one. A value has a lane from the node that makes it to
the last one that reads it. Parameters, and what is computed from these alone, are not drawn.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import count
from typing import Any, Literal

from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxfuse.calls import operator_name
from fxfuse.capture import Capture, capture
from fxfuse.errors import CaptureError
from fxfuse.nodes import Affine, LeftNorm, Linear, Norm
from fxfuse.ops import Reader
from fxfuse.places import place_of
from fxfuse.program import lifted
from fxfuse.records import Report
from fxfuse.shapes import observed_values
from fxfuse.transparent import Within
from fxfuse.tree import attribute, owners

State = Literal["same", "gone", "folded", "left", "new"]


@dataclass(frozen=True)
class Node:
    """A node in one of the two graphs.

    Attributes:
        operator: what it computes, "Conv2d" or "relu".
        name: qualified name of the module, or of the owner of the tensors; else its name in the graph.
        lane: its column, from 0.
        inputs: the rows of the nodes that it reads.
    """

    operator: str
    name: str
    lane: int
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Row:
    """A node before and after.

    Attributes:
        state: "gone" is a norm or other arithmetic that was folded away, "folded" an operator with new
            weights, "left" a norm that could not be folded, "new" what only the folded graph has.
        shape: of its value, "1×64×56×56"; empty if that is not known.
        where: the line of code that it comes from; empty if that is not known.
        before, after: the node; None where it is not in that graph.
    """

    state: State
    shape: str
    where: str
    before: Node | None
    after: Node | None

    @property
    def name(self) -> str:
        """The name in the source; of a new node that in the folded graph."""
        node = self.before or self.after
        assert node is not None
        return node.name


@dataclass(frozen=True)
class Drawing:
    """Both graphs."""

    rows: tuple[Row, ...]


def drawing(
    source: nn.Module | ExportedProgram,
    fused: nn.Module | ExportedProgram,
    report: Report,
    inputs: Sequence[Any] | None,
) -> Drawing | None:
    """The graphs of both models; None if the source could not be traced whole.

    Args:
        source: what was given to ``fuse``.
        fused: what that gave.
        report: its report.
        inputs: positional inputs, on which the shapes are seen; None if there are none.
    """
    if not isinstance(fused, fx.GraphModule | ExportedProgram):
        return None
    try:
        before = _Side.of_program(source) if isinstance(source, ExportedProgram) else _Side(capture(source))
    except CaptureError:  # of a GraphModule whose modules were kept
        return None
    if isinstance(fused, ExportedProgram):
        after = _Side.of_program(fused)
    else:
        after = _Side(Capture(fused, fused.graph, report.model))
    earlier = {node.name: node for node in before.nodes}
    later = {_name_in_source(node, after, before, earlier): node for node in after.nodes}
    order = _merged(earlier, later)
    left, right = before.drawn(earlier, order), after.drawn(later, order)
    shapes = before.shapes(inputs)
    refused = _with_owners(refusal.norm for refusal in report.refused)
    folds = (name for fold in (*report.folded, *report.constants) for name in fold.into)
    absorbing = _with_owners((*folds, *(merged.into for merged in report.merged)))
    rows = []
    for name in order:
        node = earlier[name] if name in earlier else later[name]
        state = _state(left.get(name), right.get(name), refused, absorbing)
        rows.append(Row(state, shapes.get(node, ""), place_of(node), left.get(name), right.get(name)))
    return Drawing(tuple(rows))


def _state(before: Node | None, after: Node | None, refused: set[str], absorbing: set[str]) -> State:
    if before is None or after is None:
        return "new" if before is None else "gone"
    if before.name in refused:
        return "left"
    return "folded" if after.name in absorbing else "same"


def _with_owners(names: Iterable[str]) -> set[str]:
    """The names, and those of the modules around them, which a graph may call whole."""
    return {each for name in names for each in (name, *owners(name))}


class _Side:
    """One of the graphs."""

    def __init__(self, captured: Capture, hidden: Iterable[fx.Node] = ()) -> None:
        self._capture = captured
        self.reader = Reader(captured.root, captured.graph)
        not_drawn = {*hidden, *captured.graph.find_nodes(op="get_attr")}
        self.nodes = [
            node
            for node in captured.graph.nodes
            if node not in not_drawn and node not in self.reader.constants
        ]
        self.names = {node.name for node in self.nodes}

    @classmethod
    def of_program(cls, program: ExportedProgram) -> _Side:
        """The graph of a program, without the inputs that stand for its parameters."""
        found = lifted(program, {**program.state_dict, **program.constants})
        return cls(found.capture, found.inputs.values())

    def drawn(self, nodes: Mapping[str, fx.Node], order: Sequence[str]) -> dict[str, Node]:
        """The nodes in the rows that `order` gives them."""
        rows = {nodes[name]: row for row, name in enumerate(order) if name in nodes}
        inputs = {
            row: tuple(rows[each] for each in node.all_input_nodes if each in rows)
            for node, row in rows.items()
        }
        lanes = _lanes(inputs)
        return {
            order[row]: Node(self._operator(node), self._name(node), lanes[row], inputs[row])
            for node, row in rows.items()
        }

    def shapes(self, inputs: Sequence[Any] | None) -> dict[fx.Node, str]:
        """The shapes of the values: those of a compiler if there are any, or else those of a run."""
        values = {node: node.meta["val"] for node in self.nodes if "val" in node.meta}
        if not values and inputs is not None:
            values = dict(observed_values(self._capture.root, self._capture.graph, inputs))
        return {
            node: "×".join(map(str, value.shape))
            for node, value in values.items()
            if isinstance(value, Tensor)
        }

    def _operator(self, node: fx.Node) -> str:
        if node.op == "call_module":
            return type(attribute(self._capture.root, str(node.target))).__name__
        if node.op in ("placeholder", "output"):
            return "input" if node.op == "placeholder" else "output"
        return operator_name(node) or getattr(node.target, "__name__", str(node.target))

    def _name(self, node: fx.Node) -> str:
        op = self.reader.read(node)
        if node.op == "call_module":
            return str(node.target)
        if isinstance(op, Linear) and isinstance(op.weight, str):
            return op.weight.removesuffix(".weight")
        if isinstance(op, Norm | LeftNorm):
            return op.name
        return (op.norm if isinstance(op, Affine) else None) or node.name


def _name_in_source(node: fx.Node, after: _Side, before: _Side, earlier: Mapping[str, fx.Node]) -> str:
    """What `node` was called before: an output of a program keeps its name, whatever node it becomes."""
    twin = earlier.get(node.name)
    while twin is not None:
        op = before.reader.read(twin)
        if not isinstance(op, Norm | Affine | Within) or isinstance(after.reader.read(node), type(op)):
            break
        twin = op.input
    return node.name if twin is None or twin.name in after.names else twin.name


def _merged(earlier: Iterable[str], later: Iterable[str]) -> list[str]:
    """All names in the order of execution: what is new comes behind what it follows."""
    known = {*earlier}
    behind: dict[str, list[str]] = defaultdict(list)
    last = ""
    for name in later:
        if name in known:
            last = name
        else:
            behind[last].append(name)
    return [*behind[""], *(each for name in earlier for each in (name, *behind[name]))]


def _lanes(inputs: Mapping[int, Sequence[int]]) -> dict[int, int]:
    """A lane for each row, given the rows that each reads: no value runs through the node of another.

    A node takes over the lane of an input that nobody reads after it, or else the first that is free.
    """
    last = {source: row for row, sources in inputs.items() for source in sources}
    lanes: dict[int, int] = {}
    taken: dict[int, int] = {}
    for row, sources in inputs.items():
        ended = [lanes[source] for source in sources if last[source] == row]
        taken = {lane: end for lane, end in taken.items() if end > row}
        lanes[row] = min(ended, default=next(lane for lane in count() if lane not in taken))
        taken[lanes[row]] = last.get(row, row)
    return lanes
