"""A graph for inputs of one kind: from tensors to tensors, each size a number, no constant computed twice.

The graph is run once, and a second one is written down meanwhile: what depends on no numbers of the inputs is
known by then. Sizes and what is computed from them, assertions on them, containers, and tensors that come
from weights alone are not in the second graph any more.
"""

from __future__ import annotations

import copy
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse.aliases import is_query
from fxfuse.calls import switches_mode, written_inputs
from fxfuse.places import place_of

Program = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""What an engine makes of a graph: a function from its tensors to its results."""


class UnsupportedError(Exception):
    """It cannot be lowered; the message says why, in half a sentence."""


@dataclass(frozen=True)
class Specialised:
    """A graph for inputs of one kind.

    Attributes:
        module: takes the tensors among the leaves of the inputs, gives a tuple of the tensors among those of
            the outputs. Nodes have their values, without numbers, as ``meta["val"]``.
        places: where these tensors are among the leaves of the inputs.
        results: tensors like those that `module` gives, on the meta device.
        outputs: the leaves of the outputs, with places for these tensors.
        structure: that of the outputs.
    """

    module: fx.GraphModule
    places: tuple[int, ...]
    results: tuple[Tensor, ...]
    outputs: tuple[Any, ...]
    structure: pytree.TreeSpec

    def tensors(self, leaves: Sequence[Any]) -> list[Tensor]:
        """What `module` takes."""
        return [leaves[place] for place in self.places]

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """What forward gives, from what `module` does."""
        leaves = [tensors[each.number] if isinstance(each, _Output) else each for each in self.outputs]
        return pytree.tree_unflatten(leaves, self.structure)


@dataclass(frozen=True)
class _Constant:
    """A tensor that does not depend on the inputs."""

    tensor: Tensor


@dataclass(frozen=True)
class _Output:
    number: int


def specialised(module: fx.GraphModule, inputs: Sequence[Any]) -> Specialised:
    """`module` for inputs like these, which it is run on.

    Raises:
        UnsupportedError: forward reads numbers of its inputs into Python, writes to its inputs or to the
            module, draws random numbers, or changes the mode that torch computes in.
    """
    state = [*module.parameters(), *module.buffers()]
    given = [leaf for leaf in pytree.tree_leaves(list(inputs)) if isinstance(leaf, Tensor)]
    before = [tensor._version for tensor in (*state, *given)]
    drawn = torch.random.get_rng_state()
    writer = _Writer(module)
    with torch.no_grad():
        writer.run(*inputs)
    if not torch.equal(drawn, torch.random.get_rng_state()):
        raise UnsupportedError("forward draws random numbers")
    if before != [tensor._version for tensor in (*state, *given)] or writer.is_constant_written_to():
        raise UnsupportedError("forward writes to its inputs, or to what the module holds")
    return writer.specialised()


class _Writer(fx.Interpreter):
    """Runs a graph and writes down what does not know its result yet."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._root: dict[str, nn.Module | Tensor] = {}
        self._made: dict[fx.Node, Any] = {}
        self._written = fx.Graph()
        self._leaves = 0
        self._places: list[int] = []
        self._constants: list[tuple[Tensor, int]] = []
        self._outputs: Any = None
        self._results: list[Tensor] = []

    def run_node(self, n: fx.Node) -> Any:
        """Runs it; writes down what becomes of it."""
        if switches_mode(n):
            raise UnsupportedError(f"forward changes the mode that torch computes in, {_at(n)}")
        value = super().run_node(n)
        self._made[n] = self._become(n, value)
        return value

    def is_constant_written_to(self) -> bool:
        """Whether something was written to what was taken for a constant."""
        return any(tensor._version != version for tensor, version in self._constants)

    def specialised(self) -> Specialised:
        """The second graph."""
        # The graphs of torch.export give a list of leaves.
        outputs = self.graph.process_outputs(self._outputs)
        leaves, structure = pytree.tree_flatten(outputs)
        tensors = [leaf for leaf in leaves if isinstance(leaf, (fx.Node, _Constant))]
        self._written.output(tuple(self._readable(each) for each in tensors))
        numbers = iter(range(len(tensors)))
        placed = [
            _Output(next(numbers)) if isinstance(leaf, (fx.Node, _Constant)) else leaf for leaf in leaves
        ]
        self._written.eliminate_dead_code(is_impure_node=_is_needed)
        module = fx.GraphModule(self._root, self._written).eval()
        places, results = tuple(self._places), tuple(self._results)
        return Specialised(module, places, results, tuple(placed), structure)

    def _become(self, node: fx.Node, value: Any) -> Any:
        """What stands for `value`: nodes of the second graph, constants and plain Python values."""
        if node.op == "placeholder":
            return pytree.tree_map(self._input, value)
        if node.op == "get_attr":
            if not isinstance(value, Tensor):
                raise UnsupportedError(f"forward calls a graph inside of it, {_at(node)}")
            return self._constant(value)
        args: Any
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._standing)
        if node.op == "output":
            self._outputs = _plain(args[0])
            self._results = [
                each.to("meta") for each in pytree.tree_leaves(value) if isinstance(each, Tensor)
            ]
            return None
        if node.target is operator.getitem and isinstance(args[0], (tuple, list, dict)):
            return args[0][args[1]]
        read = [leaf for leaf in pytree.tree_leaves((args, kwargs)) if isinstance(leaf, (fx.Node, _Constant))]
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            if any(isinstance(each, fx.Node) for each in read) and not (is_query(node) or self._guards(node)):
                raise UnsupportedError(f"forward reads numbers of its inputs, {_at(node)}")
            return value
        if not any(isinstance(each, fx.Node) for each in read):
            return pytree.tree_map_only(Tensor, self._constant, value)
        return self._call(node, args, kwargs, value)

    def _guards(self, node: fx.Node) -> bool:
        """Whether it is what ``torch.export`` has in a module to check sizes, which it has done by now."""
        return node.op == "call_module" and type(self.fetch_attr(str(node.target))).__name__ == "GuardsFn"

    def _call(self, node: fx.Node, args: Any, kwargs: Any, value: Any) -> Any:
        if node.op == "call_module":
            self._root[str(node.target)] = self.fetch_attr(str(node.target))
        args, kwargs = pytree.tree_map_only(_Constant, self._readable, (args, kwargs))
        made = self._written.create_node(node.op, node.target, args, kwargs, node.name)
        made.meta = {"stack_trace": node.meta.get("stack_trace"), "val": _described(value)}
        return self._parts(made, value)

    def _parts(self, made: fx.Node, value: Any) -> Any:
        """A node for each tensor of what `made` gives."""
        if isinstance(value, Tensor):
            return made
        if isinstance(value, (tuple, list)):
            parts = (self._parts(self._part(made, number, part), part) for number, part in enumerate(value))
            return tuple(parts) if isinstance(value, tuple) else list(parts)
        raise UnsupportedError(
            f"{made.target} gives a {type(value).__name__}, of which the parts are not known"
        )

    def _part(self, made: fx.Node, number: int, value: Any) -> fx.Node:
        part = self._written.call_function(operator.getitem, (made, number))
        part.meta["val"] = _described(value)
        return part

    def _input(self, leaf: Any) -> Any:
        self._leaves += 1
        if not isinstance(leaf, Tensor):
            return leaf
        self._places.append(self._leaves - 1)
        made = self._written.placeholder(f"input_{len(self._places)}")
        made.meta["val"] = _described(leaf)
        return made

    def _constant(self, tensor: Tensor) -> _Constant:
        self._constants.append((tensor, tensor._version))
        return _Constant(tensor.detach())

    def _standing(self, argument: Any) -> Any:
        return self._made[argument] if isinstance(argument, fx.Node) else argument

    def _readable(self, value: fx.Node | _Constant) -> fx.Node:
        """A node that gives it."""
        if isinstance(value, fx.Node):
            return value
        name = f"constant_{len(self._root)}"
        self._root[name] = value.tensor
        made = self._written.get_attr(name)
        made.meta["val"] = _described(value.tensor)
        return made


