"""Which folds break a check: a smallest set of them, found by folding ever fewer.

Delta debugging (Zeller and Hildebrandt 2002, algorithm ddmin): of a set of folds with which the check fails,
a part is kept with which it fails too, in ever smaller parts, until each of those that are left is needed.
For one culprit among n folds that takes about 2·log₂(n) checks.
"""

from __future__ import annotations

import ctypes
import json
import os
import shlex
import subprocess
import tempfile
import zlib
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import ExportedProgram
from torch.utils._pytree import tree_leaves

from fxfuse._version import __version__
from fxfuse.comparison import verify
from fxfuse.errors import UsageError, VerificationError
from fxfuse.files import written
from fxfuse.functions import nested
from fxfuse.pipeline import explain, folded, fuse
from fxfuse.programs import as_program, save
from fxfuse.tree import as_module, named_tensors

Model = nn.Module | ExportedProgram
Check = Callable[[Model], bool]
Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Bisection:
    """What a search for the folds that break a check brought.

    Attributes:
        culprits: the names, as a report gives them, of a smallest set of folds with which the check
            fails: without any one of them it passes. Empty if it passes with all folds.
        alone: whether the check passes if all other folds are made; else others break it too.
        folds: how many folds there are.
        checks: how many times the check was run for it.
    """

    culprits: tuple[str, ...]
    alone: bool
    folds: int
    checks: int

    def __str__(self) -> str:
        count = f"folds: {self.folds}, checks: {self.checks}"
        if not self.culprits:
            return f"the check passes with all folds ({count})"
        names = "\n".join(f"  {name}" for name in self.culprits)
        rest = "" if self.alone else "\nit fails without these too: other folds break it as well"
        return f"the check fails with these folds alone ({count}):\n{names}{rest}"


def bisect(
    model: Model,
    check: Check | None = None,
    *,
    example_inputs: Sequence[Any] | None = None,
    state: str | Path | None = None,
    progress: Progress = lambda *_: None,
) -> Bisection:
    """Finds a smallest set of folds that breaks a check: without any one of them it passes.

    Args:
        model: as for ``fuse``.
        check: takes a folded model and tells whether it is right. Without one a model is right if ``fuse``
            can verify it on the example inputs, also in float64.
        example_inputs: as for ``fuse``.
        state: a file in which the outcome of every check is kept, for a search that was interrupted to go
            on from there. It is gone when the search is at its end.
        progress: is told how many folds are suspected, and how many checks were made, before each check.

    Raises:
        UsageError: there is neither a check nor example inputs, the check fails with no fold made, or
            `state` belongs to another search.
    """
    if check is not None and not callable(check):
        raise UsageError(f"the check is {check!r}; pass a function that takes a folded model")
    if check is None and example_inputs is None:
        raise UsageError("bisect has nothing to judge a fold by; pass check=... or example_inputs=(x,)")
    report = explain(model, example_inputs=example_inputs)
    names = report.names
    known = _Known()
    if state is not None:
        known = _Known(Path(state), _question(model, check, example_inputs, names))

    def broken(kept: Collection[str]) -> bool:
        if known.get(kept) is None:
            progress(len(kept), known.checks)
            leave = [name for name in names if name not in kept]
            known.put(kept, broken=not _passes(model, check, example_inputs, leave))
        return bool(known.get(kept))

    if not broken(names):
        known.forget()
        return Bisection((), True, len(names), known.checks)
    if broken([]):
        known.forget()
        raise UsageError("the check fails with nothing folded, so no fold can be at fault; mend the check")
    culprits = tuple(_minimal(names, broken))
    alone = not broken([name for name in names if name not in culprits])
    known.forget()
    return Bisection(culprits, alone, len(names), known.checks)


def _passes(
    model: Model, check: Check | None, example_inputs: Sequence[Any] | None, leave: Collection[str]
) -> bool:
    if check is not None:
        passes = check(folded(model, example_inputs=example_inputs, leave=leave, verifies=False))
        if not isinstance(passes, bool):
            raise UsageError(f"the check gave {passes!r}; it has to return True or False")
        return passes
    try:
        fuse(model, example_inputs=example_inputs, leave=leave)
    except VerificationError:
        return False
    return True


def _minimal(names: Sequence[str], broken: Callable[[Collection[str]], bool]) -> list[str]:
    """A part of `names` that is broken, and is not without any one of its names."""
    suspects, parts = list(names), 2
    while len(suspects) > 1:
        size = -(-len(suspects) // parts)
        chunks = [suspects[start : start + size] for start in range(0, len(suspects), size)]
        rests = [[name for name in suspects if name not in chunk] for chunk in chunks]
        smaller = next((chunk for chunk in chunks if broken(chunk)), None)
        fewer = smaller or next((rest for rest in rests if parts > 2 and broken(rest)), None)
        if fewer is None and parts >= len(suspects):
            break
        if fewer is None:
            parts = min(2 * parts, len(suspects))
        else:
            suspects, parts = fewer, 2 if smaller else max(parts - 1, 2)
    return suspects


class _Known:
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


def _question(model: Model, check: Check | None, inputs: Sequence[Any] | None, folds: list[str]) -> list[Any]:
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
        body = zlib.crc32(f"{_written(check.__code__)}{plain}".encode())
        return [folds, digest, f"{check.__module__}.{check.__qualname__} {body}"]
    return [folds, digest, repr(check)]


def _written(code: CodeType) -> str:
    """What it does, in the same words in every process and wherever it stands in its file."""
    return f"{code.co_code!r}{code.co_names}{[*map(_text, code.co_consts)]}"


def _text(constant: Any) -> str:
    if isinstance(constant, CodeType):
        return _written(constant)
    # The order of a set is another one in every process.
    return repr(sorted(map(repr, constant)) if isinstance(constant, frozenset) else constant)


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
