"""Writes what people look at: the report as a page, the graphs for other viewers."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import nn
from torch.export import ExportedProgram

from fxfuse.dot import dot
from fxfuse.drawing import drawing
from fxfuse.errors import UsageError
from fxfuse.files import written
from fxfuse.page import Subject, page
from fxfuse.reports import report
from fxfuse.summary import summarised


def publish(
    subject: Subject,
    source: nn.Module | ExportedProgram,
    fused: nn.Module | ExportedProgram,
    inputs: Sequence[Any] | None,
    *,
    html_file: Path | None = None,
    dot_file: Path | None = None,
) -> None:
    """Writes the files that are asked for.

    Args:
        subject: what the user calls the model.
        source: the model.
        fused: what ``fuse`` made of it.
        inputs: positional inputs on which it runs; None if there are none.
        html_file: where to write the page.
        dot_file: where to write the graphs, in DOT.

    Raises:
        UsageError: graphs are asked for, but the model could not be traced whole.
    """
    told = report(fused)
    drawn = drawing(source, fused, told, inputs)
    if dot_file is not None:
        if drawn is None:
            raise UsageError(f"cannot write {dot_file}: there is no graph; {'; '.join(told.notes)}")
        _write(dot(drawn), dot_file)
    if html_file is not None:
        numbers = summarised(source, inputs), summarised(fused, inputs)
        _write(page(subject, told, numbers, drawn), html_file)


def _write(text: str, file: Path) -> None:
    with written(file) as part:
        part.write_text(text, encoding="utf-8")
