"""Folded weights that follow those that they were folded from."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.lifting import put
from fxfuse.ops import Reader
from fxfuse.plan import Plan
from fxfuse.solve import Solution, solve

_LOG = logging.getLogger("fxfuse")


class Followers:
    """The folded tensors of a plan; `follow` folds them again if a tensor that they come from has changed.

    That is seen by the tensor's identity, by its version, which every operator that writes to it counts up,
    and by its address in memory.

    Args:
        plan: what is folded.
        solution: the folded tensors; they get new numbers.
        reader: reads the graph in which it is, as it was before.
        names: the names of parameters and buffers, by their places among the inputs.
        inputs: an example for each of the inputs.
    """

    def __init__(
        self,
        plan: Plan,
        solution: Solution,
        reader: Reader,
        names: Mapping[int, str],
        inputs: Sequence[Any],
    ) -> None:
        self._plan = plan
        self._reader = reader
        self._names = names
        self._tensors = solution.tensors
        reader.forget_tensors()
        solve(plan, reader, {})
        self._sources = [place for place, name in names.items() if name in reader.names_read]
        self._seen = self._look(inputs)
        self._is_folded = True

    def follow(self, inputs: Sequence[Any]) -> bool:
        """Makes the tensors those that the weights among `inputs` give; False if these cannot be folded."""
        for place, tensor, version, address in self._seen:
            now = inputs[place]
            if now is not tensor or now._version != version or now.data_ptr() != address:
                self._seen = self._look(inputs)
                self._is_folded = self._fold_again(inputs)
                break
        return self._is_folded

    def _look(self, inputs: Sequence[Any]) -> list[tuple[int, Tensor, int, int]]:
        tensors = ((place, inputs[place]) for place in self._sources)
        return [(place, tensor, tensor._version, tensor.data_ptr()) for place, tensor in tensors]

    def _fold_again(self, inputs: Sequence[Any]) -> bool:
        for place, name in self._names.items():
            put(self._reader.root, name, inputs[place])
        self._reader.forget_tensors()
        with torch.no_grad():
            new = solve(self._plan, self._reader, {})
            if new.failed:
                codes = {code.value.reason for code in new.failed.values()}
                _LOG.warning("the new weights cannot be folded: %s; norms run as they are", "; ".join(codes))
                return False
            for node, tensors in self._tensors.items():
                for old, tensor in zip(tensors, new.tensors[node], strict=True):
                    if old is not None:
                        assert tensor is not None
                        old.copy_(tensor)
        return True
