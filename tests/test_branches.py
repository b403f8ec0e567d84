"""Parallel linear branches, and some in a row, become one operator."""

from __future__ import annotations

import copy
import itertools
import operator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import event, given, reject
from hypothesis import strategies as st
from torch import Tensor, fx, nn

import fxfuse
from tests.forms import EXPORT_WARNING
from tests.strategies import SEEDS
from tests.support import assert_exact, assert_untouched, randomise, snapshot

OPERATORS = {
    *("convolution", "conv1d", "conv2d", "conv3d", "conv_transpose2d", "linear", "addmm"),
    *("Conv1d", "Conv2d", "Conv3d", "ConvTranspose2d", "Linear"),
}


class Branches(nn.Module):
    """The sum of what some modules make of relu(x)."""

    def __init__(self, *branches: nn.Module) -> None:
        super().__init__()
        self.branches = nn.ModuleList(branches)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(x)
        total = self.branches[0](x)
        for branch in self.branches[1:]:
            total = total + branch(x)
        return total


class Written(nn.Module):
    """relu(x), and then a function of it and some modules, by their names."""

    def __init__(self, function, **modules: nn.Module) -> None:
        super().__init__()
        self.function = function
        for name, module in modules.items():
            setattr(self, name, module)

    def forward(self, x: Tensor) -> Tensor:
        return self.function(self, F.relu(x))


def normed(*modules: nn.Module, channels: int = 8) -> nn.Sequential:
    return nn.Sequential(*modules, nn.BatchNorm2d(channels))


def repvgg(stride=1, groups=1, channels=8):
    conv = nn.Conv2d(channels, channels, 3, stride, 1, groups=groups, bias=False)
    point = nn.Conv2d(channels, channels, 1, stride, groups=groups, bias=False)
    identity = [nn.BatchNorm2d(channels)] if stride == 1 else []
    return Branches(normed(conv), normed(point), *identity)


def operators(fused: fx.GraphModule) -> int:
    """How many linear operators are called."""
    names = (
        type(fused.get_submodule(str(node.target))).__name__
        if node.op == "call_module"
        else getattr(node.target, "_opname", None) or getattr(node.target, "__name__", node.target)
        for node in fused.graph.nodes
        if node.op.startswith("call")
    )
    return sum(name in OPERATORS for name in names)


def sums(fused: fx.GraphModule) -> int:
    adding = {operator.add, operator.iadd, operator.sub, torch.add, torch.sub}
    return sum(node.target in adding for node in fused.graph.nodes)


def assert_merged(model, *inputs, left, merged=1, example_inputs=None):
    """Folds `model`: `left` operators are left, of which `merged` do what several did; on odd sizes too."""
    randomise(model)
    before = snapshot(model)
    fused = fxfuse.fuse(model, example_inputs=example_inputs)
    assert_untouched(before, model)
    report = fxfuse.report(fused)
    for x in inputs or (torch.randn(2, 8, 9, 7).double(), torch.randn(1, 8, 4, 5).double()):
        with torch.no_grad():
            assert_exact(copy.deepcopy(model)(x.clone()), fused(x.clone()))
    assert (operators(fused), len(report.merged)) == (left, merged), f"{report}\n{fused.graph}"
    assert len(report.refused) == 0, report
    assert left > 1 or not report.apart, report
    again = fxfuse.fuse(fused)
    assert len(fxfuse.report(again).merged) == 0
    assert all((each.error or 0.0) < 1e-12 for each in report.merged)
    return fused


# ---- scenario 56: the blocks of RepVGG ----------------------------------------------------------------


@pytest.mark.parametrize(("stride", "groups"), [(1, 1), (2, 1), (1, 2), (1, 8), (2, 4)])
def test_repvgg_block_becomes_one_convolution(stride, groups):
    model = repvgg(stride, groups)
    fused = assert_merged(model, left=1)
    assert len(fxfuse.report(fused).folded) == (3 if stride == 1 else 2)
    assert sums(fused) == 0
    norms = [fold for fold in fxfuse.report(fused).folded if fold.direction == "merged"]
    assert [fold.norm for fold in norms] == (["branches.2"] if stride == 1 else [])


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_branches_of_any_number_of_axes_become_one(dims):
    conv, norm = ((nn.Conv1d, nn.Conv2d, nn.Conv3d), (nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d))
    make, normal = conv[dims - 1], norm[dims - 1]
    model = Branches(
        nn.Sequential(make(6, 6, 3, padding=1), normal(6)), nn.Sequential(make(6, 6, 1), normal(6)), normal(6)
    )
    assert_merged(model, torch.randn(2, 6, *(7, 5, 6)[:dims]).double(), left=1)


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_order_of_the_branches_does_not_matter(order):
    branches = [
        normed(nn.Conv2d(8, 8, 5, padding=2, groups=2)),
        normed(nn.Conv2d(8, 8, 1, groups=4)),
        nn.BatchNorm2d(8),
        nn.Identity(),
    ]
    assert_merged(Branches(*(branches[place] for place in order)), left=1)


# ---- geometry ------------------------------------------------------------------------------------------


HELD = [
    ({"kernel_size": 3, "padding": 1}, {"kernel_size": 1}),
    ({"kernel_size": 5, "padding": 2}, {"kernel_size": 3, "padding": 1}),
    ({"kernel_size": 5, "padding": 2}, {"kernel_size": 3, "padding": 2, "dilation": 2}),
    ({"kernel_size": 7, "padding": 3}, {"kernel_size": 3, "padding": 3, "dilation": 3}),
    ({"kernel_size": 3, "padding": 2, "dilation": 2}, {"kernel_size": 1}),
    ({"kernel_size": 3, "padding": 1}, {"kernel_size": (1, 3), "padding": (0, 1)}),
    ({"kernel_size": (3, 1), "padding": (1, 0)}, {"kernel_size": 1}),
    ({"kernel_size": 4, "padding": 2}, {"kernel_size": 2, "padding": 1}),
    ({"kernel_size": 3}, {"kernel_size": 3}),
    ({"kernel_size": 3, "stride": 2, "padding": 1}, {"kernel_size": 1, "stride": 2}),
    ({"kernel_size": 3, "stride": 3, "padding": 1}, {"kernel_size": 1, "stride": 3}),
    ({"kernel_size": 4, "stride": 2, "padding": 1}, {"kernel_size": 2, "stride": 2}),
    ({"kernel_size": 3, "padding": "same"}, {"kernel_size": 1, "padding": "valid"}),
    ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, {"kernel_size": 1}),
    (
        {"kernel_size": 5, "padding": 2, "padding_mode": "circular"},
        {"kernel_size": 3, "padding": 1, "padding_mode": "circular"},
    ),
]
NOT_HELD = [
    ({"kernel_size": 3, "padding": 1}, {"kernel_size": 2}),
    ({"kernel_size": 3, "padding": 1, "padding_mode": "reflect"}, {"kernel_size": 3, "padding": 1}),
    ({"kernel_size": 5, "padding": 2, "padding_mode": "circular"}, {"kernel_size": 3, "padding": 1}),
    ({"kernel_size": 3, "padding": 2, "dilation": 2}, {"kernel_size": 3, "padding": 1}),
    ({"kernel_size": 5, "padding": 4, "dilation": 2}, {"kernel_size": 3, "padding": 3, "dilation": 3}),
    ({"kernel_size": (1, 3), "padding": (0, 1)}, {"kernel_size": (3, 1), "padding": (1, 0)}),
]


