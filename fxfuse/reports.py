"""Where reports are kept: on what was made; of compiled models, by the tensors that they read."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from typing import Any

from torch import Tensor, fx, nn
from torch.export import ExportedProgram
from torch.fx.graph_module import _USER_PRESERVED_ATTRIBUTES_KEY
from torch.utils.weak import WeakTensorKeyDictionary

from fxfuse.errors import UsageError
from fxfuse.records import Report
from fxfuse.tree import named_tensors

_RECORD = "fxfuse_report"
# For each tensor of a compiled model the newest report of each piece of code that is compiled with it.
_compiled: Any = WeakTensorKeyDictionary()


def attach(fused: nn.Module | ExportedProgram, report: Report) -> None:
    """Lets `report` find the report of what was made."""
    # Pickling a module keeps its attributes; deepcopy of a GraphModule those that this entry of meta names.
    fused.__dict__[_RECORD] = report.to_dict()
    if isinstance(fused, fx.GraphModule):
        meta = fused.__dict__.setdefault("meta", {})  # which those that torchvision makes do not have
        kept = meta.get(_USER_PRESERVED_ATTRIBUTES_KEY, {})
        meta[_USER_PRESERVED_ATTRIBUTES_KEY] = {**kept, _RECORD: report.to_dict()}


def attach_compiled(tensors: Iterable[Tensor], code: Hashable, report: Report) -> None:
    """The same for a piece of code that is compiled; `tensors` are the weights that it reads."""
    for tensor in tensors:
        _compiled.setdefault(tensor, {})[code] = report


def report(fused: nn.Module | ExportedProgram) -> Report:
    """What became of every norm of the model that `fused` was made from.

    Args:
        fused: what ``fuse`` gave; or a model that ``torch.compile(model, backend="fxfuse")`` gave, or its
            source, once it has been called: then it is about the code that was compiled so far.

    Raises:
        UsageError: `fused` was not made by fxfuse, or was not called yet.
    """
    meta = getattr(fused, "meta", {}) if isinstance(fused, fx.GraphModule) else {}
    record = getattr(fused, _RECORD, meta.get(_USER_PRESERVED_ATTRIBUTES_KEY, {}).get(_RECORD))
    if record is not None:
        return Report.from_dict(record)
    compiled: dict[Hashable, Report] = {}
    for _, tensor in named_tensors(fused) if isinstance(fused, nn.Module) else ():
        compiled |= _compiled.get(tensor, {})
    if compiled:
        source = getattr(fused, "_orig_mod", fused)
        return _joined(type(source).__name__, [*compiled.values()])
    found = type(fused).__name__
    raise UsageError(
        f"this {found} was not made by fxfuse, or is compiled and was not called yet; "
        "fxfuse.explain(model) tells what can be folded"
    )


def _joined(name: str, reports: list[Report]) -> Report:
    folded, refused, constants = (
        tuple(record for report in reports for record in getattr(report, kind))
        for kind in ("folded", "refused", "constants")
    )
    return Report(name, folded, refused, constants)
