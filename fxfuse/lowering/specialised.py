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
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree

from fxfuse.aliases import is_query, plain_layer
from fxfuse.calls import layer_input, operator_name, switches_mode, written_inputs
from fxfuse.errors import UnsupportedError
from fxfuse.guards import no_random_numbers
from fxfuse.lowering.purity import Inside, Pure
from fxfuse.places import place_of
from fxfuse.table import DROPOUTS, LAYERS
from fxfuse.tree import storage

# The entry of a node's meta that tells whether it was seen to write to anything.
WRITES = "fxfuse_writes"

Program = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""What an engine makes of a graph: a function from its tensors to its results."""


@dataclass(frozen=True)
class Specialised:
    """A graph for inputs of one kind.

    Attributes:
        module: takes the tensors among the leaves of the inputs, gives a tuple of the tensors among those of
            the outputs. Nodes have their values, without numbers, as ``meta["val"]``.
        places: where these tensors are among the leaves of the inputs.
        results: tensors like those that `module` gives, on the meta device.
        outputs: the leaves of the outputs, with places for these tensors; others do not depend on the inputs.
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
        leaves = [_leaf(each, tensors) for each in self.outputs]
        return pytree.tree_unflatten(leaves, self.structure)

    def run(self, program: Program, leaves: Sequence[Any]) -> Any:
        """What forward gives for inputs with these leaves, by a program for `module`."""
        return self.result(program(self.tensors(leaves)))


@dataclass(frozen=True)
class _Constant:
    """A tensor that does not depend on the inputs."""

    tensor: Tensor


@dataclass(frozen=True)
class _Output:
    number: int


