"""A fold whose arithmetic is wrong is undone and named, whatever is wrong with it; right ones are kept."""

from dataclasses import replace

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import affine, solve
from tests.support import randomise

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


OPERATORS = {
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(40, 12), nn.BatchNorm1d(12)),
    "conv1d": lambda: nn.Sequential(nn.Conv1d(40, 12, 3), nn.BatchNorm1d(12)),
    "conv2d": lambda: nn.Sequential(nn.Conv2d(40, 12, 3, bias=False), nn.BatchNorm2d(12)),
    "conv3d": lambda: nn.Sequential(nn.Conv3d(6, 12, 3, stride=2), nn.BatchNorm3d(12)),
    "groups": lambda: nn.Sequential(nn.Conv2d(36, 12, 3, groups=3), nn.BatchNorm2d(12)),
    "depthwise": lambda: nn.Sequential(nn.Conv2d(12, 12, 5, groups=12), nn.BatchNorm2d(12)),
    "transposed": lambda: nn.Sequential(nn.ConvTranspose2d(12, 12, 3), nn.BatchNorm2d(12)),
    "transposed groups": lambda: nn.Sequential(nn.ConvTranspose1d(12, 12, 3, groups=2), nn.BatchNorm1d(12)),
    "chain": lambda: nn.Sequential(nn.Conv2d(8, 12, 1), nn.BatchNorm2d(12), nn.BatchNorm2d(12)),
    "shuffled": lambda: nn.Sequential(nn.Conv2d(8, 12, 1), nn.PixelShuffle(2), nn.BatchNorm2d(3)),
    "forward": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(40), nn.Conv2d(40, 12, 3)),
    "forward groups": lambda: nn.Sequential(nn.ReLU(), nn.BatchNorm2d(40), nn.Conv2d(40, 12, 3, groups=2)),
}


def of_norm(change):
    def plant(monkeypatch):
        right = affine.AffineMap.from_norm
        monkeypatch.setattr(
            affine.AffineMap, "from_norm", staticmethod(lambda *parts: right(*change(*parts)))
        )

    return plant


def of_result(change):
    def plant(monkeypatch):
        right = solve.absorb
        monkeypatch.setattr(solve, "absorb", lambda what: change(*right(what), what.transposed))

    return plant


def of_maps(change):
    def plant(monkeypatch):
        right = solve.absorb

        def wrong(what):
            maps = {
                side: change(each)
                for side in ("before", "after")
                if (each := getattr(what, side)) is not None
            }
            return right(replace(what, **maps))

        monkeypatch.setattr(solve, "absorb", wrong)

    return plant


def last_channel(tensor, transposed=False):
    """Two percent off, in one out-channel (of each group): more than bfloat16 rounds away."""
    changed = tensor.clone()
    (changed[:, -1] if transposed else changed[-1]).mul_(1.02)
    return changed


