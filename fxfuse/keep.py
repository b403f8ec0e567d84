"""Folding inside a module that stays what it is: the same class, attributes and forward, other weights.

A norm becomes an Identity (or what its own forward does besides), an operator gets folded weights, both in
place. What can be traced for every choice of its options is folded by that proof (`fxfuse.unit`). What stands
in a forward that cannot be traced stays; the modules with which that code does no more than call them
(`fxfuse.exposure`) are folded inside, each by itself.
"""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field, replace
from typing import Any

from torch import nn

from fxfuse.capture import Capture
from fxfuse.errors import CaptureError
from fxfuse.exposure import Kind, hooks_look, uses_of_submodules
from fxfuse.layers import calls_norm, is_norm, is_torch_layer
from fxfuse.ops import norms_inside
from fxfuse.records import Fold, Refusal
from fxfuse.refusals import Code
from fxfuse.tree import CONTAINERS, attribute, has_hooks
from fxfuse.unit import Unit, looks_into


@dataclass
class Account:
    """What became of the norms of a module: all of them, by their names in the whole model."""

    folded: list[Fold] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    def refuse(self, refusal: Refusal) -> None:
        """Adds `refusal`, unless the norm has one."""
        if all(other.norm != refusal.norm for other in self.refused):
            self.refused.append(refusal)


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
        elif path and (has_hooks(module) or is_torch_layer(module)):
            self._refuse_all(path, Code.INSIDE_OPAQUE, f"{path} ({type(module).__name__})")
        elif hooks_look(module):
            self._refuse_all(path, Code.EXPOSED, f"a hook of {type(module).__name__} looks at the module")
        elif norms_inside(module) or any(map(calls_norm, _functions(module))):
            self._fold_traced(path, module)

    def _fold_traced(self, path: str, module: nn.Module) -> None:
        try:
            unit = Unit(module, self._shared_below(path))
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
            self.account.refuse(replace(refusal, norm=_join(path, refusal.norm)))
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
            container = isinstance(attribute(self.source, child), CONTAINERS)
            if use.kind is Kind.EXPOSED:
                self._refuse_all(child, Code.EXPOSED, use.where)
            elif use.kind is Kind.CALLED or not container:  # what walks through a container does not call it
                self.fold(child)

    def _refuse(self, norm: str, code: Code, detail: str) -> None:
        self.account.refuse(Refusal.because(norm, code, detail))

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


def _functions(module: nn.Module) -> list[Any]:
    return [value for value in vars(type(module)).values() if inspect.isfunction(value)]


def _join(path: str, name: str) -> str:
    return f"{path}.{name}".strip(".")


def _is_below(name: str, top: str) -> bool:
    return not top or name == top or name.startswith(f"{top}.")
