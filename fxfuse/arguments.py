"""What callers hand over: told in one line, and checked before it is used."""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from fxfuse.errors import UsageError, first_line
from fxfuse.places import place_of_error
from fxfuse.tree import is_training


class _Short(reprlib.Repr):
    """A repr of bounded length, in which of tensors and arrays there is the shape only."""

    def repr1(self, x: Any, level: int) -> str:
        """One value, at any depth."""
        if isinstance(x, Tensor):
            return f"{tuple(x.shape)} {_kind(x)}"
        if type(x).__module__ == "numpy":
            return f"{type(x).__name__} {x.shape} {x.dtype}"
        return self.repr_dict(x, level) if isinstance(x, dict) else super().repr1(x, level)


def short(value: object) -> str:
    """One line that tells what `value` is, however large it is."""
    return " ".join(_Short().repr(value).split())


def check_module(model: object, name: str) -> None:
    """Raises a UsageError unless `model` is a module; `name` is what the caller calls it."""
    if isinstance(model, nn.Module):
        return
    advice = "pass the model itself"
    if isinstance(model, type):
        advice = f"pass an instance, {model.__name__}(...)"
    elif isinstance(model, Mapping):
        advice = "weights are no computation; pass the model that has them, after model.load_state_dict(...)"
    raise UsageError(
        f"the {name} is {_told(model)}, no torch.nn.Module or ExportedProgram, so it cannot be read; {advice}"
    )


def check_eval(model: nn.Module, name: str) -> None:
    """Raises a UsageError if `model` is in training mode."""
    if is_training(model):
        raise UsageError(
            f"the {name} ({type(model).__name__}) is in training mode, where norms use the batch; "
            f"call {name}.eval()"
        )


def check_inputs(inputs: object, name: str) -> None:
    """Raises a UsageError unless `inputs` is a list or tuple of positional inputs."""
    if not isinstance(inputs, (list, tuple)) or isinstance(inputs, torch.Size):
        raise UsageError(
            f"{name} is {_told(inputs)}; it has to hold all positional inputs of forward: "
            "pass a tuple, (x,) or (x, y)"
        )


def rejection(inputs: Sequence[Any], error: BaseException, model: nn.Module) -> str:
    """What `model` was given, what it raised, and where; whether they differ in dtype or device."""
    given = ", ".join(map(short, inputs)) or "()"
    where = place_of_error(error)
    return f"{given}: {first_line(error)}{where and f', at {where}'}{_difference(model, inputs)}"


def _difference(model: nn.Module, inputs: Sequence[Any]) -> str:
    leaves = pytree.tree_leaves(list(inputs))
    if any(type(leaf).__module__ == "numpy" for leaf in leaves):
        return "; models take tensors: torch.from_numpy(array) makes one"
    weights = [parameter for parameter in model.parameters() if parameter.is_floating_point()]
    dtypes, devices = {weight.dtype for weight in weights}, {weight.device for weight in weights}
    for leaf in leaves if weights else ():
        if not isinstance(leaf, Tensor):
            continue
        if leaf.device not in devices or (leaf.is_floating_point() and leaf.dtype not in dtypes):
            return (
                f"; the model is {_kind(weights[0])}, an input {_kind(leaf)}: x.to(device, dtype) converts it"
            )
    return ""


def _kind(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} on {tensor.device}"


def _told(value: object) -> str:
    if value is None:
        return "None"
    if isinstance(value, type):
        return f"the class {value.__name__}"
    return f"{short(value)} ({type(value).__name__})"
