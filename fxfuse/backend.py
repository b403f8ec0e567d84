"""``torch.compile(model, backend="fxfuse")``: norms are folded in the graphs that Dynamo captures.

Dynamo hands over a graph whose parameters and buffers are inputs. They are lifted to attributes, and the
engine folds the graph. Nothing is baked into compiled code: either the folded weights become inputs once
more, and follow those that they come from (`fxfuse.following`), or they are computed in the graph itself, on
every call, so that gradients get through (`fxfuse.inline`).
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Hashable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import InvalidBackend
from torch._dynamo.symbolic_convert import tls
from torch._guards import TracingContext
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fxfuse.capture import Capture
from fxfuse.errors import UsageError
from fxfuse.following import Followers, Key
from fxfuse.inline import inline
from fxfuse.lifting import Lifted, lift, lower
from fxfuse.ops import Reader
from fxfuse.planner import planned_guarded
from fxfuse.records import Report
from fxfuse.refusals import Code
from fxfuse.reports import attach_compiled
from fxfuse.rewrite import rewrite
from fxfuse.solve import Solution
from fxfuse.tree import attribute, is_below, storage

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
            compiled graph, on every call, and differentiably. So do graphs of tensors that were made in
            inference mode, which nobody can see change.

    Raises:
        UsageError: an option or a backend is not known.
    """
    then, always = _choices(mode, **(options or {}))
    places = _static_inputs(graph_module, example_inputs)
    lifted = lift(graph_module, places, {name: example_inputs[place] for name, place in places.items()})
    capture = lifted.capture
    tensors = _tensors(capture)
    originals = {node: place for place, node in enumerate(capture.graph.find_nodes(op="placeholder"))}
    # A change of a tensor that was made in inference mode could not be noticed.
    always = always or any(tensor.is_inference() for tensor in tensors.values())
    with torch.no_grad():
        reader = Reader(capture.root, capture.graph)
        stays = Code.GRADIENTS if _trains(capture, reader, tensors) and not always else None
        plan, solution = planned_guarded(capture, reader, _observed(capture), stays=stays, fixed=not always)
        norms, constants = rewrite(capture, plan, solution, reader)
        if always and plan.moves:
            inline(lifted, plan, reader, solution, tensors)
    report = Report(capture.name, tuple(norms), plan.refusals, tuple(constants))
    _LOG.info("%s", report)
    announced = partial(attach_compiled, code=_code(), report=report, tensors=tensors, places=places)
    if not plan.moves:
        return announced(then(graph_module, example_inputs))
    given = _lowered(lifted, originals, solution)
    module = _as_dynamo_does(capture, graph_module, given)
    follow = _nothing if always else Followers(plan, solution, reader, tensors, places).follow
    examples = _values(given, example_inputs, follow(example_inputs) or {})
    known = [each for place, each in zip(given, examples, strict=True) if not isinstance(place, int)]
    with _static_sizes(known):
        compiled = then(module, examples)

    def run(*inputs: Any) -> Any:
        folded = follow(inputs)
        return graph_module(*inputs) if folded is None else compiled(*_values(given, inputs, folded))

    return announced(run)


def _choices(
    mode: str | None, /, then: str = "inductor", refold: str = "changed", **unknown: Any
) -> tuple[Callable[..., Callable[..., Any]], bool]:
    """The compiler of the folded graph, and whether to fold in it."""
    if unknown:
        raise UsageError(f"backend fxfuse has no options {', '.join(sorted(unknown))}; it has: then, refold")
    if refold not in _REFOLD:
        raise UsageError(f"refold={refold!r} is neither of {', '.join(map(repr, _REFOLD))}")
    try:
        found = lookup_backend(then)
    except InvalidBackend as error:
        raise UsageError(
            f"then={then!r} is no backend of torch.compile; torch.compiler.list_backends()"
        ) from error
    patches = {} if mode is None else {"config_patches": torch._inductor.list_mode_options(mode)}
    return partial(found, **patches), refold == "always"


