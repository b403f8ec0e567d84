"""Networks to lower, and a check against float64."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.lowering import onednn
from fxfuse.lowering.halves import is_operator
from tests.support import randomise

HAS_BFLOAT16 = torch.backends.mkldnn.is_available() and torch.ops.mkldnn._is_mkldnn_bf16_supported()
# torch's kernels and oneDNN's choose alike, unless environment variables say otherwise.
HAS_AVX512 = torch.backends.cpu.get_cpu_capability() == "AVX512"
needs_bfloat16 = pytest.mark.skipif(not HAS_BFLOAT16, reason="oneDNN has no bfloat16 for this processor")
needs_avx512 = pytest.mark.skipif(not HAS_AVX512, reason="only oneDNN's kernels for AVX-512 have the mistake")
DTYPES = [None, pytest.param(torch.bfloat16, marks=needs_bfloat16)]
ENGINES = ("torch", "openvino", "onnxruntime")
X = torch.randn(2, 3, 12, 12, generator=torch.Generator().manual_seed(1))


class Net(nn.Module):
    """Convolutions of several kinds, a residual, a pooling and a head."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16), nn.ReLU())
        self.deep = nn.Sequential(
            nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False), nn.BatchNorm2d(16), nn.Hardswish()
        )
        self.point = nn.Sequential(nn.Conv2d(16, 16, 1, bias=False), nn.BatchNorm2d(16))
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.point(self.deep(x)))
        return self.head(F.max_pool2d(x, 2).mean((2, 3)))


class Written(nn.Module):
    """A convolution, and then a function."""

    def __init__(self, function, **modules):
        super().__init__()
        self.function = function
        self.conv = nn.Conv2d(3, 8, 3, padding=1)
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x):
        return self.function(self, self.conv(x))


class WithSecond(Written):
    """The same with a second input."""

    def forward(self, x, z):
        return self.function(self, self.conv(x), z)


def operators(graph):
    return [node.kind() for node in graph.nodes() if is_operator(node)]


def failing(monkeypatch, *kinds, least=1):
    """Has oneDNN Graph fail on so many of these operators, or of all."""
    own = onednn._compile_whole

    def function(graph, inputs):
        found = [kind for kind in operators(graph) if kind in kinds or not kinds]
        if torch._C._jit_llga_enabled() and len(found) >= least:
            raise RuntimeError("the interpreter:\nno kernel today")
        return own(graph, inputs)

    monkeypatch.setattr(onednn, "_compile_whole", function)


def folded(model, seed=0):
    return fxfuse.fuse(randomise(model, seed).float())


def near(lowered, *inputs, limit=2e-5):
    """Holds it against a float64 run of what it was made of."""
    with torch.no_grad():
        exact = copy.deepcopy(lowered.folded).double()(*(x.double() for x in inputs))
        result = lowered(*inputs)
        again = lowered(*(x + 0.1 for x in inputs))  # a constant would not notice
    leaves, exact = (torch.utils._pytree.tree_leaves(each) for each in (result, exact))
    assert len(leaves) == len(exact)
    for one, other in zip(leaves, exact, strict=True):
        assert one.shape == other.shape and one.dtype is torch.float32 and not one.requires_grad
        assert float((one - other).abs().max()) <= limit * float(other.abs().max())
    assert not all(map(torch.equal, leaves, torch.utils._pytree.tree_leaves(again))), (
        "it does not depend on its inputs"
    )
