"""CUDA graphs: an engine's programs recorded, so that a call launches all its kernels at once."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from fxfuse.lowering.engines import Engine
from fxfuse.lowering.specialised import Program, Specialised


def with_cuda_graphs(engine: Engine) -> Engine:
    """`engine`, with programs that are recorded."""

    def compile(graph: Specialised, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> Program:
        return _captured(engine.compile(graph, inputs, dtype), inputs)

    return replace(engine, compile=compile)


def _captured(program: Program, inputs: Sequence[Tensor]) -> Program:
    """A recording has memory of its own for what it reads and writes; its results are copies."""
    own = tuple(tensor.clone() for tensor in inputs)
    replay: Any = torch.cuda.make_graphed_callables(lambda *given: tuple(program(given)), own)
    replays = threading.Lock()

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        with replays:
            return [result.clone() for result in replay(*tensors)]

    return run


def streams(tensors: Sequence[Tensor]) -> tuple[int, ...]:
    """Those on which a call with these tensors is made: a recording is for one."""
    return tuple(torch.cuda.current_stream(each.device).cuda_stream for each in tensors if each.is_cuda)
