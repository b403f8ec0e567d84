"""What a forward may not do while it is traced, because the graph would lose it without a word."""

from __future__ import annotations

import contextlib
import copyreg
import functools
import operator
import random
import sys
from collections import deque
from collections.abc import Container, Iterable, Iterator
from types import CellType, FunctionType, MethodType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function
from torch.fx.proxy import Proxy, TraceError
from torch.utils._python_dispatch import TorchDispatchMode

from fxfuse.contents import is_constant
from fxfuse.held import held, is_same
from fxfuse.objects import objects_in, own_attributes, user_classes
from fxfuse.tree import NORM_RANKS, named_tensors, storage


@contextlib.contextmanager
def no_random_numbers() -> Iterator[None]:
    """Random numbers that do not depend on the input would be drawn once and fixed for ever."""
    before = _random_states()
    gpus = range(len(before["torch"]) - 1)
    with torch.random.fork_rng(devices=gpus):
        try:
            yield
        finally:
            drawn = not is_same(held(before), held(_random_states()))
            random.setstate(before["python"])
            if before["numpy"] is not None:
                sys.modules["numpy"].random.set_state(before["numpy"])
    if drawn:
        raise TraceError("the model draws random numbers that a trace would fix for ever")


@contextlib.contextmanager
def no_attributes_set(modules: Container[int]) -> Iterator[None]:
    """What forward stores in a module, a graph does not, and a layer is called with what it had before."""
    original = nn.Module.__setattr__

    def refuse(module: nn.Module, name: str, value: Any) -> None:
        by_fx = sys._getframe(1).f_globals.get("__name__", "").startswith("torch.fx")
        held = module._buffers.get(name, module._parameters.get(name))
        is_cache = held is None and is_constant(value)  # a buffer that is there may be what it comes from
        same = by_fx or is_cache or getattr(module, name, refuse) is value
        if id(module) in modules and not same:
            kind = type(module).__name__
            raise TraceError(f"forward sets {name} of a {kind}, which a graph does not record")
        original(module, name, value)

    with patched(nn.Module, "__setattr__", refuse):
        yield


@contextlib.contextmanager
def no_swapped_parameters() -> Iterator[None]:
    """functional_call puts other tensors into a layer for one call; the call in a graph would not."""

    def refuse(*_: Any, **__: Any) -> None:
        raise TraceError("forward uses functional_call, which a graph does not record")

    with patched(torch.nn.utils.stateless, "_functional_call", refuse):
        yield


@contextlib.contextmanager
def no_own_gradients() -> Iterator[None]:
    """A graph would record what the forward of an autograd.Function does, and lose its backward."""
    original = vars(Function)["apply"]

    def apply(cls: type[Function], *args: Any, **kwargs: Any) -> Any:
        if any(isinstance(each, Proxy) for each in flat((args, kwargs))):
            raise TraceError(f"forward applies {cls.__name__}, whose backward a graph does not record")
        return original.__get__(None, cls)(*args, **kwargs)

    with patched(Function, "apply", classmethod(apply)):
        yield


