"""``torch.compile(model, backend="fxfuse")``: norms are folded in the graphs that Dynamo captures.

Dynamo hands over a graph whose parameters and buffers are inputs. They are lifted to attributes, the engine
folds the graph, and then what is left of them, and the folded weights, become inputs once more: nothing is
baked into compiled code. So the compiled model follows its weights. Before each call it is seen whether a
tensor that went into the folds has changed; if so these weights alone are folded again.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import InvalidBackend

from fxfuse.capture import Capture
from fxfuse.errors import UsageError
from fxfuse.ops import Reader
from fxfuse.planner import planned
from fxfuse.records import Report
from fxfuse.rewrite import rewrite
from fxfuse.shapes import GraphShapes
from fxfuse.solve import solve
from fxfuse.tree import attribute

_LOG = logging.getLogger("fxfuse")
_PARTS = re.compile(r"\['(\w+)'\]")
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

    A graph that is to give gradients of its parameters is handed on as it is. What became of the norms is
    logged, at level INFO of the logger "fxfuse".

    Args:
        graph_module: a graph of torch's functions, with the parameters among its inputs.
        example_inputs: one example for each input: of a parameter that parameter.
        mode: a mode of Inductor.
        options: ``then``: the backend that compiles the folded graph, "inductor" by default.

    Raises:
        UsageError: an option or a backend is not known, or a mode is given for another one than Inductor.
    """
    then = _then(mode, **(options or {}))
    names = _static_inputs(graph_module, example_inputs)
    trains = torch.is_grad_enabled() and any(example_inputs[place].requires_grad for place in names.values())
    if trains or not names:
        reason = "is to give gradients of its parameters" if trains else "has no parameters"
        _LOG.info("a graph is not folded: it %s", reason)
        return then(graph_module, example_inputs)
    return _Following(graph_module, example_inputs, names, then)


class _Following:
    """The folded graph, compiled, which follows the weights that it was folded from.

    Args:
        graph_module: the graph as Dynamo gives it.
        inputs: an example for each of its inputs.
        names: the places of parameters and buffers among the inputs, by the names that they get.
        then: compiles the folded graph.
    """

    def __init__(
        self,
        graph_module: fx.GraphModule,
        inputs: Sequence[Any],
        names: Mapping[str, int],
        then: Callable[..., Callable[..., Any]],
    ) -> None:
        self._eager = graph_module
        self._names = names
        self._rest = [place for place in range(len(inputs)) if place not in {*names.values()}]
        graph = _lifted(graph_module.graph, names)
        self._root = _root(names, inputs)
        self._reader = Reader(self._root, graph)
        folded = Capture(_root(names, inputs), graph, type(graph_module).__name__)
        with torch.no_grad():
            shapes = GraphShapes(graph, self._reader, _observed(graph))
            self._plan, solution = planned(graph, self._reader, shapes)
            norms, constants = rewrite(folded, self._plan, solution, self._reader)
        _LOG.info("%s", Report(folded.name, tuple(norms), self._plan.refusals, tuple(constants)))
        tensors = _lowered(folded)
        self._tensors: dict[tuple[fx.Node, int], Tensor] = {
            (node, part): tensor
            for node, pair in solution.tensors.items()
            for part, tensor in enumerate(pair)
            if tensor is not None
        }
        origins: dict[int, int | tuple[fx.Node, int]] = {id(inputs[place]): place for place in names.values()}
        origins |= {id(tensor): recipe for recipe, tensor in self._tensors.items()}
        self._given = [origins[id(tensor)] for tensor in tensors]
        self._is_folded = True
        self._state = self._seen(inputs)
        module = _as_dynamo_does(fx.GraphModule(nn.Module(), graph), graph_module, len(tensors), self._rest)
        for tensor in self._tensors.values():
            torch._dynamo.mark_static_address(tensor, guard=False)
        self._compiled = then(module, [*tensors, *(inputs[place] for place in self._rest)])

    def __call__(self, *inputs: Any) -> Any:
        if any(
            inputs[place] is not tensor or tensor._version != version or tensor.data_ptr() != address
            for place, tensor, version, address in self._state
        ):
            self._fold_again(inputs)
        if not self._is_folded:
            return self._eager(*inputs)
        given = (inputs[each] if isinstance(each, int) else self._tensors[each] for each in self._given)
        return self._compiled(*given, *(inputs[place] for place in self._rest))

    def _seen(self, inputs: Sequence[Any]) -> list[tuple[int, Tensor, int, int]]:
        """What shows that a tensor has changed: another object, another version, other memory."""
        return [
            (place, inputs[place], inputs[place]._version, inputs[place].data_ptr())
            for place in self._names.values()
        ]

    def _fold_again(self, inputs: Sequence[Any]) -> None:
        for name, place in self._names.items():
            _put(self._root, name, inputs[place])
        self._reader.forget_tensors()
        with torch.no_grad():
            solution = solve(self._plan, self._reader, {})
            self._is_folded = not solution.failed
            if self._is_folded:
                for (node, part), tensor in self._tensors.items():
                    new = solution.tensors[node][part]
                    assert new is not None
                    tensor.copy_(new)
            else:
                _LOG.warning("the new weights cannot be folded; the graph runs as it was")
        self._state = self._seen(inputs)