def _described(value: Any) -> Any:
    """`value` without numbers."""
    return pytree.tree_map_only(Tensor, lambda tensor: tensor.to("meta"), value)


def _plain(value: Any) -> Any:
    """`value` as forward gives it: arguments of nodes have lists and dicts of their own kind."""
    if type(value) in (dict, fx.immutable_collections.immutable_dict):
        return {key: _plain(each) for key, each in value.items()}
    if type(value) in (tuple, fx.immutable_collections.immutable_list):
        parts = map(_plain, value)
        return tuple(parts) if isinstance(value, tuple) else list(parts)
    return value


def _is_needed(node: fx.Node) -> bool:
    """Whether it is needed although nobody reads its value."""
    return node.op in ("placeholder", "output", "call_module") or bool(written_inputs(node))


def _at(node: fx.Node) -> str:
    return f"at {place_of(node) or node.name}"


def in_dtype(module: fx.GraphModule, dtype: torch.dtype) -> fx.GraphModule:
    """The same, computed in `dtype`; what goes in and comes out keeps its dtype."""
    twin = copy.deepcopy(module).to(dtype)
    graph = twin.graph
    for node in graph.find_nodes(op="placeholder"):
        with graph.inserting_before(node.next):
            cast = graph.call_function(_cast, (node, torch.float32, dtype))
        node.replace_all_uses_with(cast, delete_user_cb=lambda user, cast=cast: user is not cast)
    (output,) = graph.find_nodes(op="output")
    results: Any = output.args[0]
    with graph.inserting_before(output):
        output.args = (tuple(graph.call_function(_cast, (each, dtype, torch.float32)) for each in results),)
    twin.recompile()
    return twin


def _cast(tensor: Tensor, source: torch.dtype, dtype: torch.dtype) -> Tensor:
    return tensor.to(dtype) if tensor.dtype is source else tensor
