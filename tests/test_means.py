"""Means over images go to oneDNN Graph as poolings; other means stay."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from tests.test_lower import Written, X, folded, kernels, near

pytestmark = pytest.mark.filterwarnings("ignore")  # of the tracer

# A squeeze and excitation needs the mean with its axes, a head without them.
MEANS = {
    "module": lambda m, y: y * m.pool(y).sigmoid(),
    "function": lambda _, y: y * F.adaptive_avg_pool2d(y, (1, 1)).sigmoid(),
    "adaptive to a number": lambda _, y: y * F.adaptive_avg_pool2d(y, 1).sigmoid(),
    "mean": lambda _, y: y * y.mean((2, 3), keepdim=True).sigmoid(),
    "negative axes": lambda _, y: y * torch.mean(y, [-1, -2], keepdim=True).sigmoid(),
    "axes gone": lambda _, y: y.relu().mean((2, 3)),
    "numpy's names": lambda _, y: y.relu().mean(axis=(2, 3)),
}
OTHERS = {
    "over channels": lambda _, y: y.relu().mean(1, keepdim=True),
    "over one axis": lambda _, y: y.relu().mean((2,)),
    "over everything": lambda _, y: y * y.mean(),
    "over samples too": lambda _, y: y * y.mean((0, 2, 3), keepdim=True),
    "larger windows": lambda _, y: F.adaptive_avg_pool2d(y.relu(), (2, 3)),
    "as it is": lambda _, y: F.adaptive_avg_pool2d(y.relu(), (None, 1)),
    "another dtype": lambda _, y: (y * y.mean((2, 3), keepdim=True, dtype=torch.float64)).float(),
    "three axes": lambda _, y: y.relu().flatten(2).mean((1, 2)),
}


@pytest.mark.parametrize("way", MEANS)
def test_means_over_images_are_poolings(way):
    lowered = fxfuse.lower(folded(Written(MEANS[way], pool=nn.AdaptiveAvgPool2d(1))), (X,))
    assert not lowered.lowering.reason
    inside, left = kernels()
    assert any("avg_pool2d" in kernel for kernel in inside), inside
    assert not {"aten::mean", "aten::adaptive_avg_pool2d", "aten::avg_pool2d"} & {*left}
    near(lowered, X)
    near(lowered, torch.randn(3, 3, 9, 7))


@pytest.mark.parametrize("way", OTHERS)
def test_other_means_stay(way):
    lowered = fxfuse.lower(folded(Written(OTHERS[way])), (X,))
    assert not lowered.lowering.reason
    inside, _ = kernels()
    assert not any("avg_pool2d" in kernel for kernel in inside), inside
    near(lowered, X)


def test_exported_means_are_poolings():
    model = folded(Written(MEANS["mean"]))
    program = torch.export.export(model, (X,)).run_decompositions()
    lowered = fxfuse.lower(program, (X,))
    assert not lowered.lowering.reason
    assert any("avg_pool2d" in kernel for kernel in kernels()[0])
    near(lowered, X)
