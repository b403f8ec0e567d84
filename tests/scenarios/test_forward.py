"""Scenarios 42-49: a norm's map goes forward, into the input side of the operators that use its value."""

import copy
import itertools
import operator
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.capture import capture
from tests.forms import (
    CONVS,
    EXPORT_WARNING,
    FORMS,
    NORMS,
    Forward,
    check,
    modules,
    noise,
    norm_calls,
)
from tests.scenarios.test_chains_through_operators import (
    Branches,
    assert_never_wrong,
    assert_settled,
    unshifted,
)
from tests.support import assert_exact, randomise

pytestmark = pytest.mark.filterwarnings(EXPORT_WARNING)
X = noise(2, 4, 6, 6)
FORM = pytest.mark.parametrize("form", FORMS)
WRITTEN = pytest.mark.parametrize("form", FORMS[:2])
DIALECTS = pytest.mark.parametrize("form", FORMS[2:])


def ahead(*layers, norm=None):
    """A norm of X, then `layers`."""
    return randomise(nn.Sequential(norm or nn.BatchNorm2d(4, eps=1e-3), *layers))


def known(form):
    """A norm that is called as a function takes values of any rank: an example shows which it is."""
    return {} if form is modules else {"example_inputs": (X,)}


def model_of(run, *channels, norm=None, **layers):
    """`run` over a norm of X, 3×3 convolutions a, b, ... of X to so many channels, and other layers."""
    convs = {name: nn.Conv2d(4, number, 3) for name, number in zip("abc", channels, strict=False)}
    return randomise(Forward(run, norm=norm or nn.BatchNorm2d(4), **convs, **layers))


# 42
@FORM
@pytest.mark.parametrize("dims", CONVS)
@pytest.mark.parametrize("bias", [True, False])
def test_norm_goes_forward_into_a_convolution_without_padding(bias, dims, form):
    x = noise(2, 4, *(5,) * dims)
    model = form(randomise(nn.Sequential(NORMS[dims](4), CONVS[dims](4, 3, 3, bias=bias))), x)
    fused = assert_settled(model, x, folded=1, direction="forward")
    assert fxfuse.report(fused).folded[0].into == ("1",) or form is not modules


@FORM
@pytest.mark.parametrize("bias", [True, False])
def test_norm_goes_forward_into_a_linear_layer(bias, form):
    x = noise(3, 4)
    flat = form(randomise(nn.Sequential(nn.Flatten(), nn.BatchNorm1d(4), nn.Linear(4, 4, bias=bias))), x)
    assert_settled(flat, x, folded=1, direction="forward")
    bare = form(randomise(nn.Sequential(nn.BatchNorm1d(4), nn.Linear(4, 4, bias=bias))), x)
    assert_settled(bare, x, folded=1, direction="forward", example_inputs=(x,))
    assert_never_wrong(bare, x)


NORM_KINDS = {
    "eps": nn.BatchNorm2d(4, eps=0.1),
    "without affine": nn.BatchNorm2d(4, affine=False),
    "momentum=None": nn.BatchNorm2d(4, momentum=None),
    "SyncBatchNorm": nn.SyncBatchNorm(4),
    "InstanceNorm": nn.InstanceNorm2d(4, affine=True, track_running_stats=True),
}


@pytest.mark.parametrize("norm", NORM_KINDS.values(), ids=NORM_KINDS.keys())
def test_norm_of_any_kind_goes_forward(norm):
    assert_settled(ahead(nn.Conv2d(4, 3, 3), norm=norm), X, folded=1, direction="forward")


@FORM
@pytest.mark.parametrize("options", [{}, {"weight": True}, {"bias": True}, {"weight": True, "bias": True}])
def test_functional_norm_with_or_without_weight_and_bias_goes_forward(options, form):
    def run(m, x):
        given = {name: getattr(m, name) for name in options}
        return m.a(F.batch_norm(x, m.running_mean, m.running_var, **given))

    tensors = {name: noise(4, seed=seed) for seed, name in enumerate(("weight", "bias", "running_mean"))}
    model = randomise(Forward(run, a=nn.Conv2d(4, 3, 3), **tensors, running_var=noise(4).exp()))
    assert_settled(form(model, X), X, folded=1, direction="forward", **known(form))


