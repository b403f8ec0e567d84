"""The engine "torch" on CPUs: what is one kernel, what is mended, which memory format."""

from __future__ import annotations

import copy
from collections import Counter
from itertools import product

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxfuse
from fxfuse.lowering import legal, onednn
from fxfuse.lowering.channels_last import put_channels_last
from fxfuse.lowering.specialise import specialise
from tests.lowering import DTYPES, HAS_AVX512, Net, WithSecond, Written, X, folded, near
from tests.support import randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines; their numbers are what is looked at


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
def test_operators_and_what_is_done_to_their_results_are_one_kernel(operator_, post, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX512")
    make, x = OPERATORS[operator_]
    lowered = fxfuse.lower(folded(nn.Sequential(make(), copy.deepcopy(POST_OPS[post]))), (x,))
    assert not lowered.lowering.reason
    inside, left = kernels()
    assert len(inside) == 1 and len(inside[0]) >= 2 and not left - Counter({"aten::contiguous": 2})
    near(lowered, x)


BEHIND_PRODUCTS = {
    "linear": lambda m, y: m.post(m.rows(tokens(y))),
    "linear and sum": lambda m, y: m.post(m.rows(tokens(y)) + m.rows(tokens(y.square()))),
    "matrix product": lambda m, y: m.post(y @ y.transpose(2, 3)),
}
BEHIND_OTHERS = {
    "convolution": lambda m, y: m.post(m.other(y)),
    "a sum that is kept apart": lambda m, y: m.post(m.rows(tokens(y)) + m.rows(tokens(y)).mean(1, True)),
}


def joined_to(way, post):
    """What the activation of this name is one kernel with; SiLU is a sigmoid and a product there."""
    layers = {"post": POST_OPS[post], "rows": nn.Linear(8, 6), "other": nn.Conv2d(8, 4, 1)}
    lowered = fxfuse.lower(folded(randomise(Written(way, **copy.deepcopy(layers)))), (X,))
    assert not lowered.lowering.reason
    near(lowered, X)
    name = "sigmoid" if post == "silu" else post
    others = [{*inside} - {name, "mul"} for inside in kernels()[0] if name in inside]
    return set().union(*others)


@pytest.mark.parametrize("way", BEHIND_PRODUCTS)
@pytest.mark.parametrize("post", ["gelu", "silu", "tanh", "relu", "sigmoid"])
def test_with_avx2_what_needs_registers_is_apart_from_products(way, post, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "AVX2")
    is_apart = post in {"gelu", "silu", "tanh"}
    assert is_apart != bool(joined_to(BEHIND_PRODUCTS[way], post) & {"linear", "matmul"})


@pytest.mark.parametrize(
    ("processor", "way"),
    [*product(["AVX512"], [*BEHIND_PRODUCTS, *BEHIND_OTHERS]), *product(["AVX2"], BEHIND_OTHERS)],
)
@pytest.mark.parametrize("post", ["gelu", "tanh"])
def test_all_else_is_one_kernel_with_what_is_before_it(processor, way, post, monkeypatch):
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: processor)
    assert joined_to((BEHIND_PRODUCTS | BEHIND_OTHERS)[way], post)


@pytest.mark.parametrize("post", ["gelu by tanh", "hardsigmoid"])
def test_what_onednn_does_not_know_is_written_in_what_it_knows(post):
    layer = nn.GELU(approximate="tanh") if post == "gelu by tanh" else nn.Hardsigmoid()
    lowered = fxfuse.lower(folded(nn.Sequential(nn.Conv2d(3, 8, 3), layer)), (X,))
    assert not lowered.lowering.reason
    near(lowered, X)


def test_wrong_kernels_are_found_and_not_used(monkeypatch):
    """Without the mend oneDNN Graph computes the exact gelu in the place of the approximation."""
    monkeypatch.setattr(legal, "_LEGAL", {})
    model = folded(nn.Sequential(nn.Conv2d(3, 8, 3), nn.GELU(approximate="tanh")))
    lowered = fxfuse.lower(model, (X,))
    assert "other numbers" in lowered.lowering.reason
    assert torch.equal(lowered(X), model(X))


# Arguments that oneDNN Graph takes no notice of.
UNNOTICED = {
    "decimals": lambda m, y: torch.round(m.other(y), decimals=1) + y,
    "decimals in front of the point": lambda m, y: torch.round(40 * m.other(y), decimals=-1) + y,
    "scales": lambda m, y: torch.ops.aten.elu(m.other(y), 1.7, 1.05, 0.4) + y,
    "rounding of a quotient": lambda m, y: torch.div(m.other(y), y.abs() + 0.1, rounding_mode="floor") + y,
}


@pytest.mark.parametrize("way", UNNOTICED)
@pytest.mark.parametrize("example", [X, torch.zeros_like(X)])
def test_arguments_that_onednn_graph_takes_no_notice_of(way, example):
    lowered = fxfuse.lower(folded(Written(UNNOTICED[way], other=nn.Conv2d(8, 8, 1))), (example,))
    assert not lowered.lowering.reason
    with torch.no_grad():
        is_close = (lowered(X) - lowered.folded(X)).abs() < 1e-4
    assert is_close.double().mean() > 0.999  # where rounding turns what is rounded, they differ


