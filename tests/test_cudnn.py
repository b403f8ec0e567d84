"""The engine "torch" on a GPU, whose kernels are stood in for on a CPU, and CUDA graphs."""

from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.lowering import cudnn, engines
from fxfuse.lowering import lower as lower_module
from fxfuse.lowering import lowered as lowered_module
from tests.lowering import Net, WithSecond, Written, X, folded, near

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines; their numbers are what is looked at


@pytest.fixture
def cudnn_calls(monkeypatch):
    """Has the engine "torch" of a GPU on this CPU, with operators for cuDNN's kernels; lists their calls."""
    calls = []

    def convolution(x, weight, bias, stride, padding, dilation, groups):
        return torch.convolution(x, weight, bias, stride, padding, dilation, False, [0, 0], groups)

    def relu(*args):
        calls.append("relu")
        return convolution(*args).relu()

    def add_relu(x, weight, z, alpha, *args):
        calls.append("add relu")
        assert z.shape == convolution(x, weight, *args).shape
        assert all(each.is_contiguous(memory_format=torch.channels_last) for each in (x, weight, z))
        return (convolution(x, weight, *args) + alpha * z).relu()

    monkeypatch.setitem(engines.ENGINES, "torch", engines.Engine(cudnn.compile))
    monkeypatch.setattr(cudnn, "medians", lambda functions, rounds: {"apart": 2.0, "together": 1.0})
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl("cudnn_convolution_relu", relu, "CPU")
        library.impl("cudnn_convolution_add_relu", add_relu, "CPU")
        yield calls


def two_readers(m, y):
    z = m.second(y)
    return z.relu() + z


def under_a_view(m, y):
    flat = y.flatten(2)
    flat.mul_(-2)
    return m.second(y.tanh()).add_(y).relu_()


CUDNN = {
    "relu": (lambda m, y: m.second(y).relu(), ["relu"]),
    "sum": (lambda m, y: F.relu(y + m.second(y.tanh()), inplace=True), ["add relu"]),
    "sum of two": (lambda m, y: F.relu(m.second(y.tanh()) + m.second(y.exp())), ["add relu"]),
    "sum with itself": (lambda m, y: F.relu((z := m.second(y)) + z), []),
    "weighted sum": (lambda m, y: torch.add(y, m.second(y.tanh()), alpha=2).relu(), []),
    "sum with a row": (lambda m, y: (m.second(y.tanh()) + y[:, :, :1]).relu(), []),
    "sum that grows": (lambda m, y: (m.second(y[:, :, :1].tanh()) + y).relu(), []),
    "two readers": (two_readers, []),
    "under a view": (under_a_view, ["add relu"]),
    "depthwise": (lambda m, y: m.depthwise(y).relu(), []),
    "transposed": (lambda m, y: m.transposed(y).relu(), []),
    "strides of one number": (lambda m, y: F.conv2d(y.tanh(), m.second.weight, stride=[2]).relu(), []),
    "no convolution": (lambda m, y: F.linear(y.mean((2, 3)), m.line).relu() + y.sum((1, 2, 3))[:, None], []),
}


@pytest.mark.parametrize("way", CUDNN)
def test_what_cudnn_has_one_kernel_for(way, cudnn_calls):
    function, expected = CUDNN[way]
    modules = {
        "second": nn.Conv2d(8, 8, 1, bias=way != "sum"),
        "depthwise": nn.Conv2d(8, 8, 3, groups=8),
        "transposed": nn.ConvTranspose2d(8, 4, 3),
        "line": nn.Parameter(torch.randn(3, 8)),
    }
    model = folded(Written(function, **modules))
    weights = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    lowered = fxfuse.lower(model, (X,))
    assert not lowered.lowering.reason
    near(lowered, X)
    cudnn_calls.clear()
    lowered(X)
    assert cudnn_calls == expected
    for name, tensor in model.state_dict().items():
        assert torch.equal(tensor, weights[name]) and tensor.stride() == weights[name].stride()


def test_an_input_is_added_by_cudnn(cudnn_calls):
    lowered = fxfuse.lower(folded(WithSecond(lambda _, y, z: (y + z).relu())), (X, torch.randn(2, 8, 12, 12)))
    near(lowered, X, torch.randn(2, 8, 12, 12))
    assert {*cudnn_calls} == {"add relu"}


