"""A program is held against a float64 run of what it was made of, and may round about as much as that."""

import math

import pytest
import torch
from torch import nn

from fxfuse.lowering.numbers import same_numbers
from tests.test_comparison import IMAGE, Changed, network


def test_a_program_and_what_it_is_compared_with_run_under_the_flags_of_the_user():
    model, seen = network(), []

    def noting(*inputs):
        seen.append(torch.backends.cudnn.allow_tf32)
        return model(*inputs)

    for allowed in (True, False):
        with torch.backends.cudnn.flags(allow_tf32=allowed):
            assert same_numbers(model, noting, (IMAGE,), noting).ok
        assert seen == [allowed, allowed]
        seen.clear()


SIGNS = torch.randn(2, 4, 12, 12, generator=torch.Generator().manual_seed(0)).sign()


def off(y, share):
    """With an error that is so large a share of it, in norm."""
    return y if y.dtype is torch.float64 else y + share * y.norm() / SIGNS.norm() * SIGNS


class Rounding(nn.Module):
    """Rounds so much on oneDNN's kernels, and so much on others."""

    def __init__(self, on, without):
        super().__init__()
        self.model, self.on, self.without = network(), on, without

    def forward(self, x):
        if torch._C._get_mkldnn_enabled():
            return off(self.model(x), self.on)
        if math.isnan(self.without):
            raise NotImplementedError("only with oneDNN")
        return off(self.model(x), self.without)


@pytest.mark.parametrize(
    ("without", "error", "expected"),
    [
        (3e-4, 3.5e-4, 1e-4),  # the first run is enough
        (3e-4, 9e-4, 3e-4),
        (3e-4, 13e-4, None),
        (9e-4, 13e-4, None),  # the second run would not be right itself
        (math.inf, 9e-4, None),
        (math.nan, 9e-4, None),
    ],
)
def test_a_second_run_tells_how_much_rounding_varies(without, error, expected):
    model = Rounding(1e-4, without).eval()
    found = same_numbers(model, lambda x: off(model.model(x), error), (IMAGE,))
    assert found.ok == (expected is not None) and found.conclusive
    assert found.reference_error == pytest.approx(expected or 1e-4, rel=0.02)
    assert found.candidate_error == pytest.approx(error, rel=0.02)
    assert any("second run" in note for note in found.notes) == (expected == 3e-4)
    assert torch._C._get_mkldnn_enabled()


def test_what_computes_in_another_dtype_is_held_against_one_run():
    model = Rounding(1e-4, 3e-4).eval()
    other = Changed(model, lambda y: y)
    assert not same_numbers(model, lambda x: off(model.model(x), 9e-4), (IMAGE,), other).ok
