"""What a module's own code does with its submodules, read from the source of that code.

Where fxfuse leaves a forward as it is, it may put other modules into the places of submodules only if that
code cannot tell the difference: if it calls them and does nothing else. This is an escape analysis of the
functions that forward can reach through ``self``. An expression's value is the set of modules that it may
be, by their paths; a variable's value is all that is ever assigned to it:

    self → {""};  self.name → {"name"};  self.blocks[i] → {"blocks.0", "blocks.1", ...};  anything else → {}

To call a value is what a replacement allows. The rules below tell what else is harmless, or pass the value
on. What has no rule lets the value escape, which exposes it: no value passes through a call, a return, an
attribute or a global variable, so functions are read one by one. Not seen is code that is handed no module
and finds one all the same: in a registry of another file, or by a debugger's means.
"""

from __future__ import annotations

import ast
import builtins
import inspect
import textwrap
from dataclasses import dataclass
from enum import IntEnum
from itertools import permutations
from types import FunctionType
from typing import Any

import torch
from torch import nn

from fxfuse.functions import definition, nested, reads
from fxfuse.objects import STATE, attributes, is_torch, modules_in, own_classes
from fxfuse.tree import CONTAINERS, HOOKS, has_hooks, parts_of

Value = frozenset[str]
_NOTHING: Value = frozenset()
_SELF: Value = frozenset({""})
_ITERATION = (
    "__iter__",
    "__getitem__",
    "__len__",
    "items",
    "values",
    "_get_item_by_idx",
    "_get_abs_string_index",
)
_ATTRIBUTES = ("__getattr__", "__getattribute__", "__setattr__", "__delattr__")
_ENTRIES = ("forward", "__call__", "_call_impl", "_wrapped_call_impl", "_slow_forward")
_TRICKS = {"eval", "exec", "locals", "vars", "globals", "_getframe", "currentframe"}
_IDIOMS = ("next(self.parameters()).dtype", "next(self.parameters()).device")
_PLAIN = (bool, int, float, complex, str, type(None), torch.dtype, torch.device, torch.memory_format)


class Kind(IntEnum):
    """How much of a submodule its parent's code needs.

    CALLED: any module with the same forward may take its place.
    LOOKED_AT: the object and its forward have to stay; what its own code only calls may be replaced.
    EXPOSED: the object has to stay, and everything below it.
    """

    CALLED = 0
    LOOKED_AT = 1
    EXPOSED = 2


@dataclass(frozen=True)
class Use:
    """How a submodule is used, and the place that shows it; none where it is only called."""

    kind: Kind
    where: str = ""


def hooks_look(module: nn.Module) -> bool:
    """Whether a hook of `module`, if it is not torch's, may look at the module it is given, or holds one."""
    hooks = [hook for name in HOOKS for hook in getattr(module, name).values()]
    hooks = [hook for hook in hooks if not is_torch(getattr(hook, "__module__", ""))]
    plain = [hook for hook in hooks if isinstance(hook, FunctionType) and hook.__code__.co_argcount]
    return len(plain) < len(hooks) or any(
        reads(hook, hook.__code__.co_varnames[0]) or any(modules_in(hook)) for hook in plain
    )


class _EverythingError(Exception):
    """The module itself escapes, and with it all submodules."""


def uses_of_submodules(module: nn.Module) -> dict[str, Use]:
    """For each submodule that the code of `module` reaches by itself, what that code does with it.

    Listed are the children and, of each of torch's containers that is looked at, the elements ("blocks.0").
    What lies below a listed submodule is the affair of that submodule's own code, unless it is exposed.
    """
    reader = _Reader(module)
    try:
        reader.read()
    except _EverythingError as error:
        return {name: Use(Kind.EXPOSED, str(error)) for name in reader.uses if "." not in name}
    reader.spread()
    return reader.uses


