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

from fxfuse.comparison import same_numbers
from fxfuse.errors import UnsupportedError
from fxfuse.inputs import drawn_like
from fxfuse.lowering.edits import in_dtype
from fxfuse.lowering.engines import Engine
from fxfuse.lowering.specialise import specialise
from fxfuse.lowering.specialised import Output, Program, Specialised
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

    def run_example(self) -> Sequence[Tensor]:
        """Its results for the inputs that it was compiled for."""
        return self.program(self._tensors())

    def _tensors(self) -> list[Tensor]:
        return self.graph.tensors(pytree.tree_leaves(self.inputs))

    def verify(self, order: Sequence[int] | None = None) -> Outcome:
        """It, if it gives what the folded module does.

        Args:
            order: for a program that keeps samples apart: which of the first two samples is at each place of
                the batch that it is run on, so that the folded module need not compute more than these.

        Raises:
            UnsupportedError: it raises something.
        """
        folded: nn.Module = replicate(self.compiler.folded)
        inputs, arrange = self.inputs, partial(_arranged, order=order)
        if order is not None:
            folded = _Arranged(folded, self.graph, order)
            inputs = pytree.tree_map_only(Tensor, lambda tensor: tensor[:2], inputs)
        with refusing():
            program = _with_own_memory(self.program, self._tensors())
        candidate = self._positional(program, arrange)
        reference: Callable[..., Any] = folded
        if self.compiler.dtype is not None:
            rounded = in_dtype(self.graph, self.compiler.dtype)
            reference = self._positional(lambda tensors: rounded(*tensors), arrange)
        # Where nothing could be seen, as with zeros, other numbers are drawn.
        for values in (inputs, drawn_like(inputs, seed=2)):
            found = same_numbers(folded, candidate, values, reference)
            if not found.ok:
                errors = f"{found.candidate_error:.2g}, of the folded module {found.reference_error:.2g}"
                wrong = f"it gives other numbers: error against float64 {errors}"
                return Outcome(None, wrong if found.worst else found.notes[0], found)
            if found.conclusive:
                return Outcome(partial(self.graph.run, program), comparison=found)
        return Outcome(None, "whether it gives the same numbers could not be seen", found)

    def _positional(self, program: Program, arrange: Callable[[Any], Any]) -> Callable[..., Any]:
        """What forward gives for its inputs, when they are arranged, by a program."""

        def forward(*inputs: Any) -> Any:
            with refusing():
                return self.graph.run(program, pytree.tree_leaves(arrange(inputs)))

        return forward


class _Arranged(nn.Module):
    """A module that is called with two samples, and gives what it does for a batch of these in some order.

    Args:
        module: the module.
        graph: what it computes, whose outputs tell which of its own are for samples.
        order: of the samples.
    """

    def __init__(self, module: nn.Module, graph: Specialised, order: Sequence[int]) -> None:
        super().__init__()
        self.module = module
        self.are_for_samples = [isinstance(each, Output) for each in graph.outputs]
        self.order = order
        self.eval()

    def forward(self, *inputs: Any) -> Any:
        leaves, structure = pytree.tree_flatten(self.module(*inputs))
        pairs = zip(leaves, self.are_for_samples, strict=True)
        leaves = [_arranged(leaf, self.order) if is_for_samples else leaf for leaf, is_for_samples in pairs]
        return pytree.tree_unflatten(leaves, structure)


def _arranged(values: Any, order: Sequence[int] | None) -> Any:
    """Of tensors for two samples, in one place or several in a row each, those for samples in an order."""
    if order is None:
        return values

    def arranged(tensor: Tensor) -> Tensor:
        return tensor.reshape(2, -1, *tensor.shape[1:])[[*order]].flatten(0, 1)

    return pytree.tree_map_only(Tensor, arranged, values)


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
        told = str(error).strip().partition("\n")[0]
        raise UnsupportedError(f"{type(error).__name__}: {told}") from error


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
