"""What the structure of a graph fixes of shapes and dtypes, for every run that gets through it.

A batch norm works on axis 1, a convolution's channels are counted from the end. Whether the two agree, and
what a reshape does to the channels, no size that was seen once can prove: sizes agree by chance. So a size is
a number only where weights or arguments fix it; any other is a symbol, which equals nothing but itself.

The number of axes of a value comes from what made it; or from a norm or an assertion that checks it; or from
a run with example inputs; or, for a convolution, from the assumption that its input has a batch axis. The
last two are assumed, not known: whoever uses them asks `assumed` for what the graph has to assert.

A compiler's graph is different: Dynamo and torch.export guard what they have seen. There the number of axes
is known, and every size: it is a number, or an expression of the compiler's symbols, equal to those alike.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse.channels import Shape, Size
from fxfuse.inputs import sample
from fxfuse.nodes import Affine, Linear, Norm, Op, Opaque
from fxfuse.ops import Reader
from fxfuse.replica import isolated
from fxfuse.runs import clean_run
from fxfuse.transparent import Concat, Rearranged, Slice, Sum, Transparent, Within, broadcast
from fxfuse.tree import attribute

_ARITHMETIC: Mapping[Any, Callable[[Any, Any], Any]] = {
    each: each for each in (operator.add, operator.sub, operator.mul, operator.floordiv)
}


@dataclass(frozen=True)
class _Rank:
    """A number of axes, and what has to be assumed for it."""

    number: int
    assumed: frozenset[tuple[fx.Node, int]] = frozenset()


class GraphShapes:
    """Shapes and dtypes of the values of one graph.

    Args:
        graph: the graph, which must not change.
        reader: reads its nodes.
        observed: the values on a run with example inputs, tensors without numbers, of which only the number
            of axes and the dtype are used. Those on the run of torch.export are in the graph itself.
        guarded: whether the graph is never run on other shapes than those observed, up to symbols in them.
            Then sizes are used too, and `observed` has those that are values.
    """

    def __init__(
        self, graph: fx.Graph, reader: Reader, observed: Mapping[fx.Node, Any], *, guarded: bool = False
    ) -> None:
        self._graph = graph
        self._reader = reader
        self._observed = observed
        self._guarded = guarded
        self._shapes: dict[fx.Node, Shape | None] = {}
        self._assumed: dict[fx.Node, frozenset[tuple[fx.Node, int]]] = {}
        self._least: dict[fx.Node, int] = {}
        self._dtypes: dict[fx.Node, torch.dtype | None] = {}
        self._is_swept = False
        self.consulted: set[fx.Node] = set()

    def of(self, node: fx.Node) -> Shape | None:
        """The shape of a node's value; None if not even its number of axes is known."""
        self._swept()
        self.consulted.add(node)
        return self._shapes.get(node)

    def least_rank(self, node: fx.Node) -> int:
        """How many axes a node's value has at least, with nothing assumed."""
        self._swept()
        return self._least[node]

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of a node's value; None if it is not known."""
        self.of(node)
        return self._dtypes.get(node)

    def changes_dtype(self, before: fx.Node, after: fx.Node) -> bool:
        """Whether a compiler saw that one value has another dtype than the other, as autocast may make it."""
        values = [self._value(node) for node in (before, after)]
        return self._guarded and len({value.dtype for value in values if isinstance(value, Tensor)}) > 1

    def seen(self, node: fx.Node) -> torch.Size | None:
        """The shape that `node` had on the run with example inputs; guarded ones are as `of` says."""
        return None if self._guarded or node not in self._observed else self._observed[node].shape

    def assumed(self, node: fx.Node) -> frozenset[tuple[fx.Node, int]]:
        """The numbers of axes that are assumed, of some nodes, where the shape of `node` is known."""
        self.of(node)
        return self._assumed.get(node, frozenset())

    def size(self, value: Any) -> Size:
        """The number that an argument of a call is: a number, a known size, or arithmetic of those."""
        if not isinstance(value, fx.Node):
            return value if isinstance(value, int) else None
        if self._guarded and self._value(value) is not None:
            return _guarded_size(self._value(value))
        if value.target in _ARITHMETIC and not value.kwargs:
            left, right = (self.size(argument) for argument in value.args)
            known = isinstance(left, int) and isinstance(right, int)
            return _ARITHMETIC[value.target](left, right) if known else None
        source, axis = _asked(value)
        shape = None if source is None else self.of(source)
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None

    def _value(self, node: fx.Node) -> Any:
        """What was seen of the value of `node`: a tensor without numbers, or a size."""
        return self._observed.get(node, node.meta.get("val"))

    def _swept(self) -> None:
        if not self._is_swept:
            self._is_swept = True
            self._sweep()
            self.consulted.clear()

    def _least_rank(self, op: Op) -> int:
        if isinstance(op, Linear):
            return op.rank or op.dims + 1
        if isinstance(op, Norm):
            return max(self._least[op.input], min(op.ranks or {2}))
        if isinstance(op, Affine):
            return max(self._least[op.input], len(op.shape))
        if isinstance(op, Opaque):
            return max((self._least[source] for source in op.like), default=0)
        if isinstance(op, Rearranged):
            return op.rank or 0
        if isinstance(op, (Concat, Slice, Sum)) or (isinstance(op, Within) and not op.removes):
            return max(self._least[source] for source in op.inputs)
        return 0

    def _sweep(self) -> None:
        for node in self._graph.nodes:
            op = self._reader.read(node)
            shape, dtype = self._follow(node, op)
            assumed = frozenset[tuple[fx.Node, int]]().union(
                *(self._assumed[each] for each in node.all_input_nodes)
            )
            seen = self._value(node)
            seen = seen if isinstance(seen, Tensor) and node not in self._reader.constants else None
            rank = self._checked.get(node)
            if rank is not None and rank.assumed and (shape is not None or seen is not None):
                rank = None
            if seen is not None and self._guarded:
                shape, rank, assumed = tuple(map(_guarded_size, seen.shape)), None, frozenset()
            elif rank is None and shape is None and seen is not None:
                rank = _Rank(seen.dim(), frozenset({(node, seen.dim())}))
            if rank is not None and (shape is None or len(shape) == rank.number):
                shape, assumed = shape or (None,) * rank.number, rank.assumed
            if shape is not None:
                shape = _with_channels(shape, op)
                for axis, size in self._channels.get(node, ()):
                    place = axis if axis >= 0 else len(shape) + axis
                    shape = tuple(size if each == place else old for each, old in enumerate(shape))
                shape = tuple((node, place) if size is None else size for place, size in enumerate(shape))
            self._shapes[node], self._assumed[node] = shape, assumed
            self._least[node] = self._least_rank(op) if shape is None or assumed else len(shape)
            # Under autocast an operator has another dtype than its weight; a compiler's graph shows that.
            observes = seen is not None and (dtype is None or self._guarded)
            self._dtypes[node] = seen.dtype if observes else dtype

    def _follow(self, node: fx.Node, op: Op) -> tuple[Shape | None, torch.dtype | None]:
        """Shape and dtype, as far as they follow from those of the inputs."""
        if node.op == "get_attr":
            value = attribute(self._reader.root, str(node.target))
            return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (None, None)
        if isinstance(op, Linear):
            shape = self._shapes[op.input]
            kept = None if shape is None else (*shape[: len(shape) - op.dims], *(None,) * op.dims)
            return kept, self._reader.tensor(op.weight).dtype
        if isinstance(op, Affine):
            return broadcast([self._shapes[op.input], op.shape]), self._dtypes[op.input]
        if isinstance(op, Norm):
            return self._shapes[op.input], self._dtypes[op.input]
        if isinstance(op, Opaque) and op.like:
            return broadcast([self._shapes[source] for source in op.like]), self._common_dtype(op.like)
        if isinstance(op, Transparent):
            return op.shape(self), self._common_dtype(op.inputs)
        return None, None

    def _common_dtype(self, sources: Sequence[fx.Node]) -> torch.dtype | None:
        """The floating dtype of all of these; None if they differ, or are not known."""
        dtypes = {self._dtypes[source] for source in sources}
        found = dtypes.pop() if len(dtypes) == 1 else None
        return found if found is not None and found.is_floating_point else None

    @cached_property
    def _checked(self) -> dict[fx.Node, _Rank]:
        """Numbers of axes that norms and assertions check, as far back as they must have been the same.

        And those that convolutions have unless the batch axis is missing, which is assumed not to be.
        """
        found: dict[fx.Node, _Rank] = {}
        for node in reversed(self._graph.nodes):
            op, asserted = self._reader.read(node), _asserted(node)
            if isinstance(op, Norm) and op.ranks is not None and len(op.ranks) == 1:
                found[op.input] = found[node] = _Rank(max(op.ranks))
            if isinstance(op, Rearranged) and op.takes is not None:
                found[op.input] = _Rank(op.takes)
            if asserted is not None:
                found[node] = _Rank(asserted)
            elif isinstance(op, Linear) and op.rank is not None:
                found[op.input] = found[node] = _Rank(op.rank)
            elif isinstance(op, Linear) and op.dims:
                found.setdefault(node, _Rank(op.dims + 2, frozenset({(node, op.dims + 2)})))
            if node not in found:
                continue
            sources: Sequence[fx.Node] = ()
            if isinstance(op, (Linear, Norm, Slice)):
                sources = (op.input,)
            elif isinstance(op, Affine):
                sources = (op.input,) if len(op.shape) < found[node].number else ()
            elif isinstance(op, Concat) or (isinstance(op, Within) and not op.removes):
                sources = op.inputs
            for source in sources:
                if source not in found or found[source].assumed:
                    found[source] = found[node]
        return found

    @cached_property
    def _channels(self) -> dict[fx.Node, list[tuple[int, int]]]:
        """Sizes, by axis, that norms and operators demand of their inputs."""
        found: dict[fx.Node, list[tuple[int, int]]] = {}
        for node in self._graph.nodes:
            op = self._reader.read(node)
            if isinstance(op, Linear):
                found.setdefault(op.input, []).append((-1 - op.dims, op.in_channels))
            elif isinstance(op, Norm) and not op.unbatched:
                found.setdefault(op.input, []).append((1, op.channels))
        return found


