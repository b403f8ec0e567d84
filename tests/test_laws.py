"""The laws of the design, each with a test that fails when it is broken."""

import copy
import io
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse import pipeline, zoo
from tests.support import assert_exact, assert_untouched, folds, randomise, snapshot


class Block(nn.Module):
    """A residual block with a projection, a shared norm-free convolution and a functional tail."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(3, 8, 3, padding=1, bias=False)
        self.bn1 = nn.BatchNorm2d(8, eps=1e-3)
        self.conv2 = nn.Conv2d(8, 8, 3, padding=1, groups=2)
        self.bn2 = nn.BatchNorm2d(8)
        self.project = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
        self.up = nn.ConvTranspose2d(8, 6, 2, stride=2, groups=2)
        self.norm_up = nn.BatchNorm2d(6)
        self.tail = nn.Parameter(torch.empty(4, 6, 1, 1))
        self.tail_norm = nn.BatchNorm2d(4)

    def forward(self, x):
        y = F.relu(self.bn1(self.conv1(x)))
        y = self.bn2(self.conv2(y)) + self.project(x)
        y = F.relu(self.norm_up(self.up(y)))
        n = self.tail_norm
        return F.batch_norm(
            F.conv2d(y, self.tail), n.running_mean, n.running_var, n.weight, n.bias, eps=n.eps
        )


IMAGE = torch.randn(2, 3, 8, 8, dtype=torch.float64)


def test_law_1_a_wrong_fold_never_leaves_fuse_with_example_inputs(monkeypatch):
    right = pipeline.rewrite

    def wrong(captured, plan, solution, reader):
        for node, (weight, bias) in solution.tensors.items():
            solution.tensors[node] = (weight, nn.Parameter(bias * (1 + 1e-3)))
        return right(captured, plan, solution, reader)

    monkeypatch.setattr(pipeline, "rewrite", wrong)
    with pytest.raises(fxfuse.VerificationError, match="NOT equal"):
        fxfuse.fuse(randomise(Block()), example_inputs=(IMAGE,))


@pytest.mark.parametrize("name", ["torchvision:resnet18", "torchvision:densenet121", "timm:regnety_002"])
def test_law_2_folded_and_refused_account_for_every_norm_that_runs(name):
    with torch.device("meta"):
        model = zoo.load(name).model
    executed = []
    for path, module in model.named_modules():
        if isinstance(module, nn.BatchNorm2d):
            module.register_forward_hook(lambda *_, path=path: executed.append(path))
    with torch.no_grad():
        model(torch.empty(1, 3, 64, 64, device="meta"))
    for module in model.modules():
        module._forward_hooks.clear()
    report = fxfuse.explain(model)
    assert report.norms == len(executed) == len(report.folded) + len(report.refused)
    assert sorted(record.norm for record in (*report.folded, *report.refused)) == sorted(executed)


def test_law_3_the_source_is_untouched_bit_for_bit():
    model = randomise(Block())
    model.register_forward_hook(lambda *_: None)
    model.conv1.weight.requires_grad_(False)
    before, generator, source = snapshot(model), torch.get_rng_state(), model(IMAGE)
    fused = fxfuse.fuse(model)
    fused.float().requires_grad_(False).train()
    fxfuse.verify(model, fxfuse.fuse(model), (IMAGE,))
    assert_untouched(before, model)
    assert torch.equal(generator, torch.get_rng_state())
    assert torch.equal(model(IMAGE), source)


class Counting(Block):
    """It writes to tensors that are no parameters, and may have control flow."""

    def __init__(self, branches: bool) -> None:
        super().__init__()
        self.branches = branches
        self.calls, self.named = [torch.zeros(())], {"calls": (torch.zeros(()),)}
        self.direct = torch.zeros(())
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))

    def forward(self, x):
        if not self.branches or x.shape[1] == 3:
            for each in (self.calls[0], self.named["calls"][0], self.direct, self.count):
                each.add_(1)
        return super().forward(x) * self.calls[0]


@pytest.mark.parametrize("keep_modules", [False, True])
@pytest.mark.parametrize("branches", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_law_3_nor_is_any_other_tensor_of_the_source(keep_modules, branches, dtype):
    model = randomise(Counting(branches)).to(dtype)
    before, x = copy.deepcopy(model), IMAGE.to(dtype)
    fused = fxfuse.fuse(model, example_inputs=(x,), keep_modules=keep_modules)
    fxfuse.explain(model, example_inputs=(x,))
    assert fxfuse.verify(model, fused, (x,)).ok
    for tensor in (model.calls[0], model.named["calls"][0], model.direct):
        assert not tensor
    assert torch.equal(model.count, before.count)
    for _ in range(2):  # a count is no constant
        torch.testing.assert_close(fused(x), before(x), rtol=1e-4, atol=1e-4)


class Tied(nn.Module):
    """It holds a weight of a layer that is registered after it."""

    def __init__(self) -> None:
        super().__init__()
        body = nn.Linear(3, 3, bias=False)
        self.held = nn.Module()
        self.held.weights = [body.weight]
        self.body, self.norm = body, nn.BatchNorm1d(3)

    def forward(self, x):
        return self.norm(self.body(x)) @ self.held.weights[0].T


def test_law_3_nor_weights_that_are_held_elsewhere_too():
    model = randomise(Tied()).float()
    before = snapshot(model)
    fused = fxfuse.fuse(model, example_inputs=(torch.randn(4, 3),))
    assert_untouched(before, model)
    fused.half()
    assert_untouched(before, model)
    assert model.held.weights[0] is model.body.weight and model.body.weight.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_law_4_weights_are_rounded_once_from_float64(dtype):
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.BatchNorm2d(8))
    conv, first, second = randomise(model).to(dtype)
    weight, bias = conv.weight.detach().double(), conv.bias.detach().double()
    for norm in (first, second):
        scale = norm.weight.double() / (norm.running_var.double() + norm.eps).sqrt()
        weight = weight * scale[:, None, None, None]
        bias = (bias - norm.running_mean.double()) * scale + norm.bias.double()
    folded = fxfuse.fuse(model).get_submodule("0")
    assert folded.weight.dtype == folded.bias.dtype == dtype
    # An ulp apart at most: float64 arithmetic in another order may end on the other side of a tie.
    for got, exact in ((folded.weight, weight), (folded.bias, bias)):
        assert ((got.double() - exact).abs() <= torch.finfo(dtype).eps * exact.abs() * 0.5000001).all()


def test_law_4_what_the_dtype_cannot_hold_is_refused():
    model = randomise(
        nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    )
    model[1].running_var[2] = 1e-12
    model[1].weight.data[2] = 6e4
    model[1].eps = 0.0
    report = fxfuse.explain(model.half())
    assert [(left.norm, left.code) for left in report.refused] == [("1", "FXF401")]
    assert [fold.norm for fold in report.folded] == ["3"]


@pytest.mark.parametrize("shape", [(1, 3, 8, 8), (5, 3, 8, 8), (2, 3, 17, 11)])
def test_law_5_any_batch_and_image_size(shape):
    folds(randomise(Block()), torch.randn(shape, dtype=torch.float64), folded=5)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
def test_law_5_dtype_and_memory_format_are_kept(dtype, memory_format):
    model = randomise(Block()).to(dtype=dtype, memory_format=memory_format)
    fused = fxfuse.fuse(model)
    assert len(fxfuse.report(fused).folded) == 5
    for name, parameter in fused.named_parameters():
        assert parameter.dtype == dtype
        if name in dict(model.named_parameters()) and parameter.dim() == 4:
            assert parameter.stride() == model.get_parameter(name).stride(), name
    comparison = fxfuse.verify(model, fused, (IMAGE.to(dtype=dtype, memory_format=memory_format),))
    assert comparison.ok and comparison.conclusive, comparison


def _saved_and_loaded(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    return torch.load(file, weights_only=False)


@pytest.mark.parametrize(
    "journey", [copy.deepcopy, lambda model: pickle.loads(pickle.dumps(model)), _saved_and_loaded]
)
def test_law_5_a_folded_model_can_be_copied_and_stored(journey):
    fused = fxfuse.fuse(randomise(Block()))
    arrived = journey(fused)
    assert torch.equal(fused(IMAGE), arrived(IMAGE))
    assert fxfuse.report(arrived) == fxfuse.report(fused)


def test_law_5_state_dict_keys_stay_and_load():
    model = randomise(Block())
    fused = fxfuse.fuse(model)
    assert fused.state_dict().keys() <= model.state_dict().keys() | {"conv1.bias", "tail_bias"}
    other = fxfuse.fuse(randomise(Block(), seed=1))
    other.load_state_dict(fused.state_dict())
    assert torch.equal(other(IMAGE), fused(IMAGE))


def test_law_5_a_folded_model_can_be_exported():
    fused = fxfuse.fuse(randomise(Block()))
    program = torch.export.export(fused, (IMAGE,), dynamic_shapes=({0: torch.export.Dim("batch")},))
    other = torch.randn(3, 3, 8, 8, dtype=torch.float64)
    assert_exact(fused(other), program.module()(other))


def test_law_6_a_shared_operator_is_copied_and_not_changed_under_its_other_user():
    class Shared(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.conv, self.norm = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

        def forward(self, x):
            return self.norm(self.conv(x)), self.conv(x)

    model = randomise(Shared())
    fused = folds(model, IMAGE, folded=1)
    assert torch.equal(fused.conv.weight, model.conv.weight)
    assert not torch.equal(fused.conv_folded.weight, model.conv.weight)


def test_law_7_folding_is_idempotent_and_deterministic():
    model = randomise(Block())
    first, second = fxfuse.fuse(model), fxfuse.fuse(model)
    again = fxfuse.fuse(first)
    for other in (second, again):
        assert other.code == first.code
        assert other.state_dict().keys() == first.state_dict().keys()
        assert all(torch.equal(other.state_dict()[key], value) for key, value in first.state_dict().items())
    assert fxfuse.report(first) == fxfuse.report(second)


def test_law_8_the_tests_draw_no_trivial_statistics():
    for norm in (nn.BatchNorm2d(5), nn.InstanceNorm1d(4, affine=True, track_running_stats=True)):
        randomise(norm)
        assert (norm.running_mean != 0).all() and (norm.running_var != 1).all() and (norm.bias != 0).all()
        assert (norm.weight == 0).any() and (norm.weight < 0).any()
