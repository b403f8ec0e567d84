"""How two models compare: the records that ``verify`` returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from fxfuse.errors import VerificationError

INCONCLUSIVE = "inconclusive:"
"""How a note begins that says why a mistake could not have been seen."""


@dataclass(frozen=True)
class Worst:
    """The element that is furthest from what it should be.

    Attributes:
        output: which output, as an index into the model's result: "" for a lone tensor, "['logits']".
        index: position in that output.
        reference, candidate: the two values.
        allowed: the difference up to which the two count as equal.
    """

    output: str
    index: tuple[int, ...]
    reference: float
    candidate: float
    allowed: float

    @property
    def share(self) -> float:
        """The difference relative to what is allowed; NaN counts as infinite."""
        difference = abs(self.reference - self.candidate)
        if math.isnan(difference) or (difference and not self.allowed):
            return math.inf
        return difference / self.allowed if difference else 0.0

    def __str__(self) -> str:
        place = f"output{self.output}[{', '.join(map(str, self.index))}]"
        return (
            f"{place}: {self.reference:.9g} and {self.candidate:.9g}, allowed difference {self.allowed:.2g}"
        )


@dataclass(frozen=True)
class Agreement:
    """Whether two models are the same function, rounding aside: both have run in float64.

    Attributes:
        ok: whether what they differ by is explained.
        output: the output in which it is explained least.
        difference: the largest difference of an element of it, relative to its largest magnitude.
        allowed: what the rounding of the candidate's weights can do to it, relative likewise.
    """

    ok: bool
    output: str
    difference: float
    allowed: float

    def __str__(self) -> str:
        apart = f"{self.difference:.2g} of the largest value apart, {self.allowed:.2g} is rounding at most"
        return f"the same function, {apart}" if self.ok else f"another function, output{self.output} {apart}"


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What comparing two models brought.

    Attributes:
        ok: whether they agree, rounding aside.
        conclusive: whether a mistake could have been seen at all; `notes` says why not.
        max_abs: largest absolute difference of an element.
        max_rel: largest difference, relative to the largest magnitude in its output.
        reference_error, candidate_error: relative L2 distance of each model from a float64 run of the
            reference; nan where that run was not possible.
        worst: the element that is furthest beyond, or nearest to, what is allowed; None without numbers.
        notes: reasons and remarks, one sentence each.
        algebra: whether they are the same function, with the candidate's weights as they are; None where
            that could not be measured.
        refolded: the same for the source, folded once more in float64, where no weight is rounded; None if
            that was not done.
        ulps: how many elements of the outputs are how many units in the last place apart: entry 0 counts
            those that are equal, entry i those that are 2^(i-1) to 2^i - 1 apart.
        top1: the share of rows of a classifier's output, (batch, classes), in which the two put the same
            class first, on the first of the inputs; None for other outputs.
        inputs: what the models were run on.
        tolerances: those that were given, in words, and judge alone then; empty without.
    """

    ok: bool
    conclusive: bool
    max_abs: float = math.nan
    max_rel: float = math.nan
    reference_error: float = math.nan
    candidate_error: float = math.nan
    worst: Worst | None = None
    notes: tuple[str, ...] = ()
    algebra: Agreement | None = None
    refolded: Agreement | None = None
    ulps: tuple[int, ...] = ()
    top1: float | None = None
    inputs: tuple[str, ...] = ()
    tolerances: str = ""

    @classmethod
    def unmeasured(cls, note: str, *, ok: bool) -> Comparison:
        """One without numbers, for a reason."""
        return cls(ok=ok, conclusive=not ok, notes=(note,))

    def to_dict(self) -> dict[str, Any]:
        """The comparison as JSON values; numbers that could not be measured are None."""
        record = asdict(self)
        for values in (record, *(record[name] or {} for name in ("worst", "algebra", "refolded"))):
            for name, value in values.items():
                values[name] = None if isinstance(value, float) and not math.isfinite(value) else value
        return record

    @classmethod
    def from_dict(cls, record: Mapping[str, Any]) -> Comparison:
        """The comparison that `to_dict` wrote."""
        values = dict(record)
        for name in ("max_abs", "max_rel", "reference_error", "candidate_error"):
            values[name] = math.nan if record[name] is None else record[name]
        for name in ("notes", "ulps", "inputs"):
            values[name] = tuple(record[name])
        for name in ("algebra", "refolded"):
            values[name] = record[name] and Agreement(**_numbers(record[name]))
        worst = record["worst"]
        values["worst"] = worst and Worst(**{**_numbers(worst), "index": tuple(worst["index"])})
        return cls(**values)

    def raise_if_failed(self) -> None:
        """Raises a VerificationError if the models do not agree."""
        if not self.ok:
            raise VerificationError(str(self))

    def __str__(self) -> str:
        """The verdict, and below it algebra, rounding and what else there is to know, a line each."""
        verdict = "equal but for rounding" if self.ok else "NOT equal"
        if self.tolerances:
            verdict = f"{'within' if self.ok else 'NOT within'} the given tolerances, {self.tolerances}"
        lines = [f"{verdict}{'' if self.conclusive else ', but not conclusive'}"]
        if self.worst is not None and not self.tolerances:
            told = "not measured" if self.algebra is None else f"in float64 {self.algebra}"
            lines.append(f"  algebra   {told}")
        if self.refolded is not None:
            lines.append(f"            folded once more in float64: {self.refolded}")
        if self.worst is not None:
            judged = "is rounding" if self.ok and not self.tolerances else "is the largest difference"
            lines.append(f"  numbers   {self.max_abs:.2g} {judged}, {self.max_rel:.2g} of the largest value")
            lines.append(f"            nearest to its limit {self.worst}")
        if not math.isnan(self.reference_error):
            errors = f"reference {self.reference_error:.2g}, candidate {self.candidate_error:.2g}"
            lines.append(f"            error against float64: {errors}")
        if self.ulps:
            lines.append(f"            units in the last place: {_histogram(self.ulps)}")
        if self.top1 is not None:
            lines.append(f"  top-1     the same class in {100 * self.top1:.4g} %")
        lines += [f"  {'inputs' if number == 0 else '':10}{each}" for number, each in enumerate(self.inputs)]
        return "\n".join([*lines, *(f"  note      {note}" for note in self.notes)])


def _numbers(record: Mapping[str, Any]) -> dict[str, Any]:
    return {key: math.nan if value is None else value for key, value in record.items()}


_BINS = 8  # more than these are put together


def _histogram(counts: tuple[int, ...]) -> str:
    """0: 41 %, 1: 35 %, 2-3: 20 %, ...; what is too rare for a percent is put together."""
    total = sum(counts)
    shown: list[str] = []
    for power, count in enumerate(counts):
        first, last = (power, power) if power < 2 else (2 ** (power - 1), 2**power - 1)
        is_rare = 100 * sum(counts[power:]) < total and power > 1
        if is_rare or len(shown) == _BINS:
            shown.append(f"{first} or more: {100 * sum(counts[power:]) / total:.2g} %")
            break
        if count:
            shown.append(f"{first if first == last else f'{first}-{last}'}: {100 * count / total:.3g} %")
    return ", ".join(shown)
