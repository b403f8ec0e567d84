"""A module that can be traced whole, and the folds that hold however it is called.

The graph is only the proof: the module keeps its forward. So it is traced for every choice of its options, a
fold has to be the same in all of these graphs, and traced once more with the folds made it must do what it
did before, less the norms.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import CodeType
from typing import Any

import torch
from torch import fx, nn

from fxfuse.calls import given_arguments, layer_input
from fxfuse.capture import Capture, capture
from fxfuse.errors import CaptureError
from fxfuse.exchange import KeepingReader, caller, exchange_norm, is_broadcast
from fxfuse.methods import others, separates
from fxfuse.nodes import Affine, Linear, Norm, Query
from fxfuse.ops import Reader, norms_inside
from fxfuse.options import variants
from fxfuse.places import place_of
from fxfuse.plan import Change, Merge, Plan
from fxfuse.planner import planned
from fxfuse.records import Fold, Refusal
from fxfuse.refusals import Code, by_code
from fxfuse.reparametrized import evaluate_weights
from fxfuse.replica import replicate
from fxfuse.shapes import GraphShapes
from fxfuse.solve import Solution
from fxfuse.tracer import METHODS
from fxfuse.tree import attribute, parts_of


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
        self._captures = _captures(module)
        self._given = set[str]().union(*(fixed for fixed, _ in self._captures))
        self._variants: list[_Variant] = []

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
        return any(looks_into(captured, name) for _, captured in self._captures)

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
        return _Variant(fixed, captured, reader, *planned(captured.graph, reader, shapes, _needs_a_graph))

    def _moved(self) -> dict[str, None]:
        """The norms that would go."""
        return {move.name: None for each in self._variants for move in each.plan.moves}

    def _disputed(self) -> dict[str, Code]:
        """The norms that are not treated alike wherever they, or their operators, are called."""
        found: dict[str, Code] = {}
        moved = self._moved()
        for each in self._variants:
            for refusal in each.plan.refusals:
                if refusal.norm in moved:
                    found[refusal.norm] = by_code(refusal.code) if self.is_single else Code.OPTIONS
        found |= dict.fromkeys(self._hidden(), Code.OPTIONS) | dict.fromkeys(self._apart(), Code.METHODS)
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
                operators = [each.reader.operator(site.node) for site in move.sites]
                if any(name.startswith(called) for name in (move.name, *operators)):
                    yield move.name

    def _apart(self) -> Iterator[str]:
        """The norms that a method besides forward calls without their operators, or the other way round."""
        for each in self._variants:
            traced = {code for node in each.reader.graph.nodes for _, code in node.meta.get(METHODS, ())}
            for move in each.plan.moves:
                norm = move.name
                nodes = (move.node, *(site.node for site in move.sites))
                operators = [each.reader.operator(site.node) for site in move.sites]
                backward = move.direction == "backward"
                pairs = [(name, norm) if backward else (norm, name) for name in operators]
                apart = len({node.meta.get(METHODS) for node in nodes}) > 1
                if apart or any(self._is_separated(*pair, traced) for pair in pairs):
                    yield norm

    def _is_separated(self, first: str, second: str, traced: Container[CodeType]) -> bool:
        """Whether a method that was not traced calls one of these submodules without the other."""
        one, other = first.split("."), second.split(".")
        common = 0
        while common < min(len(one), len(other)) and one[common] == other[common]:
            common += 1
        owner = attribute(self.module, ".".join(one[:common]))
        names = ["".join(path[common : common + 1]) for path in (one, other)]
        return any(separates(method, *names) for method in others(owner, traced))

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
                after = _outline(capture(twin, each.fixed, self._given - each.fixed.keys()), {*moved}, set())
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
                into = tuple(dict.fromkeys(each.reader.operator(site.node) for site in move.sites))
                error = each.solution.errors.get(move)
                found.setdefault(move.name, Fold(move.name, into, move.direction, place_of(move.node), error))
        return [*found.values()]

    def refusals(self) -> list[Refusal]:
        """A record for each norm that is left in the traced part."""
        found = {refusal.norm: refusal for each in self._variants[::-1] for refusal in each.plan.refusals}
        return [*found.values()]


def called_with_norms(captured: Capture) -> list[str]:
    """The modules that a graph calls as a whole and that have norms inside."""
    calls = dict.fromkeys(str(node.target) for node in captured.graph.nodes if node.op == "call_module")
    return [name for name in calls if norms_inside(attribute(captured.root, name))]


def looks_into(captured: Capture, name: str) -> bool:
    """Whether a graph uses something in the module `name`, which it calls as a whole."""
    module = attribute(captured.root, name)
    inside = parts_of(module)
    named = [node for node in captured.graph.nodes if node.op in ("call_module", "get_attr")]
    used = (attribute(captured.root, str(node.target)) for node in named)
    return any(id(each) in inside for each in used if each is not module)


def _captures(module: nn.Module) -> list[tuple[dict[str, Any], Capture]]:
    """The traces for every choice of the options; what code asks for further below becomes one."""
    asked: list[str] = []
    while True:
        choices = variants(module, asked)
        given = {*asked}.union(*choices)
        try:
            return [(fixed, capture(module, fixed, given - fixed.keys())) for fixed in choices]
        except CaptureError as error:
            if not error.argument or error.argument in given:
                raise
            asked.append(error.argument)


def _needs_a_graph(plan: Plan, move: Change) -> Code | None:
    """Why it cannot be made where forward is kept, which can neither assert anything nor be changed."""
    if isinstance(move, Merge):
        return Code.KEPT_BRANCHES
    if move.assumed:
        return Code.RANK_UNKNOWN
    return Code.LAYOUT if any(move.node in nodes for nodes in plan.views.values()) else None


def _outline(captured: Capture, identities: set[str], without: set[fx.Node]) -> list[str]:
    """What a graph computes from what, less its norms: calls of `identities`, and the nodes `without`.

    The weights and biases of operators are left out; they are what changes.
    """
    reader = Reader(captured.root, captured.graph)
    names: dict[fx.Node, str] = {}
    found: list[str] = []
    for node in captured.graph.nodes:
        op = reader.read(node)
        if node in without:
            assert isinstance(op, (Norm, Affine))
            names[node] = names[op.input]
            continue
        if node.op == "call_module" and str(node.target) in identities:
            names[node] = names[layer_input(node)]
            continue
        if caller(node) in identities and is_broadcast(node):
            names[node] = names[node.all_input_nodes[0]]
            continue
        given: Any = node.args[:1] if node.target is torch._assert else (node.args, node.kwargs)
        if isinstance(op, Linear) and node.op == "call_function":
            given = {key: value for key, value in given_arguments(node).items() if key not in _CHANGED}
        described = f"{node.op} {node.target} {fx.node.map_arg(given, names.__getitem__)}"
        if node.op == "get_attr" or node in reader.constants or isinstance(op, Query):
            names[node] = f"({described})"
        else:
            names[node] = f"%{len(found)}"
            found.append(described)
    return found


_CHANGED = ("weight", "bias")
