"""torch.compile(model, backend="fxfuse"): folded in Dynamo's graphs, and never stale."""

from __future__ import annotations

import copy
import gc
import logging
import shutil
import threading
import weakref

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo import register_backend
from torch.autograd import forward_ad

import fxfuse
from fxfuse import backend, following, zoo
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


def compiled(model, refold="changed", then="fxfuse_tests", **options):
    return torch.compile(model, backend="fxfuse", options={"then": then, "refold": refold}, **options)


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


# What happens to weights without autograd's knowledge: only folding on every call follows it.
UNSEEN = {
    "written to as data": lambda m: m.one.weight.data.mul_(2),
    "written to as a detached norm": lambda m: m.bn2.running_var.data.mul_(3),
    "written to by numpy": lambda m: m.bn3.weight.detach().numpy().__imul__(2),
}


@torch.no_grad()
@pytest.mark.parametrize("change", UNSEEN.values(), ids=UNSEEN.keys())
@pytest.mark.parametrize("then", ["eager", "aot_eager"])
def test_a_change_that_leaves_no_trace_is_followed_where_every_call_folds(then, change):
    model = randomise(Net())
    run = compiled(model, "always", then)
    before = run(X)
    change(model)
    assert_exact(model(X), run(X))
    assert not torch.allclose(before, run(X))


@torch.no_grad()
@pytest.mark.parametrize("refold", ["changed", "always"])
@pytest.mark.parametrize("change", CHANGES.values(), ids=CHANGES.keys())
def test_a_change_of_weights_is_followed(change, refold):
    model = randomise(Net())
    run = compiled(model, refold)
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


def test_gradients_of_parameters_leave_the_graph_as_it_is():
    model, other = randomise(Net()), randomise(Net())
    run = compiled(model)
    run(X).square().sum().backward()
    other(X).square().sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert_exact(two.grad, one.grad)
    assert norms(GRAPHS[-1]) == 3
    report = fxfuse.report(run)
    assert [refusal.code for refusal in report.refused] == ["FXF111"] * 3 and not report.folded
    assert [refusal.norm for refusal in report.refused] == ["bn1", "bn2", "bn3"]
    with torch.no_grad():
        run(X)
    assert len(fxfuse.report(run).folded) == 3  # the newest graph of this code


class Everything(nn.Module):
    """A norm behind each kind of operator, with parts of its channels, before one, and a layer scale."""

    def __init__(self):
        super().__init__()
        self.one, self.bn1 = nn.Conv2d(3, 4, 3, groups=1), nn.BatchNorm2d(4)
        self.a, self.b, self.bn2 = nn.Conv2d(4, 2, 1), nn.Conv2d(4, 2, 1, bias=False), nn.BatchNorm2d(4)
        self.up, self.bn3 = nn.ConvTranspose2d(4, 4, 2, groups=2), nn.BatchNorm2d(4, affine=False)
        self.scale = nn.Parameter(torch.ones(4, 1, 1))
        self.wide, self.bn4 = nn.utils.parametrizations.weight_norm(nn.Conv2d(4, 8, 1)), nn.BatchNorm2d(2)
        self.bn5, self.fc = nn.BatchNorm1d(2), nn.Linear(2, 2)

    def forward(self, x):
        y = torch.tanh(self.bn1(self.one(x)))
        y = torch.tanh(self.bn2(torch.cat([self.a(y), self.b(y)], 1)))
        y = torch.tanh(self.bn3(self.up(y)) * self.scale)
        y = torch.tanh(self.bn4(F.pixel_shuffle(self.wide(y), 2)))
        return self.fc(self.bn5(y.mean((2, 3))))


