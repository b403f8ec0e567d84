"""Scenarios 33-40: the same operators and norms, written in other ways."""

import copy
import types

import pytest
import torch
import torch.ao.nn.intrinsic as fused_modules
import torch.nn.functional as F
from torch import nn
from torch.ao.nn import qat, quantized
from torch.ao.quantization import QConfig
from torch.ao.quantization.fake_quantize import FakeQuantize
from torch.ao.quantization.observer import MinMaxObserver
from torch.ao.quantization.stubs import DeQuantStub, QuantStub
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

import fxfuse
from fxfuse.capture import capture
from tests.forms import (
    EXPORT_WARNING,
    Forward,
    check,
    exported,
    modules,
    noise,
    norm_calls,
    traced,
)
from tests.support import assert_exact, assert_untouched, randomise, snapshot

pytestmark = pytest.mark.filterwarnings(EXPORT_WARNING)
X = noise(2, 3, 6, 6)
aten = torch.ops.aten


def conv_norm(norm, conv=None):
    return randomise(nn.Sequential(conv or nn.Conv2d(3, 4, 3), norm))


def norm_called(call):
    """A conv, and `call(value, mean, variance, gamma, beta)` behind it."""

    def forward(m, x):
        return call(m.conv(x), m.norm.running_mean, m.norm.running_var, m.norm.weight, m.norm.bias)

    return randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4, eps=1e-3)))


# 33
CALLS = {
    "positional": lambda y, m, v, g, b: F.batch_norm(y, m, v, g, b, False, 0.1, 1e-3),
    "defaults": F.batch_norm,
    "keywords": lambda y, m, v, g, b: F.batch_norm(
        eps=0.1, bias=b, weight=g, running_var=v, running_mean=m, input=y, training=False, momentum=0.5
    ),
    "mixed": lambda y, m, v, g, b: F.batch_norm(y, m, v, bias=b, weight=g, eps=1e-2),
    "statistics swapped": lambda y, m, v, g, b: F.batch_norm(y, running_var=v, running_mean=m),
    "mean as variance": lambda y, m, v, g, b: F.batch_norm(y, running_var=v, running_mean=v, weight=b),
    "no weight": lambda y, m, v, g, b: F.batch_norm(y, m, v, None, b),
    "no bias": lambda y, m, v, g, b: F.batch_norm(y, m, v, g, None),
    "weight and bias swapped": lambda y, m, v, g, b: F.batch_norm(y, m, v, b, g),
    "mean as bias": lambda y, m, v, g, b: F.batch_norm(y, m, v, g, m),
    "neither": lambda y, m, v, g, b: F.batch_norm(y, m, v, training=False, momentum=0),
    "eps an int": lambda y, m, v, g, b: F.batch_norm(y, m, v, g, b, eps=1),
    # 34
    "torch": lambda y, m, v, g, b: torch.batch_norm(y, g, b, m, v, False, 0.1, 1e-3, False),
    "torch, keywords": lambda y, m, v, g, b: torch.batch_norm(
        y,
        running_mean=m,
        running_var=v,
        weight=g,
        bias=b,
        training=False,
        momentum=0.1,
        eps=1,
        cudnn_enabled=True,
    ),
    "torch, no weight": lambda y, m, v, g, b: torch.batch_norm(y, None, b, m, v, False, 0.1, 1e-3, False),
    "aten": lambda y, m, v, g, b: aten.batch_norm.default(y, g, b, m, v, False, 0.1, 1e-3, False),
    "instance norm": lambda y, m, v, g, b: F.instance_norm(y, m, v, g, b, use_input_stats=False, eps=0.1),
    "instance norm, keywords": lambda y, m, v, g, b: F.instance_norm(
        y, use_input_stats=False, bias=b, running_var=v, running_mean=m
    ),
    "torch instance norm": lambda y, m, v, g, b: torch.instance_norm(y, g, b, m, v, False, 0.1, 1e-3, False),
}


@pytest.mark.parametrize("form", [modules, traced, exported])
@pytest.mark.parametrize("call", CALLS)
def test_norm_called_as_a_function_is_folded(call, form):
    check(form(norm_called(CALLS[call]), X), X, folded=1)


