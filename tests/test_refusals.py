"""Each refusal code is provoked by one small model, and by nothing else in it."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse.capture import capture
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
    return torch.native_batch_norm(m.conv(x), *tensors, False, 0.1, norm.eps)[:2]


def computed(m, x):
    return F.batch_norm(m.conv(x), m.norm.running_mean, m.norm.running_var + x.square().mean())


def hooked(module):
    module.register_forward_hook(lambda _module, _inputs, output: output + 1)


def untraceable(forward):
    """The pair in a module of which only the class's forward can be read."""
    model = type("Untraceable", (nn.Module,), {"forward": forward})()
    model.conv, model.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
    return randomise(model)


def branching(self, x):
    y = self.conv(x)
    return self.norm(y) if y.sum() > 1e9 else self.norm(-y)


def handing_on(self, x):
    return apply(self.norm, self.conv(x)) if x.sum() > -1e9 else x


def apply(module, x):
    return module(x)


def transposed_and_viewed(m, x):
    return m.norm(m.conv(x).permute(0, 1, 3, 2)).view(x.shape[0], -1)


def called_twice(m, x):
    return m.norm(m.conv(x)) * m.conv(x + 1)


def called_as_a_function(m, x):
    return m.norm(F.conv2d(x, m.conv.weight))


def beside(m, x):
    x = m.conv(x).relu()
    return m.norm(x) + m.last(x)


class WithOption(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x, rectify=False):
        y = self.conv(x)
        return self.norm(y.relu() if rectify else y).relu()


def small(factor):
    model = nn.Sequential(nn.Conv2d(3, 4, 3, bias=False), nn.BatchNorm2d(4))
    return changed(model.eval().half(), lambda m: (m[1].weight.fill_(factor), m[1].running_var.fill_(1.0)))


class WithMethod(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def features(self, x):
        return self.conv(x)

    def forward(self, x):
        return self.norm(self.features(x))


# For each code a model and an input. FXF106 is what a model that does not run is told.
MODELS = {
    Code.OTHER_USERS: (lambda: written(used_elsewhere), X),
    Code.OPAQUE_PRODUCER: (lambda: written(lambda m, x: m.norm(m.conv(x).relu())), X),
    Code.NOTHING_BEFORE: (lambda: pair(nn.Identity(), nn.BatchNorm2d(3)), X),
    Code.AXIS: (lambda: pair(nn.Linear(6, 3), nn.BatchNorm2d(3)), X),
    Code.RANK_UNKNOWN: (lambda: pair(nn.Linear(4, 3), nn.BatchNorm1d(3)), noise(2, 3, 4)),
    Code.CHANNELS: (lambda: pair(norm=nn.BatchNorm2d(5)), None),
    Code.MIXED: (lambda: pair(nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten()), nn.BatchNorm1d(64)), X),
    Code.BATCH_STATISTICS: (lambda: pair(norm=nn.BatchNorm2d(4, track_running_stats=False)), X),
    Code.NORM_TRAINING: (lambda: changed(pair(), lambda m: m[1].train()), X),
    Code.NORM_HOOKS: (lambda: changed(pair(), lambda m: hooked(m[1])), X),
    Code.NORM_OWN_FORWARD: (lambda: pair(norm=OwnNorm(4)), X),
    Code.NORM_COMPUTED: (lambda: written(computed), X),
    Code.STATE_MUTATED: (lambda: written(written_to), X),
    Code.TUPLE_OUTPUT: (lambda: written(native), X),
    Code.INSIDE_OPAQUE: (lambda: changed(nn.Sequential(pair()).eval(), lambda m: hooked(m[0])), X),
    Code.UNTRACED: (lambda: untraceable(branching), X),
    Code.EXPOSED: (lambda: untraceable(handing_on), X),
    Code.OPERATOR_HOOKS: (lambda: changed(pair(), lambda m: hooked(m[0])), X),
    Code.OPERATOR_OWN_FORWARD: (lambda: pair(OwnConv(3, 4, 3)), X),
    Code.OPERATOR_COMPUTED: (
        lambda: written(lambda m, x: m.norm(F.conv2d(x, m.conv.weight * x.mean()))),
        X,
    ),
    Code.OPERATOR_TRAINING: (lambda: changed(pair(), lambda m: m[0].train()), X),
    Code.PADDING: (lambda: randomise(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1))), X),
    Code.NEGATIVE_SCALE: (lambda: pair(nn.Sequential(nn.Conv2d(3, 4, 3), nn.MaxPool2d(2))), X),
    Code.OVERFLOW: (lambda: changed(pair(), lambda m: m[1].running_mean.fill_(torch.inf)), X),
    Code.UNDERFLOW: (lambda: small(1e-7), X.half()),
}
# This one takes a second norm, which is refused for a reason of its own.
BEHIND_ANOTHER = {
    Code.NORM_BEFORE_LEFT: (lambda: pair(pair(nn.ReLU(), nn.BatchNorm2d(3)), nn.BatchNorm2d(3)), X)
}
# These take keep_modules=True; a graph folds the norm.
KEPT = {
    Code.LAYOUT: (lambda: written(transposed_and_viewed), X),
    Code.SHARED: (lambda: written(called_twice), X),
    Code.NO_MODULE: (lambda: written(called_as_a_function), X),
    Code.OPTIONS: (lambda: randomise(WithOption()), X),
    Code.METHODS: (lambda: randomise(WithMethod()), X),
    Code.KEPT_BRANCHES: (lambda: written(beside, last=nn.Conv2d(4, 4, 1)), X),
}