@pytest.mark.parametrize("swapped", [False, True])
@pytest.mark.parametrize(("wide", "narrow"), HELD)
def test_kernel_that_holds_the_other_takes_it_in(wide, narrow, swapped):
    pair = [normed(nn.Conv2d(8, 8, **each)) for each in (wide, narrow)]
    assert_merged(Branches(*pair[:: -1 if swapped else 1]), left=1)


def size_of(settings, size):
    return nn.Conv2d(1, 1, **settings)(torch.zeros(1, 1, size, size)).shape[-1]


@pytest.mark.parametrize(("one", "other"), NOT_HELD)
def test_kernels_neither_of_which_holds_the_other_stay(one, other):
    pair = [normed(nn.Conv2d(8, 8, **each)) for each in (one, other)]
    if size_of(one, 9) == size_of(other, 9):
        assert_merged(Branches(*pair), torch.randn(2, 8, 9, 9).double(), left=2, merged=0)
    else:  # their sum fails, or is broadcast by chance
        fused = fxfuse.fuse(randomise(Branches(*pair)))
        assert len(fxfuse.report(fused).merged) == 0


def test_sizes_that_agree_by_chance_prove_nothing():
    """On 8×8, a stride of 8 gives 1×1 as a kernel of 8 does, which are broadcast or differ elsewhere."""
    model = randomise(Branches(nn.Conv2d(8, 8, 8), nn.Conv2d(8, 8, 1, stride=8)))
    x = torch.randn(2, 8, 8, 8).double()
    fused = fxfuse.fuse(model, example_inputs=(x,))
    assert len(fxfuse.report(fused).merged) == 0
    assert_exact(model(x), fused(x))


@pytest.mark.parametrize("groups", [(1, 2), (2, 4), (2, 8), (4, 8), (1, 8)])
def test_finer_groups_go_into_coarser_ones(groups):
    model = Branches(*(normed(nn.Conv2d(8, 16, 3, padding=1, groups=each), channels=16) for each in groups))
    assert_merged(model, left=1)


def test_groups_that_do_not_divide_each_other_stay():
    model = Branches(nn.Conv2d(12, 12, 3, padding=1, groups=4), nn.Conv2d(12, 12, 3, padding=1, groups=6))
    assert_merged(model, torch.randn(2, 12, 5, 5).double(), left=2, merged=0)


def test_nothing_is_merged_that_would_cost_more():
    """A depthwise 3×3 and a dense 1×1 would be a dense 3×3."""
    assert_merged(Branches(nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1)), left=2, merged=0)


def test_depthwise_and_dense_branches_go_into_a_dense_one():
    model = Branches(
        nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 3, padding=1)
    )
    assert_merged(model, left=1)


def test_average_pooling_with_zeros_goes_into_a_convolution():
    model = Branches(nn.Conv2d(8, 8, 3, padding=1), normed(nn.AvgPool2d(3, 1, 1)))
    assert_merged(model, left=1)
    strided = Branches(nn.Conv2d(8, 8, 4, 2, padding=1), nn.AvgPool2d(2, divisor_override=3))
    assert_merged(strided, left=1, example_inputs=(torch.randn(2, 8, 9, 7).double(),))


@pytest.mark.parametrize(
    "pool", [nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.MaxPool2d(3, 1, 1), nn.LPPool2d(2, 1)]
)
def test_other_pooling_stays(pool):
    fused = fxfuse.fuse(randomise(Branches(nn.Conv2d(8, 8, 3, padding=1), pool)))
    assert len(fxfuse.report(fused).merged) == 0


def test_average_that_counts_past_the_end_stays():
    model = randomise(Branches(nn.Conv2d(8, 8, 2, 2), nn.AvgPool2d(2, 2, ceil_mode=True)))
    x = torch.randn(1, 8, 6, 6).double()
    fused = fxfuse.fuse(model, example_inputs=(x,))
    assert len(fxfuse.report(fused).merged) == 0
    assert_exact(model(x), fused(x))


def test_transposed_convolutions_of_one_geometry_become_one():
    settings = {"stride": 2, "padding": 1, "output_padding": 1, "groups": 2}
    model = Branches(*(normed(nn.ConvTranspose2d(8, 8, 3, **settings)) for _ in range(3)))
    assert_merged(model, left=1)
    other = Branches(nn.ConvTranspose2d(8, 8, 3, padding=1), nn.ConvTranspose2d(8, 8, 1))
    assert_merged(other, left=2, merged=0)


# ---- sums ----------------------------------------------------------------------------------------------


def convs(count=3, **settings):
    return {f"c{n}": nn.Conv2d(8, 8, 3, padding=1, **settings) for n in range(count)}


SUMS = {
    "add": (lambda m, x: torch.add(m.c0(x), m.c1(x), alpha=-0.7), 2),
    "sub": (lambda m, x: m.c0(x) - m.c1(x), 2),
    "sub of x": (lambda m, x: x - m.c0(x), 1),
    "minus x": (lambda m, x: m.c0(x) - x, 1),
    "sub alpha": (lambda m, x: torch.sub(m.c0(x), x, alpha=2), 1),
    "method": (lambda m, x: m.c0(x).add(m.c1(x)).sub(x), 2),
    "in place": (lambda m, x: m.c0(x).add_(m.c1(x)), 2),
    "iadd": (lambda m, x: operator.iadd(m.c0(x), m.c1(x)), 2),
    "list": (lambda m, x: sum([m.c0(x), m.c1(x), m.c2(x)]), 3),
    "nested": (lambda m, x: (m.c0(x) - (x + m.c1(x))) + (m.c2(x) - x), 3),
    "factor": (lambda m, x: 0.5 * m.c0(x) + m.c1(x) / 4 + 3 * x, 2),
    "scaled sum": (lambda m, x: 2 * (m.c0(x) + 0.5 * (m.c1(x) - x)) + 1.5, 2),
    "dropout": (lambda m, x: m.c0(F.dropout(x, training=m.training)) + m.c1(x), 2),
    "twice": (lambda m, x: m.c0(x) + m.c0(x), 1),
    "clone": (lambda m, x: m.c0(x.clone()) + m.c1(x).contiguous(), 2),
}


@pytest.mark.parametrize("way", SUMS)
def test_sums_are_read_however_they_are_written(way):
    function, count = SUMS[way]
    fused = assert_merged(Written(function, **convs(count)), left=1)
    assert sums(fused) == 0


