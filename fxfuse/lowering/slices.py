"""Batches that are run some samples at a time, so that what is computed in between stays in cache."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.utils import _pytree as pytree

from fxfuse.errors import UnsupportedError
from fxfuse.lowering.batches import is_for_fewer, keeps_samples_apart
from fxfuse.lowering.making import Compiled, Made, Maker
from fxfuse.lowering.specialised import Program, Specialised, specialised, without_numbers
from fxfuse.lowering.timing import medians

_T = TypeVar("_T")
# The smallest batch that is cut, and the smallest slices that are tried.
_BATCH, _SLICE = 8, 2
# Slices are doubled while that saves as large a share of the time.
_GAIN = 0.04


def in_slices(maker: Maker, inputs: tuple[Any, ...]) -> Compiled | None:
    """A program for slices of a batch, of the size that is fastest.

    What is asked of the whole batch is asked without numbers, so that only slices are ever computed, whose
    programs are compared with the folded module. None: the batch is small, its samples are not proved to be
    apart, or slices are not seen to be computed as the whole is.
    """
    tensors = [leaf for leaf in pytree.tree_leaves(inputs) if isinstance(leaf, Tensor)]
    batches = {len(tensor) if tensor.dim() else 0 for tensor in tensors}
    batch = batches.pop() if len(batches) == 1 else 0
    if not maker.engine.slices or batch < _BATCH or any(tensor.is_cuda for tensor in tensors):
        return None
    try:
        whole = _run(lambda: specialised(maker.folded, without_numbers(inputs)))
        if not keeps_samples_apart(whole.module, batch):
            return None
        return _Slices(maker, inputs, batch, whole).compiled()
    except UnsupportedError:
        return None


def _run(forward: Callable[[], _T]) -> _T:
    """What it gives; forward, which was not meant for what it gets here, may raise anything."""
    try:
        with _quiet():
            return forward()
    except UnsupportedError:
        raise
    except Exception as error:
        raise UnsupportedError(f"{type(error).__name__}: {error}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch logs where fake tensors do not fit: then the real ones are tried."""
    log = logging.getLogger("torch._subclasses.fake_tensor")
    before, log.disabled = log.disabled, True
    try:
        yield
    finally:
        log.disabled = before


@dataclass(frozen=True)
class _Slices:
    """What is made of the slices of a batch."""

    maker: Maker
    inputs: tuple[Any, ...]
    batch: int
    whole: Specialised

    def compiled(self) -> Compiled:
        """Programs for the fastest slices, and for what is left behind them, one after the other."""
        size, made = self._fastest()
        found = made.compared()
        if size == self.batch or found.run is None:
            return found
        count, left = divmod(self.batch, size)
        if left == 1:  # of which nothing is proved: an axis of one element is no axis of samples
            count, left = count - 1, left + size
        programs = [made.program] * count
        if left:
            rest = self._made(slice(-left, None))
            other = rest.compared()
            if other.run is None:
                return other
            programs.append(rest.program)
        sizes = [size] * count + [left] * bool(left)
        return replace(found, run=partial(self.whole.run, _one_by_one(sizes, programs)))

    def _fastest(self) -> tuple[int, Made]:
        """The size of slices that are doubled as long as it pays, and their program."""
        size, best = _SLICE, self._made(slice(_SLICE))
        while 2 * size <= self.batch and 2 * size != self.batch - 1:
            larger = self._made(slice(2 * size))
            times = medians({"small": best.call, "large": larger.call}, rounds=7, seconds=0.2, pause=0.0)
            gain = 1 - times["large"] / (2 * times["small"])
            if gain > 0:
                size, best = 2 * size, larger
            if gain < _GAIN:
                break
        return size, best

    def _made(self, samples: slice) -> Made:
        """The program for some samples, which is that for all but for their number."""
        few = pytree.tree_map_only(Tensor, lambda tensor: tensor[samples], self.inputs)
        made = _run(lambda: self.maker.made(few))
        size = len(range(self.batch)[samples])
        if not is_for_fewer(self.whole.module, made.graph.module, self.batch, size):
            raise UnsupportedError("some samples are computed otherwise than all")
        return made


def _one_by_one(sizes: list[int], programs: Sequence[Program]) -> Program:
    """Programs for slices of these sizes, one after the other."""

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        slices = zip(*(torch.split(tensor, sizes) for tensor in tensors), strict=True)
        parts = [program(part) for program, part in zip(programs, slices, strict=True)]
        return [torch.cat(results) for results in zip(*parts, strict=True)]

    return run
