"""Algebra and rounding are told apart: mistakes fail whatever the dtype, what rounding does never fails."""

import copy

import pytest
import torch
from torch import nn

import fxfuse
from fxfuse import pipeline
from fxfuse.precision import _SETTINGS, _read, precise
from tests.support import randomise

DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
X = torch.randn(4, 3, 16, 16, generator=torch.Generator().manual_seed(0))


def block():
    return nn.Sequential(nn.Conv2d(6, 6, 3, padding=1), nn.BatchNorm2d(6), nn.LeakyReLU(0.3))


def network():
    """Statistics as they are in trained networks, most of them: some variances are small."""
    model = nn.Sequential(nn.Conv2d(3, 6, 3, padding=1), nn.BatchNorm2d(6), *block(), *block(), *block())
    randomise(model)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_var.mul_(1e-2)
            elif isinstance(module, nn.Conv2d):
                module.weight.mul_(0.02)
    return model.float()


def spoilt(monkeypatch, change):
    """Makes the second fold of every model wrong, after it has been tried out."""
    right = pipeline.rewrite

    def wrong(captured, plan, solution, reader):
        move = plan.moves[1]
        node = move.sites[0].node
        what = solution.absorptions[node]
        weight, bias = change(what, *(tensor.detach() for tensor in solution.tensors[node]))
        folded = (nn.Parameter(tensor.to(what.weight.dtype)) for tensor in (weight, bias))
        solution.tensors[node] = tuple(folded)
        return right(captured, plan, solution, reader)

    monkeypatch.setattr(pipeline, "rewrite", wrong)


def without_eps(what, weight, bias):
    scale = what.after.scale.abs()
    factor = 1 + 0.5 * 1e-5 * scale.square()
    return weight.double() * factor.view(-1, 1, 1, 1), bias


def one_channel(_, weight, bias):
    weight = weight.clone()
    weight[2] *= 1.02
    return weight, bias


def one_element(_, weight, bias):
    weight = weight.clone()
    weight[3, 1, 0, 2] += 0.05 * weight.abs().max()
    return weight, bias


def wrong_axis(what, _, bias):
    return what.weight.double() * what.after.scale.view(1, -1, 1, 1), bias


def bias_not_scaled(what, weight, _):
    return weight, what.after.shift + what.bias.double()


MISTAKES = [without_eps, one_channel, one_element, wrong_axis, bias_not_scaled]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_one_layer_never_leaves_fuse_whatever_the_dtype(mistake, dtype, monkeypatch):
    model = network().to(dtype)
    fxfuse.fuse(model, example_inputs=(X.to(dtype),))
    spoilt(monkeypatch, mistake)
    with pytest.raises(fxfuse.VerificationError) as raised:
        fxfuse.fuse(model, example_inputs=(X.to(dtype),))
    assert "folded once more in float64: another function" in str(raised.value)


@pytest.mark.parametrize("mistake", MISTAKES)
def test_a_mistake_in_one_layer_of_a_candidate_is_seen_in_its_rounded_weights(mistake, monkeypatch):
    model = network()
    spoilt(monkeypatch, mistake)
    comparison = fxfuse.verify(model, fxfuse.fuse(model), (X,))
    assert not comparison.ok and not comparison.algebra.ok, comparison


def test_a_mistake_smaller_than_the_rounding_of_the_weights_is_told_by_fuse_only(monkeypatch):
    """In bfloat16 the weights are rounded by more than a forgotten ε changes them."""
    model = network().bfloat16()
    spoilt(monkeypatch, without_eps)
    comparison = fxfuse.verify(model, fxfuse.fuse(model), (X.bfloat16(),))
    assert comparison.ok and comparison.algebra.allowed > 1e-3


