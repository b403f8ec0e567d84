"""Whether a form may become one operator: whether it pays, and whether nothing on the way forbids it."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import fx

from fxfuse.calls import switches_mode
from fxfuse.forms import Form, Total
from fxfuse.linearity import Forms
from fxfuse.memory import Memory
from fxfuse.nodes import Affine, Linear, Norm
from fxfuse.refusals import Code


def pays(form: Form) -> bool:
    """Whether there is something to merge, and it costs no more afterwards."""
    if form.geometry is None or form.host is None:
        return False
    steps = [each.step for each in form.steps()]
    operators = sum(isinstance(step, Linear) for step in steps)
    if not any(isinstance(step, Total) for step in steps):
        return operators > 1 and form.saved > 0
    return operators > 0 and form.saved >= 0


class Judge:
    """Decides what may be merged."""

    def __init__(self, forms: Forms, memory: Memory) -> None:
        self._shapes = forms.shapes
        self._value = forms.value
        self._reader = forms.reader
        self._memory = memory
        self._switches = [place for node, place in memory.order.items() if switches_mode(node)]

    def hindrance(self, form: Form, last: fx.Node, parents: Sequence[fx.Node] = ()) -> Code | None:
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
        if not form.nodes.issuperset(self._value(each) for each in written):
            return Code.STATE_MUTATED
        if any(order[nodes[0]] < place < order[nodes[-1]] for place in self._switches):
            return Code.KINDS
        terms = [part.node for each in form.steps() if isinstance(each.step, Total) for part in each.parts]
        if any(self._shapes.changes_dtype(form.host, node) for node in (last, *terms)):
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
        return self._shapes.dtype(form.source) == self._reader.tensor(host.weight).dtype

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
