"""Operands for which oneDNN has a kernel of reference only: torch computes them, or a copy is read."""

from functools import partial
from itertools import permutations, product

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxfuse
from fxfuse.errors import UnsupportedError
from fxfuse.lowering import onednn, operands, torchscript
from fxfuse.lowering.operands import _has_only_a_reference
from tests.lowering import HAS_AVX512, Written, X, folded, near, needs_bfloat16
from tests.test_onednn import assert_same_for_large_numbers, called, kernels

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch's tracer


def halves(m, y):
    return m.wide(y).chunk(2, 1)


def tokens(y):
    return y.flatten(2).transpose(1, 2)


def sum_of_halves(rows, **kwargs):
    one, other = rows.chunk(2, -1)
    return torch.add(one, other, **kwargs)


def gated(activation):
    def function(m, y):
        one, other = halves(m, y)
        return m.other(activation(one) * other)

    return function


def row_gated(m, y):
    one, other = m.rows(tokens(y)).chunk(2, -1)
    return m.head(F.silu(one) * other)


# By what would be computed by a kernel of reference.
REFERENCES = {
    ("binary", "product of halves of rows"): row_gated,
    ("binary", "sum of halves of rows"): lambda m, y: m.head(F.relu(sum_of_halves(m.rows(tokens(y))))),
    ("binary", "sum with a factor"): lambda m, y: m.head(
        F.relu(sum_of_halves(m.rows(tokens(y)), alpha=-0.7))
    ),
    ("binary", "quotient of halves of rows"): lambda m, y: m.head(
        F.relu((z := m.rows(tokens(y)))[..., :8] / z[..., 8:].cosh())
    ),
    ("binary", "number for each sample"): lambda m, y: m.head(
        F.relu((z := m.head(tokens(y))) * z.cumsum(1).mean((1, 2), keepdim=True))
    ),
    ("binary", "number for each row of each channel"): lambda m, y: m.other(
        F.relu(m.other(y) * y.cumsum(1).mean(2, keepdim=True))
    ),
    ("binary", "quotient by the larger one"): lambda m, y: m.other(
        F.relu(y.amax((0, 2, 3), keepdim=True) / (m.other(y).abs() + 1))
    ),
    ("eltwise", "gate of halves of images"): gated(torch.sigmoid),
    ("eltwise", "gate of what torch computes"): lambda m, y: m.other(
        torch.tanh(y.cumsum(1)) * y.cumsum(2) + m.other(y)
    ),
    ("eltwise", "swish in words"): lambda m, y: m.other((z := m.other(y)) * torch.sigmoid(z)),
    ("eltwise", "swish the other way"): lambda m, y: m.other(torch.sigmoid(z := m.other(y)) * z),
    ("softmax", "softmax of heads"): lambda m, y: m.head(
        F.relu(tokens(y).unflatten(2, (2, 4)).transpose(1, 2).softmax(-1)).transpose(1, 2).flatten(2)
    ),
    ("softmax", "softmax of what is transposed"): lambda m, y: m.head(
        F.relu(m.rows(tokens(y))[..., :8].transpose(1, 2).softmax(-1)).transpose(1, 2)
    ),
    ("matmul", "product of what convolutions give"): lambda m, y: m.other(y) @ m.other(y).relu(),
    ("matmul", "product behind a convolution of products"): lambda m, y: (
        m.other((z := y.cumsum(1)) @ z.transpose(2, 3)) @ z
    ),
    ("matmul", "product of what is concatenated"): lambda m, y: (
        torch.cat([m.other(y), y], 1) @ torch.cat([y, y], 1).cumsum(1)
    ),
    ("pooling", "maxima of a half"): lambda m, y: m.other(F.max_pool2d(halves(m, y)[0], 2)),
    ("pooling", "means of a half"): lambda m, y: m.other(F.avg_pool2d(halves(m, y)[1], 2)),
}


def network(function):
    layers = {"wide": nn.Conv2d(8, 16, 1), "other": nn.Conv2d(8, 8, 1)}
    layers |= {"rows": nn.Linear(8, 16), "head": nn.Linear(8, 8)}
    return folded(Written(function, **layers))