class Border(nn.Module):
    """One pixel at the border is another one, after the first layers."""

    def __init__(self, model):
        super().__init__()
        self.first, self.rest = model[:3], model[3:]

    def forward(self, x):
        y = self.first(x).clone()
        y[0, 2, 0, 5] = y[0, 2, 0, 5] * 1.5 + 0.5
        return self.rest(y)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_one_wrong_border_pixel_inside_fails_whatever_the_dtype(dtype):
    model = network().to(dtype)
    comparison = fxfuse.verify(model, Border(copy.deepcopy(model)).eval(), (X.to(dtype),))
    assert not comparison.algebra.ok and not comparison.ok, comparison


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("seed", range(4))
def test_right_folds_are_no_false_alarm_and_far_from_one(seed, dtype):
    model = randomise(network(), seed).to(dtype)
    comparison = fxfuse.report(fxfuse.fuse(model, example_inputs=(X.to(dtype),))).verification
    assert comparison.ok and comparison.conclusive, comparison
    for agreement in (comparison.algebra, comparison.refolded):
        assert agreement.ok and agreement.difference < 0.5 * agreement.allowed, comparison
    assert comparison.refolded.allowed < 1e-9


def test_large_values_elsewhere_do_not_hide_a_wrong_channel():
    class Scores(nn.Module):
        def __init__(self, change):
            super().__init__()
            self.conv, self.change = nn.Conv2d(3, 3, 1), change

        def forward(self, x):
            y = self.conv(x) * torch.tensor([1e6, 1.0, 1e6], dtype=x.dtype).view(-1, 1, 1)
            return torch.cat([y[:, :1], y[:, 1:2] * self.change, y[:, 2:]], 1)

    one, other = randomise(Scores(1.0)).float(), randomise(Scores(1.001)).float()
    comparison = fxfuse.verify(one, other, (X,))
    assert not comparison.ok and comparison.algebra.difference < 1e-6


def test_models_that_round_inside_are_no_false_alarm():
    class Inside(nn.Module):
        def __init__(self):
            super().__init__()
            self.layers, self.head = block(), nn.Linear(6, 5)

        def forward(self, x):
            return self.head(self.layers(x).float().mean((2, 3)).to(x.dtype))

    model = randomise(Inside()).float()
    comparison = fxfuse.report(fxfuse.fuse(model, example_inputs=(torch.randn(2, 6, 8, 8),))).verification
    assert comparison.ok and 1e-8 < comparison.refolded.allowed < 1e-4
    other = copy.deepcopy(model)
    with torch.no_grad():
        other.layers[1].running_mean[2] += 0.01
    assert not fxfuse.verify(model, fxfuse.fuse(other), (torch.randn(2, 6, 8, 8),)).ok


def test_integers_that_rounding_turns_are_judged_by_how_many():
    class Best(nn.Module):
        def __init__(self, model, add=0):
            super().__init__()
            self.model, self.add = model, add

        def forward(self, x):
            return self.model(x).argmax(1) + self.add

    model = network()
    assert fxfuse.verify(Best(model).eval(), Best(fxfuse.fuse(model)).eval(), (X,)).ok
    assert not fxfuse.verify(Best(model).eval(), Best(model, add=1).eval(), (X,)).ok


def test_inputs_of_a_size_are_drawn_from_several_distributions_with_another_batch_size():
    model = network()
    comparison = fxfuse.verify(model, fxfuse.fuse(model), [torch.Size((2, 3, 8, 8))], seed=7)
    kinds = ["normal", "heavy-tailed", "constant", "zeros", "image-like"]
    shapes = [*((kind, "(2, 3, 8, 8)") for kind in kinds), ("normal", "(3, 3, 8, 8)")]
    assert comparison.inputs == tuple(f"{kind}: {shape}, seed 7" for kind, shape in shapes)
    assert comparison.ok and comparison.conclusive and "seed 7" in str(comparison)


