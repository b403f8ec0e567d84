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
from fxfuse.lowering.engines import Engine
from fxfuse.lowering.specialised import Program, Specialised, UnsupportedError, in_dtype, specialised
from fxfuse.lowering.timing import medians
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
    # Tensors of inference mode could not become constants.
    with _COMPILES, torch.inference_mode(False), torch.no_grad(), torch.autocast("cpu", enabled=False):
        try:
            return _compiled(folded, pytree.tree_map(_usable, tuple(inputs)), engine, dtype)
        except UnsupportedError as error:
            return Compiled(None, str(error))


def _compiled(
    folded: nn.Module, inputs: tuple[Any, ...], engine: Engine, dtype: torch.dtype | None
) -> Compiled:
    if not isinstance(folded, fx.GraphModule):
        name = type(folded).__name__
        raise UnsupportedError(f"{name} is no graph: it could not be traced whole, or its modules were kept")
    graph = specialised(folded, inputs)
    tensors = graph.tensors(pytree.tree_leaves(inputs))
    program = _by_engine(engine, graph, tensors, dtype)
    sliced = _in_slices(folded, inputs, graph, engine, dtype)
    if sliced is not None:
        ways = {"whole": partial(program, tensors), "sliced": partial(sliced, tensors)}
        times = medians(ways, rounds=3)
        if times["sliced"] < times["whole"]:
            found = _compared(folded, inputs, graph, sliced, dtype)
            if found.run is not None:
                return found
    return _compared(folded, inputs, graph, program, dtype)


def _compared(
    folded: nn.Module,
    inputs: tuple[Any, ...],
    graph: Specialised,
    program: Program,
    dtype: torch.dtype | None,
) -> Compiled:
    """The program, if it gives what `folded` does."""

    def run(leaves: Sequence[Any]) -> Any:
        return graph.result(program(graph.tensors(leaves)))

    def candidate(*again: Any) -> Any:
        return run(pytree.tree_leaves(again))

    rounded = graph.module if dtype is None else in_dtype(graph, dtype)

    def reference(*again: Any) -> Any:
        return graph.result(rounded(*graph.tensors(pytree.tree_leaves(again))))

    # Where nothing could be seen, as with zeros, other numbers are drawn.
    for values in (inputs, pytree.tree_map(_drawn, inputs)):
        comparison = same_numbers(folded, candidate, values, folded if dtype is None else reference)
        if not comparison.ok:
            errors = (
                f"{comparison.candidate_error:.2g}, of the folded module {comparison.reference_error:.2g}"
            )
            wrong = f"it gives other numbers: error against float64 {errors}"
            return Compiled(None, wrong if comparison.worst else comparison.notes[0], comparison)
        if comparison.conclusive:
            return Compiled(run, comparison=comparison)
    return Compiled(None, "whether it gives the same numbers could not be seen", comparison)


def _by_engine(
    engine: Engine, graph: Specialised, tensors: Sequence[Tensor], dtype: torch.dtype | None
) -> Program:
    """The engine's program; whatever it raises is a reason to have none."""
    try:
        program = engine.compile(graph, tensors, dtype)
        results = program(tensors)
    except UnsupportedError:
        raise
    except Exception as error:
        told = str(error).strip().partition("\n")[0]
        raise UnsupportedError(f"{type(error).__name__}: {told}") from error
    return _with_own_memory(program, tensors, results)


def _with_own_memory(program: Program, tensors: Sequence[Tensor], results: Sequence[Tensor]) -> Program:
    """`program`, of whose results none lies in the memory of its inputs or of another result.

    Engines take x + 0 for x. A caller may write to what it gets.
    """
    used = {storage(tensor) for tensor in tensors}
    shared = set()
    for number, result in enumerate(results):
        if storage(result) in used:
            shared.add(number)
        used.add(storage(result))
    if not shared:
        return program
    return lambda given: [
        result.clone() if number in shared else result for number, result in enumerate(program(given))
    ]


def _in_slices(
    folded: fx.GraphModule,
    inputs: tuple[Any, ...],
    whole: Specialised,
    engine: Engine,
    dtype: torch.dtype | None,
) -> Program | None:
    """A program for a few samples of these inputs at a time; None if that cannot be shown to be the same."""
    batches = {tuple(tensor.shape[:1]) for tensor in whole.tensors(pytree.tree_leaves(inputs))}
    (batch,) = batches.pop() if len(batches) == 1 else (0,)
    size = engine.slices
    if not size or batch < 2 * size or batch % size or not keeps_samples_apart(whole.module, batch):
        return None
    few = pytree.tree_map_only(Tensor, lambda tensor: tensor[:size], inputs)
    try:
        part = specialised(folded, few)
    except AssertionError:  # it takes no other batch
        return None
    if not is_for_fewer(whole.module, part.module, batch, size):
        return None
    try:
        program = _by_engine(engine, part, part.tensors(pytree.tree_leaves(few)), dtype)
    except UnsupportedError:
        return None
    return in_slices(program, size)


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