def test_layer_scale_around_branches_and_their_difference():
    """FastViT's RepMixer: x + γ·(mixer(x) − norm(x))."""

    class Mixer(nn.Module):
        def __init__(self):
            super().__init__()
            self.mixer = Branches(normed(nn.Conv2d(8, 8, 3, padding=1, groups=8)), nn.BatchNorm2d(8))
            self.norm = nn.BatchNorm2d(8)
            self.gamma = nn.Parameter(torch.randn(8, 1, 1))

        def forward(self, x):
            total = self.mixer.branches[0](x) + self.mixer.branches[1](x)
            return x + self.gamma * (total - self.norm(x))

    fused = assert_merged(nn.Sequential(Mixer()), left=1)
    assert len(fxfuse.report(fused).folded) == 3


def test_norm_after_the_sum_goes_with_it():
    """RepViT: bn(bn(conv3×3(x)) + conv1×1(x) + x)."""
    model = nn.Sequential(repvgg(), nn.BatchNorm2d(8))
    fused = assert_merged(model, left=1)
    assert len(fxfuse.report(fused).folded) == 4


def test_linear_layers_and_a_residual_become_one():
    model = Branches(nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8, bias=False)), nn.Identity())
    assert_merged(model, torch.randn(3, 8).double(), torch.randn(2, 5, 8).double(), left=1)


def test_low_rank_adapter_goes_into_its_linear_layer():
    function = lambda m, x: m.base(x) + 2 * m.up(m.down(x))  # noqa: E731
    model = Written(function, base=nn.Linear(8, 6), down=nn.Linear(8, 2, bias=False), up=nn.Linear(2, 6))
    fused = assert_merged(model, torch.randn(3, 8).double(), left=1)
    (merged,) = fxfuse.report(fused).merged
    assert (merged.name, merged.into, set(merged.operators)) == ("base", "base", {"down", "up"})


def test_part_of_a_sum_is_merged_and_the_rest_added():
    function = lambda m, x: F.relu(m.c0(x)) + m.c1(x) + m.c2(x)  # noqa: E731
    fused = assert_merged(Written(function, **convs()), left=2)
    assert sums(fused) == 1


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_two_groups_in_one_sum_are_merged_apart(order):
    def function(m, x):
        y = torch.sigmoid(x)
        terms = [m.c0(x), m.c1(y), m.c2(x), m.c3(y)]
        one, two, three, four = (terms[place] for place in order)
        return one + two + three + four

    fused = assert_merged(Written(function, **convs(4)), left=2, merged=2)
    assert sums(fused) == 1


@pytest.mark.parametrize("order", [*itertools.permutations(range(3))])
def test_differences_keep_their_signs_where_a_part_is_merged(order):
    def function(m, x):
        terms = [m.c0(x), torch.sigmoid(x), m.c1(x)]
        one, two, three = (terms[place] for place in order)
        return one - two - three

    model = Written(function, **convs(2))
    randomise(model)
    fused = fxfuse.fuse(model)
    x = torch.randn(2, 8, 6, 6).double()
    assert_exact(model(x), fused(x))
    assert (operators(fused), sums(fused)) == (1, 1)


# ---- in a row ------------------------------------------------------------------------------------------


def test_convolutions_in_a_row_become_one_where_that_is_cheaper():
    assert_merged(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 4, 1)), left=1)
    assert_merged(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 64, 1), nn.Conv2d(64, 4, 3)), left=1)
    assert_merged(
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 64, 1, bias=False), nn.Conv2d(64, 4, 3, padding=1)), left=1
    )
    assert_merged(
        nn.Sequential(nn.ReLU(), nn.Linear(8, 64), nn.Linear(64, 4)), torch.randn(3, 8).double(), left=1
    )


def test_convolutions_in_a_row_stay_where_one_would_cost_more_or_see_other_borders():
    assert_merged(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1)), left=2, merged=0)
    assert_merged(
        nn.Sequential(nn.ReLU(), nn.Conv2d(8, 64, 1), nn.Conv2d(64, 4, 3, padding=1)), left=2, merged=0
    )
    x = torch.randn(2, 8, 7, 6).double()
    assert_merged(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 64, 3), nn.Conv2d(64, 4, 3)), x, left=2, merged=0)


def test_depthwise_point_goes_into_its_neighbour():
    point = nn.Conv2d(8, 8, 1, groups=8)
    assert_merged(nn.Sequential(nn.ReLU(), point, nn.Conv2d(8, 4, 3)), left=1)
    assert_merged(nn.Sequential(nn.ReLU(), nn.Conv2d(8, 8, 3, padding=1), copy.deepcopy(point)), left=1)


def test_row_of_convolutions_is_one_branch():
    """The diverse branch block: 1×1 and then k×k beside k×k."""
    row = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, bias=False))
    assert_merged(Branches(nn.Conv2d(8, 8, 3, padding=1), normed(row)), left=1)


def test_row_whose_kernel_neither_part_has_is_one_branch():
    """1×1 and then a pooling that pads, or a depthwise 3×3, beside a dense 3×3."""
    pooled = nn.Sequential(nn.Conv2d(8, 8, 1, bias=False), nn.AvgPool2d(3, 1, 1), nn.BatchNorm2d(8))
    fused = assert_merged(Branches(nn.Conv2d(8, 8, 3, padding=1), pooled), left=1)
    (merged,) = fxfuse.report(fused).merged
    assert merged.operators == ("branches.1.0", "branches.1.1")
    separable = nn.Sequential(
        nn.Conv2d(8, 8, 1, bias=False), nn.Conv2d(8, 8, 3, padding=1, groups=8, bias=False)
    )
    assert_merged(Branches(nn.Conv2d(8, 8, 3, padding=1), normed(separable)), left=1)
    assert_merged(separable, left=2, merged=0)


# ---- what stays ----------------------------------------------------------------------------------------


def overflowing():
    """Of this sum the one operator would need weights that float16 does not have; its norm stays."""
    model = randomise(Branches(nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1), nn.BatchNorm2d(8)), 1)
    with torch.no_grad():
        for branch in model.branches[:2]:
            branch.weight.fill_(40000.0)
    return model.half()