@pytest.mark.parametrize(
    ("call", "code"),
    [
        (lambda y, m, v, g, b: F.batch_norm(y, m, v, g, b, True), "FXF202"),
        (lambda y, m, v, g, b: torch.batch_norm(y, g, b, m, v, True, 0.1, 1e-3, False), "FXF202"),
        (lambda y, m, v, g, b: F.batch_norm(y, None, None, g, b, training=True), "FXF201"),
        (
            lambda y, m, v, g, b: aten.batch_norm.default(y, g, b, None, None, True, 0.1, 1e-3, False),
            "FXF201",
        ),
    ],
)
def test_norm_called_as_a_function_that_trains_is_left(call, code):
    check(norm_called(call), X, left=[code])


# 34
def first(outputs):
    return outputs[0]


@pytest.mark.parametrize(
    "call",
    [
        lambda *a: torch.native_batch_norm(*a, False, 0.1, 1e-3),
        lambda *a: aten._native_batch_norm_legit_no_training.default(*a, 0.1, 1e-3),
        lambda *a: aten._native_batch_norm_legit.default(*a, False, 0.1, 1e-3),
        lambda *a: aten.native_batch_norm.default(*a, False, 0.1, 1e-3),
        lambda *a: torch._batch_norm_impl_index(*a, False, 0.1, 1e-3, False),
        lambda *a: aten._batch_norm_no_update.default(*a, 0.1, 1e-3),
    ],
)
def test_native_norm_is_folded_unless_its_other_outputs_are_used(call):
    check(norm_called(lambda y, m, v, g, b: first(call(y, g, b, m, v))), X, folded=1)
    check(norm_called(lambda y, m, v, g, b: call(y, g, b, m, v)), X, left=["FXF207"])
    check(norm_called(lambda y, m, v, g, b: call(y, g, b, m, v)[:2]), X, left=["FXF207"])


@pytest.mark.parametrize(
    "call",
    [
        lambda *a: aten._native_batch_norm_legit.no_stats(*a[:3], True, 0.1, 1e-3),
        lambda *a: aten.native_batch_norm.default(*a, True, 0.1, 1e-3),
        lambda *a: aten._batch_norm_with_update_functional.default(*a, 0.1, 1e-3),
    ],
)
def test_native_norm_of_the_batch_is_left(call):
    model = norm_called(lambda y, m, v, g, b: first(call(y, g, b, m, v)))
    report = fxfuse.report(fxfuse.fuse(model))
    assert not report.folded and report.refused[0].code in ("FXF201", "FXF202")


@pytest.mark.parametrize(
    "call",
    [
        lambda *a: aten.batch_norm(*a, False, 0.1, 1e-3, False),
        lambda *a: first(aten.native_batch_norm(*a, False, 0.1, 1e-3)),
        lambda *a: first(torch._batch_norm_impl_index(*a, False, 0.1, 1e-3, False)),
        lambda *a: first(aten._batch_norm_no_update.default(*a, 0.1, 1e-3)),
    ],
)
def test_norm_under_a_rarer_name_is_accounted_for(call):
    model = norm_called(lambda y, m, v, g, b: call(y, g, b, m, v))
    fused = fxfuse.fuse(model)
    report = fxfuse.report(fused)
    assert_exact(model(X), fused(X))
    assert report.norms == 1 and len(report.refused) == norm_calls(fused)


# 35
@pytest.mark.parametrize("form", [modules, traced, exported])
def test_modules_called_by_keyword_are_folded(form):
    def forward(m, x):
        return m.late(input=m.drop(input=m.norm(input=m.same(input=m.conv(input=x)))))

    layers = {"conv": nn.Conv2d(3, 4, 3), "same": nn.Identity(), "drop": nn.Dropout()}
    model = Forward(forward, **layers, norm=nn.BatchNorm2d(4), late=nn.BatchNorm2d(4))
    check(form(randomise(model), X), X, folded=2)


