"""Scenarios 1-11: one linear operator, one norm behind it."""

import copy

import pytest
import torch
from torch import nn

import fxfuse
from tests.forms import (
    CONVS,
    EXPORT_WARNING,
    FORMS,
    NORMS,
    TRANSPOSED,
    check,
    exported,
    functions,
    modules,
    noise,
)
from tests.support import randomise

pytestmark = pytest.mark.filterwarnings(EXPORT_WARNING)
WRITTEN = (modules, functions)


def image(dims, channels, size=6):
    return noise(2, channels, *(size + axis for axis in range(dims)))


def conv_norm(conv, dims=2, **options):
    return randomise(nn.Sequential(copy.deepcopy(conv), NORMS[dims](channels_of(conv), **options)))


def channels_of(operator):
    return getattr(operator, "out_channels", None) or operator.out_features


# 1
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_conv_of_any_dimension_absorbs_a_norm(dims, bias, form):
    model, x = conv_norm(CONVS[dims](4, 5, 3, bias=bias), dims), image(dims, 4)
    check(form(model, x), x, folded=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("kind", [nn.Conv2d, nn.ConvTranspose2d, nn.Linear])
def test_bias_appears_as_a_parameter_with_dtype_and_device_of_the_weight(kind, bias, dtype):
    if kind is nn.Linear:
        model = nn.Sequential(nn.Flatten(), nn.Linear(4, 5, bias=bias), nn.BatchNorm1d(5))
    else:
        model = nn.Sequential(nn.Identity(), kind(4, 5, 3, bias=bias), nn.BatchNorm2d(5))
    fused = fxfuse.fuse(randomise(model).to(dtype))
    assert [(fold.norm, fold.into) for fold in fxfuse.report(fused).folded] == [("2", ("1",))]
    weight, new = fused.get_parameter("1.weight"), fused.get_parameter("1.bias")
    assert isinstance(new, nn.Parameter) and new.shape == (5,)
    assert (new.dtype, new.device) == (weight.dtype, weight.device) == (dtype, torch.device("cpu"))


# 2
@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    "options",
    [
        {"stride": 2},
        {"stride": (1, 2), "padding": (2, 0)},
        {"dilation": 2},
        {"dilation": (1, 2), "padding": 1, "stride": 2},
        {"padding": "same"},
        {"padding": "same", "dilation": 2},
        {"padding": "valid"},
        *({"padding": 1, "padding_mode": mode} for mode in ("zeros", "reflect", "replicate", "circular")),
        *({"padding": "same", "padding_mode": mode} for mode in ("reflect", "circular")),
        {"padding": (2, 0), "padding_mode": "replicate", "stride": 2},
    ],
    ids=str,
)
def test_geometry_of_a_conv_survives(options, form):
    check(form(conv_norm(nn.Conv2d(3, 4, 3, **options), eps=1e-3)), noise(2, 3, 7, 6), folded=1)


@pytest.mark.parametrize("padding", ["same", "valid", 1])
@pytest.mark.parametrize("dims", [1, 3])
def test_geometry_of_an_exported_conv_survives(dims, padding):
    x = image(dims, 2)
    check(exported(conv_norm(CONVS[dims](2, 3, 3, padding=padding), dims), x), x, folded=1)


# 3
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("ins", "outs", "groups"), [(4, 6, 2), (6, 4, 2), (4, 4, 4), (3, 6, 3), (6, 9, 3), (4, 4, 2)]
)
def test_groups_of_a_conv_are_respected(ins, outs, groups, form):
    x = noise(2, ins, 6, 5)
    check(form(conv_norm(nn.Conv2d(ins, outs, 3, groups=groups)), x), x, folded=1)


# 4
@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("channels", [(3, 5), (4, 4)])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_transposed_conv_of_any_dimension_is_scaled_along_its_output_axis(dims, channels, form):
    operator = TRANSPOSED[dims](*channels, 3, stride=2, padding=1, output_padding=1)
    check(form(conv_norm(operator, dims)), image(dims, channels[0], 4), folded=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("ins", "outs", "groups", "kernel"),
    [
        *((4, 4, 2, 3), (4, 6, 2, 3), (6, 9, 3, 3), (8, 4, 4, 3), (4, 4, 4, 3), (4, 8, 4, 3)),
        *((3, 5, 1, (5, 1)), (4, 4, 1, (5, 1)), (4, 4, 2, (1, 5)), (4, 4, 1, 1), (1, 4, 1, 3), (4, 1, 1, 3)),
    ],
)
def test_groups_of_a_transposed_conv_are_respected(ins, outs, groups, kernel, form):
    x = noise(2, ins, 4, 5)
    check(form(conv_norm(nn.ConvTranspose2d(ins, outs, kernel, groups=groups)), x), x, folded=1)


@pytest.mark.parametrize("options", [{"dilation": 2}, {"stride": (2, 3), "output_padding": (1, 2)}], ids=str)
def test_geometry_of_a_transposed_conv_survives(options):
    check(
        conv_norm(nn.ConvTranspose2d(4, 4, 3, groups=2, bias=False, **options)), noise(2, 4, 4, 5), folded=1
    )


