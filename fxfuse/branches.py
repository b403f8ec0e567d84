"""Which operators are one: parallel ones on the same value, whose results are added up, and some in a row.

Every value is read as a linear function of others (`fxfuse.linearity`). A sum is one operator if one of its
parts has a kernel that holds those of all others, and a part of a sum if that is true of some. Nothing is
merged that would cost more afterwards, and nothing is edited here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

from torch import fx

from fxfuse.apart import Explainer
from fxfuse.calls import gives_several
from fxfuse.linearity import Forms, Surroundings, Term, holds_all
from fxfuse.mergeable import Judge, pays
from fxfuse.plan import Barred, Merge
from fxfuse.records import Apart
from fxfuse.transparent import Sum


def merges(graph: fx.Graph, known: Surroundings) -> tuple[list[Merge], list[Apart]]:
    """What can be merged in `graph`, and the branches that cannot, both from its end to its beginning."""
    forms = Forms(graph, known)
    for node in graph.nodes:  # in this order no form is asked for before those that it is made of
        if not forms.is_inner(node):
            forms.of(node)
    judge = Judge(forms, known.memory)
    merger = _Merger(forms, known.memory.order, judge, known.barred)
    explainer = Explainer(forms, judge, known.barred)
    done = {*known.moves}
    merged: list[Merge] = []
    apart: list[Apart] = []
    for node in reversed(graph.nodes):
        if node not in done and not known.reader.is_unused(node):
            found, seen = merger.at(node)
            done |= seen
            merged += found
            if forms.is_sum(node) and not any(merge.node is node for merge in found):
                apart += explainer.of(node, found)
    return merged, apart


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

    def __init__(self, forms: Forms, order: Mapping[fx.Node, int], judge: Judge, barred: Barred) -> None:
        self._forms = forms
        self._reader = forms.reader
        self._order = order
        self._judge = judge
        self._barred = barred

    def at(self, node: fx.Node) -> tuple[list[Merge], set[fx.Node]]:
        """What becomes one operator that gives the value of `node`; or parts of the sum that it is.

        Returns:
            The merges, and the nodes that have been looked at with it.
        """
        if gives_several(node):  # what is read is its first value
            return [], {node}
        forms = self._forms.of(node).values() if (node, "merged") not in self._barred else ()
        whole = [form for form in forms if pays(form) and self._judge.hindrance(form, node) is None]
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
        order = self._order
        for place in group:
            slot = terms[place]
            if slot.value is source or not slot.factor or (slot.value, "merged") in self._barred:
                continue
            scaled = [replace(terms[n], factor=terms[n].factor / slot.factor) for n in group]
            form = self._forms.total(slot.value, source, scaled, ())
            if form is None or form.host is None or order[form.host] > order[slot.parent]:
                continue
            reading = [terms[n].parent for n in group]
            if pays(form) and self._judge.hindrance(form, slot.value, reading) is None:
                bypassed = sums.without([terms[n].value for n in group if n != place])
                if bypassed is not None:
                    return Merge(slot.value, form, form.host, tuple(bypassed.items()))
        return None
