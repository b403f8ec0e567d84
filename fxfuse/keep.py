"""Folding inside a module that stays what it is: the same class, attributes and forward, other weights.

A norm becomes an Identity (or what its own forward does besides), an operator gets folded weights, both in
place. What can be traced for every choice of its options is folded by that proof (`fxfuse.unit`). What stands
in a forward that cannot be traced stays; the modules with which that code does no more than call them
(`fxfuse.exposure`) are folded inside, each by itself.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace

from torch import nn

from fxfuse.capture import Capture
from fxfuse.errors import CaptureError
from fxfuse.exposure import Kind, hooks_look, uses_of_submodules
from fxfuse.layers import code_calls_norm, has_statistics, is_norm, is_torch_layer
from fxfuse.leave import Leave
from fxfuse.ops import norms_inside
from fxfuse.places import place_of_forward
from fxfuse.records import Fold, Refusal
from fxfuse.refusals import Code
from fxfuse.tree import CONTAINERS, attribute, has_hooks, is_below, joined
from fxfuse.unit import Unit, called_with_norms, looks_into


@dataclass
class Account:
    """What became of the norms of a module: all of them, by their names in the whole model."""

    folded: list[Fold] = field(default_factory=list)
    refused: list[Refusal] = field(default_factory=list)

    def refuse(self, refusal: Refusal) -> None:
        """Adds `refusal`, unless the norm has one."""
        if all(other.norm != refusal.norm for other in self.refused):
            self.refused.append(refusal)


def fold_inside(source: nn.Module, target: nn.Module, leave: Leave) -> Account:
    """Folds inside `target`, a replica of `source`, in place, all but `leave`. The source is not changed."""
    folder = _Folder(source, target, leave)
    folder.walk("")
    return folder.folded()


def fold_called(source: nn.Module, captured: Capture, leave: Leave) -> Account:
    """Folds inside those modules of `captured` that its graph calls as a whole; `source` is not changed."""
    folder = _Folder(source, captured.root, leave)
    for path in called_with_norms(captured):
        folder.walk_called(path, Code.EXPOSED if looks_into(captured, path) else None)
    return folder.folded()


class _Folder:
    """Walks through all modules first, since the code of one may expose what another one only calls."""

    def __init__(self, source: nn.Module, target: nn.Module, leave: Leave) -> None:
        self.source = source
        self.target = target
        self.leave = leave
        self.account = Account()
        self._units: list[tuple[str, Unit]] = []
        self._walked: set[nn.Module] = set()
        self._exposed: set[nn.Module] = set()
        self._paths: dict[nn.Module, list[str]] = {}
        for name, module in source.named_modules(remove_duplicate=False):
            self._paths.setdefault(module, []).append(name)

    def walk(self, path: str) -> None:
        """Finds what can be folded inside the module of that name."""
        module = attribute(self.source, path)
        place = f"{path or type(self.source).__name__} ({type(module).__name__})"
        if module in self._walked:
            return
        self._walked.add(module)
        if is_norm(module) or has_statistics(module):
            self._leave(path, Code.UNTRACED, place)
        elif path and (has_hooks(module) or is_torch_layer(module)):
            self._leave(path, Code.INSIDE_OPAQUE, place)
        elif hooks_look(module):
            self._leave(path, Code.EXPOSED, f"a hook of {type(module).__name__} looks at the module")
        elif norms_inside(module):
            try:
                unit = Unit(module, self._shared_below(path))
            except CaptureError:
                self._walk_parts(path, module, place)
                return
            self._units.append((path, unit))
            exposed = Code.EXPOSED if unit.is_single else Code.OPTIONS
            for called in unit.called():
                looked_into = exposed if unit.looks_into(called) else None
                only_called = _is_only_called(module, called)
                self.walk_called(joined(path, called), looked_into if only_called else Code.EXPOSED)

    def walk_called(self, path: str, exposed: Code | None) -> None:
        """As `walk`, for a module that a graph calls whole; `exposed` if a graph uses its inside as well."""
        if exposed is None:
            self.walk(path)
        else:
            self._leave(path, exposed, f"{path} is called and looked into")

    def _walk_parts(self, path: str, module: nn.Module, place: str) -> None:
        """Walks on into those submodules that the code of the module, which stays, does no more than call."""
        if code_calls_norm(module):
            self.account.refuse(Refusal.because(path, Code.UNTRACED, place, place_of_forward([module])))
        for name, use in uses_of_submodules(module).items():
            child = joined(path, name)
            container = isinstance(attribute(self.source, child), CONTAINERS)
            if use.kind is Kind.EXPOSED:
                self._leave(child, Code.EXPOSED, use.where)
            elif use.kind is Kind.CALLED or not container:  # what walks through a container does not call it
                self.walk(child)

    def _leave(self, path: str, code: Code, detail: str) -> None:
        """The module of that name stays, and all that is in it."""
        module = attribute(self.source, path)
        if module not in self._exposed:
            for name in [""] if is_norm(module) else norms_inside(module):
                norm = joined(path, name)
                self.account.refuse(Refusal.because(norm, code, detail, self._place(norm)))
        self._walked |= {*module.modules()}
        self._exposed |= {*module.modules()}

    def _place(self, norm: str) -> str:
        """The forward that calls it, directly or through torch.nn's containers."""
        parts = norm.split(".")[:-1]
        owners = (".".join(parts[:count]) for count in range(len(parts), -1, -1))
        return place_of_forward(attribute(self.source, owner) for owner in owners)

    def _shared_below(self, path: str) -> Iterator[str]:
        """The modules below `path`, by names relative to it, that the model also has elsewhere."""
        module = attribute(self.source, path)
        tops = self._paths[module]
        for name, child in module.named_modules():
            if not all(any(is_below(each, top) for top in tops) for each in self._paths[child]):
                yield name

    def folded(self) -> Account:
        """Folds in all units that have been found."""
        for path, unit in self._units:
            exposed = {name for name, module in unit.module.named_modules() if module in self._exposed}
            unit.left |= {**self.leave.below(path), **dict.fromkeys(exposed, Code.EXPOSED)}
            unit.settle()
            unit.apply(attribute(self.target, path))
            for fold in unit.folds():
                into = tuple(joined(path, name) for name in fold.into)
                self.account.folded.append(replace(fold, norm=joined(path, fold.norm), into=into))
            for refusal in unit.refusals():
                if refusal.norm not in exposed:
                    self.account.refuse(replace(refusal, norm=joined(path, refusal.norm)))
        return self.account


def _is_only_called(module: nn.Module, name: str) -> bool:
    """Whether the code of `module`, and of those in it that hold `name`, does no more than call that one."""
    uses = uses_of_submodules(module)
    parts = name.split(".")
    for count in range(len(parts), 0, -1):
        first, rest = ".".join(parts[:count]), ".".join(parts[count:])
        if first in uses:
            held = attribute(module, first)
            return uses[first].kind is not Kind.EXPOSED and (not rest or _is_only_called(held, rest))
    return False
