"""A module that can be traced whole, and the folds that hold however it is called.

The graph is only the proof: the module keeps its forward. So it is traced for every choice of its options, a
fold has to be the same in all of these graphs, and traced once more with the folds made it must do what it
did before, less the norms.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn

from fxfuse.capture import Capture, capture
from fxfuse.errors import CaptureError
from fxfuse.exchange import KeepingReader, exchange_norm
from fxfuse.layers import is_torch_layer
from fxfuse.nodes import Linear, Query
from fxfuse.ops import Reader, norms_inside
from fxfuse.options import variants
from fxfuse.plan import Plan
from fxfuse.planner import planned
from fxfuse.records import Fold, Refusal
from fxfuse.refusals import Code, by_code
from fxfuse.reparametrized import evaluate_weights
from fxfuse.replica import replicate
from fxfuse.shapes import GraphShapes
from fxfuse.solve import Solution
from fxfuse.tree import attribute


@dataclass
class _Variant:
    """One choice of the options of forward, its trace, and what can be folded in it."""

    fixed: Mapping[str, Any]
    captured: Capture
    reader: KeepingReader
    plan: Plan
    solution: Solution


class Unit:
    """A module that can be traced for every choice of its options, and what can be folded in all of them.

    Attributes:
        module: the module.
        left: those of its submodules that are not to be changed, and why not.

    Raises:
        CaptureError: it cannot be traced, or not for every choice.
    """

    def __init__(self, module: nn.Module, shared: Iterable[str]) -> None:
        self.module = module
        self.left: dict[str, Code] = dict.fromkeys(shared, Code.SHARED)
        self._captures = [(fixed, capture(module, fixed)) for fixed in variants(module)]
        self._variants: list[_Variant] = []
        for _, captured in self._captures:
            if any(node.target is torch.is_tensor for node in captured.graph.nodes):
                raise CaptureError(f"{type(module).__name__} asks for the type of its arguments")

    @property
    def is_single(self) -> bool:
        """Whether forward has no options."""
        return len(self._captures) == 1

    def called(self) -> list[str]:
        """The submodules that forward calls, that are not traced, and that have norms inside."""
        return [
            *dict.fromkeys(name for _, captured in self._captures for name in called_with_norms(captured))
        ]

    def looks_into(self, name: str) -> bool:
        """Whether the traced code uses something below the submodule `name`."""
        return any(looks_into(captured.graph, name) for _, captured in self._captures)

    def settle(self) -> None:
        """Finds the folds that hold in every variant."""
        while True:
            self._variants = [self._planned(*each) for each in self._captures]
            disputed = self._disputed() or self._unproved()
            if not disputed:
                return
            self.left |= disputed

    def _planned(self, fixed: Mapping[str, Any], captured: Capture) -> _Variant:
        reader = KeepingReader(captured, self.left)
        shapes = GraphShapes(captured.graph, reader, {})
        return _Variant(fixed, captured, reader, *planned(captured.graph, reader, shapes, assumes=False))

    def _moved(self) -> dict[str, None]:
        """The norms that would go."""
        return {norm: None for each in self._variants for norm in each.reader.sources(each.plan)}

    def _disputed(self) -> dict[str, Code]:
        """The norms that are not treated alike wherever they, or their operators, are called."""
        found: dict[str, Code] = {}
        moved = self._moved()
        for each in self._variants:
            for refusal in each.plan.refusals:
                if refusal.norm in moved:
                    found[refusal.norm] = by_code(refusal.code) if self.is_single else Code.OPTIONS
        found |= dict.fromkeys(self._hidden(), Code.OPTIONS)
        taken = [each.reader.taken_up(each.plan) for each in self._variants]
        for operator in set().union(*taken):
            versions = [operators[operator] for operators in taken if operator in operators]
            if any(version != versions[0] for version in versions):
                found |= {norm: Code.OPTIONS for version in versions for norm, *_ in version}
        return found

    def _hidden(self) -> Iterator[str]:
        """The norms that some variant calls, or whose operators it calls, inside of another module."""
        nodes = (node for _, captured in self._captures for node in captured.graph.nodes)
        called = tuple({f"{node.target}." for node in nodes if node.op == "call_module"})
        for each in self._variants:
            for move in each.plan.moves:
                norm = each.reader.norm(move.node)
                operators = [each.reader.operator(site.node) for site in move.sites]
                if any(name.startswith(called) for name in (norm, *operators)):
                    yield norm

    def _unproved(self) -> dict[str, Code]:
        """All norms that would go, if without them the module would compute something else besides."""
        moved = self._moved()
        if not moved:
            return {}
        twin = replicate(self.module)
        self.apply(twin)
        for each in self._variants:
            sources = {move.node for move in each.plan.moves}
            try:
                after = _outline(capture(twin, each.fixed), {*moved}, set())
            except CaptureError:
                return dict.fromkeys(moved, Code.NO_MODULE)
            if after != _outline(each.captured, set(), sources):
                return dict.fromkeys(moved, Code.NO_MODULE)
        return {}

    def apply(self, target: nn.Module) -> None:
        """Makes the folds in `target`, a replica of the module."""
        for each in self._variants:
            for node, (weight, bias) in each.solution.tensors.items():
                operator = attribute(target, each.reader.operator(node))
                evaluate_weights(operator)
                operator._parameters |= {"weight": weight, "bias": bias}
        for name in self._moved():
            exchange_norm(attribute(target, name))

    def folds(self) -> list[Fold]:
        """A record for each norm that is gone."""
        found: dict[str, Fold] = {}
        for each in self._variants:
            for move in each.plan.moves:
                norm = each.reader.norm(move.node)
                into = tuple(dict.fromkeys(each.reader.operator(site.node) for site in move.sites))
                found.setdefault(norm, Fold(norm, into, move.direction))
        return [*found.values()]

    def refusals(self) -> list[Refusal]:
        """A record for each norm that is left in the traced part."""
        found = {refusal.norm: refusal for each in self._variants[::-1] for refusal in each.plan.refusals}
        return [*found.values()]


def called_with_norms(captured: Capture) -> list[str]:
    """The modules that a graph calls as a whole and that have norms inside."""
    calls = dict.fromkeys(str(node.target) for node in captured.graph.nodes if node.op == "call_module")
    return [name for name in calls if norms_inside(attribute(captured.root, name))]


def looks_into(graph: fx.Graph, name: str) -> bool:
    """Whether `graph` uses something below the module `name`, which it calls as a whole."""
    below = (str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    return any(target.startswith(f"{name}.") for target in below)


def _outline(captured: Capture, identities: set[str], without: set[fx.Node]) -> list[str]:
    """What a graph calls, in order: all but constants, calls of `identities`, and the nodes `without`."""
    reader = Reader(captured.root, captured.graph)
    found = []
    for node in captured.graph.nodes:
        identity = node.op == "call_module" and str(node.target) in identities
        unused = not node.users and isinstance(reader.read(node), Query)
        if node.op == "get_attr" or node in reader.constants or identity or unused or node in without:
            continue
        # An operator may have got a bias as an argument; layers have no other than their input.
        layer = node.op == "call_module" and is_torch_layer(attribute(captured.root, str(node.target)))
        given = () if layer or isinstance(reader.read(node), Linear) else (node.args, node.kwargs)
        found.append(f"{node.op} {node.target} {fx.node.map_arg(given, lambda _: 0)}")
    return found
