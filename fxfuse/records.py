"""What became of every norm, and how two models compare: the records that are returned."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from fxfuse.refusals import Code
from fxfuse.verdict import Comparison

SCHEMA = 4


@dataclass(frozen=True)
class Fold:
    """A norm that is gone.

    Attributes:
        norm: its qualified name.
        into: qualified names of the operators that absorbed it.
        direction: "backward" (into operators before it), "forward" (into operators after it) or "merged"
            (with the operators beside it, into one).
        where: the line of code that calls it, "net.py:31 in Net.forward"; empty if that is not known.
        error: relative L2 distance of what the folded operators give from what the operators and the norm
            of the source gave, in float64, on a small random input that is zero in all but a few channels;
            None where that was not measured.
    """

    norm: str
    into: tuple[str, ...]
    direction: Literal["backward", "forward", "merged"]
    where: str = ""
    error: float | None = None

    def __str__(self) -> str:
        where = "" if self.direction == "backward" else f" ({self.direction})"
        return f"{self.norm} -> {', '.join(self.into)}{where}"


@dataclass(frozen=True)
class Merged:
    """Linear operators that have become one: parallel branches, or some in a row.

    Attributes:
        name: qualified name of the operator that stays, with another weight and bias.
        into: the name that it has in the result: another one where other calls share its weight.
        operators: qualified names of the operators and poolings that are gone; an identity has none.
        where: the line of code of the last of them, as in `Fold`.
        error: relative L2 distance of what the operator gives from what those of the source gave, in float64,
            on a small random input; None where that was not measured.
    """

    name: str
    into: str
    operators: tuple[str, ...]
    where: str = ""
    error: float | None = None

    def __str__(self) -> str:
        return f"{', '.join(self.operators) or 'identity'} -> {self.into}"


@dataclass(frozen=True)
class Apart:
    """Linear branches on one value whose sum is not one operator.

    Attributes:
        branches: what each of them is: qualified names of its operators and poolings, or "identity".
        code, reason, hint: why they stay several, as in `Refusal`.
        where: the line of code that adds them up; empty if that is not known.
    """

    branches: tuple[str, ...]
    code: str
    reason: str
    hint: str
    where: str = ""

    @classmethod
    def because(cls, branches: tuple[str, ...], code: Code, detail: str, where: str) -> Apart:
        """The branches that stay for the reason of `code`."""
        return cls(branches, code.value.code, code.reason(detail), code.value.hint, where)

    def __str__(self) -> str:
        return f"{' + '.join(self.branches)}  {self.code}: {self.reason} ({self.hint})"


@dataclass(frozen=True)
class Refusal:
    """A norm that is left.

    Attributes:
        norm: its qualified name.
        code: the documented code of the reason, "FXF101" for example.
        reason: what stands in the way, in words, with the names of those concerned.
        hint: what can be done.
        where: the line of code that calls it, or that cannot be traced; empty if that is not known.
    """

    norm: str
    code: str
    reason: str
    hint: str
    where: str = ""

    @classmethod
    def because(cls, norm: str, code: Code, detail: str = "", where: str = "") -> Refusal:
        """The refusal of `norm` with the reason and hint of `code`."""
        return cls(norm, code.value.code, code.reason(detail), code.value.hint, where)


@dataclass(frozen=True)
class Report:
    """What became of every norm that a model executes.

    Attributes:
        model: class name of the source.
        folded: a record for each norm that is gone; a norm that is called twice counts twice.
        refused: a record for each norm that is left.
        constants: a record for each multiplication or addition of a constant, such as a layer scale, that
            is gone too; in place of a norm it has the name of the operation in the traced graph.
        merged: a record for each operator that does what several did before.
        apart: a record for each sum of linear branches on one value that stay several operators.
        verification: the comparison with the source on the example inputs; None without them.
        notes: what else the reader should know, such as that numbers were not checked.
    """

    model: str
    folded: tuple[Fold, ...]
    refused: tuple[Refusal, ...]
    constants: tuple[Fold, ...] = ()
    merged: tuple[Merged, ...] = ()
    apart: tuple[Apart, ...] = ()
    verification: Comparison | None = None
    notes: tuple[str, ...] = ()

    @property
    def norms(self) -> int:
        """How many norms the source executes."""
        return len(self.folded) + len(self.refused)

    @property
    def names(self) -> list[str]:
        """What ``leave`` can name: all that is gone, and what was merged by the operator that stays."""
        folds = [fold.norm for fold in (*self.folded, *self.constants)]
        return [*dict.fromkeys([*folds, *(merged.name for merged in self.merged)])]

    @property
    def summary(self) -> str:
        """How many norms are gone, in words, and how many operators do what several did."""
        folded = f"{len(self.folded)} of {self.norms} norms folded"
        several = len(self.merged) > 1
        merged = (
            f", {len(self.merged)} operator{'s do' if several else ' does'} what several did"
            if self.merged
            else ""
        )
        return (folded if self.norms else "there are no norms to fold") + merged

    def to_dict(self) -> dict[str, Any]:
        """The whole report as JSON values; key ``schema`` is the version of their arrangement."""
        verification = None if self.verification is None else self.verification.to_dict()
        return {"schema": SCHEMA, "norms": self.norms, **asdict(self), "verification": verification}

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Report:
        """The report that `to_dict` wrote."""
        verification = record["verification"]
        folded, constants = (
            tuple(Fold(**{**fold, "into": tuple(fold["into"])}) for fold in record[kind])
            for kind in ("folded", "constants")
        )
        merged = (Merged(**{**each, "operators": tuple(each["operators"])}) for each in record["merged"])
        apart = (Apart(**{**each, "branches": tuple(each["branches"])}) for each in record["apart"])
        return cls(
            record["model"],
            folded,
            tuple(Refusal(**refusal) for refusal in record["refused"]),
            constants,
            tuple(merged),
            tuple(apart),
            None if verification is None else Comparison.from_dict(verification),
            tuple(record["notes"]),
        )

    def to_json(self) -> str:
        """`to_dict` as text; ``report.schema.json``, in this package, describes every field."""
        return json.dumps(self.to_dict(), indent=2, allow_nan=False)

    def __str__(self) -> str:
        lines = [f"{self.model}: {self.summary}"]
        lines += [f"  folded  {fold}" for fold in self.folded]
        lines += [f"  also    {fold}" for fold in self.constants]
        lines += [f"  merged  {each}" for each in self.merged]
        lines += [f"  apart   {each}" for each in self.apart]
        lines += [f"  left    {left.norm}  {left.code}: {left.reason} ({left.hint})" for left in self.refused]
        if self.verification is not None:
            lines.append(f"  verified: {self.verification}")
        return "\n".join([*lines, *(f"  note    {note}" for note in self.notes)])
