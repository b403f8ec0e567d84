"""torch.compile(model, backend="fxfuse"): folded in Dynamo's graphs, and never stale."""

from __future__ import annotations

import logging
import shutil

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import register_backend

import fxfuse
from fxfuse import zoo
from tests.forms import noise
from tests.support import assert_exact, randomise

X = noise(2, 3, 8, 8)
GRAPHS: list[torch.fx.GraphModule] = []


@register_backend(name="fxfuse_tests")
def keep_graph(graph, _inputs, **_):
    GRAPHS.append(graph)
    return graph.forward


def norms(graph):
    return sum(node.target in (F.batch_norm, torch.batch_norm) for node in graph.graph.nodes)


@pytest.fixture(autouse=True)
def fresh():
    torch.compiler.reset()
    GRAPHS.clear()


def compiled(model, **options):
    return torch.compile(model, backend="fxfuse", options={"then": "fxfuse_tests"}, **options)


class Net(nn.Module):
    """Norms behind, in front of and between operators."""

    def __init__(self):
        super().__init__()
        self.one, self.bn1 = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.two, self.bn2 = nn.Conv2d(4, 5, 1, bias=False), nn.BatchNorm2d(5)
        self.bn3, self.fc = nn.BatchNorm1d(5), nn.Linear(5, 2)

    def forward(self, x):
        y = torch.relu(self.bn1(self.one(x)))
        y = torch.relu(self.bn2(self.two(y)))
        return self.fc(self.bn3(y.mean((2, 3))))


@torch.no_grad()
def test_norms_are_folded_and_the_result_is_exact_for_every_size():
    model = randomise(Net())
    run = compiled(model)
    for size in ((2, 8), (3, 8), (5, 11), (1, 9)):
        x = noise(size[0], 3, size[1], size[1])
        assert_exact(model(x), run(x))
    assert all(norms(graph) == 0 for graph in GRAPHS) and GRAPHS


@torch.no_grad()
def test_a_real_network_is_folded_whole():
    model = randomise(zoo.torchvision().models.resnet18())
    run = compiled(model)
    x = noise(2, 3, 64, 64)
    assert_exact(model(x), run(x))
    assert [norms(graph) for graph in GRAPHS] == [0]


@torch.no_grad()
@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="Inductor needs a C++ compiler")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own
def test_inductor_compiles_what_is_left():
    model = randomise(Net())
    run = torch.compile(model, backend="fxfuse")
    for batch in (2, 3, 4):
        x = noise(batch, 3, 8, 8)
        assert_exact(model(x), run(x))
    model.one.weight.mul_(2)
    assert_exact(model(x), run(x))


CHANGES = {
    "in place": lambda m: m.one.weight.mul_(2),
    "a bias in place": lambda m: m.one.bias.add_(1),
    "the norm's weight": lambda m: m.bn1.weight.mul_(-1),
    "running statistics": lambda m: (m.bn2.running_mean.add_(1), m.bn2.running_var.mul_(3)),
    "load_state_dict": lambda m: m.load_state_dict({k: v * 2 for k, v in m.state_dict().items()}),
    "load_state_dict, assigned": lambda m: m.load_state_dict(
        {k: v * 2 for k, v in m.state_dict().items()}, assign=True
    ),
    "another parameter": lambda m: setattr(m.two, "weight", nn.Parameter(m.two.weight * 2)),
    "other data": lambda m: setattr(m.two.weight, "data", m.two.weight.data * 2),
    "a forward norm": lambda m: m.bn3.bias.add_(2),
}


@torch.no_grad()
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_weights_is_followed(change):
    model = randomise(Net())
    run = compiled(model)
    before = run(X)
    change(model)
    assert_exact(model(X), run(X))
    assert not torch.allclose(before, run(X))
    assert_exact(model(X), run(X))
    assert norms(GRAPHS[-1]) == 0