@pytest.mark.parametrize("groups", [1, 2, 8])
@pytest.mark.parametrize("is_exported", [False, True])
def test_group_norms_of_images_far_from_zero_keep_their_digits(groups, is_exported):
    model = randomise(nn.Sequential(nn.GroupNorm(groups, 8), nn.Conv2d(8, 8, 1))).float()
    x = torch.randn(2, 8, 16, 16)
    given = torch.export.export(model, (x,)).module() if is_exported else model
    lowered = fxfuse.lower(given, (x,))
    far = 1000 + 0.1 * torch.randn_like(x)
    exact = copy.deepcopy(model).double()(far.double())
    assert not lowered.lowering.reason
    assert float((lowered(far) - exact).abs().max()) < 1e-3 * float(exact.abs().max())


@pytest.mark.parametrize(
    "log", [torch.log, lambda y: torch.log(input=y), lambda y: y.log_(), torch.ops.aten.log]
)
def test_logarithms_of_numbers_around_one_keep_their_digits(log):
    model = Written(lambda m, y: log(m.other(y).clamp(min=1e-30)), other=nn.Conv2d(8, 8, 1, bias=False))
    model.conv, model.other.weight.data = nn.Identity(), torch.eye(8).view(8, 8, 1, 1)
    model = fxfuse.fuse(model.eval())
    lowered = fxfuse.lower(model, (torch.randn(2, 8, 12, 12),))
    assert not lowered.lowering.reason
    x = 1 + torch.linspace(-1e-5, 1e-5, 2304).view(2, 8, 12, 12)
    torch.testing.assert_close(lowered(x), x.double().log().float(), rtol=1e-5, atol=1e-9)


def test_zeros_as_an_example_hide_no_mistake(monkeypatch):
    monkeypatch.setattr(legal, "_LEGAL", {})
    model = folded(Written(UNNOTICED["decimals"], other=nn.Conv2d(8, 8, 1)))
    with torch.no_grad():
        model.conv.bias.zero_(), model.other.bias.fill_(2.0)
    assert "other numbers" in fxfuse.lower(model, (torch.zeros_like(X),)).lowering.reason


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
    "heads of as many tokens as samples": lambda m, y: (
        (z := y.mean(3).reshape(2, 2, 4, 12).cumsum(3))[..., :6].transpose(1, 2)
        @ z[..., 6:].permute(0, 2, 3, 1)
    ),
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


def in_a_loop(y, times: int):
    for _ in range(times):
        y = (y.cumsum(1) + y) + y[:1, :1, :1].cumsum(3)
    return y


@fx.wrap
def scripted(y):
    return torch.jit.script(in_a_loop)(y, 2)


def test_functions_of_torchscript_are_left_alone():
    """No edit would keep apart what they hold."""
    lowered = fxfuse.lower(folded(Written(lambda m, y: scripted(y))), (X,))
    assert "calls a function of TorchScript" in lowered.lowering.reason
    near(lowered, X)


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
    if way == "sum with a pooling" and not HAS_AVX512:
        pytest.skip("the rest: only oneDNN's kernels for AVX-512 have the mistake")
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


@fx.wrap
def rows(x):
    """A view, by code that is not torch's."""
    return x.reshape(2, -1)


@fx.wrap
def other(x, y):
    y.clamp_(-3, 3)
    return x


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


def assert_same_for_large_numbers(model, atol):
    """It is lowered for an example in which nothing is clamped, and the same where something is."""
    lowered = fxfuse.lower(model, (X,))
    assert not lowered.lowering.reason
    with torch.no_grad():
        expected = copy.deepcopy(model)(50 * X)
        torch.testing.assert_close(lowered(50 * X), expected, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("written", [through_a_view, beside_a_view])
@pytest.mark.parametrize("view", VIEWS)
def test_writes_stay_what_they_are_in_another_memory_format(view, written):
    assert_same_for_large_numbers(called(written(VIEWS[view])), atol=1e-4)


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
    assert_same_for_large_numbers(called(WRITTEN[way]), atol=1e-3)


def squeezed_in_place(m, y):
    z = y.relu()
    return z.mul_(m.pool(z).sigmoid()).mul_(z.mean((2, 3), keepdim=True))


HARMLESS = {
    "in place": added_in_place,
    "view": lambda _, y: y.relu().view(2, -1) + y.permute(0, 2, 3, 1).reshape(2, -1),
    "dropout": lambda m, y: m.act(m.dropout(y)) + 1,
    "squeeze and excitation": squeezed_in_place,
    "result is a view": lambda m, y: m.pool(y).flatten(1),
}


@pytest.mark.parametrize("way", HARMLESS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_images_have_their_channels_last_where_no_view_is_written_to(way, dtype, monkeypatch):
    given, put = [], onednn.put_channels_last
    monkeypatch.setattr(onednn, "put_channels_last", lambda *args: (given.append(args), put(*args)))
    modules = {
        "dropout": nn.Dropout(inplace=True),
        "act": nn.ReLU(inplace=True),
        "pool": nn.AdaptiveAvgPool2d(1),
    }
    lowered = fxfuse.lower(folded(Written(HARMLESS[way], **modules)), (X,), dtype=dtype)
    assert not lowered.lowering.reason and len(given) == 1
    near(lowered, X, limit=2e-5 if dtype is None else 0.05)


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
    graph = specialise(model, (X,)).module
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
