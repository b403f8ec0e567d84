"""A program is compared before it answers, and its results are the caller's."""

from __future__ import annotations

import copy
from dataclasses import dataclass

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxfuse
from fxfuse.inputs import drawn_like
from fxfuse.lowering import engines, onednn
from fxfuse.lowering import slices as cutting
from fxfuse.lowering.halves import is_operator
from tests.lowering import ENGINES, Net, WithSecond, Written, X, folded, near
from tests.paths import paths
from tests.programs import programs as random_programs
from tests.strategies import noise

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines; their numbers are what is looked at


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
    assert len(lowered._outcomes) > 1


def test_an_empty_batch_is_left_to_the_folded_module():
    lowered = fxfuse.lower(folded(Net()), (X[:0],))
    assert "empty" in lowered.lowering.reason
    assert lowered(X[:0]).shape == (0, 5)


def test_sparse_inputs_are_left_to_the_folded_module():
    model = folded(WithSecond(lambda m, y, z: y + torch.mm(z, y[0, 0])[None, None]))
    z = torch.randn(12, 12).relu()
    for sparse in (z.to_sparse(), z.to_sparse_csr()):
        lowered = fxfuse.lower(model, (X, sparse))
        assert "sparse" in lowered.lowering.reason
        assert torch.equal(lowered(X, sparse), model(X, sparse))


def test_nested_inputs_and_those_of_transforms_are_left_to_the_folded_module():
    model = folded(nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 8)))
    x = torch.randn(4, 3, 8)
    nested = torch.nested.nested_tensor([torch.randn(3, 8), torch.randn(5, 8)])
    assert "nested" in fxfuse.lower(model, (nested,)).lowering.reason
    lowered = fxfuse.lower(model, (x,))
    with torch.no_grad():
        for one, other in zip(lowered(nested).unbind(), model(nested).unbind(), strict=True):
            assert torch.equal(one, other)
        assert torch.equal(torch.vmap(lowered)(x), torch.vmap(model)(x))
    near(lowered, x)


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


def test_numbers_are_drawn_for_each_input():
    one, other, number = drawn_like((X, [X.clone()], 3), seed=0)
    assert not torch.equal(one, other[0]) and one.shape == X.shape and number == 3
    assert not torch.equal(one, drawn_like((X,), seed=1)[0])
    ids = torch.arange(3)
    assert drawn_like((ids,), seed=0)[0] is ids


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


def test_random_graphs_give_what_they_gave():
    answers = []

    @settings(max_examples=100)
    @given(st.one_of(paths(), random_programs()), st.booleans(), st.sampled_from([None, 4, 2]))
    def check(case, in_slices, largest):
        model = case.model()
        if any(module.training for module in model.modules()):
            reject()
        model, x = model.float(), case.inputs()[0].float()
        with pytest.MonkeyPatch.context() as patch, torch.no_grad():
            patch.setattr(cutting, "medians", lambda *_, **__: {"small": 1.0, "large": 3.0})
            if largest:
                own = onednn._compile_whole

                def function(graph, inputs):
                    if torch._C._jit_llga_enabled() and sum(map(is_operator, graph.nodes())) > largest:
                        event("cut")
                        raise RuntimeError("it is too large")
                    return own(graph, inputs)

                patch.setattr(onednn, "_compile_whole", function)
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
            answers.append(not lowered.lowering.reason)
            for seed in (1, 2):  # the first call has compared itself
                y = noise(x.shape, seed).float()
                exact = copy.deepcopy(fused).double()(y.double())
                for one, other in zip(
                    *map(torch.utils._pytree.tree_leaves, (lowered(y.clone()), exact)), strict=True
                ):
                    if isinstance(one, Tensor) and one.is_floating_point() and one.numel():
                        assert one.shape == other.shape
                        assert float((one - other).abs().max()) <= 1e-3 * max(1.0, float(other.abs().max()))

    check()
    assert sum(answers) > len(answers) / 2  # with programs, not with the folded module


def test_an_input_that_is_no_plain_tensor_gets_the_folded_module():
    class Own(Tensor):
        pass

    lowered = fxfuse.lower(folded(Net()), (X,))
    own = lowered(X.as_subclass(Own))
    torch.testing.assert_close(own.as_subclass(Tensor), lowered(X), rtol=1e-4, atol=1e-4)
    (reason,) = [each.reason for each in lowered._outcomes.values() if not each.run]
    assert "Own" in reason


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


@pytest.mark.parametrize("good", [0, 1, 2])
def test_errors_of_programs_are_reasons_whenever_they_are_raised(good, monkeypatch):
    """A program runs twice where its memory is looked at, and then where it is compared."""
    calls = []

    def make(graph, *_):
        def run(tensors):
            calls.append(tensors)
            if len(calls) > good:
                raise MemoryError("none is left")  # which no forward is known to raise
            return graph.module(*tensors)

        return run

    model = folded(Net())
    monkeypatch.setitem(engines.ENGINES, "torch", engines.Engine(make))
    lowered = fxfuse.lower(model, (X,))
    assert lowered.lowering.reason == "MemoryError: none is left" and len(calls) == good + 1
    assert torch.equal(lowered(X), model(X))
