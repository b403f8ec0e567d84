"""Which layers and functions are linear operators or norms, and whether they behave as their class says."""

from __future__ import annotations

import inspect
from typing import Any

from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fxfuse.objects import own_classes
from fxfuse.tree import CONTAINERS, NORM_RANKS

# Layer or function → number of spatial axes, and whether its weight's axes are those of a transposed one.
LINEAR_LAYERS: dict[type[nn.Module], tuple[int, bool]] = {
    nn.Linear: (0, False),
    nn.Conv1d: (1, False),
    nn.Conv2d: (2, False),
    nn.Conv3d: (3, False),
    nn.ConvTranspose1d: (1, True),
    nn.ConvTranspose2d: (2, True),
    nn.ConvTranspose3d: (3, True),
}
LINEAR_FUNCTIONS: dict[str, tuple[int, bool]] = {
    "linear": (0, False),
    "conv1d": (1, False),
    "conv2d": (2, False),
    "conv3d": (3, False),
    "conv_transpose1d": (1, True),
    "conv_transpose2d": (2, True),
    "conv_transpose3d": (3, True),
}
# Convolutions of any number of spatial axes, transposed or not: the weight and an argument tell.
CONVOLUTIONS = frozenset({"convolution", "_convolution"})
LINEAR_ARGUMENTS = ("input", "weight", "bias")
# Products of two matrices, the second of which is a weight (in, out) → the arguments that are input, weight
# and bias.
PRODUCTS: dict[str, tuple[str, str, str | None]] = {
    "addmm": ("mat1", "mat2", "self"),
    "mm": ("self", "mat2", None),
}
LINEAR_NAMES = frozenset({*LINEAR_FUNCTIONS, *CONVOLUTIONS, *PRODUCTS})
INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Norm function → whether statistics of the input are used instead of the given ones, or the argument that
# says it. Those below the first line return a tuple: (normalised, statistics for the backward pass, ...).
NORM_FUNCTIONS: dict[str, str | bool] = {
    **{"batch_norm": "training", "instance_norm": "use_input_stats"},
    **dict.fromkeys(("native_batch_norm", "cudnn_batch_norm", "miopen_batch_norm"), "training"),
    **dict.fromkeys(("_native_batch_norm_legit", "_native_batch_norm_legit_functional"), "training"),
    **dict.fromkeys(("_native_batch_norm_legit_no_training", "_batch_norm_no_update"), False),
    **dict.fromkeys(("_batch_norm_with_update", "_batch_norm_with_update_functional"), True),
    "_batch_norm_impl_index": "training",
}
_STATISTICS = ("running_mean", "running_var")
# What a subclass may not override and still be taken for the class that it comes from.
_BEHAVIOUR = (
    *("__call__", "_call_impl", "forward", "_conv_forward", "_output_padding", "_check_input_dim"),
    *("_get_no_batch_dim", "_handle_no_batch_input", "_apply_instance_norm"),
)


def is_norm(module: nn.Module) -> bool:
    """Whether fxfuse accounts for `module`: batch norms, and instance norms with running statistics."""
    if isinstance(module, _InstanceNorm):
        return module.track_running_stats
    return isinstance(module, _BatchNorm)


def is_known(module: nn.Module) -> bool:
    """Whether the class of `module` is torch.nn's, or behaves like one of the tables above."""
    kinds = [kind for kind in type(module).__mro__ if kind in LINEAR_LAYERS or kind in NORM_RANKS]
    torch_own = type(module).__module__.startswith("torch.nn.modules") and "forward" not in module.__dict__
    return torch_own or (bool(kinds) and not is_replaced(module, kinds[0]))


def is_torch_layer(module: nn.Module) -> bool:
    """Whether it is torch's own, and neither one of its containers nor a graph."""
    own = type(module).__module__.startswith("torch.")
    return own and not isinstance(module, (*CONTAINERS, fx.GraphModule))


def is_replaced(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` behaves differently from its ancestor `kind`, by its class or by itself."""
    return any(
        name in module.__dict__ or getattr(type(module), name, None) is not getattr(kind, name, None)
        for name in _BEHAVIOUR
    )


def has_statistics(module: nn.Module) -> bool:
    """Whether it has running statistics, as batch norms do, and torchvision's FrozenBatchNorm2d."""
    return all(isinstance(getattr(module, name, None), Tensor) for name in _STATISTICS)


def code_calls_norm(module: nn.Module) -> bool:
    """Whether a method of `module` calls a norm as a function."""
    methods = (value for kind in own_classes(module) for value in vars(kind).values())
    return not is_known(module) and any(calls_norm(each) for each in methods if inspect.isfunction(each))


def calls_norm(function: Any, seen: frozenset[Any] = frozenset()) -> bool:
    """Whether the code of a function that is not traced through calls a norm, itself or by others."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return False
    if not NORM_FUNCTIONS.keys().isdisjoint(code.co_names):
        return True
    called = [function.__globals__.get(name) for name in code.co_names]
    return any(
        calls_norm(each, seen | {code})
        for each in called
        if inspect.isfunction(each) and not each.__module__.startswith("torch")
    )
