"""Traces of which a part cannot be compiled: the rest is, and the function is the same."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.lowering import onednn
from fxfuse.lowering.halves import halves
from tests.lowering import failing, needs_avx512, operators
from tests.support import randomise

pytestmark = pytest.mark.filterwarnings("ignore:.*deprecated", "ignore:Converting a tensor")  # of tracing

INPUTS = torch.randn(2, 8), torch.randn(2, 5)
FACTORS = torch.tensor([[0.5], [2.0]])


def mixed(x, z):
    """Views, lists, parts of what an operator gives, constants, values that are read late, and an input."""
    y = x * FACTORS
    early = y.exp()
    first, (second, third) = y[:, :4], torch.split(y, [3, 5], 1)
    third = third.add(z).relu()
    joined = torch.cat([first, second, *y.view(2, 8).chunk(2, 1)], 1)
    return early, third.sum(1), joined * early.mean(), early, z


def trace(function, *inputs):
    return torch.jit.trace(function, inputs, check_trace=False).graph


def called(graph, *inputs):
    return torch._C._create_function_from_graph("graph", graph)(*inputs)


def in_parts(graph, inputs, parts):
    """What its smallest parts give, one after the other; they are written down."""
    two = halves(graph)
    if two is None:
        parts.append(graph)
        return called(graph, *inputs)
    return in_parts(two[1], (*inputs, *in_parts(two[0], inputs, parts)), parts)


def test_all_parts_together_are_the_graph():
    graph, parts = trace(mixed, *INPUTS), []
    results = in_parts(graph, INPUTS, parts)
    assert [torch.equal(*pair) for pair in zip(results, mixed(*INPUTS), strict=True)] == [True] * 5
    kinds = [operators(part) for part in parts]
    assert max(map(len, kinds)) == 1
    # Lists of parts are made by views, which cost nothing: they are made again by who reads them.
    again = {"aten::chunk", "aten::split_with_sizes", "aten::split"}
    made = sorted(kind for part in kinds for kind in part if kind not in again)
    assert made == sorted(kind for kind in operators(graph) if kind not in again)


def test_numbers_that_are_computed_end_somewhere():
    graph, parts = trace(lambda x: x.view(x.numel(), x.numel() // 16).exp(), *INPUTS[:1]), []
    assert torch.equal(in_parts(graph, INPUTS[:1], parts), INPUTS[0].view(16, 1).exp())
    assert len(parts) > 1


def test_halves_are_as_large():
    one, other = map(operators, halves(trace(mixed, *INPUTS)))
    assert abs(len(one) - len(other)) <= 2 and len(one) > 4


def branching(x):
    if bool(x.sum() > 0):
        x = x + 1
    return x


# No half of these is made: it might hold what the other writes to.
WHOLE = {
    "one operator": lambda x: x.relu(),
    "none": lambda x: x,
    "writes": lambda x: x.exp()[:, :2].mul_(2).relu(),
    "writes to what is given": lambda x: torch.add(x, 1, out=x.exp()).relu(),
    "branches": lambda x: torch.jit.script(branching)(x.relu()).exp(),
}


@pytest.mark.parametrize("way", WHOLE)
def test_what_stays_whole(way):
    assert halves(trace(WHOLE[way], *INPUTS[:1])) is None


class OnePixel(nn.Module):
    """A convolution and a depthwise one, which oneDNN Graph joins.

    With AVX-512 that fails with images of one pixel.
    """

    def __init__(self, *, writes=False):
        super().__init__()
        self.writes = writes
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(inplace=True))
        self.deep = nn.Sequential(
            *(nn.Conv2d(8, 16, 1), nn.ReLU(inplace=True)),
            *(nn.Conv2d(16, 16, 3, padding=1, groups=16), nn.ReLU(inplace=True)),
        )
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        y = self.stem(x)
        if self.writes:
            y[:, :4].mul_(2)
        z = self.deep(y)
        return self.head(z.flatten(1)), y + z[:, :8]


def one_pixel(**how):
    return fxfuse.fuse(randomise(OnePixel(**how), 0).float())


@pytest.fixture
def found(monkeypatch):
    """For each trace that was compiled how many kernels of oneDNN Graph it has."""
    own, found = onednn._compile_whole, []

    def function(*given):
        function, kernels = own(*given)
        found.append(kernels)
        return function, kernels

    monkeypatch.setattr(onednn, "_compile_whole", function)
    return found


@pytest.mark.parametrize("forced", [True, pytest.param(False, marks=needs_avx512)])
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_where_onednn_graph_fails_the_rest_is_compiled(monkeypatch, found, batch, forced, caplog):
    if forced:
        failing(monkeypatch, "aten::_convolution", least=2)
    folded = one_pixel()
    caplog.set_level("INFO", "fxfuse")
    x = torch.randn(batch, 3, 3, 3)
    lowered = fxfuse.lower(folded, (x,))
    assert not lowered.lowering.reason
    assert "oneDNN Graph fails" in caplog.text
    if batch < 9:  # else there are programs for several slices
        assert sum(found) == 4  # each convolution and the linear layer
    for values in (x, x - 1):
        before = values.clone()
        with torch.no_grad():
            exact = copy.deepcopy(folded).double()(values.double())
        for one, other in zip(lowered(values), exact, strict=True):
            assert float((one - other).abs().max()) < 1e-5 * float(other.abs().max())
        assert torch.equal(values, before)


def test_what_writes_is_not_cut(monkeypatch):
    failing(monkeypatch)
    folded = one_pixel(writes=True)
    x = torch.randn(2, 3, 3, 3)
    lowered = fxfuse.lower(folded, (x,))
    assert lowered.lowering.reason.startswith("oneDNN Graph fails: ")
    assert [torch.equal(*pair) for pair in zip(lowered(x), folded(x), strict=True)] == [True] * 2


def test_an_operator_that_fails_by_itself_runs_as_it_is(monkeypatch, found):
    failing(monkeypatch, "aten::_convolution")
    folded = one_pixel()
    x = torch.randn(2, 3, 3, 3)
    lowered = fxfuse.lower(folded, (x,))
    assert not lowered.lowering.reason and sum(found) > 0
    assert not torch._C._jit_llga_enabled()
    for values in (x, x - 1):
        for one, other in zip(lowered(values), folded(values), strict=True):
            assert torch.allclose(one, other, atol=1e-6)


def test_where_all_of_it_fails_the_folded_module_answers(monkeypatch, caplog):
    failing(monkeypatch)
    folded = one_pixel()
    x = torch.randn(2, 3, 3, 3)
    with caplog.at_level("INFO", "fxfuse"):
        lowered = fxfuse.lower(folded, (x,))
    assert lowered.lowering.reason == "oneDNN Graph fails: no kernel today"
    assert caplog.text.count("no kernel today") > 4
    assert [torch.equal(*pair) for pair in zip(lowered(x), folded(x), strict=True)] == [True] * 2
