"""What the caller asks to leave as it is."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping

from fxfuse.errors import UsageError
from fxfuse.plan import Change, Plan
from fxfuse.records import Report
from fxfuse.refusals import Code


class Leave:
    """Forbids the moves of norms, and of other constants, by their names."""

    def __init__(self, names: Collection[str] = ()) -> None:
        if isinstance(names, str):
            raise UsageError(f"leave is the text {names!r}; pass a collection of names of norms, [{names!r}]")
        if not isinstance(names, Collection) or not all(isinstance(name, str) for name in names):
            raise UsageError("leave is no collection of names; pass those of norms, as the report gives them")
        self._names = frozenset(names)
        self._met: set[str] = set()

    def __call__(self, _: Plan, change: Change) -> Code | None:
        """Why a move or merge is not to be made."""
        names = self._names.intersection(change.names)
        self._met |= names
        return Code.ASKED if names else None

    def below(self, path: str) -> Mapping[str, Code]:
        """The names below the module `path`, relative to it."""
        prefix = f"{path}." if path else ""
        return {name.removeprefix(prefix): Code.ASKED for name in self._names if name.startswith(prefix)}

    def check(self, report: Report) -> None:
        """Raises a UsageError for names that the model does not have."""
        known = self._met.union(report.names, (left.norm for left in report.refused))
        for name in sorted(self._names - known):
            near = ", ".join(difflib.get_close_matches(name, known, n=3, cutoff=0.4)) or "none is near"
            raise UsageError(
                f"leave names {name!r}, which is no norm that {report.model} executes; nearest: {near}"
            )
