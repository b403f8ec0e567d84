"""Values that do not depend on the input: parameters, buffers, and what a model computes from them alone.

Weight normalisation, weight standardisation and masks are such expressions. They are evaluated as the model
would evaluate them, in its own dtype.
"""

from __future__ import annotations

from collections.abc import Callable, Set
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse.calls import called_name, operator_name, torch_name, written_inputs

# Functions of torch.nn.functional that are written in Python and draw no random numbers.
_PURE = frozenset({"batch_norm", "layer_norm", "group_norm", "normalize", "softmax", "pad"})
# What makes a tensor of nothing but numbers.
_MAKERS = frozenset({"tensor", "scalar_tensor", "full", "ones", "zeros", "arange"})


class Constants:
    """The constant values of one graph.

    Args:
        graph: the graph.
        attribute: gives a parameter or buffer by its qualified name; None for one that may be written to.
        written: the nodes to whose memory any node may write.
    """

    def __init__(self, graph: fx.Graph, attribute: Callable[[str], Any], written: Set[fx.Node]) -> None:
        self._attribute = attribute
        self._written = written
        # As they are now: the graph may be edited later.
        self._known: dict[fx.Node, tuple[Any, Any]] = {}
        self._values: dict[fx.Node, Any] = {}
        for node in graph.nodes:
            if self._is_constant(node):
                self._known[node] = (node.args, node.kwargs)

    def __contains__(self, node: object) -> bool:
        return node in self._known

    def value(self, node: fx.Node) -> Any:
        """What `node`, one of the constants, gives."""
        if node not in self._values:
            self._values[node] = self._evaluated(node)
        return self._values[node]

    def forget(self) -> None:
        """Evaluates all constants anew from now on."""
        self._values.clear()

    def trains(self, node: fx.Node) -> bool:
        """Whether a parameter from which `node`, one of the constants, is computed needs gradients."""
        if node.op == "get_attr":
            return bool(self._attribute(str(node.target)).requires_grad)
        return any(map(self.trains, self._inputs(node)))

    def names(self, node: fx.Node) -> set[str]:
        """The parameters and buffers from which `node`, one of the constants, is computed."""
        if node.op == "get_attr":
            return {str(node.target)}
        return set[str]().union(*map(self.names, self._inputs(node)))

    def statistics_of(self, node: fx.Node) -> str | None:
        """The owner of the running variance from which `node`, one of the constants, is computed."""
        if node.op == "get_attr":
            owner, dot, name = str(node.target).rpartition(".")
            is_statistic = name == "running_var" and self._has(f"{owner}{dot}running_mean")
            return owner or node.name if is_statistic else None
        found = (self.statistics_of(source) for source in self._inputs(node))
        return next((owner for owner in found if owner is not None), None)

    def _inputs(self, node: fx.Node) -> list[fx.Node]:
        found: list[fx.Node] = []
        fx.node.map_arg(self._known[node], found.append)
        return found

    def _has(self, name: str) -> bool:
        try:
            return isinstance(self._attribute(name), Tensor)
        except AttributeError:
            return False

    def _is_constant(self, node: fx.Node) -> bool:
        if node in self._written:
            return False
        if node.op == "get_attr":
            return isinstance(self._attribute(str(node.target)), Tensor)
        inputs = node.all_input_nodes
        if not inputs:
            return node.op == "call_function" and operator_name(node) in _MAKERS
        return all(each in self._known for each in inputs) and _is_pure(node)

    def _evaluated(self, node: fx.Node) -> Any:
        if node.op == "get_attr":
            return self._attribute(str(node.target))
        args, kwargs = fx.node.map_arg(self._known[node], self.value)
        if node.op == "call_method":
            return getattr(args[0], str(node.target))(*args[1:], **kwargs)
        if called_name(node) == "detach_":  # exporters put it behind a constant; it would change a source
            return args[0].detach()
        assert callable(node.target)
        return node.target(*args, **kwargs)


def _is_pure(node: fx.Node) -> bool:
    """Whether a call always gives the same for the same arguments, and does nothing else."""
    if node.op not in ("call_function", "call_method") or written_inputs(node):
        return False
    if node.op == "call_function" and getattr(node.target, "__module__", "") in ("_operator", "builtins"):
        return True
    name = torch_name(node.target) if node.op == "call_function" else str(node.target)
    if name is None or (node.op == "call_function" and operator_name(node) in _PURE):
        return name is not None
    packet = getattr(torch.ops.aten, name, None)
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    seeded = torch.Tag.nondeterministic_seeded
    return bool(overloads) and all(each._schema.returns and seeded not in each.tags for each in overloads)
