"""What is to become of every norm of a graph."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Literal

from torch import fx

from fxfuse.calls import named
from fxfuse.channels import Channels
from fxfuse.forms import Form
from fxfuse.geometry import Window
from fxfuse.nodes import Affine, Linear, Norm
from fxfuse.records import Apart, Refusal
from fxfuse.refusals import Code

Direction = Literal["backward", "forward", "merged"]


@dataclass(frozen=True)
class Site:
    """A linear operator that absorbs a map, or a part of it, on one of its sides.

    Attributes:
        node: the node of the operator; of several that become one that of the value which they give.
        operator: what it reads as.
        side: on which side it absorbs the map.
        channels: what acts there; their index is one entry for each channel of that side.
    """

    node: fx.Node
    operator: Linear
    side: Literal["output", "input"]
    channels: Channels


@dataclass(frozen=True)
class Move:
    """The map that `node` applies goes into operators before it or after it.

    Attributes:
        node: the node of the norm, or of the arithmetic with a constant.
        source: what it reads as.
        direction: where its map goes.
        sites: who absorbs it.
        assumed: the numbers of axes that are assumed of nodes: the graph has to assert them.
    """

    node: fx.Node
    source: Norm | Affine
    direction: Direction
    sites: tuple[Site, ...]
    assumed: frozenset[tuple[fx.Node, int]]

    @property
    def name(self) -> str:
        """Of the norm that it takes away, or a part of; of any other constant that of the node."""
        norm = self.source.name if isinstance(self.source, Norm) else self.source.norm
        return norm or self.node.name

    @property
    def names(self) -> list[str]:
        """By which it can be asked to be left."""
        return [self.name]


@dataclass(frozen=True)
class Merge:
    """Operators that become one.

    Attributes:
        node: the node whose value the one operator gives.
        form: what it computes.
        host: the operator that stays, with another weight and bias.
        bypassed: sums that lose a part, and the node that is read in the place of each.
    """

    node: fx.Node
    form: Form
    host: fx.Node
    bypassed: tuple[tuple[fx.Node, fx.Node], ...] = ()
    direction: Literal["merged"] = "merged"

    @property
    def name(self) -> str:
        """Of the operator that stays."""
        return name_of(self.host, self.operators[self.host])

    @property
    def names(self) -> list[str]:
        """By which it can be asked to be left."""
        return [name_of(*each) for each in self.operators.items()]

    @property
    def operators(self) -> dict[fx.Node, Linear]:
        """The linear operators that become one."""
        return {form.node: form.step for form in self.form.steps() if isinstance(form.step, Linear)}

    @property
    def operator(self) -> Linear:
        """The one that does it all, for who looks at its outputs."""
        assert self.form.channels is not None
        return replace(self.operators[self.host], channels=self.form.channels)

    @property
    def moves(self) -> tuple[Move, ...]:
        """The maps of the norms and constants among them."""
        found = {
            form.node: Move(form.node, form.step, "merged", (), form.assumed)
            for form in self.form.steps()
            if isinstance(form.step, Norm | Affine)
        }
        return tuple(found.values())

    @property
    def gone(self) -> frozenset[fx.Node]:
        """The nodes that go."""
        return (self.form.nodes | {node for node, _ in self.bypassed}) - {self.host}


@dataclass(frozen=True)
class Plan:
    """What becomes of every norm of a graph.

    Attributes:
        moves: in the order in which they were found, each relying on those before it.
        merges: of operators that become one once the moves are made.
        refusals: of norms that neither takes away.
        apart: branches that could not be merged.
        views: the calls of `view` that have to become `reshape`, by the nodes whose going makes it so.
        stuck: the nodes that have to stay for the sake of the layout of what they give.
        written_out: the norms that forward writes out as a multiplication and an addition of constants:
            the nodes of each, by its first.
    """

    moves: tuple[Move, ...]
    merges: tuple[Merge, ...]
    refusals: tuple[Refusal, ...]
    apart: tuple[Apart, ...]
    views: Mapping[fx.Node, frozenset[fx.Node]]
    stuck: frozenset[fx.Node]
    written_out: Mapping[fx.Node, tuple[fx.Node, ...]]

    @property
    def changes(self) -> tuple[Change, ...]:
        """The moves, the merges, and the moves that these consist of."""
        return (*self.moves, *self.merges, *(move for merge in self.merges for move in merge.moves))


Change = Move | Merge


def name_of(node: fx.Node, operator: Linear) -> str:
    """Of a module that is called, or of the owner of the weight."""
    is_functional = node.op != "call_module" and isinstance(operator.weight, str)
    return str(operator.weight).removesuffix(".weight") if is_functional else named(node)


def names_in(form: Form) -> list[str]:
    """The operators and poolings of a form; none if it is the value itself, but for norms and constants."""
    steps = [(each.node, each.step) for each in form.steps()]
    return [
        name_of(node, step) if isinstance(step, Linear) else named(node)
        for node, step in steps
        if isinstance(step, Linear | Window)
    ]


Barred = Mapping[tuple[fx.Node, Direction], Code]
