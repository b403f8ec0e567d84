"""A module → its FX graph.

``torch.fx`` traces a model by running its Python on proxies, and stops where Python asks a proxy for a
value. Three additions take it further without specialising the graph:

* A plain function that asks for a value (padding by the size of the image, mostly) becomes a leaf: it is
  called by the graph as it was called by the model. The trace is then begun again. A module whose forward
  asks for a value becomes a leaf likewise.
* Buffers are proxies, as parameters are: what a model computes from them stays in the graph.
* Questions about types are answered for the value (`fxfuse.proxies`).

A module that carries hooks is a leaf too, so that its hooks go on running.
"""

from __future__ import annotations

import contextlib
import inspect
import linecache
import operator
import sys
import traceback
from collections.abc import Container, Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import pairwise
from types import CodeType, FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import Proxy, TraceError

from fxfuse.aliases import roots
from fxfuse.calls import written_inputs
from fxfuse.contents import Contents
from fxfuse.errors import CaptureError
from fxfuse.functions import compared_by_identity
from fxfuse.guards import (
    SourceIsReadOnly,
    flat,
    no_attributes_set,
    no_own_gradients,
    no_random_numbers,
    no_swapped_parameters,
    objects_unchanged,
    traceable_checks,
)
from fxfuse.options import defaults
from fxfuse.places import is_own_code, place_of, stack_trace
from fxfuse.proxies import ParameterProxy, TensorProxy, TypedProxy, gives_tensor
from fxfuse.reparametrized import evaluate_weights
from fxfuse.replica import replicate
from fxfuse.tree import has_hooks, named_tensors

# The entry of a node's meta that holds the calls of methods in which it came about.
METHODS = "fxfuse_methods"


class ModuleTracer(fx.Tracer):
    """Traces through modules that are neither ``torch.nn``'s own nor hooked."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.source: nn.Module | None = None
        self.kept: set[str] = set()
        self.notes_methods = False
        self.asked = ""
        self.argument = ""
        self._autocast = _autocast_state()
        self._tensors: set[fx.Node] = set()
        self._frames: set[FrameType] = set()  # so that no two of them are at one address
        self._names: dict[int, str] = {}
        self._paths: dict[int, str] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Traces `root`; modules and tensors of ``source``, which it is a replica of, count as its own."""
        for model in (root, self.source):
            if isinstance(model, nn.Module):
                self._names |= {id(tensor): name for name, tensor in reversed([*named_tensors(model)])}
                self._paths |= {id(module): name for name, module in model.named_modules()}
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Leaves are torch.nn's modules, heirs of their forward, hooked modules, and those `kept`."""
        if module_qualified_name in self.kept:
            return True
        if type(m).__call__ is not nn.Module.__call__:
            return False  # the call has been entered already, by the class's own __call__
        leaf = super().is_leaf_module(m, module_qualified_name) or isinstance(m, torch.jit.ScriptModule)
        if leaf or has_hooks(m):
            return True
        forward = inspect.unwrap(type(m).forward)
        return forward.__module__.startswith("torch.nn.modules") and not isinstance(m, nn.Sequential)

    def to_bool(self, obj: Proxy) -> bool:
        """Raises, as fx does, and remembers it: forward may catch the error and go on."""
        self.asked = f"forward asks for the value of {obj.node.name}"
        return super().to_bool(obj)

    def iter(self, obj: Proxy) -> Iterator[Any]:
        """As fx does, and remembers if it is an error."""
        asked, self.asked = self.asked, f"forward iterates over {obj.node.name}"
        found = super().iter(obj)
        self.asked = asked
        return found

    def path_of_module(self, mod: nn.Module) -> str:
        """The qualified name, also where the model reaches a module by a way that replicas do not follow."""
        if id(mod) not in self._paths:
            raise NameError(f"{type(mod).__name__} is called but is not registered as a submodule")
        return self._paths[id(mod)]

    def getattr(self, _attr: str, attr_val: Any, parameter_proxy_cache: dict[str, Proxy]) -> Any:
        """A proxy for each parameter and buffer, one per name; other attributes as they are."""
        if not isinstance(attr_val, Tensor) or id(attr_val) not in self._names:
            return attr_val
        name = self._names[id(attr_val)]
        if name not in parameter_proxy_cache:
            node = self.create_node("get_attr", name, (), {})
            self._tensors.add(node)
            parameter_proxy_cache[name] = (
                ParameterProxy(self, node, name, attr_val)
                if isinstance(attr_val, nn.Parameter)
                else TensorProxy(node, self)
            )
        return parameter_proxy_cache[name]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """As fx does; a graph cannot hold the autocast contexts that a forward enters."""
        if _autocast_state() != self._autocast:
            raise TraceError("autocast is switched inside forward, which a graph does not record")
        node = super().create_node(*args, **kwargs)
        node.stack_trace = stack_trace(ModuleTracer.trace.__code__)
        if self.notes_methods:
            node.meta[METHODS] = tuple(self._methods_running())
        return node

    def _methods_running(self) -> Iterator[tuple[int, CodeType]]:
        """The calls, going on, of methods by which others than forward can get at a value on its way."""
        frame: FrameType | None = sys._getframe(1)
        while frame is not None:
            name, code = frame.f_code.co_name, frame.f_code
            if name != "forward" and name[0] not in "_<" and code.co_varnames and is_own_code(frame):
                owner = frame.f_locals.get(code.co_varnames[0])
                if isinstance(owner, nn.Module) and id(owner) in self._paths and hasattr(type(owner), name):
                    self._frames.add(frame)
                    yield id(frame), code
            frame = frame.f_back

    def create_arg(self, a: Any) -> Any:
        """As fx does, with the names of parameters and buffers looked up instead of searched for."""
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, Tensor) and id(a) in self._names:
            return self.create_node("get_attr", self._names[id(a)], (), {})
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> Proxy:
        """A proxy that knows whether it stands for a tensor."""
        if not gives_tensor(node, self.root, self._tensors):
            return TypedProxy(node, self)
        self._tensors.add(node)
        return TensorProxy(node, self)


