"""``torch.compile(model, backend="fxfuse")``: norms are folded in the graphs that Dynamo captures.

Dynamo hands over a graph whose parameters and buffers are inputs. They are lifted to attributes, and the
engine folds the graph. Nothing is baked into compiled code: either the folded weights become inputs once
more, and follow those that they come from (`fxfuse.following`), or they are computed in the graph itself, on
every call, so that gradients get through (`fxfuse.inline`).
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx
from torch._dynamo.backends.registry import lookup_backend
from torch._dynamo.exc import InvalidBackend

from fxfuse import dynamo
from fxfuse.dynamo import Given, Key
from fxfuse.errors import UsageError
from fxfuse.following import Followers
from fxfuse.inline import inline
from fxfuse.lifting import lift
from fxfuse.lowering.dynamo import lower_graph
from fxfuse.ops import Reader
from fxfuse.plan import Change, Move, Plan
from fxfuse.planner import planned_guarded
from fxfuse.records import Report
from fxfuse.refusals import Code
from fxfuse.reports import attach_compiled
from fxfuse.rewrite import rewrite

_LOG = logging.getLogger("fxfuse")
_REFOLD = ("changed", "always")


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
        options: ``then``: the backend that compiles the folded graph, "inductor" by default; "lower": the
            engine "torch" of ``fxfuse.lower``, which lowers again what has changed. ``refold``:
            "changed", the default, folds again before a call what has changed since the last one, and leaves
            graphs as they are that are to give gradients of their parameters; "always" folds inside of the
            compiled graph, on every call, and differentiably. So do graphs of tensors that nobody can see
            change: those made in inference mode or shared with other processes.

    Raises:
        UsageError: an option or a backend is not known.
    """
    then, always = _choices(mode, **(options or {}))
    places = dynamo.static_inputs(graph_module, example_inputs)
    lifted = lift(graph_module, places, {name: example_inputs[place] for name, place in places.items()})
    capture = lifted.capture
    tensors = dynamo.tensors_of(capture)
    originals = {node: place for place, node in enumerate(capture.graph.find_nodes(op="placeholder"))}
    always = always or any(map(dynamo.changes_unseen, tensors.values()))
    with torch.no_grad():
        reader = Reader(capture.root, capture.graph)
        trains = dynamo.gives_gradients(capture, reader, tensors)
        plan, solution = planned_guarded(
            capture,
            reader,
            dynamo.observed(capture),
            stays=Code.GRADIENTS if trains and not always else None,
            forbid=_depends_on_numbers if always else lambda *_: None,
        )
        gone = rewrite(capture, plan, solution, reader)
        if always and plan.changes:
            inline(lifted, plan, reader, solution, tensors)
    report = Report(capture.name, gone.norms, plan.refusals, gone.constants, gone.merged, plan.apart)
    _LOG.info("%s", report)
    code = dynamo.code_compiled()
    attached = partial(attach_compiled, code=code, report=report, tensors=tensors, places=places)
    if not plan.changes:
        return attached(then(graph_module, example_inputs))
    given = dynamo.lowered(lifted, originals, solution)
    module = dynamo.as_dynamo_does(capture, graph_module, given)
    follow = _nothing if always else Followers(plan, solution, reader, tensors, places).follow
    examples = _values(given, example_inputs, follow(example_inputs) or {})
    folded = [each for each, kind in zip(examples, given, strict=True) if not isinstance(kind, int)]
    with dynamo.static_sizes(folded):
        compiled = then(module, examples)

    def run(*inputs: Any) -> Any:
        weights = follow(inputs)
        return graph_module(*inputs) if weights is None else compiled(*_values(given, inputs, weights))

    return attached(run)


def _choices(
    mode: str | None, /, then: str = "inductor", refold: str = "changed", **unknown: Any
) -> tuple[Callable[..., Callable[..., Any]], bool]:
    """The compiler of the folded graph, and whether to fold in it."""
    if unknown:
        raise UsageError(
            f"backend fxfuse has no options {', '.join(sorted(unknown))}; it has then='inductor' "
            "(or what else compiles the folded graph, or 'lower', for fxfuse's engine \"torch\") and "
            "refold='changed' (or 'always')"
        )
    if refold not in _REFOLD:
        raise UsageError(f"refold={refold!r} is neither of {', '.join(map(repr, _REFOLD))}")
    if then == "lower":
        if mode is not None:
            raise UsageError(f"mode={mode!r} is one of Inductor's, which then='lower' leaves out")
        if refold == "always":
            raise UsageError(
                "refold='always' keeps weights variable, and then='lower' makes constants of them"
            )
        return lower_graph, False
    try:
        found = lookup_backend(str(then))
    except InvalidBackend as error:
        raise UsageError(
            f"then={then!r} is neither 'lower' nor a backend of torch.compile, which has to compile the "
            "folded graph; torch.compiler.list_backends(None) names them"
        ) from error
    if found is backend:
        raise UsageError("then='fxfuse' would be this backend again; name the one that compiles the graph")
    patches = {} if mode is None else {"config_patches": torch._inductor.list_mode_options(mode)}
    return partial(found, **patches), refold == "always"


def _values(given: Sequence[Given], inputs: Sequence[Any], folded: Mapping[Key, Tensor]) -> list[Any]:
    return [
        inputs[each] if isinstance(each, int) else folded[each] if isinstance(each, tuple) else each
        for each in given
    ]


def _depends_on_numbers(_: Plan, change: Change) -> Code | None:
    sites = change.sites if isinstance(change, Move) else ()
    return next((code for site in sites for code in site.channels.needs), None)


def _nothing(_: Sequence[Any]) -> Mapping[Key, Tensor]:
    return {}