def _static_inputs(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """The places of parameters and buffers by their names, which are qualified ones if Dynamo tells them."""
    found: dict[str, int] = {}
    # A weight may be passed to forward, too, and be written to as such.
    others = {storage(each) for each in inputs if not getattr(each, _STATIC, None)}
    for place, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        if getattr(inputs[place], _STATIC, None) and storage(inputs[place]) not in others:
            name = ".".join(_PARTS.findall(node.meta["grapharg"].source.name)[1:])
            clashes = any(is_below(name, other) or is_below(other, name) for other in found)
            found[node.name if clashes or not name else name] = place
    return found


def _tensors(capture: Capture) -> dict[str, Tensor]:
    """The parameters and buffers by their names; Dynamo, too, can be asked to make attributes of them."""
    names = dict.fromkeys(str(node.target) for node in capture.graph.find_nodes(op="get_attr"))
    values = {name: attribute(capture.root, name) for name in names}
    return {name: value for name, value in values.items() if isinstance(value, Tensor)}


def _observed(capture: Capture) -> dict[fx.Node, Any]:
    """What Dynamo saw: it guards numbers of axes, sizes and dtypes, and compiles anew for others."""
    return {node: node.meta["example_value"] for node in capture.graph.nodes if "example_value" in node.meta}


def _trains(capture: Capture, reader: Reader, tensors: Mapping[str, Tensor]) -> bool:
    """Whether a value of the graph may give gradients of parameters, or takes tangents of them with it."""
    if forward_ad._current_level >= 0 and any(
        forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]
        for tensor in tensors.values()
    ):
        return True
    observed = _observed(capture).items()
    values = [seen for node, seen in observed if node.op != "placeholder" and node not in reader.constants]
    asks = any(tensor.requires_grad for tensor in tensors.values())
    return asks and any(each.requires_grad for each in pytree.tree_leaves(values) if isinstance(each, Tensor))


def _code() -> Hashable:
    """What stands for the piece of Python code that is being compiled, each time it is."""
    transaction = getattr(tls, "current_tx", None)
    if transaction is None:
        return object()
    code = transaction.f_code
    return code.co_filename, code.co_name, code.co_firstlineno


def _lowered(lifted: Lifted, places: Mapping[fx.Node, int], solution: Solution) -> list[int | Key | Tensor]:
    """Makes inputs of the attributes.

    Returns:
        For each input its place among those of Dynamo, what folded tensor it is, or an attribute for good.
    """
    graph, root = lifted.capture.graph, lifted.capture.root

    def new_input(name: str, _: Tensor) -> fx.Node:
        with graph.inserting_before():  # the beginning
            return graph.placeholder(f"folded_{name.replace('.', '_')}")

    names = lower(lifted, new_input)
    keys = {
        id(each): (node, part) for node, pair in solution.tensors.items() for part, each in enumerate(pair)
    }
    given: list[int | Key | Tensor] = []
    for node in graph.find_nodes(op="placeholder"):
        value = attribute(root, names[node]) if node in names else None
        if value is not None and id(value) in keys:
            given.append(keys[id(value)])
        elif node in places:
            given.append(places[node])
        else:
            assert isinstance(value, Tensor)
            given.append(value)
        if not isinstance(given[-1], int):
            node.meta = {"tensor_dict": {_STATIC: "unguarded"}}
    return given


def _values(
    given: Sequence[int | Key | Tensor], inputs: Sequence[Any], folded: Mapping[Key, Tensor]
) -> list[Any]:
    return [
        inputs[each] if isinstance(each, int) else folded[each] if isinstance(each, tuple) else each
        for each in given
    ]


def _nothing(_: Sequence[Any]) -> Mapping[Key, Tensor]:
    return {}


@contextmanager
def _static_sizes(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Keeps AOTAutograd from taking the sizes of inputs that it does not know from Dynamo for dynamic."""
    context = TracingContext.try_get()
    mode = None if context is None else context.fake_mode
    # What the mode has made of a tensor it gives again, as long as it lives.
    fakes = [] if mode is None else [mode.from_tensor(tensor, static_shapes=True) for tensor in tensors]
    yield
    fakes.clear()


def _as_dynamo_does(
    capture: Capture, original: fx.GraphModule, given: Sequence[int | Key | Tensor]
) -> fx.GraphModule:
    """The folded graph with what AOTAutograd reads of one that Dynamo made: the sources of its inputs."""
    module = fx.GraphModule(capture.root, capture.graph, capture.name)
    module.meta = dict(original.meta)
    module.__dict__["_param_name_to_source"] = {}
    inputs: Any = original.graph.find_nodes(op="placeholder")
    for node, each in zip(capture.graph.find_nodes(op="placeholder"), given, strict=True):
        node._dynamo_source = inputs[each]._dynamo_source if isinstance(each, int) else None
    return module
