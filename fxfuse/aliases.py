"""Which values of a graph may lie in the same memory."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping

from torch import fx, nn

from fxfuse.calls import IN_PLACE, operator_name
from fxfuse.layers import LINEAR_NAMES, NORM_FUNCTIONS, is_known
from fxfuse.proxies import gives_tensor
from fxfuse.table import LAYERS, LIKE_ALL, LIKE_INPUT, TRANSPARENT
from fxfuse.tree import attribute, has_hooks, storage

Roots = Mapping[fx.Node, frozenset[fx.Node]]

_QUERY_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout"}
_QUERIES = {
    *("size", "dim", "ndimension", "numel", "nelement", "is_floating_point", "is_complex", "element_size"),
    *("zeros_like", "ones_like", "empty_like", "full_like", "new_zeros", "new_ones", "new_empty", "sym_size"),
}
# Those of them that ask for what an operator and its input have in common.
_COMMON = {"ndim", "dtype", "device", "is_cuda", "dim", "ndimension", "is_floating_point", "is_complex"}
# Operators whose value is new memory, unless they write in place.
FRESH = {
    *("mean", "sum", "amax", "amin"),
    *(f"{kind}_pool{dims}d" for kind in ("max", "avg", "adaptive_max", "adaptive_avg") for dims in (1, 2, 3)),
    *(*IN_PLACE, "div", "divide", "true_divide", "multiply", "subtract", "rsub", "neg"),
    *("cat", "concat", "concatenate"),
    *(*LINEAR_NAMES, *NORM_FUNCTIONS, *LIKE_ALL, *LIKE_INPUT),
}


def is_query(node: fx.Node) -> bool:
    """Whether `node` asks for shape, dtype or device, never for values."""
    if node.target is getattr:
        return node.args[1] in _QUERY_ATTRIBUTES
    return node.op != "call_module" and operator_name(node) in _QUERIES


def asks_for_kind(node: fx.Node) -> bool:
    """Whether `node` asks for the number of axes, the dtype or the device, and for no sizes."""
    return is_query(node) and (node.args[1] if node.target is getattr else operator_name(node)) in _COMMON


def plain_layer(root: nn.Module, node: fx.Node) -> nn.Module | None:
    """The module that `node` calls, if the call does what the module's class says and nothing more."""
    module = attribute(root, str(node.target)) if node.op == "call_module" else None
    return None if module is None or has_hooks(module) or "forward" in module.__dict__ else module


def roots(
    graph: fx.Graph,
    root: nn.Module,
    written_inputs: Callable[[fx.Node], Iterable[fx.Node]],
    gone: Mapping[fx.Node, fx.Node],
) -> Roots:
    """For each node those whose memory its value may share: itself, or what it may be a view of.

    Args:
        graph: the graph.
        root: the modules that it calls.
        written_inputs: the inputs that a node may write to.
        gone: nodes that are to go, and the node that is read in the place of each.
    """
    found: dict[fx.Node, frozenset[fx.Node]] = {}
    stored: dict[int, fx.Node] = {}
    tensors: set[fx.Node] = set()
    for node in graph.nodes:
        if node.op == "get_attr":
            found[node] = frozenset({stored.setdefault(storage(attribute(root, str(node.target))), node)})
        elif node in gone:
            found[node] = found[gone[node]]
        else:
            written = [*written_inputs(node)]
            sources = written or _viewed(node, plain_layer(root, node), tensors)
            found[node] = frozenset({node}).union(*(found[each] for each in sources))
        if node.op == "get_attr" or gives_tensor(node, root, tensors):
            tensors.add(node)
    return found


def _viewed(node: fx.Node, layer: nn.Module | None, tensors: Container[fx.Node]) -> Iterable[fx.Node]:
    """The inputs of which the value of `node`, if it writes to none, may be a view."""
    if is_query(node):
        return ()
    if node.op == "call_module":
        name = None if layer is None else LAYERS.get(type(layer))
        fresh = layer is not None and is_known(layer) and (name is None or name in FRESH)
        return () if fresh else node.all_input_nodes
    name = operator_name(node)
    joins = getattr(node.target, "__module__", "") == "_operator"  # x + y, of tuples too
    if name in FRESH and not (joins and any(each not in tensors for each in node.all_input_nodes)):
        return ()
    return node.all_input_nodes[:1] if name in TRANSPARENT else node.all_input_nodes
