"""The best precision that torch has, for a while, and whether a model rounds to less on its own."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import torch
from torch import Tensor
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = ("cpu", "cuda")
"""Types of devices whose autocast is switched off."""


class LeastPrecision(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the largest eps of a dtype to which something in float64 is rounded on the way."""

    supports_higher_order_operators = True

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.eps = torch.finfo(torch.float64).eps

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = pytree.tree_leaves((args, kwargs))
        if any(isinstance(each, Tensor) and each.dtype is torch.float64 for each in given):
            for tensor in pytree.tree_leaves(result):
                if isinstance(tensor, Tensor) and tensor.is_floating_point():
                    self.eps = max(self.eps, torch.finfo(tensor.dtype).eps)
        return result


def _flag(path: str, value: object) -> tuple[Callable[[], Any], Callable[[Any], None], object]:
    owner, _, name = path.rpartition(".")
    holder = attrgetter(owner)(torch.backends) if owner else torch.backends
    return partial(getattr, holder, name), partial(setattr, holder, name), value


# How each setting is read and set, and to what. One of the older kind (allow_tf32) sets several of the newer
# kind, and cannot be read once these have been set apart; so it comes before them.
_SETTINGS = (
    _flag("cudnn.allow_tf32", False),
    (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
    _flag("fp32_precision", "ieee"),
    *(_flag(f"mkldnn.{kind}.fp32_precision", "ieee") for kind in ("matmul", "conv", "rnn")),
    *(_flag(f"{kind}.fp32_precision", "ieee") for kind in ("cuda.matmul", "cudnn.conv", "cudnn.rnn")),
    _flag("cuda.matmul.allow_fp16_reduced_precision_reduction", False),
    _flag("cuda.matmul.allow_bf16_reduced_precision_reduction", False),
    _flag("cuda.matmul.allow_fp16_accumulation", False),
    _flag("cudnn.benchmark", False),
    _flag("cudnn.deterministic", True),
    _flag("mkldnn.deterministic", True),
)
_UNREADABLE = object()


@contextlib.contextmanager
def no_autocast() -> Iterator[None]:
    """Without autocast on any device."""
    with contextlib.ExitStack() as stack:
        for device in DEVICES:
            stack.enter_context(torch.autocast(device, enabled=False))
        yield


@contextlib.contextmanager
def setting(get: Callable[[], Any], put: Callable[[Any], Any], value: object) -> Iterator[None]:
    """With another value for something that concerns the whole process; for one caller at a time."""
    before = get()
    put(value)
    try:
        yield
    finally:
        put(before)


@contextlib.contextmanager
def precise() -> Iterator[None]:
    """Without TF32, reduced-precision sums, autocast and nondeterminism; all is restored afterwards."""
    before = [_read(get) for get, _, _ in _SETTINGS]
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with contextlib.ExitStack() as stack:
        stack.enter_context(no_autocast())
        stack.enter_context(warnings.catch_warnings())
        warnings.filterwarnings("ignore", ".*does not have a deterministic implementation.*")
        try:
            _set([value for _, _, value in _SETTINGS])
            torch.use_deterministic_algorithms(True, warn_only=True)
            yield
        finally:
            _set(before)
            torch.use_deterministic_algorithms(deterministic, warn_only=only_warns)


def _set(values: Sequence[object]) -> None:
    for (get, put, _), value in zip(_SETTINGS, values, strict=True):
        if value is not _UNREADABLE and _read(get) != value:
            put(value)


def _read(get: Callable[[], Any]) -> Any:
    try:
        return get()
    except RuntimeError:
        return _UNREADABLE
