"""The engine "torch": the kernels of oneDNN that torch brings along, each with the operators around it.

oneDNN Graph cuts a graph into pieces that it has one kernel for, such as a convolution with all that is
done to its result. torch reaches it through TorchScript: a trace is profiled in its first run, and compiled
in its second. Nodes that oneDNN does not know run as they are.
"""

from __future__ import annotations

import copy
import logging
import warnings
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx

from fxfuse.aliases import plain_layer, roots
from fxfuse.calls import operator_name, written_inputs
from fxfuse.errors import UnsupportedError
from fxfuse.lowering.attention import write_out
from fxfuse.lowering.channels_last import put_channels_last
from fxfuse.lowering.concatenations import grow
from fxfuse.lowering.dtypes import in_dtype
from fxfuse.lowering.halves import halves
from fxfuse.lowering.legal import Legalised
from fxfuse.lowering.specialised import WRITES, Specialised
from fxfuse.lowering.torchscript import calls_others, edit, has_empty_values
from fxfuse.precision import setting

_LOG = logging.getLogger("fxfuse")
_KERNEL = "prim::oneDNNFusionGroup"


def compile(graph: Specialised, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> Any:
    """A function of a list of tensors, for inputs like these.

    Raises:
        UnsupportedError: this torch has no oneDNN Graph, that none of `dtype` for this processor, TorchScript
            fails on the graph, a value is empty, or oneDNN Graph has a kernel for none of it.
    """
    mkldnn: Any = torch.backends.mkldnn
    if not hasattr(torch._C, "_jit_set_llga_enabled") or not mkldnn.is_available():
        raise UnsupportedError("this build of torch is without oneDNN Graph")
    if any(tensor.device.type != "cpu" for tensor in (*inputs, *graph.module.state_dict().values())):
        raise UnsupportedError("its kernels are for CPUs")
    if not inputs:
        raise UnsupportedError("no input is a tensor, without which TorchScript ends the process")
    if dtype is torch.bfloat16 and not torch.ops.mkldnn._is_mkldnn_bf16_supported():
        raise UnsupportedError("oneDNN has no bfloat16 for this processor")
    module, grows = _edited(graph, dtype, grows=True)
    try:
        return _compiled(module, inputs)
    except UnsupportedError:
        if not grows:  # what writes in place is not cut in halves
            raise
        return _compiled(_edited(graph, dtype, grows=False)[0], inputs)


def _edited(graph: Specialised, dtype: torch.dtype | None, *, grows: bool) -> tuple[fx.GraphModule, bool]:
    """A module of a graph, laid out for kernels, and whether concatenations grow in it, if they may."""
    module = copy.deepcopy(graph.module) if dtype is None else in_dtype(graph, dtype)
    module.requires_grad_(False)  # what is no input of a function becomes a constant of its trace
    if _writes_to_views(graph.module):
        return module, False
    grows = grows and grow(module)
    if dtype is None:
        write_out(module)
    put_channels_last(module, [result.is_contiguous() for result in graph.results])
    return module, grows


def _compiled(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Callable[..., Any]:
    """A function of a list of tensors, with kernels of oneDNN Graph."""
    trace = _traced(module, inputs)
    if calls_others(trace):
        raise UnsupportedError("it calls a function of TorchScript, in which nothing could be kept apart")
    if has_empty_values(trace):
        raise UnsupportedError("a value in it is empty, with which oneDNN Graph would end the process")
    constants = edit(trace)
    compiler = _TraceCompiler()
    try:
        with torch.no_grad(), _onednn_graph(True):
            program = compiler.compile(trace, [*inputs, *constants])
    except RuntimeError as error:
        raise UnsupportedError(f"TorchScript fails: {_last_line(error)}") from error
    if not compiler.kernels:
        raise UnsupportedError(compiler.failure or "oneDNN Graph has no kernel for any part of it")
    return lambda tensors: program(*tensors, *constants)


def _traced(module: fx.GraphModule, inputs: Sequence[Tensor]) -> Any:
    """The trace of a module, which is no function of torch yet: ``torch.jit.trace`` never forgets those."""

    def function(*tensors: Tensor) -> Any:
        return module(*tensors)

    with torch.no_grad(), warnings.catch_warnings(), Legalised():
        warnings.simplefilter("ignore")  # of sizes that are numbers in a trace
        trace, _ = torch._C._create_graph_by_tracing(
            function, tuple(inputs), lambda _: "", strict=True, force_outplace=False
        )
    return trace


@dataclass
class _TraceCompiler:
    """Makes functions of traces, while oneDNN Graph is switched on.

    Attributes:
        kernels: how many it has in these functions.
        failure: what it failed on first, if it did.
    """

    kernels: int = 0
    failure: str = ""

    def compile(self, graph: Any, inputs: Sequence[Tensor]) -> Callable[..., Any]:
        """A function for a trace.

        A trace that oneDNN Graph fails on is cut in halves, and these again, down to operators that run as
        they are.
        """
        try:
            function, kernels = _compile_whole(graph, inputs)
        except RuntimeError as error:
            failure = f"oneDNN Graph fails: {_last_line(error)}"
        else:
            self.kernels += kernels
            return function
        _LOG.info("%s, in %s", failure, graph)
        self.failure = self.failure or failure
        parts = halves(graph)
        if parts is None:
            with _onednn_graph(False):
                function, _ = _compile_whole(graph, inputs)
            return function
        first = self.compile(parts[0], inputs)
        second = self.compile(parts[1], [*inputs, *first(*inputs)])
        return lambda *tensors: second(*tensors, *first(*tensors))


def _compile_whole(graph: Any, inputs: Sequence[Tensor]) -> tuple[Callable[..., Any], int]:
    """A function for a trace as a whole, compiled for inputs like these, and its kernels of oneDNN Graph."""
    function = torch._C._create_function_from_graph("lowered", graph)
    for _ in range(2):
        function(*inputs)
    compiled: Any = torch.jit.last_executed_optimized_graph()  # type: ignore[attr-defined]
    return function, len(compiled.findAllNodes(_KERNEL))


def _last_line(error: Exception) -> str:
    """What it says in the end: before, the interpreter tells where it was."""
    return str(error).strip().rpartition("\n")[2]


def _writes_to_views(module: fx.GraphModule) -> bool:
    """Whether something is written to what may have views, which in another memory format may be none."""

    def written(node: fx.Node) -> Sequence[fx.Node]:
        if not node.meta.get(WRITES, True):
            return []
        return node.all_input_nodes if node.op == "call_module" else written_inputs(node)

    def gives_what_it_wrote_to(node: fx.Node) -> bool:
        layer = plain_layer(module, node)
        return getattr(layer, "inplace", False) or (node.op != "call_module" and bool(operator_name(node)))

    shares = roots(module.graph, module, written, {})
    viewed: set[fx.Node] = set()
    for node in module.graph.nodes:
        if any(shares[each] & viewed for each in written(node)):
            return True
        if not written(node) or not gives_what_it_wrote_to(node):
            viewed |= shares[node] - {node}
    return False


def _onednn_graph(enabled: bool) -> AbstractContextManager[None]:
    """With oneDNN Graph switched on or off for what TorchScript compiles, in the whole process."""
    return setting(torch._C._jit_llga_enabled, torch._C._jit_set_llga_enabled, enabled)
