"""The command line: ``fxfuse fuse|explain|verify|bisect|list|demo``.

Results go to stdout, progress to stderr. Exit codes: 0 done, 1 verification failed, 2 wrong usage, 130
interrupted.
"""

from __future__ import annotations

import sys
import warnings
from pathlib import Path
from typing import Any

import click
from rich.text import Text
from torch import nn
from torch.export import ExportedProgram

import fxfuse
from fxfuse import demo as demonstration
from fxfuse import zoo
from fxfuse.criteria import CommandPasses, Within
from fxfuse.errors import UsageError
from fxfuse.explanations import explanation, is_code
from fxfuse.files import written
from fxfuse.lowering.engines import ENGINES
from fxfuse.lowering.lower import timed
from fxfuse.page import Subject
from fxfuse.pipeline import folded
from fxfuse.programs import as_program, save
from fxfuse.publish import publish
from fxfuse.records import Report
from fxfuse.render import (
    comparison_view,
    demonstration_view,
    headline,
    lowering_view,
    report_view,
    show,
    show_markdown,
)
from fxfuse.reproduction import reproduction
from fxfuse.shell import (
    Asked,
    Group,
    again,
    complain,
    file_option,
    progress,
    reported,
    takes_model,
    why_no_input,
    write_json,
)
from fxfuse.tree import as_module
from fxfuse.visible import one_line

_json = file_option("--json", "json_file", help="Write everything as JSON; - for stdout.")
_html = file_option("--html", "html_file", help="Write the report for people: one HTML file.")
_dot = file_option("--dot", "dot_file", help="Write the graphs, before and after, in DOT.")


@click.group(cls=Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fxfuse.__version__)
def main() -> None:
    """Takes the batch normalisation out of a trained PyTorch network."""
    warnings.showwarning = lambda message, *_: complain(f"Warning: {message}")


@main.command(epilog="Example: fxfuse fuse timm:regnety_002 -o folded.pt2")
@takes_model
@file_option("-o", "--output", help="Write the folded model as a .pt2 file.")
@click.option("--lower", "lowers", is_flag=True, help="Lower the folded model to fused kernels and time it.")
@click.option(
    "--engine",
    type=click.Choice([*ENGINES, "auto"]),
    help="Whose kernels, with --lower; torch by default.",
)
@_json
@_html
@_dot
@reported
def fuse(
    asked: Asked,
    output: Path | None,
    lowers: bool,
    engine: str | None,
    json_file: Path | None,
    html_file: Path | None,
    dot_file: Path | None,
) -> None:
    """Folds the norms of MODEL, verifies the result and says what was done.

    With --lower it also tells how fast the result is on the kernels of an engine; what -o writes is the
    folded model all the same.
    """
    asked.check_outputs(output, json_file, html_file, dot_file)
    if engine and not lowers:
        raise UsageError(f"--engine {engine} says where to lower to; add --lower")
    if output is not None and output.suffix.lower() != ".pt2":
        raise UsageError(f"cannot write {output}: an exported program is a .pt2 file; call it that")
    with progress(3 + (output is not None) + lowers) as step:
        loaded, inputs = asked.load(step)
        if lowers:
            asked.needed(inputs, "nothing can be compiled or timed")
        if output is not None and isinstance(loaded.model, nn.Module):
            asked.needed(inputs, f"torch.export cannot run it to write {output}")
        step("folding and verifying")
        fused, report = _folded(asked, loaded, inputs, html_file, dot_file)
        if output is not None:
            step(f"writing {output}")
            save(as_program(fused, inputs or ()), output)
        lowering = None
        if lowers:
            step("lowering and timing")
            lowering = timed(as_module(fused), inputs or (), engine or "torch")
        step("done")
    told = {"model": asked.spec, "weights": loaded.weights, "output": output and str(output)}
    records = {"report": report.to_dict(), "lowering": lowering and lowering.to_dict()}
    if write_json(told | records, json_file):
        return
    show(headline(asked.spec, loaded.weights))
    show(report_view(report))
    if report.verification is None:
        show(f"not verified: {why_no_input(loaded.model)}")
    else:
        show(comparison_view(report.verification))
    if output is not None:
        size = output.stat().st_size / 2**20
        taken = "the shapes of the source" if isinstance(fused, ExportedProgram) else "any batch size"
        show(headline(str(output), f"written, {size:.1f} MiB, for {taken}"))
    _tell_written(html_file, dot_file)
    if lowering is not None:
        show(lowering_view(lowering))
    click.echo(again())


def _folded(
    asked: Asked,
    loaded: zoo.Loaded,
    inputs: tuple[Any, ...] | None,
    html_file: Path | None,
    dot_file: Path | None,
) -> tuple[nn.Module | ExportedProgram, Report]:
    """Folds, and writes what people look at, also if the verification fails."""
    fused = folded(loaded.model, example_inputs=inputs)
    report = fxfuse.report(fused)
    if html_file or dot_file:
        subject = Subject(asked.spec, loaded.weights)
        publish(subject, loaded.model, fused, inputs, html_file=html_file, dot_file=dot_file)
    if report.verification is not None:
        report.verification.raise_if_failed()
    return fused, report


def _tell_written(*files: Path | None) -> None:
    for file in files:
        if file is not None:
            show(headline(str(file), "written"))


