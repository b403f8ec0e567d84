"""Folding inside a module that stays what it is: the same class, attributes and forward, other weights.

A norm becomes an Identity (or what its own forward does besides), an operator gets folded weights, both in
place. The graph is only the proof. It has to hold however the module is called, so it is traced for every
choice of forward's options; and whatever code was not traced must do no more with a module than call it
(`fxfuse.exposure`). What stands in a forward that cannot be traced stays; the modules that it calls are
folded inside, each by itself.
"""

from __future__ import annotations

import ast
import inspect
import itertools
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fxfuse.capture import Capture, capture
from fxfuse.channels import Channels
from fxfuse.errors import CaptureError
from fxfuse.exposure import Kind, uses_of_submodules
from fxfuse.layers import calls_norm, is_norm
from fxfuse.match import Plan
from fxfuse.nodes import Affine, LeftNorm, Linear, Norm, Op, Opaque, Query
from fxfuse.ops import Reader, norms_inside
from fxfuse.records import Fold, Refusal
from fxfuse.refusals import Code
from fxfuse.reparametrized import evaluate_weights
from fxfuse.replica import replicate
from fxfuse.shapes import GraphShapes
from fxfuse.solve import Solution, planned
from fxfuse.tracer import options
from fxfuse.tree import attribute, has_hooks

_MOST_VARIANTS = 16
_CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
# The classes that hold the forward of torch.nn's norms.
_TORCH_NORMS = (_BatchNorm, nn.SyncBatchNorm, _InstanceNorm)


@dataclass
class Account:
    """What became of the norms of a module: all of them, by their names in the whole model."""

    folded: list[Fold] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)


def fold_inside(source: nn.Module, target: nn.Module) -> Account:
    """Folds inside `target`, a replica of `source`, in place. The source is not changed."""
    folder = _Folder(source, target)
    folder.fold("")
    return folder.account


def fold_called(source: nn.Module, captured: Capture, called: Iterable[str]) -> Account:
    """Folds inside those modules of `captured` that its graph calls as a whole; `source` is not changed."""
    folder = _Folder(source, captured.root)
    for path in called:
        folder.fold_called(path, looked_into=looks_into(captured.graph, path))
    return folder.account