@pytest.mark.parametrize("then", ["fxfuse_tests", "aot_eager"])
def test_gradients_get_through_folds_on_every_call(then):
    """Frozen norms, trainable everything: weights, biases, γ, β and the input."""
    model, other = randomise(Everything()), randomise(Everything())
    run = compiled(model, "always", then)
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    run(x).square().sum().backward()
    other(y).square().sum().backward()
    assert_exact(y.grad, x.grad)
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert_exact(two.grad, one.grad)
    assert len(fxfuse.report(run).folded) == 5 and not fxfuse.report(run).refused
    assert all(norms(graph) == 0 for graph in GRAPHS)


def test_gradients_of_folds_on_every_call_are_the_derivatives():
    model = randomise(Everything())
    names = [name for name, _ in model.named_parameters()]
    tensors = [parameter.detach().clone().requires_grad_() for parameter in model.parameters()]
    run = compiled(model, "always", "eager")
    x = noise(1, 3, 4, 4)

    def function(*values):
        return torch.func.functional_call(
            run, {f"_orig_mod.{n}": v for n, v in zip(names, values, strict=True)}, (x,)
        )

    assert torch.autograd.gradcheck(function, tensors)


def test_frozen_norms_are_fine_tuned_as_in_eager():
    models = randomise(Net()), randomise(Net())
    run = compiled(models[0], "always", "aot_eager")
    losses = [[], []]
    for number, call in enumerate((run, models[1])):
        optimiser = torch.optim.SGD(models[number].parameters(), lr=1e-3, momentum=0.9)
        for step in range(5):
            loss = (call(noise(4, 3, 8, 8, seed=step)) - 1).square().mean()
            losses[number].append(loss.detach())
            loss.backward()
            optimiser.step()
            optimiser.zero_grad()
    assert_exact(losses[1], losses[0])
    assert_exact([*models[1].parameters()], [*models[0].parameters()])


@torch.no_grad()
def test_folds_that_depend_on_numbers_are_not_made_for_every_call():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2), nn.BatchNorm2d(4)))
    model[2].weight.abs_()
    changed, always = compiled(model), compiled(copy.deepcopy(model), "always")
    assert_exact(model(X), changed(X))
    assert_exact(model(X), always(X))
    assert len(fxfuse.report(changed).folded) == 1
    assert [refusal.code for refusal in fxfuse.report(always).refused] == ["FXF306"]
    model[2].weight.neg_()  # the fold that was made does not hold any more
    assert_exact(model(X), changed(X))
    model[2].weight.neg_()
    assert_exact(model(X), changed(X))


def test_a_graph_of_tensors_made_in_inference_mode_is_folded_on_every_call():
    with torch.inference_mode():
        model = randomise(Net())
        run = compiled(model)
        assert_exact(model(X), run(X))
        model.one.weight.mul_(2)  # which counts up no version
        assert_exact(model(X), run(X))
    assert len(fxfuse.report(run).folded) == 3


def _installed(model):
    for tensor in (*model.parameters(), *model.buffers()):
        torch._dynamo.mark_static_address(tensor, guard=True)


@torch.no_grad()
@pytest.mark.parametrize("refold", ["changed", "always"])
@pytest.mark.parametrize(
    ("way", "change"),
    [
        *(("freezing", change) for change in ("in place", "the norm's weight", "running statistics")),
        *(("marked", change) for change in ("in place", "another parameter", "load_state_dict, assigned")),
    ],
)
def test_parameters_that_dynamo_makes_attributes_are_followed(way, change, refold):
    """Asked to prepare for freezing, Dynamo guards no attributes, and would not see other objects itself."""
    model = randomise(Net())
    with torch._dynamo.config.patch(prepare_freezing=way == "freezing"):
        if way == "marked":
            _installed(model)
        run = compiled(model, refold)
        assert_exact(model(X), run(X))
        assert len(fxfuse.report(run).folded) == 3 and norms(GRAPHS[-1]) == 0
        CHANGES[change](model)
        assert_exact(model(X), run(X))