# These arise in the graphs of compilers only: tests/test_program.py, tests/test_backend.py.
COMPILED = {Code.RESHAPED, Code.GRADIENTS, Code.PRESERVED}


def test_every_code_is_provoked():
    elsewhere = {Code.CHECK, Code.ASKED}  # test_check.py, test_leave.py
    branches = {code for code in Code if code.value.code.startswith("FXF7")}  # test_branches.py
    assert {*MODELS, *BEHIND_ANOTHER, *KEPT, *COMPILED} == set(Code) - elsewhere - branches


def refusals_of(make, x, *, keep_modules=False):
    model = make()
    before = snapshot(model)
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    assert_untouched(before, model)
    report = fxfuse.report(fused)
    assert not report.folded and report == fxfuse.explain(model, keep_modules=keep_modules)
    if x is not None:
        torch.testing.assert_close(fused(x), model(x), rtol=0, atol=0, equal_nan=True)
    return report.refused


@pytest.mark.parametrize("code", MODELS, ids=lambda code: code.name)
def test_code_is_the_only_one_and_the_output_is_bit_identical(code):
    (refusal,) = refusals_of(*MODELS[code])
    assert refusal.code == code.value.code
    assert refusal.reason.startswith(code.value.reason) and refusal.hint == code.value.hint


@pytest.mark.parametrize("code", KEPT, ids=lambda code: code.name)
def test_code_of_a_norm_whose_modules_are_kept_is_the_only_one(code):
    make, x = KEPT[code]
    (refusal,) = refusals_of(make, x, keep_modules=True)
    assert (refusal.norm, refusal.code) == ("norm", code.value.code)
    assert refusal.reason.startswith(code.value.reason) and refusal.hint == code.value.hint


@pytest.mark.parametrize("code", KEPT, ids=lambda code: code.name)
def test_norm_that_is_left_where_modules_are_kept_is_folded_in_a_graph_of_one_choice(code):
    model = KEPT[code][0]()
    graph = capture(model).module().eval()
    assert len(fxfuse.explain(graph).folded) == 1


@pytest.mark.parametrize("code", BEHIND_ANOTHER, ids=lambda code: code.name)
def test_code_of_a_norm_behind_another_norm_comes_with_that_of_the_other(code):
    other, refusal = refusals_of(*BEHIND_ANOTHER[code])
    assert (other.code, refusal.code) == (Code.OPAQUE_PRODUCER.value.code, code.value.code)
    assert refusal.reason == f"{code.value.reason}: {other.norm}"


@pytest.mark.parametrize("code", MODELS, ids=lambda code: code.name)
def test_refusal_names_the_norm(code):
    (refusal,) = refusals_of(*MODELS[code])
    assert refusal.norm in {"1", "norm", "0.1"} or (code is Code.PADDING and refusal.norm == "0")


@pytest.mark.parametrize(
    ("code", "offender"),
    [
        *(
            (Code.OTHER_USERS, "conv -> output"),
            (Code.OPERATOR_HOOKS, ": 0"),
            (Code.OPERATOR_COMPUTED, ": mul"),
        ),
        *((Code.CHANNELS, "5 and 4 of 0"), (Code.MIXED, ": 0.0"), (Code.INSIDE_OPAQUE, ": 0 (Sequential)")),
        *((Code.UNTRACED, "norm (BatchNorm2d)"), (Code.EXPOSED, "apply(self.norm, ")),
        *((Code.PADDING, ": 1"), (Code.NEGATIVE_SCALE, ": 0.0")),
    ],
    ids=lambda value: getattr(value, "name", ""),
)
def test_refusal_names_what_stands_in_the_way(code, offender):
    (refusal,) = refusals_of(*MODELS[code])
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
        nn.Sequential(
            *(nn.BatchNorm2d(3), nn.Conv2d(3, 3, 1, padding=1), pair(), nn.ReLU()),
            *(nn.BatchNorm2d(4), nn.ReLU(), pair(nn.Conv2d(4, 4, 1))),
        )
    )
    report = fxfuse.explain(model)
    assert [fold.norm for fold in report.folded] == ["2.1", "6.1"]
    assert {refusal.norm: refusal.code for refusal in report.refused} == {"0": "FXF305", "4": "FXF102"}
