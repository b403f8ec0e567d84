"""What fxfuse asks of a module tree: who is called what, and who carries hooks."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor
from torch.export import ExportedProgram

# The norms of torch.nn that have running statistics, and how many axes they let their input have; None:
# they do not check. Those of instance norms may lack the batch axis.
NORM_RANKS: dict[type[nn.Module], frozenset[int] | None] = {
    nn.BatchNorm1d: frozenset({2, 3}),
    nn.BatchNorm2d: frozenset({4}),
    nn.BatchNorm3d: frozenset({5}),
    nn.SyncBatchNorm: None,
    nn.InstanceNorm1d: frozenset({2, 3}),
    nn.InstanceNorm2d: frozenset({3, 4}),
    nn.InstanceNorm3d: frozenset({4, 5}),
}
CONTAINERS = (nn.Sequential, nn.ModuleList, nn.ModuleDict)
HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def joined(owner: str, name: str) -> str:
    """The qualified name of what is called `name` in the module `owner`; either may be empty."""
    return f"{owner}.{name}".strip(".")


def owners(name: str) -> list[str]:
    """The names above `name`: a.b.c → a.b, a."""
    return [name.rsplit(".", number)[0] for number in range(1, name.count(".") + 1)]


def is_below(name: str, owner: str) -> bool:
    """Whether `name` is `owner`, or something in it."""
    return not owner or name == owner or name.startswith(f"{owner}.")


def has_hooks(module: nn.Module) -> bool:
    """Whether calling `module` runs more than its forward."""
    return any(getattr(module, hooks, None) for hooks in HOOKS)


def as_module(model: nn.Module | ExportedProgram) -> nn.Module:
    """The module that runs an exported program; anything else as it is."""
    return model.module() if isinstance(model, ExportedProgram) else model


def is_training(model: nn.Module) -> bool:
    """Whether `model` is in training mode. Exported programs have no mode, whatever their flag says."""
    return model.training and "eval" not in model.__dict__


def named_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """All parameters and buffers; one that has several names comes under each of them."""
    for path, module in model.named_modules(remove_duplicate=False):
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):
            if tensor is not None:
                yield joined(path, name), tensor


def attribute(root: nn.Module, name: str) -> Any:
    """The module, parameter or buffer of that qualified name; `root` itself for the empty name."""
    value: Any = root
    for atom in name.split(".") if name else ():
        modules = vars(value).get("_modules")
        inside = modules.get(atom) if isinstance(modules, dict) else None  # TorchScript's are none
        value = getattr(value, atom) if inside is None else inside
    return value


def put(root: nn.Module, name: str, value: object) -> None:
    """Makes `value` what `attribute` gives for that qualified name; missing modules on the way are made."""
    *owners, leaf = name.split(".")
    module: Any = root
    for owner in owners:
        missing = not hasattr(module, owner)
        module = module._modules.setdefault(owner, nn.Module()) if missing else attribute(module, owner)
    if isinstance(value, nn.Parameter):
        home = module._parameters
    elif isinstance(value, Tensor):
        home = module._buffers
    else:
        home = module._modules if isinstance(value, nn.Module) else module.__dict__
    for other in (module.__dict__, module._parameters, module._buffers, module._modules):
        if other is not home:
            other.pop(leaf, None)
    home[leaf] = value


def storage(value: Any) -> int:
    """What two tensors have in common if writing to one may change the other; something unique otherwise."""
    if not isinstance(value, Tensor) or value.layout is not torch.strided:
        return id(value)
    memory = value.untyped_storage()
    has_numbers = not (value.is_meta or isinstance(value, FakeTensor))
    return memory.data_ptr() if has_numbers else int(memory._cdata)


def parts_of(value: nn.Module | Tensor) -> frozenset[int]:
    """The identities of a tensor, or of a module, all that is in it, and their tensors."""
    if isinstance(value, Tensor):
        return frozenset({id(value)})
    return frozenset(map(id, (*value.modules(), *value.parameters(), *value.buffers())))
