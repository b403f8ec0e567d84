"""What every test needs: nasty statistics, an exact reference, and a count of what was folded."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor, fx, nn

import fxfuse
from fxfuse.tree import named_tensors
from tests import entrances

M = TypeVar("M", bound=nn.Module)

# "Exact" is equality in float64, relative to the largest magnitude of the output.
EXACT = 1e-10


def randomise(model: M, seed: int = 0) -> M:
    """`model` in eval mode and float64, every tensor random: γ with zeros and negatives, variances never 1.

    A new batch norm is the identity up to ε, so a fold that is tested on one proves nothing.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(like: Tensor, scale: float = 1.0) -> Tensor:
        return scale * torch.randn(like.shape, generator=generator, dtype=torch.float64)

    model.eval().double()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(normal(parameter))
        for module in model.modules():
            if not isinstance(getattr(module, "running_var", None), Tensor):
                continue
            module.running_mean.copy_(normal(module.running_mean))
            module.running_var.copy_(torch.exp(normal(module.running_var)))
            weight = getattr(module, "weight", None)
            if weight is not None and weight.numel() > 2:
                weight.view(-1)[0] = 0.0
                weight.view(-1)[1] = -1.5
    return model


def assert_exact(expected: Any, actual: Any) -> None:
    """Equal in structure, and in float64 up to 1e-10 of the largest magnitude."""
    left, left_spec = torch.utils._pytree.tree_flatten(expected)
    right, right_spec = torch.utils._pytree.tree_flatten(actual)
    assert left_spec == right_spec
    for one, other in zip(left, right, strict=True):
        if not isinstance(one, Tensor):
            assert one == other
            continue
        assert one.shape == other.shape and one.dtype == other.dtype
        if one.numel():
            left_value, right_value = one.detach(), other.detach()
            error = float((left_value - right_value).abs().max())
            assert error <= EXACT * max(1.0, float(left_value.abs().max()))


_PLAIN = (bool, int, float, str, tuple, type(None))


def snapshot(model: nn.Module) -> dict[str, Any]:
    """What must not change in a source: tensors bit for bit, flags, hooks, modules, attributes."""
    return {
        "tensors": {name: tensor.detach().clone() for name, tensor in named_tensors(model)},
        "identities": [id(tensor) for tensor in (*model.parameters(), *model.buffers())],
        "gradients": [(p.requires_grad, p.grad is None) for p in model.parameters()],
        "modules": [(name, id(module), type(module)) for name, module in model.named_modules()],
        "flags": [module.training for module in model.modules()],
        "attributes": [
            {
                name: value
                for name, value in module.__dict__.items()
                if isinstance(value, _PLAIN) or value is None
            }
            for module in model.modules()
        ],
        "hooks": [
            [list(hooks) for key, hooks in sorted(module.__dict__.items()) if key.endswith("_hooks")]
            for module in model.modules()
        ],
    }


def assert_untouched(before: dict[str, Any], model: nn.Module) -> None:
    """That `model` is what it was when `before` was taken."""
    after = snapshot(model)
    for key in before.keys() - {"tensors"}:
        assert before[key] == after[key], key
    for name, tensor in before["tensors"].items():
        torch.testing.assert_close(tensor, after["tensors"][name], rtol=0, atol=0, equal_nan=True, msg=name)


def folds(
    model: nn.Module,
    *inputs: Any,
    folded: int,
    refused: Sequence[str] = (),
    example_inputs: Sequence[Any] | None = None,
) -> fx.GraphModule:
    """Folds `model` (in float64) and checks everything that a fold promises.

    Args:
        model: the source, as `randomise` leaves it.
        inputs: one set of positional inputs on which both are compared.
        folded: how many norms have to be folded.
        refused: the codes of those that have to be left, in any order.
        example_inputs: given on to fuse.
    """
    before = snapshot(model)
    fused = fxfuse.fuse(model, example_inputs=example_inputs)
    assert_untouched(before, model)
    report = fxfuse.report(fused)
    assert len(report.folded) == folded, report
    assert sorted(refusal.code for refusal in report.refused) == sorted(refused), report
    assert report.norms == folded + len(refused)
    with torch.no_grad():
        assert_exact(model(*copy.deepcopy(inputs)), fused(*copy.deepcopy(inputs)))
    again = fxfuse.report(fxfuse.fuse(fused))
    assert not again.folded and not again.constants, "folding a folded model changed it"
    entrances.enter(model, inputs, folded, assert_exact)
    return fused
