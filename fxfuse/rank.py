"""How many axes a value has, where the graph's structure fixes it.

A batch norm works on axis 1, a convolution's channels are counted from the end. The two agree only for
the right number of axes, which no size proves: sizes may agree by chance.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfuse.calls import torch_name
from fxfuse.ops import Linear, Norm, Reader, Transparent

# Element by element, so the result has the rank of the input.
_ELEMENTWISE_MODULES = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign),
)
_ELEMENTWISE_FUNCTIONS = {
    *("relu", "relu_", "relu6", "leaky_relu", "elu", "selu", "celu", "gelu", "silu", "mish"),
    *("sigmoid", "tanh", "hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign"),
}


def rank_of(node: fx.Node, reader: Reader) -> int | None:
    """The number of axes that `node`'s value has on every run that gets past it; None if not fixed."""
    while True:
        op = reader.read(node)
        if isinstance(op, Norm) and op.ranks is not None and len(op.ranks) == 1:
            return next(iter(op.ranks))
        if isinstance(op, (Linear, Norm, Transparent)):
            node = op.input
        elif _is_elementwise(node, reader) and isinstance(node.args[0], fx.Node):
            node = node.args[0]
        else:
            return _asserted(node) or _flattened(node, reader)


def _is_elementwise(node: fx.Node, reader: Reader) -> bool:
    if not node.args:
        return False
    if node.op == "call_module":
        return type(reader.layer(node)) in _ELEMENTWISE_MODULES
    name = torch_name(node.target) if node.op == "call_function" else node.target
    return node.op != "get_attr" and name in _ELEMENTWISE_FUNCTIONS


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


def _flattened(node: fx.Node, reader: Reader) -> int | None:
    """2 after a flatten of all axes but the first; the number of sizes after a view or reshape."""
    if node.op == "call_module":
        layer = reader.layer(node)
        return 2 if type(layer) is nn.Flatten and (layer.start_dim, layer.end_dim) == (1, -1) else None
    if node.target in (torch.flatten, "flatten"):
        names = dict(zip(("start_dim", "end_dim"), node.args[1:], strict=False)) | dict(node.kwargs)
        return 2 if names.get("start_dim") == 1 and names.get("end_dim", -1) == -1 else None
    if node.op == "call_method" and node.target in ("view", "reshape") and not node.kwargs:
        sizes = node.args[1:]
        if len(sizes) == 1 and isinstance(sizes[0], (tuple, list)):
            return len(sizes[0])
        return len(sizes) if len(sizes) > 1 else None
    return None


class _RankRecorder(fx.Interpreter):
    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        super().__init__(root, graph=graph)
        self.ranks: dict[fx.Node, int] = {}

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if isinstance(result, Tensor):
            self.ranks[n] = result.dim()
        return result


def observed_ranks(root: nn.Module, graph: fx.Graph, inputs: Sequence[Any]) -> Mapping[fx.Node, int]:
    """The number of axes of every value on a run with `inputs`."""
    recorder = _RankRecorder(root, graph)
    recorder.run(*inputs)
    return recorder.ranks
