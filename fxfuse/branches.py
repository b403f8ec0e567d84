"""Which operators are one: parallel ones on the same value, whose results are added up, and some in a row.

Every value is read as a linear function of the values before it, as far back as nobody else reads what lies
between. A sum is one operator if one of its parts has a kernel that holds those of all others, and a part of
a sum if that is true of some. Nothing is merged that would cost more afterwards, and nothing is edited here.

The graph is read as it will be once the moves of the plan are made.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import torch
from torch import fx

from fxfuse.aliases import asks_for_kind
from fxfuse.calls import gives_several
from fxfuse.channels import Channels
from fxfuse.forms import Form, Total
from fxfuse.geometry import Geometry, multiplications
from fxfuse.memory import Memory
from fxfuse.nodes import Affine, Linear, Norm
from fxfuse.ops import Reader
from fxfuse.plan import Barred, Merge, Move
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


def merges(graph: fx.Graph, known: Surroundings) -> Iterator[Merge]:
    """What can be merged in `graph`."""
    moves = known.moves
    forms = _Forms(graph, known)
    for node in graph.nodes:  # in this order no form is asked for before those that it is made of
        if not forms.is_inner(node):
            forms.of(node)
    merger = _Merger(forms, known.memory, known.barred)
    done = {*moves}
    for node in reversed(graph.nodes):
        if node not in done:
            found, seen = merger.at(node)
            done |= seen
            yield from found


class _Forms:
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
            found = (form for form in self._forms(node) if form is not None and form.depth <= _DEPTH)
            self._found[node] = {form.source: form for form in found}
        return self._found[node]

    def before(self, value: fx.Node, reader: fx.Node) -> Mapping[fx.Node, Form]:
        """The same for what `reader` reads: of itself too, and of others if nobody else reads it."""
        value = self.value(value)
        own = {value: Form(value, value)}
        return own | self.of(value) if self._readers[value] == {reader} else own

    def terms(self, node: fx.Node) -> tuple[list[_Term], set[fx.Node]]:
        """What is added up in `node`, and in sums that are read by it alone; and these sums."""
        terms: list[_Term] = []
        sums = {node: 1.0}
        waiting = [node]
        while waiting:
            parent = waiting.pop()
            op = self.reader.read(parent)
            assert isinstance(op, Sum) and op.factors is not None
            for source, factor in zip(op.inputs, op.factors, strict=True):
                value, total = self.value(source), factor * sums[parent]
                if self.is_inner(value):
                    sums[value] = total
                    waiting.append(value)
                else:
                    terms.append(_Term(value, parent, total, self.before(value, parent)))
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
        if op.geometry is None or form.axis not in (None, -1 - op.dims):
            return None
        if form.channels not in (None, op.in_channels) or (op.bordered and form.shifts):
            return None
        geometry: Geometry = op.geometry
        host: fx.Node | None = node
        if form.geometry is not None:
            joined = form.geometry.then(op.geometry)
            if joined is None or joined not in (op.geometry, form.geometry):
                return None
            geometry = joined
            host = node if joined == op.geometry else form.host
        own = multiplications(op.geometry, op.channels, op.in_channels)
        return Form(
            node,
            form.source,
            op,
            (form,),
            form.nodes | {node},
            geometry,
            op.channels,
            op.in_channels if form.in_channels is None else form.in_channels,
            -1 - op.dims,
            host,
            form.shifts or op.bias is not None or node in self._shifted,
            own + form.cost * prod(axis.stride for axis in op.geometry.axes),
            depth=form.depth + 1,
            assumed=form.assumed,
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
        # Counted from the end; and a convolution of so many channels reads the same value, or this one.
        shape = self.shapes.of(op.input)
        channels = None if shape is None or len(shape) <= dims else shape[-1 - dims]
        if not isinstance(channels, int) or form.channels not in (None, channels):
            return None
        if form.geometry is not None or form.axis not in (None, -1 - dims):
            return None
        geometry = Geometry(op.window.axes, channels)
        if form.shifts and any(axis.padding for axis in geometry.axes):
            return None
        return replace(
            form,
            node=node,
            step=op.window,
            parts=(form,),
            depth=form.depth + 1,
            nodes=form.nodes | {node},
            geometry=geometry,
            channels=channels,
            in_channels=channels,
            axis=-1 - dims,
            cost=form.cost + multiplications(geometry, channels, channels),
        )

    def _assumed(self) -> frozenset[tuple[fx.Node, int]]:
        """What has to be assumed for what was asked of shapes."""
        found = (self.shapes.assumed(each) for each in {*self.shapes.consulted})
        return frozenset[tuple[fx.Node, int]]().union(*found)

    def total(
        self, node: fx.Node, source: fx.Node, terms: Sequence[_Term], sums: Iterable[fx.Node]
    ) -> Form | None:
        """The sum of `terms`, in `sums`, as a function of `source`."""
        parts = [term.forms[source] for term in terms]
        wide = next((part for part in parts if _holds_all(part, parts)), None)
        if wide is None and any(part.geometry is not None for part in parts):
            return None
        known = wide or max(parts, key=lambda part: part.channels or 0)
        axes = {part.axis for part in parts if part.axis is not None}
        if len(axes) > 1 or any(part.channels not in (None, known.channels) for part in parts):
            return None
        return Form(
            node,
            source,
            Total(tuple(term.factor for term in terms)),
            tuple(parts),
            frozenset(sums).union(*(part.nodes for part in parts)),
            known.geometry,
            known.channels,
            known.in_channels,
            known.axis,
            known.host,
            any(part.shifts for part in parts),
            sum(part.cost for part in parts) + (len(parts) - 1) * (known.channels or 1),
            depth=1 + max(part.depth for part in parts),
            assumed=frozenset[tuple[fx.Node, int]]().union(*(part.assumed for part in parts)),
        )


@dataclass(frozen=True)
class _Term:
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


def _holds_all(wide: Form, parts: Sequence[Form]) -> bool:
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


def _switches_mode(node: fx.Node) -> bool:
    """Whether what comes after it computes in another way: with gradients or without, in another dtype."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name.endswith(("_grad_enabled", "_autocast", "_inference_mode"))