def test_steps_of_fused_optimisers_and_new_statistics_are_followed():
    """Their kernels count up no version."""
    model = randomise(Net()).float()
    run, x = compiled(model), X.float()
    optimisers = [
        torch.optim.Adam(model.parameters(), lr=0.1, fused=True),
        torch.optim.SGD(model.parameters(), lr=0.1, fused=True),
    ]
    for change in ("statistics", *optimisers):
        with torch.no_grad():
            before = run(x)
        if change == "statistics":
            with torch.no_grad():
                model.train()(3 * x + 5)
            model.eval()
        else:  # with the norms in eval mode, which leaves the statistics alone
            model(3 * x + 5).square().mean().backward()
            change.step()
        with torch.no_grad():
            torch.testing.assert_close(run(x), model(x))
            assert not torch.allclose(before, run(x))


@torch.no_grad()
def test_statistics_alone_that_a_norm_writes_are_followed():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, affine=False)))
    run = compiled(model)
    for factor in (1, 2, 3):
        assert_exact(model(X), run(X))
        model[1].train()
        model(factor * X + 1)
        model[1].eval()


@torch.no_grad()
def test_statistics_in_a_computed_weight_or_written_out_are_followed():
    class Calibrated(Net):
        def forward(self, x):
            y = F.conv2d(x, self.one.weight / self.bn1.running_var.sqrt().view(-1, 1, 1, 1))
            z = self.bn2(self.two(torch.relu(self.bn1(y))))
            scale = torch.rsqrt(self.bn3.running_var + 1e-5)[:, None, None]
            return F.conv2d(z, self.two.weight.transpose(0, 1)[:, :, :1, :1]) + scale.sum() * 0, z * scale

    model = randomise(Calibrated())
    run = compiled(model)
    for norm, size in ((model.bn1, 4), (model.bn2, 5), (model.bn3, 5)):
        assert_exact(model(X), run(X))
        F.batch_norm(noise(9, size) + 2, norm.running_mean, norm.running_var, training=True)
    assert_exact(model(X), run(X))


@torch.no_grad()
def test_memory_that_is_watched_is_given_to_nobody_else():
    model = randomise(nn.Sequential(nn.Conv2d(64, 64, 3), nn.BatchNorm2d(64))).float()
    run, x = compiled(model), torch.randn(1, 64, 5, 5)
    for _ in range(3):
        torch.testing.assert_close(run(x), model(x), rtol=1e-4, atol=1e-2)
        model[0].weight.data = torch.empty(0)
        model[0].weight.data = torch.randn(64, 64, 3, 3)


@torch.no_grad()
def test_weights_that_are_shared_with_processes_are_folded_on_every_call():
    model = randomise(Net()).share_memory()
    run = compiled(model)
    assert_exact(model(X), run(X))
    model.one.weight.data.mul_(2)  # as another process does
    assert_exact(model(X), run(X))
    assert len(fxfuse.report(run).folded) == 3


