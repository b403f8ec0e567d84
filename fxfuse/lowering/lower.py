"""``fxfuse.lower``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from fxfuse.arguments import check_eval, check_inputs, check_module, rejection
from fxfuse.errors import UsageError
from fxfuse.inputs import sample
from fxfuse.lowering.auto import fastest, times_of, timings
from fxfuse.lowering.cuda_graphs import streams
from fxfuse.lowering.engines import check_engine
from fxfuse.lowering.lowered import Lowered, lowered
from fxfuse.lowering.records import Lowering
from fxfuse.runs import REJECTIONS, run
from fxfuse.tree import as_module


def lower(
    folded: nn.Module | ExportedProgram,
    example_inputs: Sequence[Any],
    engine: str = "torch",
    *,
    dtype: torch.dtype | None = None,
    tune_seconds: float = 60.0,
    cuda_graphs: bool = False,
) -> Lowered:
    """A module that computes what `folded` does, on the fused kernels of an engine.

    It takes the same inputs and gives the same outputs, of any batch size; the first call with inputs of a
    new kind compiles for these, which takes as long as this call. Before a program is used, it is compared
    with `folded` on inputs of that kind: it may be about as far from a float64 run of `folded` as that is
    itself. What an engine cannot do is not lowered: then `folded` runs, and ``lowered.lowering.reason`` says
    why. Gradients do not get through, and NaN in inputs need not.

    Args:
        folded: what ``fxfuse.fuse`` gave: a graph, an exported program, or a module that it kept, of which
            programs are for options at their defaults.
        example_inputs: positional inputs; a ``torch.Size`` stands for a random tensor of that shape.
        engine: "torch": the kernels that torch brings along: oneDNN's for CPUs, cuDNN's for CUDA. "inductor",
            "openvino" or "onnxruntime": those of another compiler or runtime, which fxfuse's extra of that
            name installs. "auto": the fastest of those that are installed, timed on the example inputs;
            ``lowered.engine`` is its name, which can be given here the next time.
        dtype: ``torch.bfloat16`` to compute in that, with more rounding: ``lowered.lowering`` tells how much.
            Inputs and outputs keep their dtypes. Not lowered where an engine has none for the processor.
        tune_seconds: how long "auto" may go on with engines that it has not tried yet.
        cuda_graphs: records programs as CUDA graphs, one for each kind of inputs and each stream that calls,
            which saves the launch of every kernel and takes memory for each.

    Raises:
        UsageError: `folded` is no module, is in training mode, or rejects the example inputs; an engine is
            not known or not installed, or cannot compute in `dtype`; CUDA graphs are asked for, and no input
            is on a CUDA device.
    """
    if isinstance(folded, Lowered):
        raise UsageError("it is lowered already; pass the folded module")
    if not isinstance(tune_seconds, (int, float)):
        raise UsageError(f"tune_seconds is {tune_seconds!r}; pass a number of seconds")
    if not isinstance(dtype, (torch.dtype, type(None))):
        raise UsageError(f"dtype is {dtype!r}; pass a torch.dtype, such as torch.bfloat16")
    folded = as_module(folded)
    check_module(folded, "folded module")
    check_eval(folded, "model")
    check_inputs(example_inputs, "example_inputs")
    if engine != "auto":
        check_engine(engine, dtype)
    inputs = sample(folded, example_inputs, seed=0)
    if cuda_graphs and not streams([leaf for leaf in tree_leaves(inputs) if isinstance(leaf, Tensor)]):
        raise UsageError("no input is on a CUDA device; leave out cuda_graphs=True")
    try:
        if engine == "auto":
            made = fastest(folded, inputs, dtype, tune_seconds, cuda_graphs)
        else:
            made = lowered(folded, inputs, engine, dtype, cuda_graphs)
        if made.lowering.comparison is None:  # it may not have run
            run(folded, inputs, seed=0)
    except REJECTIONS as error:
        raise UsageError(
            f"the folded module rejects the example inputs {rejection(inputs, error, folded)}"
        ) from error
    return made


def timed(folded: nn.Module, inputs: Sequence[Any], engine: str) -> Lowering:
    """What `lower` brings on an engine, with the time of the folded module beside it."""
    found = lower(folded, inputs, engine)
    if engine == "auto":
        return found.lowering
    ready = {engine: found}
    times = times_of(ready, folded, inputs)
    return replace(found.lowering, timings=timings(ready, times) if times else ())