def test_where_cudnn_fails_its_kernels_are_not_taken(cudnn_calls, monkeypatch):
    def fails(*_, **__):
        raise RuntimeError("no engine")

    monkeypatch.setattr(cudnn, "medians", fails)
    lowered = fxfuse.lower(folded(Net()), (X,))
    assert not lowered.lowering.reason and not cudnn_calls
    near(lowered, X)


def test_kernels_that_may_differ_from_call_to_call_are_not_taken_where_that_is_forbidden(cudnn_calls):
    with torch.backends.cudnn.flags(deterministic=True):
        lowered = fxfuse.lower(folded(Net()), (X,))
    assert not lowered.lowering.reason and not cudnn_calls


def test_a_constant_that_is_given_as_it_is_belongs_to_the_caller(cudnn_calls):
    source = Written(lambda m, y: (y.relu(), m.table.type_as(y)))
    source.register_buffer("table", torch.randn(4))
    model = folded(source)
    lowered = fxfuse.lower(model, (X,))
    assert cudnn_calls and not lowered.lowering.reason
    expected = model.table.detach().clone()
    lowered(X)[1].detach().add_(5)
    assert torch.equal(lowered(X)[1], expected)


def test_dtypes_that_cudnn_has_no_such_kernel_for(cudnn_calls):
    model = folded(Written(lambda m, y: y.relu())).double()
    lowered = fxfuse.lower(model, (X.double(),))
    assert torch.allclose(lowered(X.double()), model(X.double())) and not cudnn_calls
    lowered = fxfuse.lower(model.float(), (X,), dtype=torch.bfloat16)
    assert not lowered.lowering.reason and not cudnn_calls
    assert lowered(X).dtype is torch.float32


def test_a_kernel_that_is_slower_is_not_taken(cudnn_calls, monkeypatch):
    monkeypatch.setattr(cudnn, "medians", lambda functions, rounds: {"apart": 1.0, "together": 2.0})
    lowered = fxfuse.lower(folded(Net()), (X,))
    near(lowered, X)
    assert not cudnn_calls


@pytest.mark.usefixtures("cudnn_calls")
def test_a_kernel_that_gives_other_numbers_is_not_taken():
    with torch.library._scoped_library("aten", "IMPL") as library:
        library.impl(
            "cudnn_convolution_relu",
            lambda x, w, b, *how: torch.convolution(x, w, b, *how[:3], False, [0, 0], 1),
            "CPU",
            allow_override=True,
        )
        model = folded(Net())
        lowered = fxfuse.lower(model, (X,))
    assert "other numbers" in lowered.lowering.reason
    assert torch.equal(lowered(X), model(X))


def test_recordings_are_of_what_runs_on_a_gpu():
    with pytest.raises(fxfuse.UsageError, match="no input is on a CUDA device; leave out cuda_graphs=True"):
        fxfuse.lower(folded(Net()), (X,), cuda_graphs=True)


def test_results_of_a_recording_are_the_callers_and_each_stream_has_its_own(monkeypatch):
    made, stream = [], [1]

    def recorded(call, own):
        made.append(own)
        results = call(*own)

        def replay(*given):
            for mine, theirs in zip(own, given, strict=True):
                mine.copy_(theirs)
            for mine, now in zip(results, call(*own), strict=True):
                mine.copy_(now)
            return results

        return replay

    monkeypatch.setattr(torch.cuda, "make_graphed_callables", recorded)
    for module in (lower_module, lowered_module):
        monkeypatch.setattr(module, "streams", lambda tensors: tuple(stream) * len(tensors))
    example = X.clone()
    lowered = fxfuse.lower(folded(Net()), (example,), cuda_graphs=True)
    assert not lowered.lowering.reason and len(made) == 1
    first = lowered(X)
    expected = first.clone()
    near(lowered, X + 1)
    assert torch.equal(first, expected) and torch.equal(example, X)
    assert len(made) == 1
    stream[0] = 2
    near(lowered, X)
    assert len(made) == 2
    assert copy.deepcopy(lowered).cuda_graphs


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("cuda_graphs", [False, True])
@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_on_a_gpu(dtype, cuda_graphs):
    model, x = folded(Net()).cuda(), X.cuda()
    lowered = fxfuse.lower(model, (x,), dtype=dtype, cuda_graphs=cuda_graphs)
    assert not lowered.lowering.reason
    assert lowered(x).device == x.device
    near(lowered, x, limit=2e-5 if dtype is None else 5e-2)
