"""What all commands have in common: which model it is, what is written where, errors and progress."""

from __future__ import annotations

import json
import shlex
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

import click
import torch
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from torch.export import ExportedProgram

import fxfuse
from fxfuse import zoo
from fxfuse.errors import FxfuseError, UsageError, VerificationError
from fxfuse.files import check_writable, written
from fxfuse.inputs import sample
from fxfuse.records import SCHEMA
from fxfuse.tree import as_module
from fxfuse.visible import one_line, visible

Command = Callable[..., None]
Step = Callable[[str], None]
# The entry of a context's meta that has the words of the command line.
_WORDS = "fxfuse.words"
# As shells tell it: 128 and the number of the signal.
_INTERRUPTED = 130


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


@dataclass(frozen=True)
class Asked:
    """The model that a command is asked about.

    Attributes:
        spec: as ``zoo.load`` takes it.
        shapes: of its inputs; without any those that are known are used.
        seed: of random weights and inputs.
        weights: a file with its weights, if they come from one.
    """

    spec: str
    shapes: tuple[tuple[int, ...], ...]
    seed: int
    weights: Path | None

    def load(self, step: Step) -> tuple[zoo.Loaded, tuple[Any, ...] | None]:
        """The model and its inputs; None if no input is known."""
        step(f"loading {self.spec}")
        loaded = zoo.load(self.spec, seed=self.seed, weights=self.weights)
        sizes = [torch.Size(shape) for shape in self.shapes]
        return loaded, tuple(sample(as_module(loaded.model), sizes, self.seed)) or loaded.inputs

    def needed(self, inputs: tuple[Any, ...] | None, purpose: str) -> tuple[Any, ...]:
        """The inputs; raises a UsageError if there are none."""
        if inputs is None:
            raise UsageError(
                f"no input is known for {self.spec}, without which {purpose}; "
                "say which with --input 1,3,224,224"
            )
        return inputs

    def check_outputs(self, *files: Path | None, kept: str | None = None) -> None:
        """Before the work, not after it: raises a UsageError for what cannot be written, or is to be kept."""
        outputs: dict[Path, Path] = {}
        for file in files:
            if file is None or str(file) == "-":
                continue
            if file.resolve() in outputs:
                raise UsageError(
                    f"cannot write {file}: another output goes to the same file, "
                    f"{outputs[file.resolve()]}; use another name"
                )
            outputs[file.resolve()] = file
            others = (self.spec, self.weights, kept)
            check_writable(file, kept=[Path(name) for name in others if name is not None])


def takes_model(command: Command) -> Command:
    """The argument MODEL and its options; the command gets them as its first argument, an `Asked`."""
    options = (
        click.argument("spec", metavar="MODEL"),
        click.option(
            "--input",
            "shapes",
            type=_Shape(),
            multiple=True,
            help="Shape of an input, as 1,3,224,224; once for each input.",
        ),
        click.option("--seed", default=0, show_default=True, help="Seed of random weights and inputs."),
        click.option(
            "--weights",
            type=click.Path(path_type=Path),
            help="A .safetensors file, or one of torch.save, with the weights of MODEL.",
        ),
    )

    @wraps(command)
    def run(
        spec: str, shapes: tuple[tuple[int, ...], ...], seed: int, weights: Path | None, **rest: Any
    ) -> None:
        command(Asked(spec, shapes, seed, weights), **rest)

    run.__doc__ = f"""{command.__doc__}
    MODEL is torchvision:NAME, timm:NAME, package.module:factory or a .pt2 file.
    """
    for option in reversed(options):
        run = option(run)
    return run


def file_option(*names: str, **settings: Any) -> Callable[[Command], Command]:
    """An option that names a file to write."""
    return click.option(*names, type=click.Path(path_type=Path), **settings)


def complain(message: str) -> None:
    """Prints `message` on stderr; no text of a model or a file in it acts, or passes for a line of ours."""
    click.echo(visible(message).replace("\n", "\n  "), err=True)


def reported(command: Callable[..., None]) -> Callable[..., None]:
    """Turns fxfuse's errors into a message on stderr and the documented exit codes."""

    @wraps(command)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            command(*args, **kwargs)
        except VerificationError as error:
            complain(f"Verification failed: {error}\n{again()}")
            sys.exit(1)
        except FxfuseError as error:
            complain(f"Error: {error}")
            sys.exit(2)
        except KeyboardInterrupt:
            complain("Interrupted; files that were not finished are not there")
            sys.exit(_INTERRUPTED)

    return run


def again() -> str:
    """The line that tells how to repeat the command that is running."""
    return one_line(f"again: {shlex.join(['fxfuse', *click.get_current_context().meta[_WORDS]])}")


class Group(click.Group):
    """Commands whose usage errors may quote anything."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        """Reads them, and keeps them as they are."""
        ctx.meta[_WORDS] = [*args]
        return super().parse_args(ctx, args)

    def invoke(self, ctx: click.Context) -> Any:
        """Runs the command."""
        try:
            return super().invoke(ctx)
        except click.UsageError as error:
            raise click.UsageError(one_line(error.format_message()), error.ctx) from error


def why_no_input(model: object) -> str:
    """Why a model that was folded was not run."""
    if isinstance(model, ExportedProgram) and model.example_inputs and model.example_inputs[1]:
        return "it takes inputs by keyword, which only torch can be given: folded.module()(x, name=y)"
    return "no input is known for this model; say which with --input"


def write_json(record: dict[str, Any], file: Path | None) -> bool:
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
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """A bar on stderr, on a terminal only; the yielded function names the step that begins."""
    console = Console(stderr=True)
    columns = (BarColumn(bar_width=20), TimeElapsedColumn(), TextColumn("{task.description}", markup=False))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=steps, completed=-1)
        yield lambda description: bar.update(task, advance=1, description=one_line(description))
