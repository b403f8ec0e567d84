"""Which operators are one: parallel ones on the same value, whose results are added up, and some in a row.

Every value is read as a linear function of others (`fxfuse.linearity`). A sum is one operator if one of its
parts has a kernel that holds those of all others, and a part of a sum if that is true of some. Nothing is
merged that would cost more afterwards, and nothing is edited here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import permutations

import torch
from torch import fx

from fxfuse.calls import gives_several
from fxfuse.forms import Form, Total
from fxfuse.linearity import Forms, Surroundings, Term, holds_all
from fxfuse.memory import Memory
from fxfuse.nodes import Affine, Linear, Norm
from fxfuse.places import place_of
from fxfuse.plan import Barred, Merge, name_of
from fxfuse.records import Apart
from fxfuse.refusals import Code
from fxfuse.transparent import Sum


def merges(graph: fx.Graph, known: Surroundings) -> tuple[list[Merge], list[Apart]]:
    """What can be merged in `graph`, and the branches that cannot, both from its end to its beginning."""
    moves = known.moves
    forms = Forms(graph, known)
    for node in graph.nodes:  # in this order no form is asked for before those that it is made of
        if not forms.is_inner(node):
            forms.of(node)
    merger = _Merger(forms, known.memory, known.barred)
    done = {*moves}
    merged: list[Merge] = []
    apart: list[Apart] = []
    for node in reversed(graph.nodes):
        if node not in done and not known.reader.is_unused(node):
            found, seen = merger.at(node)
            done |= seen
            merged += found
            if forms.is_sum(node) and not any(merge.node is node for merge in found):
                apart += merger.apart(node, found)
    return merged, apart


def _told(form: Form) -> str:
    """A branch by its operators."""
    operators = [name_of(each.node, each.step) for each in form.steps() if isinstance(each.step, Linear)]
    return ", ".join(operators) or "identity"


def _switches_mode(node: fx.Node) -> bool:
    """Whether what comes after it computes in another way: with gradients or without, in another dtype."""
    name = getattr(node.target, "__name__", "")
    return node.op == "call_function" and name.endswith(("_grad_enabled", "_autocast", "_inference_mode"))


class _Sums:
    """Sums that are read by one another, and what each adds up, while terms are taken away."""

    def __init__(self, sums: Iterable[fx.Node], forms: Forms) -> None:
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

    def __init__(self, forms: Forms, memory: Memory, barred: Barred) -> None:
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
        whole = [form for form in forms if self._pays(form) and self._hindrance(form, node) is None]
        if whole:
            best = max(whole, key=lambda form: (form.saved, len(form.nodes)))
            assert best.host is not None
            return [Merge(node, best, best.host)], {*best.nodes}
        if not self._forms.is_sum(node):
            return [], {node}
        terms, sums = self._forms.terms(node)
        if any(self._reader.written_inputs(each) for each in sums):
            return [], {node}
        found = [*self._parts(terms, _Sums(sums, self._forms))]
        return found, sums.union(*(merge.form.nodes for merge in found))

    def _parts(self, terms: Sequence[Term], sums: _Sums) -> Iterator[Merge]:
        used: set[int] = set()
        shared: dict[fx.Node, list[int]] = defaultdict(list)
        for number, term in enumerate(terms):
            for source in term.forms:
                shared[source].append(number)
        for source, numbers in shared.items():
            forms = {number: terms[number].forms[source] for number in numbers}
            groups = [
                [number for number in numbers if holds_all(forms[wide], [forms[number]])]
                for wide in (numbers if len(numbers) > 1 else ())
            ]
            for group in sorted(groups, key=len, reverse=True):
                left = [number for number in group if number not in used]
                merge = self._part(source, terms, left, sums) if len(left) > 1 else None
                if merge is not None:
                    used |= {*left}
                    yield merge

    def _part(
        self, source: fx.Node, terms: Sequence[Term], group: Sequence[int], sums: _Sums
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
            if self._pays(form) and self._hindrance(form, slot.value, reading) is None:
                bypassed = sums.without([terms[n].value for n in group if n != place])
                if bypassed is not None:
                    return Merge(slot.value, form, form.host, tuple(bypassed.items()))
        return None

    def apart(self, node: fx.Node, found: Sequence[Merge]) -> Iterator[Apart]:
        """The branches on one value that the sum at `node` adds up, as several operators."""
        gone = {part.node for merge in found for part in merge.form.parts} - {merge.node for merge in found}
        terms = [term for term in self._forms.terms(node)[0] if term.value not in gone]
        shared: dict[fx.Node, list[tuple[Term, Form]]] = defaultdict(list)
        for term in terms:
            forms = {term.value: Form(term.value, term.value)} | self._forms.of(term.value)
            forms |= {merge.form.source: merge.form for merge in found if merge.node is term.value}
            for source, form in forms.items():
                shared[source].append((term, form))
        hosts = {merge.node: merge.name for merge in found}
        told: set[fx.Node] = set()
        for group in sorted(shared.values(), key=len, reverse=True):
            more = [(term, form) for term, form in group if term.value not in told]
            if len(more) > 1 and any(form.geometry is not None for _, form in more):
                told |= {term.value for term, _ in more}
                names = tuple(hosts.get(term.value) or _told(form) for term, form in more)
                yield Apart.because(names, *self._reason(node, *zip(*more, strict=True)), place_of(node))

    def _reason(self, node: fx.Node, terms: Sequence[Term], forms: Sequence[Form]) -> tuple[Code, str]:
        """Why these terms of a sum are not one."""
        writing = next(
            (each for each in self._forms.terms(node)[1] if self._reader.written_inputs(each)), None
        )
        if writing is not None:
            return Code.STATE_MUTATED, writing.name
        values = [term.value for term in terms]
        barred = [
            self._barred[each, "merged"] for each in (node, *values) if (each, "merged") in self._barred
        ]
        if barred:
            return barred[0], node.name
        read = next(
            (term.value for term, form in zip(terms, forms, strict=True) if form.source not in term.forms),
            None,
        )
        if read is not None:
            return Code.READ, read.name
        pairs = (
            [terms[one], terms[other]]
            for one, other in permutations(range(len(forms)), 2)
            if holds_all(forms[one], [forms[other]])
        )
        chosen = [replace(term, factor=1.0) for term in next(pairs, [])]
        total = self._forms.total(node, forms[0].source, chosen, ()) if chosen else None
        if total is None:
            kinds = (str(form.geometry) for form in forms if form.geometry is not None)
            return Code.BRANCHES, "; ".join(dict.fromkeys(kinds))
        if not self._pays(total):
            return Code.COST, node.name
        return self._hindrance(total, node, [term.parent for term in chosen]) or Code.SUM, node.name

    def _pays(self, form: Form) -> bool:
        """Whether there is something to merge, and it costs no more afterwards."""
        if form.geometry is None or form.host is None:
            return False
        steps = [each.step for each in form.steps()]
        operators = sum(isinstance(step, Linear) for step in steps)
        if not any(isinstance(step, Total) for step in steps):
            return operators > 1 and form.saved > 0
        return operators > 0 and form.saved >= 0

    def _hindrance(self, form: Form, last: fx.Node, parents: Sequence[fx.Node] = ()) -> Code | None:
        """Why it cannot be merged: somebody writes to what is read, by `parents` too; or kinds of numbers."""
        assert form.host is not None
        order = self._memory.order
        nodes = sorted({*form.nodes, *parents, form.host, last}, key=order.__getitem__)
        for value in form.sources - {form.source}:
            if self._memory.writer_between(value, value, [nodes[-1]]) not in (None, nodes[-1]):
                return Code.STATE_MUTATED
        if self._memory.writer_between(form.source, nodes[0], [nodes[-1]]) is not None:
            return Code.STATE_MUTATED
        written = (each for node in form.nodes for each in self._reader.written_inputs(node))
        if not form.nodes.issuperset(self._forms.value(each) for each in written):
            return Code.STATE_MUTATED
        if any(order[nodes[0]] < place < order[nodes[-1]] for place in self._switches):
            return Code.KINDS
        terms = [part.node for each in form.steps() if isinstance(each.step, Total) for part in each.parts]
        if any(self._forms.shapes.changes_dtype(form.host, node) for node in (last, *terms)):
            return Code.KINDS
        return None if self._has_dtype_of_weights(form) and self._are_alike(form) else Code.KINDS

    def _are_alike(self, form: Form) -> bool:
        """Whether all weights and statistics are of one dtype and on one device."""
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
        if form.is_read_by_an_operator:
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
