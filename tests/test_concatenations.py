"""Concatenations that grow, on the engine "torch"."""

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.lowering import onednn
from fxfuse.lowering.concatenations import grow
from fxfuse.lowering.specialise import specialise
from tests.lowering import DTYPES, X, failing, folded, near
from tests.support import randomise
from tests.test_onednn import kernels

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's tracer


class Block(nn.Module):
    """A dense block: each layer reads all before it."""

    def __init__(self, way, layers=3):
        super().__init__()
        self.way = way
        self.stem = nn.Conv2d(3, 8, 3, padding=1)
        channels = [8 + 4 * number for number in range(layers + 1)]
        self.norms = nn.ModuleList(nn.BatchNorm2d(each) for each in channels)
        self.convs = nn.ModuleList(nn.Conv2d(each, 4, 3, padding=1, bias=False) for each in channels[:-1])

    def forward(self, x):
        return self.way(self, self.stem(x))


def by_lists(m, y):
    parts = [y]
    for norm, conv in zip(m.norms[:-1], m.convs, strict=True):
        parts.append(conv(norm(torch.cat(parts, 1)).relu()))
    return m.norms[-1](torch.cat(parts, 1)).relu()


def by_pairs(m, y):
    for norm, conv in zip(m.norms[:-1], m.convs, strict=True):
        y = torch.cat((y, conv(norm(y).relu())), dim=-3)
    return m.norms[-1](y).relu()


def by_functions(m, y):
    def normalised(y, norm):
        return torch.batch_norm(
            y, norm.weight, norm.bias, norm.running_mean, norm.running_var, False, 0.1, norm.eps, True
        )

    parts = [y]
    for norm, conv in zip(m.norms[:-1], m.convs, strict=True):
        parts.append(conv(normalised(torch.cat(parts, 1), norm).relu()))
    return normalised(torch.concat(parts, 1), m.norms[-1]).relu()


def in_twos(m, y):
    """Two go on from the same beginning; one of them in the same block."""
    first = m.convs[0](m.norms[0](y).relu())
    both = m.norms[1](torch.cat([y, first], 1)).relu()
    one, other = m.convs[1](both), m.convs[1](both.sigmoid())
    return m.norms[2](torch.cat([y, first, one], 1)).relu() + m.norms[2](torch.cat([y, first, other], 1))


GROWING = {by_lists: 4, by_pairs: 3, by_functions: 4, in_twos: 2}


def concatenations(graph):
    return sum("cat" in str(node.target) for node in graph.nodes if node.op == "call_function")


@pytest.mark.parametrize("way", GROWING)
@pytest.mark.parametrize("batch", [1, 2, 9])
def test_parts_are_written_once(way, batch):
    model, x = folded(Block(way)), torch.randn(batch, 3, 12, 12)
    graph = specialise(model, (x,)).module
    before = concatenations(graph.graph)
    grow(graph)
    assert before - concatenations(graph.graph) == GROWING[way]
    expected = model(x)
    assert float((graph(x)[0] - expected).abs().max()) <= 1e-5 * float(expected.abs().max())
    lowered = fxfuse.lower(model, (x,))
    assert not lowered.lowering.reason
    near(lowered, x)
    assert torch.equal(lowered(x), lowered(x))


@pytest.mark.parametrize("dtype", DTYPES)
def test_no_kernel_concatenates(dtype):
    lowered = fxfuse.lower(folded(Block(by_lists)), (X,), dtype=dtype)
    assert not lowered.lowering.reason
    lowered(X)
    inside, left = kernels()
    assert not any("cat" in each for each in inside) and "aten::cat" not in left


def changed(m, y):
    parts = [y, m.convs[0](m.norms[0](y).relu())]
    first = m.norms[1](torch.cat(parts, 1)).relu()
    parts[1].clamp_(-0.3, 0.3)
    return m.norms[2](torch.cat([*parts, m.convs[1](first)], 1)).relu()


def changed_by_another_name(m, y):
    z = y.relu_()
    first = m.convs[0](m.norms[0](z).relu())
    second = m.convs[1](m.norms[1](torch.cat([z, first], 1)).relu())
    y.clamp_(max=0.3)
    return m.norms[2](torch.cat([z, first, second], 1)).relu()


def given_room(m, y):
    first = m.convs[0](m.norms[0](y).relu())
    room = torch.zeros_like(torch.cat([y, y[:, :4]], 2 - 1))
    second = m.convs[1](m.norms[1](torch.cat([y, first], 1, out=room)).relu())
    return m.norms[2](torch.cat([y, first, second], 1)).relu() * room.mean()


def begun_twice(m, y):
    both = torch.cat([y, m.convs[0](m.norms[0](y).relu())], 1)
    return m.norms[1](both).relu().mean() + torch.cat([both, both], 1)


def read_otherwise(m, y):
    both = torch.cat([y, m.convs[0](y)], 1)
    return m.norms[2](torch.cat([both, m.convs[1](both)], 1)).relu()


def given(m, y):
    both = torch.cat([y, m.convs[0](m.norms[0](y).relu())], 1)
    return both, m.norms[2](torch.cat([both, m.convs[1](m.norms[1](both).relu())], 1)).relu()


def along_rows(m, y):
    twice = torch.cat([y, m.convs[0](m.norms[0](y).relu()).repeat(1, 2, 1, 1)], 2)
    return m.norms[0](twice).relu() + m.norms[0](torch.cat([y, y, y], 2)[:, :, :24])


def of_two_dtypes(m, y):
    both = torch.cat([y, m.convs[0](m.norms[0](y).relu()).double()], 1)
    return m.norms[2](
        torch.cat([both, m.convs[1](m.norms[1](both.to(y.dtype)).relu())], 1).to(y.dtype)
    ).relu()


@pytest.mark.parametrize(
    "way",
    [
        *(changed, changed_by_another_name, given_room, begun_twice),
        *(read_otherwise, given, along_rows, of_two_dtypes),
    ],
)
def test_others_stay(way):
    model = folded(Block(way))
    graph = specialise(model, (X,)).module
    before = concatenations(graph.graph)
    grow(graph)
    assert concatenations(graph.graph) == before >= 2
    lowered = fxfuse.lower(model, (X,))
    assert not lowered.lowering.reason
    near(lowered, X)


def test_results_of_two_calls_are_apart():
    lowered = fxfuse.lower(fxfuse.fuse(randomise(Block(by_lists)).float()), (X,))
    first = lowered(X)
    kept = first.clone()
    lowered(X + 1)
    assert torch.equal(first, kept)


def test_where_a_part_of_the_trace_fails(monkeypatch):
    """What writes in place is not cut in halves: then nothing grows."""

    def way(m, y):
        return m.deep(by_lists(m, y).mean((2, 3), keepdim=True))

    model = Block(way)
    point, spread = nn.Conv2d(20, 16, 1), nn.Conv2d(16, 16, 3, padding=1, groups=16)
    model.deep = nn.Sequential(point, nn.ReLU(inplace=True), spread, nn.ReLU(inplace=True))
    failing(monkeypatch, "aten::_convolution", least=2)
    own, tries = onednn._edited, []
    monkeypatch.setattr(
        onednn, "_edited", lambda *given, grows: tries.append(grows) or own(*given, grows=grows)
    )
    lowered = fxfuse.lower(folded(model), (X,))
    assert not lowered.lowering.reason and tries == [True, False]
    near(lowered, X)
