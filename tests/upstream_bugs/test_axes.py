"""Folds along an axis that only has the size of the channels, and norms that pad or concat comes between."""

import pytest
import torch
from torch import nn

import fxfuse
from tests.forms import EXPORT_WARNING, FORMS, Forward, check, exported, functions, modules, noise, traced
from tests.support import assert_exact, randomise

pytestmark = pytest.mark.filterwarnings(EXPORT_WARNING)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("size", [2, 4])
def test_linear_then_norm_on_three_axes_of_coincident_size(size, known, form):
    """torch.fx's fuse, fuse_fx, torch.jit.freeze: on (N, C, L) a norm works on axis 1, linear on the last."""
    x = noise(3, size, 5)
    model = form(randomise(nn.Sequential(nn.Linear(5, size), nn.BatchNorm1d(size))), x)
    certain = known or form is exported  # an export knows the number of axes
    check(model, x, left=["FXF104" if certain else "FXF105"], example_inputs=(x,) if known else None)


def test_linear_folded_for_two_axes_is_an_error_on_three_and_not_wrong():
    model, x = randomise(nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4))), noise(3, 4)
    fused = check(model, x, folded=2, example_inputs=(x,))
    with pytest.raises(AssertionError, match="2 axes"):
        fused(noise(3, 4, 4))


@pytest.mark.parametrize("dims", [1, 2])
def test_conv_without_a_batch_then_norm_on_axes_of_coincident_size(dims):
    """The same mistake for a conv, whose output lacks the batch axis that the norm takes for granted."""
    conv = (nn.Conv1d, nn.Conv2d)[dims - 1](3, 4, 1)
    model, x = randomise(nn.Sequential(conv, nn.BatchNorm1d(4))), noise(3, *(4, 5)[:dims])
    aware = fxfuse.fuse(model, example_inputs=(x,))
    assert [refusal.code for refusal in fxfuse.report(aware).refused] == ["FXF104"]
    assert torch.equal(model(x), aware(x))
    unaware = fxfuse.fuse(model)
    if dims == 1:
        with pytest.raises(AssertionError, match="3 axes"):
            unaware(x)
    else:
        assert_exact(model(x), unaware(x))


MULTIPLICATIONS = [lambda m, x: x @ m.linear.weight, lambda m, x: m.linear(x)]


def multiplied(multiply, between):
    layers = {"linear": nn.Linear(3, 3, bias=False), "norm": nn.BatchNorm1d(3)}
    return randomise(Forward(lambda m, x: m.norm(between(multiply(m, x))), **layers))


@pytest.mark.parametrize("form", [modules, traced, exported])
@pytest.mark.parametrize(
    ("between", "codes"),
    [
        *(
            (lambda y: y.reshape(3, 3, 3), ["FXF108"] * 2),
            (lambda y: y.view(9, 3).view(3, 3, 3), ["FXF108"] * 2),
        ),
        *(
            (lambda y: y.permute(2, 1, 0), ["FXF102", "FXF104"]),
            (lambda y: y.transpose(1, 2).transpose(1, 2), ["FXF102", "FXF104"]),
        ),
    ],
)
@pytest.mark.parametrize("place", [0, 1])
def test_matmul_then_reshape_or_transpose_then_norm_of_coincident_size(place, between, codes, form):
    """ONNX Runtime's MatMul + BatchNormalization fusion."""
    x = noise(3, 3, 3)
    model = form(multiplied(MULTIPLICATIONS[place], between), x)
    check(model, x, left=[codes[place]], example_inputs=(x,))


