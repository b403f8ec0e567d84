"""`fxfuse.lower`: a module like others, on the engine that was asked for."""

from __future__ import annotations

import copy
import json
import logging
import math
import operator
import pickle
import platform
import subprocess
import sys
import time
from collections import OrderedDict
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from types import SimpleNamespace
from typing import NamedTuple

import pytest
import torch
import torch.nn.functional as F
from click.testing import CliRunner
from torch import fx, nn
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx

import fxfuse
from fxfuse import backend, cli
from fxfuse.errors import UnsupportedError
from fxfuse.lowering import auto, engines, kept, onednn, timing
from tests.lowering import ENGINES, Net, WithSecond, Written, X, folded, near, needs_bfloat16
from tests.support import randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines; their numbers are what is looked at


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
    assert len(lowered._outcomes) == 5 and all(each.run for each in lowered._outcomes.values())


class Optional(Net):
    """Whose forward takes options, so that fuse keeps its modules."""

    def forward(self, x, mask=None, double: bool = False):
        y = self.stem(x)
        y = y if mask is None else y * mask
        y = F.relu(y + self.point(self.deep(y)))
        return 2 * y if double else y


@pytest.mark.parametrize("engine", ENGINES)
def test_options_have_their_defaults_in_programs(engine, caplog):
    model = folded(Optional())
    assert isinstance(model, Optional) and not any(isinstance(m, nn.BatchNorm2d) for m in model.modules())
    lowered = fxfuse.lower(model, (X,), engine)
    assert not lowered.lowering.reason
    near(lowered, X)
    mask = (torch.randn(12, 12) > 0).float()
    for given, options in (
        ((X, mask), {}),
        ((X,), {"mask": mask}),
        ((X, None, True), {}),
        ((X,), {"double": True}),
    ):
        assert torch.equal(lowered(*given, **options), model(*given, **options))
    assert "runs as it was folded" in caplog.text
    torch.testing.assert_close(lowered(X, None, False), model(X), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(lowered(X, double=False), model(X), rtol=1e-4, atol=1e-4)


class ByKeyword(Optional):
    def forward(self, x, *, mask=None):
        return super().forward(x, mask)


def test_options_that_are_given_by_keyword_only(caplog):
    lowered = fxfuse.lower(folded(ByKeyword()), (X,))
    assert not lowered.lowering.reason
    near(lowered, X)
    assert torch.equal(lowered(x=X, mask=None), lowered(X)) and not caplog.text
    for mask in (torch.zeros(12, 12), torch.rand(12, 12)):
        assert torch.equal(lowered(X, mask=mask), lowered.folded(X, mask=mask))
    for scale in range(20):
        lowered(X, mask=torch.full((12, 12), float(scale)).expand(scale + 1, 1, 12, 12)[:1])
    assert caplog.text.count("runs as it was folded: mask can only be given by keyword") == 1
    assert len(lowered._outcomes) == 1
    with torch.enable_grad(), pytest.raises(fxfuse.UsageError, match="gives no gradients"):
        lowered(X, mask=torch.ones(12, 12, requires_grad=True))


def test_modules_that_were_kept_for_their_class():
    model = fxfuse.fuse(randomise(Net()).float(), keep_modules=True)
    lowered = fxfuse.lower(model, (X,))
    assert isinstance(model, Net) and not lowered.lowering.reason
    near(lowered, X)


class Deciding(Net):
    def forward(self, x, scale=None):
        return super().forward(x if x.sum() > 0 else -x)


def test_what_cannot_be_traced_answers_itself():
    model = folded(Deciding())
    lowered = fxfuse.lower(model, (X,))
    assert "Deciding is no graph: " in lowered.lowering.reason
    assert torch.equal(lowered(-X), model(-X))


class Stateful(Net):
    """Which does in forward what a trace does not show."""

    def __init__(self, does):
        super().__init__()
        self.does = does
        self._last = {}
        self._numbers = torch.Generator().manual_seed(0)

    def forward(self, x, scale=None):
        return self.does(self, super().forward(x))


def smoothed(m, y):
    last = m._last.get("y")
    m._last["y"] = y = y if last is None else 0.9 * last + 0.1 * y
    return y


def recorded(m, y):
    m._last.setdefault("all", []).append(y)
    return y


def counted(m, y):
    m._last.setdefault("count", torch.zeros(()))
    m._last["count"] += 1
    return y


def noisy(m, y):
    return y + 1e-2 * torch.rand(1, generator=m._numbers)


def unlike_tensors(_, y):
    return y + 0.1 * y.sigmoid() if type(y) is torch.Tensor else y


def calibrated(m, y):
    m._last.setdefault("mean", y.mean())
    return y.relu() - m._last["mean"]


def in_order(_, y):
    return OrderedDict(out=y)


@needs_bfloat16
def test_bfloat16_is_not_for_floats_that_become_indices():
    table = nn.Embedding(1000, 8)
    model = folded(WithSecond(lambda m, y, z: y + m.table(z.abs().long())[:, :, None, None], table=table))
    lowered = fxfuse.lower(model, (X, torch.tensor([3.0, 200.0])), dtype=torch.bfloat16)
    assert "floats become integers" in lowered.lowering.reason
    given = X, torch.tensor([301.0, 999.0])
    assert torch.equal(lowered(*given), model(*given))


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
@pytest.mark.parametrize("does", [smoothed, recorded, counted, noisy, calibrated, unlike_tensors, in_order])
def test_what_is_more_than_its_trace_answers_itself(does, dtype):
    model = folded(Stateful(does))
    lowered, twin = fxfuse.lower(model, (X,), dtype=dtype), copy.deepcopy(model)
    assert lowered.lowering.reason and not model._last
    for number in range(3):
        result, expected = lowered(X * number), twin(X * number)
        assert type(result) is type(expected)
        torch.testing.assert_close(result, expected, rtol=0, atol=0)
    assert len(model._last.get("all", [])) == (3 if does is recorded else 0)


class Pair(NamedTuple):
    image: torch.Tensor
    size: torch.Size


RESULTS = {
    "shape": lambda m, y: (y, {"size": y.shape, "part": y.size()[1:]}),
    "named tuple": lambda m, y: Pair(y, y.shape),
    "largest": lambda m, y: y.max(1),
    "sorted, among others": lambda m, y: [y, torch.sort(y, 1)],
    "parts": lambda m, y: y.split(2, 1),
}


def kinds(value):
    """The types of containers and leaves, and the sizes."""
    parts = [value[key] for key in value] if isinstance(value, dict) else value
    if isinstance(value, torch.Tensor) or not isinstance(parts, (tuple, list)):
        return type(value), getattr(value, "shape", value)
    return type(value), [kinds(part) for part in parts]


@pytest.mark.parametrize("way", RESULTS)
@pytest.mark.parametrize("batch", [2, 9])
def test_results_are_in_the_containers_that_they_were_in(way, batch):
    model, x = folded(Written(RESULTS[way])), torch.cat([X, -X, X, X * 2, X.flip(0)])[:batch]
    lowered = fxfuse.lower(model, (x,))
    assert not lowered.lowering.reason
    result, expected = lowered(x), model(x)
    assert kinds(result) == kinds(expected)
    for one, other in zip(*map(torch.utils._pytree.tree_leaves, (result, expected)), strict=True):
        torch.testing.assert_close(one, other)


def test_what_is_kept_from_the_first_call_on_is_no_state():
    def table(m, y):
        if "table" not in m._last:
            m._last["table"] = torch.arange(5.0)
        return y + m._last["table"]

    model = folded(Stateful(table))
    lowered = fxfuse.lower(model, (X,))
    assert not lowered.lowering.reason and not model._last
    near(lowered, X)


def test_it_is_traced_when_it_is_made_and_not_while_it_is_called(monkeypatch):
    lowered = fxfuse.lower(folded(Optional()), (X,))
    monkeypatch.setattr(kept, "capture", None)
    near(lowered, torch.randn(3, 3, 14, 14))
    assert len(lowered._outcomes) == 2 and all(each.run for each in lowered._outcomes.values())
    monkeypatch.undo()
    twin = pickle.loads(pickle.dumps(lowered))
    twin.load_state_dict({name: 2 * value for name, value in lowered.state_dict().items()})
    near(twin, X)
    assert all(each.run for each in twin._outcomes.values()) and not torch.equal(twin(X), lowered(X))


@pytest.mark.parametrize("make", [torch.jit.script, torch.compile])
def test_modules_of_compilers_answer_themselves(make):
    model = nn.Sequential(nn.Conv2d(3, 4, 3)).eval()
    lowered = fxfuse.lower(make(model), (X,))
    assert "is no graph: " in lowered.lowering.reason


@pytest.mark.parametrize("engine", ENGINES)
def test_programs_do_not_follow_what_is_written_to_the_weights(engine):
    model = randomise(nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 8, 3)))
    lowered = fxfuse.lower(fxfuse.fuse(model.float()), (X,), engine)
    expected = lowered(X).clone()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.5)
    assert not lowered.lowering.reason and torch.equal(lowered(X), expected)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("dtype", [torch.float32, torch.int64, torch.bool])