@main.command(epilog="Examples: fxfuse explain torchvision:densenet121; fxfuse explain FXF102")
@takes_model
@_json
@_html
@_dot
@reported
def explain(asked: Asked, json_file: Path | None, html_file: Path | None, dot_file: Path | None) -> None:
    """Says what would become of every norm of MODEL, and changes nothing.

    For --html and --dot it is folded, and verified if an input is known.

    A refusal code in place of MODEL, as FXF102, is explained with an example; FXF lists all codes.
    """
    if is_code(asked.spec):
        if asked.shapes or asked.weights or json_file or html_file or dot_file:
            raise UsageError(
                f"{asked.spec} is a code and no model, to which --input, --weights, --json, --html, --dot "
                "belong; leave them out"
            )
        show_markdown(explanation(asked.spec))
        return
    asked.check_outputs(json_file, html_file, dot_file)
    with progress(3) as step:
        loaded, inputs = asked.load(step)
        step("matching")
        if html_file or dot_file:
            _, report = _folded(asked, loaded, inputs, html_file, dot_file)
        else:
            report = fxfuse.explain(loaded.model, example_inputs=inputs)
        step("done")
    told = {"model": asked.spec, "weights": loaded.weights, "report": report.to_dict()}
    if not write_json(told, json_file):
        show(headline(asked.spec, loaded.weights))
        show(report_view(report))
        _tell_written(html_file, dot_file)
        click.echo(again())


@main.command(epilog="Example: fxfuse verify model.pt2 folded.pt2")
@takes_model
@click.argument("candidate", required=False)
@_json
@reported
def verify(asked: Asked, candidate: str | None, json_file: Path | None) -> None:
    """Compares MODEL with CANDIDATE, or with what fuse makes of it, on random inputs."""
    asked.check_outputs(json_file, kept=candidate)
    with progress(3) as step:
        loaded, known = asked.load(step)
        inputs = asked.needed(known, "nothing can be compared")
        if not isinstance(loaded.model, ExportedProgram):  # which may have inputs of its own
            inputs = tuple(value.shape for value in inputs)
        step("folding and comparing" if candidate is None else f"loading {candidate}")
        if candidate is None:
            report = fxfuse.report(folded(loaded.model, example_inputs=inputs))
            comparison, compared = report.verification, report.summary
        else:
            other = zoo.load(candidate, seed=asked.seed)
            step("comparing")
            comparison = fxfuse.verify(loaded.model, other.model, inputs, seed=asked.seed)
            compared = f"{candidate}: {other.weights}"
        assert comparison is not None
    told = {"model": asked.spec, "candidate": candidate, "weights": loaded.weights}
    if not write_json(told | {"comparison": comparison.to_dict()}, json_file):
        show(headline(asked.spec, loaded.weights))
        show(headline("compared with", compared))
        show(comparison_view(comparison))
        click.echo(again())
    sys.exit(0 if comparison.ok else 1)


@main.command(epilog="Example: fxfuse bisect timm:regnety_002 --tolerance 1e-4")
@takes_model
@click.option(
    "--check",
    "command",
    help="A command that exits with 0 if a folded model is right: a .pt2 file, {} or $FXFUSE_MODEL in it.",
)
@click.option("--tolerance", type=float, help="The largest difference of an output that is right.")
@file_option(
    "--state",
    default="fxfuse-bisect.json",
    show_default=True,
    help="Keeps what was found, to go on from there.",
)
@file_option(
    "-o",
    "--output",
    default="fxfuse-bisect.py",
    show_default=True,
    help="The script to write, which shows the failure with the least folds.",
)
@reported
def bisect(asked: Asked, command: str | None, tolerance: float | None, state: Path, output: Path) -> None:
    """Finds the smallest set of folds with which MODEL fails a check.

    Without --check and --tolerance it has to be the same function: what fuse verifies.
    """
    if command is not None and tolerance is not None:
        raise UsageError("--check and --tolerance are two ways to judge a model; use one of them")
    asked.check_outputs(state, output)
    with progress(1) as step:
        loaded, known = asked.load(step)
    inputs = asked.needed(known, "no fold can be judged")
    judge: CommandPasses | Within | None = None
    if command is not None:
        judge = CommandPasses(command, inputs)
    elif tolerance is not None:
        judge = Within(tolerance, loaded.model, inputs)
    found = fxfuse.bisect(
        loaded.model,
        judge,
        example_inputs=inputs,
        state=state,
        progress=lambda folds, checks: complain(f"check {checks + 1}: {folds} folds"),
    )
    show(headline(asked.spec, loaded.weights))
    show(Text(str(found)))
    if found.culprits:
        weights = asked.weights and str(asked.weights)
        loading = f"zoo.load({asked.spec!r}, seed={asked.seed}, weights={weights!r})"
        script = reproduction(loading, asked.shapes, asked.seed, found.culprits, judge)
        with written(output) as part:
            part.write_text(script, encoding="utf-8")
        show(Text(f"fold all but these with fxfuse.fuse(model, leave={list(found.culprits)})"))
        show(Text(f"to see it fail: python {output}"))
    click.echo(again())


@main.command(name="list", epilog="Example: fxfuse list regnety")
@click.argument("pattern", default="")
@reported
def list_models(pattern: str) -> None:
    """Lists the models that torchvision and timm know, or those with PATTERN in their name."""
    found = zoo.names(pattern)
    if not found:
        if not zoo.names(""):
            raise UsageError(
                "torchvision and timm, whose models are listed, are missing: pip install 'fxfuse[zoo]'"
            )
        raise UsageError(f"no model has {pattern!r} in its name; fxfuse list prints all names")
    click.echo("\n".join(map(one_line, found)))


@main.command()
@reported
def demo() -> None:
    """Folds EfficientNet-Lite0 with its ImageNet weights and classifies a photograph before and after."""
    with progress(1) as step:
        step("loading, folding, verifying and timing EfficientNet-Lite0")
        shown = demonstration.demonstrate()
    show(demonstration_view(shown))
