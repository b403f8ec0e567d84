"""The engine "inductor": torch's own compiler, with weights as constants that it may lay out anew."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.lowering.dtypes import in_dtype
from fxfuse.lowering.specialised import Specialised


def compile(graph: Specialised, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> Any:
    """A function of a list of tensors, for inputs like these; needs a C++ compiler."""
    module = graph.module if dtype is None else in_dtype(graph, dtype)
    compiled = torch.compile(module, fullgraph=True, dynamic=False, options={"freezing": True})

    def run(tensors: Sequence[Tensor]) -> Any:
        with torch.no_grad():
            return compiled(*tensors)

    # Dynamo asks for freezing, too, and does not see the options.
    with torch._inductor.config.patch(freezing=True):
        run(inputs)
    return run