def test_results_may_be_inputs(engine, dtype):
    def function(_, y, z):
        return {"features": y.relu(), "given": z, "again": z}

    z = torch.zeros(2, 65536, dtype=dtype)  # so large that the memory of a result is zero by itself
    lowered = fxfuse.lower(folded(WithSecond(function)), (X, z), engine)
    assert not lowered.lowering.reason
    ones = torch.ones_like(z)
    assert torch.equal(lowered(X, ones)["given"], ones)
    lowered(X, ones)["given"].zero_()
    assert bool(ones.all())


def test_what_is_traced_runs_as_it_was_folded():
    lowered = fxfuse.lower(folded(Net()), (X,))
    x = torch.randn(3, 3, 14, 14)
    traced = torch.jit.trace(lowered, x)
    torch.testing.assert_close(traced(X), lowered.folded(X))
    recorded = make_fx(lowered)(x)
    assert len(recorded.graph.nodes) > 10
    torch.testing.assert_close(recorded(x + 1), lowered.folded(x + 1))


def test_other_weights_for_a_call_leave_no_trace():
    lowered = fxfuse.lower(folded(Net()), (X,))
    halves = {name: 0.5 * value for name, value in lowered.state_dict().items()}
    for x in (X, X[:1]):  # one that there is a program for, and one that there is none for
        called = torch.func.functional_call(lowered, halves, (x,))
        twin = fxfuse.lower(copy.deepcopy(lowered.folded), (x,))
        twin.load_state_dict(halves)
        torch.testing.assert_close(called, twin.folded(x))
        near(lowered, x)
    assert all(outcome.run for outcome in lowered._outcomes.values()) and len(lowered._outcomes) == 2


