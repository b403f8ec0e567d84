"""Any model → an FX graph over a replica of its modules; the source is only read."""

from __future__ import annotations

import copy
from collections.abc import Container, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from fxfuse.arguments import check_module
from fxfuse.calls import called_name
from fxfuse.errors import CaptureError, UsageError
from fxfuse.places import place_of
from fxfuse.reparametrized import evaluate_weights
from fxfuse.replica import replicate
from fxfuse.tracer import ModuleTracer, trace
from fxfuse.tree import HOOKS, attribute, named_tensors

_HOOK_OPTIONS = (
    "_forward_hooks_with_kwargs",
    "_forward_pre_hooks_with_kwargs",
    "_forward_hooks_always_called",
)


# After these a value has another shape than the node that made it.
_RESHAPED_IN_PLACE = {
    *("transpose_", "swapaxes_", "swapdims_", "t_", "squeeze_", "unsqueeze_"),
    *("resize_", "resize_as_", "as_strided_", "set_"),
}
_RESERVED = {"meta"} | {name for name in dir(fx.GraphModule) if not hasattr(nn.Module, name)}


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
        named = (*HOOKS, *_HOOK_OPTIONS)
        for hooks in named:
            getattr(built, hooks).update(getattr(self.root, hooks))
        # deepcopy of a GraphModule keeps of its hooks only those that are named here.
        carried = {hooks: getattr(built, hooks) for hooks in named if getattr(built, hooks)}
        if carried and not isinstance(self.root, fx.GraphModule):
            built.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = carried
        built._is_full_backward_hook = self.root._is_full_backward_hook
        for path, module in built.named_modules():
            if isinstance(module, torch.jit.ScriptModule):
                continue  # whose buffers are TorchScript's
            module._non_persistent_buffers_set |= getattr(
                attribute(self.root, path), "_non_persistent_buffers_set", set()
            ) & {*module._buffers}
        if isinstance(self.root, fx.GraphModule):
            built.meta = {**getattr(self.root, "meta", {}), **built.meta}
            built.__dict__.update({k: v for k, v in self.root.__dict__.items() if k not in built.__dict__})
        return built


def capture(model: nn.Module, fixed: Mapping[str, Any] | None = None, given: Container[str] = ()) -> Capture:
    """Traces `model`, or takes its graph if it is a ``GraphModule``.

    Args:
        model: the module.
        fixed: values for arguments of ``forward``, since a trace can follow only one of the branches that
            these choose; the graph asserts that no others are given. Without it every option has its default.
        given: the arguments that are known not to be None.

    Raises:
        UsageError: `model` is no module, or still has uninitialised (lazy) parameters.
        CaptureError: the model cannot be traced; the message names the line and the reason.
    """
    check_usable(model)
    _check_traceable(model)
    root, graph = _copied(model) if isinstance(model, fx.GraphModule) else trace(model, fixed, given)
    reshaped = reshaped_in_place(graph)
    if reshaped is not None:
        raise CaptureError(
            f"forward changes the shape of a tensor in place, by {_told(reshaped)}, after which no shape "
            "is certain; write transpose(...) for transpose_(...), and so on"
        )
    called = [str(node.target) for node in graph.nodes if node.op in ("call_module", "get_attr")]
    taken = sorted({name.partition(".")[0] for name in called} & _RESERVED)
    if taken:
        raise CaptureError(
            f"a GraphModule has an attribute {taken[0]!r} of its own, as has {type(model).__name__}; "
            "rename that module, parameter or buffer"
        )
    # torch puts these into the code of the graph, between quotation marks and as they are.
    loose = [name for name in called if not name.isprintable() or {*name} & {'"', "\\"}]
    if loose:
        raise CaptureError(
            f"the name {loose[0]!r} would not stay a name in generated code; rename that attribute"
        )
    return Capture(root, graph, type(model).__name__)


def reshaped_in_place(graph: fx.Graph) -> fx.Node | None:
    """The first node after which an earlier value has another shape than when it was made."""
    return next((node for node in graph.nodes if called_name(node) in _RESHAPED_IN_PLACE), None)


def check_usable(model: nn.Module) -> None:
    """Raises a UsageError for what cannot be folded in any way."""
    check_module(model, "model")
    if isinstance(model, torch.jit.ScriptModule):
        raise UsageError(
            f"the model is TorchScript ({type(model).__name__}), which has no Python to trace; "
            "pass the module it was made from"
        )
    compiled = getattr(model, "_orig_mod", None)
    if isinstance(compiled, nn.Module):
        raise UsageError(
            f"the model is compiled already (a {type(compiled).__name__}), too late for a fold; "
            "fold it first: torch.compile(fxfuse.fuse(model))"
        )
    registered = [hooks for hooks in HOOKS if getattr(nn.modules.module, f"_global{hooks}", None)]
    if registered:
        kinds = ", ".join(hooks.strip("_").replace("_", " ") for hooks in registered)
        raise UsageError(
            f"global module hooks are registered ({kinds}) and would see folded values; remove them first"
        )
    lazy = [name for name, tensor in named_tensors(model) if nn.parameter.is_lazy(tensor)]
    if lazy:
        raise UsageError(
            f"{len(lazy)} lazy parameters are not initialised yet ({', '.join(lazy[:3])}"
            f"{', ...' if len(lazy) > 3 else ''}) and cannot be folded; run the model once on an input first"
        )


def _check_traceable(model: nn.Module) -> None:
    if not isinstance(model, fx.GraphModule) and type(model).__call__ is not nn.Module.__call__:
        raise CaptureError(
            f"{type(model).__name__} has a __call__ of its own, which a trace of forward would miss; "
            "do in forward what it does"
        )
    if "forward" in model.__dict__:
        raise CaptureError(
            f"the forward of this {type(model).__name__} was replaced on the instance, so its class "
            "is not what it computes; remove the replacement (del model.forward) or wrap the model"
        )


def _told(node: fx.Node) -> str:
    """A node by its name and the line that makes it."""
    return ", ".join(filter(None, (node.name, place_of(node))))


def _copied(model: fx.GraphModule) -> tuple[nn.Module, fx.Graph]:
    """A replica, and the model's graph; of what it calls by several names it uses the first."""
    root = replicate(model)
    evaluate_weights(root)
    graph = fx.Graph(tracer_cls=ModuleTracer)
    copied = graph.graph_copy(model.graph, {}, return_output_node=True)
    assert isinstance(copied, tuple)
    graph.output(copied[0], copied[1].type).meta = dict(copied[1].meta)
    graph.set_codegen(copy.copy(model.graph._codegen))  # not deepcopy, which torch's pytree specs warn about
    names: dict[int, str] = {}
    for node in graph.nodes:
        if node.op in ("call_module", "get_attr"):
            node.target = names.setdefault(id(attribute(root, str(node.target))), str(node.target))
    return root, graph