def of_reference(call, capfd):
    """The kernels of reference in a call, by primitive."""
    capfd.readouterr()
    with torch.backends.mkldnn.verbose(torch.backends.mkldnn.VERBOSE_ON):
        call()
    lines = [line.split(",") for line in capfd.readouterr().out.splitlines()]
    primitives = [line[5:7] for line in lines if line[2:4] == ["primitive", "exec"]]
    assert primitives, "oneDNN was not seen to compute anything"
    return {kind for kind, kernel in primitives if kernel.startswith("ref:")}


@pytest.mark.parametrize(("kind", "way"), REFERENCES)
def test_there_are_none(kind, way, capfd, monkeypatch):
    model = network(REFERENCES[kind, way])
    lowered = fxfuse.lower(model, (X,))
    assert not lowered.lowering.reason
    near(lowered, X)
    assert not of_reference(partial(lowered, X), capfd)
    for each in ("lay_out_operands", "_join_swish", "_keep_from_activations"):
        monkeypatch.setattr(torchscript, each, lambda *_: None)
    plain = fxfuse.lower(model, (X,))
    assert not plain.lowering.reason
    assert of_reference(partial(plain, X), capfd) == {kind}, "there is nothing to avoid"


# What oneDNN's other kernels know stays with it.
KNOWN = {
    "same sizes": lambda m, y: m.other(y) + m.other(y.relu()),
    "a number for each channel": lambda m, y: m.other(y) * y.mean((2, 3), keepdim=True),
    "a number for each place": lambda m, y: F.relu(m.other(y) * y.mean(1, keepdim=True)),
    "one number": lambda m, y: m.other(y.cumsum(1) * 3 + m.other(y)),
    "the last axis": lambda m, y: F.relu(m.head(tokens(y)) + m.head(tokens(y)).cumsum(1)[:1, :1]),
    "the last axis and samples": lambda m, y: F.relu(m.head(z := tokens(y)) * z.mean(1, keepdim=True)),
}


@pytest.mark.parametrize("way", KNOWN)
def test_other_operands_stay_with_onednn(way, capfd):
    lowered = fxfuse.lower(network(KNOWN[way]), (X,))
    assert not lowered.lowering.reason
    near(lowered, X)
    assert not of_reference(partial(lowered, X), capfd)
    inside, _ = kernels()
    assert any({"add", "mul"} & {*each} for each in inside)


# What must not be taken for something else.
OTHERS = {
    "a quotient of single numbers": lambda m, y: m.other(y) / (y.mean() - 9 * y.amax()),
    "softmax of a single number": lambda m, y: m.other(y) + y.mean().softmax(0),
    "sum with a mask": lambda m, y: m.head((z := m.rows(tokens(y)))[..., :8] + (z[..., 8:] > 0)),
    "swish of integers": lambda m, y: m.other(y) + (n := (y > 0).long() + 1) * torch.sigmoid(n),
    "swish of what is spread": lambda m, y: m.other(y) * torch.sigmoid(m.other(y)[:, :1]),
    "product of masks": lambda m, y: m.other(y) * ((y > 0) * (y < 1)),
    "sum of integers": lambda m, y: m.other(y) + ((y > 0).long()[:, :4] + (y > 1).long()[:, 4:]).sum(),
    "floor of a quotient": lambda m, y: m.head(
        torch.div((z := m.rows(tokens(y)))[..., :8], z[..., 8:].cosh(), rounding_mode="floor")
    ),
    "softmax in another dtype": lambda m, y: m.head(
        m.rows(tokens(y))[..., :8].transpose(1, 2).softmax(-1, dtype=y.dtype).transpose(1, 2)
    ),
    "number in front": lambda m, y: (
        m.head(torch.add(0.5, (z := m.rows(tokens(y)))[..., :8], alpha=2)) + z[..., 8:]
    ),
}


@pytest.mark.parametrize("way", OTHERS)
def test_what_is_something_else(way):
    lowered = fxfuse.lower(network(OTHERS[way]), (X,))
    assert not lowered.lowering.reason
    near(lowered, X)


def test_a_gate_of_what_is_written_to_later():
    def written(_, y):
        gate = torch.sigmoid(y)
        y[:, :4].clamp_(-3, 3)
        return y * gate

    assert_same_for_large_numbers(called(written), atol=1e-4)