def test_another_module_in_the_place_of_the_folded_one():
    lowered = fxfuse.lower(folded(Net()), (X,))
    lowered.folded = folded(Net(), seed=1)
    torch.testing.assert_close(lowered(X), lowered.folded(X))


def test_tangents_are_refused_as_gradients_are():
    lowered = fxfuse.lower(folded(Net()), (X,))
    with forward_ad.dual_level(), pytest.raises(fxfuse.UsageError, match="no gradients"):
        lowered(forward_ad.make_dual(X, X))


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("inputs", [(), (3,)])
def test_no_input_is_a_tensor(engine, inputs):
    class Constant(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.table = nn.Linear(2, 3), nn.Parameter(torch.randn(4, 2))

        def forward(self, times=1):
            return self.layer(self.table).relu() * times

    level = logging.root.level
    lowered = fxfuse.lower(Constant().eval(), inputs, engine)
    assert lowered.lowering.reason and logging.root.level == level
    torch.testing.assert_close(lowered(*inputs), lowered.folded(*inputs))


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


@needs_bfloat16
@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_bfloat16_is_asked_for_and_its_error_told(engine):
    lowered = fxfuse.lower(folded(Net()), (X,), engine, dtype=torch.bfloat16)
    assert not lowered.lowering.reason
    near(lowered, X, limit=0.05)
    assert 1e-4 < lowered.lowering.comparison.candidate_error < 0.05


@pytest.mark.parametrize("engine", ["torch", "openvino"])
def test_bfloat16_on_a_processor_without_it(engine, monkeypatch):
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    float32 = SimpleNamespace(get_type_name=lambda: "f32")
    monkeypatch.setattr("openvino.CompiledModel.get_property", lambda *_: float32)
    model = folded(Net())
    lowered = fxfuse.lower(model, (X,), engine, dtype=torch.bfloat16)
    assert "has no bfloat16 for this processor" in lowered.lowering.reason
    assert torch.equal(lowered(X), model(X))


@needs_bfloat16
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
    "bags, of which OpenVINO counts the padding": (lambda m, y, t: y + m.bag(t)[:, :, None, None], False),
}


