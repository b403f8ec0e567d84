"""What is known of a search for culprits, so that one that was interrupted goes on from there."""

from __future__ import annotations

import ctypes
import json
import zlib
from collections.abc import Collection, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_leaves

from fxfuse._version import __version__
from fxfuse.criteria import Check, Model
from fxfuse.errors import UsageError
from fxfuse.files import written
from fxfuse.functions import nested
from fxfuse.tree import as_module, named_tensors


class Known:
    """The outcome of each check, in memory and in a file."""

    def __init__(self, file: Path | None = None, question: Sequence[Any] = ()) -> None:
        self._file = file
        self._question = question
        self._broken: dict[tuple[str, ...], bool] = {}
        if file is not None and file.exists():
            self._load(file)

    @property
    def checks(self) -> int:
        """How many there are."""
        return len(self._broken)

    def get(self, kept: Collection[str]) -> bool | None:
        """Whether the check failed with these folds; None if that is not known."""
        return self._broken.get(tuple(sorted(kept)))

    def put(self, kept: Collection[str], *, broken: bool) -> None:
        """Remembers it."""
        self._broken[tuple(sorted(kept))] = broken
        if self._file is not None:
            outcomes = [{"folds": kept, "broken": broken} for kept, broken in self._broken.items()]
            with written(self._file) as part:
                part.write_text(
                    json.dumps({"question": self._question, "outcomes": outcomes}, indent=1) + "\n"
                )

    def forget(self) -> None:
        """Removes the file: the search is at its end, and the next one may be about mended code."""
        if self._file is not None:
            self._file.unlink(missing_ok=True)

    def _load(self, file: Path) -> None:
        try:
            record = json.loads(file.read_text())
            question = record["question"]
            self._broken = {tuple(sorted(each["folds"])): bool(each["broken"]) for each in record["outcomes"]}
        except (OSError, ValueError, LookupError, TypeError) as error:
            raise UsageError(f"{file} is no state of a bisection ({error}); name another file") from error
        if question != self._question:
            raise UsageError(
                f"{file} is the state of another bisection: the model, its weights, the inputs or the check "
                "were others; remove it, or name another file"
            )


def question(model: Model, check: Check | None, inputs: Sequence[Any] | None, folds: list[str]) -> list[Any]:
    """What is asked: the folds, the model and its weights, the inputs and the check, in short."""
    module = as_module(model)
    digest = zlib.crc32(f"{module}{getattr(module, 'code', '')}{__version__}{torch.__version__}".encode())
    for each in (*(tensor for _, tensor in named_tensors(module)), *tree_leaves(inputs)):
        digest = zlib.crc32(repr(getattr(each, "shape", each)).encode(), digest)
        if isinstance(each, Tensor) and each.layout is torch.strided and not each.is_meta:
            raw = each.detach().cpu().contiguous()
            digest = zlib.crc32(ctypes.string_at(raw.data_ptr(), raw.nbytes), digest)
    if isinstance(check, FunctionType):  # whose repr is another one in every process
        held = [cell.cell_contents for cell in check.__closure__ or ()]
        held += [*(check.__defaults__ or ()), *(check.__kwdefaults__ or {}).values()]
        read = sorted({name for code in nested(check.__code__) for name in code.co_names})
        held += [check.__globals__.get(name) for name in read]
        plain = [each for each in held if isinstance(each, str | int | float | tuple)]
        body = zlib.crc32(f"{_spelled(check.__code__)}{plain}".encode())
        return [folds, digest, f"{check.__module__}.{check.__qualname__} {body}"]
    return [folds, digest, repr(check)]


def _spelled(code: CodeType) -> str:
    """What it does, in the same words in every process and wherever it stands in its file."""
    return f"{code.co_code!r}{code.co_names}{[*map(_text, code.co_consts)]}"


def _text(constant: Any) -> str:
    if isinstance(constant, CodeType):
        return _spelled(constant)
    # The order of a set is another one in every process.
    return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)
