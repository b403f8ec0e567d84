"""A folded module and inputs → an engine's program, and whether it gives the same numbers."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse.errors import UnsupportedError, with_type
from fxfuse.inputs import drawn_like
from fxfuse.lowering.dtypes import in_dtype
from fxfuse.lowering.engines import Engine
from fxfuse.lowering.numbers import same_numbers
from fxfuse.lowering.specialise import specialise
from fxfuse.lowering.specialised import Program, Specialised
from fxfuse.replica import replicate
from fxfuse.tree import storage
from fxfuse.verdict import Comparison


@dataclass(frozen=True)
class Outcome:
    """What answers for inputs of one kind.

    Attributes:
        run: gives the outputs for the leaves of the inputs; None if the folded module has to.
        reason: why it has to.
        comparison: of the program with the folded module; None if it did not come to that.
    """

    run: Callable[[Sequence[Any]], Any] | None
    reason: str = ""
    comparison: Comparison | None = None


@dataclass(frozen=True)
class Compiler:
    """Compiles a folded module, by a graph of it, on an engine, to compute in `dtype` if one is given."""

    folded: nn.Module
    graph: fx.GraphModule
    engine: Engine
    dtype: torch.dtype | None

    def compile(self, inputs: tuple[Any, ...]) -> Candidate:
        """A program for inputs like these, which nobody has compared yet.

        It is traced and compiled with drawn numbers, and compared on `inputs`: a value that was taken for a
        constant shows there.

        Raises:
            UnsupportedError: there is none; whatever the engine raises is a reason.
        """
        drawn = drawn_like(inputs, seed=1)
        graph = specialise(self.graph, drawn)
        with refusing():
            program = self.engine.compile(graph, graph.tensors(pytree.tree_leaves(drawn)), self.dtype)
        return Candidate(self, inputs, graph, program)


@dataclass(frozen=True)
class Candidate:
    """A program for inputs of one kind.

    Attributes:
        compiler: what compiled it.
        inputs: those that it was compiled for.
        graph: what it computes.
        program: computes that.
    """

    compiler: Compiler
    inputs: tuple[Any, ...]
    graph: Specialised
    program: Program

    def tensors(self) -> list[Tensor]:
        """What the program takes of these inputs."""
        return self.graph.tensors(pytree.tree_leaves(self.inputs))

    def reference(self) -> Program | None:
        """Another program for `graph`, in the dtype of the program if that is not the folded module's."""
        if self.compiler.dtype is None:
            return None
        rounded = in_dtype(self.graph, self.compiler.dtype)
        return lambda tensors: rounded(*tensors)

    def verify(self) -> Outcome:
        """It, if it gives what the folded module does.

        Raises:
            UnsupportedError: it raises something.
        """
        with refusing():
            program = _with_own_memory(self.program, self.tensors())
        given = self.reference()
        reference = None if given is None else self._forward(given)
        folded = replicate(self.compiler.folded)
        reason, found = reason_against(self._forward(program), folded, self.inputs, reference)
        return Outcome(None if reason else partial(self.graph.run, program), reason, found)

    def _forward(self, program: Program) -> Callable[..., Any]:
        """What forward gives for its inputs, by a program."""
        return lambda *inputs: self.graph.run(program, pytree.tree_leaves(inputs))


def reason_against(
    candidate: Callable[..., Any],
    folded: nn.Module,
    inputs: tuple[Any, ...],
    reference: Callable[..., Any] | None,
) -> tuple[str, Comparison]:
    """Why a candidate may not be used, empty if it may, and how it compares with a module.

    See ``fxfuse.lowering.numbers.same_numbers``.

    Raises:
        UnsupportedError: the candidate raises something.
    """
    seen: Comparison | None = None
    # Where the inputs show little, as zeros do, other numbers are drawn.
    for values in (inputs, drawn_like(inputs, seed=2)):
        with refusing():
            found = same_numbers(folded, candidate, values, reference)
        if not found.ok:
            errors = f"{found.candidate_error:.2g}, of the folded module {found.reference_error:.2g}"
            wrong = f"it gives other numbers: error against float64 {errors}"
            return wrong if found.worst else found.notes[0], found
        seen = found if found.conclusive and seen is None else seen
        if seen is not None and not any(map(_is_constant, pytree.tree_leaves(inputs))):
            break
    return ("", seen) if seen is not None else ("whether it gives the same numbers could not be seen", found)


def _is_constant(leaf: Any) -> bool:
    """Whether it is a float tensor of which all elements are the same number."""
    is_float = isinstance(leaf, Tensor) and leaf.is_floating_point()
    return is_float and leaf.numel() > 1 and bool((leaf == leaf.flatten()[0]).all())


@contextmanager
def refusing() -> Iterator[None]:
    """Whatever is raised within is an UnsupportedError.

    Engines have no errors in common, nor have models that get what they were not meant for.
    """
    try:
        yield
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(with_type(error)) from error


def _with_own_memory(program: Program, tensors: Sequence[Tensor]) -> Program:
    """`program`, of whose results none lies in the memory of its inputs, its constants or another result.

    Engines take x + 0 for x. A caller may write to what it gets. What is the same memory in two runs is a
    constant.
    """
    results = program(tensors)
    used = {storage(tensor) for tensor in (*tensors, *program(tensors))}
    shared: set[int] = set()
    for number, result in enumerate(results):
        if storage(result) in used:
            shared.add(number)
        used.add(storage(result))
    if not shared:
        return program
    return lambda given: [
        result.clone() if number in shared else result for number, result in enumerate(program(given))
    ]