def conv(size=3, **settings):
    return nn.Conv2d(8, 8, size, **({"padding": size // 2 if isinstance(size, int) else 0} | settings))


def subtracted(m, x):
    return m.one(x) - (m.two(x) - x.sin())


def read_elsewhere(m, x):
    return m.two(x) + (y := m.one(x)) + y.sin()


APART = {
    "dilations": (lambda: Branches(conv(), conv(padding=2, dilation=2)), "FXF701"),
    "crosswise": (lambda: Branches(conv((1, 3), padding=(0, 1)), conv((3, 1), padding=(1, 0))), "FXF701"),
    "depthwise and dense": (lambda: Branches(conv(groups=8), conv(1)), "FXF701"),
    "borders": (lambda: Branches(conv(padding_mode="reflect"), conv()), "FXF701"),
    "odd and even": (lambda: Branches(conv(stride=2), conv(2, stride=2, padding=0)), "FXF701"),
    "bottleneck": (
        lambda: Branches(nn.Identity(), nn.Sequential(nn.Conv2d(8, 2, 1), nn.Conv2d(2, 8, 1))),
        "FXF702",
    ),
    "dtypes": (lambda: Branches(conv(), conv(1).double()).eval(), "FXF703"),
    "subtracted": (lambda: Written(subtracted, one=conv(), two=conv(1)), "FXF704"),
    "read elsewhere": (lambda: Written(read_elsewhere, one=conv(), two=conv(1)), "FXF705"),
    "overflow": (overflowing, "FXF401"),
}


@pytest.mark.parametrize("way", APART)
def test_branches_that_stay_are_listed_with_their_reason(way):
    make, code = APART[way]
    model = make() if way in ("overflow", "dtypes") else randomise(make())
    report = fxfuse.explain(model)
    assert [apart.code for apart in report.apart] == [code], report
    assert not report.merged and len(report.apart[0].branches) >= 2
    assert "test_branches.py" in report.apart[0].where
    if way not in ("overflow", "dtypes"):
        x = torch.randn(2, 8, 8, 8).double()
        assert_exact(model(x), fxfuse.fuse(model)(x))


def test_norm_of_a_branch_that_could_not_be_merged_is_refused_with_that_reason():
    report = fxfuse.explain(overflowing())
    assert [(left.norm, left.code) for left in report.refused] == [("branches.2", "FXF401")]


def test_what_is_left_of_a_sum_is_listed_once():
    model = randomise(Branches(conv(), conv(1), conv(padding=2, dilation=2), nn.BatchNorm2d(8)))
    report = fxfuse.report(fxfuse.fuse(model))
    assert len(report.merged) == len(report.apart) == 1 and not report.refused
    assert report.apart[0].branches == ("branches.2", "branches.0")


def test_what_is_left_of_a_sum_does_not_fit_wherever_the_merged_operator_stands():
    report = fxfuse.explain(randomise(Branches(conv(), conv(padding=2, dilation=2), conv(1))))
    assert len(report.merged) == 1
    assert [(sorted(apart.branches), apart.code) for apart in report.apart] == [
        (["branches.0", "branches.1"], "FXF701")
    ]


def test_residuals_that_are_not_linear_are_not_listed():
    block = nn.Sequential(conv(), nn.BatchNorm2d(8), nn.ReLU(), conv(), nn.BatchNorm2d(8))
    report = fxfuse.explain(randomise(Branches(nn.Identity(), block)))
    assert not report.apart and len(report.folded) == 2


def assert_stays(model, *inputs):
    """That nothing is merged, and the result is right."""
    randomise(model)
    fused = fxfuse.fuse(model)
    for x in inputs or (torch.randn(2, 8, 9, 7).double(),):
        with torch.no_grad():
            assert_exact(copy.deepcopy(model)(x.clone()), fused(x.clone()))
    assert len(fxfuse.report(fused).merged) == 0
    return fused


def written_and_read(m, x):
    v = m.c0(x)
    out = v
    out += m.c1(v)
    return out + v


def written_and_convolved(m, x):
    v = m.c0(x)
    out = v
    out += m.c1(v)
    return out + m.c1(v)


def written_through_an_identity(m, x):
    v = m.c0(x)
    d = F.dropout(v, training=False)
    d += m.c1(v)
    return d + v


STAYING = {
    "a value on the way is written to": written_and_read,
    "a value on the way is written to before an operator": written_and_convolved,
    "a value on the way is written to by another name": written_through_an_identity,
    "read elsewhere": lambda m, x: ((y := m.c0(x)) + m.c1(x)) * y,
    "other input": lambda m, x: m.c0(x) + m.c1(x + 1).relu(),
    "other values": lambda m, x: m.c0(x) + m.c1(torch.sigmoid(x)),
    "written between": lambda m, x: (y := m.c0(x), x.mul_(2), y + m.c1(x))[2],
    "the source is written to": lambda m, x: x.add_(m.c0(x)) * x,
    "written to through a view": lambda m, x: (y := m.c0(x), x[0].zero_(), y + m.c1(x))[2],
    "shape is asked for": lambda m, x: (y := m.c0(x)) + m.c1(x) * y.shape[0],
    "broadcast": lambda m, x: m.c0(x) + m.c1(x)[:, :1],
    "product": lambda m, x: m.c0(x) * m.c1(x),
}


@pytest.mark.parametrize("way", STAYING)
def test_branches_stay_where_they_are_not_one_function_of_one_value(way):
    assert_stays(Written(STAYING[way], **convs(2)))


def test_identity_of_other_channels_is_broadcast_and_stays():
    assert_stays(Branches(nn.Conv2d(1, 8, 3, padding=1), nn.Identity()), torch.randn(2, 1, 6, 6).double())
    scale = Written(lambda m, x: m.c0(m.gamma * x), c0=nn.Conv2d(8, 8, 3, padding=1))
    scale.gamma = nn.Parameter(torch.randn(8, 1, 1))
    randomise(scale)
    fused = fxfuse.fuse(scale)
    x = torch.randn(2, 1, 6, 6).double()
    assert_exact(scale(x), fused(x))


def test_hooks_keep_a_branch():
    model = randomise(repvgg())
    calls = []
    model.branches[1][0].register_forward_hook(lambda *_: calls.append(1))
    fused = fxfuse.fuse(model)
    x = torch.randn(2, 8, 5, 5).double()
    assert_exact(model(x), fused(x))
    assert len(calls) == 2


def test_shared_module_keeps_its_weights_for_its_other_calls():
    def function(m, x):
        return torch.sigmoid(m.c0(x) + m.c1(x)) + m.c0(torch.tanh(x))

    fused = assert_merged(Written(function, **convs(2)), left=2)
    (merged,) = fxfuse.report(fused).merged
    assert {merged.name, *merged.operators} == {"c0", "c1"}


def test_leave_keeps_a_norm_or_a_whole_merge():
    model = randomise(repvgg())
    x = torch.randn(2, 8, 5, 5).double()
    for name, left in (("branches.2", 1), ("branches.0.0", 2)):
        fused = fxfuse.fuse(model, leave=[name])
        assert operators(fused) == left, fxfuse.report(fused)
        assert_exact(model(x), fused(x))
    report = fxfuse.report(fxfuse.fuse(model, leave=["branches.2"]))
    assert [(each.norm, each.code) for each in report.refused] == [("branches.2", "FXF601")]


def test_bisect_names_a_merge():
    pair = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)
    model = randomise(
        nn.Sequential(*(nn.Sequential(Branches(*copy.deepcopy(pair)), repvgg()) for _ in range(6)))
    )

    def is_right(fused):
        return "3.0.branches.0" not in [merged.name for merged in fxfuse.report(fused).merged]

    assert fxfuse.bisect(model, is_right).culprits == ("3.0.branches.0",)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_merged_weights_are_rounded_once(dtype):
    model = repvgg()
    randomise(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.3)
    model.to(dtype)
    exactly = fxfuse.fuse(copy.deepcopy(model).double())
    fused = fxfuse.fuse(model)
    for one, other in zip(exactly.parameters(), fused.parameters(), strict=True):
        assert torch.equal(one.to(dtype), other)
    assert fxfuse.verify(model, fused, (torch.randn(2, 8, 9, 9).to(dtype),)).ok


def test_channels_last_weights_stay_channels_last():
    model = randomise(repvgg()).to(memory_format=torch.channels_last)
    fused = fxfuse.fuse(model)
    (weight,) = (parameter for parameter in fused.parameters() if parameter.dim() == 4)
    assert weight.is_contiguous(memory_format=torch.channels_last)


def test_kept_modules_keep_their_branches():
    model = randomise(repvgg())
    fused = fxfuse.fuse(model, keep_modules=True)
    x = torch.randn(2, 8, 5, 5).double()
    assert_exact(model(x), fused(x))
    report = fxfuse.report(fused)
    assert not report.merged and len(report.folded) == 2
    assert [(left.norm, left.code) for left in report.refused] == [("branches.2", "FXF505")]


# ---- the other ways in ---------------------------------------------------------------------------------


@pytest.mark.parametrize("options", [{}, {"refold": "always"}])
def test_compiled_branches_are_merged_and_follow_their_weights(options):
    model = randomise(nn.Sequential(repvgg(), nn.ReLU(), repvgg(2)))
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fxfuse", options={"then": "aot_eager", **options})
    x = torch.randn(2, 8, 6, 6).double()
    with torch.no_grad():
        assert_exact(model(x), compiled(x))
        assert len(fxfuse.report(compiled).merged) == 2
        for change in (
            model[0].branches[1][0].weight,
            model[0].branches[2].running_mean,
            model[2].branches[1][1].bias,
        ):
            change.mul_(1.5).add_(0.1)
            assert_exact(model(x), compiled(x))


@pytest.mark.parametrize("options", [{}, {"refold": "always"}])
def test_compiled_merge_follows_a_norm_that_it_has_taken_up_through_a_pooling(options):
    def function(m, x):
        y = m.c(x)
        return torch.tanh(m.n(F.avg_pool2d(x + y + m.g(x), 3)))

    model = randomise(shared(function)).requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fxfuse", options={"then": "aot_eager", **options})
    x = torch.randn(2, 8, 9, 9).double()
    assert_exact(model(x), compiled(x))
    report = fxfuse.report(compiled)
    assert (len(report.merged), len(report.folded)) == (1, 1), report
    for change in (model.n.running_var, model.n.bias, model.g.weight, model.c.bias):
        change.mul_(1.5).add_(0.1)
        assert_exact(model(x), compiled(x))


def test_program_whose_merge_takes_up_a_norm_keeps_its_signature():
    model = randomise(shared(lambda m, x: torch.tanh(m.n(F.max_pool2d(x + m.c(x), 3)))))
    with torch.no_grad():
        model.n.weight.abs_()
    x = torch.randn(2, 8, 9, 9).double()
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    fused = fxfuse.fuse(program)
    report = fxfuse.report(fused)
    assert (len(report.merged), len(report.folded)) == (1, 1), report
    for batch in (x, x[:1].repeat(5, 1, 1, 1)):
        assert_exact(model(batch), fused.module()(batch))


def test_gradients_get_through_a_merge():
    model = randomise(repvgg())
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fxfuse", options={"then": "aot_eager", "refold": "always"})
    x = torch.randn(2, 8, 6, 6).double()
    expected = torch.autograd.grad(model(x).square().sum(), [*model.parameters()])
    found = torch.autograd.grad(compiled(x).square().sum(), [*model.parameters()])
    for one, other in zip(expected, found, strict=True):
        assert_exact(one, other)
    assert len(fxfuse.report(compiled).merged) == 1


@pytest.mark.filterwarnings(EXPORT_WARNING)
@pytest.mark.parametrize("decomposed", [False, True])
def test_exported_branches_are_merged(decomposed, tmp_path):
    model = randomise(nn.Sequential(repvgg(), nn.ReLU(), repvgg(2)))
    x = torch.randn(2, 8, 6, 6).double()
    batch = torch.export.Dim("batch")
    program = torch.export.export(model, (x,), dynamic_shapes=({0: batch},))
    program = program.run_decompositions() if decomposed else program
    fused = fxfuse.fuse(program)
    report = fxfuse.report(fused)
    assert (len(report.merged), len(report.folded), len(report.refused)) == (2, 5, 0), report
    torch.export.save(fused, tmp_path / "model.pt2")
    loaded = torch.export.load(tmp_path / "model.pt2").module()
    other = torch.randn(5, 8, 6, 6).double()
    for each in (x, other):
        assert_exact(model(each), loaded(each))
    assert len(fused.state_dict) == 4


# ---- what was once wrong -------------------------------------------------------------------------------


def assert_agrees(
    function, *given: Tensor, merged: int | None = None, ends: bool = True, **layers: nn.Module
) -> fx.GraphModule:
    """That the folded model gives what the source gives, and folds no more the second time if it `ends`."""
    model = randomise(Written(function, **layers))
    fused = fxfuse.fuse(model)
    for x in given or (torch.randn(2, 8, 5, 6).double(),):
        with torch.no_grad():
            assert_exact(copy.deepcopy(model)(x.clone()), fused(x.clone()))
    report = fxfuse.report(fused)
    assert merged is None or len(report.merged) == merged, f"{report}\n{fused.graph}"
    again = fxfuse.report(fxfuse.fuse(fused))
    assert not ends or not (again.folded or again.merged or again.constants), (report, again)
    return fused


def test_source_that_is_written_to_before_the_operator_that_stays_reads_it():
    def function(m, x):
        a = m.c0(x)
        down = m.down(x)
        z = torch.sigmoid(x)
        x.mul_(2)
        return (a + m.c1(down)) + z

    down = nn.Conv2d(8, 8, 1, bias=False)
    assert_agrees(function, c0=nn.Conv2d(8, 8, 1), c1=nn.Conv2d(8, 8, 3, padding=1), down=down)


def test_norm_that_gives_a_tuple_may_end_a_sum():
    def function(m, x):
        norm = m.norm
        state = (norm.weight, norm.bias, norm.running_mean, norm.running_var)
        y, _, _ = torch.native_batch_norm(m.c0(x) + x, *state, False, 0.1, 1e-5)
        return y

    assert_agrees(function, norm=nn.BatchNorm2d(8), **convs(1))


@pytest.mark.parametrize("order", [*itertools.permutations(range(4))])
def test_two_groups_in_a_sum_of_sums_are_merged_apart(order):
    def function(m, x):
        y = torch.sigmoid(x)
        terms = [m.c0(x), m.c1(y), m.c2(x), m.c3(y)]
        one, two, three, four = (terms[place] for place in order)
        return (one + two) + (three - four)

    assert_agrees(function, merged=2, **convs(4))


@pytest.mark.parametrize("count", [40, 400])
def test_long_rows_end(count):
    row = nn.Sequential(*(nn.Linear(2, 2) for _ in range(count)))
    assert_agrees(lambda m, x: m.row(x), torch.randn(3, 2).double(), ends=count < 50, row=row)


def test_many_constants_in_a_row_end():
    def function(m, x):
        for _ in range(300):
            x = x * 0.99
        return m.c0(x) + m.c1(x)

    assert_agrees(function, **convs(2))


@pytest.mark.parametrize(
    "make",
    [
        lambda: nn.Conv2d(8, 8, 3, padding=5, padding_mode="reflect"),
        lambda: nn.Conv2d(8, 8, 3, padding=5, padding_mode="circular"),
        lambda: nn.Conv2d(8, 8, 3, padding=5, padding_mode="replicate"),
        lambda: nn.ConvTranspose2d(8, 8, 3, padding=2),
        lambda: nn.ConvTranspose2d(8, 8, 2, stride=3, padding=1, output_padding=2, dilation=4),
        lambda: nn.Conv2d(8, 8, 3, padding=7, stride=4, dilation=3),
    ],
)
def test_wide_borders(make):
    assert_agrees(
        lambda m, x: m.c0(x) + m.c1(x), torch.randn(2, 8, 9, 7).double(), merged=1, c0=make(), c1=make()
    )


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: m.c0(x / 255.0) + m.c1(x / 127.0),
        lambda m, x: m.c0(v := x / 255.0) + m.c1(v),
        lambda m, x: m.c0(v := x / 255.0) + v,
        lambda m, x: m.c0(w := (v := x / 255.0) + 2 * v) + w,
    ],
)
def test_integers_are_not_read_by_a_convolution(function):
    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.c0, self.c1 = nn.Conv2d(8, 8, 1), nn.Conv2d(8, 8, 1)

        def forward(self, x):
            return function(self, x)

    model = randomise(Scaled()).float()
    x = torch.randint(0, 255, (2, 8, 4, 4), dtype=torch.uint8)
    torch.testing.assert_close(fxfuse.fuse(model)(x), model(x))


