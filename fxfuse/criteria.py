"""Checks by which a folded model is judged: a tolerance, a command."""

from __future__ import annotations

import os
import shlex
import subprocess
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fxfuse.comparison import verify
from fxfuse.errors import UsageError
from fxfuse.programs import as_program, save

Model = nn.Module | ExportedProgram
Check = Callable[[Model], bool]


@dataclass(frozen=True)
class Within:
    """The check that no element of an output differs from the source's by more than `tolerance`."""

    tolerance: float
    model: Model = field(repr=False)
    inputs: Sequence[Any] = field(repr=False)

    def __call__(self, fused: Model) -> bool:
        """Whether `fused` passes."""
        return verify(self.model, fused, self.inputs, rtol=0.0, atol=self.tolerance).ok


@dataclass(frozen=True)
class CommandPasses:
    """The check that a command exits with 0.

    It is run by the shell, with the folded model in a ``.pt2`` file, the path of which stands in the
    environment variable FXFUSE_MODEL and in place of ``{}``.
    """

    command: str
    inputs: Sequence[Any] = field(repr=False)

    def __call__(self, fused: Model) -> bool:
        """Whether `fused` passes.

        Raises:
            UsageError: the command cannot be run, or was killed.
        """
        with tempfile.TemporaryDirectory(prefix="fxfuse-") as folder:
            file = Path(folder, "folded.pt2")
            save(as_program(fused, self.inputs), file)
            line = self.command.replace("{}", shlex.quote(str(file)))
            environment = os.environ | {"FXFUSE_MODEL": str(file)}
            code = subprocess.run(line, shell=True, env=environment, check=False).returncode
        if code < 0 or code >= 126:
            raise UsageError(
                f"the check {self.command!r} did not run (exit code {code}); try it by itself on a .pt2 file"
            )
        return code == 0