def test_norm_without_running_statistics_or_in_train_mode_does_not_go_forward():
    check(ahead(nn.Conv2d(4, 3, 3), norm=nn.BatchNorm2d(4, track_running_stats=False)), X, left=["FXF201"])
    model = ahead(nn.Conv2d(4, 3, 3))
    model[0].train()
    assert [refusal.code for refusal in fxfuse.explain(model).refused] == ["FXF202"]


# 43, 44, 45: with zero padding the border sees less of the shift than the inside.
WITHOUT_BORDER = {
    "stride": nn.Conv2d(4, 3, 3, stride=2),
    "dilation": nn.Conv2d(4, 3, 2, dilation=(2, 3)),
    "valid": nn.Conv2d(4, 3, 3, padding="valid"),
    "same of 1x1": nn.Conv2d(4, 3, 1, padding="same"),
    "reflect": nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    "replicate": nn.Conv2d(4, 3, 3, padding=(1, 2), padding_mode="replicate"),
    "circular": nn.Conv2d(4, 3, 3, padding=2, padding_mode="circular", stride=2),
    "same, reflect": nn.Conv2d(4, 3, (3, 2), padding="same", padding_mode="reflect"),
    "padding_mode without padding": nn.Conv2d(4, 3, 3, padding_mode="reflect"),
    "groups": nn.Conv2d(4, 6, 3, groups=2),
    "groups without bias": nn.Conv2d(4, 2, 3, groups=2, bias=False),
    "depthwise": nn.Conv2d(4, 4, 3, groups=4),
    "depthwise, multiplier": nn.Conv2d(4, 8, (3, 1), groups=4, bias=False),
    "depthwise, circular": nn.Conv2d(4, 4, 3, groups=4, padding=1, padding_mode="circular"),
}
WITH_BORDER = {
    "padding": nn.Conv2d(4, 3, 3, padding=1),
    "padding of one axis": nn.Conv2d(4, 3, 3, padding=(0, 1)),
    "same": nn.Conv2d(4, 3, 3, padding="same"),
    "1x1 with padding": nn.Conv2d(4, 3, 1, padding=1),
    "stride that skips the border": nn.Conv2d(4, 3, 1, padding=1, stride=2),
    "stride": nn.Conv2d(4, 3, 3, padding=1, stride=2, bias=False),
    "groups": nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "depthwise": nn.Conv2d(4, 4, 5, padding=2, groups=4),
    "dilation": nn.Conv2d(4, 3, 3, padding="same", dilation=2),
}
TRANSPOSED = {
    "stride 1": nn.ConvTranspose2d(4, 3, 3),
    "square": nn.ConvTranspose2d(4, 4, 3, bias=False),
    "stride": nn.ConvTranspose2d(4, 3, 2, stride=2),
    "padding": nn.ConvTranspose2d(4, 3, 3, stride=2, padding=1, output_padding=1),
    "groups": nn.ConvTranspose2d(4, 6, 3, groups=2),
    "groups, square": nn.ConvTranspose2d(4, 4, (3, 1), groups=2),
    "depthwise": nn.ConvTranspose2d(4, 8, 3, groups=4, dilation=2),
}


def layers(*tables):
    entries = {
        f"{name}-{number}": each for number, table in enumerate(tables) for name, each in table.items()
    }
    return pytest.mark.parametrize("layer", entries.values(), ids=entries.keys())


@WRITTEN
@layers(WITHOUT_BORDER)
def test_norm_with_a_shift_goes_forward_where_no_zeros_are_padded(layer, form):
    assert_settled(form(ahead(layer), X), X, folded=1, direction="forward", **known(form))


