"""Traces of which a part cannot be compiled: the rest is, and the function is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.lowering import onednn
from fxfuse.lowering.halves import halves, writes
from tests.support import randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated")  # of tracing


def mixed(x, z):
    """Views, lists, parts of what an operator gives, constants, and values that are read late."""
    y = x * FACTORS
    early = y.exp()
    first, (second, third) = y[:, :4], torch.split(y, [3, 5], 1)
    third = third.add(z).relu()
    joined = torch.cat([first, second, *y.view(2, 8).chunk(2, 1)], 1)
    return third.sum(1), joined * early.mean(), (x, z[0])[1]


FACTORS = torch.tensor([[0.5], [2.0]])
INPUTS = torch.randn(2, 8), torch.randn(2, 5)


def trace(function, *inputs):
    return torch.jit.trace(function, inputs, check_trace=False).graph


def called(graph, *inputs):
    return torch._C._create_function_from_graph("graph", graph)(*inputs)


def steps(graph):
    return [node.kind() for node in graph.nodes() if node.schema() != "(no schema)"]


def in_parts(graph, inputs, parts):
    """What its smallest parts give, one after the other; they are written down."""
    two = halves(graph)
    if two is None:
        parts.append(graph)
        return called(graph, *inputs)
    return in_parts(two[1], (*inputs, *in_parts(two[0], inputs, parts)), parts)


def test_all_parts_together_are_the_graph():
    graph, parts = trace(mixed, *INPUTS), []
    expected = mixed(*INPUTS)
    assert not writes(graph)
    assert all(map(torch.equal, in_parts(graph, INPUTS, parts), expected))
    assert all(len(steps(part)) <= 1 for part in parts)
    kinds = [kind for part in parts for kind in steps(part)]
    assert {*kinds} == {*steps(graph)} and len(kinds) >= len(steps(graph))


def test_halves_are_as_large():
    graph = trace(mixed, *INPUTS)
    one, other = map(steps, halves(graph))
    assert abs(len(one) - len(other)) <= 2 and len(one) > 4


def test_writes_are_seen():
    assert writes(trace(lambda x: x[:, :2].mul_(2), *INPUTS[:1]))
    assert writes(trace(lambda x: torch.add(x, 1, out=x.exp()), *INPUTS[:1]))


class OnePixel(nn.Module):
    """A convolution and a depthwise one, which oneDNN Graph joins; that fails with images of one pixel."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(
            *(nn.Conv2d(8, 16, 1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(inplace=True)),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        y = self.stem(x)
        z = self.deep(y)
        return self.head(z.flatten(1)), y + z[:, :8]


@pytest.fixture
def found(monkeypatch):
    """How many kernels there are in each trace that was compiled; None: that failed."""
    own, found = onednn._function, []

    def function(*given, **options):
        found.append(None)
        function, found[-1] = own(*given, **options)
        return function, found[-1]

    monkeypatch.setattr(onednn, "_function", function)
    return found


@pytest.mark.parametrize("batch", [1, 2, 9])
def test_where_onednn_graph_fails_the_rest_is_compiled(found, batch):
    folded = fxfuse.fuse(randomise(OnePixel(), 0).float())
    x = torch.randn(batch, 3, 3, 3)
    lowered = fxfuse.lower(folded, (x,))
    assert not lowered.lowering.reason
    assert found[0] is None and sum(filter(None, found)) >= 3
    for values in (x, x - 1):
        before = values.clone()
        with torch.no_grad():
            exact = copy.deepcopy(folded).double()(values.double())
        for one, other in zip(lowered(values), exact, strict=True):
            assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max())
        assert torch.equal(values, before)


def test_an_operator_that_fails_by_itself_runs_as_it_is(monkeypatch):
    own = onednn._function

    def function(graph, inputs, *, kernels):
        if kernels and "aten::_convolution" in steps(graph):
            raise RuntimeError("no convolutions today")
        return own(graph, inputs, kernels=kernels)

    monkeypatch.setattr(onednn, "_function", function)
    folded = fxfuse.fuse(randomise(OnePixel(), 0).float())
    x = torch.randn(2, 3, 3, 3)
    lowered = fxfuse.lower(folded, (x,))
    assert not lowered.lowering.reason
    assert all(
        torch.allclose(one, other, atol=1e-6) for one, other in zip(lowered(x), folded(x), strict=True)
    )


def test_where_all_of_it_fails_the_folded_module_answers(monkeypatch, caplog):
    own = onednn._function

    def function(graph, inputs, *, kernels):
        if kernels:
            raise RuntimeError("the interpreter:\nno kernel today")
        return own(graph, inputs, kernels=kernels)

    monkeypatch.setattr(onednn, "_function", function)
    folded = fxfuse.fuse(randomise(OnePixel(), 0).float())
    x = torch.randn(2, 3, 3, 3)
    with caplog.at_level("INFO", "fxfuse"):
        lowered = fxfuse.lower(folded, (x,))
    assert "no kernel for any part" in lowered.lowering.reason
    assert "no kernel today" in caplog.text
    assert all(map(torch.equal, lowered(x), folded(x)))
    monkeypatch.setattr(onednn, "writes", lambda graph: True)
    assert "no kernel today" in fxfuse.lower(folded, (x,)).lowering.reason
