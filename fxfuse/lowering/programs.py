"""A folded module and inputs → a program that has been compared with it; or the reason why there is none."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.utils import _pytree as pytree

from fxfuse.comparison import same_numbers
from fxfuse.lowering.batches import in_slices, is_for_fewer, keeps_samples_apart
from fxfuse.lowering.edits import in_dtype
from fxfuse.lowering.engines import Engine
from fxfuse.lowering.specialised import Program, Specialised, UnsupportedError, specialised
from fxfuse.lowering.timing import medians
from fxfuse.precision import no_autocast
from fxfuse.runs import REJECTIONS
from fxfuse.tree import storage
from fxfuse.verdict import Comparison

_COMPILES = threading.RLock()  # tracers and compilers set what concerns the whole process
_SIMPLE = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)


@dataclass(frozen=True)
class Compiled:
    """What answers for inputs of one kind.

    Attributes:
        run: gives the outputs for the leaves of the inputs; None if the folded module has to.
        reason: why it has to.
        comparison: of the program with the folded module; None if it did not come to that.
    """

    run: Callable[[Sequence[Any]], Any] | None
    reason: str = ""
    comparison: Comparison | None = None


def compiled(folded: nn.Module, inputs: Sequence[Any], engine: Engine, dtype: torch.dtype | None) -> Compiled:
    """A program of an engine for inputs like these, on which it is compared with `folded`.

    Of both the outputs are held against a run of `folded` in float64. The program may be about as far from it
    as `folded` is, in `dtype` if one is given: see ``fxfuse.verify`` on rounding.
    """
    if not isinstance(folded, fx.GraphModule):
        name = type(folded).__name__
        return Compiled(None, f"{name} is no graph: it could not be traced whole, or its modules were kept")
    # Tensors of inference mode could not become constants.
    with _COMPILES, torch.inference_mode(False), torch.no_grad(), no_autocast():
        try:
            return _Compiler(folded, pytree.tree_map(_usable, tuple(inputs)), engine, dtype).compiled()
        except UnsupportedError as error:
            return Compiled(None, str(error))


@dataclass(frozen=True)
class _Compiler:
    """Makes the program of a graph for inputs of one kind."""

    folded: fx.GraphModule
    inputs: tuple[Any, ...]
    engine: Engine
    dtype: torch.dtype | None

    def compiled(self) -> Compiled:
        """A program that was compared, in slices of the batch if these are faster."""
        graph = specialised(self.folded, self.inputs)
        tensors = graph.tensors(pytree.tree_leaves(self.inputs))
        program = self._program(graph, tensors)
        sliced = self._in_slices(graph)
        if sliced is not None:
            times = medians(
                {"whole": partial(program, tensors), "sliced": partial(sliced, tensors)}, rounds=3
            )
            if times["sliced"] < times["whole"]:
                found = self._compared(graph, sliced)
                if found.run is not None:
                    return found
        return self._compared(graph, program)

    def _program(self, graph: Specialised, tensors: Sequence[Tensor]) -> Program:
        """The engine's program; whatever it raises is a reason to have none."""
        try:
            program = self.engine.compile(graph, tensors, self.dtype)
            results = program(tensors)
        except UnsupportedError:
            raise
        except Exception as error:  # engines have no errors in common
            told = str(error).strip().partition("\n")[0]
            raise UnsupportedError(f"{type(error).__name__}: {told}") from error
        return _with_own_memory(program, tensors, results)

    def _in_slices(self, whole: Specialised) -> Program | None:
        """A program for a few samples at a time; None if that cannot be shown to be the same."""
        tensors = whole.tensors(pytree.tree_leaves(self.inputs))
        batches = {tuple(tensor.shape[:1]) for tensor in tensors}
        (batch,) = batches.pop() if len(batches) == 1 else (0,)
        size = 0 if any(tensor.is_cuda for tensor in tensors) else self.engine.slice_size
        if not size or batch < 2 * size or batch % size or not keeps_samples_apart(whole.module, batch):
            return None
        few = pytree.tree_map_only(Tensor, lambda tensor: tensor[:size], self.inputs)
        try:
            part = specialised(self.folded, few)
        except (UnsupportedError, *REJECTIONS):  # it takes no other batch
            return None
        if not is_for_fewer(whole.module, part.module, batch, size):
            return None
        try:
            return in_slices(self._program(part, part.tensors(pytree.tree_leaves(few))), size)
        except UnsupportedError:
            return None

    def _compared(self, graph: Specialised, program: Program) -> Compiled:
        """The program, if it gives what the folded module does."""
        reference: Callable[..., Any] = self.folded
        if self.dtype is not None:
            rounded = in_dtype(graph, self.dtype)
            reference = _positional(graph, lambda tensors: rounded(*tensors))
        candidate = _positional(graph, program)
        # Where nothing could be seen, as with zeros, other numbers are drawn.
        for values in (self.inputs, pytree.tree_map(_drawn, self.inputs)):
            found = same_numbers(self.folded, candidate, values, reference)
            if not found.ok:
                errors = f"{found.candidate_error:.2g}, of the folded module {found.reference_error:.2g}"
                wrong = f"it gives other numbers: error against float64 {errors}"
                return Compiled(None, wrong if found.worst else found.notes[0], found)
            if found.conclusive:
                return Compiled(partial(graph.run, program), comparison=found)
        return Compiled(None, "whether it gives the same numbers could not be seen", found)


def _positional(graph: Specialised, program: Program) -> Callable[..., Any]:
    """What forward gives for its inputs, by a program."""
    return lambda *inputs: graph.run(program, pytree.tree_leaves(inputs))


def _with_own_memory(program: Program, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> Program:
    """`program`, of whose results none lies in the memory of its inputs, its constants or another result.

    Engines take x + 0 for x. A caller may write to what it gets. Constants are in the results of each call.
    """
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


def _drawn(leaf: Any) -> Any:
    """Random numbers in the place of numbers."""
    if isinstance(leaf, Tensor) and leaf.is_floating_point():
        return torch.empty_like(leaf).normal_(generator=torch.Generator(leaf.device).manual_seed(0))
    return leaf


def _usable(leaf: Any) -> Any:
    """A tensor of its own memory; raises for what may change without notice."""
    if type(leaf) in (Tensor, nn.Parameter):
        return leaf.detach().clone()
    if isinstance(leaf, _SIMPLE):
        return leaf
    raise UnsupportedError(f"an input is a {type(leaf).__name__}")