@WRITTEN
@layers(WITH_BORDER)
def test_norm_with_a_shift_is_left_where_zeros_are_padded(layer, form):
    check(form(ahead(layer), X), X, left=["FXF305"], **known(form))


@WRITTEN
@layers(TRANSPOSED)
def test_norm_with_a_shift_is_left_before_a_transposed_convolution(layer, form):
    assert_settled(form(ahead(layer), X), X, left=1, **known(form))


@WRITTEN
@layers(WITHOUT_BORDER, WITH_BORDER, TRANSPOSED)
def test_norm_without_a_shift_goes_forward_everywhere(layer, form):
    assert_settled(form(unshifted(ahead(layer)), X), X, folded=1, direction="forward", **known(form))


@DIALECTS
def test_padding_decides_in_every_dialect(form):
    everywhere = [*WITHOUT_BORDER.values(), *WITH_BORDER.values(), *TRANSPOSED.values()]
    inside = form(Branches(map(ahead, WITHOUT_BORDER.values())), X)
    border = form(Branches(map(ahead, everywhere[len(WITHOUT_BORDER) :])), X)
    unmoved = form(unshifted(Branches(map(ahead, everywhere))), X)
    assert_settled(inside, X, folded=len(WITHOUT_BORDER), direction="forward", **known(form))
    assert_settled(border, X, left=len(WITH_BORDER) + len(TRANSPOSED), **known(form))
    assert_settled(unmoved, X, folded=len(everywhere), direction="forward", **known(form))


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 3, 3, padding=1), nn.ConvTranspose2d(4, 3, 3)])
@pytest.mark.parametrize("channel", [0, 3])
@pytest.mark.parametrize("statistic", ["running_mean", "bias"])
def test_shift_of_a_single_channel_keeps_the_norm(statistic, channel, layer):
    model = unshifted(ahead(layer))
    model[0].weight.detach()[0] = 0.5
    getattr(model[0], statistic).detach()[channel] = 1e-3
    assert_settled(model, X, left=1)


def test_mean_and_bias_that_cancel_or_not_are_exact():
    model = ahead(nn.Conv2d(4, 3, 3, padding=1), norm=nn.BatchNorm2d(4, eps=0.75))
    model[0].running_var.fill_(0.25)
    model[0].bias.detach().copy_(model[0].weight * model[0].running_mean)
    assert_never_wrong(model, X)


@pytest.mark.parametrize("name", ["ConvTranspose1d", "ConvTranspose3d"])
def test_norm_without_a_shift_goes_forward_into_a_transposed_convolution_of_any_dimension(name):
    dims = int(name[-2])
    x = noise(2, 4, *(4,) * dims)
    model = unshifted(randomise(nn.Sequential(NORMS[dims](4), getattr(nn, name)(4, 6, 3, groups=2))))
    assert_settled(model, x, folded=1, direction="forward")


# 46, 47
HEADS = {
    "flatten": [nn.Flatten(), nn.Linear(144, 5)],
    "flatten, dropout": [nn.Dropout(), nn.Flatten(), nn.Dropout(), nn.Linear(144, 5, bias=False)],
    "global pool": [nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(), nn.Linear(4, 5)],
    "pool": [nn.AvgPool2d(3), nn.Flatten(), nn.Linear(16, 5)],
    "convolution as a head": [nn.AdaptiveAvgPool2d(1), nn.Conv2d(4, 5, 1), nn.Flatten()],
    "padding as a module": [nn.ReflectionPad2d(1), nn.Conv2d(4, 5, 3)],
    "tokens": [nn.Flatten(2), nn.Conv1d(4, 5, 1)],
}


@FORM
@pytest.mark.parametrize("head", HEADS.values(), ids=HEADS.keys())
def test_norm_goes_forward_into_the_head(head, form):
    assert_settled(form(ahead(*head), X), X, folded=1, direction="forward", **known(form))