@torch.no_grad()
@pytest.mark.filterwarnings("ignore:Dynamo does not know how to trace:UserWarning")
def test_a_graph_without_numbers_runs_unfolded(tmp_path, caplog, monkeypatch):
    """DistributedDataParallel divides a graph into buckets, and hands each of them over without numbers."""
    caplog.set_level(logging.INFO, "fxfuse")
    monkeypatch.setattr(torch.distributed, "_DEFAULT_FIRST_BUCKET_BYTES", 1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        model = randomise(Net())
        parallel = nn.parallel.DistributedDataParallel(model, bucket_cap_mb=1e-6)
        run = compiled(parallel)
        assert_exact(model(X), run(X))
        assert "FXF205" in caplog.text
    finally:
        torch.distributed.destroy_process_group()


@torch.no_grad()
def test_threads_do_not_mix_their_weights():
    models = [randomise(nn.Sequential(Net().one, Net().bn1), seed) for seed in range(2)]
    runs = [compiled(model) for model in models]
    expected = [model(X) for model in models]
    wrong = []

    def work(number):
        with torch.no_grad():
            for _ in range(30):
                models[number][0].weight.mul_(1)  # a new version, the same numbers
                if not torch.allclose(runs[number](X), expected[number]):
                    wrong.append(number)

    threads = [threading.Thread(target=work, args=(number % 2,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


@torch.no_grad()
def test_who_writes_while_weights_are_folded_is_noticed(monkeypatch):
    model = randomise(Net())
    run = compiled(model)
    model.one.weight.mul_(2)
    solve = following.solve

    def interfered(*arguments):
        solution = solve(*arguments)
        model.two.weight.mul_(3)
        model.bn1.running_mean.data.add_(1)
        monkeypatch.undo()
        return solution

    run(X)
    monkeypatch.setattr(following, "solve", interfered)
    model.one.weight.mul_(2)
    run(X)
    assert_exact(model(X), run(X))


@torch.no_grad()
def test_a_fold_that_is_interrupted_is_made_at_the_next_call(monkeypatch):
    model = randomise(Net())
    run = compiled(model)
    run(X)
    model.one.weight.mul_(2)
    with monkeypatch.context() as patched:
        patched.setattr(following, "solve", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            run(X)
    assert_exact(model(X), run(X))


def test_gradients_that_forward_itself_enables_get_through():
    class Enabled(Net):
        def forward(self, x):
            with torch.enable_grad():
                return super().forward(x)

    model, other = randomise(Enabled()), randomise(Enabled())
    run = compiled(model)
    with torch.no_grad():
        y, z = run(X), other(X)
    y.sum().backward()
    z.sum().backward()
    for one, two in zip(model.parameters(), other.parameters(), strict=True):
        assert_exact(two.grad, one.grad)


def test_a_part_that_gives_no_gradients_is_folded_where_gradients_are_enabled():
    class Frozen(Net):
        def forward(self, x):
            with torch.no_grad():
                return torch.relu(self.bn1(self.one(x)))

    model = randomise(Frozen())
    run = compiled(model)
    assert_exact(model(X), run(X))
    assert len(fxfuse.report(run).folded) == 1


@torch.no_grad()
@pytest.mark.parametrize("refold", ["changed", "always"])
def test_statistics_that_a_checkpointed_region_writes_are_not_folded(refold):
    class Checkpointed(Net):
        def written(self, y):
            self.bn1.running_mean.add_(1.0)
            return y * 2

        def forward(self, x):
            y = self.one(x)
            z = torch.utils.checkpoint.checkpoint(self.written, y, use_reentrant=False)
            return self.bn1(self.one(x)) + z

    model, other = randomise(Checkpointed()), randomise(Checkpointed())
    run = compiled(model, refold)
    for _ in range(3):
        assert_exact(other(X), run(X))


@torch.no_grad()
@pytest.mark.parametrize("refold", ["changed", "always"])
def test_autocast_changes_neither_dtypes_nor_what_is_followed(refold):
    class Scaled(Net):
        def __init__(self):
            super().__init__()
            self.scale = nn.Parameter(torch.randn(4, 1, 1))

        def forward(self, x):
            return self.one(x) * self.scale, self.bn1(self.one(x))

    model = randomise(Scaled()).float()
    run, x = compiled(model, refold, "eager"), X.float()
    with torch.autocast("cpu", torch.bfloat16):
        for _ in range(2):
            for one, two in zip(model(x), run(x), strict=True):
                torch.testing.assert_close(one, two, rtol=0.05, atol=0.05)  # bfloat16 has 8 bits
            model.bn1.running_mean.add_(50)  # autocast caches weights that need gradients
    assert not fxfuse.report(run).constants and len(fxfuse.report(run).folded) == 1


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")  # torch's own
def test_tangents_of_parameters_get_through():
    model = randomise(Net()).requires_grad_(False)
    run = compiled(model)
    values = {name: parameter.detach() for name, parameter in model.named_parameters()}
    tangents = {name: torch.randn_like(value) for name, value in values.items()}
    with forward_ad.dual_level():
        duals = {name: forward_ad.make_dual(values[name], tangents[name]) for name in values}
        expected = torch.func.functional_call(model, duals, (X,))
        inside = {f"_orig_mod.{name}": dual for name, dual in duals.items()}
        found = torch.func.functional_call(run, inside, (X,))
        assert_exact(forward_ad.unpack_dual(expected).tangent, forward_ad.unpack_dual(found).tangent)


@torch.no_grad()
def test_an_input_that_is_a_weight_and_is_written_to():
    def function(model, statistics, x):
        statistics.add_(3.0)
        return model(x)

    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)))
    other = copy.deepcopy(model)
    run = compiled(function)
    for _ in range(2):
        expected = function(other, other[1].running_mean[:], X)
        assert_exact(expected, run(model, model[1].running_mean[:], X))


@torch.no_grad()
@pytest.mark.parametrize("dynamic", [None, True])
@pytest.mark.parametrize("refold", ["changed", "always"])
def test_sizes_of_weights_are_no_symbols(refold, dynamic):
    """AOTAutograd would take the same symbol for a size of a weight and one of the input that equals it."""
    model = randomise(nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5), nn.Linear(5, 4)))
    run = compiled(model, refold, "aot_eager", dynamic=dynamic)
    for batch in (5, 7, 4, 3):
        assert_exact(model(noise(batch, 3)), run(noise(batch, 3)))
    network = randomise(zoo.torchvision().models.resnet18())
    run = compiled(network, refold, "aot_eager", dynamic=dynamic)
    assert_exact(network(noise(2, 3, 64, 64)), run(noise(2, 3, 64, 64)))