class _Sums:
    """Sums that are read by one another, and what each adds up, while terms are taken away."""

    def __init__(self, sums: Iterable[fx.Node], forms: _Forms) -> None:
        self._asked = forms.asked
        self._parts: dict[fx.Node, dict[fx.Node, tuple[fx.Node, float]]] = {}
        for node in sums:
            op = forms.reader.read(node)
            assert isinstance(op, Sum) and op.factors is not None
            parts = zip(op.inputs, op.factors, strict=True)
            self._parts[node] = {forms.value(part): (part, factor) for part, factor in parts}

    def without(self, values: Sequence[fx.Node]) -> dict[fx.Node, fx.Node] | None:
        """Takes away terms, if that needs no factor for what stays.

        Returns:
            The sums of which one part is left, and that part.
        """
        parts = {node: dict(inside) for node, inside in self._parts.items()}
        bypassed = {}
        for value in values:
            parent = next(node for node, inside in parts.items() if value in inside)
            del parts[parent][value]
            ((kept, (node, factor)),) = parts.pop(parent).items()
            if factor != 1 or parent in self._asked:
                return None
            bypassed[parent] = node
            above = next((inside for inside in parts.values() if parent in inside), None)
            if above is not None:
                above[kept] = (node, above.pop(parent)[1])
        self._parts = parts
        return bypassed