POOLS = [
    *(lambda y: y.mean((2, 3)), lambda y: F.adaptive_avg_pool2d(y, 1).flatten(1), lambda y: y.flatten(1)),
    lambda y: F.dropout(y.flatten(2).mean(2), training=False),
]
# An exported graph holds the sizes of its example as numbers, which prove nothing about other inputs.
POOLS_WITH_SIZES = [
    *(lambda y: y.mean([-2, -1], keepdim=True).view(y.shape[0], -1), lambda y: y.view(y.size(0), -1)),
    lambda y: y.reshape(y.shape[0], -1),
]


@pytest.mark.parametrize(
    ("pool", "form"),
    [*itertools.product(POOLS, FORMS), *itertools.product(POOLS_WITH_SIZES, FORMS[:3])],
)
def test_norm_goes_forward_through_functional_pooling_into_the_head(pool, form):
    head = nn.Linear(pool(X).shape[1], 5)
    model = randomise(
        Forward(lambda m, x: m.head(pool(m.norm(F.relu(x)))), norm=nn.BatchNorm2d(4), head=head)
    )
    assert_settled(form(model, X), X, folded=1, direction="forward", **known(form))


@FORM
def test_norm_of_a_sum_goes_forward_into_a_1x1_convolution(form):
    model = model_of(lambda m, x: m.conv(m.norm(x + F.gelu(x))), conv=nn.Conv2d(4, 6, 1, bias=False))
    assert_settled(form(model, X), X, folded=1, direction="forward", **known(form))


# 48: C convolution, P convolution with padding, N norm, R ReLU, D dropout; directions of the folds.
ROWS = {
    "NC": "f",
    "CNC": "b",
    "RNC": "f",
    "RNDC": "f",
    "RNNC": "ff",
    "RNNNC": "fff",
    "CNNC": "bb",
    "NCNC": "fb",
    "RNCNR": "fb",
    "RNCRNC": "ff",
    "CNRNC": "bf",
    "CNRNCNRNC": "bfbf",
    "NCC": "f",
    "NDNC": "ff",
    "NPC": "-",
    "NPNC": "-b",
    "NNP": "--",
    "NR": "-",
    "NRC": "-",
    "NRNC": "-f",
    "NDRC": "-",
    "NNRC": "--",
    "RN": "-",
    "PNP": "b",
}


def row(letters):
    kinds = {
        "C": lambda: nn.Conv2d(4, 4, 1, bias=False),
        "P": lambda: nn.Conv2d(4, 4, 3, padding=1),
        "N": lambda: nn.BatchNorm2d(4),
        "R": nn.ReLU,
        "D": nn.Dropout,
    }
    return randomise(nn.Sequential(*(kinds[letter]() for letter in letters)))


@WRITTEN
@pytest.mark.parametrize(("letters", "directions"), ROWS.items())
def test_backward_comes_before_forward_and_each_norm_is_absorbed_once(letters, directions, form):
    model, expected = form(row(letters)), Counter(directions)
    folded, left = len(directions) - expected["-"], expected["-"]
    fused = assert_settled(model, X, folded=folded, left=left, **known(form))
    found = Counter(fold.direction[0] for fold in fxfuse.report(fused).folded)
    assert found == expected - Counter("-" * len(directions))
    report = fxfuse.report(fused)
    gone = len(report.folded) + sum(len(merged.operators) for merged in report.merged)
    assert _operators(fused.graph) == _operators(capture(model).graph) - gone


@DIALECTS
def test_backward_comes_before_forward_in_every_dialect(form):
    expected = Counter("".join(ROWS.values()))
    model = form(Branches(map(row, ROWS)), X)
    folded, left = expected.total() - expected["-"], expected["-"]
    fused = assert_settled(model, X, folded=folded, left=left, **known(form))
    assert Counter(fold.direction[0] for fold in fxfuse.report(fused).folded)["b"] == expected["b"]


def _operators(graph):
    """How many operators work on values; assertions about ranks do not."""
    checks = (getattr, operator.eq, torch._assert)
    return sum(node.op.startswith("call_") and node.target not in checks for node in graph.nodes)


