"""The methods of a kept module besides forward: whether one of them gets between two submodules.

`forward_features`, `embed` and the like stay callable. One that forward does not call, or calls with other
options, is not in the trace; what it calls is read from its source.
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Container, Iterator
from itertools import pairwise
from types import CodeType, FunctionType

from torch import nn

from fxfuse.functions import definition
from fxfuse.objects import user_classes


def others(module: nn.Module, traced: Container[CodeType]) -> Iterator[FunctionType]:
    """The public methods that are not in `traced`, or that take options."""
    for kind in user_classes(module):
        for name, value in vars(kind).items():
            public = name != "forward" and not name.startswith("_")
            if isinstance(value, FunctionType) and public and getattr(type(module), name) is value:
                options = any(p.default is not p.empty for p in inspect.signature(value).parameters.values())
                if options or value.__code__ not in traced:
                    yield value


def separates(method: FunctionType, first: str, second: str) -> bool:
    """Whether `method` calls one of two submodules in another way than one right after the other.

    That is ``x = self.first(x); x = self.second(x)`` or ``self.second(self.first(x))``.
    """
    found = definition(method.__code__)
    if found is None:
        return not {first, second}.isdisjoint(method.__code__.co_names)
    nodes = [*ast.walk(found)]
    together: set[ast.AST] = set()
    for node in nodes:
        if isinstance(node, ast.Call) and node.args:
            together |= _pair(node.args[0], node, first, second)
        body = node.body if isinstance(node, _BLOCKS) else []
        for one, other in pairwise(body):
            if isinstance(one, ast.Assign) and isinstance(other, ast.Assign):
                names = [ast.unparse(target) for target in (*one.targets, *other.targets)]
                given = other.value.args[:1] if isinstance(other.value, ast.Call) else []
                if {*names, *map(ast.unparse, given)} == {names[0]}:
                    together |= _pair(one.value, other.value, first, second)
    return any(_called(node) in (first, second) and node not in together for node in nodes)


def _pair(inner: ast.AST, outer: ast.AST, first: str, second: str) -> set[ast.AST]:
    return {inner, outer} if (_called(inner), _called(outer)) == (first, second) else set()


_BLOCKS = (ast.FunctionDef, ast.If, ast.For, ast.With)


def _called(node: ast.AST) -> str:
    """name, if the node is ``self.name(...)``."""
    match node:
        case ast.Call(func=ast.Attribute(value=ast.Name(), attr=name)):
            return name
    return ""
