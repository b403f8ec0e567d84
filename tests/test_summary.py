"""What is counted of a model, against numbers worked out by hand."""

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse.summary import summarised
from tests.forms import EXPORT_WARNING
from tests.support import assert_untouched, randomise, snapshot


def network():
    return randomise(
        nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    ).float()


X = torch.randn(2, 3, 8, 8)
CONVOLUTION = 2 * (3 * 3 * 3) * (2 * 4 * 6 * 6)
NORM = 2 * (2 * 4 * 6 * 6)


def test_operators_and_norms_are_counted_before_and_after():
    model = network()
    before, after = summarised(model, (X,)), summarised(fxfuse.fuse(model), (X,))
    assert (before.norms, after.norms) == (2, 1)
    assert (before.flops, after.flops) == (CONVOLUTION + 2 * NORM, CONVOLUTION + NORM)
    assert (before.parameters, after.parameters) == (3 * 4 * 9 + 4 + 16, 3 * 4 * 9 + 4 + 8)
    # Floats: parameters and statistics. Integers: num_batches_tracked of each norm.
    assert before.mebibytes == (4 * (before.parameters + 16) + 2 * 8) / 2**20
    assert after.mebibytes == (4 * (after.parameters + 8) + 8) / 2**20


@pytest.mark.filterwarnings(EXPORT_WARNING)
@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_counts_as_its_module(decomposed):
    program = torch.export.export(network(), (X,))
    program = program.run_decompositions() if decomposed else program
    assert summarised(program, (X,)) == summarised(network(), (X,))
    folded, module = summarised(fxfuse.fuse(program), (X,)), summarised(fxfuse.fuse(network()), (X,))
    assert (folded.norms, folded.flops, folded.parameters) == (1, module.flops, module.parameters)


def test_without_inputs_nothing_is_said_of_a_run():
    summary = summarised(network(), None)
    assert summary.norms is None and summary.flops is None and summary.parameters == 128


def test_a_tensor_of_two_names_counts_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False)).eval()
    model[1].weight = model[0].weight
    assert summarised(model, None).parameters == 9


def test_counting_changes_neither_the_model_nor_the_inputs():
    class Counting(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()))

        def forward(self, x):
            self.calls += 1
            return x.add_(self.calls)

    model, x = Counting().eval(), torch.zeros(3)
    before = snapshot(model)
    summarised(model, (x,))
    assert_untouched(before, model)
    assert not x.any()
