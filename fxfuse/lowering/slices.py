"""Batches that are run some samples at a time, so that what is computed in between stays in cache."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxfuse.errors import UnsupportedError
from fxfuse.guards import patched
from fxfuse.lowering.batches import is_for_fewer, keeps_samples_apart
from fxfuse.lowering.candidates import Candidate, Compiler, Outcome, refusing
from fxfuse.lowering.pairs import compared_on_pairs
from fxfuse.lowering.specialise import specialise, without_numbers
from fxfuse.lowering.specialised import Program, Specialised
from fxfuse.lowering.timing import medians

_LOG = logging.getLogger("fxfuse")
# The smallest batch that is cut, and the smallest slices that are tried.
_BATCH, _SLICE = 8, 2
# Slices are doubled while that is expected to save at least this share of the time.
_GAIN = 0.04


def in_slices(compiler: Compiler, inputs: tuple[Any, ...]) -> Outcome | None:
    """A program for slices of a batch, of the size that is fastest.

    What is asked of the whole batch is asked without numbers, so that only slices are ever computed, whose
    programs are compared with the folded module. None: the batch is small, its samples are not proved to be
    apart, or slices are not seen to be computed as the whole is.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    batches = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    batch = batches.pop() if len(batches) == 1 else 0
    if not compiler.engine.slices or batch < _BATCH or any(tensor.is_cuda for tensor in tensors):
        return None
    # Slices along another axis than the outermost are no blocks of memory.
    if any(tensor.stride(0) * batch != tensor.numel() for tensor in tensors):
        return None
    try:
        with refusing(), _quiet():
            whole = specialise(compiler.graph, without_numbers(inputs))
        if not keeps_samples_apart(whole.module, batch):
            return None
        return _Slices(compiler, inputs, batch, whole).verified()
    except UnsupportedError as error:
        _LOG.info("a batch of %d runs as a whole: %s", batch, error)
        return None


def _quiet() -> AbstractContextManager[None]:
    """Without what torch logs where fake tensors do not fit: then the real ones are tried."""
    return patched(logging.getLogger("torch._subclasses.fake_tensor"), "disabled", True)


@dataclass(frozen=True)
class _Slices:
    """What is made of the slices of a batch."""

    compiler: Compiler
    inputs: tuple[Any, ...]
    batch: int
    whole: Specialised

    def verified(self) -> Outcome:
        """Programs for the fastest slices, and for what is left behind them, one after the other."""
        size, candidate = self._fastest()
        count, left = divmod(self.batch, size)
        if left == 1:  # of which nothing is proved: an axis of one element is no axis of samples
            count, left = count - 1, left + size
        candidates = [(size, candidate)]
        if left:
            candidates.append((left, self._compiled(slice(-left, None))))
        for number, each in candidates[::-1]:
            reason, comparison = compared_on_pairs(each, number)
            if reason:
                return Outcome(None, reason, comparison)
        programs = [(number, each.program) for number, each in candidates]
        run = _one_by_one([programs[0]] * count + programs[1:])
        return Outcome(partial(self.whole.run, run), comparison=comparison)

    def _fastest(self) -> tuple[int, Candidate]:
        """The size of slices that are doubled as long as it is expected to pay, and their program."""
        size, best = _SLICE, self._compiled(slice(_SLICE))
        while 2 * size <= self.batch and 2 * size != self.batch - 1:  # one alone may not be left
            larger = self._compiled(slice(2 * size))
            pair = {"small": best, "large": larger}
            calls = {name: partial(each.program, each.tensors()) for name, each in pair.items()}
            times = medians(calls, rounds=7, seconds=0.2, pause=0.0)
            saved = 2 * times["small"] - times["large"]  # what a call takes for no sample
            if saved > 0:
                size, best = 2 * size, larger
            if saved < _GAIN * 2 * times["large"]:  # as the next doubling would save that again
                break
        return size, best

    def _compiled(self, samples: slice) -> Candidate:
        """The program for some samples, which is that for all but for their number."""
        few = pytree.tree_map_only(Tensor, lambda tensor: tensor[samples], self.inputs)
        with refusing(), _quiet():
            candidate = self.compiler.compile(few)
        size = len(range(self.batch)[samples])
        if not is_for_fewer(self.whole.module, candidate.graph.module, self.batch, size):
            raise UnsupportedError("some samples are computed otherwise than all")
        return candidate


def _one_by_one(programs: Sequence[tuple[int, Program]]) -> Program:
    """Programs for as many samples each, one after the other."""
    sizes = [size for size, _ in programs]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        slices = zip(*(torch.split(tensor, sizes) for tensor in tensors), strict=True)
        parts = [program(part) for (_, program), part in zip(programs, slices, strict=True)]
        return [torch.cat(results) for results in zip(*parts, strict=True)]

    return run
