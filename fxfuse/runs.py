"""Runs of models whose outputs are to be compared: equal inputs, the best precision, no side effects."""

from __future__ import annotations

import contextlib
import dataclasses
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from operator import attrgetter
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxfuse.replica import isolated

# What a model's forward raises when it gets inputs that it cannot take.
REJECTIONS = (RuntimeError, TypeError, ValueError, LookupError, AttributeError, AssertionError)
# The outputs of a run by their places in the result: "" for a lone tensor, "['logits']".
Outputs = dict[str, Any]
DISTRIBUTIONS = ("normal", "heavy-tailed", "constant", "zeros", "image-like")
_COARSE = 4  # the size of the random image that is enlarged


def drawn(model: nn.Module, inputs: Sequence[Any], seed: int, distribution: str = "normal") -> list[Any]:
    """`inputs`, with a random tensor in the dtype of `model` in place of each that is a torch.Size."""
    like = next((p for p in model.parameters() if p.is_floating_point()), torch.empty(0))
    generator = torch.Generator().manual_seed(seed)
    return [
        _drawn(value, distribution, generator).to(device=like.device, dtype=like.dtype)
        if isinstance(value, torch.Size)
        else value
        for value in inputs
    ]


def _drawn(shape: torch.Size, distribution: str, generator: torch.Generator) -> Tensor:
    if distribution == "zeros":
        return torch.zeros(shape)
    if distribution == "constant":
        return torch.ones(shape) * torch.randn((), generator=generator)
    if distribution == "image-like":
        return _image_like(shape, generator)
    values = torch.randn(shape, generator=generator)
    return values**3 if distribution == "heavy-tailed" else values


def _image_like(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """Smooth, and between 0 and 1, along up to three axes after the first two."""
    spatial = shape[2:]
    if not 1 <= len(spatial) <= 3:
        return torch.rand(shape, generator=generator)
    coarse = torch.rand(*shape[:2], *(min(_COARSE, size) for size in spatial), generator=generator)
    return F.interpolate(coarse, spatial, mode=("linear", "bilinear", "trilinear")[len(spatial) - 1])


@contextlib.contextmanager
def clean_run(inputs: Sequence[Any], seed: int) -> Iterator[list[Any]]:
    """Copies of the inputs, to which a model may write; no gradients, and random numbers of the run's own."""
    with torch.no_grad(), torch.random.fork_rng():
        torch.manual_seed(seed)
        yield pytree.tree_map_only(Tensor, torch.clone, list(inputs))


def run(model: nn.Module, inputs: Sequence[Any], seed: int, *, is_own: bool = False) -> Outputs:
    """What `model` gives for copies of the inputs; unless it is the caller's own, a copy of it runs."""
    with clean_run(inputs, seed) as copies:
        leaves, _ = pytree.tree_flatten_with_path((model if is_own else isolated(model))(*copies))
    return {place: value for path, leaf in leaves for place, value in _parts(pytree.keystr(path), leaf)}


def _parts(place: str, leaf: Any) -> Iterator[tuple[str, Any]]:
    """What pytree does not look into: the fields of dataclasses, and the numbers of arrays."""
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        for field in dataclasses.fields(leaf):
            leaves, _ = pytree.tree_flatten_with_path(getattr(leaf, field.name))
            for path, part in leaves:
                yield from _parts(f"{place}.{field.name}{pytree.keystr(path)}", part)
    else:
        yield place, torch.from_numpy(leaf) if isinstance(leaf, np.ndarray) else leaf


def in_float64(inputs: Sequence[Any]) -> list[Any]:
    """The inputs in float64, as far as they are floats."""

    def double(tensor: Tensor) -> Tensor:
        return tensor.double() if tensor.is_floating_point() else tensor

    return list(pytree.tree_map_only(Tensor, double, list(inputs)))


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
def precise() -> Iterator[None]:
    """Without TF32, reduced-precision sums, autocast and nondeterminism; all is restored afterwards."""
    before = [_read(get) for get, _, _ in _SETTINGS]
    deterministic = torch.are_deterministic_algorithms_enabled()
    only_warns = torch.is_deterministic_algorithms_warn_only_enabled()
    with contextlib.ExitStack() as stack:
        for device in ("cpu", "cuda"):
            stack.enter_context(torch.autocast(device, enabled=False))
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
