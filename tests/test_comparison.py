"""The verifier tells rounding from error, says where, and knows when it could not have seen anything."""

import copy
import json
import math

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import Comparison, Report, zoo
from tests.support import randomise

IMAGE = torch.randn(2, 3, 12, 12)


def network(dtype=torch.float32):
    layers = [nn.Conv2d(3, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 4, 3, padding=1)]
    return randomise(nn.Sequential(*layers)).to(dtype)


class Changed(nn.Module):
    """`model`, with `change` applied to its output."""

    def __init__(self, model, change):
        super().__init__()
        self.model, self.change = model, change

    def forward(self, x):
        return self.change(self.model(x))


def changed(change, dtype=torch.float32):
    return Changed(network(dtype), change).eval()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_a_right_fold_passes_in_every_dtype(dtype):
    model = network(dtype)
    comparison = fxfuse.verify(model, fxfuse.fuse(model), (IMAGE.to(dtype),))
    assert comparison.ok and comparison.conclusive, comparison
    assert comparison.candidate_error < 4 * torch.finfo(dtype).eps + comparison.reference_error


def test_a_small_absolute_difference_on_a_large_value_is_rounding():
    class Constant(nn.Module):
        def __init__(self, value):
            super().__init__()
            self.register_buffer("value", torch.tensor([value], dtype=torch.float32))

        def forward(self, x):
            return self.value * x

    one = torch.ones(1)
    comparison = fxfuse.verify(Constant(13.6).eval(), Constant(13.6 + 3.8e-6).eval(), (one,))
    assert comparison.ok and 0 < comparison.max_abs < 5e-6, comparison
    assert comparison.max_rel < 4e-7


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e6])
def test_one_wrong_border_pixel_fails_whatever_the_magnitude(scale):
    def spoil(y):
        y = y.clone() * scale
        y[1, 2, 0, 5] += 1e-3 * y.abs().max()
        return y

    comparison = fxfuse.verify(changed(lambda y: y * scale), changed(spoil), (IMAGE,))
    assert not comparison.ok
    assert comparison.worst.index == (1, 2, 0, 5)
    assert "output[1, 2, 0, 5]" in str(comparison)
    with pytest.raises(fxfuse.VerificationError, match=r"output\[1, 2, 0, 5\]"):
        comparison.raise_if_failed()


def test_the_worst_output_is_named():
    nested = changed(lambda y: {"a": y, "b": [y, y]})
    spoilt = changed(lambda y: {"a": y, "b": [y, y + 1]})
    comparison = fxfuse.verify(nested, spoilt, (IMAGE,))
    assert not comparison.ok and comparison.worst.output == "['b'][1]"


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda y: (y, y), "other places"),
        (lambda y: y[:, :2], "another shape"),
        (lambda y: y.double(), "dtype"),
        (lambda y: 3, "another type"),
        (lambda y: y + torch.nan, "nan"),
        (lambda y: y.reshape(-1, 7, 5), "rejects"),
    ],
)
def test_outputs_that_cannot_be_compared_are_not_equal(change, said):
    comparison = fxfuse.verify(network(), changed(change), (IMAGE,))
    assert not comparison.ok and said in str(comparison)


def test_scalar_complex_and_empty_outputs_are_compared():
    for change in (torch.sum, lambda y: torch.complex(y, y), lambda y: (y, y[:0])):
        assert fxfuse.verify(changed(change), changed(change), (IMAGE,)).ok
    assert not fxfuse.verify(changed(torch.sum), changed(lambda y: y.sum() * 1.01), (IMAGE,)).ok
    spoilt = changed(lambda y: torch.complex(y, y * 1.01))
    assert not fxfuse.verify(changed(lambda y: torch.complex(y, y)), spoilt, (IMAGE,)).ok


def test_values_that_are_no_tensors_are_compared():
    assert fxfuse.verify(changed(lambda y: (y, 3)), changed(lambda y: (y, 3)), (IMAGE,)).ok
    assert not fxfuse.verify(changed(lambda y: (y, 3)), changed(lambda y: (y, 4)), (IMAGE,)).ok
    integers = changed(lambda y: (y * 100).long())
    assert fxfuse.verify(integers, integers, (IMAGE.double().float(),)).ok
    assert not fxfuse.verify(integers, changed(lambda y: (y * 100).long() + 1), (IMAGE,)).ok


@pytest.mark.parametrize(
    ("reference", "why"),
    [
        (lambda: nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).eval(), "initial statistics"),
        (lambda: changed(lambda y: y * 0), "zero everywhere"),
        (lambda: changed(lambda y: y / 0), "infinities"),
        (lambda: changed(lambda y: "no tensor"), "no tensors"),
    ],
)
def test_a_comparison_that_could_not_have_seen_a_mistake_is_not_conclusive(reference, why):
    model = reference()
    comparison = fxfuse.verify(model, copy.deepcopy(model), (IMAGE,))
    assert comparison.ok and not comparison.conclusive
    assert why in str(comparison)


