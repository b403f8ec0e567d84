"""The engine "torch": the kernels of oneDNN that torch brings along, each with the operators around it.

oneDNN Graph takes the whole graph apart into pieces that it has one kernel for, a convolution with all that
is done to its result, and chooses the memory format from each kernel to the next. torch reaches it through
TorchScript: a trace is frozen, profiled in its first run, and compiled in its second. Nodes that oneDNN does
not know run as they are.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse.lowering.specialised import UnsupportedError, in_dtype

_COMPILES = threading.Lock()  # oneDNN Graph is switched on for the whole process, so for one at a time
_TracerWarning = torch.jit._trace.TracerWarning
_KERNEL = "prim::oneDNNFusionGroup"


def compile(module: fx.GraphModule, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> Any:
    """A function of a list of tensors, for inputs like these.

    Raises:
        UnsupportedError: this torch has no oneDNN Graph, or that has a kernel for none of it.
    """
    if not hasattr(torch._C, "_jit_set_llga_enabled") or not torch.backends.mkldnn.is_available():  # type: ignore[no-untyped-call]
        raise UnsupportedError("this build of torch is without oneDNN Graph")
    if any(tensor.device.type != "cpu" for tensor in (*inputs, *module.parameters(), *module.buffers())):
        raise UnsupportedError("its kernels are for CPUs")
    module = module if dtype is None else in_dtype(module, dtype)
    try:
        with torch.no_grad(), _tracing():
            traced: Any = torch.jit.trace(module, tuple(inputs), check_trace=False)  # type: ignore[no-untyped-call]
            frozen = torch.jit.freeze(traced)
    except _TracerWarning as warning:
        raise UnsupportedError(f"forward reads numbers: {str(warning).partition('.')[0]}") from warning
    with torch.no_grad(), _COMPILES, _onednn_graph():
        for _ in range(2):
            frozen(*inputs)
        compiled: Any = torch.jit.last_executed_optimized_graph()  # type: ignore[attr-defined]
    if not compiled.findAllNodes(_KERNEL):
        raise UnsupportedError("oneDNN Graph has no kernel for any part of it")
    return lambda tensors: frozen(*tensors)


@contextmanager
def _tracing() -> Iterator[None]:
    """With what a trace cannot follow as an error."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*torch.jit.*", DeprecationWarning)
        warnings.filterwarnings("error", category=_TracerWarning)
        yield


@contextmanager
def _onednn_graph() -> Iterator[None]:
    """With oneDNN Graph switched on for what TorchScript compiles."""
    before = torch._C._jit_llga_enabled()
    torch._C._jit_set_llga_enabled(True)
    try:
        yield
    finally:
        torch._C._jit_set_llga_enabled(before)