@torch.no_grad()
def test_a_map_is_not_applied_twice_where_a_merge_becomes_a_part_of_another():
    """All at once overflows in float16; then the norm on top finds the smaller merge, which grows again."""

    def function(m, x):
        return m.bn1(m.bn2(m.c0(x) + m.bn0(x))) + m.c1(x) + torch.tanh(x)

    model = randomise(Written(function, **convs(2), **{f"bn{n}": nn.BatchNorm2d(8) for n in range(3)})).half()
    for norm in (model.bn0, model.bn1, model.bn2):
        nn.BatchNorm2d.reset_parameters(norm)
    model.bn1.weight.fill_(0.5)
    model.c0.weight.fill_(3e4)
    model.c1.weight.fill_(6e4)
    fused = fxfuse.fuse(model)
    x = torch.randn(2, 8, 4, 4).double()
    exact, found = model.double()(x), fused.double()(x)
    assert float((found - exact).abs().max() / exact.abs().max()) < 1e-3
    assert "FXF401" in [left.code for left in fxfuse.report(fused).refused]


def test_a_norm_before_many_sums_is_judged_in_time():
    def function(m, x):
        y = m.n(torch.sigmoid(x))
        one, other = y, y + x
        for _ in range(80):
            one, other = other, one + other
        return torch.tanh(other * x)

    report = fxfuse.explain(randomise(shared(function)))
    assert len(report.refused) == 1


