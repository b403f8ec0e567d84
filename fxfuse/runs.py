"""Runs of models whose outputs are to be compared: equal inputs, no side effects."""

from __future__ import annotations

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxfuse.replica import isolated

# What a model's forward raises when it gets inputs that it cannot take.
REJECTIONS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
# The outputs of a run by their places in the result: "" for a lone tensor, "['logits']".
Outputs = dict[str, Any]


@contextlib.contextmanager
def clean_run(inputs: Sequence[Any], seed: int) -> Iterator[list[Any]]:
    """Copies of the inputs, to which a model may write; no gradients, and random numbers of the run's own."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        yield pytree.tree_map_only(Tensor, torch.clone, list(inputs))


def run(model: Callable[..., Any], inputs: Sequence[Any], seed: int, *, is_own: bool = False) -> Outputs:
    """What `model` gives for copies of the inputs; unless it is the caller's own, a copy of it runs."""
    with clean_run(inputs, seed) as copies:
        own = model if is_own or not isinstance(model, nn.Module) else isolated(model)
        leaves, _ = pytree.tree_flatten_with_path(own(*copies))
    return {place: value for path, leaf in leaves for place, value in _parts(pytree.keystr(path), leaf)}


def _parts(place: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    """What pytree does not look into: the fields of dataclasses, and the numbers of arrays."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        for field in dataclasses.fields(leaf):
            leaves, _ = pytree.tree_flatten_with_path(getattr(leaf, field.name))
            for path, part in leaves:
                yield from _parts(f"{place}.{field.name}{pytree.keystr(path)}", part)
    else:
        numpy = sys.modules.get("numpy")  # which need not be installed
        is_array = numpy is not None and isinstance(leaf, numpy.ndarray)
        yield place, torch.from_numpy(leaf) if is_array else leaf
