"""A module and inputs → a graph for inputs of that kind.

The graph is run once, and a second one is written down meanwhile: what depends on no numbers of the inputs is
known by then. Sizes and what is computed from them, assertions on them, containers, and tensors that come
from weights alone are not in the second graph any more.
"""

from __future__ import annotations

import operator
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.fx.proxy import TraceError
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import _disable_current_modes

from fxfuse.aliases import is_query, plain_layer
from fxfuse.calls import layer_input, operator_name, switches_mode, written_inputs
from fxfuse.errors import UnsupportedError
from fxfuse.guards import no_random_numbers
from fxfuse.held import held, is_same
from fxfuse.lowering.purity import PureFunctions, PureOperators, no_padding_left_out
from fxfuse.lowering.specialised import WRITES, Output, Specialised, at, flattened
from fxfuse.replica import replicate
from fxfuse.table import DROPOUTS, LAYERS
from fxfuse.tree import storage


@dataclass(frozen=True, eq=False)
class _Constant:
    """A tensor that does not depend on the inputs; two are never the same."""

    tensor: Tensor


def specialise(module: fx.GraphModule, inputs: Sequence[Any]) -> Specialised:
    """`module` for inputs like these, which it is run on.

    Raises:
        UnsupportedError: forward reads numbers of its inputs into Python, writes to its inputs or to the
            module, draws random numbers, changes the mode that torch computes in, runs hooks, or calls
            operators of other libraries: then nothing is written. Or it sets attributes.
    """
    for node in module.graph.nodes:
        # What is not traced may write in ways that no operator shows.
        if any(source.op == "get_attr" for source in written_inputs(node)):
            raise UnsupportedError(f"forward may write to what the module holds, {at(node)}")
    own = replicate(module)  # on which forward may set attributes
    before = held(own)
    if any(_has_hooks(each) for each in before if isinstance(each, nn.Module)):
        raise UnsupportedError("there are hooks, which no kernel runs")
    specialiser = _Specialiser(own, [*before, *pytree.tree_leaves(list(inputs))])
    operators, functions = specialiser.pure, PureFunctions(specialiser.pure)
    try:
        with torch.no_grad(), no_random_numbers(), no_padding_left_out(), operators, functions:
            specialiser.run(*inputs)
    except TraceError as error:
        raise UnsupportedError("forward draws random numbers") from error
    if not is_same(before, held(own)):
        raise UnsupportedError("forward sets attributes, which no kernel does")
    return specialiser.specialised()


def without_numbers(inputs: tuple[Any, ...]) -> tuple[Any, ...]:
    """Inputs for `specialise` with which nothing is computed but what depends on weights and sizes alone."""
    mode = FakeTensorMode(allow_non_fake_inputs=True)
    return cast(tuple[Any, ...], pytree.tree_map_only(Tensor, mode.from_tensor, inputs))


def _has_hooks(module: nn.Module) -> bool:
    """Whether calling it runs hooks; those of torch itself check inputs, or compute weights."""
    of_all = torch.nn.modules.module
    hooks = [
        *of_all._global_forward_pre_hooks.values(),
        *of_all._global_forward_hooks.values(),
        *module._forward_pre_hooks.values(),
        *module._forward_hooks.values(),
    ]
    # The class of a graph says that it is torch's.
    return any(
        isinstance(hook, nn.Module) or not _is_below(getattr(hook, "__module__", None), "torch")
        for hook in hooks
    )


def _is_below(home: str | None, *packages: str) -> bool:
    """Whether a module of Python is one of these, or below one."""
    return f"{home}.".startswith(tuple(f"{package}." for package in packages))