class SourceIsReadOnly(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """While the model is traced, nothing may write to the memory that its replica shares with it.

    Args:
        model: the source.
        unread: whether nothing may read parameters and buffers either, but by way of the graph.
    """

    def __init__(self, model: nn.Module, *, unread: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        tensors = [tensor for _, tensor in named_tensors(model)]
        self.unread = {storage(tensor) for tensor in tensors if tensor.numel()} if unread else set()
        held = [value for module in model.modules() for _, value in own_attributes(module)]
        found: list[Any] = [*objects_in(held)]
        tensors += [each for each in found if isinstance(each, Tensor)]
        self.generators = {_address(each) for each in found if isinstance(each, torch.Generator)}
        self.memory = {storage(tensor) for tensor in tensors}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if _address((kwargs or {}).get("generator")) in self.generators:
            raise TraceError("the model draws random numbers that a trace would fix for ever")
        given = {storage(each) for each in flat((args, kwargs or {})) if isinstance(each, Tensor)}
        if func._schema.is_mutable and not given.isdisjoint(self.memory):
            raise TraceError(
                "forward writes to a parameter, buffer or tensor of the model while it is traced"
            )
        if not given.isdisjoint(self.unread):
            raise TraceError("forward reads a parameter or buffer in a way that a graph does not show")
        return func(*args, **(kwargs or {}))


def _address(generator: Any) -> int | None:
    """Where a generator of random numbers is; for one there may be several objects. None for none."""
    return getattr(generator, "_cdata", None)


@contextlib.contextmanager
def objects_unchanged(model: nn.Module) -> Iterator[None]:
    """What forward keeps in objects that are no modules, or in its class, would be proxies from then on."""
    before = _holders(model)
    changed = False
    try:
        yield
    finally:
        for each, saved in before:
            now = _saved(each)
            if _identities(now) != _identities(saved):
                changed |= not _is_cache(saved, now)
                _restore(each, saved)
    if changed:
        raise TraceError("forward keeps state in an object or a class, which a graph does not record")


def _holders(model: nn.Module) -> list[tuple[Any, Any]]:
    """What classes and objects that are no modules lead to, if it may be given others, and what it holds."""
    classes = {kind for module in model.modules() for kind in user_classes(module)}
    waiting = [each for kind in classes for each in vars(kind).values()]
    waiting += [value for module in model.modules() for _, value in own_attributes(module)]
    found: list[tuple[Any, Any]] = []
    seen: dict[int, Any] = {}
    while waiting:
        value = waiting.pop()
        if id(value) in seen or isinstance(value, _KNOWN):
            continue
        seen[id(value)] = value
        if isinstance(value, FunctionType):
            waiting += [vars(value), *(value.__closure__ or ()), value.__defaults__, value.__kwdefaults__]
        elif isinstance(value, MethodType):
            waiting += [value.__self__, value.__func__]
        elif isinstance(value, functools.partial):
            waiting += [value.func, value.args, value.keywords]
        elif isinstance(value, tuple):
            waiting += value
        else:
            saved = _saved(value)
            if saved is not None:
                found.append((value, saved))
                waiting += saved.values() if isinstance(saved, dict) else saved
            waiting += [vars(value)] if hasattr(value, "__dict__") and not _is_closed(type(value)) else []
    return found


_KINDS = (list, dict, set, deque)
_KNOWN = (nn.Module, Tensor, type, ModuleType, str, int, float, type(None))


def _saved(holder: Any) -> Any:
    """A copy of what it holds; None if it holds nothing that can be set."""
    if isinstance(holder, _KINDS):
        return dict(holder) if isinstance(holder, dict) else [*holder]
    if isinstance(holder, CellType):
        return [] if holder == CellType() else [holder.cell_contents]
    slots: list[str] = [] if _is_closed(type(holder)) else copyreg._slotnames(type(holder))  # type: ignore[attr-defined]
    return dict(_slots(holder, slots)) if slots else None


def _is_closed(kind: type) -> bool:
    """Whether it is a part of Python that keeps what it likes, as paths and loggers do."""
    home = str(kind.__module__).partition(".")[0]
    return home in sys.stdlib_module_names and home not in {"argparse", "builtins", "collections", "types"}


def _slots(holder: Any, names: Iterable[str]) -> Iterator[tuple[str, Any]]:
    for name in names:
        with contextlib.suppress(AttributeError):  # it is empty
            yield name, object.__getattribute__(holder, name)


def _is_cache(saved: Any, now: Any) -> bool:
    """Whether nothing but constants was put in empty places: tensors that a trace does not see are such."""
    if isinstance(saved, dict) != isinstance(now, dict) or len(saved) > len(now):
        return False
    before, after = (dict(each) if isinstance(each, dict) else dict(enumerate(each)) for each in (saved, now))
    return all(
        value is before.get(key) or (before.get(key) is None and issubclass(type(value), Tensor))
        for key, value in after.items()
    )


def _identities(saved: Any) -> list[tuple[int, int]]:
    pairs = saved.items() if isinstance(saved, dict) else enumerate(saved)
    return [(id(key) if isinstance(saved, dict) else 0, id(value)) for key, value in pairs]


def _restore(holder: Any, saved: Any) -> None:
    if isinstance(holder, CellType) and saved:
        holder.cell_contents = saved[0]
    elif isinstance(holder, CellType):
        del holder.cell_contents
    elif isinstance(holder, _KINDS):
        holder.clear()
        (holder.extend if isinstance(holder, (list, deque)) else holder.update)(saved)
    else:
        for name in _saved(holder).keys() - saved.keys():
            object.__delattr__(holder, name)
        for name, value in saved.items():
            object.__setattr__(holder, name, value)


@contextlib.contextmanager
def traceable_checks() -> Iterator[None]:
    """The input checks of batch norms branch on the number of axes; in a trace they become assertions."""
    with contextlib.ExitStack() as stack:
        for kind, ranks in NORM_RANKS.items():
            if ranks is not None and "_check_input_dim" in vars(kind):
                original = vars(kind)["_check_input_dim"]
                check = functools.partialmethod(_check_rank, ranks, original)
                stack.enter_context(patched(kind, "_check_input_dim", check))
        yield


def _check_rank(_module: nn.Module, ranks: frozenset[int], check: Any, value: Any) -> None:
    if not isinstance(value, Proxy):
        check(_module, value)
        return
    number: Any = value.ndim
    tests = [number == rank for rank in sorted(ranks)]
    message = f"expected an input with {' or '.join(map(str, sorted(ranks)))} axes"
    torch._assert(functools.reduce(operator.or_, tests), message)  # type: ignore[no-untyped-call]


@contextlib.contextmanager
def patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    """While the context lasts, `owner` has another attribute of that name."""
    original = vars(owner)[name]
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, original)


def _random_states() -> dict[str, Any]:
    """The states of the random numbers of Python, of numpy if somebody has imported it, and of torch."""
    numpy = sys.modules.get("numpy")
    on_gpus = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else []  # type: ignore[no-untyped-call]
    return {
        "python": random.getstate(),
        "numpy": None if numpy is None else numpy.random.get_state(),
        "torch": [bytes(state.tolist()) for state in (torch.get_rng_state(), *on_gpus)],
    }


def flat(value: Any) -> Iterator[Any]:
    """The leaves of nested lists, tuples and dicts."""
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for item in value:
        yield from flat(item)
