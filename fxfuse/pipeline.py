"""model → capture → match → rewrite → verify → folded model and report."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import Any, overload

import torch
from torch import Tensor, fx, nn
from torch.export import ExportedProgram

from fxfuse.algebra import UnmeasurableError
from fxfuse.arguments import check_eval, check_inputs, rejection
from fxfuse.capture import Capture, capture, check_usable
from fxfuse.comparison import compared
from fxfuse.errors import CaptureError, FxfuseError, UsageError, first_line
from fxfuse.exposure import hooks_look
from fxfuse.inputs import in_float64, sample
from fxfuse.keep import fold_called, fold_inside
from fxfuse.leave import Leave
from fxfuse.ops import Reader
from fxfuse.options import choices
from fxfuse.planner import planned
from fxfuse.program import fold_program
from fxfuse.records import Report
from fxfuse.replica import replicate
from fxfuse.reports import attach, report
from fxfuse.rewrite import rewrite
from fxfuse.runs import REJECTIONS
from fxfuse.shapes import GraphShapes, observed_values
from fxfuse.tree import as_module
from fxfuse.verdict import Comparison


@overload
def fuse(
    model: ExportedProgram,
    *,
    example_inputs: Sequence[Any] | None = ...,
    keep_modules: bool = ...,
    leave: Collection[str] = ...,
) -> ExportedProgram: ...


@overload
def fuse(
    model: nn.Module,
    *,
    example_inputs: Sequence[Any] | None = ...,
    keep_modules: bool = ...,
    leave: Collection[str] = ...,
) -> nn.Module: ...


def fuse(
    model: nn.Module | ExportedProgram,
    *,
    example_inputs: Sequence[Any] | None = None,
    keep_modules: bool = False,
    leave: Collection[str] = (),
) -> nn.Module | ExportedProgram:
    """A new module that computes the same function as `model`, with the norms folded away.

    Of a module it is a ``torch.fx.GraphModule`` where the whole model can be traced. Where it cannot, or
    where forward takes options (arguments that default to None, a bool, a str, a dtype or a device, or that
    it compares with None), of which a graph could hold one choice only, it is a module of the same class,
    folded inside.

    Of an exported program, in the ATen dialect, before or after ``run_decompositions``, it is an exported
    program with the same inputs, outputs and dynamic shapes. Parameters that are no longer used are gone from
    its signature and state_dict.

    The source is untouched. The weights of layers that were not folded share their memory with the
    source, so an in-place change of one shows in the other; ``copy.deepcopy`` of the result parts them.

    Args:
        model: a module in eval mode, a ``torch.fx.GraphModule``, or a ``torch.export.ExportedProgram``.
        example_inputs: positional inputs; a ``torch.Size`` stands for a random tensor of that shape. With
            them the number of axes of every value is known, which some norms after linear layers need,
            and the result is verified before it is returned.
        keep_modules: give a module of the same class, with the same attributes and forward, in any case:
            norms become ``nn.Identity``, or what else their forward does, operators get the folded weights.
        leave: names, as the report gives them, of norms that are to stay.

    Raises:
        UsageError: the model is in training mode, is no module, has lazy parameters that are not
            initialised, or rejects the example inputs; or modules of an exported program are to be kept;
            or `leave` names a norm that the model does not execute.
        VerificationError: the result differs from `model` on the example inputs.
    """
    fused = folded(model, example_inputs=example_inputs, keep_modules=keep_modules, leave=leave)
    verification = report(fused).verification
    if verification is not None:
        verification.raise_if_failed()
    return fused


def folded(
    model: nn.Module | ExportedProgram,
    *,
    example_inputs: Sequence[Any] | None = None,
    keep_modules: bool = False,
    leave: Collection[str] = (),
    verifies: bool = True,
) -> nn.Module | ExportedProgram:
    """What ``fuse`` gives, also where it differs from `model`: then its report says so.

    The arguments are those of ``fuse``; with `verifies` it is compared with `model`, on the example inputs.
    """
    fused, account = _folded(model, example_inputs, keep_modules, leave)
    if verifies and example_inputs is not None:
        comparison = _verified(model, fused, account, example_inputs, keep_modules, leave)
        account = replace(account, verification=comparison)
    attach(fused, account)
    return fused


def explain(
    model: nn.Module | ExportedProgram,
    *,
    example_inputs: Sequence[Any] | None = None,
    keep_modules: bool = False,
    leave: Collection[str] = (),
) -> Report:
    """The report that ``fuse`` would give, less the verification; nothing is changed.

    Arguments and errors as there, but no VerificationError.
    """
    return _folded(model, example_inputs, keep_modules, leave)[1]


def _folded(
    model: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any] | None,
    keep_modules: bool,
    names: Collection[str],
) -> tuple[nn.Module | ExportedProgram, Report]:
    leave = Leave(names)
    fused, report = _folded_but(model, example_inputs, keep_modules, leave)
    leave.check(report)
    return fused, report


def _folded_but(
    model: nn.Module | ExportedProgram, example_inputs: Sequence[Any] | None, keep_modules: bool, leave: Leave
) -> tuple[nn.Module | ExportedProgram, Report]:
    if example_inputs is not None:
        check_inputs(example_inputs, "example_inputs")
    if isinstance(model, ExportedProgram):
        if keep_modules:
            raise UsageError(
                "an exported program is one graph and has no modules to keep; leave out keep_modules=True"
            )
        with torch.inference_mode(False), torch.no_grad():
            return fold_program(model, leave)
    check_usable(model)
    check_eval(model, "model")
    # Tensors that are made in inference mode could not become parameters of a module for all modes.
    with torch.inference_mode(False), torch.no_grad():
        if keep_modules:
            fused, report = _kept(model, leave)
        elif hooks_look(model):
            fused, report = _kept(
                model, leave, f"a hook looks at this {type(model).__name__}, so it was not folded"
            )
        elif not isinstance(model, fx.GraphModule) and (options := _choices(model)):
            note = f"forward takes options ({', '.join(options)}), so the modules were kept"
            fused, report = _kept(model, leave, note)
        else:
            fused, report = _graph(model, example_inputs, leave)
    if any(parameter.is_meta for parameter in fused.parameters()):
        note = "the model is on the meta device: the graph was folded, numbers were not checked"
        report = replace(report, notes=(*report.notes, note))
    return fused, report


def _verified(
    model: nn.Module | ExportedProgram,
    fused: nn.Module | ExportedProgram,
    account: Report,
    example_inputs: Sequence[Any],
    keep_modules: bool,
    leave: Collection[str],
) -> Comparison:
    """Compares `fused` with its source, which is folded once more in float64: there no weight is rounded."""
    source = as_module(model)
    # What the dtype of the source does not allow is not to be made here either.
    gone = {fold.norm for fold in account.folded}  # a norm that is called twice may be both
    left = [*leave, *(refusal.norm for refusal in account.refused if refusal.norm not in gone)]

    def refold() -> nn.Module:
        inputs, twin = in_float64(sample(source, example_inputs, seed=0)), replicate(source).double()
        try:
            again, found = _folded_but(twin, inputs, keep_modules, Leave(left))
            more = {*found.names} - {*account.names}  # constants that the dtype of the source keeps
            if more:
                again, found = _folded_but(twin, inputs, keep_modules, Leave([*left, *more]))
        except FxfuseError as error:
            raise UnmeasurableError(first_line(error)) from error
        if {*found.names} != {*account.names}:
            raise UnmeasurableError("in float64 other norms can be folded")
        return as_module(again)

    return compared(source, as_module(fused), example_inputs, refold=refold)


def _choices(model: nn.Module) -> list[str]:
    try:
        return choices(model)
    except CaptureError:
        return []


def _graph(model: nn.Module, example_inputs: Sequence[Any] | None, leave: Leave) -> tuple[nn.Module, Report]:
    try:
        captured = capture(model)
    except CaptureError as error:
        return _kept(model, leave, f"the modules were kept, because {error}")
    reader = Reader(captured.root, captured.graph)
    observed = {} if example_inputs is None else _observed(captured, example_inputs)
    shapes = GraphShapes(captured.graph, reader, observed)
    plan, solution = planned(captured.graph, reader, shapes, leave)
    gone = rewrite(captured, plan, solution, reader)
    inside = fold_called(model, captured, leave)
    known = {refusal.norm for refusal in plan.refusals}
    refused = (*plan.refusals, *(refusal for refusal in inside.refused if refusal.norm not in known))
    folded = (*gone.norms, *inside.folded)
    name = type(model).__name__
    return captured.module(), Report(name, folded, refused, gone.constants, gone.merged, plan.apart)


def _kept(model: nn.Module, leave: Leave, *notes: str) -> tuple[nn.Module, Report]:
    fused = replicate(model)
    account = fold_inside(model, fused, leave)
    folded, refused = tuple(account.folded), tuple(account.refused)
    return fused, Report(type(model).__name__, folded, refused, notes=notes)


def _observed(captured: Capture, inputs: Sequence[Any]) -> Mapping[fx.Node, Tensor]:
    try:
        return observed_values(captured.root, captured.graph, inputs)
    except REJECTIONS as error:
        raise UsageError(
            f"the model rejects the example inputs {rejection(inputs, error, captured.root)}"
        ) from error