@pytest.mark.parametrize("form", [modules, traced, exported])
@pytest.mark.parametrize("between", [lambda y: y.transpose(1, 2), lambda y: y.permute(0, 2, 1)])
@pytest.mark.parametrize(("place", "left"), [(0, ["FXF102"]), (1, [])])
def test_transpose_that_moves_the_features_to_the_norms_axis(place, left, between, form):
    """The same fusion; here the axes agree, and on another number of axes the model is an error."""
    x = noise(3, 3, 3)
    model = form(multiplied(MULTIPLICATIONS[place], between), x)
    check(model, x, folded=1 - len(left), left=left, example_inputs=(x,))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("mode", "left"), [("zeros", ["FXF305"]), ("reflect", []), ("replicate", []), ("circular", [])]
)
@pytest.mark.parametrize("kernel", [1, 3])
def test_norm_then_conv_with_padding_keeps_the_border(kernel, mode, left, form):
    """Sony's Model Compression Toolkit: the padding was of normalised zeros."""
    x = noise(2, 3, 5, 4)
    model = randomise(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, kernel, padding=1, padding_mode=mode)))
    check(form(model, x), x, folded=1 - len(left), left=left, example_inputs=(x,))


@pytest.mark.parametrize("form", FORMS)
def test_norm_without_a_shift_then_conv_with_padding_is_folded(form):
    x = noise(2, 3, 5, 4)
    model = randomise(nn.Sequential(nn.BatchNorm2d(3), nn.Conv2d(3, 4, 3, padding=1)))
    model[0].bias, model[0].running_mean = None, torch.zeros_like(model[0].running_mean)
    check(form(model, x), x, folded=1, example_inputs=(x,))


@pytest.mark.parametrize("form", [modules, functions])
def test_norm_between_two_convs_goes_into_the_one_before_it(form):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 3, 1, padding=1))
    check(form(randomise(model)), noise(2, 3, 5, 4), folded=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("parts", "left"),
    [
        *(("conv, conv", []), ("conv, conv again", [])),
        *(("conv, input", ["FXF103"]), ("input, conv", ["FXF103"])),
    ],
)
def test_norm_after_a_concat_keeps_its_eps(parts, left, form):
    """Brevitas: the norm was split over the branches, and rebuilt with the default eps."""

    def forward(m, x):
        found = {
            "conv, conv": lambda: (m.a(x), m.b(x)),
            "conv, input": lambda: (m.a(x), x),
            "input, conv": lambda: (x, m.b(x)),
            "conv, conv again": lambda: (m.a(x), m.a(x + 1)),
        }[parts]()
        return m.norm(torch.cat(found, 1))

    x = noise(2, 3, 5, 4)
    layers = {"a": nn.Conv2d(3, 3, 1), "b": nn.Conv2d(3, 3, 1), "norm": nn.BatchNorm2d(6, eps=0.5)}
    model = form(randomise(Forward(forward, **layers)), x)
    check(model, x, folded=1 - len(left), left=left, example_inputs=(x,))
    check(model, x, folded=1 - len(left), left=left)


@pytest.mark.parametrize("form", [modules, functions])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 0.5])
def test_eps_is_that_of_the_norm(eps, form):
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, eps=eps)))
    model[1].running_var[1:] = 1e-4
    check(form(model), noise(2, 3, 5, 4), folded=1)


@pytest.mark.parametrize("form", [modules, functions])
def test_norm_is_paired_by_data_flow_and_not_by_order_of_registration(form):
    """mmcv: a conv and the norm registered after it were paired although an activation ran between them."""
    model = randomise(
        Forward(
            lambda m, x: m.norm2(m.conv1(m.norm1(m.conv2(x).relu()))),
            conv1=nn.Conv2d(3, 3, 1),
            norm1=nn.BatchNorm2d(3),
            conv2=nn.Conv2d(3, 3, 1),
            norm2=nn.BatchNorm2d(3),
        )
    )
    x = noise(2, 3, 5, 4)
    fused = check(form(model), x, folded=2, example_inputs=(x,))
    found = {fold.norm[:5]: (fold.into[0][:5], fold.direction) for fold in fxfuse.report(fused).folded}
    assert found == {"norm2": ("conv1", "backward"), "norm1": ("conv1", "forward")}