def _guarded_size(size: Any) -> Size:
    """The expression of one of the compiler's symbols; None for what is no size."""
    if isinstance(size, torch.SymInt):
        expression = size.node.expr
        return int(expression) if expression.is_Integer else expression
    return size if type(size) is int else None


def _with_channels(shape: Shape, op: Op) -> Shape:
    """`shape` with the number of channels that an operator or a norm has, where these lie."""
    if isinstance(op, Linear) and len(shape) > op.dims:
        place = len(shape) - 1 - op.dims
    elif isinstance(op, Norm) and not op.unbatched and len(shape) > 1:
        place = 1
    else:
        return shape
    return (*shape[:place], op.channels, *shape[place + 1 :])


def _asked(node: fx.Node) -> tuple[fx.Node | None, int]:
    """The node whose size `node` is, and along which axis: x.shape[i], x.size(i), x.size()[i]."""
    if node.target in ("size", torch.ops.aten.sym_size.int) and len(node.args) == 2:
        return (node.args[0], node.args[1]) if isinstance(node.args[1], int) else (None, 0)  # type: ignore[return-value]
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return None, 0
    sizes = node.args[0]
    is_shape = isinstance(sizes, fx.Node) and (
        (sizes.target is getattr and sizes.args[1] == "shape")
        or (sizes.target == "size" and len(sizes.args) == 1)
    )
    return (sizes.args[0], node.args[1]) if is_shape else (None, 0)  # type: ignore[return-value, union-attr]


def _asserted(node: fx.Node) -> int | None:
    """k, where the model itself asserts ``x.ndim == k``, as timm's norms do."""
    for query in node.users:
        if query.target not in (getattr, "dim", "ndimension") or query.args[1:] not in ((), ("ndim",)):
            continue
        for test in query.users:
            is_equality = getattr(test.target, "__name__", "") == "eq" and isinstance(test.args[1], int)
            if is_equality and any(user.target is torch._assert for user in test.users):
                return int(str(test.args[1]))
    return None


class _Recorder(fx.Interpreter):
    def __init__(self, root: torch.nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.values: dict[fx.Node, Tensor] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.values[n] = torch.empty_like(result, device="meta")
        return result


def observed_values(
    root: torch.nn.Module, graph: fx.Graph, inputs: Sequence[Any]
) -> Mapping[fx.Node, Tensor]:
    """For every value of a run with `inputs` a tensor without memory, of its shape and dtype."""
    recorder = _Recorder(isolated(root), graph)
    with clean_run(sample(root, inputs, seed=0), seed=0) as own:
        recorder.run(*own)
    return recorder.values