def _autocast_state() -> list[Any]:
    return [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
    ]


def trace(
    model: nn.Module, fixed: Mapping[str, Any] | None = None, given: Container[str] = ()
) -> tuple[nn.Module, fx.Graph]:
    """A replica of `model`, its computed weights evaluated, and the graph of a run on it.

    Args:
        model: the module; it is not changed.
        fixed: values for arguments of its forward; without it every option has its default. With it all
            that the graph does not show is an error, since forward itself is going to be run.
        given: the arguments that are known not to be None.

    Raises:
        CaptureError: the model cannot be traced; the message names the line and the reason.
    """
    leaves: list[_LeafFunction] = []
    kept: set[str] = set()
    watched = fixed is not None
    while True:
        root = replicate(model)
        evaluate_weights(root)
        tracer = ModuleTracer()
        tracer.source, tracer.kept, tracer.notes_methods = model, kept, fixed is not None
        try:
            asked = given if watched or leaves or kept else None
            graph, changed = _attempt(model, root, tracer, leaves, fixed, asked)
            if not changed and (watched or not _has_parts(graph)):
                graph.lint()  # no value is left of an earlier trace
                _no_writes_to_constants(graph, root, model)
                return root, graph
            kept |= changed
            watched = watched or not changed
        except CaptureError:
            raise
        except Exception as error:  # forward meets proxies, and may raise anything
            failed = None if tracer.argument else _what_failed(error, leaves, tracer)
            if failed is None:
                message = _explanation(model, error, by_value=bool(tracer.asked))
                raise CaptureError(message, tracer.argument) from error
            if isinstance(failed, str):
                kept.add(failed)
            else:
                leaves.append(failed)


def _attempt(
    model: nn.Module,
    root: nn.Module,
    tracer: ModuleTracer,
    leaves: Iterable[_LeafFunction],
    fixed: Mapping[str, Any] | None,
    given: Container[str] | None,
) -> tuple[fx.Graph, set[str]]:
    """The graph of a run of `root`, a replica of `model`, and its modules that held other things before.

    Questions for None are noticed, unless `given` is None.

    Raises:
        TraceError: the graph would not do what forward does. Forward itself may raise anything.
    """
    before = Contents(root)
    with contextlib.ExitStack() as stack:
        for leaf in leaves:
            stack.enter_context(leaf.patched(tracer))
        for guard in (
            no_random_numbers(),
            no_attributes_set({id(module) for each in (root, model) for module in each.modules()}),
            no_swapped_parameters(),
            no_own_gradients(),
            SourceIsReadOnly(model, unread=fixed is not None),
            objects_unchanged(model),
            traceable_checks(),
            torch.no_grad(),
            contextlib.nullcontext() if given is None else _watching(tracer, given),
        ):
            stack.enter_context(guard)
        graph = tracer.trace(root, dict(defaults(model) if fixed is None else fixed))
    changed = Contents(root, before).changed()
    for path, name in changed.items():
        if not path or path in tracer.kept:  # what is kept is no part of the graph, and changed by others
            raise TraceError(f"forward changes {path and f'{path}.'}{name}, which a graph does not record")
    if tracer.asked:
        raise TraceError(tracer.asked)
    return graph, {*changed}