def test_autocast_keeps_its_dtype_in_a_compiler():
    model = Written(lambda m, x: m.c0(x) + x, **convs(1)).eval()
    x = torch.randn(2, 8, 5, 5)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fxfuse", options={"then": "aot_eager"})
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert compiled(x).dtype is model(x).dtype is torch.float32


def test_query_of_a_term_before_the_operator_that_stays():
    def function(m, x):
        a = m.c0(x)
        axes = a.dim()
        return (a + m.c1(x)) + torch.tanh(x) * axes

    assert_agrees(function, merged=1, c0=nn.Conv2d(8, 8, 1), c1=nn.Conv2d(8, 8, 3, padding=1))


@pytest.mark.filterwarnings(EXPORT_WARNING)
@pytest.mark.filterwarnings("ignore:Attempted to insert a get_attr:UserWarning")  # unflatten itself
def test_modules_that_an_export_preserves_keep_their_sums():
    class Pair(nn.Module):
        def __init__(self):
            super().__init__()
            self.c0, self.c1 = nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 3, padding=1)

        def forward(self, x):
            return self.c0(x), self.c1(x)

    class Outer(nn.Module):
        def __init__(self):
            super().__init__()
            self.m = Pair()

        def forward(self, x):
            a, b = self.m(x)
            return (a + b) + torch.tanh(x)

    model = randomise(Outer())
    x = torch.randn(2, 8, 5, 5).double()
    program = torch.export.export(model, (x,), preserve_module_call_signature=("m",))
    fused = fxfuse.fuse(program)
    assert_exact(model(x), torch.export.unflatten(fused)(x))


def test_row_keeps_channels_last_weights():
    model = nn.Sequential(nn.ReLU(), nn.Conv2d(8, 64, 3, padding=1), nn.Conv2d(64, 8, 1))
    fused = fxfuse.fuse(randomise(model).to(memory_format=torch.channels_last))
    (weight,) = (parameter for parameter in fused.parameters() if parameter.dim() == 4)
    assert weight.shape == (8, 8, 3, 3) and weight.is_contiguous(memory_format=torch.channels_last)


def test_any_operator_of_a_merge_can_be_left():
    model = randomise(Written(lambda m, x: m.c0(x) + m.c1(x), **convs(2)))
    for name in ("c0", "c1"):
        assert operators(fxfuse.fuse(model, leave=[name])) == 2


def test_strides_that_give_one_size_by_chance_differ():
    convs = {f"c{stride}": nn.Conv2d(8, 8, 3, stride, 1) for stride in (1, 2)}
    assert_agrees(lambda m, x: m.c1(x) + m.c2(x), torch.randn(2, 8, 1, 1).double(), merged=0, **convs)


def test_what_is_subtracted_is_not_left_behind_alone():
    layers = {"c0": nn.Conv2d(8, 8, 1), "c1": nn.Conv2d(8, 8, 3, padding=1)}
    assert_agrees(lambda m, x: (m.c0(x) - torch.sigmoid(x)) + m.c1(x), merged=0, **layers)


WRITES = {
    "before an identity is read": lambda m, x: (a := m.c0(x), x.mul_(2), a + x)[2],
    "before the last of a row is": lambda m, x: (
        torch.sigmoid(x) + m.p0(x) + (a := m.p1(x), x.mul_(3), m.c0(a))[2]
    ),
}


