"""What the structure of a graph fixes of shapes and dtypes, for every run that gets through it.

A batch norm works on axis 1, a convolution's channels are counted from the end. Whether the two agree, and
what a reshape does to the channels, no size that was seen once can prove: sizes agree by chance. So a size is
a number only where weights or arguments fix it; any other is a symbol, which equals nothing but itself.

The number of axes of a value comes from what made it; or from a norm or an assertion that checks it; or from
a run with example inputs; or, for a convolution, from the assumption that its input has a batch axis. The
last two are assumed, not known: whoever uses them asks `assumed` for what the graph has to assert.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Mapping
from functools import cached_property
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse.channels import Shape, Size
from fxfuse.ops import Affine, Linear, Norm, Opaque, Query, Reader
from fxfuse.transparent import Concat, Within, broadcast

_ARITHMETIC: Mapping[Any, Callable[[Any, Any], Any]] = {
    each: each for each in (operator.add, operator.sub, operator.mul, operator.floordiv)
}


class GraphShapes:
    """Shapes and dtypes of the values of one graph.

    Args:
        graph: the graph, which must not change.
        reader: reads its nodes.
        observed: the values' shapes and dtypes on a run with example inputs, of which only the number of
            axes and the dtype are used.
    """

    def __init__(self, graph: fx.Graph, reader: Reader, observed: Mapping[fx.Node, Tensor]) -> None:
        self._graph = graph
        self._reader = reader
        self._observed = observed
        self._shapes: dict[fx.Node, Shape | None] = {}
        self._assumed: dict[fx.Node, frozenset[fx.Node]] = {}
        self._dtypes: dict[fx.Node, torch.dtype | None] = {}
        self.consulted: set[fx.Node] = set()

    def of(self, node: fx.Node) -> Shape | None:
        """The shape of a node's value; None if not even its number of axes is known."""
        if not self._shapes:
            self._sweep()
        self.consulted.add(node)
        return self._shapes.get(node)

    def dtype(self, node: fx.Node) -> torch.dtype | None:
        """The dtype of a node's value; None if it is not known."""
        self.of(node)
        return self._dtypes.get(node)

    def assumed(self, node: fx.Node) -> frozenset[fx.Node]:
        """The nodes whose number of axes is assumed where the shape of `node` is known."""
        self.of(node)
        return self._assumed.get(node, frozenset())

    def size(self, value: Any) -> Size:
        """The number that an argument of a call is: a number, a known size, or arithmetic of those."""
        if not isinstance(value, fx.Node):
            return value if isinstance(value, int) else None
        if value.target in _ARITHMETIC and not value.kwargs:
            left, right = (self.size(argument) for argument in value.args)
            known = isinstance(left, int) and isinstance(right, int)
            return _ARITHMETIC[value.target](left, right) if known else None
        source, axis = _asked(value)
        shape = None if source is None else self._shapes.get(source)
        return shape[axis] if shape is not None and -len(shape) <= axis < len(shape) else None

    def _sweep(self) -> None:
        for node in self._graph.nodes:
            shape, dtype = self._read(node)
            assumed = [self._assumed.get(source, frozenset()) for source in node.all_input_nodes]
            self._assumed[node] = frozenset().union(*assumed)
            if shape is None and node in self._checked:
                shape, self._assumed[node] = (None,) * self._checked[node], frozenset()
            op = self._reader.read(node)
            if shape is None and (node in self._observed or (isinstance(op, Linear) and op.dims)):
                seen = self._observed.get(node)
                rank = op.dims + 2 if seen is None and isinstance(op, Linear) else seen.dim() if seen is not None else 0
                shape, self._assumed[node] = (None,) * rank, frozenset({node})
            if shape is not None and isinstance(op, Linear):
                shape = _with(shape, -1 - op.dims, op.channels)
            if shape is not None and isinstance(op, Norm) and not op.unbatched and len(shape) > 1:
                shape = _with(shape, 1 - len(shape), op.channels)
            if shape is not None:
                shape = tuple((node, place) if size is None else size for place, size in enumerate(shape))
            self._shapes[node] = shape
            seen = self._observed.get(node)
            self._dtypes[node] = dtype if dtype is not None or seen is None else seen.dtype

    def _read(self, node: fx.Node) -> tuple[Shape | None, torch.dtype | None]:
        """Shape and dtype, as far as they follow from those of the inputs."""
        op = self._reader.read(node)
        if node.op == "get_attr":
            value = self._reader.attribute(str(node.target))
            return (tuple(value.shape), value.dtype) if isinstance(value, Tensor) else (None, None)
        if isinstance(op, Linear):
            shape = self._shapes.get(op.input)
            changed = None if shape is None else tuple(
                None if -1 - op.dims < place - len(shape) < 0 and op.dims else size
                for place, size in enumerate(shape)
            )
            return changed, self._reader.tensor(op.weight).dtype
        if isinstance(op, (Norm, Affine)):
            return self._shapes.get(op.input), self._dtypes.get(op.input)
        if isinstance(op, Opaque) and op.like:
            dtypes = {self._dtypes.get(source) for source in op.like}
            shape = broadcast([self._shapes.get(source) for source in op.like])
            return shape, dtypes.pop() if len(dtypes) == 1 else None
        if isinstance(op, (Opaque, Query)) or not hasattr(op, "inputs"):
            return None, None
        dtypes = {self._dtypes.get(source) for source in op.inputs}
        return op.shape(self), dtypes.pop() if len(dtypes) == 1 else None

    @cached_property
    def _checked(self) -> dict[fx.Node, int]:
        """Numbers of axes that norms and assertions check, as far back as they must have been the same."""
        found: dict[fx.Node, int] = {}
        for node in reversed(self._graph.nodes):
            op = self._reader.read(node)
            if isinstance(op, Norm) and op.ranks is not None and len(op.ranks) == 1:
                found.setdefault(op.input, *op.ranks)
                found.setdefault(node, *op.ranks)
            rank = found.get(node) or _asserted(node)
            if rank is None:
                continue
            found[node] = rank
            if isinstance(op, (Linear, Norm, Affine)) or (isinstance(op, Within) and not op.removes):
                found.setdefault(op.input, rank)
            elif isinstance(op, Concat):
                for source in op.inputs:
                    found.setdefault(source, rank)
        return found


def _with(shape: Shape, place: int, size: int) -> Shape:
    """`shape` with `size` at `place`, if it has such an axis."""
    if -place > len(shape):
        return shape
    return (*shape[:place], size, *shape[len(shape) + place + 1 :])


def _asked(node: fx.Node) -> tuple[fx.Node | None, int]:
    """The node whose size `node` is, and along which axis: x.shape[i], x.size(i), x.size()[i]."""
    if node.target in ("size", torch.ops.aten.sym_size.int) and len(node.args) == 2:
        return (node.args[0], node.args[1]) if isinstance(node.args[1], int) else (None, 0)  # type: ignore[return-value]
    if node.target is not operator.getitem or not isinstance(node.args[1], int):
        return None, 0
    sizes = node.args[0]
    is_shape = isinstance(sizes, fx.Node) and (
        (sizes.target is getattr and sizes.args[1] == "shape") or (sizes.target == "size" and len(sizes.args) == 1)
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


def observed_values(root: torch.nn.Module, graph: fx.Graph, inputs: Any) -> Mapping[fx.Node, Tensor]:
    """For every value of a run with `inputs` a tensor without memory, of its shape and dtype."""
    recorder = _Recorder(root, graph)
    recorder.run(*inputs)
    return recorder.values