@contextlib.contextmanager
def _watching(tracer: ModuleTracer, given: Container[str]) -> Iterator[None]:
    """Notices questions whether a value is None that only the run could answer."""

    def enter(frame: FrameType, _event: str, _arg: Any) -> Any:
        return look if is_own_code(frame) and compared_by_identity(frame.f_code) else None

    def look(frame: FrameType, _event: str, _arg: Any) -> Any:
        for name in compared_by_identity(frame.f_code):
            value = frame.f_locals.get(name)
            if type(value) is TypedProxy:
                argument = value.node.target if value.node.op == "placeholder" else ""
                if argument not in given:
                    tracer.asked = f"{frame.f_code.co_qualname} asks whether {name} is None"
                    tracer.argument = str(argument)
        return look

    previous = sys.gettrace()
    sys.settrace(enter)
    try:
        yield
    finally:
        sys.settrace(previous)


def _has_parts(graph: fx.Graph) -> bool:
    """Whether an input may be missing: there are several, or one is a collection."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    users = (user for node in inputs for user in node.users)
    picks = any(user.target is operator.getitem and isinstance(user.args[1], (int, str)) for user in users)
    return len(inputs) > 1 or picks


def _no_writes_to_constants(graph: fx.Graph, traced: nn.Module, model: nn.Module) -> None:
    """A tensor that forward makes without looking at its input is one tensor for all calls of the graph."""
    attributes = (node for node in graph.nodes if node.op == "get_attr")
    made = {each for each in attributes if not hasattr(model, str(each.target).partition(".")[0])}
    found = roots(graph, traced, written_inputs, {}) if made else {}
    for node in graph.nodes if made else ():
        if any(found[each] & made for each in written_inputs(node)):
            raise CaptureError(
                f"forward writes to a tensor that it has made itself, by {node.name}, {place_of(node)}; "
                "in a graph it would be one tensor for all calls"
            )


@dataclass(frozen=True)
class _LeafFunction:
    """A module-level function and a namespace through which the model calls it."""

    function: FunctionType
    namespace: dict[str, Any]

    @contextlib.contextmanager
    def patched(self, tracer: fx.Tracer) -> Iterator[None]:
        """While the context lasts, a call with proxies becomes a node of the graph."""

        def leaf(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(argument, Proxy) for argument in flat((args, kwargs))):
                return tracer.create_proxy("call_function", self.function, args, kwargs)
            return self.function(*args, **kwargs)

        self.namespace[self.function.__name__] = leaf
        try:
            yield
        finally:
            self.namespace[self.function.__name__] = self.function


def _what_failed(
    error: BaseException, known: list[_LeafFunction], tracer: ModuleTracer
) -> _LeafFunction | str | None:
    """What the trace could not enter, innermost first: a plain function, or a submodule by its path."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for caller, callee in reversed([*pairwise(frames)]):
        path = _submodule_of(callee, tracer)
        if path and path not in tracer.kept:
            return path
        if not is_own_code(callee):
            continue
        function = caller.f_globals.get(callee.f_code.co_name)
        if not isinstance(function, FunctionType) or function.__code__ is not callee.f_code:
            continue
        if not any(leaf.function is function and leaf.namespace is caller.f_globals for leaf in known):
            return _LeafFunction(function, caller.f_globals)
    return None


def _submodule_of(frame: FrameType, tracer: ModuleTracer) -> str | None:
    """The path of the module whose forward runs in `frame`; None for any other code, empty for the root."""
    module = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
    if not isinstance(module, nn.Module):
        return None
    forward: Any = inspect.unwrap(inspect.getattr_static(type(module), "forward", None))
    is_forward = getattr(forward, "__code__", None) is frame.f_code
    return tracer._paths.get(id(module)) if is_forward else None


def _is_of_python(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] in sys.stdlib_module_names


def _explanation(model: nn.Module, error: BaseException, *, by_value: bool) -> str:
    frames = traceback.walk_tb(error.__traceback__)
    own = [(frame, line) for frame, line in frames if is_own_code(frame) and not _is_of_python(frame)]
    message = f"{type(model).__name__} cannot be traced: {error}"
    if own:
        frame, line = own[-1]
        source = linecache.getline(frame.f_code.co_filename, line).strip()
        message += f"\n  at {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}: {source}"
    reason = "\n  A graph cannot hold control flow that depends on the values of tensors."
    return message + reason if by_value else message
