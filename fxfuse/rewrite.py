"""Applies a plan to a captured graph: folded weights in, norms out.

Every call site is its own. An operator that is called once, and whose tensors nobody else reads by
name, keeps its qualified name; any other gets a copy under a fresh name, so that nothing changes for
its other users.
"""

from __future__ import annotations

import operator
from collections import defaultdict
from itertools import count

import torch
from torch import Tensor, fx, nn

from fxfuse.affine import AffineMap
from fxfuse.calls import given_arguments
from fxfuse.capture import Capture
from fxfuse.fold import absorb_output
from fxfuse.match import Move, Plan
from fxfuse.ops import Linear, Norm, Reader
from fxfuse.records import Fold, Refusal
from fxfuse.refusals import Code
from fxfuse.replica import alias
from fxfuse.tree import attribute


def rewrite(capture: Capture, plan: Plan, reader: Reader) -> tuple[list[Fold], list[Refusal]]:
    """Carries out the moves of `plan` on `capture`, in place.

    Returns:
        A record for each move that was made, and a refusal for each that its dtype does not allow.
    """
    chains: dict[fx.Node, list[Move]] = defaultdict(list)
    for move in plan.moves:
        chains[move.operator].append(move)
    editor = _Editor(capture)
    folds: list[Fold] = []
    refusals: list[Refusal] = []
    for node, chain in chains.items():
        linear = reader.read(node)
        assert isinstance(linear, Linear)
        made, tensors, code = _fold_chain(linear, chain, reader)
        if made:
            editor.set_operator(node, linear, *tensors)
            editor.erase_norms(made)
        into = editor.operator_name(node)
        folds += [Fold(move.norm.name, (into,), "backward") for move in made]
        refusals += [Refusal.because(move.norm.name, code, into) for move in chain[len(made) :]]
    editor.drop_unused_attributes()
    return folds, refusals


def _fold_chain(
    linear: Linear, chain: list[Move], reader: Reader
) -> tuple[list[Move], tuple[Tensor, ...], Code]:
    """Folds as many norms of `chain` as the weight's dtype can hold, nearest first, rounding once.

    Returns:
        The moves made, the folded weight and bias if any was, and what stopped the next one.
    """
    weight = reader.tensor(linear.weight)
    bias = None if linear.bias is None else reader.tensor(linear.bias)
    stopped = Code.OVERFLOW
    for length in range(len(chain), 0, -1):
        norms = [move.norm for move in chain[:length]]
        folded = absorb_output(
            weight, bias, _composed(norms, reader), transposed=linear.transposed, groups=linear.groups
        )
        if not isinstance(folded, Code):
            gradient = _bias_needs_gradient(weight, bias, norms, reader)
            return chain[:length], (alias(weight, folded[0]), nn.Parameter(folded[1], gradient)), stopped
        stopped = folded
    return [], (), stopped


def _composed(norms: list[Norm], reader: Reader) -> AffineMap:
    maps = [
        AffineMap.from_norm(
            reader.tensor(norm.mean),
            reader.tensor(norm.var),
            None if norm.weight is None else reader.tensor(norm.weight),
            None if norm.bias is None else reader.tensor(norm.bias),
            norm.eps,
        )
        for norm in norms
    ]
    total = maps[0]
    for affine in maps[1:]:
        total = total.then(affine)
    return total


def _bias_needs_gradient(weight: Tensor, bias: Tensor | None, norms: list[Norm], reader: Reader) -> bool:
    """As the bias that was there; a new one as the norm's β, or as the weight where there is neither."""
    if bias is not None:
        return bias.requires_grad
    betas = [reader.tensor(norm.bias).requires_grad for norm in norms if norm.bias is not None]
    return any(betas) if betas else weight.requires_grad


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
                for name in (node.target, *_owners(node.target)):
                    self._below[name] |= users

    def operator_name(self, node: fx.Node) -> str:
        """Qualified name of the operator that `node` calls; of its weight's owner for a function."""
        target = node.target if node.op == "call_module" else given_arguments(node)["weight"].target
        return str(target).removesuffix(".weight")

    def set_operator(self, node: fx.Node, linear: Linear, weight: Tensor, bias: Tensor) -> None:
        """Gives the operator at `node` other tensors, and a name of its own if it has shared one."""
        if node.op == "call_module":
            self._set_module(node, weight, bias)
        else:
            self._set_arguments(node, linear, weight, bias)

    def erase_norms(self, made: list[Move]) -> None:
        """Takes the norms out of the graph, and asserts what their being folded depends on."""
        for rank in {move.rank for move in made if move.rank is not None}:
            _assert_rank(made[0].operator, rank)
        for move in reversed(made):  # the last one first: the others' nodes are inputs of those after them
            move.node.replace_all_uses_with(move.norm.input)
            self.graph.erase_node(move.node)

    def drop_unused_attributes(self) -> None:
        """Removes the nodes of parameters and buffers that no other node reads."""
        for node in reversed(list(self.graph.nodes)):
            if node.op == "get_attr" and not node.users:
                self.graph.erase_node(node)

    def _set_module(self, node: fx.Node, weight: Tensor, bias: Tensor) -> None:
        target = str(node.target)
        module = attribute(self.root, target)
        folded = nn.Module.__new__(type(module))
        folded.__dict__.update(module.__dict__)
        folded._parameters = {"weight": weight, "bias": bias}
        node.target = target if self._is_only_user(node, target) else self._fresh(target)
        self._set(node.target, folded)

    def _set_arguments(self, node: fx.Node, linear: Linear, weight: Tensor, bias: Tensor) -> None:
        own = self._is_only_user(node, linear.weight)
        names = {"weight": linear.weight if own else self._fresh(linear.weight)}
        self._set(names["weight"], weight)
        if linear.bias is not None and self._is_only_user(node, linear.bias):
            names["bias"] = linear.bias
        else:
            names["bias"] = self._bias_name(names["weight"])
        self._set(names["bias"], bias)
        with self.graph.inserting_before(node):
            attributes = {argument: self.graph.get_attr(name) for argument, name in names.items()}
        node.kwargs = {**given_arguments(node), **attributes}
        node.args = ()

    def _is_only_user(self, node: fx.Node, name: str) -> bool:
        """Whether `node` alone uses the module or tensor of that name, a part of it or what it is part of."""
        users = self._below[name].union(*(self._exact[owner] for owner in _owners(name)))
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

    def _set(self, name: str, value: nn.Module | Tensor) -> None:
        owner, _, leaf = name.rpartition(".")
        place = attribute(self.root, owner)
        if isinstance(value, nn.Module):
            home = place._modules
        else:
            home = place._parameters if isinstance(value, nn.Parameter) else place._buffers
        for other in (place.__dict__, place._parameters, place._buffers):
            if other is not home:
                other.pop(leaf, None)  # a tensor may have been a plain attribute
        home[leaf] = value


def _owners(name: str) -> list[str]:
    """The names above `name`: a.b.c → a.b, a."""
    return [name.rsplit(".", number)[0] for number in range(1, name.count(".") + 1)]


def _assert_rank(node: fx.Node, rank: int) -> None:
    """Makes a call whose norm would have worked on another axis an error instead of a wrong result."""
    graph = node.graph
    with graph.inserting_after(node):
        query = graph.call_function(getattr, (node, "ndim"))
    with graph.inserting_after(query):
        test = graph.call_function(operator.eq, (query, rank))
    message = (
        f"a norm after this operator was folded for values with {rank} axes, batch included; "
        "with another number of axes it worked along another axis than the channels"
    )
    with graph.inserting_after(test):
        graph.call_function(torch._assert, (test, message))
