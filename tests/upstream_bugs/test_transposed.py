"""Transposed convs: the output channels are on another axis of the weight, and groups divide it otherwise."""

import pytest
from torch import nn

from tests.forms import EXPORT_WARNING, FORMS, NORMS, TRANSPOSED, check, noise
from tests.support import randomise

pytestmark = pytest.mark.filterwarnings(EXPORT_WARNING)


def folded(form, dims, ins, outs, **options):
    model = randomise(nn.Sequential(TRANSPOSED[dims](ins, outs, 3, **options), NORMS[dims](outs)))
    x = noise(2, ins, *(3, 4, 5)[:dims])
    check(form(model, x), x, folded=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dims", [1, 2, 3])
def test_in_channels_equal_to_out_channels(dims, bias, form):
    """Inductor with freezing: the weight was scaled along its first axis, that of the input channels."""
    folded(form, dims, 4, 4, bias=bias, stride=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("ins", "outs", "groups"), [(6, 9, 3), (8, 4, 4), (9, 6, 3), (4, 4, 2), (4, 4, 4), (2, 6, 2), (6, 2, 2)]
)
@pytest.mark.parametrize("dims", [1, 2])
def test_groups(dims, ins, outs, groups, form):
    """Sony's Model Compression Toolkit and coremltools are wrong, pytorch #180995 crashes."""
    folded(form, dims, ins, outs, groups=groups)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norms", [2, 3])
def test_groups_and_several_norms(norms, form):
    layers = [nn.ConvTranspose2d(6, 9, 2, groups=3), *(nn.BatchNorm2d(9) for _ in range(norms))]
    x = noise(2, 6, 3, 4)
    check(form(randomise(nn.Sequential(*layers)), x), x, folded=norms)