@pytest.mark.parametrize("way", WRITES)
def test_source_is_written_to(way):
    points = {"p0": nn.Conv2d(8, 8, 1), "p1": nn.Conv2d(8, 8, 1, bias=False)}
    assert_agrees(WRITES[way], **convs(1), **points)


def test_two_merges_do_not_bypass_one_sum_twice():
    def function(m, x):
        y = torch.sigmoid(x)
        return x + y + m.c0(x) + m.c1(y)

    assert_agrees(function, merged=2, **convs(2))


def test_query_of_a_sum_that_might_lose_a_term():
    def function(m, x):
        y = torch.sigmoid(x).mean((0, 2, 3)).view(8, 1, 1)
        part = y + m.c0(x)
        return (part + m.c1(x)) * part.dim()

    assert_agrees(function, c0=nn.Conv2d(8, 8, 1), c1=nn.Conv2d(8, 8, 3, padding=1))


def test_query_of_a_value_whose_operator_comes_later():
    def function(m, x):
        a = m.c0(x)
        return torch.sigmoid(x).to(a.dtype) + a + m.c1(x)

    assert_agrees(function, merged=1, c0=nn.Conv2d(8, 8, 1), c1=nn.Conv2d(8, 8, 3, padding=1))


def test_transposed_convolution_with_a_size_of_its_own_stays():
    layers = {name: nn.ConvTranspose2d(8, 8, 1, 2) for name in ("a", "b")}
    x = torch.randn(2, 8, 1, 1).double()
    assert_agrees(lambda m, x: m.a(x) + m.b(x, output_size=(2, 2)), x, merged=0, **layers)
    assert_agrees(lambda m, x: m.b(x, output_size=(2, 2)) + m.a(x), x, merged=0, **layers)


def test_average_over_volumes_and_without_a_batch():
    def pooled(pool):
        return lambda m, x: m.c0(x) + pool(x, 3, 1, 1)

    volume, image = torch.randn(1, 8, 5, 4, 6).double(), torch.randn(8, 6, 5).double()
    assert_agrees(pooled(F.avg_pool3d), volume, merged=1, c0=nn.Conv3d(8, 8, 3, padding=1))
    assert_agrees(pooled(F.avg_pool2d), image, image[None], merged=1, **convs(1))


def test_widest_of_three_takes_both_others_beside_another_value():
    wide = nn.Conv2d(8, 8, (1, 3), padding=(0, 1))
    layers = {"a": wide, "b": nn.Conv2d(8, 8, 1), "c": nn.Conv2d(8, 8, 3, padding=1)}
    fused = assert_agrees(lambda m, x: torch.sigmoid(x) + m.a(x) + m.b(x) + m.c(x), merged=1, **layers)
    assert operators(fused) == 1


def test_branches_inside_of_a_sum_in_place_are_merged():
    def function(m, x):
        y = m.c0(x) + m.norm(x)
        y += torch.sigmoid(x)
        return y

    assert_agrees(function, merged=1, norm=nn.BatchNorm2d(8), **convs(1))


class Modes(nn.Module):
    """A branch that is computed in another mode than the other one."""

    def __init__(self, mode):
        super().__init__()
        self.mode, self.a, self.b = mode, nn.Conv2d(8, 8, 3, padding=1), nn.Conv2d(8, 8, 1)

    def forward(self, x):
        with self.mode():
            y = self.a(x)
        return y + self.b(x)


@pytest.mark.parametrize("mode", [torch.no_grad, lambda: torch.autocast("cpu", torch.bfloat16)])
def test_branches_in_different_modes_stay(mode):
    model = Modes(mode).eval().requires_grad_(False)
    torch._dynamo.reset()
    compiled = torch.compile(model, backend="fxfuse", options={"then": "aot_eager"})
    x = torch.randn(2, 8, 5, 5, requires_grad=True)
    expected, found = model(x), compiled(x)
    assert (expected.dtype, expected.requires_grad) == (found.dtype, found.requires_grad)
    torch.testing.assert_close(found, expected)


def test_a_sum_of_many_terms_ends():
    def function(m, x):
        total = m.c0(x)
        for step in range(300):
            total = total + torch.tanh(x + step)
        return total + m.c1(x)

    assert_agrees(function, torch.randn(1, 8, 2, 2).double(), merged=1, **convs(2))


# ---- values that several steps of one merge read ---------------------------------------------------------


def shared(function):
    modules = {"c": conv(), "d": conv(1), "g": conv(1, groups=2), "n": nn.BatchNorm2d(8)}
    return Written(function, **modules)


SHARED = {
    "norm and identity": (lambda m, x: torch.tanh((y := m.c(x)) + m.n(y)), 1),
    "norm before an operator and its identity": (lambda m, x: torch.tanh((y := m.n(x)) + m.d(y)), 1),
    "one after the other": (lambda m, x: torch.tanh((z := (y := x + m.d(x)) + m.n(y)) + m.g(z)), 1),
    "unused sum": (lambda m, x: (y := m.c(x), z := x + y, z + y, torch.tanh(z - m.d(x)))[3], 1),
    "identity, and fewer channels": (
        lambda m, x: torch.tanh(m.other(y := m.same(x)) + m.other(y) + m.part(m.narrow(y))),
        1,
    ),
    "norm behind a pooling": (lambda m, x: torch.tanh(m.n(F.avg_pool2d(x + m.c(x), 3))), 1),
    "norm behind a concatenation": (
        lambda m, x: torch.tanh(m.n(torch.cat([(h := x[:, :4]) + m.part(h), m.other(x)], 1))),
        2,
    ),
    "norm behind a flattening": (lambda m, x: torch.tanh(m.n((x + m.c(x)).flatten(2)[..., None])), 1),
}  # fmt: skip


@pytest.mark.parametrize("way", SHARED)
def test_a_value_that_only_one_merge_reads_is_a_part_of_it(way):
    function, left = SHARED[way]
    model = shared(function)
    model.part, model.other = nn.Conv2d(4, 4, 1), nn.Conv2d(8, 4, 1)
    model.same, model.narrow = nn.Identity(), nn.Conv2d(8, 4, 1)
    randomise(model)
    x, other = torch.randn(2, 8, 9, 7).double(), torch.randn(1, 8, 6, 6).double()
    fused = fxfuse.fuse(model, example_inputs=(x,))
    report = fxfuse.report(fused)
    with torch.no_grad():
        assert_exact(model(x.clone()), fused(x.clone()))
        assert_exact(model(other.clone()), fused(other.clone()))
    assert (operators(fused), len(report.merged)) == (left, 1), f"{report}\n{fused.graph}"
    assert not report.refused and all(fold.error < 1e-12 for fold in report.folded)
    again = fxfuse.report(fxfuse.fuse(fused, example_inputs=(x,)))
    assert not (again.merged or again.folded or again.constants), again


