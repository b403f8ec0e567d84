"""Layers whose weight is computed from other parameters get the computed weight.

``torch.nn.utils.parametrize`` computes it whenever it is read, the older ``weight_norm``, ``spectral_norm``
and ``prune`` in a hook before each call. In eval mode the result is always the same, so a plain parameter can
take its place, which a norm can be folded into.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.fx.proxy import TraceError
from torch.nn.utils import parametrize
from torch.nn.utils.prune import BasePruningMethod
from torch.nn.utils.spectral_norm import SpectralNorm
from torch.nn.utils.weight_norm import WeightNorm

from fxfuse.guards import SourceIsReadOnly

_HOOKS = (WeightNorm, SpectralNorm, BasePruningMethod)


def evaluate_weights(root: nn.Module) -> None:
    """Makes computed weights plain parameters, in place, wherever computing them is a function of parameters.

    What they were computed from stays where it is, for code that reads it.
    """
    for module in {id(each): each for each in root.modules() if not each.training}.values():
        if parametrize.is_parametrized(module):
            _evaluate_parametrizations(module)
        _evaluate_hooks(module)


def _evaluate_parametrizations(module: Any) -> None:
    names = [*module.parametrizations]
    computed = {name: _constant(module, name) for name in names}
    values = {name: value for name, value in computed.items() if value is not None}
    if len(values) < len(names):
        return
    trains = {
        name: any(p.requires_grad for p in module.parametrizations[name].parameters()) for name in names
    }
    # torch makes a class with a property for each such tensor; without it the original class is left.
    module.__class__ = parametrize.type_before_parametrizations(module)
    for name, value in values.items():
        module.register_parameter(name, nn.Parameter(value, trains[name]))


def _evaluate_hooks(module: Any) -> None:
    found = {key: hook for key, hook in module._forward_pre_hooks.items() if isinstance(hook, _HOOKS)}
    for key, hook in found.items():
        # Pruning calls its tensor by another name than the others do.
        name = hook._tensor_name if isinstance(hook, BasePruningMethod) else hook.name
        hook(module, ())
        value = module.__dict__.pop(name)
        trains = any(p.requires_grad for p in module._parameters.values() if p is not None)
        module.register_parameter(name, nn.Parameter(value.detach(), trains))
        del module._forward_pre_hooks[key]


def _constant(module: nn.Module, name: str) -> Tensor | None:
    """The computed tensor, if computing it twice gives the same and writes to nothing."""
    try:
        with SourceIsReadOnly(module, unread=False):
            first, second = getattr(module, name).detach(), getattr(module, name).detach()
    except TraceError:
        return None
    same = first.is_meta or torch.equal(first, second)
    return first if same and first.is_floating_point() else None
