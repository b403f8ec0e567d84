"""What became of every norm: the records that fuse and explain return."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fxfuse.comparison import Comparison
from fxfuse.refusals import Code

SCHEMA = 1


@dataclass(frozen=True)
class Fold:
    """A norm that is gone.

    Attributes:
        norm: its qualified name.
        into: qualified names of the operators that absorbed it.
        direction: "backward" (into operators before it) or "forward" (into operators after it).
    """

    norm: str
    into: tuple[str, ...]
    direction: Literal["backward", "forward"]


@dataclass(frozen=True)
class Refusal:
    """A norm that is left.

    Attributes:
        norm: its qualified name.
        code: the documented code of the reason, "FXF101" for example.
        reason: what stands in the way, in words, with the names of those concerned.
        hint: what can be done.
    """

    norm: str
    code: str
    reason: str
    hint: str

    @classmethod
    def because(cls, norm: str, code: Code, detail: str = "") -> Refusal:
        """The refusal of `norm` with the reason and hint of `code`."""
        text = code.value
        return cls(norm, text.code, f"{text.reason}: {detail}" if detail else text.reason, text.hint)


@dataclass(frozen=True)
class Report:
    """What became of every norm that a model executes.

    Attributes:
        model: class name of the source.
        norms: how many norms the source executes; a norm that is called twice counts twice.
        folded: a record for each norm that is gone.
        refused: a record for each norm that is left. ``norms == len(folded) + len(refused)``.
        verification: the comparison with the source on the example inputs; None without them.
        notes: what else the reader should know, such as that numbers were not checked.
    """

    model: str
    norms: int
    folded: tuple[Fold, ...]
    refused: tuple[Refusal, ...]
    verification: Comparison | None = None
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON values; key ``schema`` is the version of their arrangement."""
        verification = None if self.verification is None else self.verification.to_dict()
        return {"schema": SCHEMA, **asdict(self), "verification": verification}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote."""
        verification = record["verification"]
        return cls(
            record["model"],
            record["norms"],
            tuple(Fold(fold["norm"], tuple(fold["into"]), fold["direction"]) for fold in record["folded"]),
            tuple(Refusal(**refusal) for refusal in record["refused"]),
            None if verification is None else Comparison.from_dict(verification),
            tuple(record["notes"]),
        )

    def to_json(self) -> str:
        """`to_dict` as text."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.folded)} of {self.norms} norms folded"]
        lines += [f"  folded  {fold.norm} -> {', '.join(fold.into)}" for fold in self.folded]
        lines += [f"  left    {left.norm}  {left.code}: {left.reason} ({left.hint})" for left in self.refused]
        if self.verification is not None:
            lines.append(f"  verified: {self.verification}")
        return "\n".join([*lines, *(f"  note    {note}" for note in self.notes)])
