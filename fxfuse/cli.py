"""The command line: ``fxfuse fuse|explain|verify|bisect|list|demo``.

Results go to stdout, progress to stderr. Exit codes: 0 done, 1 verification failed, 2 wrong usage.
"""

from __future__ import annotations

import json
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text
from torch import nn
from torch.export import ExportedProgram

import fxfuse
from fxfuse import demo as demonstration
from fxfuse import zoo
from fxfuse.culprits import Check, CommandPasses, Within
from fxfuse.errors import FxfuseError, UsageError, VerificationError
from fxfuse.explanations import explanation, is_code
from fxfuse.files import check_writable, written
from fxfuse.page import Subject
from fxfuse.programs import as_program, save
from fxfuse.publish import publish
from fxfuse.records import SCHEMA
from fxfuse.render import comparison_view, demonstration_view, headline, report_view, show, show_markdown
from fxfuse.reproduction import reproduction
from fxfuse.visible import one_line, visible

_MODEL_HELP = """

    MODEL is torchvision:NAME, timm:NAME, package.module:factory or a .pt2 file.
    """


class _Shape(click.ParamType["tuple[int, ...]"]):
    """``1,3,224,224`` → (1, 3, 224, 224)."""

    name = "shape"

    def convert(
        self, value: Any, param: click.Parameter | None, ctx: click.Context | None
    ) -> tuple[int, ...]:
        """Parses one shape."""
        if isinstance(value, tuple):
            return value
        sizes = str(value).split(",")
        if not all(size.strip().isdigit() and int(size) > 0 for size in sizes):
            self.fail(f"{value!r} is no shape; write sizes with commas, as in 1,3,224,224", param, ctx)
        return tuple(int(size) for size in sizes)


_input = click.option(
    "--input",
    "shapes",
    type=_Shape(),
    multiple=True,
    help="Shape of an input, as 1,3,224,224; once for each input.",
)
_seed = click.option("--seed", default=0, show_default=True, help="Seed of random weights and inputs.")
_weights = click.option(
    "--weights",
    type=click.Path(path_type=Path),
    help="A .safetensors file, or one of torch.save, with the weights of MODEL.",
)
_json = click.option(
    "--json", "json_file", type=click.Path(path_type=Path), help="Write everything as JSON; - for stdout."
)
_html = click.option(
    "--html", "html_file", type=click.Path(path_type=Path), help="Write the report for people: one HTML file."
)
_dot = click.option(
    "--dot", "dot_file", type=click.Path(path_type=Path), help="Write the graphs, before and after, in DOT."
)


def _complain(message: str) -> None:
    """Prints `message` on stderr; no text of a model or a file in it acts, or passes for a line of ours."""
    click.echo(visible(message).replace("\n", "\n  "), err=True)


def _reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turns fxfuse's errors into a message on stderr and the documented exit codes."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except VerificationError as error:
            _complain(f"Verification failed: {error}")
            sys.exit(1)
        except FxfuseError as error:
            _complain(f"Error: {error}")
            sys.exit(2)

    return run


class _Group(click.Group):
    """Commands whose usage errors may quote anything."""

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise click.UsageError(one_line(error.format_message()), error.ctx) from error


@click.group(cls=_Group, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(fxfuse.__version__)
def main() -> None:
    """Takes the batch normalisation out of a trained PyTorch network."""
    warnings.showwarning = lambda message, *_: _complain(f"Warning: {message}")


@main.command(epilog="Example: fxfuse fuse timm:regnety_002 -o folded.pt2")
@click.argument("model")
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), help="Write the folded model as a .pt2 file."
)
@_input
@_seed
@_weights
@_json
@_html
@_dot
@_reported
def fuse(
    model: str,
    output: Path | None,
    shapes: tuple[Any, ...],
    seed: int,
    weights: Path | None,
    json_file: Path | None,
    html_file: Path | None,
    dot_file: Path | None,
) -> None:
    """Folds the norms of MODEL, verifies the result and says what was done."""
    _check_outputs(output, json_file, html_file, dot_file, kept=(model, weights))
    if output is not None and output.suffix.lower() != ".pt2":
        raise UsageError(f"cannot write {output}: an exported program is a .pt2 file; call it that")
    with _progress(4 if output else 3) as step:
        loaded, inputs = _load(model, shapes, seed, weights, step)
        if output is not None and inputs is None and isinstance(loaded.model, nn.Module):
            raise UsageError(
                f"to write {output}, torch.export has to run {model}, of which no input is known; "
                "say which with --input 1,3,224,224"
            )
        step("folding and verifying")
        fused = fxfuse.fuse(loaded.model, example_inputs=inputs)
        report = fxfuse.report(fused)
        if html_file or dot_file:
            subject = Subject(model, loaded.weights)
            publish(subject, loaded.model, fused, inputs, html_file=html_file, dot_file=dot_file)
        if output is not None:
            step(f"writing {output}")
            save(as_program(fused, inputs or ()), output)
        step("done")
    record = {
        "model": model,
        "weights": loaded.weights,
        "output": output and str(output),
        "report": report.to_dict(),
    }
    if _write_json(record, json_file):
        return
    show(headline(model, loaded.weights))
    show(report_view(report))
    if report.verification is None:
        show(f"not verified: {_why_no_input(loaded.model)}")
    else:
        show(comparison_view(report.verification))
    if output is not None:
        size = output.stat().st_size / 2**20
        taken = "the shapes of the source" if isinstance(fused, ExportedProgram) else "any batch size"
        show(headline(str(output), f"written, {size:.1f} MiB, for {taken}"))


