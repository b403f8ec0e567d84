"""A folded model as an exported program, and in a file."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram

from fxfuse.errors import UsageError, first_line
from fxfuse.files import written


def as_program(fused: nn.Module | ExportedProgram, inputs: Sequence[Any]) -> ExportedProgram:
    """The program of a module, for any batch size; a program as it is.

    Raises:
        UsageError: torch.export cannot export the module.
    """
    if isinstance(fused, ExportedProgram):
        return fused
    # A batch of one would be taken for a constant.
    batches = tuple(
        torch.cat([value, value]) if isinstance(value, Tensor) and value.shape[:1] == (1,) else value
        for value in inputs
    )
    any_batch = tuple({0: torch.export.Dim.AUTO} if isinstance(each, Tensor) else None for each in batches)
    try:
        return torch.export.export(fused, batches, dynamic_shapes=any_batch)
    except (RuntimeError, torch._dynamo.exc.TorchDynamoException) as error:
        raise UsageError(
            f"{type(fused).__name__} is folded but torch.export cannot write it: {first_line(error)}; "
            "in Python, fxfuse.fuse(model) gives it as a module"
        ) from error


def save(program: ExportedProgram, output: Path) -> None:
    """Writes a ``.pt2`` file, whole or not at all."""
    file = io.BytesIO()  # torch ends the process where it cannot write on
    torch.export.save(program, file)
    with written(output) as part:
        part.write_bytes(file.getbuffer())
