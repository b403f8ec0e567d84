"""The folded network on fast kernels: the same function, for any inputs, or the reason why not."""

from __future__ import annotations

import contextlib
import copy
import json
import math
import operator
import pickle
import platform
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxfuse
from fxfuse import aliases, backend, cli
from fxfuse.errors import UnsupportedError
from fxfuse.lowering import auto, cudnn, engines, making, onednn, timing
from fxfuse.lowering import lower as lower_module
from fxfuse.lowering import lowered as lowered_module
from fxfuse.lowering import slices as cutting
from fxfuse.lowering import specialised as specialising
from fxfuse.lowering.edits import put_channels_last
from fxfuse.lowering.halves import is_operator
from fxfuse.lowering.making import Maker
from fxfuse.lowering.specialised import specialised, without_numbers
from fxfuse.tree import storage
from tests.paths import paths
from tests.programs import programs as random_programs
from tests.strategies import noise
from tests.support import randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines; their numbers are what is looked at

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


def kernels():
    """The operators of each kernel of oneDNN that the last program had, and those that are left."""
    graph = torch.jit.last_executed_optimized_graph()
    inside = [
        tuple(
            each.kind().removeprefix("aten::")
            for each in kernel.g("Subgraph").nodes()
            if "aten" in each.kind()
        )
        for kernel in graph.findAllNodes("prim::oneDNNFusionGroup")
    ]
    return inside, Counter(node.kind() for node in graph.nodes() if node.kind().startswith("aten::"))


# ---- every engine --------------------------------------------------------------------------------------


@pytest.mark.parametrize("engine", [*ENGINES, "inductor"])
def test_every_engine_computes_what_the_folded_model_does(engine):
    lowered = fxfuse.lower(folded(Net()), (X,), engine)
    assert not lowered.lowering.reason and lowered.engine == engine
    near(lowered, X)
    assert lowered.lowering.comparison.ok and 0 < lowered.lowering.comparison.candidate_error < 1e-5
    assert f"engine {engine}, ready after" in str(lowered.lowering)
    near(lowered, torch.randn(3, 3, 12, 12))


@pytest.mark.parametrize("engine", ENGINES)
def test_sizes_layouts_and_slices_that_were_not_in_the_examples(engine):
    lowered = fxfuse.lower(folded(Net()), (X,), engine)
    wide = torch.randn(2, 3, 16, 24)
    near(lowered, wide)
    near(lowered, X.contiguous(memory_format=torch.channels_last))
    near(lowered, wide[:, :, ::2, 4:18])
    assert len(lowered._programs) == 5 and all(each.run for each in lowered._programs.values())


@pytest.mark.parametrize("engine", ENGINES)
def test_structured_outputs_and_several_inputs(engine):
    def function(_, y, z):
        y = y + F.interpolate(z, scale_factor=2.0)
        return {"all": y.relu(), "parts": [y[:, :2], (y.mean(1), 3)], "size": y.shape[2]}

    z = torch.randn(2, 8, 6, 6)
    model = folded(WithSecond(function))
    lowered = fxfuse.lower(model, (X, z), engine)
    assert not lowered.lowering.reason
    result, expected = lowered(X, z), model(X, z)
    assert result["size"] == 12 and result["parts"][1][1] == 3
    assert torch.utils._pytree.tree_structure(result) == torch.utils._pytree.tree_structure(expected)
    torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_bfloat16_is_asked_for_and_its_error_told(engine):
    lowered = fxfuse.lower(folded(Net()), (X,), engine, dtype=torch.bfloat16)
    assert not lowered.lowering.reason
    near(lowered, X, limit=0.05)
    assert 1e-4 < lowered.lowering.comparison.candidate_error < 0.05


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_a_model_in_another_dtype_gives_that_dtype(dtype):
    model = folded(Net()).bfloat16()
    lowered = fxfuse.lower(model, (X.bfloat16(),), dtype=dtype)
    assert not lowered.lowering.reason
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(X.double())
        result = lowered(X.bfloat16())
    assert result.dtype is torch.bfloat16
    assert float((result - exact).abs().max()) < 0.05 * float(exact.abs().max())


# ---- the engine "torch" --------------------------------------------------------------------------------

POST_OPS = {
    "relu": nn.ReLU(),
    "relu6": nn.ReLU6(),
    "hardtanh": nn.Hardtanh(-0.5, 0.7),
    "hardswish": nn.Hardswish(),
    "silu": nn.SiLU(),
    "sigmoid": nn.Sigmoid(),
    "gelu": nn.GELU(),
    "leaky relu": nn.LeakyReLU(0.2),
    "tanh": nn.Tanh(),
    "elu": nn.ELU(0.7),
    "relu in place": nn.ReLU(inplace=True),
}
OPERATORS = {
    "conv": (lambda: nn.Conv2d(3, 8, 3, padding=1), X),
    "depthwise": (lambda: nn.Conv2d(3, 6, 3, groups=3, dilation=2), X),
    "strided": (lambda: nn.Conv2d(3, 8, 3, stride=2, bias=False), X),
    "point": (lambda: nn.Conv2d(3, 8, 1), X),
    "conv1d": (lambda: nn.Conv1d(3, 8, 3, padding=1), X[..., 0]),
    "linear": (lambda: nn.Linear(12, 8), X),
}


@pytest.mark.parametrize("operator_", OPERATORS)
@pytest.mark.parametrize("post", POST_OPS)
def test_operators_and_what_is_done_to_their_results_are_one_kernel(operator_, post):
    make, x = OPERATORS[operator_]
    lowered = fxfuse.lower(folded(nn.Sequential(make(), copy.deepcopy(POST_OPS[post]))), (x,))
    assert not lowered.lowering.reason
    inside, left = kernels()
    assert len(inside) == 1 and len(inside[0]) >= 2 and not left - Counter({"aten::contiguous": 2})
    near(lowered, x)


@pytest.mark.parametrize("post", ["gelu by tanh", "hardsigmoid"])
def test_what_onednn_does_not_know_is_written_in_what_it_knows(post):
    layer = nn.GELU(approximate="tanh") if post == "gelu by tanh" else nn.Hardsigmoid()
    lowered = fxfuse.lower(folded(nn.Sequential(nn.Conv2d(3, 8, 3), layer)), (X,))
    assert not lowered.lowering.reason
    near(lowered, X)


def test_wrong_kernels_are_found_and_not_used(monkeypatch):
    """Without the mend oneDNN Graph computes the exact gelu in the place of the approximation."""
    monkeypatch.setattr(onednn, "_BY_OTHERS", {})
    model = folded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(approximate="tanh")))
    lowered = fxfuse.lower(model, (X,))
    assert "other numbers" in lowered.lowering.reason
    assert torch.equal(lowered(X), model(X))


def tokens(y):
    return y.flatten(2).transpose(1, 2)


def twice(m, y):
    return m.other(m.other(y).relu())


# What oneDNN Graph fails on, or computes wrongly, unless the trace is edited.
MENDED = {
    "read after it was overwritten": lambda m, y: m.join(F.relu(twice(m, z := y.relu()) + z), z),
    "the same computed twice": lambda m, y: m.join(
        F.relu(twice(m, z := F.max_pool2d(y, 2)) + z), F.max_pool2d(y, 2)
    ),
    "normalised before it is read": lambda m, y: (
        m.other(F.relu(F.batch_norm(z := F.max_pool2d(y, 2), m.mean, m.mean.exp(), m.mean, m.mean))) + z
    ),
    "constant behind a linear layer": lambda m, y: m.head(tokens(y)) + m.positions,
    "constant behind a product": lambda m, y: (y @ y.transpose(2, 3)) * m.positions[:, :12, :1],
    "constant with channels last": lambda m, y: y @ y.transpose(2, 3) + m.table,
    "fewer axes": lambda m, y: m.head(tokens(y)) * y.mean((0, 1)).flatten().unsqueeze(1),
    "sum with a pooling": lambda m, y: (z := y.cumsum(1)) + F.max_pool2d(z, 3, 1, 1),
    "a number that is computed": lambda m, y: m.other(y) / y.abs().amax(),
    "sum with a layer norm": lambda m, y: m.norm(tokens(y)) + tokens(y).roll(1, 1),
    "a number for each channel behind a linear layer": lambda m, y: (
        m.row(z := y.contiguous().cumsum(1)) + y.cumsum(2) + z.mean((2, 3), keepdim=True)
    ),
}


class Joined(nn.Module):
    """A convolution of two values, side by side."""

    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(16, 8, 1)

    def forward(self, one, other):
        return self.conv(torch.cat([one, other], 1))


# Without the edits these end the process.
CRASHES = {
    "a row on a sum": lambda m, y: (y.cumsum(1) + y) + m.table[0, 0, 0],
    "a row on a sum with a norm": lambda m, y: (F.layer_norm(y, (12,)) + y) * m.table[0, 0, 0],
    "a row that is computed": lambda m, y: (y.cumsum(1) + y) + y[:1, :1, :1].cumsum(3),
    "results of two": lambda m, y: (
        (z := (v := halved(y)) @ v.transpose(2, 3) + F.avg_pool2d(v, 3, 1, 1)).add(v).relu() + z.softmax(-1)
    ),
}