def test_an_optimiser_and_a_training_epoch_between_evaluations_are_followed():
    model = randomise(Net())
    run = compiled(model)
    optimiser = torch.optim.SGD(model.parameters(), lr=0.1)
    for _ in range(3):
        with torch.no_grad():
            assert_exact(model(X), run(X))
        model.train()
        model(X).square().sum().backward()
        optimiser.step()
        optimiser.zero_grad()
        model.eval()
    with torch.no_grad():
        assert_exact(model(X), run(X))


@torch.no_grad()
def test_another_dtype_is_followed():
    model = randomise(Net())
    run = compiled(model)
    run(X)
    model.float()
    torch.testing.assert_close(model(X.float()), run(X.float()))
    assert norms(GRAPHS[-1]) == 0


def test_gradients_of_parameters_leave_the_graph_as_it_is(caplog):
    caplog.set_level(logging.INFO, "fxfuse")
    model, other = randomise(Net()), randomise(Net())
    compiled(model)(X).square().sum().backward()
    other(X).square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert_exact(two.grad, one.grad)
    assert norms(GRAPHS[-1]) == 3 and "gradients" in caplog.text


@pytest.mark.parametrize("then", ["fxfuse_tests", "aot_eager"])
def test_gradients_of_the_input_go_through_a_folded_graph(then, caplog):
    caplog.set_level(logging.INFO, "fxfuse")
    model = randomise(Net()).requires_grad_(False)
    run = torch.compile(model, backend="fxfuse", options={"then": then})
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    run(x).square().sum().backward()
    model(y).square().sum().backward()
    assert_exact(y.grad, x.grad)
    assert "3 of 3 norms folded" in caplog.text


@torch.no_grad()
def test_a_norm_in_training_mode_stays():
    model = randomise(Net())
    model.bn1.train()
    run = compiled(model)
    twin = randomise(Net())
    twin.bn1.train()
    assert_exact(twin(X), run(X))
    assert_exact(twin(X), run(X))
    assert [norms(graph) for graph in GRAPHS] == [1]
    assert_exact(twin.bn1.running_mean, model.bn1.running_mean)


@torch.no_grad()
def test_graphs_on_both_sides_of_a_break_are_folded():
    class Broken(Net):
        def forward(self, x):
            y = torch.relu(self.bn1(self.one(x)))
            torch._dynamo.graph_break()
            return torch.relu(self.bn2(self.two(y)))

    model = randomise(Broken())
    run = compiled(model)
    assert_exact(model(X), run(X))
    assert [norms(graph) for graph in GRAPHS] == [0, 0]
    model.one.weight.mul_(3)
    assert_exact(model(X), run(X))


@torch.no_grad()
def test_weights_that_overflow_later_run_unfolded(caplog):
    model = randomise(Net())
    run = compiled(model)
    run(X)
    model.bn1.running_mean.fill_(torch.inf)
    torch.testing.assert_close(model(X), run(X), equal_nan=True)
    assert "cannot be folded" in caplog.text
    model.bn1.running_mean.fill_(0.5)
    assert_exact(model(X), run(X))


def test_the_report_of_a_graph_is_logged(caplog):
    caplog.set_level(logging.INFO, "fxfuse")
    with torch.no_grad():
        compiled(randomise(Net()))(X)
    assert "3 of 3 norms folded" in caplog.text and "bn1 -> one" in caplog.text


@pytest.mark.parametrize(
    ("options", "text"),
    [({"than": "eager"}, "no options than"), ({"then": "nobody"}, "'nobody' is no backend")],
)
def test_wrong_options_are_told(options, text):
    run = torch.compile(randomise(Net()), backend="fxfuse", options=options)
    with pytest.raises(Exception, match=text):
        run(X)


def test_a_mode_is_one_of_inductor():
    with pytest.raises(fxfuse.UsageError, match="one of Inductor"):
        from fxfuse.backend import backend

        backend(torch.fx.symbolic_trace(nn.ReLU()), [X], mode="reduce-overhead", options={"then": "eager"})