class _Reader:
    """Reads the code of one module, and notes the uses of its submodules."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.modules = {"": module}
        self.uses: dict[str, Use] = {}
        self._functions: list[FunctionType] = []
        self._elements("")

    def read(self) -> None:
        """Reads forward, the methods that it mentions, those that they mention; then what objects hold."""
        kind = type(self.module)
        if any(self.module in child.modules() for child in self.module.children()):
            raise _EverythingError(f"this {kind.__qualname__} is in itself")
        if has_hooks(self.module) or "forward" in vars(self.module) or _has_own(kind, *_ATTRIBUTES):
            raise _EverythingError(f"{kind.__qualname__} has hooks, or its own way to forward or attributes")
        for name in _ENTRIES:
            if _has_own(kind, name):
                self._follow(inspect.getattr_static(kind, name))
        for function in self._functions:  # grows meanwhile
            self._read_function(function)
        for path, holder in self.module.named_modules():
            for name, value in attributes(holder):
                self._refer(value, path, f"{type(holder).__qualname__}.{name} holds it")

    def spread(self) -> None:
        """Exposes what lies below an exposed submodule, and what shares parts with one that has to stay."""
        parts = {path: parts_of(module) for path, module in self.modules.items()}
        own = {id(tensor) for tensor in (*self.module.parameters(False), *self.module.buffers(False))}
        for path in self.uses:
            if parts[path] & own:
                self._mark(path, Kind.EXPOSED, "the module has a tensor of it as its own")
        before: dict[str, Use] = {}
        while before != self.uses:
            before = dict(self.uses)
            for path, other in permutations(self.uses, 2):
                use, same = self.uses[other], self.modules[path] is self.modules[other]
                staying = parts[other] if use.kind is Kind.EXPOSED else {id(self.modules[other])}
                if path.startswith(f"{other}."):
                    self._mark(path, use.kind if use.kind is Kind.EXPOSED else Kind.CALLED, use.where)
                elif use.kind and staying & parts[path] and not other.startswith(f"{path}."):
                    self._mark(
                        path, use.kind if same else Kind.EXPOSED, f"shares parts with {other}: {use.where}"
                    )

    def _elements(self, path: str) -> Value:
        """The modules in the one at `path`. From now on they have uses of their own."""
        inside = {f"{path}.{name}".lstrip("."): child for name, child in self.modules[path]._modules.items()}
        found = {name: child for name, child in inside.items() if child is not None}
        self.modules |= found
        self.uses |= {name: Use(Kind.CALLED) for name in found if name not in self.uses}
        return frozenset(found)

    def _mark(self, path: str, kind: Kind, where: str) -> None:
        if not path and kind is Kind.EXPOSED:
            raise _EverythingError(where)
        if path and kind > self.uses[path].kind:
            self.uses[path] = Use(kind, where)

    def _note(self, value: Value, node: Any, kind: Kind = Kind.EXPOSED) -> Value:
        for path in value:
            text = textwrap.shorten(ast.unparse(node), 80)
            self._mark(path, kind, f"{self._function.__qualname__} (line {node.lineno}: {text})")
            if kind is Kind.LOOKED_AT and _is_container(self.modules[path], own=not path):
                self._elements(path)
        return _NOTHING

    def _refer(self, value: Any, holder: str, where: str) -> None:
        """Exposes what an object leads to past the module tree, unless the object lies inside of it."""
        for held in modules_in(value):
            reached = {*held.modules()}
            for path, module in self.modules.items():
                inside = path and f"{holder}.".startswith(f"{path}.")
                if not inside and reached & ({*module.modules()} if path else {module}):
                    self._mark(path, Kind.EXPOSED, where)

    def _follow(self, function: Any) -> None:
        """Adds a method to what is read. Decorators by torch only call it, those by others are read."""
        while isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
            if not is_torch(function.__globals__.get("__name__")):
                break
            function = function.__wrapped__
        if not isinstance(function, FunctionType):
            raise _EverythingError(f"{function} is no Python function")
        if function not in self._functions:
            self._functions.append(function)

    def _read_function(self, function: FunctionType) -> None:
        """Reads the body until no variable gains a value."""
        found = definition(function.__code__)
        parameters = [*found.args.posonlyargs, *found.args.args] if found else []
        if not found or not parameters:
            raise _EverythingError(f"{function.__qualname__} has no source, or no parameter self")
        codes = nested(function.__code__)
        self._function = function
        self._local = {name for code in codes for name in code.co_varnames + code.co_cellvars}
        self._local |= {*function.__code__.co_freevars}
        self._variables = {parameters[0].arg: _SELF}
        before: dict[str, Value] = {}
        while before != self._variables:
            before = dict(self._variables)
            for statement in found.body:
                self._read(statement)

    # The rules. Reading lets values escape, `_value` passes them on.

    def _read(self, node: ast.AST) -> None:
        match node:
            case ast.Assign(targets=targets, value=source):
                for target in targets:
                    self._bind(target, self._value(source))
            case ast.For(target=target, iter=source) | ast.comprehension(target=target, iter=source):
                self._loop(target, source)
                self._read_parts(node, target, source)
            case ast.Global() | ast.Nonlocal() | ast.ClassDef():
                self._note(_SELF, node)
            case _:
                self._read_parts(node)

    def _read_parts(self, node: ast.AST, *done: ast.AST) -> None:
        for child in ast.iter_child_nodes(node):
            if child in done:
                continue
            if not isinstance(child, ast.expr):
                self._read(child)
            elif child is getattr(node, "test", None) or isinstance(getattr(node, "op", None), ast.Not):
                self._ask(self._value(child), child)
            else:
                self._note(self._value(child), node if hasattr(node, "lineno") else child)

    def _value(self, node: ast.expr) -> Value:
        match node:
            case ast.Name(id=name):
                return self._name(name, node)
            case ast.Attribute() if self._is_question(node):
                pass
            case ast.Attribute(value=owner, attr=name, ctx=ast.Load()):
                return self._attribute(self._value(owner), name, node)
            case ast.Attribute(value=owner, attr=name):
                self._store(self._value(owner), name, node)
            case ast.Subscript(value=owner, slice=index, ctx=ast.Load()):
                self._note(self._value(index), node)
                whole = self._value(owner)  # and so is used a slice of it
                parts = self._inside(whole, node)
                return {ast.Slice: whole, ast.Constant: parts}.get(type(index), whole | parts)
            case ast.Call():
                return self._call(node)
            case ast.IfExp(body=body, orelse=other):
                self._read_parts(node, body, other)
                return self._value(body) | self._value(other)
            case ast.BoolOp(values=items):
                return self._ask(_NOTHING.union(*map(self._value, items)), node)
            case ast.Compare(left=item, ops=[ast.Is() | ast.IsNot()], comparators=[ast.Constant(value=None)]):
                self._value(item)
            case _:
                self._read_parts(node)
        return _NOTHING

    def _name(self, name: str, node: ast.expr) -> Value:
        if name in _TRICKS:
            self._note(_SELF, node)
        if name not in self._local:
            self._refer(self._function.__globals__.get(name), "", f"the global {name} holds it")
        return self._variables.get(name, _NOTHING)

    def _attribute(self, value: Value, name: str, node: ast.expr) -> Value:
        """What ``value.name`` is. A bound method is as good as self; one of a submodule is not plain data."""
        for path in value - _SELF:
            plain = _is_plain_attribute(self.modules[path], name)
            self._note(frozenset({path}), node, Kind.LOOKED_AT if plain else Kind.EXPOSED)
        if name in _TRICKS or ("" in value and _is_machinery(name)):
            return self._note(_SELF, node)
        found = frozenset({name} & self.uses.keys()) if "" in value else _NOTHING
        for each in (vars(kind).get(name) for kind in own_classes(self.module) if "" in value):
            if isinstance(each, FunctionType):
                self._follow(each)
                found |= _SELF
            elif isinstance(each, property):
                self._follow(each.fget)
            elif hasattr(type(each), "__get__") and not isinstance(each, (staticmethod, classmethod)):
                self._note(_SELF, node)
        return found

    def _store(self, value: Value, name: str, node: ast.expr) -> None:
        """``value.name = ...`` and ``del value.name``."""
        hidden = inspect.getattr_static(type(self.module), name, None)
        harmless = _NOTHING if _is_machinery(name) or hasattr(type(hidden), "__get__") else _SELF
        replaced = frozenset({name} & self.uses.keys()) if "" in value else _NOTHING
        self._note(value - harmless | replaced, node)

    def _inside(self, value: Value, node: ast.AST) -> Value:
        """The elements of containers, which are looked at. An iteration through other code lets escape."""
        containers = frozenset(path for path in value if _is_container(self.modules[path], own=not path))
        self._note(value - containers, node)
        self._note(containers, node, Kind.LOOKED_AT)
        return _NOTHING.union(*map(self._elements, containers))

    def _ask(self, value: Value, node: ast.expr) -> Value:
        """Whether it is true: modules are, unless they have a length."""
        self._inside(frozenset(path for path in value if _has_length(self.modules[path])), node)
        return value

    def _bind(self, target: ast.expr, value: Value) -> None:
        match target:
            case ast.Name(id=name):
                self._variables[name] = self._variables.get(name, _NOTHING) | value
            case ast.Tuple(elts=places) | ast.List(elts=places):
                for place in places:
                    self._bind(place, self._inside(value, target))
            case _:  # an attribute, an item, a starred name
                self._note(self._value(target) | value, target)

    def _loop(self, target: ast.expr, source: ast.expr) -> None:
        match self._called(source), target:
            case ("enumerate", [inner]), ast.Tuple(elts=[index, item]):
                self._bind(index, _NOTHING)
                self._loop(item, inner)
            case ("zip", [*inner]), ast.Tuple(elts=items) if len(inner) == len(items):
                for part, item in zip(inner, items, strict=True):
                    self._loop(item, part)
            case ("reversed" | "list" | "tuple", [inner]), _:
                self._loop(target, inner)
            case (".items", [owner]), ast.Tuple(elts=[key, item]):
                self._bind(key, _NOTHING)
                self._bind(item, self._inside(self._value(owner), source))
            case (".values", [owner]), _:
                self._bind(target, self._inside(self._value(owner), source))
            case _:
                parts = source.elts if isinstance(source, (ast.Tuple, ast.List)) else []
                value = _NOTHING.union(*map(self._value, parts))
                self._bind(target, value if parts else self._inside(self._value(source), source))

    def _is_question(self, node: ast.Attribute) -> bool:
        """Whether it is an idiom that asks for the one dtype or device of all parameters."""
        idiom = ast.unparse(node) in _IDIOMS and self._called(node.value)[0] == "next"
        return idiom and _has_uniform_parameters(self.module)

    def _call(self, node: ast.Call) -> Value:
        match self._called(node):
            case "super", arguments if all(self._value(each) <= _SELF for each in arguments):
                return _SELF
            case "len", [item]:
                self._inside(self._value(item), node)
            case "isinstance" | "type", [item, *kinds]:
                self._note(self._value(item), node, Kind.LOOKED_AT)
                self._note(_NOTHING.union(*map(self._value, kinds)), node)
            case "hasattr", [owner, ast.Constant(value=str(name))]:
                self._attribute(self._value(owner), name, node)
            case "getattr", [owner, ast.Constant(value=str(name)), *default]:
                return self._attribute(self._value(owner), name, node).union(*map(self._value, default))
            case _:
                self._value(node.func)
                for argument in (*node.args, *(keyword.value for keyword in node.keywords)):
                    self._note(self._value(argument), node)
        return _NOTHING

    def _called(self, node: ast.expr) -> tuple[str, list[ast.expr]]:
        """The name and arguments of a call of a builtin function or, after a dot, of a method without any."""
        match node:
            case ast.Call(func=ast.Name(id=name), args=arguments, keywords=options):
                hidden = name in self._local or name in self._function.__globals__
                plain = all(isinstance(option.value, ast.Constant) for option in options)
                return (name, arguments) if plain and not hidden and hasattr(builtins, name) else ("", [])
            case ast.Call(func=ast.Attribute(value=owner, attr=name), args=[], keywords=[]):
                return f".{name}", [owner]
        return "", []


def _is_machinery(name: str) -> bool:
    """Whether ``self.name`` is a way of nn.Module, or of Python, to reach all that is in a module."""
    known = name in STATE or name.startswith("__") or hasattr(nn.Module, name)
    return known and name not in ("forward", "__class__")


def _has_own(kind: type, *names: str) -> bool:
    return any(getattr(kind, name, None) is not getattr(nn.Module, name, None) for name in names)


def _is_container(module: nn.Module, *, own: bool) -> bool:
    """Whether it is torch's container, with no code of its own, or `own`: iterates as one."""
    kind = type(module)
    like = [[getattr(kind, name, 0) is getattr(base, name, 0) for name in _ITERATION] for base in CONTAINERS]
    return kind in CONTAINERS or (own and any(map(all, like)))


def _has_length(module: nn.Module) -> bool:
    return hasattr(type(module), "__len__") or hasattr(type(module), "__bool__")


def _has_uniform_parameters(module: nn.Module) -> bool:
    kinds = {(parameter.dtype, parameter.device) for parameter in module.parameters()}
    return len(kinds) == 1 and not _has_own(type(module), "parameters", "named_parameters")


def _is_plain_attribute(module: nn.Module, name: str) -> bool:
    """Whether reading it runs no code and gives plain data, if anything."""
    hidden = inspect.getattr_static(type(module), name, None)
    if _is_machinery(name) or _has_own(type(module), *_ATTRIBUTES) or hasattr(type(hidden), "__get__"):
        return False
    places = (vars(module), module._parameters, module._buffers, module._modules)
    value = next((place[name] for place in places if name in place), hidden)
    return all(isinstance(each, _PLAIN) for each in (value if isinstance(value, tuple) else (value,)))
