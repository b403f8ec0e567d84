"""Norms that are asked to be left stay, by every way of folding, and nothing else does."""

import pytest
import torch
from torch import nn

import fxfuse
from tests.forms import EXPORT_WARNING
from tests.support import assert_exact, randomise

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3)
        self.scale = nn.Parameter(torch.ones(3, 1, 1))

    def forward(self, x):
        return torch.relu(self.bn(self.conv(x)) * self.scale)


def blocks():
    return randomise(nn.Sequential(Block(), Block(), Block()))


@pytest.mark.filterwarnings(EXPORT_WARNING)
@pytest.mark.parametrize(("keep_modules", "exported"), [(False, False), (True, False), (False, True)])
@torch.no_grad()
def test_norms_are_left_by_name(keep_modules, exported):
    model = blocks()
    source = torch.export.export(model, (X,)) if exported else model
    fused = fxfuse.fuse(source, keep_modules=keep_modules, leave=["1.bn"])
    report = fxfuse.report(fused)
    assert [(left.norm, left.code) for left in report.refused] == [("1.bn", "FXF601")]
    assert [fold.norm for fold in report.folded] == ["0.bn", "2.bn"]
    assert_exact(model(X), fused.module()(X) if exported else fused(X))
    assert fxfuse.explain(source, keep_modules=keep_modules, leave=["1.bn"]).refused == report.refused


@torch.no_grad()
def test_constants_are_left_by_name():
    model = blocks()
    names = [fold.norm for fold in fxfuse.explain(model).constants]
    assert len(names) == 3
    fused = fxfuse.fuse(model, leave=names[:2])
    assert [fold.norm for fold in fxfuse.report(fused).constants] == names[2:]
    assert_exact(model(X), fused(X))


@torch.no_grad()
def test_with_all_left_nothing_changes():
    model = blocks()
    names = [fold.norm for fold in (*fxfuse.explain(model).folded, *fxfuse.explain(model).constants)]
    fused = fxfuse.fuse(model, leave=names)
    report = fxfuse.report(fused)
    assert not report.folded and not report.constants and len(report.refused) == 3
    for name, tensor in model.state_dict().items():
        assert torch.equal(fused.state_dict()[name], tensor)


def test_names_that_are_no_norms_are_an_error_with_the_nearest():
    with pytest.raises(fxfuse.UsageError, match=r"leave names '1.bm', which is no norm .*; nearest: 1.bn"):
        fxfuse.fuse(blocks(), leave=["1.bm"])
    with pytest.raises(fxfuse.UsageError, match=r"pass a collection of names of norms, \['1.bn'\]"):
        fxfuse.fuse(blocks(), leave="1.bn")
