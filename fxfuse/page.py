"""The report as one HTML file that needs nothing else: no network, no other file.

The template escapes everything that it is given, and shows what is not printed but obeyed. Scripts and
styles run only if they are the page's own: it names their hashes in its Content-Security-Policy.
"""

from __future__ import annotations

import base64
import hashlib
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import jinja2
import torch
from markupsafe import Markup, escape

from fxfuse._version import __version__
from fxfuse.drawing import Drawing, Row
from fxfuse.picture import ROW, picture
from fxfuse.records import Fold, Refusal, Report
from fxfuse.summary import Summary
from fxfuse.tree import owners
from fxfuse.verdict import Comparison
from fxfuse.visible import visible

Outcome = Literal["folded", "left", "constant"]
_FILES = Path(__file__).parent


@dataclass(frozen=True)
class Subject:
    """The model: what the user calls it, and where its weights come from, in words."""

    model: str
    weights: str


@dataclass(frozen=True)
class Entry:
    """A row of the table of norms.

    Attributes:
        outcome: "constant" is arithmetic with a constant that was folded.
        record: what became of it.
        rows: where it is drawn.
    """

    outcome: Outcome
    record: Fold | Refusal
    rows: tuple[int, ...]


def page(
    subject: Subject,
    report: Report,
    summaries: tuple[Summary, Summary],
    drawing: Drawing | None,
) -> str:
    """The report for people.

    Args:
        subject: the model.
        report: what became of its norms.
        summaries: its numbers before and after.
        drawing: its graphs; None if it has none, which the notes of the report explain.
    """
    environment = jinja2.Environment(
        loader=jinja2.FileSystemLoader(_FILES),
        autoescape=True,
        finalize=lambda value: visible(value) if type(value) is str else value,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters["breakable"] = _breakable
    style, script = (Markup((_FILES / name).read_text(encoding="utf-8")) for name in ("page.css", "page.js"))
    rows = () if drawing is None else drawing.rows
    entries = _entries(report, rows)
    return environment.get_template("page.html").render(
        subject=subject,
        report=report,
        verdict=_verdict(report.verification),
        numbers=_numbers(*summaries),
        is_run=summaries[0].flops is not None,
        entries=entries,
        drawn={row.name: number for number, row in reversed([*enumerate(rows)])},
        links={row: number for number, entry in enumerate(entries, 1) for row in entry.rows},
        codes=Counter(refusal.code for refusal in report.refused),
        states={row.state for row in rows},
        picture=None if drawing is None else picture(drawing),
        row_height=ROW,
        style=style,
        script=script,
        policy=_policy(style, script),
        is_error_measured=any(fold.error is not None for fold in report.folded),
        versions=f"fxfuse {__version__}, torch {torch.__version__}",
    )


def _breakable(name: str) -> Markup:
    """A name that may go on in the next line behind a dot or a slash."""
    return escape(visible(name)).replace(".", Markup(".<wbr>")).replace("/", Markup("/<wbr>"))


def _policy(style: str, script: str) -> str:
    sources = {"default-src": "'none'", "style-src": _hash(style), "script-src": _hash(script)}
    return "; ".join(f"{kind} {source}" for kind, source in sources.items()) + "; form-action 'none'"


def _hash(text: str) -> str:
    return f"'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'"


def _verdict(comparison: Comparison | None) -> tuple[str, str]:
    """A word for its colour, and the sentence."""
    if comparison is None:
        return "doubtful", "Not verified: the two models were not run, since no input of the model is known"
    if not comparison.ok:
        return "wrong", "Not equal: the folded model computes something else"
    if not comparison.conclusive:
        return "doubtful", "Not conclusive: no difference was seen, but a mistake might not have been seen"
    return "right", "Verified: both models compute the same, but for rounding"


def _numbers(before: Summary, after: Summary) -> list[tuple[str, str, str, str]]:
    """Label, before, after and change of every number of a summary."""
    return [
        ("Batch norms executed", *_pair(before.norms, after.norms, _count)),
        ("Parameters", *_pair(before.parameters, after.parameters, _count)),
        ("FLOPs of one run", *_pair(before.flops, after.flops, _count)),
        ("Memory of parameters and buffers", *_pair(before.mebibytes, after.mebibytes, _memory)),
    ]


def _pair(before: float | None, after: float | None, written: Callable[[float], str]) -> tuple[str, str, str]:
    if before is None or after is None:
        return "not measured", "not measured", ""
    if before == after:
        return written(before), written(after), "none"
    change = f"{100 * (after - before) / before:+.2f} %" if before else ""
    return written(before), written(after), change.replace("-", "−")


def _count(number: float) -> str:
    return f"{number:,}"


def _memory(mebibytes: float) -> str:
    return f"{mebibytes:,.2f} MiB" if mebibytes >= 1 else f"{1024 * mebibytes:,.2f} KiB"


def _entries(report: Report, rows: Sequence[Row]) -> list[Entry]:
    """All records, in the order of execution as far as they are drawn."""
    named: dict[str, list[int]] = defaultdict(list)
    for number, row in enumerate(rows):
        named[row.name].append(number)
    groups: dict[tuple[Outcome, str], list[Fold | Refusal]] = defaultdict(list)
    for fold in report.folded:
        groups["folded", fold.norm].append(fold)
    for fold in report.constants:
        groups["constant", fold.norm].append(fold)
    for refusal in report.refused:
        groups["left", refusal.norm].append(refusal)
    entries = []
    for (outcome, name), records in groups.items():
        # A norm that is called several times has as many records, and each of these its share of the rows.
        found = next((named[each] for each in (name, *owners(name)) if each in named), [])
        places = [row for row in found if (rows[row].state == "left") == (outcome == "left")] or found
        for number, record in enumerate(records):
            own = slice(*(each * len(places) // len(records) for each in (number, number + 1)))
            entries.append(Entry(outcome, record, tuple(places[own] or places[:1])))
    return sorted(entries, key=lambda entry: entry.rows or (len(rows),))
