"""Each refusal code is provoked by one small model, and by nothing else in it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations

import fxfuse
from fxfuse.refusals import Code
from tests.forms import Forward, noise
from tests.support import assert_untouched, randomise, snapshot

X = noise(2, 3, 6, 6)


class OwnConv(nn.Conv2d):
    def _conv_forward(self, input, weight, bias):
        return super()._conv_forward(input, 2 * weight, bias)


class OwnNorm(nn.BatchNorm2d):
    def _check_input_dim(self, input):
        pass


def pair(conv=None, norm=None):
    return randomise(nn.Sequential(conv or nn.Conv2d(3, 4, 3), norm or nn.BatchNorm2d(4)))


def written(forward, **layers):
    return randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4), **layers))


def changed(model, change):
    with torch.no_grad():
        change(model)
    return model


def used_elsewhere(m, x):
    y = m.conv(x)
    return m.norm(y), y


def written_to(m, x):
    m.norm.running_mean.fill_(0.5)
    return m.norm(m.conv(x))


def native(m, x):
    norm = m.norm
    tensors = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
    return torch.native_batch_norm(m.conv(x), *tensors, False, 0.1, norm.eps)[0]


def computed(m, x):
    return F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var + 1)


def hooked(module):
    module.register_forward_hook(lambda _module, _inputs, output: output + 1)


def small(factor):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    return changed(model.eval().half(), lambda m: (m[1].weight.fill_(factor), m[1].running_var.fill_(1.0)))


# For each code a model and an input. FXF106 is what a model that does not run is told.
MODELS = {
    Code.OTHER_USERS: (lambda: written(used_elsewhere), X),
    Code.OPAQUE_PRODUCER: (lambda: written(lambda m, x: m.norm(m.conv(x).relu())), X),
    Code.NOTHING_BEFORE: (lambda: pair(nn.Identity(), nn.BatchNorm2d(3)), X),
    Code.AXIS: (lambda: pair(nn.Linear(6, 3), nn.BatchNorm2d(3)), X),
    Code.RANK_UNKNOWN: (lambda: pair(nn.Linear(4, 3), nn.BatchNorm1d(3)), noise(2, 3, 4)),
    Code.CHANNELS: (lambda: pair(norm=nn.BatchNorm2d(5)), None),
    Code.BATCH_STATISTICS: (lambda: pair(norm=nn.BatchNorm2d(4, track_running_stats=False)), X),
    Code.NORM_TRAINING: (lambda: changed(pair(), lambda m: m[1].train()), X),
    Code.NORM_HOOKS: (lambda: changed(pair(), lambda m: hooked(m[1])), X),
    Code.NORM_OWN_FORWARD: (lambda: pair(norm=OwnNorm(4)), X),
    Code.NORM_COMPUTED: (lambda: written(computed), X),
    Code.STATE_MUTATED: (lambda: written(written_to), X),
    Code.TUPLE_OUTPUT: (lambda: written(native), X),
    Code.INSIDE_OPAQUE: (lambda: changed(nn.Sequential(pair()).eval(), lambda m: hooked(m[0])), X),
    Code.OPERATOR_HOOKS: (lambda: changed(pair(), lambda m: hooked(m[0])), X),
    Code.OPERATOR_OWN_FORWARD: (lambda: pair(OwnConv(3, 4, 3)), X),
    Code.OPERATOR_COMPUTED: (lambda: pair(parametrizations.weight_norm(nn.Conv2d(3, 4, 3))), X),
    Code.OPERATOR_TRAINING: (lambda: changed(pair(), lambda m: m[0].train()), X),
    Code.OVERFLOW: (lambda: changed(pair(), lambda m: m[1].running_mean.fill_(torch.inf)), X),
    Code.UNDERFLOW: (lambda: small(1e-7), X.half()),
}
# This one takes a second norm, which is refused for a reason of its own.
BEHIND_ANOTHER = {
    Code.NORM_BEFORE_LEFT: (lambda: pair(pair(nn.ReLU(), nn.BatchNorm2d(3)), nn.BatchNorm2d(3)), X)
}


def test_every_code_is_provoked():
    assert {*MODELS, *BEHIND_ANOTHER} == set(Code)


def refusals_of(make, x):
    model = make()
    before = snapshot(model)
    fused = fxfuse.fuse(model)
    assert_untouched(before, model)
    report = fxfuse.report(fused)
    assert not report.folded and report == fxfuse.explain(model)
    if x is not None:
        torch.testing.assert_close(fused(x), model(x), rtol=0, atol=0, equal_nan=True)
    return report.refused


@pytest.mark.parametrize("code", MODELS, ids=lambda code: code.name)
def test_code_is_the_only_one_and_the_output_is_bit_identical(code):
    (refusal,) = refusals_of(*MODELS[code])
    assert refusal.code == code.value.code
    assert refusal.reason.startswith(code.value.reason) and refusal.hint == code.value.hint


@pytest.mark.parametrize("code", BEHIND_ANOTHER, ids=lambda code: code.name)
def test_code_of_a_norm_behind_another_norm_comes_with_that_of_the_other(code):
    other, refusal = refusals_of(*BEHIND_ANOTHER[code])
    assert (other.code, refusal.code) == (Code.OPAQUE_PRODUCER.value.code, code.value.code)
    assert refusal.reason == f"{code.value.reason}: {other.norm}"


@pytest.mark.parametrize("code", MODELS, ids=lambda code: code.name)
def test_refusal_names_the_norm(code):
    (refusal,) = refusals_of(*MODELS[code])
    assert refusal.norm in {"1", "norm", "0.1"}


@pytest.mark.parametrize(
    "code", [Code.OTHER_USERS, Code.OPERATOR_HOOKS, Code.OPERATOR_COMPUTED, Code.CHANNELS]
)
def test_refusal_names_what_stands_in_the_way(code):
    (refusal,) = refusals_of(*MODELS[code])
    offender = {Code.OTHER_USERS: "conv -> output", Code.CHANNELS: "5 after 4 of 0"}.get(code, ": 0")
    assert offender in refusal.reason


def test_codes_are_unique_and_sorted():
    codes = [code.value.code for code in Code]
    assert codes == sorted(set(codes))


def test_example_inputs_settle_an_unknown_rank():
    make, x = MODELS[Code.RANK_UNKNOWN]
    model = make()
    on_three, on_two = (fxfuse.explain(model, example_inputs=(inputs,)) for inputs in (x, x[0]))
    assert [refusal.code for refusal in on_three.refused] == [Code.AXIS.value.code]
    assert len(on_two.folded) == 1


def test_refusal_in_a_larger_model_keeps_no_other_norm_from_folding():
    model = randomise(
        nn.Sequential(nn.BatchNorm2d(3), pair(), nn.ReLU(), nn.BatchNorm2d(4), pair(nn.Conv2d(4, 4, 1)))
    )
    report = fxfuse.explain(model)
    assert [fold.norm for fold in report.folded] == ["1.1", "4.1"]
    assert {refusal.norm: refusal.code for refusal in report.refused} == {"0": "FXF103", "3": "FXF102"}