class _Merger:
    """Chooses what is merged."""

    def __init__(self, forms: _Forms, memory: Memory, barred: Barred) -> None:
        self._forms = forms
        self._reader = forms.reader
        self._memory = memory
        self._barred = barred
        self._switches = [place for node, place in memory.order.items() if _switches_mode(node)]

    def at(self, node: fx.Node) -> tuple[list[Merge], set[fx.Node]]:
        """What becomes one operator that gives the value of `node`; or parts of the sum that it is.

        Returns:
            The merges, and the nodes that have been looked at with it.
        """
        if gives_several(node):  # what is read is its first value
            return [], {node}
        forms = self._forms.of(node).values() if (node, "merged") not in self._barred else ()
        whole = [form for form in forms if self._pays(form) and self._may(form, node)]
        if whole:
            best = max(whole, key=lambda form: len(form.nodes))
            assert best.host is not None
            return [Merge(node, best, best.host)], {*best.nodes}
        if not self._forms.is_sum(node):
            return [], {node}
        terms, sums = self._forms.terms(node)
        if any(self._reader.written_inputs(each) for each in sums):
            return [], {node}
        found = [*self._parts(terms, _Sums(sums, self._forms))]
        return found, sums.union(*(merge.form.nodes for merge in found))

    def _parts(self, terms: Sequence[_Term], sums: _Sums) -> Iterator[Merge]:
        used: set[int] = set()
        shared: dict[fx.Node, list[int]] = defaultdict(list)
        for number, term in enumerate(terms):
            for source in term.forms:
                shared[source].append(number)
        for source, numbers in shared.items():
            forms = {number: terms[number].forms[source] for number in numbers}
            groups = [
                [number for number in numbers if _holds_all(forms[wide], [forms[number]])]
                for wide in (numbers if len(numbers) > 1 else ())
            ]
            for group in sorted(groups, key=len, reverse=True):
                left = [number for number in group if number not in used]
                merge = self._part(source, terms, left, sums) if len(left) > 1 else None
                if merge is not None:
                    used |= {*left}
                    yield merge

    def _part(
        self, source: fx.Node, terms: Sequence[_Term], group: Sequence[int], sums: _Sums
    ) -> Merge | None:
        """Some terms of a sum as one, in the place of one of them."""
        order = self._memory.order
        for place in group:
            slot = terms[place]
            if slot.value is source or not slot.factor or (slot.value, "merged") in self._barred:
                continue
            scaled = [replace(terms[n], factor=terms[n].factor / slot.factor) for n in group]
            form = self._forms.total(slot.value, source, scaled, ())
            if form is None or form.host is None or order[form.host] > order[slot.parent]:
                continue
            reading = [terms[n].parent for n in group]
            if self._pays(form) and self._may(form, slot.value, reading):
                bypassed = sums.without([terms[n].value for n in group if n != place])
                if bypassed is not None:
                    return Merge(slot.value, form, form.host, tuple(bypassed.items()))
        return None

    def _pays(self, form: Form) -> bool:
        """Whether there is something to merge, and it costs no more afterwards."""
        if form.geometry is None or form.host is None:
            return False
        steps = [each.step for each in form.steps()]
        operators = sum(isinstance(step, Linear) for step in steps)
        if not any(isinstance(step, Total) for step in steps):
            return operators > 1 and form.merged_cost < form.cost
        return operators > 0 and form.merged_cost <= form.cost

    def _may(self, form: Form, last: fx.Node, parents: Sequence[fx.Node] = ()) -> bool:
        """Whether nobody writes to what is read, by `parents` too, and all numbers are of one kind."""
        assert form.host is not None
        order = self._memory.order
        nodes = sorted({*form.nodes, *parents, form.host, last}, key=order.__getitem__)
        if self._memory.writer_between(form.source, nodes[0], [nodes[-1]]) is not None:
            return False
        if any(order[nodes[0]] < place < order[nodes[-1]] for place in self._switches):
            return False
        terms = [part.node for each in form.steps() if isinstance(each.step, Total) for part in each.parts]
        if any(self._forms.shapes.changes_dtype(form.host, node) for node in (last, *terms)):
            return False
        if not self._has_dtype_of_weights(form):
            return False
        written = (each for node in form.nodes for each in self._reader.written_inputs(node))
        if not form.nodes.issuperset(self._forms.value(each) for each in written):
            return False
        weights, others = [], []
        for each in form.steps():
            if isinstance(each.step, Linear):
                weights.append(self._reader.tensor(each.step.weight))
                bias = None if each.step.bias is None else self._reader.tensor(each.step.bias)
                if bias is not None and bias.shape != (each.step.channels,):
                    return False
            elif isinstance(each.step, Norm):
                others.append(self._reader.tensor(each.step.var))
            elif isinstance(each.step, Affine) and not self._keeps_dtype(each.step, form):
                return False
        kinds = {(weight.dtype, weight.device) for weight in weights}
        devices = {tensor.device for tensor in (*weights, *others)}
        return len(kinds) == len(devices) == 1 and all(weight.numel() for weight in weights)

    def _has_dtype_of_weights(self, form: Form) -> bool:
        """Whether the source certainly has it: an operator reads what keeps its dtype, or it is known."""
        assert form.host is not None
        read = [each.parts[0] for each in form.steps() if isinstance(each.step, Linear)]
        if any(not any(isinstance(inner.step, Affine) for inner in value.steps()) for value in read):
            return True
        host = self._reader.read(form.host)
        assert isinstance(host, Linear)
        return self._forms.shapes.dtype(form.source) == self._reader.tensor(host.weight).dtype

    def _keeps_dtype(self, source: Affine, form: Form) -> bool:
        """Whether a constant leaves the dtype of the weights as it is, and lies where they do."""
        assert form.host is not None
        host = self._reader.read(form.host)
        assert isinstance(host, Linear)
        weight = self._reader.tensor(host.weight)
        constant = self._reader.tensor(source.constant) if isinstance(source.constant, fx.Node) else None
        if constant is not None and source.shape and constant.device != weight.device:
            return False
        promoted = torch.promote_types(weight.dtype, source.dtype) if source.dtype else weight.dtype
        return promoted == weight.dtype