def looks_into(graph: fx.Graph, name: str) -> bool:
    """Whether `graph` uses something below the module `name`, which it calls as a whole."""
    below = (str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr"))
    return any(target.startswith(f"{name}.") for target in below)


class _Folder:
    def __init__(self, source: nn.Module, target: nn.Module) -> None:
        self.source = source
        self.target = target
        self.account = Account()
        self._done: set[int] = set()
        self._refused: set[int] = set()
        self._paths: dict[int, list[str]] = {}
        for name, module in source.named_modules(remove_duplicate=False):
            self._paths.setdefault(id(module), []).append(name)

    def fold(self, path: str) -> None:
        """Folds inside the module of that name, unless it has been done under another name."""
        module = attribute(self.source, path)
        if id(module) in self._done:
            return
        self._done.add(id(module))
        if is_norm(module):
            self._refuse(path, Code.UNTRACED, f"{path} ({type(module).__name__})")
        elif path and (has_hooks(module) or _is_torch_layer(module)):
            self._refuse_all(path, Code.INSIDE_OPAQUE, f"{path} ({type(module).__name__})")
        elif norms_inside(module) or any(map(calls_norm, _functions(module))):
            self._fold_traced(path, module)

    def _fold_traced(self, path: str, module: nn.Module) -> None:
        try:
            unit = _Unit(module, self._shared_below(path))
        except CaptureError:
            self._fold_parts(path, module)
            return
        unit.settle()
        unit.apply(attribute(self.target, path))
        self.account.folded += [
            replace(fold, norm=_join(path, fold.norm), into=tuple(_join(path, name) for name in fold.into))
            for fold in unit.folds()
        ]
        for refusal in unit.refusals():
            self.account.refused.append(replace(refusal, norm=_join(path, refusal.norm)))
        for called in unit.called():
            self.fold_called(_join(path, called), looked_into=unit.looks_into(called))

    def fold_called(self, path: str, *, looked_into: bool) -> None:
        """Folds inside a module that a graph calls as a whole, unless the graph uses its inside as well."""
        if looked_into:
            self._refuse_all(path, Code.EXPOSED, f"{path} is called and looked into")
        else:
            self.fold(path)

    def _fold_parts(self, path: str, module: nn.Module) -> None:
        """Folds inside each submodule with which the module's code, which stays, does nothing but call it."""
        place = f"{path or type(self.source).__name__} ({type(module).__name__})"
        uses = uses_of_submodules(module)
        if any(map(calls_norm, _functions(module))):
            self._refuse(path, Code.UNTRACED, place)
        for name, use in uses.items():
            child = _join(path, name)
            container = isinstance(attribute(self.source, child), _CONTAINERS)
            if use.kind is Kind.EXPOSED:
                self._refuse_all(child, Code.EXPOSED, use.where)
            elif use.kind is Kind.CALLED or not container:  # what walks through a container does not call it
                self.fold(child)

    def _refuse(self, norm: str, code: Code, detail: str) -> None:
        self.account.refused.append(Refusal.because(norm, code, detail))

    def _refuse_all(self, path: str, code: Code, detail: str) -> None:
        module = attribute(self.source, path)
        if id(module) in self._refused:
            return
        inside = {id(each) for each in module.modules()}
        self._done |= inside
        self._refused |= inside
        for name in [path] if is_norm(module) else [_join(path, name) for name in norms_inside(module)]:
            self._refuse(name, code, detail)

    def _shared_below(self, path: str) -> Iterator[str]:
        """The modules below `path`, by names relative to it, that the model also has elsewhere."""
        module = attribute(self.source, path)
        tops = self._paths[id(module)]
        for name, child in module.named_modules():
            inside = (any(_is_below(each, top) for top in tops) for each in self._paths[id(child)])
            if not all(inside):
                yield name


class _Unit:
    """A module that can be traced for every choice of its options, and what can be folded in all of them."""

    def __init__(self, module: nn.Module, shared: Iterable[str]) -> None:
        self.module = module
        self.captures = [capture(module, fixed) for fixed in _variants(module)]
        for captured in self.captures:
            if any(node.target is torch.is_tensor for node in captured.graph.nodes):
                raise CaptureError(f"{type(module).__name__} asks for the type of its arguments")
        self.left: dict[str, Code] = dict.fromkeys(shared, Code.SHARED)
        self.plans: list[tuple[_KeepingReader, Plan, Solution]] = []

    def settle(self) -> None:
        """Finds the folds that hold in every variant."""
        while True:
            self.plans = [self._plan(captured) for captured in self.captures]
            disputed = self._disputed() or self._unproved()
            if not disputed:
                return
            self.left |= disputed

    def _plan(self, captured: Capture) -> tuple[_KeepingReader, Plan, Solution]:
        reader = _KeepingReader(captured, self.left)
        shapes = GraphShapes(captured.graph, reader, {})
        return reader, *planned(captured.graph, reader, shapes, assumes=False)

    def _disputed(self) -> dict[str, Code]:
        """The norms that are not treated alike wherever they, or their operators, are called."""
        found: dict[str, Code] = {}
        moved = {norm for reader, plan, _ in self.plans for norm in reader.sources(plan)}
        for _, plan, _ in self.plans:
            for refusal in plan.refusals:
                if refusal.norm in moved:
                    found[refusal.norm] = _CODES[refusal.code] if len(self.plans) == 1 else Code.OPTIONS
        found |= dict.fromkeys(self._hidden(moved), Code.OPTIONS)
        taken = [reader.taken_up(plan) for reader, plan, _ in self.plans]
        for operator in set().union(*taken):
            versions = [operators[operator] for operators in taken if operator in operators]
            if any(version != versions[0] for version in versions):
                found |= {norm: Code.OPTIONS for version in versions for norm, *_ in version}
        return found

    def _hidden(self, moved: set[str]) -> set[str]:
        """The norms that some variant calls, or whose operators it calls, inside of another module."""
        called = {
            f"{node.target}."
            for reader, *_ in self.plans
            for node in reader.graph.nodes
            if node.op == "call_module"
        }
        hidden = {norm for norm in moved if norm.startswith(tuple(called))}
        for reader, plan, _ in self.plans:
            for move in plan.moves:
                operators = [reader.operator(site.operator) for site in move.sites]
                if any(operator.startswith(tuple(called)) for operator in operators):
                    hidden.add(reader.norm(move.node))
        return hidden

    def _unproved(self) -> dict[str, Code]:
        """All norms that would go, if without them the module would compute something else besides."""
        moved = {norm for reader, plan, _ in self.plans for norm in reader.sources(plan)}
        twin = replicate(self.module)
        self.apply(twin)
        try:
            for fixed, (reader, plan, _) in zip(
                _variants(self.module) if moved else (), self.plans, strict=False
            ):
                captured = capture(twin, fixed)
                sources = {move.node for move in plan.moves}
                if _outline(captured, moved, set()) != _outline(reader.captured, set(), sources):
                    return dict.fromkeys(moved, Code.NO_MODULE)
        except CaptureError:
            return dict.fromkeys(moved, Code.NO_MODULE)
        return {}

    def apply(self, target: nn.Module) -> None:
        """Makes the folds in `target`, a replica of the module."""
        moved: dict[str, None] = {}
        for reader, plan, solution in self.plans:
            for node, (weight, bias) in solution.tensors.items():
                operator = attribute(target, reader.operator(node))
                evaluate_weights(operator)
                operator._parameters |= {"weight": weight, "bias": bias}
            moved |= reader.sources(plan)
        for name in moved:
            _erase(attribute(target, name))

    def folds(self) -> list[Fold]:
        """A record for each norm that is gone."""
        found: dict[str, Fold] = {}
        for reader, plan, _ in self.plans:
            for move in plan.moves:
                into = tuple(dict.fromkeys(reader.operator(site.operator) for site in move.sites))
                found.setdefault(reader.norm(move.node), Fold(reader.norm(move.node), into, move.direction))
        return [*found.values()]

    def refusals(self) -> list[Refusal]:
        """A record for each norm that is left in the traced part."""
        found: dict[str, Refusal] = {}
        for _, plan, _ in self.plans:
            for refusal in plan.refusals:
                found.setdefault(refusal.norm, refusal)
        return [*found.values()]

    def called(self) -> list[str]:
        """The submodules that the graphs call as a whole and that have norms inside."""
        return [*dict.fromkeys(name for _, plan, _ in self.plans for name in plan.called)]

    def looks_into(self, name: str) -> bool:
        """Whether the traced code uses something below the submodule `name`."""
        return any(looks_into(reader.graph, name) for reader, *_ in self.plans)


class _KeepingReader(Reader):
    """Reads only those norms and operators as such that are modules of their own, called once.

    Args:
        captured: the graph and its modules.
        left: modules, by name, that are not to be changed, and why not.
    """

    def __init__(self, captured: Capture, left: Mapping[str, Code]) -> None:
        super().__init__(captured.root, captured.graph)
        self.captured = captured
        self.graph = captured.graph
        self._left = left
        self._kept: dict[fx.Node, Op] = {}

    def read(self, node: fx.Node) -> Op:
        """What `node` is."""
        if node not in self._kept:
            self._kept[node] = self._if_exchangeable(node, super().read(node))
        return self._kept[node]

    def norm(self, node: fx.Node) -> str:
        """The name of the norm that `node`, a source, is or belongs to."""
        op = super().read(node)
        return op.name if isinstance(op, Norm) else str(getattr(op, "norm", None))

    def operator(self, node: fx.Node) -> str:
        """The name of the module of the linear operator at `node`."""
        return str(node.target) if node.op == "call_module" else _caller(node)

    def sources(self, plan: Plan) -> dict[str, None]:
        """The norms of which the plan moves something."""
        return {self.norm(move.node): None for move in plan.moves}

    def taken_up(self, plan: Plan) -> dict[str, list[tuple[str, str, Channels]]]:
        """For each linear operator the maps that it takes up."""
        found: dict[str, list[tuple[str, str, Channels]]] = {
            self.operator(node): [] for node in self.graph.nodes if isinstance(self.read(node), Linear)
        }
        for move in plan.moves:
            for site in move.sites:
                entry = (self.norm(move.node), site.side, site.channels)
                found[self.operator(site.operator)].append(entry)
        return found

    def _if_exchangeable(self, node: fx.Node, op: Op) -> Op:
        if isinstance(op, Norm):
            code = self._stays(node, op.name)
            return op if code is None else LeftNorm(op.name, code)
        if isinstance(op, Affine):
            whole = op.norm is not None and self._stays(node, op.norm) is None
            return op if whole else Opaque(detail=node.name)
        if isinstance(op, Linear):
            name = self.operator(node)
            code = self._stays(node, name)
            return op if code is None else Opaque(code, name)
        return op

    def _stays(self, node: fx.Node, name: str) -> Code | None:
        """Why the module `name`, of whose forward `node` is a part, cannot be exchanged."""
        if name in self._left:
            return self._left[name]
        users = self._users(name)
        if node.op == "call_module":
            return None if users <= {node} else Code.SHARED
        if _caller(node) != name or not name:
            return Code.NO_MODULE
        module = attribute(self.root, name)
        inside = {each for each in self.graph.nodes if _caller(each) == name}
        if not users <= inside or any(self._is_another(each, node) for each in inside):
            return Code.SHARED
        op = super().read(node)
        if isinstance(op, Linear):
            named = op.weight == f"{name}.weight" and op.bias in (None, f"{name}.bias")
            named = named and "weight" in module._parameters
            return None if named and _takes_bias(module) else Code.NO_MODULE
        own = isinstance(getattr(module, "running_var", None), Tensor)
        return None if own and _without_norm(module) is not None else Code.NO_MODULE

    def _is_another(self, node: fx.Node, known: fx.Node) -> bool:
        """Whether `node` shows that the forward to which `known` belongs is run twice."""
        one, other = super().read(node), super().read(known)
        same = type(one) is type(other) and getattr(one, "role", None) == getattr(other, "role", None)
        return same and node is not known

    def _users(self, name: str) -> set[fx.Node]:
        """The nodes that call the module, a module that it is in, or read its tensors."""
        found: set[fx.Node] = set()
        for node in self.graph.nodes:
            target = str(node.target)
            if node.op == "call_module" and (target == name or name.startswith(f"{target}.")):
                found.add(node)
            elif node.op == "get_attr" and target.startswith(f"{name}."):
                found |= set(node.users)
        return found


def _outline(captured: Capture, identities: set[str], without: set[fx.Node]) -> list[str]:
    """What a graph calls, in order: all but constants, calls of `identities`, and the nodes `without`."""
    reader = Reader(captured.root, captured.graph)
    found = []
    for node in captured.graph.nodes:
        identity = node.op == "call_module" and str(node.target) in identities
        unused = not node.users and isinstance(reader.read(node), Query)
        if node.op == "get_attr" or node in reader.constants or identity or unused or node in without:
            continue
        # An operator may have got a bias as an argument; layers have no other than their input.
        layer = node.op == "call_module" and _is_torch_layer(attribute(captured.root, str(node.target)))
        given = () if layer or isinstance(reader.read(node), Linear) else (node.args, node.kwargs)
        found.append(f"{node.op} {node.target} {fx.node.map_arg(given, lambda _: 0)}")
    return found


def _variants(module: nn.Module) -> list[dict[str, Any]]:
    """Values for the options of forward that stand for every choice of them.

    Raises:
        CaptureError: there are options of which not all values can be tried, or too many of them.
    """
    if isinstance(module, fx.GraphModule):
        return [{}]
    signature = inspect.signature(type(module).forward)
    name = type(module).__name__
    if any(p.kind in (p.VAR_POSITIONAL, p.VAR_KEYWORD) for p in signature.parameters.values()):
        raise CaptureError(f"forward of {name} takes any number of arguments")
    for kind in {type(each) for each in module.modules() if not type(each).__module__.startswith("torch.")}:
        if any(map(_compares_with_none, filter(inspect.isfunction, vars(kind).values()))):
            raise CaptureError(f"{kind.__name__} asks whether an argument is None")
    choices = {}
    for option, default in options(module).items():
        if default is not None and not isinstance(default, bool):
            raise CaptureError(f"forward of {name} takes an option {option}={default!r}")
        choices[option] = (None, _GIVEN) if default is None else (False, True)
    combinations = [*itertools.product(*choices.values())]
    if len(combinations) > _MOST_VARIANTS:
        raise CaptureError(f"forward of {name} takes {len(choices)} options")
    return [
        {option: value for option, value in zip(choices, values, strict=True) if value is not _GIVEN}
        for values in combinations
    ]


_GIVEN = object()
_CODES = {code.value.code: code for code in Code}


def _compares_with_none(function: Any) -> bool:
    """Whether the code may ask for an argument that has to be given whether it is None."""
    if function.__name__ in ("__init__", "extra_repr"):
        return False
    parameters = inspect.signature(function).parameters.values()
    names = {parameter.name for parameter in parameters if parameter.default is parameter.empty}
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(inspect.unwrap(function))))
    except (OSError, TypeError, SyntaxError):
        return True
    compared = [node for node in ast.walk(tree) if isinstance(node, ast.Compare)]
    return any(
        isinstance(operator, (ast.Is, ast.IsNot))
        and isinstance(node.left, ast.Name)
        and node.left.id in names
        for node in compared
        for operator in node.ops
    )


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
        if options(module):
            return None
        captured = capture(module)
    except CaptureError:
        return None
    reader = Reader(captured.root, captured.graph)
    sources = [node for node in captured.graph.nodes if isinstance(reader.read(node), (Norm, Affine))]
    for node in reversed(sources):
        op = reader.read(node)
        assert isinstance(op, (Norm, Affine))
        node.replace_all_uses_with(op.input)
        captured.graph.erase_node(node)
    for node in reversed(list(captured.graph.nodes)):
        if not node.users and (node.op == "get_attr" or node in reader.constants):
            captured.graph.erase_node(node)
    return replace(captured, name="WithoutNorm").module().eval()


def _erase(norm: nn.Module) -> None:
    """Makes a norm an Identity, or what else its forward does, for everybody who holds it."""
    inherited = any(kind.__dict__.get("forward") is type(norm).forward for kind in _TORCH_NORMS)
    rest: nn.Module | None = nn.Identity() if inherited else _without_norm(norm)
    assert rest is not None
    norm.__class__ = type(rest)
    norm.__dict__ = rest.eval().__dict__


def _caller(node: fx.Node) -> str:
    """The module in whose forward `node` is; for a call of a module that module."""
    stack = node.meta.get("nn_module_stack") or {"": None}
    return str(next(reversed(stack)))


def _is_torch_layer(module: nn.Module) -> bool:
    own = type(module).__module__.startswith("torch.")
    return own and not isinstance(module, (*_CONTAINERS, fx.GraphModule))


def _functions(module: nn.Module) -> list[Any]:
    return [value for value in vars(type(module)).values() if inspect.isfunction(value)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")


def _is_below(name: str, top: str) -> bool:
    return not top or name == top or name.startswith(f"{top}.")