@pytest.mark.parametrize("form", [modules, traced, exported])
@pytest.mark.parametrize(
    "call",
    [
        *(lambda up, x: up(x, output_size=(14, 13)), lambda up, x: up(x, [13, 14])),
        *(lambda up, x: up(output_size=(13, 13), input=x), lambda up, x: up(x, output_size=[14, 14])),
    ],
)
def test_transposed_conv_keeps_its_output_size_argument(call, form):
    layers = {"up": nn.ConvTranspose2d(3, 3, 3, stride=2), "norm": nn.BatchNorm2d(3)}
    check(form(randomise(Forward(lambda m, x: m.norm(call(m.up, x)), **layers)), X), X, folded=1)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: F.conv2d(x, w, b, 2, 1, 1, 1),
        lambda x, w, b: F.conv2d(input=x, weight=w, bias=b, padding="same"),
        lambda x, w, b: F.conv2d(x, bias=b, weight=w, stride=(1, 2)),
        lambda x, w, b: torch.conv2d(x, w, None, dilation=2),
        lambda x, w, b: aten.conv2d.default(x, w, b, [2, 2]),
        lambda x, w, b: aten.conv2d.padding(x, w, b, [1, 1], "same"),
        lambda x, w, b: F.conv2d(weight=w, input=x),
    ],
)
def test_conv_called_as_a_function_is_folded(call):
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    forward = lambda m, x: m.norm(call(x, m.conv.weight, m.conv.bias))  # noqa: E731
    check(randomise(Forward(forward, **layers)), X, folded=1)


@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: F.conv_transpose2d(x, w, b, 2, 1, 1, 2, 1),
        lambda x, w, b: F.conv_transpose2d(x, weight=w, groups=2, dilation=2, stride=1),
        lambda x, w, b: torch.conv_transpose2d(x, w, bias=b, output_padding=(1, 0), groups=2, stride=2),
        lambda x, w, b: aten.conv_transpose2d.input(x, w, b, [2, 2], [0, 0], [0, 0], 2),
    ],
)
def test_transposed_conv_called_as_a_function_is_folded(call):
    layers = {"conv": nn.ConvTranspose2d(4, 6, 3, groups=2), "norm": nn.BatchNorm2d(6)}
    forward = lambda m, x: m.norm(call(x, m.conv.weight, m.conv.bias))  # noqa: E731
    check(randomise(Forward(forward, **layers)), noise(2, 4, 5, 6), folded=1)


@pytest.mark.parametrize(
    "call",
    [
        *(lambda x, w, b: x @ w.T, lambda x, w, b: torch.matmul(x, w.T)),
        lambda x, w, b: torch.addmm(b, x, w.T, alpha=2),
        lambda x, w, b: torch.addmm(b, x, w.T, beta=0.5),
        lambda x, w, b: torch.addmm(x.mean(0)[0] + b, x, w.T),
        lambda x, w, b: torch.addmm(b[:1], x, w.T),
        lambda x, w, b: torch.addmm(b, w, x.t()[:, :4]),
        *(
            lambda x, w, b: torch.einsum("nc,oc->no", x, w),
            lambda x, w, b: F.bilinear(x, x, w[:, :, None] + w[:, None]),
        ),
        lambda x, w, b: F.linear(x, w * x.mean(), b),
    ],
)
def test_linear_map_that_is_no_linear_layer_is_left(call):
    layers = {"linear": nn.Linear(3, 4), "norm": nn.BatchNorm1d(4)}
    forward = lambda m, x: m.norm(call(x.flatten(1), m.linear.weight, m.linear.bias))  # noqa: E731
    model = randomise(Forward(forward, **layers))
    fused = fxfuse.fuse(model)
    assert not fxfuse.report(fused).folded and len(fxfuse.report(fused).refused) == 1
    assert torch.equal(model(noise(5, 3)), fused(noise(5, 3)))