# 49: all that use the value of the norm absorb it, or nothing is folded.
def _shapes(m, x):
    y = m.norm(x)
    return m.a(y).view(y.shape[0], -1), y.size(1)


ALL_ABSORB = {
    "two": lambda m, x: (m.a(y := m.norm(x)), m.b(y)),
    "three": lambda m, x: (m.a(y := m.norm(x)), m.b(y), m.c(y)),
    "at different depths": lambda m, x: (m.a(F.avg_pool2d(y := m.norm(x), 2)), m.b(y.contiguous())),
    "a linear layer too": lambda m, x: (m.a(y := m.norm(x)), m.linear(y.mean((2, 3)))),
    "the same twice": lambda m, x: m.a(y := m.norm(x)) + m.a(y),
    "queries": _shapes,
}


@FORM
@pytest.mark.parametrize("run", ALL_ABSORB.values(), ids=ALL_ABSORB.keys())
def test_norm_goes_forward_into_all_that_use_it(run, form):
    model = model_of(run, 3, 5, 2, linear=nn.Linear(4, 3))
    fused = assert_settled(form(model, X), X, folded=1, direction="forward", **known(form))
    if run is ALL_ABSORB["three"] and form is modules:
        assert sorted(fxfuse.report(fused).folded[0].into) == ["a", "b", "c"]


NOT_ALL_ABSORB = {
    "ReLU": lambda m, x: (m.a(y := m.norm(x)), F.relu(y)),
    "an output": lambda m, x: (m.a(y := m.norm(x)), y),
    "the skip": lambda m, x: (y := m.norm(x))[:, :3, 1:-1, 1:-1] + m.a(y),
    "zero padding": lambda m, x: (m.a(y := m.norm(x)), m.padded(y)),
    "a transposed convolution": lambda m, x: (m.a(y := m.norm(x)), m.transposed(y)),
    "a product": lambda m, x: m.a(y := m.norm(x)) * y.mean(),
    "activated between": lambda m, x: m.a(F.gelu(m.norm(x))),
    "none at all": lambda m, x: (m.norm(x), m.a(x)),
    "at the end of another branch": lambda m, x: (m.a(y := m.norm(x)), F.avg_pool2d(y, 2).flatten(1).exp()),
    "its weight": lambda m, x: F.conv2d(x, m.norm(x)[:, :, :2, :2]),
    "its input and weight": lambda m, x: F.conv2d(y := m.norm(x), y),
    "a linear layer's weight": lambda m, x: F.linear(x[:, :, 0, :4], m.norm(x)[:, :, 0, 0]),
    "a bias": lambda m, x: F.conv2d(x, m.kernel, m.norm(x)[0, :3, 0, 0]),
    "a product of matrices": lambda m, x: m.norm(x) @ x,
    "a sum with another value": lambda m, x: m.a(m.norm(x) + x.abs()),
}


def not_all_absorb(run):
    extra = {"padded": nn.Conv2d(4, 3, 3, padding=1), "transposed": nn.ConvTranspose2d(4, 3, 3)}
    return model_of(run, 3, **extra, kernel=noise(3, 4, 2, 2))


@WRITTEN
@pytest.mark.parametrize("run", NOT_ALL_ABSORB.values(), ids=NOT_ALL_ABSORB.keys())
def test_norm_is_left_where_not_all_that_use_it_absorb_it(run, form):
    assert_settled(form(not_all_absorb(run)), X, left=1)


@DIALECTS
def test_norm_is_left_where_not_all_absorb_it_in_every_dialect(form):
    model = Branches(map(not_all_absorb, NOT_ALL_ABSORB.values()))
    assert_settled(form(model, X), X, left=len(NOT_ALL_ABSORB))


# Who else uses the operator that absorbs.
def _own_bias(m, x):
    return F.conv2d(m.norm(x), m.a.weight, m.norm.bias)


