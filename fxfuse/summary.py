"""What a model is made of and what a run of it takes: the numbers that folding changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import FlopCounterMode

from fxfuse.inputs import sample
from fxfuse.replica import isolated
from fxfuse.runs import clean_run
from fxfuse.tree import as_module

# What the dispatcher sees of a batch norm, by device and dialect.
_NORM_OPERATORS = (
    "native_batch_norm",
    "_native_batch_norm_legit",
    "_native_batch_norm_legit_no_training",
    "_batch_norm_no_update",
    "_batch_norm_with_update",
    "cudnn_batch_norm",
    "miopen_batch_norm",
)


@dataclass(frozen=True)
class Summary:
    """A model in numbers.

    Attributes:
        parameters: how many numbers its parameters hold.
        mebibytes: memory of its parameters and buffers, in MiB.
        norms: how many batch norms a run executes; None without inputs.
        flops: floating point operations of that run: those of convolutions and matrix products, as
            ``torch.utils.flop_counter`` has them, and two for each element of a batch norm; None without
            inputs.
    """

    parameters: int
    mebibytes: float
    norms: int | None
    flops: int | None


def summarised(model: nn.Module | ExportedProgram, inputs: Sequence[Any] | None) -> Summary:
    """Counts a model, on a run with `inputs`, as ``fxfuse.verify`` takes them, if there are any."""
    module = as_module(model)
    parameters = sum(parameter.numel() for parameter in module.parameters())
    size = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers())) / 2**20
    if inputs is None:
        return Summary(parameters, size, None, None)
    counter = FlopCounterMode(display=False, custom_mapping=_NORM_FLOPS)
    with clean_run(sample(module, inputs, seed=0), seed=0) as values, counter:
        norms = executed_norms(isolated(module), *values)
    return Summary(parameters, size, norms, counter.get_total_flops())


def executed_norms(model: nn.Module, *inputs: Any) -> int:
    """How many batch norms run, counted by the dispatcher and not by fxfuse."""
    counter = _NormCounter()
    with torch.no_grad(), counter:
        model(*inputs)
    return counter.norms


class _NormCounter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.norms = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.norms += "batch_norm" in func.name()
        return func(*args, **(kwargs or {}))


def _norm_flops(shape: torch.Size, *_: Any, **__: Any) -> int:
    """y = s·x + t takes a multiplication and an addition for each element."""
    return 2 * shape.numel()


_NORM_FLOPS = {
    getattr(torch.ops.aten, name): _norm_flops for name in _NORM_OPERATORS if hasattr(torch.ops.aten, name)
}
