"""The engines, in a table: a new one is a function and one entry.

An engine gets a graph for inputs of one kind (`fxfuse.lowering.specialised`), from tensors to a tuple of
tensors, examples of these, and the dtype to compute in, if that is another one; it gives a function of the
tensors. It raises an UnsupportedError for what it cannot do, and may raise whatever its package raises.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from fxfuse.errors import UsageError
from fxfuse.lowering import cudnn, inductor, onednn, onnxruntime, openvino
from fxfuse.lowering.specialised import Program, Specialised

Compile = Callable[[Specialised, Sequence[Tensor], torch.dtype | None], Program]


@dataclass(frozen=True)
class Engine:
    """What compiles a graph.

    Attributes:
        compile: does it.
        packages: those that it needs beside torch; the extra of fxfuse that brings them is called as it is.
        dtypes: in which it can compute, besides float32.
        slices: whether it is run on slices of large batches where samples are apart.
    """

    compile: Compile
    packages: tuple[str, ...] = ()
    dtypes: frozenset[torch.dtype] = frozenset({torch.bfloat16})
    slices: bool = False

    @property
    def missing(self) -> list[str]:
        """The packages that are not installed."""
        return [name for name in self.packages if importlib.util.find_spec(name) is None]

    def computes_in(self, dtype: torch.dtype | None) -> bool:
        """Whether it can; None: the dtype of the weights."""
        return dtype is None or dtype in self.dtypes


def _torch(graph: Specialised, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> Program:
    """On the kernels that torch brings along for the device."""
    own: Compile = cudnn.compile if any(tensor.is_cuda for tensor in inputs) else onednn.compile
    return own(graph, inputs, dtype)


ENGINES = {
    "torch": Engine(_torch, slices=True),
    "openvino": Engine(openvino.compile, packages=("openvino",)),
    "onnxruntime": Engine(
        onnxruntime.compile, packages=("onnxruntime", "onnx", "onnxscript"), dtypes=frozenset()
    ),
    "inductor": Engine(inductor.compile),
}


def check_engine(name: str, dtype: torch.dtype | None) -> None:
    """Raises a UsageError: there is no such engine, it is not installed, or it cannot compute in `dtype`."""
    if name not in ENGINES:
        raise UsageError(f"there is no engine {name!r}; use one of: {', '.join([*ENGINES, 'auto'])}")
    found = ENGINES[name]
    if found.missing:
        raise UsageError(
            f"the engine {name!r} needs {', '.join(found.missing)}: pip install 'fxfuse[{name}]'"
        )
    if not found.computes_in(dtype):
        raise UsageError(f"the engine {name!r} does not compute in {dtype}; leave out dtype=...")