SHARED = {
    "applied to the input too": (lambda m, x: m.a(m.norm(x)) + m.a(x), 1),
    "after two norms": (lambda m, x: m.a(m.norm(x)) + m.a(m.other(x)), 2),
    "after one norm twice": (lambda m, x: m.a(m.norm(x)) * m.a(m.norm(x + 1)), 2),
    "applied to its own output": (lambda m, x: m.a(m.a(m.norm(x))), 1),
    "its weight read": (lambda m, x: m.a(m.norm(x)) * m.a.weight.sum(), 1),
    "its weight returned": (lambda m, x: (m.a(m.norm(x)), m.a.weight, m.a.bias), 1),
    "a function with its weight": (lambda m, x: m.a(m.norm(x)) + F.conv2d(x, m.a.weight), 1),
    "functions of one weight": (lambda m, x: F.conv2d(m.norm(x), m.a.weight) + F.conv2d(x, m.a.weight), 1),
    "the norm's bias as its own": (_own_bias, 1),
    "the norm's statistics read": (lambda m, x: m.a(m.norm(x)) + m.norm.running_mean.sum(), 1),
    "one norm forward, one backward": (lambda m, x: m.other(m.a(m.norm(x))), 2),
    "norm in front of itself": (lambda m, x: m.a(m.norm(m.norm(x))), 2),
    "both directions, called twice": (lambda m, x: m.other(m.a(m.norm(x))) + m.a(x), 2),
}


def shared(case):
    return model_of(case[0], 4, other=nn.BatchNorm2d(4, eps=1e-2))


@pytest.mark.parametrize("case", SHARED.values(), ids=SHARED.keys())
def test_operator_that_absorbs_is_not_changed_under_its_other_users(case):
    assert_settled(shared(case), X, folded=case[1])


@DIALECTS
def test_operators_that_absorb_are_not_changed_in_any_dialect(form):
    model = Branches(map(shared, SHARED.values()))
    assert_settled(form(model, X), X, folded=sum(folded for _, folded in SHARED.values()), **known(form))


@FORM
@pytest.mark.parametrize("tied", [("weight",), ("bias",), ("weight", "bias")])
def test_operator_with_a_tied_tensor_is_not_changed(tied, form):
    model = model_of(lambda m, x: m.a(m.norm(x)) + m.b(x), 3, 3)
    for name in tied:
        setattr(model.b, name, getattr(model.a, name))
    assert_settled(form(model, X), X, folded=1, direction="forward", **known(form))


class OwnForward(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.abs())


@pytest.mark.parametrize("name", ["norm", "a"])
@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
def test_norm_with_hooks_or_before_an_operator_with_hooks_is_left(register, name):
    model = model_of(lambda m, x: m.a(m.norm(x)), 3)
    getattr(getattr(model, name), register)(lambda *args: None)
    assert_settled(model, X, left=1)


def test_norm_before_an_operator_with_a_forward_of_its_own_is_left():
    assert_settled(model_of(lambda m, x: m.conv(m.norm(x)), conv=OwnForward(4, 3, 3)), X, left=1)


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 3, 3), nn.Sequential(nn.Flatten(), nn.Linear(144, 3))])
def test_norm_whose_fold_would_overflow_is_left(layer):
    model = ahead(layer)
    with torch.no_grad():
        model[0].weight.fill_(300.0)
        model[0].running_var.fill_(1e-4)
        for parameter in layer.parameters():
            parameter.fill_(100.0)
    fused = fxfuse.fuse(model.half())
    assert [refusal.code for refusal in fxfuse.report(fused).refused] == ["FXF401"]
    assert norm_calls(fused) == 1


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_new_bias_has_dtype_and_gradient_flag_of_the_operator(dtype):
    model = ahead(nn.Conv2d(4, 3, 3, bias=False)).to(dtype).requires_grad_(False)
    fused = fxfuse.fuse(model)
    convolution = next(each for each in fused.modules() if isinstance(each, nn.Conv2d))
    assert len(fxfuse.report(fused).folded) == 1
    assert convolution.bias.dtype == convolution.weight.dtype == dtype
    assert not convolution.bias.requires_grad


