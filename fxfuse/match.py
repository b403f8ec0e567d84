"""Where the affine map of each norm can go, or why it cannot.

A norm's map is pushed backward, from user to producer, until a linear operator absorbs it:

* a linear operator absorbs it on its output side, if the norm's axis is the operator's channel axis;
* a transparent operator lets it pass;
* a norm whose own map has already been placed has become transparent;
* anything else stops it.

On the way every value must have one user only, queries of its shape apart: whoever else reads it wants
it as it was. Nothing is edited here; the result is a plan.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from torch import fx, nn

from fxfuse.calls import torch_name
from fxfuse.ops import LeftNorm, Linear, Norm, Opaque, Query, Reader, Transparent, calls_norm, norms_inside
from fxfuse.rank import rank_of
from fxfuse.records import Refusal
from fxfuse.refusals import Code
from fxfuse.tree import attribute


@dataclass(frozen=True)
class Move:
    """The map of `norm`, which `node` applies, goes into the output side of `operator`.

    Attributes:
        node: the node of the norm.
        norm: what it reads as.
        operator: the node of the operator that absorbs it.
        rank: the number of axes that the operator's output must have for this to be right, where the
            graph does not fix it; None where it does.
    """

    node: fx.Node
    norm: Norm
    operator: fx.Node
    rank: int | None


@dataclass(frozen=True)
class Plan:
    """Every norm of a graph, either moved or refused. Moves are in the order of execution."""

    moves: tuple[Move, ...]
    refusals: tuple[Refusal, ...]

    @property
    def norms(self) -> int:
        """How many norms the graph executes."""
        return len(self.moves) + len(self.refusals)


def match(graph: fx.Graph, reader: Reader, observed: Mapping[fx.Node, int] | None = None) -> Plan:
    """Finds a place for the map of every norm in `graph`.

    Args:
        graph: the graph; it is not changed.
        reader: reads its nodes.
        observed: number of axes of each node's value, as seen on a run with example inputs.
    """
    matcher = _Matcher(reader, observed or {})
    for node in graph.nodes:
        matcher.visit(node)
    return Plan(tuple(matcher.moves.values()), tuple(matcher.refusals))


class _Matcher:
    def __init__(self, reader: Reader, observed: Mapping[fx.Node, int]) -> None:
        self.reader = reader
        self.observed = observed
        self.moves: dict[fx.Node, Move] = {}
        self.refusals: list[Refusal] = []

    def visit(self, node: fx.Node) -> None:
        """Places or refuses the norm that `node` is, and refuses those inside a module called as a whole."""
        op = self.reader.read(node)
        if isinstance(op, LeftNorm):
            self.refusals.append(Refusal.because(op.name, op.code, op.detail))
        elif isinstance(op, Norm):
            found = self._backward(node, op)
            if isinstance(found, Move):
                self.moves[node] = found
            else:
                self.refusals.append(found)
        elif node.op in ("call_module", "get_attr"):
            inner = attribute(self.reader.root, str(node.target))
            place = f"{node.target} ({type(inner).__name__})"
            inside = norms_inside(inner) if isinstance(inner, nn.Module) else []
            self.refusals += [
                Refusal.because(f"{node.target}.{name}".rstrip("."), Code.INSIDE_OPAQUE, place)
                for name in inside
            ]
        elif node.op == "call_function" and torch_name(node.target) is None and calls_norm(node.target):
            self.refusals.append(Refusal.because(node.name, Code.INSIDE_OPAQUE, str(node.target)))

    def _backward(self, node: fx.Node, norm: Norm) -> Move | Refusal:
        user, producer = node, norm.input
        while True:
            op = self.reader.read(producer)
            if not isinstance(op, (Linear, Transparent)) and producer not in self.moves:
                return _stopped(norm, producer, op)
            others = [each.name for each in producer.users if each is not user and not self._is_query(each)]
            if others:
                return Refusal.because(norm.name, Code.OTHER_USERS, f"{producer.name} -> {', '.join(others)}")
            if isinstance(op, Linear):
                return self._absorb(node, norm, producer, op)
            assert isinstance(op, (Transparent, Norm))
            user, producer = producer, op.input

    def _is_query(self, node: fx.Node) -> bool:
        return isinstance(self.reader.read(node), Query)

    def _absorb(self, node: fx.Node, norm: Norm, producer: fx.Node, linear: Linear) -> Move | Refusal:
        weight, mean = self.reader.tensor(linear.weight), self.reader.tensor(norm.mean)
        owner = linear.weight.rpartition(".")[0]
        if weight.device != mean.device or not weight.numel():
            found = f"{owner} is empty or on another device ({weight.device}, {mean.device})"
            return Refusal.because(norm.name, Code.OPAQUE_PRODUCER, found)
        rank = self._right_rank(producer, norm, linear)
        if isinstance(rank, Code):
            return Refusal.because(norm.name, rank, owner)
        if linear.channels(weight) != mean.numel():
            numbers = f"{mean.numel()} after {linear.channels(weight)} of {owner}"
            return Refusal.because(norm.name, Code.CHANNELS, numbers)
        return Move(node, norm, producer, rank)

    def _right_rank(self, producer: fx.Node, norm: Norm, linear: Linear) -> int | Code | None:
        """The rank for which the norm's axis is the operator's, to be asserted; None if it is certain.

        Counted from the end, a convolution's channels are on axis dims + 1 with or without a batch axis,
        and a norm's are on axis rank - 1: they agree for rank dims + 2.
        """
        right = linear.dims + 2
        if norm.unbatched:
            return None if norm.ranks == frozenset({right - 1, right}) else Code.AXIS
        possible = set(norm.ranks or range(2, right + 2))
        if linear.dims:
            possible &= {right - 1, right}
        known = right if possible == {right} else rank_of(producer, self.reader)
        seen = known or self.observed.get(producer)
        if right not in possible or seen not in (right, None):
            return Code.AXIS
        if known:
            return None
        # Without a batch axis a convolution would be normalised along its image: asserted, not assumed.
        # A linear layer has two equally good uses, so only a run can tell which one is meant.
        return right if linear.dims or seen else Code.RANK_UNKNOWN


def _stopped(norm: Norm, producer: fx.Node, op: object) -> Refusal:
    if isinstance(op, Opaque):
        if producer.op == "placeholder":
            return Refusal.because(norm.name, Code.NOTHING_BEFORE, producer.name)
        return Refusal.because(norm.name, op.code, op.detail or producer.name)
    if isinstance(op, (Norm, LeftNorm)):
        return Refusal.because(norm.name, Code.NORM_BEFORE_LEFT, op.name)
    return Refusal.because(norm.name, Code.OPAQUE_PRODUCER, producer.name)
