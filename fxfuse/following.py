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
        tensors: the parameters and buffers that there are, by their names.
        places: the places among the inputs of those that are inputs; the others are attributes for ever.
    """

    def __init__(
        self,
        plan: Plan,
        solution: Solution,
        reader: Reader,
        tensors: Mapping[str, Tensor],
        places: Mapping[str, int],
    ) -> None:
        self._plan = plan
        self._reader = reader
        self._tensors = dict(tensors)
        self._places = places
        self._folded = solution.tensors
        self._is_folded = True
        reader.forget_tensors()
        solve(plan, reader, {})
        self._sources = [(name, places.get(name)) for name in tensors if name in reader.names_read]
        self._look()

    def follow(self, inputs: Sequence[Any]) -> bool:
        """Makes the tensors those that the weights among `inputs` give; False if these cannot be folded."""
        for place, tensor, version, address in self._seen:
            now = tensor if place is None else inputs[place]
            if now is not tensor or now._version != version or now.data_ptr() != address:
                self._tensors |= {name: inputs[place] for name, place in self._places.items()}
                self._look()
                self._is_folded = self._fold_again()
                break
        return self._is_folded

    def _look(self) -> None:
        """Remembers what shows that a tensor has changed."""
        sources = ((place, self._tensors[name]) for name, place in self._sources)
        self._seen = [(place, tensor, tensor._version, tensor.data_ptr()) for place, tensor in sources]

    def _fold_again(self) -> bool:
        for name, source in self._tensors.items():
            put(self._reader.root, name, source)
        self._reader.forget_tensors()
        with torch.no_grad():
            new = solve(self._plan, self._reader, {})
            if new.failed:
                reasons = "; ".join({code.value.reason for code in new.failed.values()})
                _LOG.warning("the new weights cannot be folded, so the norms run as they are: %s", reasons)
                return False
            for node, tensors in self._folded.items():
                for old, tensor in zip(tensors, new.tensors[node], strict=True):
                    if old is not None:
                        assert tensor is not None
                        old.copy_(tensor)
        return True
