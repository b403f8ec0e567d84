"""``torch.compile(model, backend="fxfuse")``: norms are folded in the graphs that Dynamo captures.

Dynamo hands over a graph whose parameters and buffers are inputs. They are lifted to attributes, and the
engine folds the graph. Nothing is baked into compiled code: either the folded weights become inputs once
more, and follow those that they come from (`fxfuse.following`), or they are computed in the graph itself, on
every call, so that gradients get through (`fxfuse.inside`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Container, Hashable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import InvalidBackend
from torch._guards import CompileContext

from fxfuse.capture import Capture, reshaped_in_place
from fxfuse.errors import UsageError
from fxfuse.following import Followers
from fxfuse.inside import inline, traced
from fxfuse.lifting import Lifted, lift, lower
from fxfuse.ops import Reader
from fxfuse.plan import Plan
from fxfuse.planner import nothing_planned, planned
from fxfuse.records import Report
from fxfuse.refusals import Code
from fxfuse.reports import attach_compiled
from fxfuse.rewrite import rewrite
from fxfuse.shapes import GraphShapes
from fxfuse.solve import Solution
from fxfuse.tree import attribute

_LOG = logging.getLogger("fxfuse")
_PARTS = re.compile(r"\['(\w+)'\]")
_REFOLD = ("changed", "always")
# How Dynamo marks inputs that are the same tensor in every call, unless the user puts another in its place.
_STATIC = "_dynamo_static_input_type"


def backend(
    graph_module: fx.GraphModule,
    example_inputs: Sequence[Any],
    *,
    mode: str | None = None,
    options: Mapping[str, Any] | None = None,
) -> Callable[..., Any]:
    """What Dynamo calls with each graph that it captures; found as "fxfuse" by its entry point.

    What became of the norms is told by ``fxfuse.report(compiled_model)``, and by the logger "fxfuse" at level
    INFO.

    Args:
        graph_module: a graph of torch's functions, with the parameters among its inputs.
        example_inputs: one example for each input: of a parameter that parameter.
        mode: a mode of Inductor.
        options: ``then``: the backend that compiles the folded graph, "inductor" by default. ``refold``:
            "changed", the default, folds again before a call what has changed since the last one, and leaves
            graphs as they are that are to give gradients of their parameters; "always" folds inside of the
            compiled graph, on every call, and differentiably.

    Raises:
        UsageError: an option or a backend is not known, or a mode is given for another one than Inductor.
    """
    then, always = _choices(mode, **(options or {}))
    names = _static_inputs(graph_module, example_inputs)
    tensors: dict[str, Tensor] = {name: example_inputs[place] for place, name in names.items()}
    lifted = lift(graph_module, names, tensors)
    tensors |= _attributes(lifted.capture, without=tensors)
    originals = {node: place for place, node in enumerate(lifted.capture.graph.find_nodes(op="placeholder"))}
    trains = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors.values())
    # A change of a tensor that was made in inference mode could not be noticed.
    always = always or any(tensor.is_inference() for tensor in tensors.values())
    with torch.no_grad():
        reader = Reader(lifted.capture.root, lifted.capture.graph)
        plan, solution = _planned(lifted.capture.graph, reader, always=always, trains=trains)
        if always:
            recipe = traced(plan, reader, tensors)
            norms, constants = rewrite(lifted.capture, plan, solution, reader)
            inline(lifted, recipe, solution, tensors)
        else:
            places = {name: place for place, name in names.items()}
            followers = Followers(plan, solution, reader, tensors, places)
            norms, constants = rewrite(lifted.capture, plan, solution, reader)
    report = Report(lifted.capture.name, tuple(norms), plan.refusals, tuple(constants))
    attach_compiled(tensors.values(), _code(graph_module), report)
    _LOG.info("%s", report)
    if not plan.moves:
        return then(graph_module, example_inputs)
    given = _lowered(lifted, tensors, originals)
    module = _as_dynamo_does(lifted, graph_module, originals)
    compiled = then(module, [_value(each, example_inputs) for each in given])

    def run(*inputs: Any) -> Any:
        if not always and not followers.follow(inputs):
            return graph_module(*inputs)
        return compiled(*(_value(each, inputs) for each in given))

    return run


def _planned(graph: fx.Graph, reader: Reader, *, always: bool, trains: bool) -> tuple[Plan, Solution]:
    shapes = GraphShapes(graph, reader, _observed(graph), guarded=True)
    if reshaped_in_place(graph) is not None:
        return nothing_planned(graph, reader, shapes, Code.RESHAPED), Solution()
    if trains and not always:
        return nothing_planned(graph, reader, shapes, Code.GRADIENTS), Solution()
    return planned(graph, reader, shapes, fixed=not always)


def _choices(
    mode: str | None, then: str = "inductor", refold: str = "changed", **unknown: Any
) -> tuple[Callable[..., Callable[..., Any]], bool]:
    """The compiler of the folded graph, and whether to fold in it."""
    if unknown:
        raise UsageError(f"backend fxfuse has no options {', '.join(sorted(unknown))}; it has: then, refold")
    if refold not in _REFOLD:
        raise UsageError(f"refold={refold!r} is neither of {', '.join(map(repr, _REFOLD))}")
    if mode is not None and then != "inductor":
        raise UsageError(f"mode={mode!r} is one of Inductor, not of {then!r}")
    try:
        found = lookup_backend(then)
    except InvalidBackend as error:
        raise UsageError(
            f"then={then!r} is no backend of torch.compile; torch.compiler.list_backends()"
        ) from error
    patches = {} if mode is None else {"config_patches": torch._inductor.list_mode_options(mode)}
    return partial(found, **patches), refold == "always"


def _static_inputs(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> dict[int, str]:
    """The names of parameters and buffers, qualified where Dynamo tells them, by their places."""
    found: dict[int, str] = {}
    for place, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        if isinstance(inputs[place], Tensor) and getattr(inputs[place], _STATIC, None):
            name = ".".join(_PARTS.findall(node.meta["grapharg"].source.name)[1:])
            found[place] = name if name and name not in found.values() else node.name
    return found


def _attributes(capture: Capture, without: Container[str]) -> dict[str, Tensor]:
    """The other parameters and buffers: Dynamo can be asked to make attributes of them."""
    names = {str(node.target) for node in capture.graph.find_nodes(op="get_attr")}
    values = {name: attribute(capture.root, name) for name in sorted(names) if name not in without}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _observed(graph: fx.Graph) -> dict[fx.Node, Any]:
    """What Dynamo saw: it guards numbers of axes, sizes and dtypes, and compiles anew for others."""
    return {node: node.meta["example_value"] for node in graph.nodes if "example_value" in node.meta}


def _code(graph_module: fx.GraphModule) -> Hashable:
    """What stands for the piece of Python code that a graph comes from, in all its compilations."""
    compilation = CompileContext.current_compile_id()
    return id(graph_module) if compilation is None else compilation.frame_id


def _lowered(
    lifted: Lifted, tensors: Mapping[str, Tensor], places: Mapping[fx.Node, int]
) -> list[int | Tensor]:
    """Makes inputs of the attributes; returns the value of each input, or its place among those of Dynamo."""
    graph, root = lifted.capture.graph, lifted.capture.root

    def new_input(name: str, _: Tensor) -> fx.Node:
        with graph.inserting_before():  # the beginning
            return graph.placeholder(f"folded_{name.replace('.', '_')}")

    names = lower(lifted, new_input)
    given: list[int | Tensor] = []
    for node in graph.find_nodes(op="placeholder"):
        value = attribute(root, names[node]) if node in names else None
        if value is None or (node in places and value is tensors.get(names[node])):
            given.append(places[node])
        else:
            torch._dynamo.mark_static_address(value, guard=False)
            node.meta = {"tensor_dict": {_STATIC: "unguarded"}}
            given.append(value)
    return given


def _value(given: int | Tensor, inputs: Sequence[Any]) -> Any:
    return inputs[given] if isinstance(given, int) else given


def _as_dynamo_does(
    lifted: Lifted, original: fx.GraphModule, places: Mapping[fx.Node, int]
) -> fx.GraphModule:
    """The folded graph with what AOTAutograd reads of one that Dynamo made: the sources of its inputs."""
    module = fx.GraphModule(lifted.capture.root, lifted.capture.graph, lifted.capture.name)
    module.meta = dict(original.meta)
    module.__dict__["_param_name_to_source"] = {}
    inputs: Any = original.graph.find_nodes(op="placeholder")
    for node in module.graph.find_nodes(op="placeholder"):
        is_folded = node not in places or "example_value" not in node.meta
        node._dynamo_source = None if is_folded else inputs[places[node]]._dynamo_source
    return module