@pytest.mark.parametrize("form", [modules, exported])
@pytest.mark.parametrize(
    "call",
    [
        lambda x, w, b: torch.addmm(b, x, w.T),
        lambda x, w, b: torch.addmm(b, x, w.t()),
        lambda x, w, b: torch.addmm(b, x, w.transpose(0, 1)),
        lambda x, w, b: aten.addmm.default(b, x, aten.permute.default(w, [1, 0])),
        lambda x, w, b: torch.addmm(b, x, w.abs().t()),
        lambda x, w, b: torch.mm(x, w.t()),
        lambda x, w, b: aten.mm.default(x, aten.t.default(w)),
    ],
)
def test_product_with_a_matrix_is_a_linear_layer(call, form):
    layers = {"linear": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)}  # square: a forgotten transpose would run
    forward = lambda m, x: m.norm(call(x, m.linear.weight, m.linear.bias))  # noqa: E731
    x = noise(5, 4)
    fused = check(form(randomise(Forward(forward, **layers)), x), x, folded=1)
    assert fxfuse.report(fused).folded[0].into


@pytest.mark.parametrize("matrix", [(4, 4), (3, 4)])
def test_product_with_a_parameter_that_is_not_transposed(matrix):
    layers = {
        "w": nn.Parameter(torch.ones(matrix)),
        "b": nn.Parameter(torch.ones(4)),
        "norm": nn.BatchNorm1d(4),
    }
    x = noise(5, matrix[0])
    with_bias = randomise(Forward(lambda m, x: m.norm(torch.addmm(m.b, x, m.w)), **layers))
    check(with_bias, x, folded=1)
    del layers["b"]
    fused = check(randomise(Forward(lambda m, x: m.norm(torch.mm(x, m.w)), **layers)), x, folded=1)
    assert fused.w.shape == matrix and fused.w_bias.shape == (4,)


@pytest.mark.parametrize("known", [True, False])
def test_first_row_of_what_may_be_a_tuple_is_no_tuples_first_value(known):
    """torch.max gives a tuple with an axis, and a tensor with another tensor."""

    def forward(m, x):
        return m.norm(m.linear(torch.max(x, x.flip(0))[0])), m.norm(m.linear(torch.max(x, 0)[0]))

    layers = {"linear": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)}
    model, x = randomise(Forward(forward, **layers)), noise(5, 4, 4)
    fused = fxfuse.fuse(model, example_inputs=(x,) if known else None)
    assert_exact(model(x), fused(x))
    assert len(fxfuse.report(fused).folded) == 2 * known


def test_matrix_that_is_read_elsewhere_keeps_its_value():
    layers = {"linear": nn.Linear(4, 4), "norm": nn.BatchNorm1d(4)}

    def forward(m, x):
        turned = m.linear.weight.t()
        return m.norm(torch.addmm(m.linear.bias, x, turned)) + torch.mm(x, turned), m.linear.weight

    check(randomise(Forward(forward, **layers)), noise(5, 4), folded=1)


@pytest.mark.parametrize(
    ("weight", "bias"), [((4,), None), ((4, 4), (3, 4)), ((4, 4), (3, 1)), ((4, 4), (1,)), ((4, 4), ())]
)
def test_linear_function_with_an_odd_weight_or_bias_is_exact(weight, bias):
    """A weight with one axis takes the features away, and a bias only has to broadcast."""
    layers = {"weight": nn.Parameter(torch.empty(weight)), "norm": nn.BatchNorm1d(4)}
    layers |= {"bias": None if bias is None else nn.Parameter(torch.empty(bias))}
    model = randomise(Forward(lambda m, x: m.norm(F.linear(x, m.weight, m.bias)), **layers))
    x = noise(3, 4, 4) if len(weight) == 1 else noise(3, 4)
    fused = fxfuse.fuse(model, example_inputs=(x,))
    assert fxfuse.report(fused).norms == 1
    assert_exact(model(x), fused(x))


# 36
class SamePadding(nn.Conv2d):
    def forward(self, x):
        pads = [(-size) % self.stride[0] + 2 for size in (self.kernel_size[1], self.kernel_size[0])]
        return F.conv2d(F.pad(x, (0, pads[0], 1, pads[1])), self.weight, self.bias, self.stride)


