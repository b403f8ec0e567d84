"""Reports and comparisons for people, on a terminal."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

from rich.console import Console, ConsoleOptions, Group, RenderableType
from rich.markdown import Markdown
from rich.markup import escape
from rich.segment import Segment
from rich.table import Table
from rich.text import Text

from fxfuse.demo import Demonstration
from fxfuse.lowering.records import Lowering
from fxfuse.records import Refusal, Report
from fxfuse.verdict import Comparison
from fxfuse.visible import one_line, visible

_PLACES = {"backward": "", "forward": " [dim](after it)[/dim]", "merged": " [dim](beside it)[/dim]"}


def headline(model: str, weights: str) -> RenderableType:
    """Which model it is, and what its weights are."""
    return Text.assemble((one_line(model), "bold"), f": {one_line(weights)}")


def report_view(report: Report) -> RenderableType:
    """A table of all norms, those that are left first, and a line that sums up."""
    parts: list[RenderableType] = []
    if report.norms:
        table = Table(
            "norm", "outcome", "where, or why not", title=_plain(report.model), title_justify="left"
        )
        for code, group in groupby(sorted(report.refused, key=_code), key=_code):
            table.add_section()
            for number, left in enumerate(group):
                why = (
                    _plain(left.reason)
                    if number
                    else f"{_plain(left.reason)}\n[dim]{_plain(left.hint)}[/dim]"
                )
                table.add_row(_plain(left.norm), f"[yellow]left {code}[/yellow]", why)
        table.add_section()
        for fold in report.folded:
            after = _PLACES[fold.direction]
            into = f"into {_plain(', '.join(fold.into))}{after}"
            table.add_row(_plain(fold.norm), "[green]folded[/green]", into)
        parts.append(table)
    if report.merged:
        table = Table("operators", "merged into", title="Branches", title_justify="left")
        for merged in report.merged:
            table.add_row(_plain(", ".join(merged.operators) or "identity"), _plain(merged.into))
        parts.append(table)
    if report.apart:
        table = Table("branches", "outcome", "why", title="Branches that stay", title_justify="left")
        for apart in report.apart:
            why = f"{_plain(apart.reason)}\n[dim]{_plain(apart.hint)}[/dim]"
            table.add_row(_plain(" + ".join(apart.branches)), f"[yellow]apart {apart.code}[/yellow]", why)
        parts.append(table)
    parts.append(Text(report.summary, style="bold"))
    if report.constants:
        parts.append(Text(f"{len(report.constants)} multiplications and additions of constants folded too"))
    parts += [Text(f"note: {one_line(' '.join(note.split()))}") for note in report.notes]
    codes = [*(left.code for left in report.refused), *(apart.code for apart in report.apart)]
    if codes:
        parts.append(Text(f"fxfuse explain {min(codes)} says more", style="dim"))
    return Group(*parts)


def _plain(text: str) -> str:
    """Somebody's text as one line of rich markup that has no effect."""
    return escape(one_line(text))


def _code(refusal: Refusal) -> str:
    return refusal.code


def lowering_view(lowering: Lowering) -> RenderableType:
    """How fast the folded model is on an engine, beside others."""
    text = Text(visible(str(replace(lowering, timings=()))))
    if not lowering.timings:
        return text
    table = Table("runs on", "one call", "ready after", title="Lowered", title_justify="left")
    for timing in lowering.timings:
        if timing.reason:
            table.add_row(timing.engine, "[yellow]not run[/yellow]", _plain(timing.reason))
        else:
            ready = f"{timing.seconds:.2g} s" if timing.seconds else ""
            table.add_row(timing.engine, f"{timing.milliseconds:.3g} ms", ready)
    return Group(table, text)


def comparison_view(comparison: Comparison) -> RenderableType:
    """The verdict and its numbers."""
    style = "bold red" if not comparison.ok else "bold green" if comparison.conclusive else "bold yellow"
    verdict, _, rest = str(comparison).partition("\n")
    return Text.assemble(("compared: ", "bold"), (verdict, style), "\n", rest)


def demonstration_view(shown: Demonstration) -> RenderableType:
    """Before and after, side by side."""
    before, after = shown.before, shown.after
    table = Table(
        "", "before", "after", title="EfficientNet-Lite0 looks at a photograph", title_justify="left"
    )
    for place, (left, right) in enumerate(zip(before.top, after.top, strict=True), start=1):
        table.add_row(
            f"guess {place}", *(f"{probability:.4f}  {name}" for name, probability in (left, right))
        )
    table.add_section()
    table.add_row("norms executed", str(before.norms), str(after.norms))
    errors = (shown.comparison.reference_error, shown.comparison.candidate_error)
    table.add_row("error against float64", *(f"{error:.2e}" for error in errors))
    table.add_row(
        "time for one image, median", *(f"{1000 * look.seconds:.1f} ms" for look in (before, after))
    )
    return Group(table, comparison_view(shown.comparison))


class _Terminal(Console):
    """A console that obeys rich, and no character of a text; it makes no pictures of :names:."""

    def __init__(self, width: int | None = None) -> None:
        super().__init__(width=width, emoji=False)

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
        """The segments of `renderable`, their texts made visible."""
        for segment in super().render(renderable, options):
            yield segment if segment.control else Segment(visible(segment.text), segment.style)


def show(view: RenderableType) -> None:
    """Prints `view` on stdout; as wide as it needs to be where that is no terminal."""
    console = _Terminal()
    (console if console.is_terminal else _Terminal(width=160)).print(view)


def show_markdown(text: str) -> None:
    """Prints `text` on stdout: set on a terminal, as it is anywhere else."""
    console = _Terminal()
    if console.is_terminal:
        console.print(Markdown(text, code_theme="ansi_dark"))
    else:
        print(text.rstrip())