@torch.no_grad()
def test_arithmetic_with_sizes_is_no_affine_map():
    class Reshaped(Net):
        def forward(self, x):
            return self.bn1(self.one(x)).reshape(x.shape[0] * 2, -1) + x.shape[0]

    model = randomise(Reshaped())
    run = compiled(model)
    for batch in (2, 3, 4):
        assert_exact(model(noise(batch, 3, 8, 8)), run(noise(batch, 3, 8, 8)))
    assert len(fxfuse.report(run).folded) == 1


def test_evaluation_in_inference_mode_between_changes():
    model = randomise(Net())
    run = compiled(model)
    for _ in range(3):
        with torch.inference_mode():
            assert_exact(model(X), run(X))
        with torch.no_grad():
            model.one.weight.mul_(2)
            assert_exact(model(X), run(X))


def test_backward_passes_that_are_pending_keep_their_weights():
    models = [randomise(Net(), seed).requires_grad_(False) for seed in range(2)]
    runs = [compiled(model) for model in models]
    x, y = X.clone().requires_grad_(), X.clone().requires_grad_()
    ours, theirs = [run(x) for run in runs], [model(y) for model in models]
    for model in models:
        model.bn3.bias.add_(1)
    ours += [run(x) for run in runs]
    theirs += [model(y) for model in models]
    sum(each.square().sum() for each in ours).backward()
    sum(each.square().sum() for each in theirs).backward()
    assert_exact(y.grad, x.grad)


