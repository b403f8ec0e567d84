"""Any model → an FX graph over a replica of its modules; the source is only read.

``torch.fx`` traces a model by running its Python on proxies, and stops where Python asks a proxy for a
value. Three additions take it further without specialising the graph:

* A plain function that asks for a value (``math``-heavy padding code, mostly) becomes a leaf: it is
  called by the graph as it was called by the model. The trace is then begun again.
* Buffers are proxies, as parameters are: what a model computes from them stays in the graph.
* ``isinstance(x, torch.Tensor)`` is answered for what the proxy stands for.

A module that carries hooks is a leaf too, so that its hooks go on running.
"""

from __future__ import annotations

import contextlib
import copy
import inspect
import linecache
import operator
import sys
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from itertools import chain, pairwise
from types import FrameType, FunctionType
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.fx.proxy import ParameterProxy, Proxy, TraceError

from fxfuse.errors import CaptureError, UsageError
from fxfuse.replica import replicate

# What a model's forward may raise when it meets a proxy, beyond fx's own TraceError (a ValueError).
_TRACE_FAILURES = (
    ArithmeticError,
    AssertionError,
    AttributeError,
    LookupError,
    NameError,
    RuntimeError,
    TypeError,
    ValueError,
)

HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
_HOOK_OPTIONS = (
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


@dataclass(frozen=True)
class Capture:
    """A graph and the modules that it calls, both free to be edited."""

    root: nn.Module
    graph: fx.Graph
    name: str

    def module(self) -> fx.GraphModule:
        """The graph as a module.

        It keeps the root's hooks; of a GraphModule all other attributes too, which its hooks may use.
        Modules that the graph does not call are left out.
        """
        built = fx.GraphModule(self.root, self.graph, self.name)
        for hooks in (*HOOKS, *_HOOK_OPTIONS):
            getattr(built, hooks).update(getattr(self.root, hooks))
        built._is_full_backward_hook = self.root._is_full_backward_hook
        if isinstance(self.root, fx.GraphModule):
            built.meta.update(self.root.meta)
            built.__dict__.update({k: v for k, v in self.root.__dict__.items() if k not in built.__dict__})
        return built


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its forward."""
    return any(getattr(module, hooks, None) for hooks in HOOKS)


def capture(model: nn.Module) -> Capture:
    """Traces `model`, or takes its graph if it is a ``GraphModule``.

    Arguments of ``forward`` that default to None, a bool or a str keep that default, because a trace
    can follow only one of the branches that they choose; the graph asserts that they are not given.

    Raises:
        UsageError: `model` is no module, or still has uninitialised (lazy) parameters.
        CaptureError: the model cannot be traced; the message names the line and the reason.
    """
    _check_usable(model)
    root = replicate(model)
    if isinstance(model, fx.GraphModule):
        return Capture(root, _copied(model, root), type(model).__name__)
    return Capture(root, _trace(model, root), type(model).__name__)


def _check_usable(model: object) -> None:
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"expected a torch.nn.Module, got {type(model).__name__}; "
            "pass the model itself, not its class, its state_dict or its name"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            "the model is TorchScript, which has no Python to trace; pass the module it was made from"
        )
    if isinstance(getattr(model, "_orig_mod", None), nn.Module):
        raise UsageError("the model is compiled already; fold it first: torch.compile(fxfuse.fuse(model))")
    lazy = [name for name, tensor in _tensors(model) if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise UsageError(
            f"{len(lazy)} lazy parameters are not initialised yet ({', '.join(lazy[:3])}"
            f"{', ...' if len(lazy) > 3 else ''}); run the model once on an input first"
        )
    if "forward" in model.__dict__:
        raise CaptureError(
            f"the forward of this {type(model).__name__} was replaced on the instance, so its class "
            "is not what it computes; remove the replacement (del model.forward) or wrap the model"
        )


def _tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    return chain(model.named_parameters(remove_duplicate=False), model.named_buffers(remove_duplicate=False))


def _copied(model: fx.GraphModule, root: nn.Module) -> fx.Graph:
    """The model's graph; of a module or tensor that has several names it uses the first, as a trace does."""
    graph = fx.Graph(tracer_cls=ModuleTracer)
    copied = graph.graph_copy(model.graph, {}, return_output_node=True)
    assert isinstance(copied, tuple)
    graph.output(copied[0]).meta = dict(copied[1].meta)
    graph.set_codegen(copy.copy(model.graph._codegen))  # not deepcopy, which torch's pytree specs warn about
    names = {id(value): name for name, value in reversed([*_tensors(root), *root.named_modules()])}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = names.get(id(attribute(root, node.target)), node.target)
    return graph


def attribute(root: nn.Module, name: str) -> Any:
    """The module, parameter or buffer of that qualified name; `root` itself for the empty name."""
    value: Any = root
    for atom in name.split(".") if name else ():
        value = getattr(value, atom)
    return value


# Where fx and what it is built on ask for the class of a proxy, they mean the proxy.
_INTERNAL = ("torch.fx", "torch.overrides", "torch.utils._pytree", "fxfuse.")


class _TypedProxy(Proxy):
    """A proxy that is taken, by the code of the model, for what it stands for.

    ``isinstance(x, torch.Tensor)`` and ``hasattr(x, "tensors")`` choose branches. fx answers for the proxy,
    and the trace silently follows a branch that the model would not take. Here both are answered for the
    value; where its type is not known, asking is a TraceError.
    """

    stands_for: type | None = None

    @property
    def __class__(self) -> type:
        asker: FrameType | None = sys._getframe(1)
        while asker is not None and asker.f_globals.get("__name__") == "torch.nn.parameter":
            asker = asker.f_back  # isinstance(x, nn.Parameter) asks by way of a metaclass
        if asker is None or asker.f_globals.get("__name__", "").startswith(_INTERNAL):
            return type(self)
        if self.stands_for is not None:
            return self.stands_for
        if not {"isinstance", "__class__"} & {*asker.f_code.co_names}:
            return type(self)  # asked by C code that sorts the arguments of an operator
        raise TraceError(f"the type of {self.node.name} is asked for and is known only at run time")

    @__class__.setter
    def __class__(self, _: type) -> None:
        raise TypeError("a proxy keeps its class")

    def __getattr__(self, k: str) -> Any:
        if self.stands_for is not None and not hasattr(self.stands_for, k):
            raise AttributeError(f"a tensor has no attribute {k!r}")
        return super().__getattr__(k)


class _ParameterProxy(_TypedProxy, ParameterProxy):
    """A parameter; its shape is known."""

    stands_for = nn.Parameter


class _TensorProxy(_TypedProxy):
    """A tensor."""

    stands_for = Tensor


class ModuleTracer(fx.Tracer):
    """Traces through every module that is not ``torch.nn``'s own or that has no hooks."""

    proxy_buffer_attributes = True

    def __init__(self) -> None:
        super().__init__()
        self.source: nn.Module | None = None
        self._autocast = _autocast_state()
        self._names: dict[int, str] = {}
        self._paths: dict[int, str] = {}

    def trace(self, root: Any, concrete_args: dict[str, Any] | None = None) -> fx.Graph:
        """Traces `root`; modules and tensors of ``source``, which it is a replica of, count as its own."""
        for model in (root, self.source):
            if isinstance(model, nn.Module):
                self._names |= {id(tensor): name for name, tensor in reversed([*_tensors(model)])}
                self._paths |= {id(module): name for name, module in model.named_modules()}
        return super().trace(root, concrete_args)

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        """Leaves are torch.nn's modules, subclasses that inherit their forward from one, hooked modules."""
        if super().is_leaf_module(m, module_qualified_name) or has_hooks(m):
            return True
        forward = inspect.unwrap(type(m).forward)
        return forward.__module__.startswith("torch.nn.modules") and not isinstance(m, nn.Sequential)

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
            parameter_proxy_cache[name] = (
                _ParameterProxy(self, node, name, attr_val)
                if isinstance(attr_val, nn.Parameter)
                else _TensorProxy(node, self)
            )
        return parameter_proxy_cache[name]

    def create_node(self, *args: Any, **kwargs: Any) -> fx.Node:
        """As fx does; a graph cannot hold the autocast contexts that a forward enters."""
        if _autocast_state() != self._autocast:
            raise TraceError("autocast is switched inside forward, which a graph does not record")
        return super().create_node(*args, **kwargs)

    def create_arg(self, a: Any) -> Any:
        """As fx does, with the names of parameters and buffers looked up instead of searched for."""
        if isinstance(a, Proxy):
            return a.node
        if isinstance(a, Tensor) and id(a) in self._names:
            return self.create_node("get_attr", self._names[id(a)], (), {})
        return super().create_arg(a)

    def proxy(self, node: fx.Node) -> Proxy:
        """A proxy that knows whether it stands for a tensor."""
        return (_TensorProxy if self._is_tensor(node) else _TypedProxy)(node, self)

    def _is_tensor(self, node: fx.Node) -> bool:
        """Whether the value of `node` is certain to be a single tensor."""
        if node.op == "call_module":
            module = attribute(self.root, str(node.target))
            return not has_hooks(module) and not isinstance(module, (nn.RNNBase, nn.MultiheadAttention))
        if node.op == "call_function" and getattr(node.target, "__module__", "") == "_operator":
            return node.target is not operator.getitem and any(map(self._is_tensor, node.all_input_nodes))
        if node.op in ("call_function", "call_method"):
            return _returns_tensor(
                node.target if node.op == "call_method" else getattr(node.target, "__name__", "")
            )
        return True


def _autocast_state() -> list[Any]:
    return [
        (torch.is_autocast_enabled(device), torch.get_autocast_dtype(device)) for device in ("cpu", "cuda")
    ]


@cache
def _returns_tensor(name: str) -> bool:
    """Whether the operator of that name gives one tensor, whatever its arguments."""
    packet = getattr(torch.ops.aten, name, None) if name.isidentifier() else None
    overloads = [] if packet is None else [getattr(packet, overload) for overload in packet.overloads()]
    return bool(overloads) and all(
        [str(r.type) for r in each._schema.returns] == ["Tensor"] for each in overloads
    )


def _trace(model: nn.Module, root: nn.Module) -> fx.Graph:
    leaves: list[_LeafFunction] = []
    while True:
        tracer = ModuleTracer()
        tracer.source = model
        try:
            with contextlib.ExitStack() as stack, torch.random.fork_rng(devices=[]):
                for leaf in leaves:
                    stack.enter_context(leaf.patched(tracer))
                generator = torch.get_rng_state()
                graph = tracer.trace(root, _fixed_arguments(model))
                if not torch.equal(generator, torch.get_rng_state()):
                    raise CaptureError("the model draws random numbers that a trace would fix for ever")
                return graph
        except _TRACE_FAILURES as error:
            failed = _function_that_failed(error, leaves)
            if failed is None:
                raise CaptureError(_explanation(model, error)) from error
            leaves.append(failed)
            root = replicate(model)


def _fixed_arguments(model: nn.Module) -> dict[str, Any]:
    parameters = inspect.signature(type(model).forward).parameters.values()
    return {p.name: p.default for p in parameters if p.default is None or isinstance(p.default, (bool, str))}


@dataclass(frozen=True)
class _LeafFunction:
    """A module-level function and a namespace through which the model calls it."""

    function: FunctionType
    namespace: dict[str, Any]

    def is_same(self, other: _LeafFunction) -> bool:
        return self.function is other.function and self.namespace is other.namespace

    @contextlib.contextmanager
    def patched(self, tracer: fx.Tracer) -> Iterator[None]:
        """While the context lasts, a call with proxies becomes a node of the graph."""

        def leaf(*args: Any, **kwargs: Any) -> Any:
            if any(isinstance(argument, Proxy) for argument in _flat((args, kwargs))):
                return tracer.create_proxy("call_function", self.function, args, kwargs)
            return self.function(*args, **kwargs)

        self.namespace[self.function.__name__] = leaf
        try:
            yield
        finally:
            self.namespace[self.function.__name__] = self.function


def _flat(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        value = value.values()
    elif not isinstance(value, (list, tuple)):
        yield value
        return
    for item in value:
        yield from _flat(item)


def _function_that_failed(error: BaseException, known: list[_LeafFunction]) -> _LeafFunction | None:
    """The innermost plain function that the model called by name and that the trace could not enter."""
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    for caller, callee in reversed([*pairwise(frames)]):
        function = caller.f_globals.get(callee.f_code.co_name)
        if not isinstance(function, FunctionType) or function.__code__ is not callee.f_code:
            continue
        leaf = _LeafFunction(function, caller.f_globals)
        if _is_own_code(callee) and not any(leaf.is_same(other) for other in known):
            return leaf
    return None


def _is_own_code(frame: FrameType) -> bool:
    return frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "fxfuse")


def _explanation(model: nn.Module, error: BaseException) -> str:
    own = [(frame, line) for frame, line in traceback.walk_tb(error.__traceback__) if _is_own_code(frame)]
    message = f"{type(model).__name__} cannot be traced: {error}"
    if own:
        frame, line = own[-1]
        source = linecache.getline(frame.f_code.co_filename, line).strip()
        message += f"\n  at {frame.f_code.co_filename}:{line} in {frame.f_code.co_name}: {source}"
    return message + "\n  A graph cannot hold control flow that depends on the values of tensors."
