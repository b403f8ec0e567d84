"""Whether the samples of a batch are computed apart from one another.

Samples lie along the first axis of every value that depends on the inputs, each in one place, or in some in a
row as the windows of images. That no operator mixes them is read from the engine that moves maps: a map with
an entry for each sample, which acts on what an operator gives, has to come from maps that act on the same
samples of what it reads.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse.calls import arguments, operator_name
from fxfuse.channels import Channels, Shape, every
from fxfuse.nodes import Affine, Linear, Norm, Opaque
from fxfuse.ops import Reader
from fxfuse.shapes import GraphShapes
from fxfuse.table import SPLITS
from fxfuse.transparent import Sum, Transparent
from fxfuse.tree import attribute


def keeps_samples_apart(module: fx.GraphModule, batch: int) -> bool:
    """Whether each of `batch` samples has results that depend on it alone."""
    proof = _Proof(module, batch)
    for node in module.graph.nodes:
        if node.op == "output":
            return proof.apart.issuperset(node.all_input_nodes)
        if node.op == "get_attr" or operator_name(node) in {*SPLITS, "unbind"}:  # whose parts are looked at
            continue
        if not proof.holds(node):
            return False
        proof.apart.add(node)
    raise AssertionError("a graph ends with its output")


def is_for_fewer(one: fx.GraphModule, other: fx.GraphModule, batch: int, fewer: int) -> bool:
    """Whether `other` is `one` for `fewer` samples than `batch`, which only shapes may tell.

    Each value has as many places for a sample in the one as in the other, and no other size differs.
    """
    twins: dict[fx.Node, fx.Node] = {}
    if len(one.graph.nodes) != len(other.graph.nodes):
        return False
    for node, twin in zip(one.graph.nodes, other.graph.nodes, strict=True):
        twins[node] = twin
        if (node.op, node.target) != (twin.op, twin.target):
            return False
        if node.op == "get_attr":
            if not torch.equal(*(attribute(each, str(node.target)) for each in (one, other))):
                return False
        elif not all(_is_smaller(*each, batch, fewer) for each in _values(node, twin)):
            return False
        given, structure = pytree.tree_flatten((node.args, node.kwargs))
        others, same = pytree.tree_flatten((twin.args, twin.kwargs))
        reshapes = operator_name(node) in ("view", "reshape")  # to sizes that its value has
        if structure != same or not all(
            twins[each] is other if isinstance(each, fx.Node) else each == other or reshapes
            for each, other in zip(given, others, strict=True)
        ):
            return False
    return keeps_samples_apart(other, fewer)


def _values(node: fx.Node, twin: fx.Node) -> Iterator[tuple[Any, Any]]:
    """What the two give, leaf by leaf."""
    values, others = (pytree.tree_leaves(each.meta.get("val")) for each in (node, twin))
    return zip(values, others, strict=True)


def _is_smaller(value: Any, other: Any, batch: int, fewer: int) -> bool:
    if not (isinstance(value, Tensor) and isinstance(other, Tensor)):
        return bool(value == other)
    if value.dim() != other.dim() or not value.dim() or value.dtype != other.dtype:
        return False
    return value.shape[0] * fewer == other.shape[0] * batch and value.shape[1:] == other.shape[1:]


class _Proof:
    """Shows of one node after the other that it keeps samples apart.

    Attributes:
        apart: the nodes of which that is known.
    """

    def __init__(self, module: fx.GraphModule, batch: int) -> None:
        self.apart: set[fx.Node] = set()
        self._batch = batch
        self._reader = Reader(module, module.graph)
        self._shapes = GraphShapes(module.graph, self._reader, {}, guarded=True)

    def holds(self, node: fx.Node) -> bool:
        """Whether `node` keeps samples apart, as those before it do."""
        shape = self._shapes.of(node)
        if not shape or not isinstance(shape[0], int) or shape[0] % self._batch:
            return False
        if node.op == "placeholder":
            return shape[0] == self._batch
        if self._is_part(node, shape):
            return True
        op = self._reader.read(node)
        if isinstance(op, Transparent):
            return self._passes(op, shape)
        read = [each for each in node.all_input_nodes if each in self.apart]
        if any(self._size(each) != shape[0] for each in read):
            return False
        if isinstance(op, (Linear, Norm, Affine)):
            rank = self._rank(op.input)
            least = op.dims + 2 if isinstance(op, Linear) and op.dims else 2
            constants = [op.shape] if isinstance(op, Affine) else []
            return read == [op.input] and rank >= least and all(self._is_alike(c, shape) for c in constants)
        if isinstance(op, Opaque) and op.like:
            return self._acts_on_elements(node, shape)
        return self._is_product(node, read) or self._is_softmax(node, read)

    def _passes(self, op: Transparent, shape: Shape) -> bool:
        found = op.backward(self._samples(shape), self._shapes)
        if not isinstance(found, list):
            return False
        for source, channels in zip(op.inputs, found, strict=True):
            if source in self.apart:
                if not self._are_samples(channels, source):
                    return False
            elif not isinstance(op, Sum) or not self._is_alike(self._shapes.of(source), shape):
                return False
        return True

    def _samples(self, shape: Shape) -> Channels:
        """A map with an entry for each sample, on a value of that shape."""
        assert isinstance(shape[0], int)
        places = shape[0] // self._batch
        index = every(self._batch) if places == 1 else tuple(place // places for place in range(shape[0]))
        return Channels((-len(shape),), index)

    def _are_samples(self, channels: Channels, source: fx.Node) -> bool:
        """Whether these are the samples of `source`, perhaps with axes along which they do not differ."""
        shape = self._shapes.of(source)
        assert shape is not None
        if channels.axes[:1] != (-len(shape),) or channels.spread is not None:
            return False
        others = [shape[axis] for axis in channels.axes[1:]]
        if not all(isinstance(size, int) for size in others):
            return False
        alike = math.prod(size for size in others if isinstance(size, int))
        return channels.index == tuple(entry for entry in self._samples(shape).index for _ in range(alike))

    def _acts_on_elements(self, node: fx.Node, shape: Shape) -> bool:
        if self._normalised_axes(node) >= len(shape):
            return False
        return all(
            self._rank(each) == len(shape)
            if each in self.apart
            else self._is_alike(self._shapes.of(each), shape)
            for each in node.all_input_nodes
        )

    def _normalised_axes(self, node: fx.Node) -> float:
        """Over how many of the last axes it takes means, if it does more than to act on elements."""
        layer = self._reader.layer(node)
        if layer is not None:
            return len(layer.normalized_shape) if isinstance(layer, nn.LayerNorm) else 0
        name = operator_name(node)
        if name in ("layer_norm", "native_layer_norm"):
            return len(arguments(node)["normalized_shape"])
        return math.inf if name == "normalize" else 0

    def _is_product(self, node: fx.Node, read: Sequence[fx.Node]) -> bool:
        """Whether it is one of matrices for each sample, or an attention."""
        factors = {"matmul": 2, "bmm": 2, "scaled_dot_product_attention": 3}.get(operator_name(node), 0)
        ranks = {self._rank(each) for each in read}
        masks = [each for each in node.all_input_nodes if each not in self.apart]
        return (
            factors > 0
            and len(ranks) == 1
            and min(ranks) >= 3
            and all(each in self.apart for each in node.args[:factors])
            and all(
                factors == 3 and self._is_alike(self._shapes.of(each), self._shapes.of(node) or ())
                for each in masks
            )
        )

    def _is_softmax(self, node: fx.Node, read: Sequence[fx.Node]) -> bool:
        if operator_name(node) not in ("softmax", "log_softmax") or len(read) != 1:
            return False
        axis = arguments(node).get("dim")
        return isinstance(axis, int) and axis % self._rank(read[0]) != 0

    def _is_part(self, node: fx.Node, shape: Shape) -> bool:
        """Whether it is a part of what was taken apart along another axis."""
        whole = node.args[0] if node.target is operator.getitem else None
        if not isinstance(whole, fx.Node) or operator_name(whole) != "unbind":
            return False
        source, axis = whole.all_input_nodes[0], arguments(whole).get("dim", 0)
        is_other = isinstance(axis, int) and axis % self._rank(source) != 0
        return is_other and source in self.apart and self._size(source) == shape[0]

    def _rank(self, node: fx.Node) -> int:
        return len(self._shapes.of(node) or ())

    def _size(self, node: fx.Node) -> object:
        """The size of the first axis."""
        return (self._shapes.of(node) or (None,))[0]

    def _is_alike(self, constant: Shape | None, shape: Shape) -> bool:
        """Whether a constant of that shape is the same for all samples of a value of the other shape."""
        return constant is not None and (len(constant) < len(shape) or constant[0] == 1)
