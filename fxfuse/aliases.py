"""Which values of a graph may lie in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping

from torch import fx, nn

from fxfuse.calls import IN_PLACE, operator_name
from fxfuse.layers import LINEAR_FUNCTIONS, NORM_FUNCTIONS, is_known
from fxfuse.table import LAYERS, LIKE_ALL, LIKE_INPUT, TRANSPARENT

Roots = Mapping[fx.Node, frozenset[fx.Node]]

_QUERY_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout"}
_QUERIES = {
    *("size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "element_size"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "sym_size"),
}
# Operators whose value is new memory, unless they write in place.
_FRESH = {
    *(*IN_PLACE, "div", "divide", "true_divide", "multiply", "subtract", "rsub", "neg"),
    *("cat", "concat", "concatenate"),
    *(*LINEAR_FUNCTIONS, *NORM_FUNCTIONS, *LIKE_ALL, *LIKE_INPUT),
}


def is_query(node: fx.Node) -> bool:
    """Whether `node` asks for shape, dtype or device, never for values."""
    if node.target is getattr:
        return node.args[1] in _QUERY_ATTRIBUTES
    return node.op != "call_module" and operator_name(node) in _QUERIES


def roots(
    graph: fx.Graph,
    written_inputs: Callable[[fx.Node], Iterable[fx.Node]],
    layer: Callable[[fx.Node], nn.Module | None],
    gone: Mapping[fx.Node, fx.Node],
) -> Roots:
    """For each node those whose memory its value may share: itself, or what it may be a view of.

    Args:
        graph: the graph.
        written_inputs: the inputs that a node may write to.
        layer: the torch.nn layer that a node calls, with nothing besides, or None.
        gone: nodes that are to go, and the node that is read in the place of each.
    """
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    attributes: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "get_attr":
            found[node] = frozenset({attributes.setdefault(str(node.target), node)})
        elif node in gone:
            found[node] = found[gone[node]]
        else:
            sources = _sources(node, [*written_inputs(node)], layer(node))
            found[node] = frozenset({node}).union(*(found[each] for each in sources))
    return found


def _sources(node: fx.Node, written: list[fx.Node], layer: nn.Module | None) -> Iterable[fx.Node]:
    """The inputs of which the value of `node` may be a view."""
    if written:
        return written
    if is_query(node):
        return ()
    if node.op == "call_module":
        fresh = layer is not None and is_known(layer) and type(layer) not in LAYERS
        return () if fresh else node.all_input_nodes
    name = operator_name(node)
    if name in _FRESH:
        return ()
    return node.all_input_nodes[:1] if name in TRANSPARENT else node.all_input_nodes