@needs_bfloat16
def test_bfloat16(capfd):
    model = network(row_gated)
    lowered = fxfuse.lower(model, (X,), dtype=torch.bfloat16)
    assert not lowered.lowering.reason and not of_reference(partial(lowered, X), capfd)
    assert onednn.edit is torchscript.edit


def pairs_of(rank):
    """Of a product: a whole one and one that is spread over it, in all ways, orders and memory formats."""
    formats = [torch.contiguous_format, torch.channels_last] if rank == 4 else [torch.contiguous_format]
    for short in product((False, True), repeat=rank):
        sizes = [1 if one else axis + 3 for axis, one in enumerate(short)]
        for spread in product((False, True), repeat=rank):
            part = [1 if one else size for size, one in zip(sizes, spread, strict=True)]
            if part != sizes and (rank < 5 or not any(short)):
                for one, other in product(formats, formats):
                    whole = torch.randn(sizes).contiguous(memory_format=one)
                    yield whole, torch.randn(part).contiguous(memory_format=other)


@pytest.mark.parametrize("rank", [2, 3, 4, 5])
def test_the_rule_for_operands_that_are_spread(rank, capfd):
    """It says of all of them what oneDNN does."""
    seen = set()
    for whole, part in pairs_of(rank):
        for given in ((whole, part), (part, whole)):
            with onednn._onednn_graph(True):
                traced = torch.jit.trace(lambda one, other: torch.relu(one * other), given, check_trace=False)
                for _ in range(2):
                    traced(*given)
                is_reference = bool(of_reference(partial(traced, *given), capfd))
            assert _has_only_a_reference(traced.graph.findNode("aten::mul")) == is_reference, given[1].shape
            seen.add(is_reference)
    assert seen == ({False} if rank == 2 else {False, True})


def laid_out(sizes, order, gap, generator):
    """Numbers whose axes lie in `order` in memory, the slowest first, the one at place `gap` with gaps."""
    spread = [size * (1 + (place == gap)) for place, size in enumerate(sizes[axis] for axis in order)]
    numbers = torch.randn(spread, generator=generator)
    for place, axis in enumerate(order):
        numbers = numbers.narrow(place, 0, sizes[axis])
    return numbers.permute([order.index(axis) for axis in range(len(sizes))])


def wrong_products(*batch, rows, width, columns):
    """How many products are wrong of matrices that lie in memory in all ways, and of how many."""
    generator = torch.Generator().manual_seed(0)
    module = fx.symbolic_trace(lambda one, other: (2 * (one @ other),))
    sizes = (*batch, rows, width), (*batch, width, columns)
    axes = range(len(batch) + 2)
    wrong = []
    for order, gap, place in product(permutations(axes), (None, *axes[1:]), (0, 1)):
        pair = [torch.randn(each, generator=generator) for each in sizes]
        pair[place] = laid_out(sizes[place], order, gap, generator)
        (result,) = onednn._compiled(module, pair)(pair)
        exact = 2 * (pair[0].double() @ pair[1].double())
        wrong.append(not bool((result - exact).abs().max() < 1e-4 * exact.abs().max()))
    return sum(wrong), len(wrong)


@pytest.mark.parametrize(
    "sizes", [(4, 4, 4, 4, 4), (2, 3, 2, 5, 2), (3, 3, 1, 5, 3), (1, 3, 4, 1, 5), (3, 1, 2, 1, 3)]
)
def test_products_of_matrices_in_all_orders(sizes, monkeypatch):
    *batch, rows, width, columns = sizes
    products = partial(wrong_products, *batch, rows=rows, width=width, columns=columns)
    assert products() == (0, 192)
    if sizes == (3, 3, 1, 5, 3) and not HAS_AVX512:
        pytest.skip("the rest: only oneDNN's kernels for AVX-512 read them wrongly")
    monkeypatch.setattr(operands, "_is_multiplied", lambda *_: True)
    assert products()[0], "oneDNN reads them all"


@pytest.mark.parametrize("batch", [(3,), (1,), (2, 2, 2)])
def test_products_of_other_ranks_are_left_to_torch(batch):
    with pytest.raises(UnsupportedError, match="no kernel for any part"):
        wrong_products(*batch, rows=2, width=3, columns=2)