class PaddedByShape(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(padded(x, self.stride[0]), self.weight, self.bias, self.stride)


def padded(x, stride):
    extra = (-x.shape[-1]) % stride
    return F.pad(x, (0, extra)) if extra > 0 else x


class Inherited(nn.Conv2d):
    """Has no forward of its own."""


class AroundSuper(nn.Conv2d):
    def forward(self, x):
        return super().forward(x.flip(2))


class OwnConvForward(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias)


@pytest.mark.parametrize(
    ("conv", "left"),
    [
        *((SamePadding, []), (PaddedByShape, []), (Inherited, []), (AroundSuper, [])),
        (OwnConvForward, ["FXF302"]),
    ],
)
def test_subclass_of_conv_is_folded_by_what_it_computes_or_left(conv, left):
    model = conv_norm(nn.BatchNorm2d(4), conv(3, 4, 3, stride=4))
    check(model, noise(2, 3, 9, 7), folded=1 - len(left), left=left)


class FunctionNorm(nn.BatchNorm2d):
    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var, self.bias, self.weight, eps=0.5).relu()


class Rectified(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x).relu()


class Unchecked(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        pass


class AnyRank(_BatchNorm):
    def _check_input_dim(self, input):
        pass


class AnyRankInstance(_InstanceNorm):
    def _check_input_dim(self, input):
        pass

    def _get_no_batch_dim(self):
        return 3


@pytest.mark.parametrize("norm", [FunctionNorm, Rectified, Unchecked, AnyRank, AnyRankInstance])
def test_subclass_of_a_norm_is_accounted_for(norm):
    options = {"track_running_stats": True} if norm is AnyRankInstance else {}
    model = conv_norm(norm(4, **options))
    fused = fxfuse.fuse(model)
    report = fxfuse.report(fused)
    assert_exact(model(X), fused(X))
    assert report.norms == 1 and len(report.refused) == norm_calls(fused)


@pytest.mark.parametrize("norm", [FunctionNorm, Rectified])
def test_subclass_of_a_norm_is_folded_by_what_it_computes(norm):
    check(conv_norm(norm(4)), X, folded=1)


def test_layer_whose_forward_is_replaced_on_the_instance_is_not_taken_for_its_class():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Identity(), nn.BatchNorm2d(4)))
    model[1].forward = types.MethodType(lambda self, x: 2 * x, model[1])
    check(model, X, left=["FXF102"])


def test_forward_called_directly_runs_no_hooks_and_is_folded():
    def forward(m, x):
        return m.norm(m.conv.forward(x))

    model = randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    model.conv.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    check(model, X, folded=1)


def test_forward_of_a_norm_called_directly_is_folded():
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    check(randomise(Forward(lambda m, x: m.norm.forward(m.conv(x)), **layers)), X, folded=1)


# 37
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_sync_norm_is_folded(dims):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    check(
        conv_norm(nn.SyncBatchNorm(4), conv(3, 4, 3)),
        noise(2, 3, 4, 5, 6)[(slice(None),) * 2 + (0,) * (3 - dims)],
        folded=1,
    )


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_instance_norm_with_running_statistics_is_folded_with_and_without_a_batch(dims, affine):
    conv = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}[dims]
    norm = {1: nn.InstanceNorm1d, 2: nn.InstanceNorm2d, 3: nn.InstanceNorm3d}[dims]
    model = conv_norm(norm(4, affine=affine, track_running_stats=True, eps=0.1), conv(3, 4, 3))
    x = noise(2, 3, 4, 5, 6)[(slice(None),) * 2 + (0,) * (3 - dims)]
    fused = check(model, x, folded=1)
    assert_exact(model(x[0]), fused(x[0]))


@pytest.mark.parametrize(
    "norm", [nn.InstanceNorm2d(4, affine=True), nn.GroupNorm(2, 4), nn.LayerNorm([4, 4, 4])]
)
def test_norm_without_running_statistics_is_none_of_those_accounted_for(norm):
    check(conv_norm(norm), X)