@main.command(epilog="Examples: fxfuse explain torchvision:densenet121; fxfuse explain FXF102")
@click.argument("model")
@_input
@_seed
@_weights
@_json
@_html
@_dot
@_reported
def explain(
    model: str,
    shapes: tuple[Any, ...],
    seed: int,
    weights: Path | None,
    json_file: Path | None,
    html_file: Path | None,
    dot_file: Path | None,
) -> None:
    """Says what would become of every norm of MODEL, and changes nothing.

    For --html and --dot it is folded, and verified if an input is known.

    A refusal code in place of MODEL, as FXF102, is explained with an example; FXF lists all codes.
    """
    if is_code(model):
        if shapes or json_file or weights or html_file or dot_file:
            raise UsageError(
                f"{model} is a code and no model, to which --input, --weights, --json, --html, --dot belong; "
                "leave them out"
            )
        show_markdown(explanation(model))
        return
    _check_outputs(json_file, html_file, dot_file, kept=(model, weights))
    with _progress(3) as step:
        loaded, inputs = _load(model, shapes, seed, weights, step)
        step("matching")
        if html_file or dot_file:
            fused = fxfuse.fuse(loaded.model, example_inputs=inputs)
            report = fxfuse.report(fused)
            subject = Subject(model, loaded.weights)
            publish(subject, loaded.model, fused, inputs, html_file=html_file, dot_file=dot_file)
        else:
            report = fxfuse.explain(loaded.model, example_inputs=inputs)
        step("done")
    if not _write_json({"model": model, "weights": loaded.weights, "report": report.to_dict()}, json_file):
        show(headline(model, loaded.weights))
        show(report_view(report))


@main.command(epilog="Example: fxfuse verify model.pt2 folded.pt2")
@click.argument("model")
@click.argument("candidate", required=False)
@_input
@_seed
@_weights
@_json
@_reported
def verify(
    model: str,
    candidate: str | None,
    shapes: tuple[Any, ...],
    seed: int,
    weights: Path | None,
    json_file: Path | None,
) -> None:
    """Compares MODEL with CANDIDATE, or with what fuse makes of it, on random inputs."""
    _check_outputs(json_file, kept=(model, candidate, weights))
    with _progress(3) as step:
        loaded, inputs = _load(model, shapes, seed, weights, step)
        if inputs is None:
            raise UsageError(
                f"no input is known for {model}, without which nothing can be compared; "
                "say which with --input 1,3,224,224"
            )
        step("folding" if candidate is None else f"loading {candidate}")
        if candidate is None:
            report = fxfuse.report(fxfuse.fuse(loaded.model, example_inputs=inputs))
            comparison, compared = report.verification, report.summary
        else:
            other = zoo.load(candidate, seed=seed)
            step("comparing")
            comparison = fxfuse.verify(loaded.model, other.model, inputs, seed=seed)
            compared = f"{candidate}: {other.weights}"
        assert comparison is not None
    record = {
        "model": model,
        "candidate": candidate,
        "weights": loaded.weights,
        "comparison": comparison.to_dict(),
    }
    if not _write_json(record, json_file):
        show(headline(model, loaded.weights))
        show(headline("compared with", compared))
        show(comparison_view(comparison))
    sys.exit(0 if comparison.ok else 1)