# 5
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("features", [(4, 5), (4, 4)])
def test_linear_absorbs_a_norm_over_its_features(features, bias, form):
    model, x = conv_norm(nn.Linear(*features, bias=bias), 1), noise(4, features[0])
    check(form(model, x), x, folded=1, example_inputs=(x,))


@pytest.mark.parametrize("form", WRITTEN)
def test_linear_after_flatten_needs_no_example_inputs(form):
    model = randomise(nn.Sequential(nn.Flatten(), nn.Linear(8, 4), nn.BatchNorm1d(4)))
    check(form(model), noise(4, 2, 4), folded=1)


@pytest.mark.parametrize("form", WRITTEN)
def test_linear_whose_input_may_have_three_axes_is_left(form):
    check(form(conv_norm(nn.Linear(4, 4), 1)), noise(3, 4), left=["FXF105"])


# 6
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("known", [True, False])
@pytest.mark.parametrize("length", [4, 5])
def test_norm_over_the_middle_axis_of_a_linear_output_is_left(length, known, form):
    model, x = randomise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(length))), noise(2, length, 3)
    model = form(model, x)
    # An export knows the number of axes; and five channels are on the axis of four features in no case.
    certain = known or form is exported or length != 4
    check(model, x, left=["FXF104" if certain else "FXF105"], example_inputs=(x,) if known else None)


@pytest.mark.parametrize("form", WRITTEN)
def test_linear_folded_on_two_axes_rejects_three_instead_of_being_wrong(form):
    model, x = conv_norm(nn.Linear(4, 4), 1), noise(2, 4)
    fused = check(form(model), x, folded=1, example_inputs=(x,))
    with pytest.raises(AssertionError, match="2 axes"):
        fused(noise(2, 4, 4))


# 7
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(("outs", "channels"), [(4, 4), (5, 4), (1, 1), (4, 1), (1, 4)])
def test_norm_over_images_after_a_linear_layer_is_left(outs, channels, form):
    x = noise(2, channels, 4, 3)
    model = form(randomise(nn.Sequential(nn.Linear(3, outs), nn.BatchNorm2d(channels))), x)
    check(model, x, left=["FXF104"], example_inputs=(x,))


# 8
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("without", ["affine", "bias", "momentum", "weight"])
@pytest.mark.parametrize("operator", [nn.Conv2d(3, 4, 3), nn.Conv2d(3, 4, 3, bias=False), nn.Linear(3, 4)])
def test_norm_without_some_of_its_parts_is_folded(operator, without, form):
    dims = 1 if isinstance(operator, nn.Linear) else 2
    model = conv_norm(
        operator, dims, affine=without != "affine", momentum=None if without == "momentum" else 0.1
    )
    if without in ("bias", "weight"):
        setattr(model[1], without, None)
    x = noise(2, 3) if dims == 1 else noise(2, 3, 5, 5)
    check(form(model, x), x, folded=1, example_inputs=(x,))


# 9
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operator", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3)])
def test_norm_by_the_statistics_of_the_batch_is_left(operator, form):
    x = noise(2, 3, 5, 5)
    model = conv_norm(operator, track_running_stats=False)
    check(form(model, x), x, left=["FXF201"])


def test_norm_in_train_mode_after_a_conv_in_eval_mode_is_left():
    model = conv_norm(nn.Conv2d(3, 4, 3))
    model[1].train()
    check(model, noise(2, 3, 5, 5), left=["FXF202"])


def test_conv_in_train_mode_before_a_norm_in_eval_mode_is_left():
    model = conv_norm(nn.Conv2d(3, 4, 3))
    model[0].train()
    check(model, noise(2, 3, 5, 5), left=["FXF304"])


# 10
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("variance", [1e-7, 0.0, 1e7])
@pytest.mark.parametrize("eps", [1e-5, 1e-3, 1e-1])
def test_eps_counts_also_where_the_variance_is_tiny_or_zero(eps, variance, form):
    model, x = conv_norm(nn.Conv2d(3, 4, 3), eps=eps), noise(2, 3, 5, 5)
    model[1].running_var[1:3] = variance
    check(form(model, x), x, folded=1)


@pytest.mark.parametrize("form", FORMS)
def test_variance_and_eps_of_zero_are_left_for_overflow(form):
    model, x = conv_norm(nn.Conv2d(3, 4, 3), eps=0.0), noise(2, 3, 5, 5)
    model[1].running_var[2] = 0.0
    model = form(model, x)
    fused = fxfuse.fuse(model)
    assert [refusal.code for refusal in fxfuse.report(fused).refused] == ["FXF401"]
    assert torch.equal(model(x).nan_to_num(), fused(x).nan_to_num())


# 11
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operator", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.Linear(3, 4)])
def test_bias_that_dominates_is_scaled_too(operator, form):
    dims = 1 if isinstance(operator, nn.Linear) else 2
    model, x = conv_norm(operator, dims), noise(2, 3) if dims == 1 else noise(2, 3, 5, 5)
    with torch.no_grad():
        model[0].bias.mul_(1e3)
    check(form(model, x), x, folded=1, example_inputs=(x,))
