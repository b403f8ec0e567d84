"""What became of every norm: the records that fuse and explain return."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass
from typing import Any, Literal

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
        notes: what else the reader should know, such as that numbers were not checked.
    """

    model: str
    norms: int
    folded: tuple[Fold, ...]
    refused: tuple[Refusal, ...]
    notes: tuple[str, ...] = ()

    def to_json(self) -> str:
        """The whole report as a JSON object; key ``schema`` is its version."""
        return json.dumps({"schema": SCHEMA, **asdict(self)}, indent=2)

    @classmethod
    def from_json(cls, text: str) -> Report:
        """The report that `to_json` wrote."""
        record: dict[str, Any] = json.loads(text)
        return cls(
            record["model"],
            record["norms"],
            tuple(Fold(fold["norm"], tuple(fold["into"]), fold["direction"]) for fold in record["folded"]),
            tuple(Refusal(**refusal) for refusal in record["refused"]),
            tuple(record["notes"]),
        )

    def __str__(self) -> str:
        lines = [f"{self.model}: {len(self.folded)} of {self.norms} norms folded"]
        lines += [f"  folded  {fold.norm} -> {', '.join(fold.into)}" for fold in self.folded]
        lines += [f"  left    {left.norm}  {left.code}: {left.reason} ({left.hint})" for left in self.refused]
        return "\n".join([*lines, *(f"  note    {note}" for note in self.notes)])
