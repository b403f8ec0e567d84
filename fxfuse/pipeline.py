"""model → capture → match → rewrite → verify → folded model and report."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import fx, nn
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY

from fxfuse.capture import Capture, capture
from fxfuse.comparison import REJECTIONS, clean_run, drawn, rejection, verify
from fxfuse.errors import UsageError
from fxfuse.match import match
from fxfuse.ops import Reader
from fxfuse.rank import observed_ranks
from fxfuse.records import Report
from fxfuse.replica import isolated
from fxfuse.rewrite import rewrite
from fxfuse.tree import is_training

_RECORD = "fxfuse_report"


def fuse(model: nn.Module, *, example_inputs: Sequence[Any] | None = None) -> fx.GraphModule:
    """A new module that computes the same function as `model`, with the norms folded away.

    The source is untouched. The weights of layers that were not folded share their memory with the
    source, so an in-place change of one shows in the other; ``copy.deepcopy`` of the result parts them.

    Args:
        model: a module in eval mode, or a ``torch.fx.GraphModule``. Arguments of its forward that default
            to None, a bool, a str, a dtype or a device are fixed to that default.
        example_inputs: positional inputs; a ``torch.Size`` stands for a random tensor of that shape. With
            them the number of axes of every value is known, which some norms after linear layers need,
            and the result is verified before it is returned.

    Raises:
        UsageError: the model is in training mode, is no module, has lazy parameters that are not
            initialised, or rejects the example inputs.
        CaptureError: the model cannot be traced.
        VerificationError: the result differs from `model` on the example inputs.
    """
    captured, report = _folded(model, example_inputs)
    with torch.inference_mode(False):
        fused = captured.module()
    if example_inputs is not None:
        report = replace(report, verification=verify(model, fused, example_inputs))
        assert report.verification is not None
        report.verification.raise_if_failed()
    # Pickling a GraphModule keeps its attributes; deepcopy keeps those that are named in this entry of meta.
    setattr(fused, _RECORD, report.to_dict())
    kept = fused.meta.get(_USER_PRESERVED_ATTRIBUTES_KEY, {})
    fused.meta[_USER_PRESERVED_ATTRIBUTES_KEY] = {**kept, _RECORD: report.to_dict()}
    return fused


def explain(model: nn.Module, *, example_inputs: Sequence[Any] | None = None) -> Report:
    """The report that ``fuse`` would give, less the verification; nothing is changed.

    Arguments and errors as there, but no VerificationError.
    """
    return _folded(model, example_inputs)[1]


def report(fused: nn.Module) -> Report:
    """What became of every norm of the model that `fused` was made from.

    Raises:
        UsageError: `fused` was not made by fxfuse.
    """
    kept = fused.meta.get(_USER_PRESERVED_ATTRIBUTES_KEY, {}) if isinstance(fused, fx.GraphModule) else {}
    record = getattr(fused, _RECORD, kept.get(_RECORD))
    if record is None:
        raise UsageError(
            f"this {type(fused).__name__} was not made by fxfuse.fuse; use fxfuse.explain(model) instead"
        )
    return Report.from_dict(record)


def _folded(model: nn.Module, example_inputs: Sequence[Any] | None) -> tuple[Capture, Report]:
    if example_inputs is not None and not isinstance(example_inputs, (list, tuple)):
        found = type(example_inputs).__name__
        raise UsageError(f"example_inputs is a {found}; pass a tuple of positional inputs, (x,)")
    if isinstance(model, nn.Module) and is_training(model):
        raise UsageError(
            f"{type(model).__name__} is in training mode, where norms use the batch; call model.eval()"
        )
    # Tensors that are made in inference mode could not become parameters of a module for all modes.
    with torch.inference_mode(False), torch.no_grad():
        captured = capture(model)
        reader = Reader(captured.root, captured.graph)
        observed = None if example_inputs is None else _observed(captured, example_inputs)
        plan = match(captured.graph, reader, observed)
        folds, refusals = rewrite(captured, plan, reader)
    notes = []
    if any(parameter.is_meta for parameter in captured.root.parameters()):
        notes.append("the model is on the meta device: the graph was folded, numbers were not checked")
    return captured, Report(
        captured.name, plan.norms, tuple(folds), (*plan.refusals, *refusals), notes=tuple(notes)
    )


def _observed(captured: Capture, inputs: Sequence[Any]) -> Mapping[fx.Node, int]:
    try:
        with clean_run(drawn(captured.root, inputs, seed=0), seed=0) as values:
            return observed_ranks(isolated(captured.root), captured.graph, values)
    except REJECTIONS as error:
        raise UsageError(f"the model rejects the example inputs {rejection(inputs, error)}") from error
