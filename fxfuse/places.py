"""Where in the source a node or a module comes from: ``models/net.py:31 in Block.forward``."""

from __future__ import annotations

import inspect
import re
import sys
import traceback
from collections.abc import Iterable
from functools import cache
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import fx, nn

_FRAME = re.compile(r'File "(?P<file>[^"\n]+)", line (?P<line>\d+), in (?P<function>[^\n]+)')
_TORCH = f"{Path(torch.__file__).parent}/"


def stack_trace(inside: CodeType) -> str:
    """The innermost frame that is neither torch's nor fxfuse's, as tracebacks write it; empty without one.

    Args:
        inside: the code of the call within which it is looked for.
    """
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code is not inside:
        if is_own_code(frame):
            return (
                f'  File "{frame.f_code.co_filename}", line {frame.f_lineno}, in {frame.f_code.co_qualname}\n'
            )
        frame = frame.f_back
    return ""


def is_own_code(frame: FrameType) -> bool:
    """Whether the code is neither torch's nor fxfuse's."""
    return frame.f_globals.get("__name__", "").partition(".")[0] not in ("torch", "fxfuse")


def place_of(node: fx.Node) -> str:
    """The line of the model's own code that makes the node; empty if the graph does not tell."""
    found = _FRAME.finditer(node.stack_trace or "")
    own = [each for each in found if not each["file"].startswith((_TORCH, "<"))]
    return _written(own[-1]["file"], int(own[-1]["line"]), own[-1]["function"]) if own else ""


def place_of_forward(modules: Iterable[nn.Module]) -> str:
    """The line where the first forward that is not torch's is defined; empty if there is none."""
    for module in modules:
        code = getattr(inspect.unwrap(type(module).forward), "__code__", None)
        if code is not None and not code.co_filename.startswith((_TORCH, "<")):
            return _written(code.co_filename, code.co_firstlineno, code.co_qualname)
    return ""


def place_of_error(error: BaseException) -> str:
    """The innermost module that was running, and the innermost line of the model's own code."""
    running: list[nn.Module] = []
    line = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        owner = frame.f_locals.get(next(iter(frame.f_code.co_varnames), ""))
        node = frame.f_locals.get("n") if isinstance(owner, fx.Interpreter) else None
        owner = owner.module if isinstance(owner, fx.Interpreter) else owner
        if isinstance(owner, nn.Module):
            running.append(owner)
            if isinstance(node, fx.Node):
                line = place_of(node)
            elif is_own_code(frame) and not frame.f_code.co_filename.startswith("<"):
                line = _written(frame.f_code.co_filename, number, frame.f_code.co_qualname)
    if not running:
        return ""
    names = (name for root in running for name, module in root.named_modules() if module is running[-1])
    name = next(names)
    kind = type(running[-1]).__name__
    return ", ".join(filter(None, (f"{name} ({kind})" if name else kind, line)))


def _written(file: str, line: int, function: str) -> str:
    return f"{_seen_from(str(Path.cwd()), file)}:{line} in {function}"


@cache
def _seen_from(here: str, file: str) -> str:
    """The path as seen from the nearest folder from which Python imports, `here` among them."""
    folders = [Path(folder) for folder in (here, *sys.path) if Path(file).is_relative_to(folder)]
    nearest = max(folders, key=lambda folder: len(folder.parts), default=None)
    return (Path(file) if nearest is None else Path(file).relative_to(nearest)).as_posix()