def _then(mode: str | None, then: str = "inductor", **unknown: Any) -> Callable[..., Callable[..., Any]]:
    if unknown:
        raise UsageError(f"backend fxfuse has no options {', '.join(sorted(unknown))}; it has: then")
    if mode is not None and then != "inductor":
        raise UsageError(f"mode={mode!r} is one of Inductor, not of {then!r}")
    try:
        found = lookup_backend(then)
    except InvalidBackend as error:
        raise UsageError(
            f"then={then!r} is no backend of torch.compile; torch.compiler.list_backends()"
        ) from error
    patches = {} if mode is None else {"config_patches": torch._inductor.list_mode_options(mode)}
    return partial(found, **patches)


def _static_inputs(graph_module: fx.GraphModule, inputs: Sequence[Any]) -> dict[str, int]:
    """The places of parameters and buffers, by their qualified names where Dynamo tells them."""
    found: dict[str, int] = {}
    for place, node in enumerate(graph_module.graph.find_nodes(op="placeholder")):
        if isinstance(inputs[place], Tensor) and getattr(inputs[place], _STATIC, None):
            name = ".".join(_PARTS.findall(node.meta["grapharg"].source.name)[1:])
            found[name if name and name not in found else node.name] = place
    return found


def _lifted(source: fx.Graph, names: Mapping[str, int]) -> fx.Graph:
    """A copy of the graph in which parameters and buffers are attributes of those names."""
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    graph.output(graph.graph_copy(source, copies))
    inputs = [copies[node] for node in source.find_nodes(op="placeholder")]
    for name, place in names.items():
        with graph.inserting_before(inputs[place]):
            node = graph.get_attr(name)
        inputs[place].replace_all_uses_with(node)
        graph.erase_node(inputs[place])
    return graph


def _root(names: Mapping[str, int], inputs: Sequence[Any]) -> nn.Module:
    root = nn.Module()
    for name, place in names.items():
        _put(root, name, inputs[place])
    return root


def _put(root: nn.Module, name: str, value: Tensor) -> None:
    *owners, leaf = name.split(".")
    module = root
    for owner in owners:
        inner = module._modules.setdefault(owner, nn.Module())
        assert inner is not None
        module = inner
    if isinstance(value, nn.Parameter):
        module._buffers.pop(leaf, None)
        module._parameters[leaf] = value
    else:
        module._parameters.pop(leaf, None)
        module._buffers[leaf] = value


def _observed(graph: fx.Graph) -> dict[fx.Node, Tensor]:
    """What Dynamo saw: it guards numbers of axes and dtypes, and compiles anew for others."""
    found = {node: node.meta.get("example_value") for node in graph.nodes}
    return {node: value for node, value in found.items() if isinstance(value, Tensor)}


def _lowered(folded: Capture) -> list[Tensor]:
    """Makes inputs of the attributes of a graph, in front of the others; returns the tensors."""
    attributes = folded.graph.find_nodes(op="get_attr")
    for node in reversed(attributes):
        with folded.graph.inserting_before():  # the beginning
            given = folded.graph.placeholder(f"{node.name}_given")
        given.meta = {"tensor_dict": {_STATIC: "unguarded"}}
        node.replace_all_uses_with(given)
        folded.graph.erase_node(node)
    return [attribute(folded.root, str(node.target)) for node in attributes]


def _as_dynamo_does(
    module: fx.GraphModule, original: fx.GraphModule, statics: int, rest: Sequence[int]
) -> fx.GraphModule:
    """Gives `module` what AOTAutograd reads of a graph that comes from Dynamo: the sources of its inputs."""
    module.meta = dict(original.meta)
    module.__dict__["_param_name_to_source"] = {}
    inputs: Any = original.graph.find_nodes(op="placeholder")
    sources = [*([None] * statics), *(inputs[place]._dynamo_source for place in rest)]
    for node, source in zip(module.graph.find_nodes(op="placeholder"), sources, strict=True):
        node._dynamo_source = source
    return module