class _Specialiser(fx.Interpreter):
    """Runs a graph, and writes down a second one: of what is not known before the inputs are.

    Attributes:
        pure: refuses what the second graph could not hold; it is to be entered for the run.
    """

    def __init__(self, module: fx.GraphModule, kept: Sequence[Any]) -> None:
        super().__init__(module)
        self.extra_traceback = False
        self.pure = PureOperators(
            {storage(each) for each in kept if isinstance(each, Tensor) and each.numel()}
        )
        self._attributes: dict[str, nn.Module | Tensor] = {}
        self._stand_ins: dict[fx.Node, Any] = {}
        self._getters: dict[_Constant, fx.Node] = {}
        self._residual = fx.Graph()
        self._leaves = 0
        self._places: list[int] = []
        self._constants: list[tuple[_Constant, int]] = []
        self._outputs: Any = None

    def run_node(self, n: fx.Node) -> Any:
        """Runs it; writes down what becomes of it."""
        if switches_mode(n):
            raise UnsupportedError(f"forward changes the mode that torch computes in, {at(n)}")
        given = pytree.tree_leaves([self.env[each] for each in n.all_input_nodes])
        if any(isinstance(leaf, FakeTensor) for leaf in given) and not _is_of_torch(self.module, n):
            raise UnsupportedError(f"what is not traced might keep tensors without numbers, {at(n)}")
        self.pure.is_static = not any(isinstance(each, fx.Node) for each in self._read(n))
        self.pure.writes = False
        try:
            value = super().run_node(n)
        except UnsupportedError as error:
            raise UnsupportedError(f"{error}, {at(n)}") from error
        if self.pure.is_static and self.pure.writes:  # a constant is made in several steps
            self._constants = [
                (constant, version if constant in self._getters else _version(constant.tensor))
                for constant, version in self._constants
            ]
        passed = _passed_on(self.module, n)
        if passed is not None and isinstance(value, Tensor) and self.env[passed] is value:
            self._stand_ins[n] = self._stand_ins[passed]
        else:
            self._stand_ins[n] = self._stand_in(n, value)
        return value

    def call_module(self, target: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """What it gives, laid out as it is where no mode keeps torch from the fast path of attention."""
        value = super().call_module(target, args, kwargs)
        layer = self.module.get_submodule(target)
        is_fake = any(isinstance(leaf, FakeTensor) for leaf in pytree.tree_leaves(value))
        if is_fake or not _may_have_fast_path(layer):
            return value
        with _disable_current_modes(), torch._C.DisableTorchFunction():
            alone = layer(*args, **kwargs)
        return pytree.tree_map(_laid_out_like, value, alone)

    def fetch_args_kwargs_from_env(self, n: fx.Node) -> tuple[Any, Any]:
        """The arguments that generated code gives, to which a function may write."""
        args, kwargs = super().fetch_args_kwargs_from_env(n)
        return _plain(args), _plain(kwargs)

    def specialised(self) -> Specialised:
        """The second graph, after the run.

        Raises:
            UnsupportedError: something was written to what was taken for a constant.
        """
        if any(_version(constant.tensor) != version for constant, version in self._constants):
            raise UnsupportedError("forward writes to a constant")
        # The graphs of torch.export give a list of leaves.
        leaves, structure = flattened(self.graph.process_outputs(self._outputs))
        tensors = [*dict.fromkeys(leaf for leaf in leaves if isinstance(leaf, fx.Node))]
        self._residual.output(tuple(tensors))
        places = {tensor: Output(number) for number, tensor in enumerate(tensors)}

        def output(leaf: Any) -> Any:
            if isinstance(leaf, fx.Node):
                return places[leaf]
            return leaf.tensor if isinstance(leaf, _Constant) else leaf

        self._residual.eliminate_dead_code(is_impure_node=_is_needed)
        try:
            module = fx.GraphModule(self._attributes, self._residual).eval()
        except SyntaxError as error:
            raise UnsupportedError("an object is passed on that the code of a graph cannot hold") from error
        results = tuple(leaf.meta["val"] for leaf in tensors)
        return Specialised(module, tuple(self._places), results, tuple(map(output, leaves)), structure)

    def _stand_in(self, node: fx.Node, value: Any) -> Any:
        """What stands for `value`: nodes of the second graph, constants and plain Python values."""
        if node.op == "placeholder":
            return pytree.tree_map(self._input, value)
        if node.op == "get_attr":
            if not isinstance(value, Tensor):
                raise UnsupportedError(f"forward calls a graph inside of it, {at(node)}")
            return self._constant(value)
        args: Any
        args, kwargs = fx.node.map_aggregate((node.args, node.kwargs), self._stand_in_of)
        if node.op == "output":
            self._outputs = _plain(args[0])
            return None
        if node.target is operator.getitem and isinstance(args[0], (tuple, list, dict)):
            return args[0][args[1]]
        if node.target is getattr and isinstance(args[0], tuple):  # such as ``torch.max(...).values``
            return getattr(*args)
        read = self._read(node)
        if not any(isinstance(leaf, Tensor) for leaf in pytree.tree_leaves(value)):
            if any(isinstance(each, fx.Node) for each in read) and not (is_query(node) or self._guards(node)):
                raise UnsupportedError(f"forward reads numbers of its inputs, {at(node)}")
            return value
        if not any(isinstance(each, fx.Node) for each in read):
            return pytree.tree_map_only(Tensor, self._constant, value)
        return self._call(node, args, kwargs, value)

    def _guards(self, node: fx.Node) -> bool:
        """Whether it is what ``torch.export`` has to check what it is given, which it has done by now."""
        if node.target is torch.ops.aten._assert_tensor_metadata.default:
            return True
        return node.op == "call_module" and type(self.fetch_attr(str(node.target))).__name__ == "GuardsFn"

    def _call(self, node: fx.Node, args: Any, kwargs: Any, value: Any) -> Any:
        if node.op == "call_module":
            self._attributes[str(node.target)] = self.fetch_attr(str(node.target))
        args, kwargs = fx.node.map_aggregate((args, kwargs), self._as_node)
        made = self._residual.create_node(node.op, node.target, args, kwargs, node.name)
        made.meta = {
            "stack_trace": node.meta.get("stack_trace"),
            "val": _described(value),
            WRITES: self.pure.writes,
        }
        return self._parts(made, value)

    def _parts(self, made: fx.Node, value: Any) -> Any:
        """A node for each tensor of what `made` gives."""
        if isinstance(value, Tensor):
            return made
        if value is None or isinstance(value, (bool, int, float, str, torch.Size)):
            return value  # of sizes: numbers of tensors were not read
        if isinstance(value, (tuple, list)):  # of any kind, such as those that torch.max gives
            given, kind = pytree.tree_flatten(value, is_leaf=lambda each: each is not value)
            parts = [self._parts(self._part(made, number, part), part) for number, part in enumerate(given)]
            return pytree.tree_unflatten(parts, kind)
        raise UnsupportedError(
            f"{made.target} gives a {type(value).__name__}, of which the parts are not known"
        )

    def _part(self, made: fx.Node, number: int, value: Any) -> fx.Node:
        part = self._residual.call_function(operator.getitem, (made, number))
        part.meta["val"] = _described(value)
        return part

    def _input(self, leaf: Any) -> Any:
        self._leaves += 1
        if not isinstance(leaf, Tensor):
            return leaf
        self._places.append(self._leaves - 1)
        made = self._residual.placeholder(f"input_{len(self._places)}")
        made.meta["val"] = _described(leaf)
        return made

    def _constant(self, tensor: Tensor) -> _Constant:
        made = _Constant(tensor.detach())
        self._constants.append((made, _version(tensor)))
        return made

    def _read(self, node: fx.Node) -> list[fx.Node | _Constant]:
        """What stands for the tensors that it reads."""
        found: list[fx.Node | _Constant] = []
        for each in node.all_input_nodes:
            leaves = pytree.tree_leaves(self._stand_ins[each])
            found += [leaf for leaf in leaves if isinstance(leaf, (fx.Node, _Constant))]
        return found

    def _as_node(self, argument: Any) -> Any:
        """A node that gives it, of a constant the same for all who read it."""
        if not isinstance(argument, _Constant):
            return argument
        if argument not in self._getters:
            name = f"constant_{len(self._getters)}"
            while name in self._attributes or hasattr(self.module, name):
                name += "_"
            self._attributes[name] = argument.tensor
            with self._residual.inserting_before():  # the beginning
                made = self._residual.get_attr(name)
            made.meta["val"] = _described(argument.tensor)
            self._getters[argument] = made
        return self._getters[argument]

    def _stand_in_of(self, argument: Any) -> Any:
        return self._stand_ins[argument] if isinstance(argument, fx.Node) else argument


def _version(tensor: Tensor) -> int:
    """How often it was written to. Tensors of inference mode do not count that; `PureOperators` sees it."""
    return 0 if tensor.is_inference() else tensor._version


def _is_of_torch(module: nn.Module, node: fx.Node) -> bool:
    """Whether it calls no function or module of the model's own."""
    homes: list[str] = []
    if node.op == "call_module":
        homes = [type(each).__module__ for each in module.get_submodule(str(node.target)).modules()]
    elif node.op == "call_function":
        homes = [getattr(node.target, "__module__", None) or "torch"]
    packages = ("torch", "torchvision.ops", "_operator", "math", "builtins")
    return all(_is_below(home, *packages) for home in homes)


def _may_have_fast_path(layer: nn.Module) -> bool:
    """Whether it is a layer of torch's that attends, for which there may be one kernel."""
    modules = [*layer.modules()]
    attends = any(isinstance(each, nn.MultiheadAttention) for each in modules)
    return attends and all(_is_below(type(each).__module__, "torch") for each in modules)


def _laid_out_like(value: Any, like: Any) -> Any:
    """`value`, contiguous if `like` is."""
    return value.contiguous() if isinstance(value, Tensor) and like.is_contiguous() else value


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