def test_norm_on_the_meta_device_goes_forward():
    model = ahead(nn.Conv2d(4, 3, 3)).to("meta")
    assert [fold.direction for fold in fxfuse.report(fxfuse.fuse(model)).folded] == ["forward"]


# What is written to in place: the norm has read its input before, the operator reads it after.
WRITES = {
    "add_": lambda h: h.add_(1),
    "relu": lambda h: F.relu(h, inplace=True),
    "item": lambda h: h.__setitem__(0, 5.0),
    "iadd": lambda h: operator.iadd(h, 1),
    "view": lambda h: h.view(-1).neg_(),
    "part": lambda h: h[1:].zero_(),
    "out": lambda h: torch.add(h, 1, out=h),
    "nothing": lambda h: h.add(1),
}
ALIASES = {
    "itself": lambda h: h,
    "view": lambda h: h.view(-1),
    "contiguous": lambda h: h.contiguous(),
    "detach": lambda h: h.detach(),
}


@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("alias", ALIASES)
@pytest.mark.parametrize("early", [True, False])
def test_value_that_the_norm_has_read_may_be_written_to(early, alias, write):
    def run(m, x):
        h = F.relu(x)
        source = ALIASES[alias](h)
        y = m.norm(h)
        if early:
            WRITES[write](source)
        z = m.a(y)
        if not early:
            WRITES[write](source)
        return z, h

    with torch.no_grad():
        assert_never_wrong(model_of(run, 3), X)


@pytest.mark.parametrize("form", FORMS[::3])
@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: (y := m.norm(x), x.add_(1), m.a(y))[2],
        lambda m, x: (y := m.norm(x), y.add_(1), m.a(y))[2],
        lambda m, x: (y := m.norm(x), F.relu(y, inplace=True), m.a(y))[2],
        lambda m, x: (y := m.norm(x), y[:, 0].zero_(), m.a(y))[2],
        lambda m, x: (y := m.norm(x), m.a(y), y.mul_(2))[1:],
        lambda m, x: (y := m.norm(x), z := m.a(y), y.mul_(2), m.b(y) + z)[3],
        lambda m, x: (y := m.norm(x), p := F.dropout(y, training=False), y.neg_(), m.a(p))[3],
        lambda m, x: (h := F.relu(x), y := m.norm(h), m.relu(h), m.a(y))[2:],
        lambda m, x: (h := F.relu(x), y := m.norm(m.identity(h)), h.zero_(), m.a(y))[3],
        lambda m, x: (h := F.relu(x), y := m.norm(h), h.zero_(), m.norm(h), m.a(y))[4],
        lambda m, x: (h := F.relu(x), p := F.avg_pool2d(m.norm(h), 2), h.zero_(), m.a(p))[3],
        lambda m, x: (h := F.relu(x), m.a(m.norm(h.add_(1))))[1],
        lambda m, x: (z := m.a(m.norm(x)), z.relu_(), z)[2],
    ],
)
def test_forward_is_never_wrong_where_values_are_written_to(run, form):
    extra = {"relu": nn.ReLU(inplace=True), "identity": nn.Identity()}
    with torch.no_grad():
        assert_never_wrong(form(model_of(run, 3, 3, **extra), X), X)


@pytest.mark.parametrize("form", FORMS[::3])
@pytest.mark.parametrize(
    "write",
    [
        *(lambda m: m.norm.running_mean.add_(1), lambda m: m.norm.running_var.mul_(2)),
        *(lambda m: m.kernel.mul_(2), lambda m: m.kernel[0].zero_(), lambda m: m.kernel.view(-1).add_(1)),
    ],
)
def test_forward_follows_tensors_that_are_written_to(write, form):
    def run(m, x):
        write(m)
        return F.conv2d(m.norm(x), m.kernel)

    model = model_of(run, kernel=noise(4, 4, 1, 1))
    fused = copy.deepcopy(fxfuse.fuse(form(copy.deepcopy(model), X)))
    for _ in range(2):
        assert_exact(model(X), fused(X))
    assert not fxfuse.report(fused).folded