@pytest.mark.parametrize("engine", ["openvino", "onnxruntime"])
@pytest.mark.parametrize("way", WITH_INTEGERS)
def test_integers_that_are_given(engine, way):
    """OpenVINO has 32 bits for them."""
    function, is_lowered = WITH_INTEGERS[way]
    tables = {"table": nn.Embedding(9, 4), "bag": nn.EmbeddingBag(9, 8, mode="mean", padding_idx=0)}
    model = folded(WithSecond(function, **tables))
    numbers = torch.arange(16).reshape(2, 8) % 9
    lowered = fxfuse.lower(model, (X, numbers), engine)
    assert is_lowered == (not lowered.lowering.reason)
    assert is_lowered or "integers" in lowered.lowering.reason
    assert torch.allclose(lowered(X, 8 - numbers), model(X, 8 - numbers), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("number", [2**32 + 5, 2**31, -(2**31), -(2**31) - 1])
def test_integers_that_take_more_than_32_bits(engine, number):
    def compare(_, y, t):
        is_five, is_other = (t == 5)[:, :, None, None], (t != 5)[:, :, None, None]
        return y.masked_fill(is_five, 1.0) + is_other.float() + t.bool().float()[:, :, None, None], t

    lowered = fxfuse.lower(folded(WithSecond(compare)), (X, torch.arange(16).reshape(2, 8) % 9), engine)
    assert not lowered.lowering.reason
    numbers = torch.full((2, 8), number)
    found, given = lowered(X, numbers)
    torch.testing.assert_close(found, lowered.folded(X, numbers)[0], rtol=1e-4, atol=1e-5)
    given.add_(1)
    assert torch.equal(numbers, torch.full((2, 8), number))


def test_it_is_copied_pickled_converted_and_loaded():
    model = folded(Net())
    lowered = fxfuse.lower(model, (X,))
    for twin in (copy.deepcopy(lowered), pickle.loads(pickle.dumps(lowered))):
        near(twin, X)
        assert all(each.run for each in twin._outcomes.values())
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
    assert len(lowered._outcomes) == 1
    graph = fx.Graph()
    x, scale = graph.placeholder("x"), graph.placeholder("scale", default_value=2.0)
    graph.output(graph.call_function(operator.mul, (graph.call_module("conv", (x,)), scale)))
    module = fx.GraphModule({"conv": randomise(nn.Conv2d(3, 4, 3)).float()}, graph).eval()
    lowered = fxfuse.lower(module, (X,))
    for named in ({}, {"scale": 0.5}, {"scale": -0.0}, {"scale": 0.0}, {"scale": 3}):
        result, expected = lowered(X, **named), module(X, **named)
        torch.testing.assert_close(result, expected)
    assert len(lowered._outcomes) == 5


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


def test_programs_of_many_sizes_do_not_pile_up(lowered_graphs, caplog):
    lowered = fxfuse.lower(folded(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU())), (X,))
    for size in (*range(5, 25), 5, 24):
        near(lowered, torch.randn(1, 3, size, 7))
    assert len(lowered._outcomes) == len(lowered_graphs) == 16
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
    assert len(lowered._outcomes) == 2


def test_engines_that_are_not_there_are_told(monkeypatch):
    model = folded(Net())
    with pytest.raises(fxfuse.UsageError, match="no engine 'fast'; use one of: torch, openvino, onnx"):
        fxfuse.lower(model, (X,), "fast")
    with pytest.raises(fxfuse.UsageError, match=r"does not compute in torch\.bfloat16"):
        fxfuse.lower(model, (X,), "onnxruntime", dtype=torch.bfloat16)
    with pytest.raises(fxfuse.UsageError, match=r"does not compute in torch\.float16"):
        fxfuse.lower(model, (X,), dtype=torch.float16)
    with pytest.raises(fxfuse.UsageError, match=r"dtype is 'bfloat16'; pass a torch\.dtype"):
        fxfuse.lower(model, (X,), dtype="bfloat16")
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
    with pytest.raises(fxfuse.UsageError, match="lowered already"):
        fxfuse.lower(fxfuse.lower(folded(Net()), (X,)), (X,))
    with pytest.raises(fxfuse.UsageError, match="tune_seconds is '3'; pass a number"):
        fxfuse.lower(folded(Net()), (X,), "auto", tune_seconds="3")


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


def test_auto_times_what_is_close_once_more(monkeypatch):
    table = {name: delayed(0) for name in ("one", "other", "slow")}
    monkeypatch.setattr(auto, "ENGINES", table)
    for name, engine in table.items():
        monkeypatch.setitem(engines.ENGINES, name, engine)
    answers = [{"one": 1.0, "other": 1.1, "slow": 2.0, "folded": 0.5}, {"one": 1.1, "other": 1.05}]
    asked = []
    monkeypatch.setattr(auto, "medians", lambda calls, rounds: (asked.append([*calls]), answers.pop(0))[1])
    lowered = fxfuse.lower(folded(Net()), (X,), "auto")
    assert asked == [["one", "other", "slow", "folded"], ["one", "other"]]
    assert lowered.engine == "other"
    times = {each.engine: each.milliseconds for each in lowered.lowering.timings}
    assert times == {"folded": 0.5, "other": 1.05, "one": 1.1, "slow": 2.0}


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