class Frozen(nn.Module):
    """As torchvision's FrozenBatchNorm2d: buffers, applied by a multiplication and an addition."""

    def __init__(self, channels):
        super().__init__()
        for name in ("weight", "bias", "running_mean", "running_var"):
            self.register_buffer(name, torch.ones(channels))

    def forward(self, x):
        weight, bias = self.weight.view(1, -1, 1, 1), self.bias.view(1, -1, 1, 1)
        scale = weight * (self.running_var.view(1, -1, 1, 1) + 1e-5).rsqrt()
        return x * scale + (bias - self.running_mean.view(1, -1, 1, 1) * scale)


@pytest.mark.parametrize("form", [modules, exported])
def test_frozen_norm_is_folded_as_the_arithmetic_that_it_is(form):
    check(form(conv_norm(Frozen(4)), X), X, folded=1)


@pytest.mark.parametrize("form", [modules, exported])
def test_frozen_norm_between_two_activations_is_accounted_for(form):
    model = form(randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), Frozen(4), nn.ReLU())), X)
    fused = fxfuse.fuse(model)
    assert [refusal.code for refusal in fxfuse.report(fused).refused] == ["FXF102"]
    assert torch.equal(model(X), fused(X))


class WithActivation(nn.BatchNorm2d):
    """As timm's BatchNormAct2d: checks the rank, normalises, drops out, activates."""

    def __init__(self, channels, act):
        super().__init__(channels)
        self.drop, self.act = nn.Identity(), act

    def forward(self, x):
        torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
        training = self.training or (self.running_mean is None and self.running_var is None)
        momentum = 0.0 if self.momentum is None else self.momentum
        statistics = (self.running_mean, self.running_var)
        x = F.batch_norm(x, *statistics, self.weight, self.bias, training, momentum, self.eps)
        return self.act(self.drop(x))


@pytest.mark.parametrize("act", [nn.ReLU(inplace=True), nn.SiLU(), nn.Identity()])
def test_norm_with_an_activation_is_folded_and_the_activation_stays(act):
    fused = check(conv_norm(WithActivation(4, act)), X, folded=1)
    assert any(isinstance(module, type(act)) for module in fused.modules())


# 38
def lazy():
    torch.manual_seed(0)
    return nn.Sequential(
        nn.LazyConv2d(4, 3), nn.LazyBatchNorm2d(), nn.Flatten(), nn.LazyLinear(5), nn.LazyBatchNorm1d()
    )


def test_lazy_layers_are_a_usage_error_until_they_are_initialised():
    model = lazy().eval()
    with pytest.raises(fxfuse.UsageError, match=r"lazy parameters.*run the model once"):
        fxfuse.fuse(model)


def test_lazy_layers_are_folded_once_they_are_initialised():
    model = lazy()
    model(X.float())
    check(randomise(model), X, folded=2)


# 39
def test_conv_of_quantisation_aware_training_is_left():
    conv = qat.Conv2d(3, 4, 3, qconfig=QConfig(activation=FakeQuantize, weight=FakeQuantize))
    model = nn.Sequential(conv, nn.BatchNorm2d(4)).eval()
    fused = fxfuse.fuse(model)
    assert [refusal.code for refusal in fxfuse.report(fused).refused] == ["FXF302"]


@pytest.mark.filterwarnings("ignore:.*quantized tensor creation functions.* are deprecated:UserWarning")
def test_quantised_norm_is_left():
    norm = quantized.BatchNorm2d(3)
    model = Forward(
        lambda m, x: m.norm(m.quantise(x)).dequantize(),
        norm=norm,
        quantise=quantized.Quantize(0.1, 0, torch.quint8),
    )
    model = model.eval()
    fused = fxfuse.fuse(model)
    assert torch.equal(model(X.float()), fused(X.float()))
    assert [refusal.norm for refusal in fxfuse.report(fused).refused] == ["norm"]