def test_one_norm_with_statistics_of_its_own_makes_it_conclusive():
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.BatchNorm2d(4)).eval()
    model[2].running_mean.fill_(0.5)
    assert fxfuse.verify(model, fxfuse.fuse(model), (IMAGE,)).conclusive


def test_meta_models_are_not_checked_and_the_report_says_so():
    with torch.device("meta"):
        model = network()
        fused = fxfuse.fuse(model)
    assert len(fxfuse.report(fused).folded) == 1
    assert any("not checked" in note for note in fxfuse.report(fused).notes)
    comparison = fxfuse.verify(model, fused, (IMAGE.to("meta"),))
    assert comparison.ok and not comparison.conclusive and math.isnan(comparison.max_abs)


def test_a_reference_that_cannot_run_in_float64_is_compared_by_tolerance_alone():
    model = changed(lambda y: y @ torch.ones(12, 12))
    comparison = fxfuse.verify(model, copy.deepcopy(model), (IMAGE,))
    assert comparison.ok and math.isnan(comparison.reference_error)
    assert any("float64" in note for note in comparison.notes)


def test_a_reference_that_insists_on_its_dtype_is_compared_by_tolerance_alone():
    class Insists(nn.Module):
        def forward(self, x):
            assert x.dtype == torch.float32
            return x

    assert math.isnan(fxfuse.verify(Insists().eval(), Insists().eval(), (IMAGE,)).reference_error)


def test_example_inputs_are_copied_however_they_are_nested():
    class Writes(nn.Module):
        def forward(self, images):
            return images[0].mul_(2)

    image = IMAGE.clone()
    state = torch.get_rng_state()
    fxfuse.fuse(Writes().eval(), example_inputs=([image],))
    assert torch.equal(image, IMAGE) and torch.equal(state, torch.get_rng_state())


def test_outputs_that_are_zero_but_for_rounding_pass_and_prove_nothing():
    comparison = fxfuse.verify(changed(lambda y: y * 0), changed(lambda y: y * 1e-15), (IMAGE,))
    assert comparison.ok and not comparison.conclusive


def test_given_tolerances_replace_the_default_ones():
    model, other = network(), changed(lambda y: y * 1.01)
    assert not fxfuse.verify(model, other, (IMAGE,)).ok
    assert fxfuse.verify(model, other, (IMAGE,), rtol=0.02).ok
    assert not fxfuse.verify(model, fxfuse.fuse(model), (IMAGE,), rtol=0.0, atol=0.0).ok


def test_inputs_given_as_shapes_are_drawn_with_the_seed():
    model, other = network(), changed(lambda y: y + 1)
    first, second, third = (
        fxfuse.verify(model, other, [torch.Size((1, 3, 9, 9))], seed=seed) for seed in (0, 0, 1)
    )
    assert first == second != third


def test_random_numbers_inside_a_model_are_drawn_alike_and_the_generator_is_left_alone():
    noisy = changed(lambda y: y + torch.rand_like(y))
    state = torch.get_rng_state()
    assert fxfuse.verify(noisy, copy.deepcopy(noisy), (IMAGE,)).ok
    assert torch.equal(state, torch.get_rng_state())


def test_inputs_that_a_model_writes_to_are_copied():
    image = IMAGE.clone()
    model = Changed(network(), lambda y: y).eval()
    model.register_forward_pre_hook(lambda _, args: (args[0].mul_(2),))
    assert fxfuse.verify(model, copy.deepcopy(model), (image,)).ok
    assert torch.equal(image, IMAGE)


def test_comparison_and_report_survive_json():
    model = network()
    report = fxfuse.report(fxfuse.fuse(model, example_inputs=(IMAGE,)))
    assert isinstance(report.verification, Comparison)
    assert Report.from_dict(json.loads(report.to_json())) == report
    unmeasured = fxfuse.verify(model, changed(lambda y: 3), (IMAGE,))
    again = Comparison.from_dict(json.loads(json.dumps(unmeasured.to_dict(), allow_nan=False)))
    assert again.notes == unmeasured.notes and math.isnan(again.max_abs)


@pytest.mark.parametrize("name", ["torchvision:mobilenet_v2", "timm:regnety_002"])
def test_a_real_network_verifies(name):
    loaded = zoo.load(name)
    image = torch.randn(1, 3, 96, 96)
    report = fxfuse.report(fxfuse.fuse(loaded.model, example_inputs=(image,)))
    assert report.verification.ok and report.verification.conclusive
    assert not report.refused
