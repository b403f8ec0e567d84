"""Where the affine map of each norm, and of each constant, can go, or why it cannot.

A map is pushed backward, from user to producer, until linear operators absorb it on their output side; or,
where that fails, forward, from producer to user, until linear operators absorb it on their input side:

* a transparent operator lets it pass, as its kind says;
* what made an earlier map, and has been placed, has become transparent;
* branches that become one operator absorb it as one;
* an operator of several inputs, going backward, or a value of several users, going forward, divides it: then
  every branch has to be absorbed, or none is;
* anything else stops it.

Going backward every value on the way must have one reader only, queries of its shape apart: whoever else
reads it wants it as it was. Nothing is edited here, and no values of tensors are looked at; the result is a
plan.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Literal

import torch
from torch import fx, nn

from fxfuse.branches import merges
from fxfuse.calls import named, torch_name
from fxfuse.channels import KEPT, Channels, every
from fxfuse.layers import calls_norm
from fxfuse.layout import layouts
from fxfuse.linearity import Surroundings
from fxfuse.memory import Memory
from fxfuse.nodes import Affine, LeftNorm, Linear, Norm, Opaque, Split
from fxfuse.ops import Reader, norms_inside
from fxfuse.places import place_of
from fxfuse.plan import Barred, Direction, Merge, Move, Plan, Site
from fxfuse.records import Apart, Refusal
from fxfuse.refusals import Code
from fxfuse.shapes import GraphShapes
from fxfuse.transparent import Rearranged, Slice, Sum, Transparent, Within
from fxfuse.tree import attribute


def match(graph: fx.Graph, reader: Reader, shapes: GraphShapes, barred: Barred) -> Plan:
    """Finds a place for the map of every norm and constant in `graph`.

    Args:
        graph: the graph; it is not changed.
        reader: reads its nodes.
        shapes: what is known of the shapes of its values.
        barred: moves that are not to be made, and why not.
    """
    matcher = _Matcher(graph, reader, shapes, barred)
    sources = [node for node in graph.nodes if isinstance(reader.read(node), (Norm, Affine))]
    for node in sources:
        matcher.place(node, "backward")
    for node in reversed(sources):
        if node not in matcher.moves:
            matcher.place(node, "forward")
    apart = matcher.merge(graph)
    while matcher.merged and [node for node in matcher.left(sources) if matcher.place(node, "backward")]:
        apart = matcher.merge(graph)
    lost = matcher.lost()
    if lost:
        return match(graph, reader, shapes, {**barred, **dict.fromkeys(lost, Code.OPAQUE_PRODUCER)})
    refusals = [refusal for node in graph.nodes for refusal in matcher.refused(node)]
    found = layouts(graph, reader, shapes, matcher.gone, matcher.merged, matcher.memory.is_written_after)
    moves, merged = tuple(matcher.moves.values()), tuple(matcher.merged.values())
    return Plan(
        moves, merged, tuple(refusals), tuple(apart), found.views, frozenset(found.stuck), matcher.written_out
    )


class _Stop(Exception):  # noqa: N818
    """A map does not get through."""

    def __init__(self, code: Code, detail: str = "") -> None:
        super().__init__()
        self.code = code
        self.detail = detail


class _Matcher:
    def __init__(self, graph: fx.Graph, reader: Reader, shapes: GraphShapes, barred: Barred) -> None:
        self.reader = reader
        self.shapes = shapes
        self.barred = barred
        self.moves: dict[fx.Node, Move] = {}
        self.gone: dict[fx.Node, fx.Node] = {}
        self.merged: dict[fx.Node, Merge] = {}
        self.mapped: set[fx.Node] = set()  # the norms and constants that are parts of merges
        self.stopped: dict[tuple[fx.Node, Direction], _Stop] = {}
        self.written_out = {node: parts for node in graph.nodes if (parts := self._written_out(node))}
        self.memory = Memory(graph, reader, self.gone)

    def merge(self, graph: fx.Graph) -> list[Apart]:
        """Finds the branches that become one with the moves so far, and gives those that do not."""
        known = Surroundings(self.reader, self.shapes, self.moves, self.memory, self.acting, self.barred)
        found, apart = merges(graph, known)
        self.merged = {merge.node: merge for merge in reversed(found)}
        self.mapped = {move.node for merge in found for move in merge.moves}
        return apart

    def left(self, sources: Sequence[fx.Node]) -> list[fx.Node]:
        """Those of which the map has no place yet."""
        return [node for node in sources if node not in self.moves and node not in self.mapped]

    def lost(self) -> list[tuple[fx.Node, Direction]]:
        """The moves into branches that have not become one after all."""
        forms = (form for merge in self.merged.values() for form in merge.form.steps())
        given = {form.node for form in forms if form.parts}
        return [
            (move.node, move.direction)
            for move in self.moves.values()
            for site in move.sites
            if not isinstance(self.reader.read(site.node), Linear) and site.node not in given
        ]

    def place(self, node: fx.Node, direction: Direction) -> bool:
        """Moves the map of `node` in that direction, if it can be; gives whether it can."""
        source = self.reader.read(node)
        assert isinstance(source, (Norm, Affine))
        self.shapes.consulted.clear()
        assumed: set[tuple[fx.Node, int]] = set()
        try:
            try:
                channels = self._channels(source)
                sites = self._sites(node, source, channels, direction)
            except _Stop as stop:
                if stop.code is not Code.RANK_UNKNOWN or not isinstance(source, Norm):
                    raise
                rank, sites = self._for_any_rank(node, source, direction)
                assumed.add((source.input, rank))
            if (node, direction) in self.barred:
                raise _Stop(self.barred[node, direction], ", ".join(named(site.node) for site in sites))
        except _Stop as stop:
            self.stopped[node, direction] = stop
            return False
        else:
            for each in self.shapes.consulted:
                assumed |= self.shapes.assumed(each)
            self.moves[node] = Move(node, source, direction, sites, frozenset(assumed))
            self.gone[node] = source.input
            return True

    def _sites(
        self, node: fx.Node, source: Norm | Affine, channels: Channels, direction: Direction
    ) -> tuple[Site, ...]:
        if direction == "backward":
            sites = tuple(self._backward(source.input, node, channels))
        else:
            self._check_forward(node, source)
            sites = tuple(self._forward(node, channels))
            if not sites:
                raise _Stop(Code.OPAQUE_PRODUCER, f"{named(node)} -> nothing")
            writer = self.memory.writer_between(source.input, node, [site.node for site in sites])
            if writer is not None:
                raise _Stop(Code.STATE_MUTATED, named(writer))
        self._check_parts(node, source.input)
        if self.shapes.changes_dtype(source.input, node):
            raise _Stop(Code.OPERATOR_COMPUTED, f"{named(node)} has another dtype than {named(source.input)}")
        self._check_tensors(source, sites)
        if direction == "forward" and isinstance(source, Affine):
            self._check_dtype(source, sites)
        return sites

    def _for_any_rank(self, node: fx.Node, norm: Norm, direction: Direction) -> tuple[int, tuple[Site, ...]]:
        """The one number of axes for which the map of `norm` gets into convolutions, and these.

        A convolution tells the number, but for the batch axis, which is assumed. A linear layer does not.
        """
        found: dict[int, tuple[Site, ...]] = {}
        stops: list[_Stop] = []
        for rank in sorted(norm.ranks or {2, 3, 4, 5}):
            try:
                channels = Channels((1 - rank,), every(norm.channels))
                found[rank] = self._sites(node, norm, channels, direction)
            except _Stop as stop:
                stops.append(stop)
        if not found:
            raise next((stop for stop in stops if stop.code is Code.AXIS), stops[0])
        rank, sites = next(iter(found.items()))
        if len(found) > 1 or not all(site.operator.dims for site in sites):
            raise _Stop(Code.RANK_UNKNOWN, named(norm.input))
        return rank, sites

    def acting(self, source: Norm | Affine) -> Channels | None:
        """How the map of `source` acts; None if it is not known along which axis."""
        try:
            return self._channels(source)
        except _Stop:
            return None

    def refused(self, node: fx.Node) -> Iterator[Refusal]:
        """Why `node`, if it is a norm, is left; and the norms inside of what is called as a whole."""
        op = self.reader.read(node)
        taken = self.moves.keys() | self.mapped
        if isinstance(op, LeftNorm):
            yield Refusal.because(op.name, op.code, op.detail, place_of(node))
        elif isinstance(op, Norm) and node not in taken:
            stop = self._reason(node)
            yield Refusal.because(op.name, stop.code, stop.detail, place_of(node))
        elif isinstance(op, Affine) and node in self.written_out:
            left = next((part for part in self.written_out[node][::-1] if part not in taken), None)
            if left is not None:
                stop = self._reason(left)
                yield Refusal.because(str(op.norm), stop.code, stop.detail, place_of(node))
        elif node.op == "get_attr":
            inner = attribute(self.reader.root, str(node.target))
            for name in norms_inside(inner) if isinstance(inner, nn.Module) else []:
                place = f"{node.target} ({type(inner).__name__})"
                full = f"{node.target}.{name}".rstrip(".")
                yield Refusal.because(full, Code.INSIDE_OPAQUE, place, place_of(node))
        elif node.op == "call_function" and torch_name(node.target) is None and calls_norm(node.target):
            yield Refusal.because(node.name, Code.INSIDE_OPAQUE, str(node.target), place_of(node))

    def _written_out(self, node: fx.Node) -> tuple[fx.Node, ...]:
        op = self.reader.read(node)
        if not isinstance(op, Affine) or op.norm is None or op.role == "plus":
            return ()
        shifts = [user for user in node.users if getattr(self.reader.read(user), "norm", None) == op.norm]
        return (node, *shifts)

    def _reason(self, node: fx.Node) -> _Stop:
        """That of the direction in which there is an operator that could have absorbed the map."""
        merging = next((each for each in self._sums_of(node) if (each, "merged") in self.barred), None)
        if merging is not None:
            return _Stop(self.barred[merging, "merged"], named(merging))
        before, after = self.stopped[node, "backward"], self.stopped[node, "forward"]
        nothing_before = before.code in (Code.OPAQUE_PRODUCER, Code.NOTHING_BEFORE)
        return after if nothing_before and after.code is not Code.OPAQUE_PRODUCER else before

    def _sums_of(self, node: fx.Node) -> Iterator[fx.Node]:
        """`node`, and the sums of which it is a term."""
        seen = {node: None}
        waiting = [node]
        while waiting:
            each = waiting.pop()
            yield each
            more = [
                user for user in each.users if isinstance(self.reader.read(user), Sum) and user not in seen
            ]
            seen |= dict.fromkeys(more)
            waiting += more

    def _channels(self, source: Norm | Affine) -> Channels:
        """Along which axis the map of `source` acts."""
        if isinstance(source, Norm):
            index = every(source.channels)
            if source.ranks is not None and (source.unbatched or len(source.ranks) == 1):
                return Channels((1 - max(source.ranks),), index)
            shape = self.shapes.of(source.input)
            if shape is None or (source.ranks is not None and len(shape) not in source.ranks):
                raise _Stop(Code.RANK_UNKNOWN if shape is None else Code.AXIS, named(source.input))
            return Channels((1 - len(shape),), index)
        acted = [place - len(source.shape) for place, size in enumerate(source.shape) if size != 1]
        if len(acted) > 1:
            raise _Stop(Code.AXIS, named(source.input))
        if len(source.shape) > self.shapes.least_rank(source.input):
            shape = self.shapes.of(source.input)
            if shape is None or len(shape) < len(source.shape):
                raise _Stop(Code.RANK_UNKNOWN if shape is None else Code.AXIS, named(source.input))
        shift = source.role == "plus"
        scale = source.role != "plus" or source.negative
        if not acted:
            return Channels((), (0,), scale, shift)
        size = source.shape[acted[0]]
        assert isinstance(size, int)
        return Channels((acted[0],), every(size), scale, shift)

    # ---- backward ----

    def _backward(self, value: fx.Node, reader: fx.Node, channels: Channels) -> Iterator[Site]:
        """The operators that absorb `channels` if these act on `value` before `reader` reads it."""
        op = self.reader.read(value)
        if value in self.moves:
            self._check_only_reader(value, reader, channels)
            yield from self._backward(self.moves[value].source.input, value, channels)
        elif isinstance(op, Linear):
            self._check_only_reader(value, reader, channels)
            yield self._site(value, "output", op, channels)
        elif value in self.merged and not self.merged[value].bypassed:
            self._check_only_reader(value, reader, channels)
            yield self._site(value, "output", self.merged[value].operator, channels)
        elif isinstance(op, Transparent):
            self._check_only_reader(value, reader, channels)
            parts = op.backward(channels, self.shapes)
            if isinstance(parts, Code):
                raise _Stop(parts, named(value))
            if len(set(op.inputs)) != len(op.inputs):
                raise _Stop(Code.OTHER_USERS, f"{named(value)} reads a value twice")
            for source, part in zip(op.inputs, parts, strict=True):
                if any(entry != KEPT for entry in part.index):
                    yield from self._backward(source, value, part)
        else:
            raise self._opaque_producer(value, op)

    def _check_only_reader(self, value: fx.Node, reader: fx.Node, channels: Channels) -> None:
        """Who else reads `value` wants it as it was, unless it takes other channels of it."""
        others = [each for each in self._readers(value) if each is not reader]
        taken = self._taken(reader, value, channels)
        theirs = (self._taken(other, value, channels) for other in others)
        if others and (taken is None or any(each is None or not each.isdisjoint(taken) for each in theirs)):
            names = ", ".join(map(named, others))
            raise _Stop(Code.OTHER_USERS, f"{named(value)} -> {names}")

    def _taken(self, reader: fx.Node, value: fx.Node, channels: Channels) -> set[int] | None:
        """The channels that `reader` takes of `value`; None if it is no slice along their axis."""
        op = self.reader.read(reader)
        if not isinstance(op, Slice):
            return None
        shape = self.shapes.of(value)
        axis = op.place(shape)
        if shape is None or axis is None or channels.axes != (axis,):
            return None
        taken = op.taken(shape[axis])
        return None if taken is None else set(taken)

    def _readers(self, value: fx.Node) -> list[fx.Node]:
        """The nodes that read `value`; of a split those that read its parts."""
        found: list[fx.Node] = []
        for user in value.users:
            if isinstance(self.reader.read(user), Split):
                found += self._readers(user) or [user]
            elif not self.reader.is_query(user, value) and not self.reader.is_unused(user):
                found.append(user)
        return found

    def _opaque_producer(self, value: fx.Node, op: object) -> _Stop:
        if isinstance(op, (Norm, LeftNorm)):
            return _Stop(Code.NORM_BEFORE_LEFT, op.name)
        if value.op == "placeholder":
            return _Stop(Code.NOTHING_BEFORE, named(value))
        return self._opaque(value, op)

    # ---- forward ----

    def _forward(self, value: fx.Node, channels: Channels) -> Iterator[Site]:
        """The operators that absorb `channels` if these act on `value` before anybody reads it."""
        readers = self._readers(value)
        if not readers:
            raise _Stop(Code.OPAQUE_PRODUCER, f"{named(value)} -> nothing")
        for reader in readers:
            op = self.reader.read(reader)
            if reader in self.moves:
                yield from self._forward(reader, channels)
            elif isinstance(op, Linear) and op.input is value:
                needs = channels.linearly(Code.PADDING) if op.bordered else channels
                yield self._site(reader, "input", op, needs)
            elif isinstance(op, Transparent) and value in op.inputs:
                part = op.forward(value, channels, self.shapes)
                if isinstance(part, Code):
                    raise _Stop(part, named(reader))
                if any(entry != KEPT for entry in part.index):
                    yield from self._forward(reader, part)
            else:
                raise self._opaque(reader, op)

    def _opaque(self, node: fx.Node, op: object) -> _Stop:
        code, detail = (op.code, op.detail) if isinstance(op, Opaque) else (Code.OPAQUE_PRODUCER, "")
        return _Stop(code, detail or named(node))

    def _check_forward(self, node: fx.Node, source: Norm | Affine) -> None:
        """The value must be one that the operators after it take as it is, without what `node` made of it."""
        if self.reader.written_inputs(node):
            raise _Stop(Code.OPAQUE_PRODUCER, f"{named(node)} writes to its input")
        if isinstance(source, Norm):
            return
        shape = self.shapes.of(source.input)
        seen = self.shapes.seen(source.input) or shape or ()
        for axis in range(-len(source.shape), 0):
            # Where the constant is broadcast to the value, and the value is not broadcast to the constant.
            fits = shape is not None and -axis <= min(len(shape), len(seen))
            if shape is None or not fits or source.shape[axis] not in (1, shape[axis], seen[axis]):
                raise _Stop(Code.AXIS, named(source.input))

    # ---- both ----

    def _check_parts(self, node: fx.Node, value: fx.Node) -> None:
        """Autograd lets nobody write to a part of a split, and to what `node` makes of it, it does."""
        while isinstance(self.reader.read(value), (Slice, Within, Rearranged)) or value in self.gone:
            value = value.all_input_nodes[0] if value not in self.gone else self.gone[value]
            if isinstance(self.reader.read(value), Split) and self.memory.is_written_after(node):
                raise _Stop(Code.STATE_MUTATED, named(value))

    def _site(self, node: fx.Node, side: Literal["output", "input"], op: Linear, channels: Channels) -> Site:
        size = op.channels if side == "output" else op.in_channels
        owner = str(op.weight).rpartition(".")[0] or named(node)
        if len(channels.axes) > 1:
            raise _Stop(Code.MIXED, owner)
        if channels.axes not in ((), (-1 - op.dims,)):
            raise _Stop(Code.AXIS, owner)
        index = channels.over(size)
        if index is None:
            raise _Stop(Code.CHANNELS, f"{len(channels.index)} and {size} of {owner}")
        return Site(node, op, side, replace(channels, index=index, spread=None))

    def _check_tensors(self, source: Norm | Affine, sites: tuple[Site, ...]) -> None:
        """The numbers of `source` must be where the weights are, and must not change their dtype."""
        weights = [self.reader.tensor(site.operator.weight) for site in sites]
        tensor = self._numbers(source)
        name = named(sites[0].node)
        if len({weight.dtype for weight in weights}) != 1 or not all(weight.numel() for weight in weights):
            raise _Stop(Code.OPAQUE_PRODUCER, f"{name} is empty or of several dtypes")
        moves_along = isinstance(source, Affine) and not source.shape
        if tensor is not None and not moves_along and any(w.device != tensor.device for w in weights):
            devices = f"{weights[0].device}, {tensor.device}"
            raise _Stop(Code.OPAQUE_PRODUCER, f"{name} is on another device ({devices})")
        if isinstance(source, Affine):
            dtype = source.dtype or (torch.float32 if tensor is None else tensor.dtype)
            promoted = torch.promote_types(weights[0].dtype, dtype) if source.dtype else weights[0].dtype
            if promoted != weights[0].dtype or dtype.is_complex:
                raise _Stop(
                    Code.OPERATOR_COMPUTED, f"{source.constant} is {dtype}, {name} {weights[0].dtype}"
                )

    def _check_dtype(self, source: Affine, sites: tuple[Site, ...]) -> None:
        """The value must have the weights' dtype also without what the constant makes of it."""
        if self.shapes.dtype(source.input) != self.reader.tensor(sites[0].operator.weight).dtype:
            raise _Stop(
                Code.OPAQUE_PRODUCER, f"{named(source.input)}, whose dtype is not known to be the weight's"
            )

    def _numbers(self, source: Norm | Affine) -> torch.Tensor | None:
        if isinstance(source, Norm):
            return self.reader.tensor(source.mean)
        return self.reader.tensor(source.constant) if isinstance(source.constant, fx.Node) else None