def halved(y):
    y = y + 1
    y[:, :4].mul_(2)
    return y


@pytest.mark.parametrize("way", CRASHES)
@pytest.mark.parametrize("batch", [1, 2])
def test_what_ended_the_process(way, batch):
    x = torch.randn(batch, 3, 12, 12)
    lowered = fxfuse.lower(with_constants(CRASHES[way]), (x,))
    assert not lowered.lowering.reason
    near(lowered, x, limit=1e-4)


def test_a_sum_behind_the_product_of_one_long_row():
    """Without the edit oneDNN Graph writes to memory that is not its own, which may end the process."""
    model = folded(WithSecond(lambda m, y, z: F.gelu(m.wide(z)) + z, wide=nn.Linear(2048, 2048)))
    z = torch.randn(1, 1, 2048)
    for _ in range(3):
        lowered = fxfuse.lower(model, (X, z))
        assert not lowered.lowering.reason
        near(lowered, X, z)


def with_constants(function):
    parts = {
        "other": nn.Conv2d(8, 8, 3, padding=1),
        "head": nn.Linear(8, 8),
        "row": nn.Linear(12, 12),
        "join": Joined(),
        "norm": nn.LayerNorm(8),
    }
    model = randomise(Written(function, **parts)).float()
    shapes = {"mean": (8,), "positions": (1, 144, 8), "table": (1, 8, 12, 12)}
    for name, shape in shapes.items():
        setattr(model, name, nn.Parameter(torch.randn(shape)))
    return folded(model)


@pytest.mark.parametrize("way", MENDED)
def test_what_the_edits_of_a_trace_mend(way, monkeypatch):
    model = with_constants(MENDED[way])
    lowered = fxfuse.lower(model, (X,))
    assert not lowered.lowering.reason
    near(lowered, X)
    monkeypatch.setattr(onednn, "edit", lambda graph: [])
    monkeypatch.setattr(onednn, "halves", lambda graph: None)
    assert fxfuse.lower(model, (X,)).lowering.reason, "there is nothing to mend"


def test_addition_and_relu_join_the_convolution():
    lowered = fxfuse.lower(
        folded(Written(lambda m, y: F.relu(m.other(y) + y.sigmoid()), other=nn.Conv2d(8, 8, 3, padding=1))),
        (X,),
    )
    inside, left = kernels()
    assert ("_convolution", "add", "relu") in inside
    assert set(left) <= {"aten::contiguous", "aten::sigmoid", "aten::alias"}
    near(lowered, X)


@pytest.mark.parametrize("make", [nn.ConvTranspose2d, nn.Conv3d])
def test_operators_without_a_kernel_run_as_they_are_among_others(make):
    if make is nn.ConvTranspose2d:
        model, x = nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU(), make(8, 4, 3, stride=2), nn.ReLU()), X
    else:
        model, x = (
            nn.Sequential(make(3, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(400, 3)),
            torch.randn(2, 3, 3, 12, 12),
        )
    lowered = fxfuse.lower(folded(model), (x,))
    assert not lowered.lowering.reason
    near(lowered, x)


def test_results_have_the_layout_that_they_had():
    model = folded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    lowered = fxfuse.lower(model, (X,))
    assert model(X).is_contiguous() and lowered(X).is_contiguous()
    lowered(X).view(-1)


def test_the_process_is_left_as_it_was():
    model = folded(Net())
    before = torch._C._jit_llga_enabled(), torch.get_num_threads(), torch.random.get_rng_state()
    fxfuse.lower(model, (X,))
    after = torch._C._jit_llga_enabled(), torch.get_num_threads(), torch.random.get_rng_state()
    assert before[:2] == after[:2] and torch.equal(before[2], after[2])


def test_a_torch_without_onednn_graph_runs_the_folded_module_and_says_why(monkeypatch):
    monkeypatch.delattr(torch._C, "_jit_set_llga_enabled")
    model = folded(Net())
    lowered = fxfuse.lower(model, (X,))
    assert lowered.lowering.reason == "this build of torch is without oneDNN Graph"
    assert "runs as it is" in str(lowered.lowering)
    assert torch.equal(lowered(X), model(X))


# ---- cuDNN's convolutions, whose kernels are stood in for on a CPU -------------------------------------


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


# ---- what a graph for one kind of inputs is ------------------------------------------------------------


def test_what_gives_what_it_is_given_is_gone():
    modules = {"dropout": nn.Dropout(), "same": nn.Identity(), "act": nn.ReLU(inplace=True)}
    model = folded(
        Written(lambda m, y: m.act(m.same(m.dropout(F.dropout2d(y, training=False)))).clone(), **modules)
    )
    graph = specialised(model, (X,))
    assert [str(node.target) for node in graph.module.graph.nodes if node.op.startswith("call")] == [
        "conv",
        "act",
        "clone",
    ]
    assert torch.equal(graph.run(lambda tensors: graph.module(*tensors), [X]), model(X))


def test_sizes_constants_assertions_and_containers_are_gone():
    def function(m, y):
        assert_(y.shape[1] == 8, "channels")
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, -1, height, width)
        first, second = y.chunk(2, 1)
        table = m.table.softmax(0)[torch.arange(4)].sum()
        return first * table + second

    model = folded(Written(function, table=nn.Parameter(torch.randn(4, 3))))
    graph = specialised(model, (X,))
    names = Counter(str(getattr(node.target, "__name__", node.target)) for node in graph.module.graph.nodes)
    assert not {"getattr", "size", "floordiv", "_assert", "softmax", "arange", "eq", "sum"} & set(names), (
        names
    )
    assert names.total() < len(model.graph.nodes) - 8
    with torch.no_grad():
        assert torch.equal(graph.result(graph.module(X)), model(X))


def assert_(condition, message):
    torch._assert(condition, message)


fx.wrap("assert_")

torch.library.define("fxfuse_tests::positive", "(Tensor x) -> Tensor")


@torch.library.impl("fxfuse_tests::positive", "CPU")
def positive(x):
    return x[x > 0].clone()


UNSUPPORTED = {
    "an operator of another library": (
        lambda m, y: y.relu() / torch.ops.fxfuse_tests.positive(y).shape[0],
        "sizes of fxfuse_tests::positive may depend on numbers",
    ),
    "numbers": (lambda m, y: y * y.amax().item(), "reads numbers"),
    "numbers through numpy": (lambda m, y: by_numpy(y), "reads numbers"),
    "numbers in a list": (lambda m, y: by_list(y), "reads numbers"),
    "numbers one by one": (lambda m, y: by_element(y), "reads numbers"),
    "a mask": (lambda m, y: y[y > 0].sum(), "reads numbers"),
    "random numbers": (lambda m, y: F.dropout(y, 0.5, training=True), "random numbers"),
    "input is written to": (lambda m, y, z: (z.add_(y), z.relu())[1], "forward writes to its inputs"),
    "state is written to": (lambda m, y: y * m.count.copy_(y.mean()), "may write to what the module holds"),
    "constant is written to": (
        lambda m, y: (m.count + 1).add_(y.sum()),
        "may write to what the module holds",
    ),
}


@fx.wrap
def by_numpy(y):
    return y * float(y.detach().numpy().max())


@fx.wrap
def by_list(y):
    return y * max(y.flatten().tolist())


@fx.wrap
def by_element(y):
    found = []
    y.detach().clone().apply_(lambda each: (found.append(each), each)[1])
    return y * max(found)


@pytest.mark.parametrize("way", UNSUPPORTED)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_no_program_can_hold_runs_as_it_was_folded(way, engine):
    function, reason = UNSUPPORTED[way]
    has_second = way == "input is written to"
    model = randomise((WithSecond if has_second else Written)(function)).float()
    model.register_buffer("count", torch.zeros(()))
    graph = fx.GraphModule(model, fx.Tracer().trace(model))
    inputs = (X, torch.randn(2, 8, 12, 12)) if has_second else (X,)
    lowered = fxfuse.lower(graph, inputs, engine)
    assert reason in lowered.lowering.reason, lowered.lowering
    twin = copy.deepcopy(graph)
    torch.manual_seed(0)
    result = lowered(*copy.deepcopy(inputs))
    torch.manual_seed(0)
    assert torch.equal(result, twin(*copy.deepcopy(inputs)))


class WithNumber(Written):
    """A second input that is a number, as a tensor."""

    def forward(self, x, z):
        return self.function(self, self.conv(x), z)


def padding(m, z):
    return m.rows.index_select(0, z.reshape(1)).expand(2, 8)