@main.command(epilog="Example: fxfuse bisect timm:regnety_002 --tolerance 1e-4")
@click.argument("model")
@click.option(
    "--check",
    "command",
    help="A command that exits with 0 if the folded model is right: a .pt2 file, {} or $FXFUSE_MODEL in it.",
)
@click.option("--tolerance", type=float, help="The largest difference of an output that is right.")
@click.option(
    "--state",
    type=click.Path(path_type=Path),
    default="fxfuse-bisect.json",
    show_default=True,
    help="Keeps what was found, to go on from there.",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default="fxfuse-bisect.py",
    show_default=True,
    help="The script to write, which shows the failure with the least folds.",
)
@_input
@_seed
@_weights
@_reported
def bisect(
    model: str,
    command: str | None,
    tolerance: float | None,
    state: Path,
    output: Path,
    shapes: tuple[Any, ...],
    seed: int,
    weights: Path | None,
) -> None:
    """Finds the smallest set of folds with which MODEL fails a check.

    Without --check and --tolerance it has to be the same function: what fuse verifies.
    """
    if command is not None and tolerance is not None:
        raise UsageError("--check and --tolerance are two ways to judge a model; use one of them")
    _check_outputs(state, output, kept=(model, weights))
    with _progress(1) as step:
        loaded, inputs = _load(model, shapes, seed, weights, step)
    if inputs is None:
        raise UsageError(f"no input is known for {model}; say which with --input 1,3,224,224")
    judge: Check | None = None
    if command is not None:
        judge = CommandPasses(command, inputs)
    elif tolerance is not None:
        judge = Within(tolerance, loaded.model, inputs)
    found = fxfuse.bisect(
        loaded.model,
        judge,
        example_inputs=inputs,
        state=state,
        progress=lambda folds, checks: _complain(f"check {checks + 1}: {folds} folds"),
    )
    show(headline(model, loaded.weights))
    show(Text(str(found)))
    if found.culprits:
        loading = f"zoo.load({model!r}, seed={seed}, weights={weights and str(weights)!r})"
        with written(output) as part:
            part.write_text(reproduction(loading, shapes, seed, found.culprits, judge), encoding="utf-8")
        show(Text(f"fold all but these with fxfuse.fuse(model, leave={list(found.culprits)})"))
        show(Text(f"to see it fail: python {output}"))


@main.command(name="list", epilog="Example: fxfuse list regnety")
@click.argument("pattern", default="")
@_reported
def list_models(pattern: str) -> None:
    """Lists the models that torchvision and timm know, or those with PATTERN in their name."""
    found = zoo.names(pattern)
    if not found:
        raise UsageError(
            f"no model of torchvision or timm, if they are installed, has {pattern!r} in its name; "
            "fxfuse list prints all names"
        )
    click.echo("\n".join(map(one_line, found)))


@main.command()
@_reported
def demo() -> None:
    """Folds EfficientNet-Lite0 with its ImageNet weights and classifies a photograph before and after."""
    with _progress(1) as step:
        step("loading, folding, verifying and timing EfficientNet-Lite0")
        shown = demonstration.demonstrate()
    show(demonstration_view(shown))


for _command in (fuse, explain, verify, bisect):
    _command.help = (_command.help or "") + _MODEL_HELP


def _load(
    model: str,
    shapes: tuple[tuple[int, ...], ...],
    seed: int,
    weights: Path | None,
    step: Callable[[str], None],
) -> tuple[zoo.Loaded, tuple[Any, ...] | None]:
    step(f"loading {model}")
    loaded = zoo.load(model, seed=seed, weights=weights)
    generator = torch.Generator().manual_seed(seed)
    return loaded, tuple(torch.randn(shape, generator=generator) for shape in shapes) or loaded.inputs


def _why_no_input(model: object) -> str:
    if isinstance(model, ExportedProgram) and model.example_inputs and model.example_inputs[1]:
        return "it takes inputs by keyword, which only torch can be given: folded.module()(x, name=y)"
    return "no input is known for this model; say which with --input"


def _check_outputs(*files: Path | None, kept: tuple[str | Path | None, ...]) -> None:
    """Before the work, not after it."""
    outputs = [file for file in files if file is not None and str(file) != "-"]
    for number, file in enumerate(outputs):
        check_writable(file, kept=[Path(name) for name in (*kept, *outputs[:number]) if name is not None])


def _write_json(record: dict[str, Any], file: Path | None) -> bool:
    """Writes `record`, if a file was asked for; tells whether stdout is taken by it."""
    if file is None:
        return False
    versions = {"schema": SCHEMA, "fxfuse": fxfuse.__version__, "torch": torch.__version__}
    text = json.dumps(versions | record, indent=2, allow_nan=False)
    if str(file) == "-":
        click.echo(text)
        return True
    with written(file) as part:
        part.write_text(text + "\n", encoding="utf-8")
    return False


@contextmanager
def _progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, on a terminal only; the yielded function names the step that begins."""
    console = Console(stderr=True)
    columns = (BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=steps, completed=-1)
        yield lambda description: bar.update(task, advance=1, description=one_line(description))
