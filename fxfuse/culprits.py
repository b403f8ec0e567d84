"""Which folds break a check: a smallest set of them, found by folding ever fewer.

Delta debugging (Zeller and Hildebrandt 2002, algorithm ddmin): of a set of folds with which the check fails,
a part is kept with which it fails too, in ever smaller parts, until each of those that are left is needed.
For one culprit among n folds that takes about 2·log₂(n) checks.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fxfuse.criteria import Check, Model
from fxfuse.errors import UsageError, VerificationError
from fxfuse.pipeline import explain, folded, fuse
from fxfuse.resuming import Known, question

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
    known = Known()
    if state is not None:
        known = Known(Path(state), question(model, check, example_inputs, names))

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
