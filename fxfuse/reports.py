"""Where reports are kept: on what was made; of compiled models, by the tensors that they read."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Mapping
from dataclasses import replace
from functools import wraps
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY
from torch.utils.weak import WeakTensorKeyDictionary

from fxfuse.arguments import check_module
from fxfuse.errors import UsageError
from fxfuse.records import Report
from fxfuse.tree import named_tensors

_RECORD = "fxfuse_report"
# For each tensor of a compiled model the newest report of each piece of code that was compiled with it. A
# backend is not told to which model its graph belongs; the tensors are all that the two have in common.
_compiled: Any = WeakTensorKeyDictionary()


def attach(fused: nn.Module | ExportedProgram, report: Report) -> None:
    """Lets `report` find the report of what was made."""
    # Pickling a module keeps its attributes; deepcopy of a GraphModule those that this entry of meta names.
    fused.__dict__[_RECORD] = report.to_dict()
    if isinstance(fused, fx.GraphModule):
        meta = fused.__dict__.setdefault("meta", {})  # which those that torchvision makes do not have
        kept = meta.get(_USER_PRESERVED_ATTRIBUTES_KEY, {})
        meta[_USER_PRESERVED_ATTRIBUTES_KEY] = {**kept, _RECORD: report.to_dict()}


def attach_compiled(
    run: Callable[..., Any],
    *,
    code: Hashable,
    report: Report,
    tensors: Mapping[str, Tensor],
    places: Mapping[str, int],
) -> Callable[..., Any]:
    """The same for compiled code, for every instance that comes to run it.

    Args:
        run: the compiled code.
        code: what stands for its source.
        report: what became of its norms.
        tensors: the parameters and buffers of the instance for which it was compiled.
        places: their places among the inputs of `run`.

    Returns:
        `run`, which attaches the report to the tensors that it is given.
    """
    for tensor in tensors.values():
        _compiled.setdefault(tensor, {})[code] = report
    if not places or not report.norms:
        return run
    # Instances may share a parameter, but hardly statistics.
    name = min(places, key=lambda name: isinstance(tensors[name], nn.Parameter))
    place_of_key = places[name]
    known: Any = WeakTensorKeyDictionary()
    known[tensors[name]] = True

    @wraps(run)
    def reported(*inputs: Any) -> Any:
        if inputs[place_of_key] not in known:
            known[inputs[place_of_key]] = True
            own = replace(report)
            for place in places.values():
                _compiled.setdefault(inputs[place], {})[code] = own
        return run(*inputs)

    return reported


def report(fused: nn.Module | ExportedProgram) -> Report:
    """What became of every norm of the model that `fused` was made from.

    Args:
        fused: what ``fuse`` gave; or a model that ``torch.compile(model, backend="fxfuse")`` gave, or its
            source, once it has been called: then it is about the newest compilation of each piece of code
            that reads parameters which the model has now.

    Raises:
        UsageError: `fused` was not made by fxfuse, or was not called yet.
    """
    meta = getattr(fused, "meta", {}) if isinstance(fused, fx.GraphModule) else {}
    record = getattr(fused, _RECORD, meta.get(_USER_PRESERVED_ATTRIBUTES_KEY, {}).get(_RECORD))
    if record is not None:
        return Report.from_dict(record)
    tensors = [tensor for _, tensor in named_tensors(fused)] if isinstance(fused, nn.Module) else []
    compiled = {id(each): each for tensor in tensors for each in _compiled.get(tensor, {}).values()}
    if compiled:
        return _joined(type(getattr(fused, "_orig_mod", fused)).__name__, [*compiled.values()])
    if not isinstance(fused, ExportedProgram):
        check_module(fused, "model")
    if hasattr(fused, "_orig_mod") or getattr(fused, "_compiled_call_impl", None) is not None:
        raise UsageError(
            f"this {type(fused).__name__} was not called yet, or is not compiled with backend='fxfuse', "
            "or Dynamo compiled nothing of it; call it on an input, then ask for the report"
        )
    raise UsageError(
        f"this {type(fused).__name__} was not made by fxfuse, or comes out of a file of torch.export, "
        "which keeps no report; fxfuse.explain(model) tells what can be folded"
    )


def _joined(name: str, reports: list[Report]) -> Report:
    folded, refused, constants, merged = (
        tuple(record for report in reports for record in getattr(report, kind))
        for kind in ("folded", "refused", "constants", "merged")
    )
    return Report(name, folded, refused, constants, merged)
