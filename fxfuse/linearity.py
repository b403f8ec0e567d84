"""Every value of a graph as a linear function of the values before it, as far back as nobody else reads them.

The graph is read as it will be once the moves of the plan are made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

from torch import fx

from fxfuse.aliases import asks_for_kind
from fxfuse.channels import Channels
from fxfuse.forms import Form, Total
from fxfuse.geometry import Geometry, multiplications
from fxfuse.memory import Memory
from fxfuse.nodes import Affine, Linear, Norm
from fxfuse.ops import Reader
from fxfuse.plan import Barred, Move
from fxfuse.shapes import GraphShapes
from fxfuse.transparent import Sum, Within

# How many steps, one after another, are read as one function at most.
_DEPTH = 50


@dataclass(frozen=True)
class Surroundings:
    """What is known of a graph.

    Attributes:
        reader: reads its nodes.
        shapes: what is known of the shapes of its values.
        moves: the moves of the plan, by their nodes.
        memory: who writes to what.
        acting: along which axis a map acts; None if that is not known.
        barred: what is not to be made, and why not.
    """

    reader: Reader
    shapes: GraphShapes
    moves: Mapping[fx.Node, Move]
    memory: Memory
    acting: Callable[[Norm | Affine], Channels | None]
    barred: Barred


@dataclass(frozen=True)
class Term:
    """A part of a sum.

    Attributes:
        value: the node that gives it.
        parent: the sum that reads it.
        factor: what it is multiplied by.
        forms: it as functions of others, by these.
    """

    value: fx.Node
    parent: fx.Node
    factor: float
    forms: Mapping[fx.Node, Form]


def holds_all(wide: Form, parts: Sequence[Form]) -> bool:
    """Whether all parts can be the same functions with the kernel of one of them."""
    if wide.geometry is None or wide.host is None:
        return False
    for part in parts:
        channels = wide.channels if part.channels is None else part.channels
        into = channels if part.in_channels is None else part.in_channels
        seen = replace(part, channels=channels).seen_as(len(wide.geometry.axes))
        if (channels, into) != (wide.channels, wide.in_channels):
            return False
        if seen is None or not wide.geometry.holds(seen):
            return False
    return True


class Forms:
    """Values as linear functions of values before them."""

    def __init__(self, graph: fx.Graph, known: Surroundings) -> None:
        self.reader = known.reader
        self.shapes = known.shapes
        self._moves = moves = known.moves
        self._acting = known.acting
        self._barred = known.barred
        self._found: dict[fx.Node, dict[fx.Node, Form]] = {}
        self._readers: dict[fx.Node, set[fx.Node]] = defaultdict(set)
        self.asked: set[fx.Node] = set()  # the values whose kind is asked for
        for node in graph.nodes:
            passed_over = node in moves or asks_for_kind(node) or known.reader.is_unused(node)
            for value in () if passed_over else node.all_input_nodes:
                self._readers[self.value(value)].add(node)
            if asks_for_kind(node):
                self.asked |= {self.value(value) for value in node.all_input_nodes}
        sites = [site for move in moves.values() for site in move.sites]
        self._shifted = {site.node for site in sites if site.channels.shift}

    def value(self, node: fx.Node) -> fx.Node:
        """What is read in the place of `node` once the moves are made."""
        while node in self._moves:
            node = self._moves[node].source.input
        return node

    def of(self, node: fx.Node) -> dict[fx.Node, Form]:
        """The value of `node` as functions of others, by these."""
        if node not in self._found:
            found: dict[fx.Node, Form] = {}
            waiting = [*self._forms(node)]
            while waiting:
                form = waiting.pop(0)
                if form is not None and form.depth <= _DEPTH and form.source not in found:
                    form = replace(form, shifts=form.shifts or node in self._shifted)
                    found[form.source] = form
                    readers = self._readers[form.source]
                    if len(readers) > 1 and readers <= form.nodes:
                        waiting += [self._joined(inner, form) for inner in self.of(form.source).values()]
            self._found[node] = found
        return self._found[node]

    def before(self, value: fx.Node, reader: fx.Node) -> Mapping[fx.Node, Form]:
        """The same for what `reader` reads: of itself too, and of others if nobody else reads it."""
        value = self.value(value)
        own = {value: Form(value, value)}
        return own | self.of(value) if self._readers[value] == {reader} else own

    def terms(self, node: fx.Node) -> tuple[list[Term], set[fx.Node]]:
        """What is added up in `node`, and in sums that are read by it alone; and these sums."""
        terms: list[Term] = []
        sums = {node: 1.0}
        waiting = [node]
        while waiting:
            parent = waiting.pop()
            op = self.reader.read(parent)
            assert isinstance(op, Sum) and op.factors is not None
            for source, factor in zip(op.inputs, op.factors, strict=True):
                value, total = self.value(source), factor * sums[parent]
                if self.is_inner(value) and parent in self._readers[value]:
                    sums[value] = total
                    waiting.append(value)
                else:
                    terms.append(Term(value, parent, total, self.before(value, parent)))
        return terms, {*sums}

    def is_inner(self, node: fx.Node) -> bool:
        """Whether it is a sum that nobody reads but another one."""
        readers = self._readers[node]
        return self.is_sum(node) and len(readers) == 1 and all(map(self.is_sum, readers))

    def is_sum(self, node: fx.Node) -> bool:
        """Whether it adds different values, with fixed factors."""
        op = self.reader.read(node)
        if not isinstance(op, Sum) or op.factors is None:
            return False
        return len({*map(self.value, op.inputs)}) == len(op.inputs)

    def _forms(self, node: fx.Node) -> Iterator[Form | None]:
        op = self.reader.read(node)
        if isinstance(op, Linear):
            yield from (self._convolved(form, node, op) for form in self.before(op.input, node).values())
        elif isinstance(op, Norm | Affine):
            yield from (self._mapped(form, node, op) for form in self.before(op.input, node).values())
        elif isinstance(op, Within) and op.window is not None:
            yield from (self._averaged(form, node, op) for form in self.before(op.input, node).values())
        elif isinstance(op, Within) and op.is_identity:
            for form in self.before(op.input, node).values():
                yield replace(
                    form, node=node, step=None, parts=(form,), depth=form.depth + 1, nodes=form.nodes | {node}
                )
        elif self.is_sum(node):
            terms, sums = self.terms(node)
            for source in terms[0].forms:
                if all(source in term.forms for term in terms):
                    yield self.total(node, source, terms, sums)

    def _convolved(self, form: Form, node: fx.Node, op: Linear) -> Form | None:
        if op.geometry is None:
            return None
        own = Form(
            node=node,
            source=form.node,
            step=op,
            nodes=frozenset({node}),
            geometry=op.geometry,
            channels=op.channels,
            in_channels=op.in_channels,
            axis=-1 - op.dims,
            host=node,
            shifts=op.bias is not None,
            cost=multiplications(op.geometry, op.channels, op.in_channels),
            depth=1,
        )
        joined = self._joined(form, own)
        return None if joined is None else replace(joined, step=op)

    def _joined(self, form: Form, after: Form) -> Form | None:
        """What `after` makes of what `form` gives."""
        if form.channels not in (None, after.in_channels) and after.in_channels is not None:
            return None
        if form.axis not in (None, after.axis) and after.axis is not None:
            return None
        geometry = after.geometry or form.geometry
        if form.geometry is not None and after.geometry is not None:
            geometry = form.geometry.then(after.geometry)
            if geometry is None:
                return None
        if after.geometry is not None and after.geometry.is_bordered and form.shifts:
            return None
        hosts = (each.host for each in (after, form) if each.geometry == geometry)
        strides = () if after.geometry is None else (axis.stride for axis in after.geometry.axes)
        return Form(
            node=after.node,
            source=form.source,
            step=after,
            parts=(form,),
            nodes=form.nodes | after.nodes,
            geometry=geometry,
            channels=form.channels if after.channels is None else after.channels,
            in_channels=after.in_channels if form.in_channels is None else form.in_channels,
            axis=form.axis if after.axis is None else after.axis,
            host=next((host for host in hosts if host is not None), None),
            shifts=form.shifts or after.shifts,
            cost=after.cost + form.cost * prod(strides),
            depth=form.depth + after.depth,
            assumed=form.assumed | after.assumed,
        )

    def _mapped(self, form: Form, node: fx.Node, op: Norm | Affine) -> Form | None:
        self.shapes.consulted.clear()
        acts = None if (node, "merged") in self._barred else self._acting(op)
        if acts is None or len(acts.axes) > 1:
            return None
        axis = acts.axes[0] if acts.axes else form.axis
        channels = len(acts.index) if acts.axes else form.channels
        if form.axis not in (None, axis) or form.channels not in (None, channels):
            return None
        if isinstance(op, Affine) and acts.axes and form.channels is None:
            shape = self.shapes.of(op.input)
            if shape is None or shape[acts.axes[0]] != channels:
                return None  # the value might be broadcast to the constant
        assumed = self._assumed()
        return replace(
            form,
            node=node,
            step=op,
            parts=(form,),
            depth=form.depth + 1,
            nodes=form.nodes | {node},
            channels=channels,
            in_channels=channels if form.geometry is None else form.in_channels,
            axis=axis,
            shifts=form.shifts or acts.shift,
            cost=form.cost + (channels or 1),
            acts=acts,
            assumed=form.assumed | assumed,
        )

    def _averaged(self, form: Form, node: fx.Node, op: Within) -> Form | None:
        assert op.window is not None
        dims = len(op.window.axes)
        channels: object = form.channels
        if channels is None:
            # Counted from the end; and a convolution of so many channels reads the same value, or this one.
            shape = self.shapes.of(op.input)
            channels = None if shape is None or len(shape) <= dims else shape[-1 - dims]
        if not isinstance(channels, int):
            return None
        geometry = Geometry(op.window.axes, channels)
        own = Form(
            node=node,
            source=form.node,
            step=op.window,
            nodes=frozenset({node}),
            geometry=geometry,
            channels=channels,
            in_channels=channels,
            axis=-1 - dims,
            cost=multiplications(geometry, channels, channels),
            depth=1,
        )
        joined = self._joined(form, own)
        return None if joined is None else replace(joined, step=op.window)

    def _assumed(self) -> frozenset[tuple[fx.Node, int]]:
        """What has to be assumed for what was asked of shapes."""
        found = (self.shapes.assumed(each) for each in {*self.shapes.consulted})
        return frozenset[tuple[fx.Node, int]]().union(*found)

    def total(
        self, node: fx.Node, source: fx.Node, terms: Sequence[Term], sums: Iterable[fx.Node]
    ) -> Form | None:
        """The sum of `terms`, in `sums`, as a function of `source`."""
        parts = [term.forms[source] for term in terms]
        wide = next((part for part in parts if holds_all(part, parts)), None)
        if wide is None and any(part.geometry is not None for part in parts):
            return None
        known = wide or max(parts, key=lambda part: part.channels or 0)
        axes = {part.axis for part in parts if part.axis is not None}
        if len(axes) > 1 or any(part.channels not in (None, known.channels) for part in parts):
            return None
        return Form(
            node=node,
            source=source,
            step=Total(tuple(term.factor for term in terms)),
            parts=tuple(parts),
            nodes=frozenset(sums).union(*(part.nodes for part in parts)),
            geometry=known.geometry,
            channels=known.channels,
            in_channels=known.in_channels,
            axis=known.axis,
            host=known.host,
            shifts=any(part.shifts for part in parts),
            cost=sum(part.cost for part in parts) + (len(parts) - 1) * (known.channels or 1),
            depth=1 + max(part.depth for part in parts),
            assumed=frozenset[tuple[fx.Node, int]]().union(*(part.assumed for part in parts)),
        )