@torch.no_grad()
def test_random_numbers_and_names_that_are_part_of_others():
    class One(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Parameter(torch.ones(5, 3, 3, 3))

        def forward(self, x):
            return F.conv2d(x, self.a) * torch.empty(5, 1, 1, dtype=torch.float64).uniform_(1, 1)

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.a = nn.Sequential(nn.Conv2d(3, 5, 3), nn.BatchNorm2d(5))

        def forward(self, x):
            return self.a(x)

    one, two = randomise(One()), randomise(Two())
    run = compiled(lambda one, two, x: one(x) + two(x))
    assert_exact(one(X) + two(X), run(one, two, X))
    assert [norms(graph) for graph in GRAPHS] == [0]


@torch.no_grad()
def test_a_size_that_is_marked_dynamic_stays_so():
    model = randomise(Net())
    run = compiled(model, fullgraph=True)
    x = noise(4, 3, 8, 8)
    torch._dynamo.mark_dynamic(x, 0)
    assert_exact(model(x), run(x))
    for batch in (2, 3, 9):
        assert_exact(model(noise(batch, 3, 8, 8)), run(noise(batch, 3, 8, 8)))
    assert [norms(graph) for graph in GRAPHS] == [0]


@torch.no_grad()
def test_regions_that_are_compiled_by_themselves_are_folded_and_followed(monkeypatch):
    class Head(nn.Sequential):
        def forward(self, x):  # Dynamo compiles no forward of torch's own
            return super().forward(x)

    heads = [Head(nn.Linear(2, 2), nn.BatchNorm1d(2)) for _ in range(2)]
    model = randomise(nn.Sequential(Net(), *heads))
    twin = copy.deepcopy(model)
    for region in model:
        region.compile(backend="fxfuse", options={"then": "fxfuse_tests"})
    assert_exact(twin(X), model(X))
    assert {norms(graph) for graph in GRAPHS} == {0}
    assert len(fxfuse.report(model).folded) == 5
    monkeypatch.setattr(following, "solve", None)  # each head has weights of its own: nothing is folded again
    assert_exact(twin(X), model(X))
    monkeypatch.undo()
    model[2][0].weight.mul_(2)
    twin[2][0].weight.mul_(2)
    assert_exact(twin(X), model(X))


@torch.no_grad()
@pytest.mark.parametrize("refold", ["changed", "always"])
def test_constants_that_forward_makes_are_constants(refold):
    class Scaled(Net):
        def forward(self, x):
            y = self.one(x) * torch.tensor([1.0, -2.0, 3.0, 0.5], dtype=torch.float64)[:, None, None]
            return self.bn1(y + torch.full((4, 1, 1), 0.3, dtype=torch.float64))

    model = randomise(Scaled())
    run = compiled(model, refold)
    for _ in range(2):
        assert_exact(model(X), run(X))
        model.one.weight.mul_(2)
    assert len(fxfuse.report(run).folded) == 1 and len(fxfuse.report(run).constants) == 2


@torch.no_grad()
def test_instances_that_share_an_operator_have_folds_and_reports_of_their_own(monkeypatch):
    class Block(nn.Module):
        def __init__(self, conv):
            super().__init__()
            self.conv, self.bn1, self.bn2 = conv, nn.BatchNorm2d(4), nn.BatchNorm2d(4)

        def forward(self, x):
            return self.bn2(torch.sin(self.bn1(self.conv(x))))

    conv = nn.Conv2d(3, 4, 3)
    blocks = nn.ModuleList([randomise(Block(conv), seed) for seed in range(2)])
    expected = [block(X) for block in blocks]
    for block in blocks:
        block.compile(backend="fxfuse", options={"then": "fxfuse_tests"})
    for _ in range(2):
        assert_exact(expected, [block(X) for block in blocks])
        monkeypatch.setattr(following, "solve", None)  # nothing is folded again
    report = fxfuse.report(blocks)
    assert len(report.folded) == 2 and [each.code for each in report.refused] == ["FXF102"] * 2


@torch.no_grad()
def test_a_model_that_is_compiled_twice_is_followed_by_both():
    model = randomise(Net())
    one, two = compiled(model), compiled(model, "always")
    for _ in range(2):
        assert_exact(model(X), one(X))
        assert_exact(model(X), two(X))
        model.one.weight.mul_(1.5)


@torch.no_grad()
def test_modules_called_twice_and_norms_that_share_an_operator():
    class Shared(Net):
        def forward(self, x):
            y = self.bn1(self.one(x)) + self.bn1(self.one(x + 1)) + self.one(x)
            return self.fc(self.bn3(self.bn2(self.two(torch.relu(y))).mean((2, 3))))

    model = randomise(Shared())
    run = compiled(model)
    for _ in range(2):
        assert_exact(model(X), run(X))
        model.one.weight.mul_(1.5)
    assert len(fxfuse.report(run).folded) == 4


@torch.no_grad()
@pytest.mark.parametrize("refold", ["changed", "always"])
def test_functions_that_share_weights_and_several_norms_on_one_operator_compiled_repeatedly(refold):
    class Shared(Net):
        def forward(self, x):
            first = F.conv2d(x, self.one.weight, self.one.bias)
            second = F.conv2d(x.flip(3), self.one.weight, self.one.bias)
            y = torch.relu(self.bn1(first)) + torch.relu(self.other(second)) + self.one(x)
            return self.bn2(self.two(y)), self.bn3(self.two(y).mean((2, 3)))

        def __init__(self):
            super().__init__()
            self.other = nn.BatchNorm2d(4)

    model = randomise(Shared())
    for _ in range(3):
        torch.compiler.reset()
        run = compiled(model, refold)
        assert_exact(model(X), run(X))
        model.one.weight.mul_(1.5)
        assert_exact(model(X), run(X))
        assert [norms(graph) for graph in GRAPHS[-1:]] == [0]
        assert len(fxfuse.report(run).folded) == 4


@torch.no_grad()
def test_a_mode_reaches_inductor(monkeypatch):
    given = {}

    def inductor(graph, _inputs, **options):
        given.update(options)
        return graph.forward

    monkeypatch.setattr(backend, "lookup_backend", lambda name: {"inductor": inductor}[name])
    model = randomise(Net())
    assert_exact(model(X), torch.compile(model, backend="fxfuse", mode="max-autotune-no-cudagraphs")(X))
    assert given["config_patches"]["max_autotune"] is True


def test_report_of_what_was_not_compiled_is_an_error():
    model = randomise(Net())
    run = compiled(model)
    with pytest.raises(fxfuse.UsageError, match="was not called yet"):
        fxfuse.report(run)


@torch.no_grad()
def test_reports_of_a_broken_graph_are_one():
    class Broken(Net):
        def forward(self, x):
            y = torch.relu(self.bn1(self.one(x)))
            torch._dynamo.graph_break()
            return self.bn2(torch.relu(self.two(y)))

    run = compiled(randomise(Broken()))
    for batch in (2, 3, 4):  # compiled anew for other batches
        run(noise(batch, 3, 8, 8))
    report = fxfuse.report(run)
    assert [fold.norm for fold in report.folded] == ["bn1"]
    assert [(left.norm, left.code) for left in report.refused] == [("bn2", "FXF102")]
    assert report.model == "Broken"


@torch.no_grad()
def test_compiled_code_and_reports_let_go_of_the_model():
    model = randomise(Net())
    run = compiled(model)
    for _ in range(2):
        run(X)
        model.one.weight.mul_(2)
    references = [weakref.ref(tensor) for tensor in (*model.parameters(), *model.buffers())]
    GRAPHS.clear()
    del model, run
    gc.collect()
    assert not any(reference() is not None for reference in references)


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
    [
        ({"than": "eager"}, "no options than"),
        ({"then": "nobody"}, "'nobody' is neither 'lower' nor"),
        ({"then": None}, "None is neither 'lower' nor"),
        ({"then": "fxfuse"}, "would be this backend again"),
        ({"refold": "never"}, "refold='never' is neither of 'changed', 'always'"),
        ({"mode": "max-autotune"}, "no options mode"),
    ],
)
def test_wrong_options_are_told(options, text):
    run = torch.compile(randomise(Net()), backend="fxfuse", options=options)
    with pytest.raises(Exception, match=text):
        run(X)
