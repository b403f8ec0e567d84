"""Applies a plan to a captured graph: folded weights in, norms out.

Every call site is its own. An operator that is called once, and whose tensors nobody else reads by
name, keeps its qualified name; any other gets a copy under a fresh name, so that nothing changes for
its other users.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass
from itertools import count

import torch
from torch import Tensor, fx, nn

from fxfuse.aliases import asks_for_kind
from fxfuse.calls import given_arguments, gives_several, operator_name, set_argument
from fxfuse.capture import Capture
from fxfuse.layers import LINEAR_ARGUMENTS, PRODUCTS
from fxfuse.layout import as_reshape
from fxfuse.nodes import Linear, Norm
from fxfuse.ops import Reader
from fxfuse.places import place_of
from fxfuse.plan import Plan, names_in
from fxfuse.records import Fold, Merged
from fxfuse.solve import Solution
from fxfuse.tree import attribute, owners, put


@dataclass(frozen=True)
class Rewritten:
    """Records of what is gone: norms, other arithmetic with constants, and operators that became one."""

    norms: tuple[Fold, ...]
    constants: tuple[Fold, ...]
    merged: tuple[Merged, ...]


# Methods after which the elements are the same, in the same order.
_RESHAPES = {"flatten", "reshape", "unflatten"}
# What compilers note of a node's value.
_OF_VALUES = {"val", "example_value", "tensor_meta"}


def rewrite(capture: Capture, plan: Plan, solution: Solution, reader: Reader) -> Rewritten:
    """Carries out all of `plan` on `capture`, in place."""
    editor = _Editor(capture)
    names = [(merge.name, names_in(merge.form)) for merge in plan.merges]
    into = {}
    for node, tensors in solution.tensors.items():
        linear = reader.read(node)
        assert isinstance(linear, Linear)
        into[node] = editor.set_operator(node, linear, *tensors)
    hosts = {node: merge.host for merge in plan.merges for node in merge.gone}
    into |= {node: into[host] for node, host in hosts.items()}
    assumed = (each for change in plan.moves for each in sorted(change.assumed, key=str))
    of_merges = (each for merge in plan.merges for each in sorted(merge.form.assumed, key=str))
    for node, rank in dict.fromkeys((*assumed, *of_merges)):
        _assert_rank(hosts.get(node, node), rank)
    for view in plan.views:
        as_reshape(view)
    replaced = gone(plan)
    restored = _restored(capture.graph, reader, replaced)
    _redirect(capture.graph, plan)
    bypass(capture.graph, replaced)
    leftover = hosts.keys() - replaced.keys()
    for node in reversed([node for node in capture.graph.nodes if node in leftover]):
        for unused in [*node.users]:
            capture.graph.erase_node(unused)
        capture.graph.erase_node(node)
    for node, value in restored.items():
        node.replace_all_uses_with(value)
        unused = node
        while not unused.users and unused is not value:
            before = unused.all_input_nodes[0]
            capture.graph.erase_node(unused)
            unused = before
    drop_unused(capture.graph, reader)
    moves = [(move, [into[site.node] for site in move.sites]) for move in plan.moves]
    moves += [(move, [into[merge.host]]) for merge in plan.merges for move in merge.moves]
    moved = {move.node for move, _ in moves}
    whole = {first: parts for first, parts in plan.written_out.items() if moved.issuperset(parts)}
    rest = {part for parts in whole.values() for part in parts}
    norms: list[Fold] = []
    constants: list[Fold] = []
    for move, operators in moves:
        absorbers, where = tuple(dict.fromkeys(operators)), place_of(move.node)
        error = solution.errors.get(move)
        if isinstance(move.source, Norm) or move.node in whole:
            norms.append(Fold(move.name, absorbers, move.direction, where, error))
        elif move.node not in rest:
            constants.append(Fold(move.node.name, absorbers, move.direction, where, error))
    merged = []
    for (name, every), merge in zip(names, plan.merges, strict=True):
        others = tuple(dict.fromkeys(each for each in every if each != name))
        error = solution.errors.get(merge)
        merged.append(Merged(name, into[merge.host], others, place_of(merge.node), error))
    return Rewritten(tuple(norms), tuple(constants), tuple(merged))


def _redirect(graph: fx.Graph, plan: Plan) -> None:
    """Makes the operators that do it all now read what the first of each merge has read.

    So do queries of values that go with it.
    """
    inside = {node: merge for merge in plan.merges for node in merge.form.nodes}
    moved = {move.node: move.source.input for move in plan.moves}
    for query in graph.nodes if inside else ():
        if asks_for_kind(query):
            value = query.all_input_nodes[0]
            while value in moved:
                value = moved[value]
            if value in inside:
                query.replace_input_with(query.all_input_nodes[0], inside[value].form.source)
    for merge in plan.merges:
        read = merge.operators[merge.host].input
        if read is not merge.form.source:
            merge.host.replace_input_with(read, merge.form.source)
        for key in _OF_VALUES & merge.node.meta.keys():
            merge.host.meta[key] = merge.node.meta[key]


def _restored(graph: fx.Graph, reader: Reader, replaced: Mapping[fx.Node, fx.Node]) -> dict[fx.Node, fx.Node]:
    """What was reshaped for a norm that goes, and got its shape back; with the value that it has been."""
    found = {}
    for node in graph.nodes:
        if node.op == "call_method" and node.target in ("reshape_as", "view_as") and len(node.args) == 2:
            value, passed = node.args[0], False
            while value in replaced or (value.op == "call_method" and value.target in _RESHAPES):
                passed |= value in replaced
                value = replaced[value] if value in replaced else value.args[0]
            operator = reader.read(value)
            # What a linear layer gives is contiguous, as is what has been reshaped.
            if passed and value is node.args[1] and isinstance(operator, Linear) and operator.dims == 0:
                found[node] = value
    return found


def gone(plan: Plan) -> dict[fx.Node, fx.Node]:
    """The nodes that `plan` takes away, and what is read in the end in the place of each.

    Of what is merged these are only the nodes that others read: what they alone read goes with them.
    """
    found = {move.node: move.source.input for move in plan.moves}
    found |= {user: node for node in found if gives_several(node) for user in node.users}
    for merge in plan.merges:
        found |= dict(merge.bypassed)
        if merge.node is not merge.host:
            found[merge.node] = merge.host
    for node in reversed(found):
        while found[node] in found:
            found[node] = found[found[node]]
    return found


class _Editor:
    """Edits one captured graph and the modules that it calls."""

    def __init__(self, capture: Capture) -> None:
        self.root = capture.root
        self.graph = capture.graph
        # Who uses a module or tensor: under exactly that name, and under that name or one below it.
        self._exact: dict[str, set[fx.Node]] = defaultdict(set)
        self._below: dict[str, set[fx.Node]] = defaultdict(set)
        for node in self.graph.nodes:
            if node.op in ("call_module", "get_attr"):
                users = {node} if node.op == "call_module" else set(node.users)
                self._exact[node.target] |= users
                for name in (node.target, *owners(node.target)):
                    self._below[name] |= users

    def set_operator(self, node: fx.Node, linear: Linear, weight: Tensor, bias: Tensor | None) -> str:
        """Gives the operator at `node` other tensors, and a name of its own if it has shared one.

        Returns:
            The qualified name of the operator; of its weight's owner if it is a function.
        """
        if node.op == "call_module":
            return self._set_module(node, weight, bias)
        return self._set_arguments(node, linear, weight, bias)

    def _set_module(self, node: fx.Node, weight: Tensor, bias: Tensor | None) -> str:
        target = str(node.target)
        module = attribute(self.root, target)
        folded = nn.Module.__new__(type(module))
        folded.__dict__.update(module.__dict__)
        folded._parameters = {"weight": weight, "bias": bias}
        if weight.shape[:2] != module.weight.shape[:2]:
            name = "features" if weight.dim() == 2 else "channels"
            into = weight.shape[1] * getattr(module, "groups", 1)
            folded.__dict__ |= {f"in_{name}": into, f"out_{name}": weight.shape[0]}
        node.target = target if self._is_only_user(node, target) else self._fresh(target)
        put(self.root, node.target, folded)
        return node.target

    def _set_arguments(self, node: fx.Node, linear: Linear, weight: Tensor, bias: Tensor | None) -> str:
        _, argument, bias_argument = PRODUCTS.get(operator_name(node), LINEAR_ARGUMENTS)
        given = given_arguments(node)[argument]
        # Of a linear layer that is a product of matrices the weight is often transposed in the graph.
        transposes = isinstance(linear.weight, str) and given.op != "get_attr"
        user = given if transposes and set(given.users) == {node} else node
        name = self._own_name(user, linear.weight) or self._fresh(f"{node.name}.weight")
        new = self._attribute(node, name, weight)
        with self.graph.inserting_before(node):
            placed = self.graph.node_copy(given, lambda _: new) if transposes else new
        set_argument(node, argument, placed)
        if bias is not None:
            own = None if linear.bias is None else self._own_name(node, linear.bias, copy=False)
            added = self._attribute(node, own or self._bias_name(name), bias)
            if bias_argument is not None:
                set_argument(node, bias_argument, added)
            else:
                node.target = torch.addmm if node.target is torch.mm else torch.ops.aten.addmm.default
                node.args = (added, *node.args)
        return name.removesuffix(".weight")

    def _attribute(self, node: fx.Node, name: str, tensor: Tensor) -> fx.Node:
        """The tensor as an attribute of that name, to be read by `node`."""
        put(self.root, name, tensor)
        with self.graph.inserting_before(node):
            return self.graph.get_attr(name)

    def _own_name(self, node: fx.Node, name: str | fx.Node, *, copy: bool = True) -> str | None:
        """`name` if it is one that `node` alone uses, else that of a copy; None for what has no name."""
        if not isinstance(name, str):
            return None
        if self._is_only_user(node, name):
            return name
        return self._fresh(name) if copy else None

    def _is_only_user(self, node: fx.Node, name: str) -> bool:
        """Whether `node` alone uses the module or tensor of that name, a part of it or what it is part of."""
        users = self._below[name].union(*(self._exact[owner] for owner in owners(name)))
        return users <= {node}

    def _bias_name(self, weight: str) -> str:
        """bias beside a weight of that name: conv.weight → conv.bias, scale → scale_bias."""
        owner, dot, leaf = weight.rpartition(".")
        bias = f"{owner}{dot}{leaf.replace('weight', 'bias') if 'weight' in leaf else f'{leaf}_bias'}"
        taken = hasattr(attribute(self.root, owner), bias.rpartition(".")[2])
        # A layer without bias has the attribute, as None.
        return self._fresh(bias) if taken and attribute(self.root, bias) is not None else bias

    def _fresh(self, name: str) -> str:
        """A name for a copy that is not taken: layer1.conv → layer1_conv_folded, layer1_conv_folded_2, ...

        It is at the top, where it cannot become a child of a module that the graph calls as a whole.
        """
        stem = f"{name.replace('.', '_')}_folded"
        names = (stem if number == 1 else f"{stem}_{number}" for number in count(1))
        return next(name for name in names if not hasattr(self.root, name))


def bypass(graph: fx.Graph, inputs: Mapping[fx.Node, fx.Node]) -> None:
    """Takes nodes out of `graph`; who has read one of them reads its input."""
    for node in reversed([node for node in graph.nodes if node in inputs]):
        node.replace_all_uses_with(inputs[node])
        graph.erase_node(node)


def drop_unused(graph: fx.Graph, reader: Reader) -> None:
    """Removes parameters and buffers, and what is computed from these alone, that no other node reads."""
    for node in reversed(list(graph.nodes)):
        if not node.users and (node.op == "get_attr" or node in reader.constants):
            graph.erase_node(node)


def _assert_rank(node: fx.Node, rank: int) -> None:
    """Makes a call whose norm would have worked on another axis an error instead of a wrong result."""
    graph = node.graph
    with graph.inserting_after(node):
        query = graph.call_function(getattr, (node, "ndim"))
    with graph.inserting_after(query):
        test = graph.call_function(operator.eq, (query, rank))
    message = (
        f"what came after this operator was folded for values with {rank} axes, batch included; "
        "with another number of axes it worked along another axis, or gave a result of another shape"
    )
    with graph.inserting_after(test):
        graph.call_function(torch._assert, (test, message))