WRONG = {
    "no eps": of_norm(lambda mean, var, weight, bias, eps: (mean, var, weight, bias, 0.0)),
    "no square root": of_norm(
        lambda mean, var, weight, bias, eps: (mean, (var.double() + eps) ** 2, weight, bias, 0.0)
    ),
    "no mean": of_norm(lambda mean, *rest: (mean * 0, *rest)),
    "mean added": of_norm(lambda mean, *rest: (-mean, *rest)),
    "no weight": of_norm(lambda mean, var, weight, bias, eps: (mean, var, None, bias, eps)),
    "no bias": of_norm(lambda mean, var, weight, bias, eps: (mean, var, weight, None, eps)),
    "channels swapped": of_maps(lambda each: affine.AffineMap(each.scale.flip(0), each.shift)),
    "shifts swapped": of_maps(lambda each: affine.AffineMap(each.scale, each.shift.flip(0))),
    "last channel": of_result(lambda weight, bias, transposed: (last_channel(weight, transposed), bias)),
    "last bias": of_result(lambda weight, bias, _: (weight, last_channel(bias))),
    "not a number": of_result(lambda weight, bias, _: (weight * torch.nan, bias)),
    "zero": of_result(lambda weight, bias, _: (weight * 0, bias)),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("operator", OPERATORS)
@torch.no_grad()
def test_right_folds_are_kept_with_an_error_of_one_rounding(operator, dtype):
    model = randomise(OPERATORS[operator]()).to(dtype)
    report = fxfuse.explain(model)
    assert len(report.folded) == sum("Norm" in type(each).__name__ for each in model) and not report.refused
    for fold in report.folded:
        assert fold.error < torch.finfo(dtype).eps + 1e-15
    assert dtype == torch.float64 or any(fold.error > torch.finfo(dtype).eps / 100 for fold in report.folded)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wrong", WRONG)
@pytest.mark.parametrize("operator", OPERATORS)
@torch.no_grad()
def test_wrong_folds_are_undone_and_named(operator, wrong, dtype, monkeypatch):
    model = randomise(OPERATORS[operator]()).to(dtype)
    WRONG[wrong](monkeypatch)
    fused = fxfuse.fuse(model)
    report = fxfuse.report(fused)
    codes = {left.code for left in report.refused} - ({"FXF107"} if operator == "chain" else set())
    assert not report.folded and codes == {"FXF403"}, report
    for name, tensor in model.state_dict().items():
        assert torch.equal(fused.state_dict()[name], tensor)


@torch.no_grad()
def test_only_the_fold_that_is_wrong_is_undone(monkeypatch):
    layers = [
        layer for _ in range(5) for layer in (nn.Conv2d(4, 4, 3, padding=1), nn.BatchNorm2d(4), nn.ReLU())
    ]
    model = randomise(nn.Sequential(*layers))
    third = model[6].weight
    right = solve.absorb

    def wrong(what):
        weight, bias = right(what)
        return weight, bias + 1e-9 * (what.weight.data_ptr() == third.data_ptr())

    monkeypatch.setattr(solve, "absorb", wrong)
    report = fxfuse.explain(model)
    assert [(left.norm, left.code) for left in report.refused] == [("7", "FXF403")]
    assert len(report.folded) == 4
    kept = fxfuse.explain(model, keep_modules=True)
    assert [(left.norm, left.code) for left in kept.refused] == [("7", "FXF403")] and len(kept.folded) == 4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@torch.no_grad()
def test_large_numbers_that_cancel_are_no_false_alarm(dtype):
    model = nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8)).eval().to(dtype)
    norm = model[1]
    norm.running_mean.uniform_(1000, 2000)
    norm.running_var.uniform_(0.5, 2)
    norm.bias.copy_(norm.running_mean / (norm.running_var + norm.eps).sqrt())
    model[0].bias.uniform_(-1e-3, 1e-3)
    report = fxfuse.explain(model)
    assert len(report.folded) == 1, report


@torch.no_grad()
def test_channels_that_are_nearly_zero_are_no_false_alarm():
    for dtype in DTYPES:
        model = randomise(nn.Sequential(nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8))).to(dtype)
        model[1].weight.zero_()
        model[1].bias.zero_()
        model[0].weight[3] = torch.finfo(dtype).tiny / 2
        assert len(fxfuse.explain(model).folded) == 1


def test_what_has_no_numbers_is_not_measured():
    with torch.device("meta"):
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval()
    assert [fold.error for fold in fxfuse.explain(model).folded] == [None]


def test_the_check_leaves_random_numbers_and_gradients_alone():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    state = torch.get_rng_state()
    fused = fxfuse.fuse(model)
    assert torch.equal(state, torch.get_rng_state())
    assert all(parameter.is_leaf and parameter.requires_grad for parameter in fused.parameters())


@torch.no_grad()
def test_the_error_is_the_distance_of_what_the_operators_give():
    model = randomise(nn.Sequential(nn.Conv2d(2, 6, 1), nn.BatchNorm2d(6))).bfloat16()
    fused = fxfuse.fuse(model)
    x = torch.randn(500, 2, 1, 1, dtype=torch.float64)
    expected, actual = (each.double()(x) for each in (model, fused))
    distance = float((actual - expected).norm() / expected.norm())
    assert distance / 5 < fxfuse.report(fused).folded[0].error < 5 * distance
