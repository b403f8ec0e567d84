"""The leaves of inputs: which of them a program can take, and what it depends on."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.utils import _pytree as pytree

from fxfuse.errors import UnsupportedError

_is_wrapped = torch._C._functorch.is_functorch_wrapped_tensor
_SIMPLE = (type(None), bool, int, float, complex, str, torch.dtype, torch.device, torch.memory_format)


def flatten(inputs: tuple[Any, ...]) -> tuple[Sequence[Any], pytree.TreeSpec | None]:
    """Their leaves, and how these are put together; None: the inputs are tensors, and their own leaves.

    Small networks take a few milliseconds, and find every line of Python cold.
    """
    for each in inputs:
        if type(each) is not Tensor:
            return pytree.tree_flatten(inputs)
    return inputs, None


def wants_gradients(leaf: Any) -> bool:
    """Whether it is a tensor of which gradients are wanted, or one with a tangent."""
    if not isinstance(leaf, Tensor):
        return False
    if forward_ad._current_level < 0:
        return leaf.requires_grad
    tangent = forward_ad.unpack_dual(leaf).tangent  # type: ignore[no-untyped-call]
    return leaf.requires_grad or tangent is not None


def kind_of(leaf: Any) -> Hashable:
    """What a program depends on; of tensors all but the numbers."""
    if isinstance(leaf, Tensor):
        return type(leaf), _memory_layout(leaf), leaf.dtype, leaf.device
    return type(leaf), repr(leaf)  # which tells 0.0 from -0.0


def own_copy(leaf: Any) -> Any:
    """A tensor of its own memory; what is no tensor, as it is.

    Raises:
        UnsupportedError: it is no block of memory, or empty, or an object that may change without notice.
    """
    if type(leaf) in (Tensor, nn.Parameter):
        if not _is_block(leaf):
            raise UnsupportedError("an input is sparse, nested or one of torch.func")
        if not leaf.numel():
            raise UnsupportedError("an input is empty")
        return leaf.detach().clone()
    if type(leaf) in _SIMPLE:  # of which each has a text of its own
        return leaf
    raise UnsupportedError(f"an input is a {type(leaf).__name__}")


def moved(leaves: Sequence[Any], copies: Sequence[Any]) -> set[int]:
    """The places of leaves whose copies lie in memory in another way."""
    pairs = zip(leaves, copies, strict=True)
    return {place for place, (one, its) in enumerate(pairs) if _memory_layout(one) != _memory_layout(its)}


def _memory_layout(leaf: Any) -> Any:
    """How a tensor lies in memory, and how that is to be read; None for anything else."""
    if not isinstance(leaf, Tensor):
        return None
    if not _is_block(leaf):
        return "none that kernels read"
    return leaf.shape, leaf.stride(), leaf.is_neg(), leaf.is_conj()


def _is_block(tensor: Tensor) -> bool:
    """Whether it has numbers of its own in memory: it is not sparse, nested, or a stand-in of torch.func."""
    return tensor.layout is torch.strided and not tensor.is_nested and not _is_wrapped(tensor)
