"""A module that can be traced whole, and the folds that hold however it is called.

The graph is only the proof: the module keeps its forward. So it is traced for every choice of its options, a
fold has to be the same in all of these graphs, and traced once more with the folds made it must do what it
did before, less the norms.
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import fx, nn

from fxfuse.capture import Capture, capture
from fxfuse.errors import CaptureError
from fxfuse.exchange import KeepingReader, erase
from fxfuse.layers import is_torch_layer
from fxfuse.match import Plan
from fxfuse.nodes import Linear, Query
from fxfuse.ops import Reader
from fxfuse.options import variants
from fxfuse.records import Fold, Refusal
from fxfuse.refusals import Code, by_code
from fxfuse.reparametrized import evaluate_weights
from fxfuse.replica import replicate
from fxfuse.shapes import GraphShapes
from fxfuse.solve import Solution, planned
from fxfuse.tree import attribute


class Unit:
    """A module that can be traced for every choice of its options, and what can be folded in all of them."""

    def __init__(self, module: nn.Module, shared: Iterable[str]) -> None:
        self.module = module
        self.captures = [capture(module, fixed) for fixed in variants(module)]
        for captured in self.captures:
            if any(node.target is torch.is_tensor for node in captured.graph.nodes):
                raise CaptureError(f"{type(module).__name__} asks for the type of its arguments")
        self.left: dict[str, Code] = dict.fromkeys(shared, Code.SHARED)
        self.plans: list[tuple[KeepingReader, Plan, Solution]] = []

    def settle(self) -> None:
        """Finds the folds that hold in every variant."""
        while True:
            self.plans = [self._plan(captured) for captured in self.captures]
            disputed = self._disputed() or self._unproved()
            if not disputed:
                return
            self.left |= disputed

    def _plan(self, captured: Capture) -> tuple[KeepingReader, Plan, Solution]:
        reader = KeepingReader(captured, self.left)
        shapes = GraphShapes(captured.graph, reader, {})
        return reader, *planned(captured.graph, reader, shapes, assumes=False)

    def _disputed(self) -> dict[str, Code]:
        """The norms that are not treated alike wherever they, or their operators, are called."""
        found: dict[str, Code] = {}
        moved = {norm for reader, plan, _ in self.plans for norm in reader.sources(plan)}
        for _, plan, _ in self.plans:
            for refusal in plan.refusals:
                if refusal.norm in moved:
                    found[refusal.norm] = by_code(refusal.code) if len(self.plans) == 1 else Code.OPTIONS
        found |= dict.fromkeys(self._hidden(moved), Code.OPTIONS)
        taken = [reader.taken_up(plan) for reader, plan, _ in self.plans]
        for operator in set().union(*taken):
            versions = [operators[operator] for operators in taken if operator in operators]
            if any(version != versions[0] for version in versions):
                found |= {norm: Code.OPTIONS for version in versions for norm, *_ in version}
        return found

    def _hidden(self, moved: set[str]) -> set[str]:
        """The norms that some variant calls, or whose operators it calls, inside of another module."""
        called = {
            f"{node.target}."
            for reader, *_ in self.plans
            for node in reader.graph.nodes
            if node.op == "call_module"
        }
        hidden = {norm for norm in moved if norm.startswith(tuple(called))}
        for reader, plan, _ in self.plans:
            for move in plan.moves:
                operators = [reader.operator(site.operator) for site in move.sites]
                if any(operator.startswith(tuple(called)) for operator in operators):
                    hidden.add(reader.norm(move.node))
        return hidden

    def _unproved(self) -> dict[str, Code]:
        """All norms that would go, if without them the module would compute something else besides."""
        moved = {norm for reader, plan, _ in self.plans for norm in reader.sources(plan)}
        twin = replicate(self.module)
        self.apply(twin)
        try:
            for fixed, (reader, plan, _) in zip(
                variants(self.module) if moved else (), self.plans, strict=False
            ):
                captured = capture(twin, fixed)
                sources = {move.node for move in plan.moves}
                if _outline(captured, moved, set()) != _outline(reader.captured, set(), sources):
                    return dict.fromkeys(moved, Code.NO_MODULE)
        except CaptureError:
            return dict.fromkeys(moved, Code.NO_MODULE)
        return {}

    def apply(self, target: nn.Module) -> None:
        """Makes the folds in `target`, a replica of the module."""
        moved: dict[str, None] = {}
        for reader, plan, solution in self.plans:
            for node, (weight, bias) in solution.tensors.items():
                operator = attribute(target, reader.operator(node))
                evaluate_weights(operator)
                operator._parameters |= {"weight": weight, "bias": bias}
            moved |= reader.sources(plan)
        for name in moved:
            erase(attribute(target, name))

    def folds(self) -> list[Fold]:
        """A record for each norm that is gone."""
        found: dict[str, Fold] = {}
        for reader, plan, _ in self.plans:
            for move in plan.moves:
                into = tuple(dict.fromkeys(reader.operator(site.operator) for site in move.sites))
                found.setdefault(reader.norm(move.node), Fold(reader.norm(move.node), into, move.direction))
        return [*found.values()]

    def refusals(self) -> list[Refusal]:
        """A record for each norm that is left in the traced part."""
        found: dict[str, Refusal] = {}
        for _, plan, _ in self.plans:
            for refusal in plan.refusals:
                found.setdefault(refusal.norm, refusal)
        return [*found.values()]

    def called(self) -> list[str]:
        """The submodules that the graphs call as a whole and that have norms inside."""
        return [*dict.fromkeys(name for _, plan, _ in self.plans for name in plan.called)]

    def looks_into(self, name: str) -> bool:
        """Whether the traced code uses something below the submodule `name`."""
        return any(looks_into(reader.graph, name) for reader, *_ in self.plans)


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