def test_compiled_models_are_lowered_and_follow_their_weights(lowered_graphs):
    model = randomise(Net()).float()
    call = compiled(model)
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


def through_a_view_of_a_result(_, y):
    part = y[:, 0]
    if part.sum() > -1e9:  # the graph ends here
        part.zero_()
    return y


def through_a_view_of_an_input(_, y, z):
    part = z[:, 0]
    y = y + z
    if y.sum() > -1e9:
        part.zero_()
    return y.relu() + z


def through_one_of_a_list(_, y):
    parts = [*y.relu().split(4, 1)]
    if y.sum() > -1e9:
        parts[0].zero_()
    return torch.cat(parts, 1) + y


@pytest.mark.parametrize("function", [through_a_view_of_a_result, through_one_of_a_list])
def test_code_behind_a_compiled_graph_may_write_to_views_of_its_results(function):
    model = randomise(Written(function)).float()
    same_as_source(compiled(model), model, X)


def test_code_behind_a_compiled_graph_may_write_to_views_of_its_inputs(lowered_graphs):
    model = randomise(WithSecond(through_a_view_of_an_input)).float()
    z = torch.randn(2, 8, 12, 12)
    twin = z.clone()
    with torch.no_grad():
        expected = model(X, twin)
        torch.testing.assert_close(compiled(model)(X, z), expected)
    assert torch.equal(z, twin) and not z[:, 0].any()
    assert lowered_graphs  # what comes behind is


def test_graphs_of_any_size_and_with_numbers_of_python_answer(lowered_graphs):
    class Scaled(Net):
        factor = 0.5

        def forward(self, x):
            return super().forward(x) * self.factor

    model = randomise(Scaled()).float()
    torch.compiler.reset()
    call = torch.compile(model, backend="fxfuse", options={"then": "lower"}, dynamic=True)
    for factor, x in ((0.5, X), (0.25, torch.randn(3, 3, 10, 14)), (0.125, X)):
        model.factor = factor
        same_as_source(call, model, x)
    call = compiled(randomise(Net()).float())
    for size in (8, 10, 12, 14):
        with torch.no_grad():
            torch.testing.assert_close(
                call(torch.ones(1, 3, size, size)), call._orig_mod(torch.ones(1, 3, size, size))
            )
    assert lowered_graphs


def test_folded_graphs_with_results_of_any_operator_are_lowered(lowered_graphs):
    class Halves(Net):
        def forward(self, x):
            y = super().forward(x)
            return torch.cumsum(y, 1) / 2

    model = randomise(Halves()).float()
    call = compiled(model)
    same_as_source(call, model, X)
    assert len(lowered_graphs) == 1 and len(fxfuse.report(call).folded) == 3


def test_a_compiled_graph_of_weights_alone():
    class Bias(nn.Module):
        """As in Swin v2."""

        def __init__(self):
            super().__init__()
            self.layer, self.table = nn.Linear(2, 3), nn.Parameter(torch.randn(4, 2))
            self.conv = nn.Conv2d(3, 3, 1)

        def forward(self, x):
            bias = self.layer(self.table).relu()
            torch._dynamo.graph_break()
            return self.conv(x) + bias.sum()

    model = Bias().eval()
    same_as_source(compiled(model), model, X)


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
    if faults["default"] < 1000:
        pytest.skip("the allocator keeps what is freed anyway")
    assert faults["keep"] < faults["default"] / 20, faults


GROWTH = """
import ctypes, gc, pathlib, resource, torch, fxfuse

def lowered():
    model = torch.nn.Sequential(torch.nn.Conv2d(512, 512, 3), torch.nn.ReLU()).eval()
    assert not fxfuse.lower(model, (x,)).lowering.reason

def held():
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    return int(pathlib.Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

x = torch.randn(2, 512, 8, 8)
lowered()
before = held()
for _ in range(8):
    lowered()
print(held() - before)
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it reads what Linux tells")
def test_programs_of_torch_that_are_dropped_give_their_memory_back():
    """Each has weights of 9 MiB as constants, and eight are dropped."""
    growth = int(subprocess.run([sys.executable, "-c", GROWTH], capture_output=True, check=True).stdout)
    assert growth < 9 * 2**20, growth


def test_freed_memory_is_kept_by_glibc_only(monkeypatch):
    monkeypatch.setattr(platform, "libc_ver", lambda: ("", ""))
    with pytest.raises(fxfuse.UsageError, match="glibc"):
        fxfuse.keep_freed_memory()
