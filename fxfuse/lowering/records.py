"""What lowering brought."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass
from typing import Any

from fxfuse.verdict import Comparison


@dataclass(frozen=True)
class Timing:
    """How fast an engine was.

    Attributes:
        engine: its name.
        milliseconds: of one call, the median; NaN where it could not run.
        seconds: until it was ready.
        reason: why it could not run, or was not tried.
    """

    engine: str
    milliseconds: float
    seconds: float
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """It as JSON values; what was not measured is None."""
        times = {name: getattr(self, name) for name in ("milliseconds", "seconds")}
        return asdict(self) | {name: None if math.isnan(time) else time for name, time in times.items()}


@dataclass(frozen=True)
class Lowering:
    """What became of a module that was lowered.

    Attributes:
        engine: the name of the engine that runs it.
        reason: why the folded module answers instead, for inputs like the examples; empty if it does not.
        seconds: until it was ready.
        comparison: with the folded module, on the example inputs, of a large batch on the first samples; the
            errors are those against float64.
        timings: what was timed side by side, the folded module among it, the fastest first.
    """

    engine: str
    reason: str = ""
    seconds: float = 0.0
    comparison: Comparison | None = None
    timings: tuple[Timing, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """It as JSON values."""
        comparison = None if self.comparison is None else self.comparison.to_dict()
        return asdict(self) | {"comparison": comparison, "timings": [each.to_dict() for each in self.timings]}

    def __str__(self) -> str:
        lines = [f"engine {self.engine}, ready after {self.seconds:.2g} s"]
        if self.reason:
            lines = [f"the folded module runs as it is, without the engine {self.engine}: {self.reason}"]
        for timing in self.timings:
            told = f"{timing.milliseconds:.3g} ms"
            told += f", ready after {timing.seconds:.2g} s" if timing.seconds else ""
            lines.append(f"  {timing.engine:12}{timing.reason or told}")
        if self.comparison is not None and self.comparison.ok:
            own, folded = self.comparison.candidate_error, self.comparison.reference_error
            lines.append(f"  error against float64 {own:.2g}, of the folded module {folded:.2g}")
        return "\n".join(lines)