NUMBERS = {
    "padding": lambda m, y, z: F.pad(y, (1, 1), value=z),
    "roll": lambda m, y, z: y.roll(z, 2),
    "part": lambda m, y, z: y[:, :z],
    "mask": lambda m, y, z: m.coder(y.flatten(2), src_key_padding_mask=padding(m, z)),
    "masked mean": lambda m, y, z: y.relu()[y > z].sum() / y[y > z].shape[0],
    "where": lambda m, y, z: y.relu() * torch.where(y > z)[0].size(0),
    "chosen": lambda m, y, z: y.relu()[y > 0].sum() * z,
}


@pytest.mark.parametrize("way", NUMBERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_of_tensors_are_not_fixed(way, engine):
    model = randomise(WithNumber(NUMBERS[way])).float()
    model.coder = nn.TransformerEncoder(nn.TransformerEncoderLayer(144, 2, 16, batch_first=True), 1).eval()
    model.register_buffer("rows", torch.arange(8) > torch.tensor([[9], [5], [3], [4]]))
    graph = fx.GraphModule(model, fx.Tracer().trace(model))
    lowered = fxfuse.lower(graph, (X, torch.tensor(1)), engine)
    assert "numbers" in lowered.lowering.reason or "integers" in lowered.lowering.reason, lowered.lowering
    with torch.no_grad():
        for number in (1, 2, 3):
            torch.testing.assert_close(lowered(X, torch.tensor(number)), graph(X, torch.tensor(number)))


@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_module_is_written_to(training):
    """Neither a counter, nor statistics of a norm, whose kernel counts no version."""

    def function(m, y):
        if training:
            return F.batch_norm(y, m.mean, m.count8, training=True)
        return y * m.count8.add_(y.abs().mean()).sum()

    model = randomise(Written(function)).float()
    model.register_buffer("mean", torch.zeros(8))
    model.register_buffer("count8", torch.ones(8))
    graph = fx.GraphModule(model, fx.Tracer().trace(model))
    for way in (graph, copy.deepcopy(graph)):
        before = {name: tensor.clone() for name, tensor in way.state_dict().items()}
        lowered = fxfuse.lower(way, (X,))
        assert "write" in lowered.lowering.reason
        assert all(torch.equal(before[name], tensor) for name, tensor in way.state_dict().items())
    twin = copy.deepcopy(graph)
    for _ in range(2):
        assert torch.equal(lowered(X), twin(X))


def test_results_have_memory_of_their_own():
    """TorchScript takes y + 0 for y."""
    model = folded(Written(lambda m, y: (y.relu(), y.relu() + 0, y.relu() * 1)))
    graph = fx.GraphModule(model, model.graph)
    lowered = fxfuse.lower(graph, (X,))
    assert not lowered.lowering.reason
    one, other, third = lowered(X)
    other.zero_()
    third.fill_(7)
    torch.testing.assert_close(one, model(X)[0])
    same = fxfuse.lower(
        fx.symbolic_trace(WithSecond(lambda m, y, z: (y.relu(), z + 0)).eval()), (X, X.clone())
    )
    z = X.clone()
    same(X, z)[1].zero_()
    assert torch.equal(z, X)


@fx.wrap
def rows(x):
    """A view, by code that is not torch's."""
    return x.reshape(2, -1)


@fx.wrap
def other(x, y):
    y.clamp_(-3, 3)
    return x


@fx.wrap
def longest(lengths, limit):
    return min(limit, max(lengths.tolist()))


@fx.wrap
def capped(parts):
    for each in parts:
        each.clamp_(-3, 3)
    return parts


VIEWS = {
    "foreign": lambda y: rows(y),  # noqa: PLW0108 - by its global name, which fx.wrap replaces
    "flatten": lambda y: y.flatten(1),
    "reshape": lambda y: y.reshape(2, -1),
    "contiguous": lambda y: y.contiguous(),
    "permute": lambda y: y.permute(0, 2, 3, 1).contiguous(),
}


def through_a_view(view):
    def function(_, y):
        view(y).clamp_(-3, 3)
        return y.relu()

    return function


def beside_a_view(view):
    def function(_, y):
        seen = view(y)
        y.clamp_(-3, 3)
        return seen.relu()

    return function


def called(function):
    """A graph that calls what ``fx.wrap`` marks, as fxfuse's own tracer does where it has to."""
    graph = fx.symbolic_trace(Written(function).eval())
    with torch.no_grad():
        assert 0.5 < float(graph.conv(X).abs().max()) < 3 < float(graph.conv(50 * X).abs().max())
    return graph


@pytest.mark.parametrize("written", [through_a_view, beside_a_view])
@pytest.mark.parametrize("view", VIEWS)
def test_writes_stay_what_they_are_in_another_memory_format(view, written):
    model = called(written(VIEWS[view]))
    lowered = fxfuse.lower(model, (X,))
    assert not lowered.lowering.reason
    with torch.no_grad():  # in the example nothing is clamped
        expected = copy.deepcopy(model)(50 * X)
        torch.testing.assert_close(lowered(50 * X), expected, rtol=1e-4, atol=1e-4)


def added_in_place(_, y):
    z = y.sigmoid()
    z += y
    return F.relu(z, inplace=True).flatten(1)


WRITTEN = {
    "another": lambda _, y: other(y.relu(), y) + y,
    "parts": lambda _, y: capped(y.chunk(2, 1))[0] + y.mean(1, keepdim=True),
}


@pytest.mark.parametrize("way", WRITTEN)
def test_what_writes_and_gives_another_stays(way):
    model = called(WRITTEN[way])
    lowered = fxfuse.lower(model, (X,))
    assert not lowered.lowering.reason
    with torch.no_grad():  # in the example nothing is capped
        expected = copy.deepcopy(model)(50 * X)
        torch.testing.assert_close(lowered(50 * X), expected, rtol=1e-4, atol=1e-3)


def test_numbers_that_are_a_limit_of_the_example_are_not_fixed():
    def function(_, y, z):
        return y[..., : longest(z, y.size(3))].relu().sum(-1)

    lowered = fxfuse.lower(folded(WithSecond(function)), (X, torch.tensor([12, 20])))
    assert "reads numbers" in lowered.lowering.reason


def test_a_conversion_that_does_nothing_stays_for_another_dtype():
    def function(_, y):
        return (y[:, :2].float().sigmoid() * 8 + 600) * 8

    lowered = fxfuse.lower(folded(Written(function)), (X,), dtype=torch.bfloat16)
    assert not lowered.lowering.reason
    with torch.no_grad():
        assert float((lowered(X) - lowered.folded(X)).abs().max()) < 1


def squeezed_in_place(m, y):
    z = y.relu()
    return z.mul_(m.pool(z).sigmoid()).mul_(z.mean((2, 3), keepdim=True))


@fx.wrap
def with_size(y):
    y = y * 2
    return y, y.shape[1]


def in_steps(m, y):
    constant = m.scale * 2
    constant[:4].fill_(2.0)
    return y * constant


# What has nothing to do with numbers of the inputs, though it might.
STATIC = {
    "elements by their places": lambda m, y: y[:, torch.tensor([3, 1, 1])].relu(),
    "a constant that is made in steps": lambda m, y: in_steps(m, y).relu(),
    "a size from a function that is not traced": lambda m, y: (r := with_size(y))[0].relu() + r[1],
    "a size that is multiplied": lambda m, y: y.relu() * with_size(y)[1] ** -0.5,
}


@pytest.mark.parametrize("way", STATIC)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_only_looks_as_if_it_read_numbers(way, engine):
    model = randomise(Written(STATIC[way])).float()
    model.scale = nn.Parameter(torch.randn(8, 1, 1))
    lowered = fxfuse.lower(fxfuse.fuse(model), (X,), engine)
    assert not lowered.lowering.reason
    near(lowered, X)


@fx.wrap
def through_numpy(y, weight):
    weight.numpy()[...] *= 0.5
    return y * weight


def test_weights_are_not_given_to_what_is_not_traced():
    model = randomise(Written(lambda m, y: through_numpy(y, m.scale).relu())).float()
    model.scale = nn.Parameter(torch.randn(8, 1, 1), requires_grad=False)
    graph = fx.GraphModule(model, fx.Tracer().trace(model))
    before = model.scale.clone()
    lowered = fxfuse.lower(graph, (X,))
    assert "may write to what the module holds" in lowered.lowering.reason
    assert torch.equal(graph.scale, before)


class Whole(nn.Module):
    """A module that is not traced, and writes to its own buffers."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("scale", torch.rand(8))

    def forward(self, y):
        self.write(y, self.scale)
        return y * self.scale.view(8, 1, 1)


class WithWhole(fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, Whole) or super().is_leaf_module(m, module_qualified_name)


@pytest.mark.parametrize(
    "write",
    [
        lambda y, scale: scale.mul_(0.5),
        lambda y, scale: torch._foreach_mul_([scale], 0.5),
        lambda y, scale: torch.batch_norm_update_stats(y, scale, None, 0.1),
        lambda y, scale: F.batch_norm(y, scale, torch.ones(8), training=True),
    ],
)
def test_operators_that_write_to_what_the_module_holds(write):
    model = randomise(Written(lambda m, y: m.whole(y).relu(), whole=Whole(write))).float()
    graph = fx.GraphModule(model, WithWhole().trace(model))
    before = graph.whole.scale.clone()
    lowered = fxfuse.lower(graph, (X,))
    assert "writes to its inputs, or to what the module holds" in lowered.lowering.reason
    assert torch.equal(graph.whole.scale, before)


class Unseen(nn.Module):
    """A function that is called as a whole."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, y):
        return self.function(y)


UNSEEN = {"data": lambda y: y * y.data.sigmoid(), "copy": lambda y: y * copy.deepcopy(y).sigmoid()}


@pytest.mark.parametrize("way", ["data", "data of a module", "copy of a module"])
def test_what_tracers_do_not_see_is_refused(way, monkeypatch):
    """They take it for a constant, or end the process."""
    monkeypatch.setattr(fx.Tracer, "is_leaf_module", lambda self, module, _: not isinstance(module, Written))
    name, _, of_module = way.partition(" of ")
    unseen = Unseen(UNSEEN[name])
    model = folded(Written(lambda m, y: (m.unseen if of_module else UNSEEN[name])(y), unseen=unseen))
    for engine in (*ENGINES, "inductor"):
        lowered = fxfuse.lower(model, (X,), engine)
        assert "past all operators" in lowered.lowering.reason
        near(lowered, X)


def test_constants_of_a_tracer_are_seen_in_the_comparison(monkeypatch):
    """A program is compiled with other numbers than it is compared with, whatever these are."""
    monkeypatch.setattr(fx.Tracer, "is_leaf_module", lambda self, module, _: not isinstance(module, Written))
    monkeypatch.setattr(specialising, "Inside", lambda pure: contextlib.nullcontext())
    model = folded(Written(lambda m, y: m.unseen(y), unseen=Unseen(UNSEEN["data"])))
    for seed in range(5):
        x = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
        for batch in (x, x[:1], torch.zeros_like(x), torch.cat([x] * 5)):
            lowered = fxfuse.lower(model, (batch,))
            assert "other numbers" in lowered.lowering.reason
    near(lowered, X)


PAST_OPERATORS = {
    "elements of a new tensor": lambda y: y * torch.tensor([(y.detach().amax() > 100).float(), 2.0]).sum(),
    "of another": lambda y: y * y.new_tensor([y.detach().amax()]),
    "bounds": lambda y: y.tensor_split(y.detach().amax().clamp(1, 5).long().reshape(1), 3)[0].sum() * y,
    "text": lambda y: y * (len(f"{y.detach()}") > 1),
}


@pytest.mark.parametrize("way", PAST_OPERATORS)
def test_numbers_that_no_mode_sees_are_refused(way, monkeypatch):
    monkeypatch.setattr(fx.Tracer, "is_leaf_module", lambda self, module, _: not isinstance(module, Written))
    model = folded(Written(lambda m, y: m.unseen(y), unseen=Unseen(PAST_OPERATORS[way])))
    lowered = fxfuse.lower(model, (X,))
    assert "past all operators" in lowered.lowering.reason
    near(lowered, X)


def test_inputs_that_are_no_block_of_memory():
    """A piece that is compiled for one that is would read another memory, or end the process."""
    layers = [nn.Conv1d(4, 32, 3, padding=1), nn.ReLU(), nn.Conv1d(32, 32, 3, padding=1), nn.ReLU()]
    model = folded(nn.Sequential(*layers, nn.Conv1d(32, 8, 3)))
    whole = torch.randn(9, 4, 200)
    lowered = fxfuse.lower(model, (whole[:2],))
    for x in (
        whole[:2, :, 50:100],
        whole[:2, :, ::2],
        whole[:, :, 50:100],
        whole.transpose(0, 1)[:, :4].mT[:2, :4],
    ):
        for ready in (lowered, fxfuse.lower(model, (x,))):
            assert not ready.lowering.reason
            near(ready, x)
    batch_inside = torch.randn(50, 4, 16).permute(2, 1, 0)
    near(fxfuse.lower(model, (batch_inside,)), batch_inside)


def test_a_second_input_that_is_no_block_of_memory():
    model = WithSecond(lambda m, y, z: F.relu(m.two(F.relu(y.flatten(2)).mT) + z), two=nn.Linear(8, 16))
    model, x = folded(model), X[:, :, :4, :4]
    for z in (torch.randn(2, 16, 64)[:, :, :16], torch.randn(1, 16, 16).expand(2, 16, 16)):
        lowered = fxfuse.lower(model, (x, z))
        assert not lowered.lowering.reason
        near(lowered, x, z)


def test_bits_of_views_are_no_detail():
    model = folded(Net())
    lowered = fxfuse.lower(model, (X,))
    near(lowered, X)
    near(lowered, torch._neg_view(X))
    assert len(lowered._programs) > 1


def test_an_empty_batch_is_left_to_the_folded_module():
    lowered = fxfuse.lower(folded(Net()), (X[:0],))
    assert "empty" in lowered.lowering.reason
    assert lowered(X[:0]).shape == (0, 5)


@pytest.mark.parametrize("where", ["root", "layer"])
def test_hooks_are_run(where):
    calls = []
    model = folded(Net())
    hooked = model if where == "root" else next(each for each in model.modules() if type(each) is nn.Linear)
    hooked.register_full_backward_hook(lambda *_: None)  # which never runs: there are no gradients
    assert not fxfuse.lower(model, (X,)).lowering.reason
    hooked.register_forward_hook(lambda *_: calls.append(None))
    lowered = fxfuse.lower(model, (X,))
    calls.clear()
    lowered(X)
    assert len(calls) == 1 and "hooks" in lowered.lowering.reason


class Halving(nn.Module):
    def forward(self, module, inputs):
        return (inputs[0] / 2,)


def test_a_graph_that_is_a_hook_is_one():
    model = folded(Net())
    model.register_forward_pre_hook(fx.symbolic_trace(Halving()))
    lowered = fxfuse.lower(model, (X,))
    assert "hooks" in lowered.lowering.reason
    assert torch.equal(lowered(X), model(X))


def test_memory_of_inputs_that_is_read_as_it_lies():
    model = folded(WithSecond(lambda m, y, z: y + torch.as_strided(z, (2, 8, 12, 12), (12, 12, 1, 1)).relu()))
    x = torch.randn(2, 600)[:, ::2]
    lowered = fxfuse.lower(model, (X, x))
    assert "lie in memory" in lowered.lowering.reason
    assert torch.equal(lowered(X, x), model(X, x))
    inner = folded(Written(lambda m, y: torch.as_strided(y + 1, (2, 8, 3, 3), (9, 9, 3, 1)).relu()))
    near(fxfuse.lower(inner, (X,)), X)


def test_sparse_inputs_are_left_to_the_folded_module():
    model = folded(WithSecond(lambda m, y, z: y + torch.mm(z, y[0, 0])[None, None]))
    z = torch.randn(12, 12).relu()
    for sparse in (z.to_sparse(), z.to_sparse_csr()):
        lowered = fxfuse.lower(model, (X, sparse))
        assert "sparse" in lowered.lowering.reason
        assert torch.equal(lowered(X, sparse), model(X, sparse))


@dataclass
class Held:
    """No container that torch knows."""

    constant: Tensor


def test_constants_in_objects_belong_to_the_caller():
    model = folded(Written(lambda m, y: (y.relu(), Held(m.table * 2)), table=nn.Parameter(torch.ones(3))))
    lowered = fxfuse.lower(model, (X,))
    assert not lowered.lowering.reason
    lowered(X)[1].constant.fill_(7.0)
    assert torch.equal(lowered(X)[1].constant, model(X)[1].constant)


class Counting(nn.Module):
    """It is called as a whole, and holds a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.calls = torch.zeros(())

    def forward(self, y):
        self.calls += 1
        return y * 2


def test_attributes_are_not_written_to(monkeypatch):
    monkeypatch.setattr(fx.Tracer, "is_leaf_module", lambda self, module, _: not isinstance(module, Written))
    model = folded(Written(lambda m, y: m.counting(y), counting=Counting()))
    before = float(model.counting.calls)
    lowered = fxfuse.lower(model, (X,))
    assert "writes" in lowered.lowering.reason
    # The folded module ran once, to see that it takes the inputs.
    assert float(model.counting.calls) <= before + 1


def test_numbers_are_drawn_for_each_input():
    one, other, number = making._drawn((X, [X.clone()], 3), seed=0)
    assert not torch.equal(one, other[0]) and one.shape == X.shape and number == 3
    assert not torch.equal(one, making._drawn((X,), seed=1)[0])
    ids = torch.arange(3)
    assert making._drawn((ids,), seed=0)[0] is ids


def test_a_constant_that_is_written_to_after_it_was_read():
    def function(m, y):
        constant = m.scale * 2
        z = y * constant
        constant += 1
        return z + constant

    model = randomise(Written(function)).float()
    model.scale = nn.Parameter(torch.randn(8, 1, 1))
    lowered = fxfuse.lower(fxfuse.fuse(model), (X,))
    assert "writes to a constant" in lowered.lowering.reason
    near(lowered, X)


HARMLESS = {
    "in place": added_in_place,
    "view": lambda _, y: y.relu().view(2, -1) + y.permute(0, 2, 3, 1).reshape(2, -1),
    "dropout": lambda m, y: m.act(m.dropout(y)) + 1,
    "squeeze and excitation": squeezed_in_place,
}


@pytest.mark.parametrize("way", HARMLESS)
def test_images_have_their_channels_last_where_no_view_is_written_to(way, monkeypatch):
    given, put = [], onednn.put_channels_last
    monkeypatch.setattr(onednn, "put_channels_last", lambda *args: (given.append(args), put(*args)))
    modules = {
        "dropout": nn.Dropout(inplace=True),
        "act": nn.ReLU(inplace=True),
        "pool": nn.AdaptiveAvgPool2d(1),
    }
    lowered = fxfuse.lower(folded(Written(HARMLESS[way], **modules)), (X,))
    assert not lowered.lowering.reason and len(given) == 1
    near(lowered, X)


def split(y, groups):
    """Channels in groups; y: (2, 8, 12, 12)."""
    return y.view(2, groups, 8 // groups, 12, 12)


def negated(y):
    """`y` itself, written to."""
    y.neg_()
    return y


SHUFFLES = {
    "torchvision's": lambda y, g: torch.transpose(split(y, g), 1, 2).contiguous().view(2, 8, 12, 12),
    "reshape": lambda y, g: split(y, g).transpose(-3, 1).reshape(2, -1, 12, 12),
    "clone": lambda y, g: torch.reshape(split(y, g).transpose(dim1=1, dim0=2).clone(), (2, 8, 12, 12)),
    "groups stay": lambda y, g: (z := split(y, g)).transpose(1, 2).reshape(2, 8, 12, 12) + z.sum(2)[:, :1],
}
NO_SHUFFLES = {
    "other axes": lambda y, g: split(y, g).transpose(2, 3).reshape(2, 8, 12, 12),
    "height and width": lambda y, g: split(y, g).transpose(3, 4).reshape(2, 8, 12, 12),
    "another shape": lambda y, g: split(y, g).transpose(1, 2).reshape(2, 4, 24, 12),
    "another split": lambda y, g: y.reshape(2, 4, 6, 4, 12).transpose(1, 2).reshape(2, 8, 12, 12),
    "not back": lambda y, g: split(y, g).transpose(1, 2).contiguous(),
    "tokens": lambda y, g: y.flatten(2).view(2, g, 8 // g, 144).transpose(1, 2).reshape(2, 8, 144),
    "twice": lambda y, g: split(y, g).transpose(1, 2).transpose(2, 3).reshape(2, 8, 12, 12),
    "written to": lambda y, g: negated(split(y, g).transpose(1, 2).clone()).reshape(2, 8, 12, 12),
}


@pytest.mark.parametrize("groups", [1, 2, 4, 8])
@pytest.mark.parametrize("way", [*SHUFFLES, *NO_SHUFFLES])
def test_a_shuffle_of_channels_is_one_operator(way, groups):
    model = folded(Written(lambda m, y: (SHUFFLES | NO_SHUFFLES)[way](y.relu(), groups)))
    graph = specialised(model, (X,)).module
    put_channels_last(graph, [False])
    called = [node for node in graph.graph.nodes if node.target is F.channel_shuffle]
    assert len(called) == (way in SHUFFLES)
    assert [node.args[1] for node in called] in ([], [groups])
    if called and way != "groups stay":
        assert not any(node.target in ("transpose", torch.transpose) for node in graph.graph.nodes)
        assert graph(X)[0].is_contiguous(memory_format=torch.channels_last)
    lowered = fxfuse.lower(model, (X,))
    assert not lowered.lowering.reason
    near(lowered, X)


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_poolings_and_reductions_give_new_memory_even_where_they_change_nothing(dims):
    x, axes = torch.randn(1, 2, *[1] * dims), [*range(2, 2 + dims)]
    poolings = {f"{kind}_pool{dims}d" for kind in ("adaptive_avg", "adaptive_max", "avg", "max")}
    reductions = {"mean", "sum", "amax", "amin"}
    assert poolings | reductions <= aliases.FRESH
    results = [getattr(F, name)(x, 1) for name in poolings]
    results += [getattr(x, name)(axes, keepdim=True) for name in reductions]
    for result in results:
        assert torch.equal(result, x) and storage(result) != storage(x)


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
def test_integers_are_left_to_torch(engine):
    lowered = fxfuse.lower(folded(Written(lambda m, y: y.relu().argmax(1))), (X,), engine)
    assert "integers" in lowered.lowering.reason


WITH_INTEGERS = {
    "floats of them": (lambda m, y, t: y * t.float()[:, :, None, None], True),
    "indices": (lambda m, y, t: y + m.table(t)[:, :8].sum((1, 2))[:, None, None, None], True),
    "products": (lambda m, y, t: y * (t * 0.5)[:, :, None, None], False),
    "decisions": (lambda m, y, t: y * (t > 3)[:, :, None, None], False),
    "masks": (lambda m, y, t: y.masked_fill((t == 3)[:, :, None, None], 1.0), True),
}


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("way", WITH_INTEGERS)
def test_integers_that_are_given(engine, way):
    """OpenVINO has 32 bits for them."""
    function, is_lowered = WITH_INTEGERS[way]
    model = folded(WithSecond(function, table=nn.Embedding(9, 4)))
    numbers = torch.arange(16).reshape(2, 8) % 9
    lowered = fxfuse.lower(model, (X, numbers), engine)
    assert is_lowered == (not lowered.lowering.reason)
    assert is_lowered or "integers" in lowered.lowering.reason
    assert torch.allclose(lowered(X, 8 - numbers), model(X, 8 - numbers), rtol=1e-4, atol=1e-5)


def test_results_that_are_constants_belong_to_the_caller():
    model = folded(Written(lambda m, y: (y.relu(), m.table.softmax(0)), table=nn.Parameter(torch.randn(4))))
    for engine in ENGINES:
        lowered = fxfuse.lower(model, (X,), engine)
        assert not lowered.lowering.reason
        expected = model(X)[1].clone()
        lowered(X)[1].detach().add_(5)
        assert torch.equal(lowered(X)[1], expected)


@pytest.mark.parametrize("example", [torch.zeros(2, 3, 12, 12), torch.full((2, 3, 12, 12), torch.nan)])
def test_an_example_in_which_nothing_can_be_seen_is_no_proof(example, monkeypatch):
    model = folded(nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.ReLU()))
    wrong = engines.Engine(lambda graph, *_: lambda tensors: [3 * each for each in graph.module(*tensors)])
    monkeypatch.setitem(engines.ENGINES, "torch", wrong)
    assert "other numbers" in fxfuse.lower(model, (example,)).lowering.reason
    monkeypatch.undo()
    near(fxfuse.lower(model, (example,)), X)


def test_kept_modules_are_no_graph():
    model = fxfuse.fuse(randomise(Net()).float(), keep_modules=True)
    lowered = fxfuse.lower(model, (X,))
    assert "no graph" in lowered.lowering.reason
    assert torch.equal(lowered(X), model(X))


# ---- some samples at a time -----------------------------------------------------------------------------

BATCH = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(2))
C = torch.randn(8, 1, 1, generator=torch.Generator().manual_seed(3))
APART = {
    "pooling": lambda m, y: F.max_pool2d(y.relu(), 2),
    "residual": lambda m, y: F.relu(m.other(y) + F.gelu(y) * 2),
    "squeeze and excitation": lambda m, y: y * torch.sigmoid(m.other(y.mean((2, 3), keepdim=True))),
    "classifier": lambda m, y: m.head(F.adaptive_avg_pool2d(y, 1).flatten(1)).softmax(1),
    "view": lambda m, y: m.head(y.mean((2, 3)).view(y.shape[0], -1)).relu(),
    "tokens": lambda m, y: m.head(y.flatten(2).transpose(1, 2)).relu().mean(1),
    "attention": lambda m, y: (y @ y.transpose(2, 3)).softmax(-1) @ y,
    "shuffle": lambda m, y: m.other(shuffled(y)),
    "result of none": lambda m, y: (y.relu(), m.shift * 2),
    "parts": lambda m, y: torch.cat([m.other(y), y.chunk(2, 1)[1], y.chunk(2, 1)[0]], 1),
    "constants": lambda m, y: (y + m.shift).relu() * m.shift,
    "norms": lambda m, y: F.group_norm(F.layer_norm(y, (12,)), 2).relu(),
    "layers": lambda m, y: m.norm(y).relu(),
    "windows": lambda m, y: joined(F.relu(m.head(m.head(windows(y)).relu())), y.shape[0]),
    "windows, counted": lambda m, y: m.head(windows(y).reshape(y.shape[0] * 9, 16, 8)).relu().mean(1),
    "attention in windows": lambda m, y: joined(attention(m, windows(y)), y.shape[0]),
    "upsampling": lambda m, y: F.interpolate(F.pad(y, (1, 1)), scale_factor=2.0).relu(),
}
MIXED = {
    "softmax over samples": lambda m, y: y.relu().softmax(0),
    "mean of samples": lambda m, y: y.relu() - y.mean(0, keepdim=True),
    "mean of all": lambda m, y: y.relu() - y.mean(),
    "largest of all": lambda m, y: y.relu() / y.abs().amax(),
    "more samples": lambda m, y: torch.cat([y, -y]).relu(),
    "samples as channels": lambda m, y: m.wide(y.transpose(0, 1)).relu().transpose(0, 1),
    "other order": lambda m, y: y.relu().flip(0),
    "moved": lambda m, y: y.relu().roll(1, 0),
    "some": lambda m, y: y.relu()[::2],
    "neighbours": lambda m, y: y.relu()[1:] - y.relu()[:-1],
    "sums": lambda m, y: y.relu().cumsum(0),
    "products of samples": lambda m, y: y.relu().flatten(1) @ y.flatten(1).t(),
    "one of its own for each": lambda m, y: y.relu() + m.each,
    "number of samples": lambda m, y: y.relu() * y.shape[0],
    "number of samples as a shift": lambda m, y: F.relu(y + y.size(0)),
    "number of samples as an axis": lambda m, y: (
        y[:, :, 0, 0].relu().reshape(y.shape[0], y.shape[0], -1).transpose(1, 2)
    ),
    "number of samples as groups": lambda m, y: F.channel_shuffle(y.relu(), y.shape[0]),
    "normalised over samples": lambda m, y: F.normalize(y.relu(), dim=0),
    "norm over everything": lambda m, y: F.layer_norm(y.relu(), y.shape),
    "grouped": lambda m, y: y.relu().view(2, 4, 8, 12, 12).mean(0),
    "statistics": lambda m, y: F.batch_norm(y.relu(), None, None, training=True),
    "mixed in a reshape": lambda m, y: y.relu().reshape(-1, 16, 12, 12)[:, :8],
    "where the largest is": lambda m, y: torch.where(y.amax() > 100, y.relu(), y.sigmoid()),
    "sorted": lambda m, y: y.relu().sort(0)[0],
    "windows of all samples in turn": lambda m, y: m.head(
        y.reshape(y.shape[0], 8, 9, 16).permute(2, 0, 3, 1).reshape(-1, 16, 8)
    ).relu(),
    "windows that are exchanged": lambda m, y: joined(m.head(windows(y)).relu().flip(0), y.shape[0]),
    "attention over windows": lambda m, y: attention(m, windows(y).transpose(0, 1)),
    "more places for fewer samples": lambda m, y: (
        y.relu().reshape(y.shape[0], 2, 2, -1).reshape(8, -1).softmax(1).reshape(y.shape)
    ),
    "windows of pairs": lambda m, y: m.head(windows(y).reshape(-1, 32, 8)).relu().softmax(1),
}


def windows(y):
    """Of 4×4 pixels, one after the other: (batch · 9, 16, 8)."""
    return y.reshape(y.shape[0], 8, 3, 4, 3, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8)


def joined(y, batch):
    return y.reshape(-1, 3, 3, 4, 4, 8).permute(0, 5, 1, 3, 2, 4).reshape(batch, 8, 12, 12)


def attention(m, y):
    return F.scaled_dot_product_attention(m.head(y) / 16, y, y, attn_mask=m.shift[:1, 0])  # no sharp choices


def turned(y, size):
    return y.reshape(size, size, -1).transpose(1, 2)


def shuffled(y):
    size = y.shape[0]
    return y.reshape(size, 2, 4, 12, 12).transpose(1, 2).reshape(size, 8, 12, 12)


# Those that have no program at all.
REASONS = {
    "statistics": "it gives other numbers: error against float64 ",
}


def with_parts(function):
    parts = {
        "other": nn.Conv2d(8, 8, 1),
        "head": nn.Linear(8, 8),
        "norm": nn.LayerNorm((8, 12, 12)),
        "wide": nn.Conv2d(8, 8, 1),
    }
    model = randomise(Written(function, **parts)).float()
    model.shift = nn.Parameter(C.clone())
    model.each = nn.Parameter(torch.randn(8, 1, 1, 1))
    return model


@pytest.fixture
def slices(monkeypatch):
    """Has slices of two samples taken wherever they may be, and counts that."""
    taken = []

    def one_by_one(sizes, programs):
        taken.append(sizes)
        return own(sizes, programs)

    own = cutting._one_by_one
    monkeypatch.setattr(cutting, "_one_by_one", one_by_one)
    monkeypatch.setattr(cutting, "medians", lambda *_, **__: {"small": 1.0, "large": 3.0})
    return taken


@pytest.mark.parametrize("way", APART)
def test_samples_that_are_kept_apart_may_run_in_slices(way, slices):
    lowered = fxfuse.lower(fxfuse.fuse(with_parts(APART[way])), (BATCH,))
    assert not lowered.lowering.reason and slices == [[2] * 4]
    near(lowered, BATCH)
    near(lowered, torch.randn(12, 3, 12, 12))
    near(lowered, torch.randn(7, 3, 12, 12))
    near(lowered, torch.randn(11, 3, 12, 12))
    assert slices == [[2] * 4, [2] * 6, [2, 2, 2, 2, 3]]


kept = {}


@fx.wrap
def cached(y):
    if "ramp" not in kept:
        kept["ramp"] = torch.ones_like(y[:1, :1]).cumsum(-1)
    return y + kept["ramp"]


def test_what_functions_keep_has_numbers(slices):
    lowered = fxfuse.lower(fxfuse.fuse(with_parts(lambda m, y: cached(y).relu())), (BATCH,))
    assert type(kept["ramp"]) is Tensor and not slices
    near(lowered, BATCH)


def test_what_takes_no_smaller_batch(slices):
    lowered = fxfuse.lower(
        fxfuse.fuse(with_parts(lambda m, y: y.relu() * (12 // (y.shape[0] // 4)))), (BATCH,)
    )
    assert not lowered.lowering.reason and not slices
    near(lowered, BATCH)


def test_nothing_but_slices_is_computed(slices, monkeypatch):
    made, asked = [], []
    monkeypatch.setattr(
        Maker, "made", lambda self, given, own=Maker.made: (made.append(len(given[0])), own(self, given))[1]
    )
    monkeypatch.setattr(
        cutting, "specialised", lambda module, given: (asked.append(given[0]), specialised(module, given))[1]
    )
    lowered = fxfuse.lower(fxfuse.fuse(with_parts(APART["residual"])), (torch.randn(16, 3, 12, 12),))
    assert not lowered.lowering.reason and slices == [[2] * 8] and made == [2, 4]
    assert [(type(each) is Tensor, len(each)) for each in asked] == [(False, 16)]


def test_slices_are_doubled_while_it_pays(monkeypatch):
    times = iter([{"small": 1.0, "large": 1.5}, {"small": 1.0, "large": 1.9}, {"small": 1.0, "large": 1.95}])
    monkeypatch.setattr(cutting, "medians", lambda *_, **__: next(times))
    size, _ = cutting._Slices(*prepared(32))._fastest()
    assert size == 16 and not [*times]


def test_no_sample_is_left_alone(monkeypatch, slices):
    monkeypatch.setattr(cutting, "medians", lambda *_, **__: {"small": 1.0, "large": 1.0})
    lowered = fxfuse.lower(fxfuse.fuse(with_parts(APART["classifier"])), (torch.randn(9, 3, 12, 12),))
    assert not lowered.lowering.reason and slices == [[4, 5]]


def test_slices_that_are_slower_are_not_taken(monkeypatch):
    monkeypatch.setattr(cutting, "medians", lambda *_, **__: {"small": 1.0, "large": 2.1})
    size, made = cutting._Slices(*prepared(32))._fastest()
    assert size == 2 and len(made.inputs[0]) == 2


def prepared(batch):
    model = fxfuse.fuse(with_parts(APART["residual"]))
    inputs = (torch.randn(batch, 3, 12, 12),)
    with torch.no_grad():
        whole = specialised(model, without_numbers(inputs))
    return Maker(model, engines.ENGINES["torch"], None), inputs, batch, whole


@pytest.mark.parametrize("way", MIXED)
def test_samples_that_are_mixed_run_together(way, slices):
    lowered = fxfuse.lower(fxfuse.fuse(with_parts(MIXED[way])), (BATCH,))
    assert not slices
    assert lowered.lowering.reason.startswith(REASONS.get(way, "")) and (way in REASONS) == bool(
        lowered.lowering.reason
    )
    near(lowered, BATCH, limit=1e-4)


def test_several_inputs_run_in_slices_if_all_are_batches(slices):
    model = folded(WithSecond(lambda m, y, z: F.relu(y + z)))
    near(fxfuse.lower(model, (BATCH, torch.randn(8, 8, 12, 12))), BATCH, torch.randn(8, 8, 12, 12))
    assert slices == [[2] * 4]
    near(fxfuse.lower(model, (BATCH, torch.randn(1, 8, 12, 12))), BATCH, torch.randn(1, 8, 12, 12))
    near(fxfuse.lower(model, (BATCH, torch.randn(8, 12, 12))), BATCH, torch.randn(8, 12, 12))
    assert slices == [[2] * 4]


# ---- random graphs -------------------------------------------------------------------------------------


@settings(max_examples=100)
@given(st.one_of(paths(), random_programs()), st.booleans(), st.sampled_from([None, 4, 2]))
def test_random_graphs_give_what_they_gave(case, in_slices, largest):
    model = case.model()
    if any(module.training for module in model.modules()):
        reject()
    model, x = model.float(), case.inputs()[0].float()
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(cutting, "medians", lambda *_, **__: {"small": 1.0, "large": 3.0})
        if largest:
            own = onednn._function

            def function(graph, inputs):
                if torch._C._jit_llga_enabled() and sum(map(is_operator, graph.nodes())) > largest:
                    event("cut")
                    raise RuntimeError("it is too large")
                return own(graph, inputs)

            patch.setattr(onednn, "_function", function)
        one_by_one = cutting._one_by_one
        patch.setattr(cutting, "_one_by_one", lambda *given: (event("sliced"), one_by_one(*given))[1])
        if in_slices and x.dim():
            x = torch.cat([x] * 9)[:9]
        try:
            fused = fxfuse.fuse(model)
            fused(x.clone())
        except (RuntimeError, ValueError, IndexError, AssertionError):
            reject()
        lowered = fxfuse.lower(fused, (x,))
        event("lowered" if not lowered.lowering.reason else "not lowered")
        for seed in (1, 2):  # the first call has compared itself
            y = noise(x.shape, seed).float()
            exact = copy.deepcopy(fused).double()(y.double())
            for one, other in zip(
                *map(torch.utils._pytree.tree_leaves, (lowered(y.clone()), exact)), strict=True
            ):
                if isinstance(one, Tensor) and one.is_floating_point() and one.numel():
                    assert one.shape == other.shape
                    assert float((one - other).abs().max()) <= 1e-3 * max(1.0, float(other.abs().max()))


# ---- a module like others ------------------------------------------------------------------------------


def test_it_is_copied_pickled_converted_and_loaded():
    model = folded(Net())
    lowered = fxfuse.lower(model, (X,))
    for twin in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))):
        near(twin, X)
        assert all(each.run for each in twin._programs.values())
    other = folded(Net(), seed=5)
    state = {f"folded.{name}": tensor for name, tensor in other.state_dict().items()}
    lowered.load_state_dict(state)
    near(lowered, X)
    torch.testing.assert_close(lowered(X), other(X), rtol=1e-3, atol=1e-3)
    near(nn.Sequential(lowered).double().float()[0], X)
    parent = nn.ModuleDict({"inner": lowered})
    parent.load_state_dict(
        {f"inner.folded.{name}": 0.5 * tensor for name, tensor in other.state_dict().items()}
    )
    near(lowered, X)


def test_arguments_by_name_and_those_that_are_no_tensors():
    model = folded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.ReLU()))
    lowered = fxfuse.lower(model, (X,))
    name = next(node.target for node in model.graph.nodes if node.op == "placeholder")
    torch.testing.assert_close(lowered(**{name: X}), model(X))
    assert len(lowered._programs) == 1
    graph = fx.Graph()
    x, scale = graph.placeholder("x"), graph.placeholder("scale", default_value=2.0)
    graph.output(graph.call_function(operator.mul, (graph.call_module("conv", (x,)), scale)))
    module = fx.GraphModule({"conv": randomise(nn.Conv2d(3, 4, 3)).float()}, graph).eval()
    lowered = fxfuse.lower(module, (X,))
    for named in ({}, {"scale": 0.5}, {"scale": -0.0}, {"scale": 0.0}, {"scale": 3}):
        result, expected = lowered(X, **named), module(X, **named)
        torch.testing.assert_close(result, expected)
    assert len(lowered._programs) == 5


def test_gradients_training_and_autocast():
    model = folded(Net())
    lowered = fxfuse.lower(model, (X,))
    with pytest.raises(fxfuse.UsageError, match="no gradients"):
        lowered(X.clone().requires_grad_())
    with torch.no_grad():
        lowered(X.clone().requires_grad_())
    with pytest.raises(fxfuse.UsageError, match="cannot train"):
        lowered.train()
    with torch.inference_mode():
        torch.testing.assert_close(lowered(X.clone()), model(X))
        near(lowered, torch.randn(5, 3, 12, 12))
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(lowered(X), model(X))


def test_an_input_that_is_no_plain_tensor_gets_the_folded_module():
    class Own(Tensor):
        pass

    lowered = fxfuse.lower(folded(Net()), (X,))
    own = lowered(X.as_subclass(Own))
    torch.testing.assert_close(own.as_subclass(Tensor), lowered(X), rtol=1e-4, atol=1e-4)
    (reason,) = [each.reason for each in lowered._programs.values() if not each.run]
    assert "Own" in reason


def test_programs_of_many_sizes_do_not_pile_up(lowered_graphs, caplog):
    lowered = fxfuse.lower(folded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), (X,))
    for size in (*range(5, 25), 5, 24):
        near(lowered, torch.randn(1, 3, size, 7))
    assert len(lowered._programs) == len(lowered_graphs) == 16
    assert [record.message for record in caplog.records if "kinds of inputs" in record.message]


def test_threads_may_share_it():
    lowered = fxfuse.lower(folded(Net()), (X,))
    inputs = [torch.randn(2 + number % 3, 3, 12, 12) for number in range(30)]
    with ThreadPoolExecutor(4) as pool:
        found = [*pool.map(lowered, inputs * 3)]
    for x, result in zip(inputs * 3, found, strict=True):
        torch.testing.assert_close(result, lowered.folded(x), rtol=1e-3, atol=1e-3)


def test_it_keeps_the_report_of_the_fold():
    model = folded(Net())
    lowered = fxfuse.lower(model, (X,))
    assert fxfuse.report(lowered) == fxfuse.report(model) and fxfuse.report(model).norms == 3
    assert fxfuse.report(copy.deepcopy(lowered)) == fxfuse.report(model)


@pytest.mark.parametrize("x", [X, torch.randn(8, 3, 12, 12)], ids=["2", "8"])
def test_exported_programs_are_lowered(x):
    program = torch.export.export(randomise(Net()).float(), (x,))
    lowered = fxfuse.lower(fxfuse.fuse(program), (x,))
    assert not lowered.lowering.reason
    torch.testing.assert_close(lowered(x), program.module()(x), rtol=1e-3, atol=1e-3)


def test_another_number_of_threads_gets_a_program_of_its_own():
    lowered = fxfuse.lower(folded(Net()), (X,))
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(before + 1)
        near(lowered, X)
    finally:
        torch.set_num_threads(before)
    assert len(lowered._programs) == 2


# ---- which engine --------------------------------------------------------------------------------------


def test_engines_that_are_not_there_are_told(monkeypatch):
    model = folded(Net())
    with pytest.raises(fxfuse.UsageError, match="no engine 'fast'; use one of: torch, openvino, onnx"):
        fxfuse.lower(model, (X,), "fast")
    with pytest.raises(fxfuse.UsageError, match=r"does not compute in torch\.bfloat16"):
        fxfuse.lower(model, (X,), "onnxruntime", dtype=torch.bfloat16)
    with pytest.raises(fxfuse.UsageError, match=r"does not compute in torch\.float16"):
        fxfuse.lower(model, (X,), dtype=torch.float16)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(fxfuse.UsageError, match=r"needs openvino: pip install 'fxfuse\[openvino\]'"):
        fxfuse.lower(model, (X,), "openvino")


def test_wrong_use_is_told():
    with pytest.raises(fxfuse.UsageError, match="training mode"):
        fxfuse.lower(Net(), (X,))
    with pytest.raises(fxfuse.UsageError, match="example_inputs"):
        fxfuse.lower(folded(Net()), X)
    with pytest.raises(fxfuse.UsageError, match="rejects the example inputs"):
        fxfuse.lower(folded(Net()), (X[:, :2],))
    with pytest.raises(fxfuse.UsageError, match="folded module"):
        fxfuse.lower(None, (X,))


def test_an_engine_that_fails_or_is_wrong_is_not_used(monkeypatch):
    def fails(*_):
        raise RuntimeError("no such operator\nand a long trace")

    def is_wrong(graph, *_):
        return lambda tensors: [1.001 * result for result in graph.module(*tensors)]

    def has_another_shape(graph, *_):
        return lambda tensors: [result[None] for result in graph.module(*tensors)]

    model = folded(Net())
    for make, reason in (
        (fails, "no such operator"),
        (is_wrong, "other numbers"),
        (has_another_shape, "another shape"),
    ):
        monkeypatch.setitem(engines.ENGINES, "torch", engines.Engine(make))
        lowered = fxfuse.lower(model, (X,))
        assert reason in lowered.lowering.reason and "\n" not in lowered.lowering.reason
        assert torch.equal(lowered(X), model(X))


def delayed(seconds, broken=False):
    def make(graph, *_):
        if broken:
            raise UnsupportedError("it cannot do this")

        def run(tensors):
            time.sleep(seconds)
            return graph.module(*tensors)

        return run

    return engines.Engine(make)


def test_auto_takes_the_fastest_and_says_what_it_saw(monkeypatch):
    table = {"slow": delayed(0.03), "broken": delayed(0, broken=True), "fast": delayed(0.003)}
    monkeypatch.setattr(auto, "ENGINES", table)
    for name, engine in table.items():
        monkeypatch.setitem(engines.ENGINES, name, engine)
    model = folded(Net())
    lowered = fxfuse.lower(model, (X,), "auto")
    assert lowered.engine == "fast"
    times = {each.engine: each.milliseconds for each in lowered.lowering.timings}
    assert [name for name in times if name != "folded"] == ["fast", "slow", "broken"]
    assert 3 <= times["fast"] < 30 <= times["slow"] and math.isnan(times["broken"])
    assert "folded" in times and "folded" in str(lowered.lowering)
    assert "it cannot do this" in str(lowered.lowering)
    near(lowered, X)
    hasty = fxfuse.lower(model, (X,), "auto", tune_seconds=0)
    assert hasty.engine == "slow"
    assert fxfuse.lower(model, (X.clone().requires_grad_(),), "auto").engine == "fast"
    with pytest.raises(fxfuse.UsageError, match=r"no engine that is installed computes in torch\.float16"):
        fxfuse.lower(model, (X,), "auto", dtype=torch.float16)
    reasons = {each.engine: each.reason for each in hasty.lowering.timings if each.reason}
    assert reasons == dict.fromkeys(("broken", "fast"), "not tried: the time was over")


def test_auto_of_real_engines():
    lowered = fxfuse.lower(folded(Net()), (X,), "auto", tune_seconds=4)
    assert lowered.engine in {"torch", "openvino", "onnxruntime", "inductor"}
    assert {each.engine for each in lowered.lowering.timings} == {*engines.ENGINES, "folded"}
    near(lowered, X)


def test_timing_draws_an_order_and_counts_second_calls():
    calls = []
    functions = {name: (lambda name=name: calls.append(name)) for name in "abc"}
    found = timing.samples(functions, rounds=8)
    assert {name: len(times) for name, times in found.items()} == dict.fromkeys("abc", 8)
    assert calls[::2] == calls[1::2]
    assert len({tuple(calls[start : start + 6]) for start in range(0, 48, 6)}) > 1
    assert len(timing.samples({"a": lambda: None}, rounds=8, seconds=0)["a"]) == 3


# ---- behind torch.compile ------------------------------------------------------------------------------


def compiled(model, **options):
    torch.compiler.reset()
    return torch.compile(model, backend="fxfuse", options={"then": "lower", **options})


@pytest.fixture
def lowered_graphs(monkeypatch):
    """Counts the programs that are made."""
    made = []

    def compile_(graph, inputs, dtype):
        program = onednn.compile(graph, inputs, dtype)
        made.append(graph)
        return program

    monkeypatch.setitem(engines.ENGINES, "torch", engines.Engine(compile_))
    return made


def same_as_source(call, model, *inputs):
    with torch.no_grad():
        exact = copy.deepcopy(model).double()(*(x.double() for x in inputs))
        result = call(*inputs)
    assert float((result - exact).abs().max()) <= 2e-5 * float(exact.abs().max())


@pytest.mark.parametrize("options", [{}, {"refold": "always"}])
def test_compiled_models_are_lowered_and_follow_their_weights(options, lowered_graphs):
    model = randomise(Net()).float()
    call = compiled(model, **options)
    same_as_source(call, model, X)
    same_as_source(call, model, X + 1)
    assert len(lowered_graphs) == 1
    assert len(fxfuse.report(call).folded) == 3
    changes = [
        lambda: model.stem[0].weight.add_(0.3),
        lambda: model.stem[1].running_var.mul_(2),
        lambda: model.head.bias.copy_(torch.randn(5)),
        lambda: setattr(model.head, "weight", nn.Parameter(torch.randn(5, 16))),
        lambda: model.load_state_dict(randomise(Net(), 7).float().state_dict()),
    ]
    for number, change in enumerate(changes):
        before = model(X)
        with torch.no_grad():
            change()
        assert not torch.allclose(before, model(X), rtol=1e-3)
        same_as_source(call, model, X)
        assert len(lowered_graphs) >= number + 2


def test_a_norm_that_stays_and_trains_elsewhere_is_followed():
    """The kernels of batch norm write statistics and count no version."""
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.ReLU())).float()
    call = compiled(model)
    same_as_source(call, model, X)
    assert not fxfuse.report(call).folded
    model[2].train()(torch.randn(8, 4, 5, 5) * 3)
    model.eval()
    same_as_source(call, model, X)


def test_compiled_models_take_other_batches_and_give_gradients_where_they_are_asked_for():
    model = randomise(Net()).float()
    call = compiled(model)
    for batch in (2, 5, 7):
        same_as_source(call, model, torch.randn(batch, 3, 12, 12))
    x = X.clone().requires_grad_()
    call(x).sum().backward()
    other = X.clone().requires_grad_()
    grads = torch.autograd.grad(model(other).sum(), (other, model.head.weight))
    torch.testing.assert_close((x.grad, model.head.weight.grad), grads, rtol=1e-3, atol=1e-3)


def test_instances_of_one_class_have_programs_of_their_own(lowered_graphs):
    """They share what Dynamo compiles."""
    models = [randomise(Net(), seed).float() for seed in (1, 2)]
    torch.compiler.reset()
    for model in models:
        model.compile(backend="fxfuse", options={"then": "lower"})
    for _ in range(3):
        for model, seed in zip(models, (1, 2), strict=True):
            same_as_source(model, randomise(Net(), seed).float(), X)
    assert len(lowered_graphs) == 2


def test_a_mode_of_inductor_is_no_mode_of_lowering():
    torch.compiler.reset()
    with pytest.raises(Exception, match="one of Inductor's, which then='lower' leaves out"):
        torch.compile(
            Net().eval(), backend=partial(backend.backend, options={"then": "lower"}, mode="default")
        )(X)


# ---- on the command line -------------------------------------------------------------------------------


def network():
    return randomise(Net()).float()


def test_fuse_tells_how_fast_the_result_is(tmp_path):
    file = tmp_path / "all.json"
    arguments = ["tests.test_lower:network", "--input", "2,3,12,12", "--lower"]
    shown = CliRunner().invoke(cli.main, ["fuse", *arguments])
    assert shown.exit_code == 0, shown.output
    assert "engine torch, ready after" in shown.stdout and "error against float64" in shown.stdout
    written = CliRunner().invoke(cli.main, ["fuse", *arguments, "--engine", "auto", "--json", str(file)])
    assert written.exit_code == 0, written.output
    lowering = json.loads(file.read_text())["lowering"]
    assert {each["engine"] for each in lowering["timings"]} == {*engines.ENGINES, "folded"}
    times = [each["milliseconds"] for each in lowering["timings"]]
    assert times == sorted(times) and times[0] > 0 and not lowering["reason"]


def test_an_engine_is_for_lowering():
    result = CliRunner().invoke(cli.main, ["fuse", "tests.test_lower:network", "--engine", "auto"])
    assert result.exit_code == 2 and "add --lower" in result.stderr


def test_lowering_needs_an_input():
    result = CliRunner().invoke(cli.main, ["fuse", "tests.test_lower:network", "--lower"])
    assert result.exit_code == 2 and "say which with --input" in result.stderr


# ---- memory --------------------------------------------------------------------------------------------

FAULTS = """
import resource, sys, torch, fxfuse
if sys.argv[1] == "keep":
    fxfuse.keep_freed_memory()
def run():
    for _ in range(20):
        torch.empty(40 << 20).fill_(1)
run()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
run()
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="a setting of glibc")
def test_freed_memory_is_kept_where_that_is_asked_for():
    """A block of 160 MiB has some 40,000 pages, which are mapped anew each time by default."""
    faults = {
        way: int(subprocess.run([sys.executable, "-c", FAULTS, way], capture_output=True, check=True).stdout)
        for way in ("default", "keep")
    }
    assert faults["keep"] < faults["default"] / 20 or faults["default"] < 1000, faults


def test_freed_memory_is_kept_by_glibc_only(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(fxfuse.UsageError, match="glibc"):
        fxfuse.keep_freed_memory()