def test_a_map_that_does_not_fit_into_the_merged_operator_leaves_the_merge():
    model = randomise(shared(lambda m, x: torch.tanh(m.n(F.avg_pool2d(x + m.c(x), 3)))))
    with torch.no_grad():
        model.n.weight.fill_(3e38)
    model.float()
    report = fxfuse.explain(model)
    assert len(report.merged) == 1 and [left.code for left in report.refused] == ["FXF401"]


@st.composite
def random_graphs(draw) -> list[tuple[str, int, int]]:
    """Steps, and how many values before each the two values lie that it reads."""
    kinds = [
        "conv",
        "point",
        "depthwise",
        "norm",
        "norm",
        "add",
        "add",
        "add",
        "sub",
        "scale",
        "relu",
        "pool",
    ]
    back = st.sampled_from([0, 0, 0, 1, 1, 2, 3, 5])
    return draw(st.lists(st.tuples(st.sampled_from(kinds), back, back), min_size=3, max_size=9))


class RandomGraph(nn.Module):
    """Its values are read again and again, and some of them never."""

    def __init__(self, steps: list[tuple[str, int, int]]) -> None:
        super().__init__()
        made = {
            "conv": lambda: nn.Conv2d(4, 4, 3, padding=1),
            "point": lambda: nn.Conv2d(4, 4, 1, groups=2, bias=False),
            "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
            "norm": lambda: nn.BatchNorm2d(4),
            "pool": lambda: nn.MaxPool2d(3, 1, 1),
        }
        self.steps = steps
        self.parts = nn.ModuleList(made[kind]() if kind in made else nn.Identity() for kind, *_ in steps)

    def forward(self, x: Tensor) -> Tensor:
        values = [torch.relu(x)]
        for part, (kind, *back) in zip(self.parts, self.steps, strict=True):
            one, other = (values[max(0, len(values) - 1 - each)] for each in back)
            written_out = {
                "add": lambda a, b: a + b,
                "sub": lambda a, b: a - b,
                "scale": lambda a, _: a * -0.5,
                "relu": lambda a, _: a.relu(),
            }
            values.append(written_out[kind](one, other) if kind in written_out else part(one))
        return torch.sigmoid(values[-1])


@given(random_graphs(), SEEDS)
def test_random_graphs_give_what_they_gave(steps: list[tuple[str, int, int]], seed: int) -> None:
    model = randomise(RandomGraph(steps), seed)
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(2, 4, 6, 5, dtype=torch.float64, generator=generator)
    fused = fxfuse.fuse(model)
    report = fxfuse.report(fused)
    event(f"{len(report.merged)} merges, {len(report.folded)} folds")
    with torch.no_grad():
        assert_exact(model(x), fused(x))
    assert "FXF403" not in [each.code for each in (*report.refused, *report.apart)]


# ---- random sums ---------------------------------------------------------------------------------------

SIZES = st.integers(1, 4)


@st.composite
def geometries(draw, surplus: int, stride: int) -> dict[str, Any]:
    """Of a convolution that gives `surplus` more places than it gets, if possible, but for the stride."""
    kernel = draw(st.tuples(SIZES, SIZES))
    dilation = draw(st.sampled_from([(1, 1), (1, 1), (2, 1), (2, 2)]))
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    padding = tuple(max(0, (surplus + each) // 2) for each in reach)
    fill = draw(st.sampled_from(["zeros", "zeros", "zeros", "reflect", "circular"]))
    return {
        **{"kernel_size": kernel, "dilation": dilation, "padding": padding, "stride": stride},
        **{"padding_mode": fill, "groups": draw(st.sampled_from([1, 1, 2, 4])), "bias": draw(st.booleans())},
    }


@st.composite
def branches(draw, surplus: int, stride: int) -> nn.Module:
    """A linear function of a value with four channels, of one that another branch gives, or a row."""
    kind = draw(st.sampled_from(["conv", "conv", "conv", "row", "pool", "norm", "identity"]))
    conv = nn.Conv2d(4, 4, **draw(geometries(surplus, stride)))
    made = {
        "conv": [conv],
        "row": [nn.Conv2d(4, 4, 1, bias=draw(st.booleans()), groups=draw(st.sampled_from([1, 4]))), conv],
        "pool": [nn.AvgPool2d(3, stride, 1, count_include_pad=draw(st.booleans()))],
        "norm": [nn.BatchNorm2d(4)],
        "identity": [nn.Identity()],
    }[kind]
    return nn.Sequential(*made, *[nn.BatchNorm2d(4)] * draw(st.booleans()))


@dataclass
class RandomSum:
    """Branches on two values, added up in some order, each with a sign and a place in a tree of sums."""

    modules: list[nn.Module]
    signs: list[int]
    places: list[int]
    second: list[bool]
    joins: list[int]

    def __call__(self, m: nn.Module, x: Tensor) -> Tensor:
        values = (x, torch.sigmoid(x))
        found = [module(values[second]) for module, second in zip(m.modules_, self.second, strict=True)]
        terms = [found[place] for place in self.places]
        signs = [self.signs[place] for place in self.places]
        for join in self.joins:
            one = join % (len(terms) - 1)
            right, sign = terms.pop(one + 1), signs.pop(one + 1)
            terms[one] = terms[one] + right if sign > 0 else torch.sub(terms[one], right, alpha=-sign)
        return terms[0]


@st.composite
def random_sums(draw) -> RandomSum:
    surplus, stride = draw(st.sampled_from([(0, 1), (0, 1), (0, 2), (1, 1), (-2, 1), (-1, 3)]))
    modules = draw(st.lists(branches(surplus, stride), min_size=2, max_size=5))
    count = len(modules)
    signs = draw(st.lists(st.sampled_from([1, 1, -1, -2]), min_size=count, max_size=count))
    places = draw(st.permutations(range(count)))
    second = draw(st.lists(st.sampled_from([False, False, False, True]), min_size=count, max_size=count))
    joins = draw(st.lists(st.integers(0, 9), min_size=count - 1, max_size=count - 1))
    return RandomSum(modules, signs, [*places], second, joins)


@given(random_sums(), SEEDS, st.tuples(st.integers(4, 9), st.integers(4, 9)))
def test_random_sums_give_what_they_gave(case: RandomSum, seed: int, size: tuple[int, int]) -> None:
    model = randomise(Written(case, modules_=nn.ModuleList(case.modules)), seed)
    generator = torch.Generator().manual_seed(seed)
    x, other = (torch.randn(2, 4, *each, dtype=torch.float64, generator=generator) for each in (size, (8, 7)))
    try:
        expected = model(x.clone())
    except RuntimeError:
        reject()
    fused = fxfuse.fuse(model, example_inputs=(x,))
    report = fxfuse.report(fused)
    event(f"{len(report.merged)} merges")
    with torch.no_grad():
        assert_exact(expected.detach(), fused(x.clone()))
        try:
            expected = model(other.clone())
        except RuntimeError:
            return
        assert_exact(expected, fused(other.clone()))