@pytest.mark.parametrize("observer", [MinMaxObserver, FakeQuantize])
def test_observer_between_conv_and_norm_keeps_it_from_folding_and_goes_on_observing(observer):
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), observer(), nn.BatchNorm2d(4)))
    with pytest.raises(fxfuse.CaptureError, match="cannot be traced"):
        capture(model[1])
    before = snapshot(model)
    fused = copy.deepcopy(fxfuse.fuse(model))
    assert_untouched(before, model)
    assert [refusal.code for refusal in fxfuse.report(fused).refused] == ["FXF102"]
    for x in (X, 100 * X):
        assert_exact(model(x), fused(x))
    assert_exact(dict(model[1].state_dict()), dict(fused.get_submodule("1").state_dict()))


def test_observer_as_a_hook_keeps_a_norm_from_folding_and_goes_on_observing():
    model = conv_norm(nn.BatchNorm2d(4))
    model[0].observer = MinMaxObserver().double()
    model[0].register_forward_hook(lambda module, _inputs, output: module.observer(output))
    fused = check(model, X, left=["FXF301"])
    fused(100 * X)
    assert model[0].observer.max_val > 100


def test_stubs_and_modules_prepared_for_fusion_are_traced_through():
    pair = fused_modules.ConvBn2d(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))
    check(randomise(nn.Sequential(QuantStub(), pair, DeQuantStub())), X, folded=1)


# 40
def test_the_right_parent_is_edited_whatever_the_names():
    def pair():
        return nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))

    model = Forward(
        lambda m, x: m.last(
            m.named["0"](m.listed[1](m.deep(m.named["conv"](x).relu()).relu()).relu()) + m.listed[0][0](x)
        ),
        named=nn.ModuleDict({"conv": pair(), "0": pair(), "conv_folded": pair()}),
        listed=nn.ModuleList([pair(), nn.ModuleDict({"x": pair()})["x"]]),
        deep=nn.Sequential(nn.Sequential(nn.Sequential(nn.Sequential(pair(), nn.ReLU(), pair())))),
        last=nn.Sequential(),
        named_0_0=nn.Parameter(torch.empty(3)),
        conv_1=pair(),
    )
    model = randomise(model)
    fused = check(model, X, folded=5)
    assert sorted((fold.norm, fold.into) for fold in fxfuse.report(fused).folded) == [
        ("deep.0.0.0.0.1", ("deep.0.0.0.0.0",)),
        ("deep.0.0.0.2.1", ("deep.0.0.0.2.0",)),
        ("listed.1.1", ("listed.1.0",)),
        ("named.0.1", ("named.0.0",)),
        ("named.conv.1", ("named.conv.0",)),
    ]
    assert torch.equal(fused.get_parameter("listed.0.0.weight"), model.listed[0][0].weight)


def test_copies_get_names_that_are_not_taken():
    def forward(m, x):
        return m.norm(m.conv(x)) + m.norm(m.conv(x + 1)) + m.conv(x) + m.conv_folded(x) + m.conv_folded_2

    model = randomise(
        Forward(
            forward,
            conv=nn.Conv2d(3, 3, 1),
            norm=nn.BatchNorm2d(3),
            conv_folded=nn.Conv2d(3, 3, 1),
            conv_folded_2=nn.Parameter(torch.empty(3, 1, 1)),
        )
    )
    check(model, X, folded=2)


@pytest.mark.parametrize("taken", ["bias", "weight_bias", "kernel_bias"])
def test_new_bias_of_a_function_gets_a_name_that_is_not_taken(taken):
    def forward(m, x):
        return m.norm(F.conv2d(F.conv2d(x, m.weight), m.kernel)) * getattr(m, taken)

    tensors = {name: nn.Parameter(torch.empty(3, 3, 1, 1)) for name in ("weight", "kernel")}
    tensors[taken] = nn.Parameter(torch.empty(3, 1, 1))
    check(randomise(Forward(forward, **tensors, norm=nn.BatchNorm2d(3))), X, folded=1)


@pytest.mark.parametrize("value", ["text", {"key": 1}, 3])
def test_plain_attribute_named_meta_is_no_report(value):
    model = conv_norm(nn.BatchNorm2d(4))
    model.meta = value
    check(model, X, folded=1)
    with pytest.raises(fxfuse.UsageError, match=r"not made by fxfuse"):
        fxfuse.report(model)
