"""Which norms and operators are modules that can be exchanged where they are, and how that is done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fxfuse.capture import Capture, capture
from fxfuse.channels import Channels, Shape
from fxfuse.errors import CaptureError
from fxfuse.layers import has_statistics
from fxfuse.nodes import Affine, LeftNorm, Linear, Norm, Op, Opaque
from fxfuse.ops import Reader
from fxfuse.options import choices
from fxfuse.plan import Plan
from fxfuse.refusals import Code
from fxfuse.replica import replicate
from fxfuse.rewrite import bypass, drop_unused
from fxfuse.tree import attribute, parts_of

# The classes that hold the forward of torch.nn's norms.
_TORCH_NORMS = (_BatchNorm, nn.SyncBatchNorm, _InstanceNorm)


class KeepingReader(Reader):
    """Reads only those norms and operators as such that are modules of their own, called once.

    Args:
        captured: the graph and its modules.
        left: modules, by name, that are not to be changed, and why not.
    """

    def __init__(self, captured: Capture, left: Mapping[str, Code]) -> None:
        super().__init__(captured.root, captured.graph)
        self._left = left
        self._kept: dict[fx.Node, Op] = {}
        named = [node for node in self.graph.nodes if node.op in ("call_module", "get_attr")]
        self._used = {node: parts_of(attribute(self.root, str(node.target))) for node in named}

    def read(self, node: fx.Node) -> Op:
        """What `node` is."""
        if node not in self._kept:
            self._kept[node] = self._if_exchangeable(node, super().read(node))
        return self._kept[node]

    def operator(self, node: fx.Node) -> str:
        """The name of the module of the linear operator at `node`."""
        return str(node.target) if node.op == "call_module" else caller(node)

    def taken_up(self, plan: Plan) -> dict[str, list[tuple[str, str, Channels]]]:
        """For each linear operator the maps that it takes up."""
        found: dict[str, list[tuple[str, str, Channels]]] = {
            self.operator(node): [] for node in self.graph.nodes if isinstance(self.read(node), Linear)
        }
        for move in plan.moves:
            for site in move.sites:
                found[self.operator(site.node)].append((move.name, site.side, site.channels))
        return found

    def _if_exchangeable(self, node: fx.Node, op: Op) -> Op:
        if isinstance(op, Norm):
            code = self._stays(node, op.name)
            return op if code is None else LeftNorm(op.name, code)
        if isinstance(op, Affine):
            whole = op.norm is not None and self._stays(node, op.norm) is None
            return self._with_its_axes(op) if whole else Opaque(detail=node.name)
        if isinstance(op, Linear):
            name = self.operator(node)
            code = self._stays(node, name)
            return op if code is None else Opaque(code, name)
        return op

    def _with_its_axes(self, affine: Affine) -> Affine:
        """Without the batch axis that the constant may add, which the exchanged norm goes on adding."""
        before = super().read(affine.input)
        while isinstance(before, Affine) and before.norm == affine.norm:
            before = super().read(before.input)
        adds = isinstance(before, Linear) and len(affine.shape) == before.dims + 2 and affine.shape[0] == 1
        return replace(affine, shape=affine.shape[1:]) if adds else affine

    def _stays(self, node: fx.Node, name: str) -> Code | None:
        """Why the module `name`, of whose forward `node` is a part, cannot be exchanged."""
        if name in self._left:
            return self._left[name]
        users = self._users(name)
        if node.op == "call_module":
            return None if users <= {node} else Code.SHARED
        if caller(node) != name or not name:
            return Code.NO_MODULE
        module = attribute(self.root, name)
        inside = {each for each in self.graph.nodes if caller(each) == name}
        if not users <= inside or any(self._is_another(each, node) for each in inside):
            return Code.SHARED
        op = super().read(node)
        if isinstance(op, Linear):
            named = op.weight == f"{name}.weight" and op.bias in (None, f"{name}.bias")
            named = named and "weight" in module._parameters
            return None if named and _takes_bias(module) else Code.NO_MODULE
        return None if has_statistics(module) and _without_norm(module) is not None else Code.NO_MODULE

    def _is_another(self, node: fx.Node, known: fx.Node) -> bool:
        """Whether `node` shows that the forward to which `known` belongs is run twice."""
        one, other = super().read(node), super().read(known)
        same = type(one) is type(other) and getattr(one, "role", None) == getattr(other, "role", None)
        return same and node is not known

    def _users(self, name: str) -> set[fx.Node]:
        """The nodes that call the module, one that it is in or that shares a tensor with it, or read one."""
        module = attribute(self.root, name)
        own = {id(module), *map(id, (*module.parameters(), *module.buffers()))}
        using = (node for node, used in self._used.items() if used & own)
        return {user for node in using for user in (node.users if node.op == "get_attr" else (node,))}


def _takes_bias(module: nn.Module) -> bool:
    """Whether the module's forward adds its bias once it has one."""
    if module._parameters.get("bias") is not None:
        return True
    twin: Any = replicate(module)
    twin._parameters["bias"] = nn.Parameter(twin.weight.detach().flatten()[:1])
    try:
        captured = capture(twin)
    except CaptureError:
        return False
    reader = Reader(captured.root, captured.graph)
    found = [op for op in map(reader.read, captured.graph.nodes) if isinstance(op, Linear)]
    return [op.bias for op in found] == ["bias"]


def _without_norm(module: nn.Module) -> fx.GraphModule | None:
    """What the forward of a norm does besides normalising."""
    try:
        if choices(module):
            return None
        captured = capture(module)
    except CaptureError:
        return None
    reader = Reader(captured.root, captured.graph)
    inputs: dict[fx.Node, fx.Node] = {}
    seen: set[Shape] = set()
    for node in [*captured.graph.nodes]:
        op = reader.read(node)
        if isinstance(op, (Norm, Affine)):
            inputs[node] = op.input
        if isinstance(op, Affine) and op.shape not in seen and len(op.shape) > 1:
            seen.add(op.shape)
            inputs[node] = _broadcast(node, op)
    bypass(captured.graph, inputs)
    drop_unused(captured.graph, reader)
    return replace(captured, name="WithoutNorm").module().eval()


def _broadcast(node: fx.Node, op: Affine) -> fx.Node:
    """Gives the input of `node` the axes that its constant may add, and nothing else."""
    ones = tuple(1 for _ in op.shape)
    with node.graph.inserting_before(node):
        shape = node.graph.call_function(getattr, (op.input, "shape"))
        broadcast = node.graph.call_function(torch.broadcast_shapes, (shape, ones))
        return node.graph.call_method("expand", (op.input, broadcast))


def is_broadcast(node: fx.Node) -> bool:
    """Whether `node` is a part of what an exchanged norm does to the shape of its input."""
    return node.target is torch.broadcast_shapes or node.target == "expand"


def exchange_norm(norm: nn.Module) -> None:
    """Makes a norm an Identity, or what else its forward does, for everybody who holds it."""
    inherited = any(kind.__dict__.get("forward") is type(norm).forward for kind in _TORCH_NORMS)
    rest: nn.Module | None = nn.Identity() if inherited else _without_norm(norm)
    assert rest is not None
    norm.__class__ = type(rest)
    norm.__dict__ = rest.eval().__dict__


def caller(node: fx.Node) -> str:
    """The module in whose forward `node` is; for a call of a module that module."""
    stack = node.meta.get("nn_module_stack") or {"": None}
    return str(next(reversed(stack)))
