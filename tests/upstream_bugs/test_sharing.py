"""Folds that other tools make in place, under other users of the same conv, weight or value."""

import pytest
import torch.nn.functional as F
from torch import nn

import fxfuse
from tests.forms import EXPORT_WARNING, FORMS, Forward, check, functions, modules, noise
from tests.support import randomise

pytestmark = pytest.mark.filterwarnings(EXPORT_WARNING)
X = noise(2, 4, 6, 6)


def model_of(forward):
    return randomise(
        Forward(
            forward,
            conv=nn.Conv2d(4, 4, 3, padding=1),
            other=nn.Conv2d(4, 4, 3, padding=1, bias=False),
            norm=nn.BatchNorm2d(4),
            second=nn.BatchNorm2d(4, eps=0.1),
        )
    )


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.norm(m.conv(x)) + m.conv(x),
        lambda m, x: m.conv(x) * m.norm(m.conv(x.relu())),
        lambda m, x: m.conv(m.norm(m.conv(x))),
        lambda m, x: m.norm(m.conv(m.conv(x))),
    ],
)
def test_conv_used_twice_with_a_norm_after_one_use(forward, form):
    """torch.fx's fuse (pytorch #104593, #197539), fuse_fx, torchao: the bare use was scaled too."""
    check(form(model_of(forward), X), X, folded=1)


@pytest.mark.parametrize("form", FORMS)
def test_one_conv_with_two_different_norms(form):
    """torch.fx's fuse, fuse_fx, torchao: both norms were folded into the one weight."""
    check(form(model_of(lambda m, x: m.norm(m.conv(x)) - m.second(m.conv(x))), X), X, folded=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("times", [2, 4])
def test_same_conv_and_norm_in_series(times, form):
    """torch.fx's fuse: the norm was folded once for each call, all into the one weight."""

    def forward(m, x):
        for _ in range(times):
            x = m.norm(m.conv(x))
        return x

    check(form(model_of(forward), X), X, folded=times)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("shared", ["conv", "norm"])
def test_same_module_under_two_attribute_names(shared, form):
    """torch.fx's fuse: modules are replaced by name, so that the other name kept or lost the fold."""

    def forward(m, x):
        return m.norm(m.conv(x)) + m.second(m.other(x + 1)) + m.other(x)

    model = model_of(forward)
    setattr(model, {"conv": "other", "norm": "second"}[shared], getattr(model, shared))
    check(form(model, X), X, folded=2)


@pytest.mark.parametrize("form", [FORMS[0], *FORMS[2:]])
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight, m.conv.bias, padding=1),
        lambda m, x: (m.norm(m.conv(x)), m.conv.weight.square().sum(), m.norm.running_var.sqrt()),
        lambda m, x: m.norm(m.conv(x)) * m.conv.bias.view(-1, 1, 1) + m.norm.weight.view(-1, 1, 1),
    ],
)
def test_weight_of_the_conv_is_read_in_forward(forward, form):
    """torch.fx's fuse, torchao: what was read had become the folded weight."""
    check(form(model_of(forward), X), X, folded=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("parts", [("weight",), ("bias",), ("weight", "bias")])
def test_tied_weight(parts, form):
    """torch.fx's fuse, torchao: the conv that the weight is tied to was scaled too."""
    model = model_of(lambda m, x: m.norm(m.conv(x)) + m.other(x))
    for part in parts:
        setattr(model.other, part, getattr(model.conv, part))
    check(form(model, X), X, folded=1)


@pytest.mark.parametrize("register", ["register_forward_hook", "register_forward_pre_hook"])
@pytest.mark.parametrize(("hooked", "code"), [("conv", "FXF301"), ("norm", "FXF203")])
def test_forward_hook(hooked, code, register):
    """torch.fx's fuse: a hook on the conv saw the folded output, one on the norm ran no more."""

    def hook(_module, inputs, output=None):
        return (inputs[0] + 1,) if output is None else output + 1

    model = model_of(lambda m, x: m.norm(m.conv(x)) + m.second(m.other(x)))
    getattr(getattr(model, hooked), register)(hook)
    check(model, X, folded=1, left=[code])


@pytest.mark.parametrize("form", [modules, functions])
@pytest.mark.parametrize(
    "use", [lambda m, y: y, lambda m, y: y.relu(), lambda m, y: m.other(y), lambda m, y: m.second(y)]
)
def test_output_of_the_conv_has_two_consumers(use, form):
    """torchao, torch.ao's fuse_modules: the second consumer was given the normalised value."""

    def forward(m, x):
        y = m.conv(x)
        return m.norm(y), use(m, y)

    fused = fxfuse.fuse(form(model_of(forward)))
    refusals = ["FXF101"] * fxfuse.report(fused).norms
    check(form(model_of(forward)), X, left=refusals)
