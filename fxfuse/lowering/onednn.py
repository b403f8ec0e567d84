"""The engine "torch": the kernels of oneDNN that torch brings along, each with the operators around it.

oneDNN Graph cuts a graph into pieces that it has one kernel for, such as a convolution with all that is
done to its result. torch reaches it through TorchScript: a trace is frozen, profiled in its first run, and
compiled in its second. Nodes that oneDNN does not know run as they are.
"""

from __future__ import annotations

import copy
import math
import threading
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from fxfuse.lowering.specialised import Specialised, UnsupportedError, in_dtype

_COMPILES = threading.Lock()  # oneDNN Graph is switched on for the whole process, so for one at a time
_KERNEL = "prim::oneDNNFusionGroup"
_TracerWarning = torch.jit._trace.TracerWarning


def compile(graph: Specialised, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> Any:
    """A function of a list of tensors, for inputs like these.

    Raises:
        UnsupportedError: this torch has no oneDNN Graph, or that has a kernel for none of it.
    """
    mkldnn: Any = torch.backends.mkldnn
    if not hasattr(torch._C, "_jit_set_llga_enabled") or not mkldnn.is_available():
        raise UnsupportedError("this build of torch is without oneDNN Graph")
    if any(tensor.device.type != "cpu" for tensor in (*inputs, *graph.module.state_dict().values())):
        raise UnsupportedError("its kernels are for CPUs")
    module = graph.module if dtype is None else in_dtype(graph.module, dtype)
    module = _channels_last(module, [result.is_contiguous() for result in graph.results])
    try:
        with torch.no_grad(), _tracing(), _Rewritten():
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


def _channels_last(module: fx.GraphModule, contiguous: Sequence[bool]) -> fx.GraphModule:
    """A copy whose images have their channels last, as oneDNN has them: nothing is reordered in between.

    Args:
        module: the graph.
        contiguous: which of its outputs are.
    """
    twin = copy.deepcopy(module)
    twin.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    graph = twin.graph
    for node in graph.find_nodes(op="placeholder"):
        with graph.inserting_before(node.next):
            last = graph.call_function(_with_channels_last, (node,))
        node.replace_all_uses_with(last, delete_user_cb=lambda user, last=last: user is not last)
    (output,) = graph.find_nodes(op="output")
    results: Any = output.args[0]
    with graph.inserting_before(output):
        output.args = (
            tuple(
                graph.call_method("contiguous", (each,)) if is_contiguous else each
                for each, is_contiguous in zip(results, contiguous, strict=True)
            ),
        )
    twin.recompile()
    return twin


def _with_channels_last(tensor: Tensor) -> Tensor:
    return tensor.contiguous(memory_format=torch.channels_last) if tensor.dim() == 4 else tensor


class _Rewritten(TorchFunctionMode):
    """Calls functions that oneDNN Graph does not know, or takes for others, by those that it knows."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        return _BY_OTHERS.get(getattr(func, "__name__", ""), func)(*args, **(kwargs or {}))


def _hardsigmoid(x: Tensor, *_: Any, **__: Any) -> Tensor:
    return F.hardtanh(x / 6 + 0.5, 0.0, 1.0)


def _gelu(x: Tensor, *, approximate: str = "none") -> Tensor:
    """The approximation by tanh as it is defined: oneDNN Graph computes the exact function in its place."""
    if approximate == "none":
        return F.gelu(x)
    return 0.5 * x * (1 + torch.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


_BY_OTHERS = {"hardsigmoid": _hardsigmoid, "gelu": _gelu}


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