@pytest.mark.parametrize(
    ("seen", "label"),
    [
        (lambda x: (x == 0).all(), "zeros"),
        (lambda x: (x.std() == 0) & (x != 0).any(), "constant"),
        (lambda x: x.abs().amax() > 30, "heavy-tailed"),
        (lambda x: (x.amin() >= 0) & (x.std() > 0), "image-like"),
        (lambda x: torch.tensor(len(x) == 3), "normal"),
    ],
)
def test_a_mistake_that_shows_on_one_kind_of_input_only_is_seen(seen, label):
    class Mistaken(nn.Module):
        def __init__(self, model, mistaken):
            super().__init__()
            self.model, self.mistaken = model, mistaken

        def forward(self, x):
            y = self.model(x)
            return y * 1.01 + 0.01 if self.mistaken and bool(seen(x)) else y

    models = [Mistaken(network(), mistaken).eval() for mistaken in (False, True)]
    comparison = fxfuse.verify(*models, [torch.Size((2, 3, 32, 32))])
    assert not comparison.ok, label


def test_a_batch_size_that_the_reference_does_not_take_is_left_out():
    class Fixed(nn.Module):
        def forward(self, x):
            return x.view(2, 12)

    comparison = fxfuse.verify(Fixed().eval(), Fixed().eval(), [torch.Size((2, 3, 4))])
    assert comparison.ok and len(comparison.inputs) == 5


def test_how_many_units_apart_and_how_often_the_best_class_agrees():
    class Ones(nn.Module):
        def __init__(self, values):
            super().__init__()
            self.values = values

        def forward(self, x):
            return self.values + 0 * x.sum()

    one = torch.tensor([[1.0, 2.0, 3.0, -1.0], [4.0, 0.5, 0.25, 0.0]])
    other = one.clone()
    other[0, 0] = torch.nextafter(one[0, 0], one[0, 1])
    other[0, 3] = -1.0 - 6 * 2**-23
    other[1, 3] = -(2.0**-149)
    comparison = fxfuse.verify(Ones(one).eval(), Ones(other).eval(), (X,), atol=1e-3)
    assert comparison.ulps == (5, 2, 0, 1) and comparison.top1 == 1.0
    other[1, 1] = 5.0
    comparison = fxfuse.verify(Ones(one).eval(), Ones(other).eval(), (X,), atol=10.0)
    assert comparison.top1 == 0.5 and "the same class in 50 %" in str(comparison)


@pytest.mark.parametrize("precision", ["highest", "medium"])
def test_reduced_precision_is_off_while_verifying_and_restored(precision):
    seen = []

    class Looks(nn.Module):
        def forward(self, x):
            seen.append([_read(get) for get, _, _ in _SETTINGS])
            seen.append(torch.is_autocast_enabled("cpu") or not torch.are_deterministic_algorithms_enabled())
            return x * 2

    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision)
    try:
        state = [_read(get) for get, _, _ in _SETTINGS]
        with torch.autocast("cpu"):
            assert fxfuse.verify(Looks().eval(), Looks().eval(), (X,)).ok
        assert [_read(get) for get, _, _ in _SETTINGS] == state
        assert not torch.are_deterministic_algorithms_enabled()
        with pytest.raises(ZeroDivisionError), precise():
            raise ZeroDivisionError
        assert [_read(get) for get, _, _ in _SETTINGS] == state
    finally:
        torch.set_float32_matmul_precision(before)
    assert seen and all(each in (False, [value for _, _, value in _SETTINGS]) for each in seen)


class Sparse(nn.Module):
    """It holds a sparse matrix."""

    def __init__(self):
        super().__init__()
        self.linear, self.norm = nn.Linear(8, 8), nn.BatchNorm1d(8)
        self.register_buffer("matrix", torch.eye(8).to_sparse())

    def forward(self, x):
        return torch.sparse.mm(self.matrix, self.norm(self.linear(x)).T)


def test_sparse_buffers_are_no_weights_that_are_rounded():
    model = Sparse().eval()
    randomise(model.linear)
    randomise(model.norm)
    model.float()
    x = torch.randn(5, 8)
    fused = fxfuse.fuse(model, example_inputs=(x,))
    assert len(fxfuse.report(fused).folded) == 1 and fxfuse.verify(model, fused, (x,)).ok
