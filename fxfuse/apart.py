"""Branches on one value that stay several operators, and why."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import permutations

from torch import fx

from fxfuse.forms import Form
from fxfuse.linearity import Forms, Term, holds_all
from fxfuse.mergeable import Judge, pays
from fxfuse.places import place_of
from fxfuse.plan import Barred, Merge, names_in
from fxfuse.records import Apart
from fxfuse.refusals import Code


class Explainer:
    """Finds such branches."""

    def __init__(self, forms: Forms, judge: Judge, barred: Barred) -> None:
        self._forms = forms
        self._judge = judge
        self._reader = forms.reader
        self._barred = barred

    def of(self, node: fx.Node, found: Sequence[Merge]) -> Iterator[Apart]:
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
                names = tuple(
                    hosts.get(term.value) or ", ".join(names_in(form)) or "identity" for term, form in more
                )
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
        if not pays(total):
            return Code.COST, node.name
        return self._judge.hindrance(total, node, [term.parent for term in chosen]) or Code.SUM, node.name
