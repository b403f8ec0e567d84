"""Reports and comparisons for people, on a terminal."""

from __future__ import annotations

from itertools import groupby

from rich.console import Console, Group, RenderableType
from rich.markdown import Markdown
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from fxfuse.demo import Demonstration
from fxfuse.records import Refusal, Report
from fxfuse.verdict import Comparison


def headline(model: str, weights: str) -> RenderableType:
    """Which model it is, and what its weights are."""
    return Text.assemble((model, "bold"), f": {weights}")


def report_view(report: Report) -> RenderableType:
    """A table of all norms, those that are left first, and a line that sums up."""
    parts: list[RenderableType] = []
    if report.norms:
        table = Table(
            "norm", "outcome", "where, or why not", title=escape(report.model), title_justify="left"
        )
        for code, group in groupby(sorted(report.refused, key=_code), key=_code):
            table.add_section()
            for number, left in enumerate(group):
                why = (
                    escape(left.reason)
                    if number
                    else f"{escape(left.reason)}\n[dim]{escape(left.hint)}[/dim]"
                )
                table.add_row(escape(left.norm), f"[yellow]left {code}[/yellow]", why)
        table.add_section()
        for fold in report.folded:
            after = " [dim](after it)[/dim]" if fold.direction == "forward" else ""
            into = f"into {escape(', '.join(fold.into))}{after}"
            table.add_row(escape(fold.norm), "[green]folded[/green]", into)
        parts.append(table)
    parts.append(Text(f"{len(report.folded)} of {report.norms} norms folded", style="bold"))
    if report.constants:
        parts.append(Text(f"{len(report.constants)} multiplications and additions of constants folded too"))
    parts += [Text(f"note: {note}") for note in report.notes]
    if report.refused:
        parts.append(Text(f"fxfuse explain {min(map(_code, report.refused))} says more", style="dim"))
    return Group(*parts)


def _code(refusal: Refusal) -> str:
    return refusal.code


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


def show(view: RenderableType) -> None:
    """Prints `view` on stdout; as wide as it needs to be where that is no terminal."""
    console = Console()
    (console if console.is_terminal else Console(width=160)).print(view)


def show_markdown(text: str) -> None:
    """Prints `text` on stdout: set on a terminal, as it is anywhere else."""
    console = Console()
    if console.is_terminal:
        console.print(Markdown(text, code_theme="ansi_dark"))
    else:
        print(text.rstrip())