def _leaf(output: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(output, _Output):
        return tensors[output.number]
    return copy.deepcopy(output)  # the caller may write to it


def specialised(module: fx.GraphModule, inputs: Sequence[Any]) -> Specialised:
    """`module` for inputs like these, which it is run on.

    Raises:
        UnsupportedError: forward reads numbers of its inputs into Python, writes to its inputs or to the
            module, draws random numbers, or changes the mode that torch computes in. Nothing is written then.
    """
    if any(_has_hooks(each) for each in module.modules()):
        raise UnsupportedError("there are hooks, which no kernel runs")
    for node in module.graph.nodes:
        # What is not traced may write in ways that no operator shows.
        if any(source.op == "get_attr" for source in written_inputs(node)):
            raise UnsupportedError(f"forward may write to what the module holds, {at(node)}")
    writer = _Writer(module)
    try:
        with torch.no_grad(), no_random_numbers():
            writer.specialise(inputs)
    except TraceError as error:
        raise UnsupportedError("forward draws random numbers") from error
    if writer.is_constant_written_to():
        raise UnsupportedError("forward writes to a constant")
    return writer.specialised()


def without_numbers(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs for `specialised` with which nothing is computed but what depends on weights and sizes alone."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return cast(tuple[Any, ...], pytree.tree_map_only(Tensor, mode.from_tensor, inputs))


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling it runs hooks; those of torch itself check inputs, or compute weights."""
    hooks = (*module._forward_pre_hooks.values(), *module._forward_hooks.values())
    return any(isinstance(hook, nn.Module) or not _home(hook).startswith("torch.") for hook in hooks)


def _home(called: object) -> str:
    """The module of Python that it comes from, with a dot behind."""
    return f"{getattr(called, '__module__', '')}."


class _Writer(fx.Interpreter):
    """Runs a graph and writes down what does not know its result yet."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self._root: dict[str, nn.Module | Tensor] = {}
        self._made: dict[fx.Node, Any] = {}
        self._named: dict[int, fx.Node] = {}
        self._written = fx.Graph()
        self._leaves = 0
        self._places: list[int] = []
        self._constants: list[tuple[_Constant, int]] = []
        self._outputs: Any = None

    def specialise(self, inputs: Sequence[Any]) -> None:
        """Runs the graph, and writes the second one."""
        attributes = (value for each in self.module.modules() for value in vars(each).values())
        state = [*self.module.parameters(), *self.module.buffers(), *attributes]
        given = [*state, *pytree.tree_leaves(list(inputs))]
        self._pure = Pure({storage(each) for each in given if isinstance(each, Tensor) and each.numel()})
        with self._pure, Inside(self._pure):
            self.run(*inputs)

    def run_node(self, n: fx.Node) -> Any:
        """Runs it; writes down what becomes of it."""
        if switches_mode(n):
            raise UnsupportedError(f"forward changes the mode that torch computes in, {at(n)}")
        given = pytree.tree_leaves([self.env[each] for each in n.all_input_nodes])
        if any(isinstance(leaf, FakeTensor) for leaf in given) and not _is_of_torch(self.module, n):
            raise UnsupportedError(f"what is not traced might keep tensors without numbers, {at(n)}")
        self._pure.is_free = not any(isinstance(each, fx.Node) for each in self._read(n))
        self._pure.writes = False
        try:
            value = super().run_node(n)
        except UnsupportedError as error:
            raise UnsupportedError(f"{error}, {at(n)}") from error
        if self._pure.is_free and self._pure.writes:  # a constant is made in several steps
            self._constants = [
                (constant, version if id(constant) in self._named else constant.tensor._version)
                for constant, version in self._constants
            ]
        passed = _passed_on(self.module, n)
        if passed is not None and isinstance(value, Tensor) and self.env[passed] is value:
            self._made[n] = self._made[passed]
        else:
            self._made[n] = self._become(n, value)
        return value

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """The arguments that generated code gives, to which a function may write."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _plain(args), _plain(kwargs)

    def is_constant_written_to(self) -> bool:
        """Whether something was written to what was taken for a constant."""
        return any(constant.tensor._version != version for constant, version in self._constants)

    def specialised(self) -> Specialised:
        """The second graph."""
        # The graphs of torch.export give a list of leaves.
        leaves, structure = pytree.tree_flatten(self.graph.process_outputs(self._outputs))
        tensors = [*dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node))]
        self._written.output(tuple(tensors))
        places = {tensor: number for number, tensor in enumerate(tensors)}
        outputs = [
            _Output(places[leaf])
            if isinstance(leaf, fx.Node)
            else leaf.tensor
            if isinstance(leaf, _Constant)
            else leaf
            for leaf in leaves
        ]
        self._written.eliminate_dead_code(is_impure_node=_is_needed)
        module = fx.GraphModule(self._root, self._written).eval()
        results = tuple(leaf.meta["val"] for leaf in tensors)
        return Specialised(module, tuple(self._places), results, tuple(outputs), structure)

    def _become(self, node: fx.Node, value: Any) -> Any:
        """What stands for `value`: nodes of the second graph, constants and plain Python values."""
        if node.op == "placeholder":
            return pytree.tree_map(self._input, value)
        if node.op == "get_attr":
            if not isinstance(value, Tensor):
                raise UnsupportedError(f"forward calls a graph inside of it, {at(node)}")
            return self._constant(value)
        args: Any
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._standing)
        if node.op == "output":
            self._outputs = _plain(args[0])
            return None
        if node.target is operator.getitem and isinstance(args[0], (tuple, list, dict)):
            return args[0][args[1]]
        read = self._read(node)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            if any(isinstance(each, fx.Node) for each in read) and not (is_query(node) or self._guards(node)):
                raise UnsupportedError(f"forward reads numbers of its inputs, {at(node)}")
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
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._given)
        made = self._written.create_node(node.op, node.target, args, kwargs, node.name)
        made.meta = {
            "stack_trace": node.meta.get("stack_trace"),
            "val": _described(value),
            WRITES: self._pure.writes,
        }
        return self._parts(made, value)

    def _parts(self, made: fx.Node, value: Any) -> Any:
        """A node for each tensor of what `made` gives."""
        if isinstance(value, Tensor):
            return made
        if isinstance(value, (tuple, list)):
            parts = (self._parts(self._part(made, number, part), part) for number, part in enumerate(value))
            return tuple(parts) if isinstance(value, tuple) else list(parts)
        if value is None or isinstance(value, (bool, int, float, str)):
            return value  # of sizes: numbers of tensors were not read
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
        made = _Constant(tensor.detach())
        self._constants.append((made, tensor._version))
        return made

    def _read(self, node: fx.Node) -> list[fx.Node | _Constant]:
        """What stands for the tensors that it reads."""
        found: list[fx.Node | _Constant] = []
        for each in node.all_input_nodes:
            leaves = pytree.tree_leaves(self._made[each])
            found += [leaf for leaf in leaves if isinstance(leaf, (fx.Node, _Constant))]
        return found

    def _given(self, argument: Any) -> Any:
        """A node that gives it, of a constant the same for all who read it."""
        if not isinstance(argument, _Constant):
            return argument
        if id(argument) not in self._named:
            name = f"constant_{len(self._named)}"
            while name in self._root or hasattr(self.module, name):
                name += "_"
            self._root[name] = argument.tensor
            with self._written.inserting_before():  # the beginning
                made = self._written.get_attr(name)
            made.meta["val"] = _described(argument.tensor)
            self._named[id(argument)] = made
        return self._named[id(argument)]

    def _standing(self, argument: Any) -> Any:
        return self._made[argument] if isinstance(argument, fx.Node) else argument


def _is_of_torch(module: nn.Module, node: fx.Node) -> bool:
    """Whether it calls no function or module of the model's own."""
    homes = ["torch"]
    if node.op == "call_module":
        homes = [type(each).__module__ for each in module.get_submodule(str(node.target)).modules()]
    elif node.op == "call_function":
        homes = [getattr(node.target, "__module__", None) or "torch"]
    names = tuple(f"{name}." for name in ("torch", "torchvision.ops", "_operator", "math", "builtins"))
    return all(f"{home}.".startswith(names) for home in homes)


def _passed_on(module: nn.Module, node: fx.Node) -> fx.Node | None:
    """The input of `node`, if it is known to give just that in eval mode."""
    layer = plain_layer(module, node)
    if layer is not None:
        return layer_input(node) if LAYERS.get(type(layer)) in ("identity", "dropout") else None
    depth = getattr(node.target, "__module__", "") == "torchvision.ops.stochastic_depth"
    given = node.args[0] if node.args and (depth or operator_name(node) in DROPOUTS) else None
    return given if isinstance(given, fx.Node) else None


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


def at(node: fx.Node) -> str:
    """Where a node comes from, for a message."""
    return f"at {place_of(node) or node.name}"
