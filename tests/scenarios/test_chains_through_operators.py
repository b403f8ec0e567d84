"""Scenarios 14 and 18-23: what an affine map may pass on its way to a linear operator, backward and forward.

Each table says which operators let a map pass, in which direction and under what condition. A map goes
backward in ``convolution → operator → norm`` and forward in ``norm → operator → convolution``.
"""

import copy
import itertools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxfuse
from tests.forms import (
    CONVS,
    EXPORT_WARNING,
    FORMS,
    NORMS,
    Forward,
    check,
    exported,
    modules,
    noise,
    norm_calls,
)
from tests.support import assert_exact, assert_untouched, randomise, snapshot

pytestmark = pytest.mark.filterwarnings(EXPORT_WARNING)
IMAGE = (2, 4, 6, 6)
X = noise(*IMAGE)


class AnyCode(str):
    """Equal to every refusal code."""

    __hash__ = str.__hash__

    def __eq__(self, other):
        return True


def assert_settled(model, *inputs, folded=0, left=0, direction=None, example_inputs=None):
    """As `check`, with the number of norms that are left in place of their codes."""
    fused = check(model, *inputs, folded=folded, left=[AnyCode()] * left, example_inputs=example_inputs)
    if direction is not None:
        assert {fold.direction for fold in fxfuse.report(fused).folded} == {direction}
    return fused


def assert_never_wrong(model, *inputs, example_inputs=None):
    """That the folded model is exact and accounts for its norms, whatever was folded."""
    before = snapshot(model)
    fused = fxfuse.fuse(model, example_inputs=example_inputs)
    assert_untouched(before, model)
    if isinstance(fused, fx.GraphModule):
        assert norm_calls(fused) == len(fxfuse.report(fused).refused)
    with torch.no_grad():
        assert_exact(model(*copy.deepcopy(inputs)), fused(*copy.deepcopy(inputs)))
    return fused


def unshifted(model):
    """`model` with norms that only scale: mean and β are 0."""
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.running_mean.zero_()
            module.bias.detach().zero_()
    return model


def rising(model):
    """`model` with norms whose scale has no negative entries; a zero stays one."""
    for module in model.modules():
        if isinstance(getattr(module, "running_mean", None), torch.Tensor):
            module.weight.detach().abs_()
    return model


def norm_for(shape):
    """A norm for values of `shape`."""
    return NORMS[max(1, len(shape) - 2)](shape[1])


def linear_for(shape):
    """A linear operator on the channels of values of `shape`."""
    return CONVS[len(shape) - 2](shape[1], 3, 1) if len(shape) > 2 else nn.Linear(shape[1], 3)


def between(first, middle, last):
    """`first`, `middle`, `last`, of which `middle` is a module or a function of a tensor."""
    layers = {"first": first, "last": last, **({"middle": middle} if isinstance(middle, nn.Module) else {})}
    return randomise(Forward(lambda m, x: m.last(through(m, middle, m.first(x))), **layers))


def through(m, middle, y):
    return m.middle(y) if isinstance(middle, nn.Module) else middle(y)


def backward(middle, shape=IMAGE):
    """Convolution, `middle`, norm: the map can only go backward. `shape` is that of `middle`'s input."""
    convolution = CONVS[len(shape) - 2](shape[1], shape[1], 1)
    return between(convolution, middle, norm_for(_after(middle, shape)))


def forward(middle, shape=IMAGE):
    """Norm, `middle`, linear operator: the map can only go forward. `shape` is that of the input."""
    return between(norm_for(shape), middle, linear_for(_after(middle, shape)))


def _after(middle, shape):
    return middle(torch.zeros(shape)).shape


BOTH = pytest.mark.parametrize("way", [backward, forward])
FORM = pytest.mark.parametrize("form", (modules, exported))
# An exported graph holds the sizes of its example as numbers, which prove nothing about other inputs.
SIZES_FORM = pytest.mark.parametrize("form", (modules,))


def table(*tables):
    """Parametrises `middle` by the entries of dictionaries; their keys are the names of the cases."""
    entries = {name: entry for each in tables for name, entry in each.items()}
    return pytest.mark.parametrize("middle", entries.values(), ids=entries.keys())


def drop_path(y, training=False):
    if not training:
        return y
    return y * torch.rand(y.shape[0], 1, 1, 1).round()


IDENTITIES = {
    "Identity": nn.Identity(),
    "Dropout": nn.Dropout(0.9),
    "Dropout in place": nn.Dropout(inplace=True),
    "F.dropout": lambda y: F.dropout(y, training=False),
    "contiguous": lambda y: y.contiguous(),
    "drop path": drop_path,
    "Sequential": nn.Sequential(nn.Identity(), nn.Sequential(), nn.Dropout()),
}


def _unpacked(y):
    batch, channels, height, width = y.shape
    return y.view(batch, channels, height * width)


def _unpacked_size(y):
    batch, channels, _, width = y.size()
    return y.reshape((batch, channels, -1, width // 2, 2))


RESHAPES = {
    "Flatten(2)": nn.Flatten(2),
    "flatten(2)": lambda y: y.flatten(2),
    "flatten(-2, -1)": lambda y: y.flatten(-2, -1),
    "torch.flatten by keyword": lambda y: torch.flatten(y, start_dim=2),
    "flatten(3) of nothing": lambda y: y.flatten(3),
    "view(shape, shape, -1)": lambda y: y.view(y.shape[0], y.shape[1], -1),
    "view(size, C, -1)": lambda y: y.view(y.size(0), 4, -1),
    "reshape of a tuple": lambda y: y.reshape((y.shape[0], 4, -1)),
    "torch.reshape": lambda y: torch.reshape(y, (y.size(0), y.size(1), -1)),
    "view of unpacked sizes": _unpacked,
    "reshape of unpacked sizes": _unpacked_size,
    "unflatten(3)": lambda y: y.unflatten(3, (2, 3)),
    "unflatten(-1)": lambda y: y.unflatten(-1, (3, -1)),
    "Unflatten(2)": nn.Unflatten(2, (3, 2)),
    "unsqueeze(-1)": lambda y: y.unsqueeze(-1),
    "unsqueeze(2)": lambda y: torch.unsqueeze(y, 2),
    "[:, :, None]": lambda y: y[:, :, None],
    "[..., None]": lambda y: y[..., None],
    "unsqueeze, squeeze": lambda y: y.unsqueeze(2).squeeze(2),
    "[:, None], [:, 0]": lambda y: y[:, None][:, 0],
    "flatten, unflatten": lambda y: y.flatten(2).unflatten(2, (2, 18)),
}
PERMUTATIONS = {
    "permute": lambda y: y.permute(0, 1, 3, 2),
    "permute of a tuple": lambda y: y.permute((0, -3, 3, 2)),
    "torch.permute": lambda y: torch.permute(y, (0, 1, 3, 2)),
    "transpose": lambda y: y.transpose(2, 3),
    "torch.transpose": lambda y: torch.transpose(y, -1, -2),
    "swapaxes": lambda y: y.swapaxes(2, 3),
    "movedim": lambda y: y.movedim(3, 2),
    "mT": lambda y: y.mT,
    "batch first and back": lambda y: y.permute(1, 0, 2, 3).transpose(0, 1),
    "channels last and back": lambda y: y.permute(0, 2, 3, 1).permute(0, 3, 1, 2),
    "channels last and back by movedim": lambda y: torch.movedim(y.movedim(1, -1), -1, 1),
    "tokens and back": lambda y: y.flatten(2).transpose(1, 2).transpose(-1, 1),
}
POOLS = {
    "AvgPool2d": nn.AvgPool2d(2),
    "AvgPool2d with stride": nn.AvgPool2d(3, 2),
    "AvgPool2d with ceil_mode": nn.AvgPool2d(4, ceil_mode=True),
    "AvgPool2d not counting its padding": nn.AvgPool2d(3, padding=1, count_include_pad=False),
    "AvgPool2d with all of that": nn.AvgPool2d(4, 3, 1, ceil_mode=True, count_include_pad=False),
    "F.avg_pool2d": lambda y: F.avg_pool2d(y, (2, 3)),
    "F.avg_pool2d with stride": lambda y: F.avg_pool2d(y, 3, stride=1, padding=0),
    "F.avg_pool2d not counting": lambda y: F.avg_pool2d(y, 3, padding=(0, 1), count_include_pad=False),
    "AdaptiveAvgPool2d(1)": nn.AdaptiveAvgPool2d(1),
    "AdaptiveAvgPool2d of a tuple": nn.AdaptiveAvgPool2d((2, 4)),
    "AdaptiveAvgPool2d with None": nn.AdaptiveAvgPool2d((None, 1)),
    "F.adaptive_avg_pool2d": lambda y: F.adaptive_avg_pool2d(y, 4),
    "mean with keepdim": lambda y: y.mean((2, 3), keepdim=True),
    "mean": lambda y: y.mean((2, 3)),
    "mean by keyword": lambda y: y.mean(dim=(-1, -2)),
    "torch.mean": lambda y: torch.mean(y, [2, 3], True),
    "mean of one axis": lambda y: y.mean(3),
    "mean of one axis after another": lambda y: y.mean(-1).mean(-1),
    "pool, Flatten": nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten()),
    "mean, flatten": lambda y: y.mean((2, 3), keepdim=True).flatten(1),
    "mean, squeeze": lambda y: y.mean((2, 3), keepdim=True).squeeze(-1).squeeze(-1),
    "mean, [:, :, 0, 0]": lambda y: y.mean((2, 3), keepdim=True)[:, :, 0, 0],
}
UPSAMPLINGS = {
    "Upsample": nn.Upsample(scale_factor=2),
    "Upsample to a size": nn.Upsample((5, 7)),
    "Upsample bilinear": nn.Upsample(scale_factor=2, mode="bilinear"),
    "Upsample bilinear, corners": nn.Upsample((5, 7), mode="bilinear", align_corners=True),
    "UpsamplingNearest2d": nn.UpsamplingNearest2d(scale_factor=2),
    "UpsamplingBilinear2d": nn.UpsamplingBilinear2d(scale_factor=2),
    "F.interpolate": lambda y: F.interpolate(y, scale_factor=0.5),
    "F.interpolate nearest": lambda y: F.interpolate(y, (9, 5), mode="nearest"),
    "F.interpolate bilinear": lambda y: F.interpolate(y, size=(9, 5), mode="bilinear", align_corners=False),
    "F.interpolate to a shape": lambda y: F.interpolate(y, y.shape[2:], mode="bilinear", align_corners=True),
}
PADDINGS = {
    "ReflectionPad2d": nn.ReflectionPad2d(1),
    "ReplicationPad2d": nn.ReplicationPad2d((1, 2, 0, 1)),
    "CircularPad2d": nn.CircularPad2d(2),
    "F.pad reflect": lambda y: F.pad(y, (1, 1, 0, 2), mode="reflect"),
    "F.pad replicate": lambda y: F.pad(y, (1, 1, 0, 2), "replicate"),
    "F.pad circular": lambda y: F.pad(y, (1, 1, 0, 2), mode="circular"),
}
PARTS_OF_THE_IMAGE = {
    "[:, :, 1:-1]": lambda y: y[:, :, 1:-1],
    "[..., ::2, 1:]": lambda y: y[..., ::2, 1:],
    "[:, :, 0]": lambda y: y[:, :, 0],
    "[1:]": lambda y: y[1:],
    "select": lambda y: y.select(3, 1),
    "narrow": lambda y: y.narrow(2, 1, 3),
    "chunk": lambda y: y.chunk(2, 2)[1],
    "split": lambda y: y.split(3, -1)[0],
    "torch.split": lambda y: torch.split(y, [1, 5], dim=3)[1],
}
PARTS_OF_THE_CHANNELS = {
    "[:, 1:3]": lambda y: y[:, 1:3],
    "[:, ::2]": lambda y: y[:, ::2],
    "[:, 1:2]": lambda y: y[:, 1:2],
    "narrow channels": lambda y: y.narrow(1, 1, 2),
    "torch.narrow channels": lambda y: torch.narrow(y, 1, 1, 3),
    "chunk channels": lambda y: y.chunk(2, 1)[1],
    "uneven chunk of channels": lambda y: y.chunk(3, 1)[1],
    "torch.chunk channels": lambda y: torch.chunk(y, 2, dim=-3)[0],
    "split channels": lambda y: y.split(1, 1)[2],
    "uneven split of channels": lambda y: y.split(3, dim=1)[1],
    "torch.split channels": lambda y: torch.split(y, [1, 3], dim=1)[1],
}


def shufflenet(y, groups=2):
    batch, channels, height, width = y.size()
    y = y.view(batch, groups, channels // groups, height, width)
    return torch.transpose(y, 1, 2).contiguous().view(batch, channels, height, width)


SHUFFLES = {
    "ChannelShuffle": nn.ChannelShuffle(2),
    "F.channel_shuffle": lambda y: F.channel_shuffle(y, 2),
    "ShuffleNet": shufflenet,
    "unflatten, transpose, flatten": lambda y: y.unflatten(1, (2, -1)).transpose(1, 2).flatten(1, 2),
}
LET_PASS = (
    *(IDENTITIES, RESHAPES, PERMUTATIONS, POOLS, UPSAMPLINGS, PADDINGS),
    *(PARTS_OF_THE_IMAGE, PARTS_OF_THE_CHANNELS, SHUFFLES),
)


# 14, 20, 22, 23
@BOTH
@table(*LET_PASS)
def test_norm_passes_operator_that_keeps_channels_apart(middle, way):
    model = way(middle)
    fused = assert_settled(model, X, folded=1, direction=way.__name__)
    for shape in [(3, 4, 8, 8), (1, 4, 6, 6), (4, 4, 4, 10)]:
        _assert_exact_or_rejected(model, fused, noise(*shape))


@table(*LET_PASS)
def test_norm_that_passed_an_operator_is_never_wrong_without_a_batch_axis(middle):
    """Without a batch axis channels are elsewhere: the folded model may refuse to run, but not be wrong."""
    model = backward(middle)
    fused = fxfuse.fuse(model)
    for size in (6, model.first.out_channels):
        _assert_exact_or_rejected(model, fused, noise(4, size, size), rejectable=True)


def _assert_exact_or_rejected(model, fused, x, rejectable=False):
    """That `fused` computes what `model` does, if `model` takes `x`; `rejectable`: `fused` need not."""
    rejections = (RuntimeError, ValueError, IndexError, AssertionError)
    try:
        with torch.no_grad():
            expected = model(x.clone())
    except rejections:
        return
    try:
        actual = fused(x)
    except rejections:
        assert rejectable
        return
    assert_exact(expected, actual)


@pytest.mark.parametrize("used", ["before", "after"])
@pytest.mark.parametrize("middle", [entry for entries in LET_PASS for entry in [*entries.values()][::6]])
def test_backward_is_left_where_a_value_on_the_way_is_used_elsewhere(middle, used):
    def run(m, x):
        before = m.first(x)
        after = through(m, middle, before)
        return m.last(after), F.relu(before if used == "before" else after)

    model = backward(middle)
    model.__dict__["written"] = run
    assert_settled(model, X, left=1)


@pytest.mark.parametrize("used", ["before", "after"])
@pytest.mark.parametrize("middle", [entry for entries in LET_PASS for entry in [*entries.values()][::6]])
def test_forward_is_left_where_a_value_on_the_way_is_used_elsewhere(middle, used):
    def run(m, x):
        before = m.first(x)
        after = through(m, middle, before)
        return m.last(after), F.relu(before if used == "before" else after)

    model = forward(middle)
    model.__dict__["written"] = run
    assert_settled(model, X, left=1)


# The same for sequences and volumes.
SEQUENCES = {
    "AvgPool1d": nn.AvgPool1d(2),
    "F.avg_pool1d": lambda y: F.avg_pool1d(y, 3, 1),
    "AdaptiveAvgPool1d": nn.AdaptiveAvgPool1d(1),
    "mean": lambda y: y.mean(2, keepdim=True),
    "Upsample": nn.Upsample(scale_factor=2),
    "Upsample linear": nn.Upsample(scale_factor=2, mode="linear", align_corners=True),
    "ReflectionPad1d": nn.ReflectionPad1d(1),
    "ReplicationPad1d": nn.ReplicationPad1d((0, 2)),
    "CircularPad1d": nn.CircularPad1d(1),
    "unsqueeze": lambda y: y.unsqueeze(-1),
}
VOLUMES = {
    "AvgPool3d": nn.AvgPool3d(2),
    "AvgPool3d not counting its padding": nn.AvgPool3d(3, 2, 1, count_include_pad=False),
    "AdaptiveAvgPool3d": nn.AdaptiveAvgPool3d((1, 2, None)),
    "mean": lambda y: y.mean((-1, -2, -3)),
    "Upsample trilinear": nn.Upsample(scale_factor=2, mode="trilinear"),
    "ReflectionPad3d": nn.ReflectionPad3d(1),
    "ReplicationPad3d": nn.ReplicationPad3d(1),
    "flatten(2)": nn.Flatten(2),
    "flatten(3)": lambda y: y.flatten(3),
    "one image": lambda y: y[:, :, 1],
}
SEQUENCE, VOLUME = noise(2, 4, 8), noise(2, 4, 4, 4, 4)


# BatchNorm1d takes two or three axes, and this operator any number. A convolution before it tells.
OF_ANY_RANK = ("unsqueeze",)


@BOTH
@table(SEQUENCES)
def test_norm_of_sequences_passes_operators_too(middle, way):
    model, known = way(middle, SEQUENCE.shape), {}
    if way is forward and any(middle is SEQUENCES[name] for name in OF_ANY_RANK):
        check(model, SEQUENCE, left=["FXF105"])
        known = {"example_inputs": (SEQUENCE,)}
    assert_settled(model, SEQUENCE, folded=1, direction=way.__name__, **known)


@BOTH
@table(VOLUMES)
def test_norm_of_volumes_passes_operators_too(middle, way):
    assert_settled(way(middle, VOLUME.shape), VOLUME, folded=1, direction=way.__name__)


def _grouped(y):
    batch, _, height, width = y.shape
    return y.view(batch, 2, 4, height, width).transpose(1, 2)


# Operators that let a map pass in one direction: several channels become one that the map treats alike,
# or one becomes several. In the other direction the map would have to treat one channel in two ways.
SPLIT_CHANNELS = {
    "PixelShuffle": nn.PixelShuffle(2),
    "F.pixel_shuffle": lambda y: F.pixel_shuffle(y, 2),
    "unflatten(1)": lambda y: y.unflatten(1, (4, 2)),
    "Unflatten(1)": nn.Unflatten(1, (2, -1)),
    "view of groups": lambda y: y.view(y.shape[0], 4, 2, y.shape[2], y.shape[3]),
    "view of groups, channels of one": _grouped,
}
WIDE = noise(2, 8, 4, 4)
MERGE_CHANNELS = {
    "PixelUnshuffle": nn.PixelUnshuffle(2),
    "F.pixel_unshuffle": lambda y: F.pixel_unshuffle(y, 2),
    "Flatten": nn.Flatten(),
    "flatten(1)": lambda y: y.flatten(1),
    "flatten(1, 2)": lambda y: y.flatten(1, 2),
    "torch.flatten(1)": lambda y: torch.flatten(y, 1),
    "view(size, -1)": lambda y: y.view(y.size(0), -1),
    "reshape(shape, -1)": lambda y: y.reshape(y.shape[0], -1),
    "channels last, flatten(1)": lambda y: y.permute(0, 2, 3, 1).flatten(1),
    "pool, flatten(1)": lambda y: F.avg_pool2d(y, 2).flatten(1),
    "pool, dropout, Flatten": nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Dropout(), nn.Flatten()),
    "transpose, flatten(1, 2)": lambda y: y.transpose(1, 2).flatten(1, 2),
}


@table(SPLIT_CHANNELS)
def test_channel_that_becomes_several_lets_a_norm_pass_only_backward(middle):
    assert_settled(forward(middle, WIDE.shape), WIDE, left=1)
    assert_settled(backward(middle, WIDE.shape), WIDE, folded=1, direction="backward")


@table(MERGE_CHANNELS)
def test_channels_that_become_one_let_a_norm_pass_only_forward(middle):
    assert_settled(backward(middle), X, left=1)
    assert_settled(forward(middle), X, folded=1, direction="forward")


# Operators that let the scale pass but not the shift.
ONLY_SCALE = {
    "AvgPool2d counting its padding": nn.AvgPool2d(3, padding=1),
    "F.avg_pool2d counting": lambda y: F.avg_pool2d(y, 2, padding=(0, 1), ceil_mode=True),
    "ZeroPad2d": nn.ZeroPad2d(1),
    "ConstantPad2d of 0": nn.ConstantPad2d((1, 0, 2, 1), 0.0),
    "F.pad": lambda y: F.pad(y, (1, 1)),
    "F.pad by keyword": lambda y: F.pad(input=y, pad=(1, 1, 0, 2), mode="constant", value=0),
}
# Operators through which a scale could go in principle, if there is no shift.
AT_MOST_SCALE = {
    "AvgPool2d with divisor_override": nn.AvgPool2d(2, divisor_override=3),
    "F.avg_pool2d with divisor_override": lambda y: F.avg_pool2d(y, 2, divisor_override=5),
    "sum": lambda y: y.sum((2, 3), keepdim=True),
    "torch.sum": lambda y: torch.sum(y, dim=(2, 3)),
    "cumsum over the image": lambda y: y.cumsum(2),
    "roll of a padded image": lambda y: F.pad(y, (1, 1)).roll(1, 3),
}
# Operators of which some entry of a random map is never true.
SQUARE = noise(2, 6, 6, 6)  # as many channels as rows and columns
OPAQUE = {
    "ConstantPad2d of another value": nn.ConstantPad2d(1, 0.5),
    "F.pad with a value": lambda y: F.pad(y, (1, 1), value=-1.0),
    "LPPool2d": nn.LPPool2d(2, 2),
    "AdaptiveMaxPool2d": nn.AdaptiveMaxPool2d(2),
    "amax": lambda y: y.amax((2, 3)),
    "std": lambda y: y.std((2, 3), keepdim=True),
    "ReLU": nn.ReLU(),
    "abs": torch.abs,
    "softmax": lambda y: y.softmax(1),
    "cumsum over channels": lambda y: y.cumsum(1),
    "mean over channels": lambda y: y.mean(1),
    "mean over all but one image axis": lambda y: y.mean((0, 3)),
    "sum over channels": lambda y: y.sum(1),
    "LocalResponseNorm": nn.LocalResponseNorm(2),
    "GroupNorm": nn.GroupNorm(2, 6, affine=False),
    "LayerNorm": lambda y: F.layer_norm(y, (6, 6)),
    "Softmax2d": nn.Softmax2d(),
    "y * y": lambda y: y * y,
    "outer sum": lambda y: y.mean(1, keepdim=True) + y,
}


@BOTH
@table(ONLY_SCALE)
def test_norm_passes_padding_with_zeros_if_it_does_not_shift(middle, way):
    assert_settled(way(middle), X, left=1)
    assert_settled(unshifted(way(middle)), X, folded=1, direction=way.__name__)


@BOTH
@table(AT_MOST_SCALE)
def test_norm_passes_sums_at_most_if_it_does_not_shift(middle, way):
    assert_settled(way(middle), X, left=1)
    assert_never_wrong(unshifted(way(middle)), X)


@BOTH
@table(OPAQUE)
def test_norm_does_not_pass_operator_that_mixes_channels_or_is_not_affine(middle, way):
    model = way(middle, SQUARE.shape)
    assert_settled(model, SQUARE, left=1)
    assert_settled(unshifted(model), SQUARE, left=1)


# Max pooling commutes with a scale that is nowhere negative.
MAX_POOLS = {
    "MaxPool2d": nn.MaxPool2d(2),
    "MaxPool2d with padding": nn.MaxPool2d(3, 2, 1),
    "MaxPool2d with dilation": nn.MaxPool2d(2, 1, dilation=2, ceil_mode=True),
    "F.max_pool2d": lambda y: F.max_pool2d(y, 2),
    "F.max_pool2d by keyword": lambda y: F.max_pool2d(input=y, kernel_size=3, stride=2, padding=1),
    "torch.max_pool2d": lambda y: torch.max_pool2d(y, 2),
}


@BOTH
@pytest.mark.parametrize(
    ("middle", "x"),
    [
        *((middle, X) for middle in MAX_POOLS.values()),
        (nn.MaxPool1d(3, 1, 1), SEQUENCE),
        (nn.MaxPool3d(2), VOLUME),
    ],
)
def test_norm_passes_max_pooling_if_its_scale_is_nowhere_negative(middle, x, way):
    model = rising(way(middle, x.shape))
    assert_settled(model, x, folded=1, direction=way.__name__)
    (model.last if way is backward else model.first).weight.detach()[-1] = -1e-3
    check(model, x, left=["FXF306"])


@BOTH
def test_norm_does_not_pass_max_pooling_whose_indices_are_used(way):
    def indices(y):
        values, places = F.max_pool2d(y, 2, return_indices=True)
        return values + 0 * places

    assert_settled(rising(way(indices)), X, left=1)


def test_scale_of_zero_does_not_pass_max_pooling_whose_indices_are_returned():
    def run(m, x):
        values, places = F.max_pool2d(m.operator(x), 2, return_indices=True)
        return m.norm(values), places

    model = rising(randomise(Forward(run, operator=nn.Conv2d(4, 4, 3), norm=nn.BatchNorm2d(4))))
    assert_settled(model, X, left=1)


class Branches(nn.Module):
    """Models side by side on one input: a whole table in one graph, which costs one export."""

    def __init__(self, branches):
        super().__init__()
        self.branches = nn.ModuleList(branches)
        self.eval()

    def forward(self, x):
        return [branch(x) for branch in self.branches]


# An export writes sizes down as numbers, and a number does not say of which axis it is the size.
LITERAL_IN_EXPORTS = {
    *("view(shape, shape, -1)", "view(size, C, -1)", "reshape of a tuple", "torch.reshape", "ShuffleNet"),
    *("view of unpacked sizes", "reshape of unpacked sizes", "view(size, -1)", "reshape(shape, -1)"),
    *("view of groups", "view of groups, channels of one"),
}
BOTH_WAYS = (backward, forward)
CLAIMS = [
    *((entries, X, way, way, 1) for entries in LET_PASS for way in BOTH_WAYS),
    *((SEQUENCES, SEQUENCE, way, way, 1) for way in BOTH_WAYS),
    *((VOLUMES, VOLUME, way, way, 1) for way in BOTH_WAYS),
    *((SPLIT_CHANNELS, WIDE, way, way, int(way is backward)) for way in BOTH_WAYS),
    *((MERGE_CHANNELS, X, way, way, int(way is forward)) for way in BOTH_WAYS),
    *((ONLY_SCALE | AT_MOST_SCALE, X, way, way, 0) for way in BOTH_WAYS),
    *((ONLY_SCALE, X, way, lambda *case, way=way: unshifted(way(*case)), 1) for way in BOTH_WAYS),
    *((OPAQUE, SQUARE, way, way, 0) for way in BOTH_WAYS),
    *((MAX_POOLS, X, way, way, 0) for way in BOTH_WAYS),
    *((MAX_POOLS, X, way, lambda *case, way=way: rising(way(*case)), 1) for way in BOTH_WAYS),
]


@pytest.mark.parametrize(("entries", "x", "way", "build", "folded"), CLAIMS)
def test_exported_operators_let_norms_pass_too(entries, x, way, build, folded):
    models = [build(middle, x.shape) for name, middle in entries.items() if name not in LITERAL_IN_EXPORTS]
    folded *= len(models)
    left, direction = len(models) - folded, way.__name__ if folded else None
    model = exported(Branches(models), x)
    assert_settled(model, x, folded=folded, left=left, direction=direction, example_inputs=(x,))


@BOTH
@pytest.mark.parametrize("form", FORMS[1:3])
def test_operators_let_norms_pass_in_every_dialect(form, way):
    operators = [middle for entries in LET_PASS for middle in [*entries.values()][:2]]
    model = form(Branches(map(way, operators)), X)
    assert_settled(model, X, folded=len(operators), direction=way.__name__, example_inputs=(X,))


# 21: which axis is which is proven, never read from sizes that happen to agree.
@BOTH
@pytest.mark.parametrize("order", list(itertools.permutations(range(4))), ids=str)
def test_only_a_permutation_that_keeps_the_channels_lets_a_norm_pass(order, way):
    x = noise(4, 4, 4, 4)
    kept = int(order[1] == 1)
    for middle in (lambda y: y.permute(order), lambda y: y.permute(order).flatten(2)):
        assert_settled(way(middle, x.shape), x, folded=kept, left=1 - kept)


# Rearrangements of four axes of size 4: what comes of them is right or left.
SCRAMBLES = {
    "view of literals": lambda y: y.view(4, 4, 4, 4),
    "view(-1, 4, 4, 4)": lambda y: y.view(-1, 4, 4, 4),
    "view(4, -1, 4, 4)": lambda y: y.view(4, -1, 4, 4),
    "view(4, 4, -1)": lambda y: y.view(4, 4, -1),
    "view(-1, 4, 16)": lambda y: y.view(-1, 4, 16),
    "view(16, 4, 4)": lambda y: y.view(16, 4, 4),
    "view(4, 16, 4)": lambda y: y.view(4, 16, 4),
    "view(-1, 4)": lambda y: y.view(-1, 4),
    "view(2, 2, 4, 16)": lambda y: y.view(2, 2, 4, 16),
    "view(8, 2, 4, 4)": lambda y: y.view(8, 2, 4, 4),
    "view of other sizes": lambda y: y.view(y.shape[1], y.shape[0], y.shape[2], y.shape[3]),
    "view of spatial sizes": lambda y: y.view(y.size(0), y.size(2), y.size(1), y.size(3)),
    "view(size, 2, 2, -1)": lambda y: y.view(y.size(0), 2, 2, -1).transpose(1, 2),
    "view(2 * size, ...)": lambda y: y.view(y.size(0) * 2, 2, 4, 4),
    "view(size // 2, ...)": lambda y: y.view(y.size(0) // 2, 8, 4, 4),
    "view_as transposed": lambda y: y.reshape_as(y.transpose(0, 1)),
    "reshape of a transposed": lambda y: y.transpose(1, 2).reshape(4, 4, 4, 4),
    "reshape of a permuted": lambda y: y.permute(0, 2, 3, 1).reshape(y.shape),
    "reshape of channels last": lambda y: y.permute(0, 2, 3, 1).reshape(y.shape[0], 4, -1),
    "flatten(1).view(y.shape)": lambda y: y.flatten(1).view(y.shape),
    "flatten(1).unflatten": lambda y: y.flatten(1).unflatten(1, (4, 4, 4)),
    "flatten(0, 1)": lambda y: y.flatten(0, 1),
    "flatten(0, 1).unflatten": lambda y: y.flatten(0, 1).unflatten(0, (4, 4)),
    "flatten(0, 1).unflatten the other way": lambda y: y.flatten(0, 1).unflatten(0, (4, 4)).transpose(0, 1),
    "flatten(0, 2)": lambda y: y.flatten(0, 2),
    "unflatten(0)": lambda y: y.unflatten(0, (2, 2)),
    "squeeze": lambda y: y.squeeze(),
    "squeeze(1)": lambda y: y.squeeze(1),
    "squeeze of a mean": lambda y: y.mean((2, 3), keepdim=True).squeeze(),
    "squeeze(3) of a mean": lambda y: y.mean(3, keepdim=True).squeeze(3).squeeze(2),
    "[:, None]": lambda y: y[:, None],
    "[None]": lambda y: y[None],
    "[0]": lambda y: y[0],
    "[:, 0]": lambda y: y[:, 0],
    "[0:1, 1]": lambda y: y[0:1, 1],
    "[:, -2:, 1:]": lambda y: y[:, -2:, 1:],
    "[:, [1, 0]]": lambda y: y[:, [1, 0]],
    "[:, :, [1, 0]]": lambda y: y[:, :, [1, 0]],
    "index_select": lambda y: y.index_select(1, torch.tensor([3, 0])),
    "boolean mask": lambda y: y[:, torch.tensor([True, False, True, True])],
    "flip channels": lambda y: y.flip(1),
    "flip the image": lambda y: y.flip(2, 3),
    "roll channels": lambda y: y.roll(1, 1),
    "roll the image": lambda y: torch.roll(y, (1, 2), (2, 3)),
    "roll of all": lambda y: y.roll(1),
    "rot90": lambda y: y.rot90(1, (2, 3)),
    "rot90 of channels": lambda y: y.rot90(1, (1, 2)),
    "repeat": lambda y: y.repeat(1, 2, 1, 1),
    "repeat the image": lambda y: y.repeat(1, 1, 2, 3),
    "repeat_interleave": lambda y: y.repeat_interleave(2, 1),
    "tile": lambda y: y.tile((2, 1, 1)),
    "expand": lambda y: y.mean((2, 3), keepdim=True).expand(-1, -1, 4, 4),
    "expand a new axis": lambda y: y.unsqueeze(2).expand(-1, -1, 3, -1, -1),
    "unbind": lambda y: y.unbind(2)[1],
    "unbind channels": lambda y: y.unbind(1)[1],
    "tensor_split": lambda y: y.tensor_split(3, 1)[0],
    "tensor_split by places": lambda y: y.tensor_split((1,), 1)[1],
    "stack": lambda y: torch.stack([y, y], 2),
    "stack to channels": lambda y: torch.stack([y, y], 1).flatten(1, 2),
    "unfold": lambda y: F.unfold(y, 2),
    "unfold of an axis": lambda y: y.unfold(2, 2, 1),
    "pad of channels": lambda y: F.pad(y, (0, 0, 0, 0, 1, 1)),
    "pad of channels by reflection": lambda y: F.pad(y, (1, 1, 0, 0, 1, 1), mode="replicate"),
    "crop": lambda y: F.pad(y, (-1, -1)),
    "crop and pad": lambda y: F.pad(y, (-1, 1)),
    "crop of channels": lambda y: F.pad(y, (0, 0, 0, 0, -1, -1)),
    "diagonal": lambda y: y.diagonal(dim1=2, dim2=3),
    "diagonal of channels": lambda y: y.diagonal(dim1=1, dim2=2),
    "tril": lambda y: y.tril(),
    "interpolate bicubic": lambda y: F.interpolate(y, (9, 5), mode="bicubic"),
    "interpolate area": lambda y: F.interpolate(y, (3, 2), mode="area"),
    "interpolate antialias": lambda y: F.interpolate(y, (3, 2), mode="bilinear", antialias=True),
    "interpolate nearest-exact": lambda y: F.interpolate(y, (3, 6), mode="nearest-exact"),
    "interpolate channels": lambda y: F.interpolate(y[None], (4, 2, 2))[0],
    "pool over channels": lambda y: F.avg_pool3d(y, 2),
    "pool without a batch axis": lambda y: F.avg_pool2d(y.transpose(0, 1)[0], 2)[None],
    "adaptive pool over channels": lambda y: F.adaptive_avg_pool3d(y, (4, 2, 2)),
    "pixel_shuffle of pixel_unshuffle": lambda y: F.pixel_shuffle(F.pixel_unshuffle(y, 2), 2),
    "pixel_unshuffle of pixel_shuffle": lambda y: F.pixel_unshuffle(F.pixel_shuffle(y, 2), 2),
    "channel_shuffle of parts": lambda y: F.channel_shuffle(y[:, :2].repeat(1, 2, 1, 1), 2),
    "mean over the batch": lambda y: y.mean(0, keepdim=True),
    "mean of everything": lambda y: y.mean(0, keepdim=True).mean((2, 3)),
    "mean over channels, kept": lambda y: y.mean(1, keepdim=True),
    "mean as another dtype": lambda y: y.mean((2, 3), dtype=torch.float64),
    "to": lambda y: y.to(torch.float64),
    "clone": lambda y: y.clone(),
    "detach": lambda y: y.detach(),
    "twice": lambda y: y + y,
    "difference": lambda y: y - 0.5 * y,
    "cat with itself": lambda y: torch.cat([y, y], 1),
    "cat with itself along the image": lambda y: torch.cat([y, y], 2),
    "cat of its parts": lambda y: torch.cat([y[:, 2:], y[:, :3]], 1),
    "cat of parts of the image": lambda y: torch.cat([y[:, :, 2:], y[:, :, :1]], 2),
    "swapped halves": lambda y: torch.cat(y.chunk(2, 1)[::-1], 1),
    "swapped halves of the batch": lambda y: torch.cat(y.chunk(2)[::-1]),
    "space to depth by hand": lambda y: torch.cat([y[..., ::2, ::2], y[..., 1::2, ::2]], 1),
    "windows": lambda y: (
        y.view(y.shape[0], y.shape[1], 2, 2, 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(-1, 4, 2, 2)
    ),
    "windows of channels last": lambda y: y.permute(0, 2, 3, 1).reshape(-1, 2, 2, 4).permute(0, 3, 1, 2),
    "heads": lambda y: y.flatten(2).unflatten(1, (2, 2)).transpose(2, 3).flatten(0, 1).transpose(1, 2),
}


@BOTH
@table(SCRAMBLES)
def test_norm_is_never_wrong_across_rearrangements_of_equal_sizes(middle, way):
    x = noise(4, 4, 4, 4)
    assert_never_wrong(way(middle, x.shape), x, example_inputs=(x,))


@BOTH
@pytest.mark.parametrize("form", (modules, exported))
def test_norm_is_never_wrong_across_rearrangements_of_equal_sizes_side_by_side(form, way):
    x = noise(4, 4, 4, 4)
    branches = [way(middle, x.shape) for name, middle in SCRAMBLES.items() if name != "boolean mask"]
    assert_never_wrong(form(Branches(branches), x), x)  # the size that a mask gives cannot be exported


@BOTH
def test_norm_is_never_wrong_across_any_reshape_of_an_image(way):
    x = noise(2, 4, 2, 2)
    for exponents in itertools.product(range(6), repeat=4):
        if sum(exponents) == 5:
            sizes = [2**exponent for exponent in exponents]
            model = way(lambda y, sizes=sizes: y.reshape(sizes), x.shape)
            assert_never_wrong(model, x, example_inputs=(x,))


@BOTH
def test_norm_is_never_wrong_across_any_regrouping_of_channels(way):
    x = noise(2, 4, 2, 2)
    for order in itertools.permutations(range(4)):
        for start in (1, 2):
            assert_never_wrong(
                way(
                    lambda y, order=order, start=start: (
                        y.unflatten(1, (2, 2)).flatten(3).permute(order).flatten(start, start + 1)
                    ),
                    x.shape,
                ),
                x,
                example_inputs=(x,),
            )


# 21, 22: the channels of a linear layer are on the last axis.
TOKENS = noise(2, 5, 4)
AFTER_LINEAR = {
    "permute to an image": (lambda y: y.permute(0, 3, 1, 2), noise(2, 3, 5, 4), nn.BatchNorm2d(4)),
    "movedim to an image": (lambda y: y.movedim(-1, 1), noise(2, 3, 5, 4), nn.BatchNorm2d(4)),
    "transpose": (lambda y: y.transpose(1, 2), TOKENS, nn.BatchNorm1d(4)),
    "permute": (lambda y: y.permute(0, 2, 1), TOKENS, nn.BatchNorm1d(4)),
    "transpose, contiguous": (lambda y: y.transpose(2, 1).contiguous(), TOKENS, nn.BatchNorm1d(4)),
    "transpose, unflatten": (
        lambda y: y.transpose(1, 2).unflatten(2, (2, 3)),
        noise(2, 6, 4),
        nn.BatchNorm2d(4),
    ),
    "transpose, view": (
        lambda y: y.transpose(1, 2).contiguous().view(y.shape[0], y.shape[2], 2, 3),
        noise(2, 6, 4),
        nn.BatchNorm2d(4),
    ),
    "view(-1, C)": (lambda y: y.view(-1, 4), TOKENS, nn.BatchNorm1d(4)),
    "reshape(-1, shape[-1])": (lambda y: y.reshape(-1, y.shape[-1]), TOKENS, nn.BatchNorm1d(4)),
    "unsqueeze(-1)": (lambda y: y.unsqueeze(-1), noise(5, 4), nn.BatchNorm1d(4)),
    "[:, :, None]": (lambda y: y[:, :, None], noise(5, 4), nn.BatchNorm1d(4)),
    "[:, :, None, None]": (lambda y: y[:, :, None, None], noise(5, 4), nn.BatchNorm2d(4)),
    "view(size, C, 1, 1)": (lambda y: y.view(y.size(0), 4, 1, 1), noise(5, 4), nn.BatchNorm2d(4)),
    "unflatten(1)": (lambda y: y.unflatten(1, (2, 2)), noise(5, 4), nn.BatchNorm1d(2)),
    "view(size, 2, 2)": (lambda y: y.view(y.size(0), 2, 2), noise(5, 4), nn.BatchNorm1d(2)),
    "chunk(2, -1)": (lambda y: y.chunk(2, -1)[1].transpose(1, 2), TOKENS, nn.BatchNorm1d(2)),
    "mean over tokens": (lambda y: y.mean(1), TOKENS, nn.BatchNorm1d(4)),
    "one token": (lambda y: y[:, 0], TOKENS, nn.BatchNorm1d(4)),
}


@SIZES_FORM
@table(AFTER_LINEAR)
def test_norm_reaches_a_linear_layer_whose_last_axis_became_its_channels(middle, form):
    middle, x, norm = middle
    model = form(between(nn.Linear(4, 4), middle, norm), x)
    assert_settled(model, x, folded=1, direction="backward", example_inputs=(x,))
    assert_never_wrong(model, x)


# Where the number of axes follows from the operators, no example is needed.
PROVEN = ("permute to an image", "permute")


@pytest.mark.parametrize("case", PROVEN)
def test_norm_reaches_a_linear_layer_without_example_inputs_where_the_axes_are_certain(case):
    middle, x, norm = AFTER_LINEAR[case]
    assert_settled(between(nn.Linear(4, 4), middle, norm), x, folded=1)


NOT_AFTER_LINEAR = {
    "nothing": (lambda y: y, noise(4, 4, 4), nn.BatchNorm1d(4)),
    "transpose(0, 1)": (lambda y: y.transpose(0, 1), noise(4, 4, 4), nn.BatchNorm1d(4)),
    "transpose(0, 2)": (lambda y: y.transpose(0, 2), noise(4, 4, 4), nn.BatchNorm1d(4)),
    "transposed twice": (lambda y: y.mT.transpose(1, 2), noise(4, 4, 4), nn.BatchNorm1d(4)),
    "flatten(0, 1) of four axes": (lambda y: y.flatten(0, 1), noise(2, 3, 4, 4), nn.BatchNorm1d(4)),
    "flatten(1)": (lambda y: y.flatten(1), noise(4, 4, 4), nn.BatchNorm1d(16)),
    "view(-1, 8)": (lambda y: y.reshape(-1, 8), TOKENS, nn.BatchNorm1d(8)),
    "view(-1, 4, 4)": (lambda y: y.view(-1, 4, 4), noise(4, 4, 4), nn.BatchNorm1d(4)),
    "permute(0, 1, 3, 2)": (lambda y: y.permute(0, 1, 3, 2), noise(4, 4, 4, 4), nn.BatchNorm2d(4)),
    "mean over features": (lambda y: y.mean(-1), noise(4, 4, 4), nn.BatchNorm1d(4)),
    "T": (lambda y: y.t(), noise(4, 4), nn.BatchNorm1d(4)),
    "unsqueeze(0)": (lambda y: y.unsqueeze(0), noise(4, 4), nn.BatchNorm1d(4)),
    "unsqueeze(1)": (lambda y: y.unsqueeze(1).expand(-1, 4, -1), noise(4, 4), nn.BatchNorm1d(4)),
    "pool over features": (lambda y: F.adaptive_avg_pool1d(y, 4), noise(4, 4, 4), nn.BatchNorm1d(4)),
}


@FORM
@table(NOT_AFTER_LINEAR)
def test_norm_over_another_axis_than_the_features_is_left_though_the_sizes_agree(middle, form):
    middle, x, norm = middle
    model = form(between(nn.Linear(4, 4), middle, norm), x)
    assert_settled(model, x, left=1)
    assert_settled(model, x, left=1, example_inputs=(x,))


BEFORE_LINEAR = {
    "permute": (nn.BatchNorm2d(4), lambda y: y.permute(0, 2, 3, 1), X),
    "movedim": (nn.BatchNorm2d(4), lambda y: y.movedim(1, 3), X),
    "flatten(2).transpose": (nn.BatchNorm2d(4), lambda y: y.flatten(2).transpose(1, 2), X),
    "transpose": (nn.BatchNorm1d(4), lambda y: y.transpose(1, 2), noise(2, 4, 5)),
    "permute of tokens": (nn.BatchNorm1d(4), lambda y: y.permute(0, 2, 1), noise(2, 4, 5)),
    "mean over tokens": (nn.BatchNorm1d(4), lambda y: y.mean(2), noise(2, 4, 5)),
    "rows": (nn.BatchNorm2d(4), lambda y: y.permute(0, 2, 1, 3).flatten(2), noise(2, 4, 5, 1)),
}


@FORM
@table(BEFORE_LINEAR)
def test_norm_goes_forward_into_a_linear_layer_on_what_were_its_channels(middle, form):
    norm, middle, x = middle
    model, known = form(between(norm, middle, nn.Linear(4, 3)), x), {"example_inputs": (x,)}
    assert_settled(model, x, folded=1, direction="forward", **known)
    if form is modules:
        certain = not any(middle is BEFORE_LINEAR[name][1] for name in ("transpose", "mean over tokens"))
        check(model, x, folded=int(certain), left=[] if certain else ["FXF105"])


NOT_BEFORE_LINEAR = {
    "nothing": (nn.BatchNorm2d(4), lambda y: y, noise(4, 4, 4, 4)),
    "flatten(2)": (nn.BatchNorm2d(4), lambda y: y.flatten(2), noise(4, 4, 2, 2)),
    "transpose(1, 2)": (nn.BatchNorm2d(4), lambda y: y.transpose(1, 2), noise(4, 4, 4, 4)),
    "permute(0, 3, 1, 2)": (nn.BatchNorm2d(4), lambda y: y.permute(0, 3, 1, 2), noise(4, 4, 4, 4)),
    "mean(1)": (nn.BatchNorm2d(4), lambda y: y.mean(1), noise(4, 4, 4, 4)),
    "sequence": (nn.BatchNorm1d(4), lambda y: y, noise(4, 4, 4)),
    "sequence, transposed to the front": (nn.BatchNorm1d(4), lambda y: y.transpose(0, 1), noise(4, 4, 4)),
    "(N, C) transposed": (nn.BatchNorm1d(4), lambda y: y.t(), noise(4, 4)),
}


@FORM
@table(NOT_BEFORE_LINEAR)
def test_norm_does_not_go_forward_into_a_linear_layer_on_another_axis(middle, form):
    norm, middle, x = middle
    model = form(between(norm, middle, nn.Linear(4, 3)), x)
    assert_settled(model, x, left=1)
    assert_settled(model, x, left=1, example_inputs=(x,))


def levit(m, x):
    """timm's LeViT: the tokens of all images in a row for the norm, and back."""
    x = m.linear(x)
    return m.norm(x.flatten(0, 1)).reshape_as(x)


@SIZES_FORM
@pytest.mark.parametrize(
    "back", [lambda y, x: y.reshape_as(x), lambda y, x: y.view_as(x), lambda y, x: y.reshape(x.shape)]
)
@pytest.mark.parametrize("ahead", [lambda x: x.flatten(0, 1), lambda x: x.reshape(-1, x.shape[-1])])
@pytest.mark.parametrize("shape", [(2, 3, 2, 3), (3, 3, 3, 1)])
def test_norm_over_all_tokens_of_a_batch_reaches_the_linear_layer(shape, ahead, back, form):
    def run(m, x):
        y = m.linear(x.flatten(2).transpose(1, 2))
        return back(m.norm(ahead(y)), y)

    x = noise(*shape)
    model = randomise(Forward(run, linear=nn.Linear(3, 3), norm=nn.BatchNorm1d(3)))
    assert_settled(form(model, x), x, folded=1, direction="backward")


@pytest.mark.parametrize(
    ("forward", "left"),
    [
        (levit, 0),
        (lambda m, x: (y := m.linear(x), m.norm(y.flatten(0, 1)).view_as(y).relu())[1], 0),
        (lambda m, x: (y := m.linear(x), m.norm(y.flatten(0, 1)).relu().reshape_as(y))[1], 2),
        (lambda m, x: (y := m.linear(x), m.norm(y.flatten(0, 1)).reshape_as(x))[1], 2),
        (lambda m, x: (y := m.linear(x).relu(), m.norm(y.flatten(0, 1)).reshape_as(y))[1], 2),
    ],
)
def test_a_shape_that_only_a_norm_needed_is_given_up_with_it(forward, left):
    model = randomise(Forward(forward, linear=nn.Linear(4, 4), norm=nn.BatchNorm1d(4)))
    x, other = noise(2, 3, 4), noise(5, 1, 4)
    fused = fxfuse.fuse(model, example_inputs=(x,))
    assert_exact(model(x), fused(x))
    assert_exact(model(other), fused(other))
    assert sum(node.target in ("flatten", "reshape_as", "view_as") for node in fused.graph.nodes) == left
    assert fused(x).is_contiguous()


@SIZES_FORM
@pytest.mark.parametrize("counted", [True, False])
def test_norm_over_all_tokens_goes_forward_into_the_next_linear_layer(counted, form):
    """`counted`: it is certain how many features a token has, so that `reshape_as` keeps them."""

    def run(m, x):
        x = m.conv(x) if counted else x
        x = F.relu(x.flatten(2).transpose(1, 2))
        return m.linear(m.norm(x.flatten(0, 1)).reshape_as(x))

    x = noise(2, 3, 2, 3)
    layers = {"conv": nn.Conv2d(3, 3, 1), "linear": nn.Linear(3, 4), "norm": nn.BatchNorm1d(3)}
    model = form(randomise(Forward(run, **layers)), x)
    assert_settled(model, x, folded=int(counted), left=1 - counted, direction="forward" if counted else None)
    assert_never_wrong(model, x, example_inputs=(x,))


@pytest.mark.parametrize("form", FORMS[:3])
def test_norm_over_all_tokens_is_left_where_they_may_be_rows_of_images(form):
    model = form(randomise(Forward(levit, linear=nn.Linear(4, 4), norm=nn.BatchNorm1d(4))))
    assert_settled(model, noise(2, 3, 4), left=1)
    assert_settled(model, noise(2, 3, 4, 4), left=1)
    assert_settled(model, noise(2, 3, 4), folded=1, example_inputs=(noise(2, 3, 4),))
    assert_settled(model, noise(2, 3, 4, 4), left=1, example_inputs=(noise(2, 3, 4, 4),))


# 18: sums and differences.
def convs(run, outs=(4, 4, 4), norm=4, **layers):
    """`run` over three convolutions a, b, c and a norm."""
    operators = {name: nn.Conv2d(3, number, 3) for name, number in zip("abc", outs, strict=True)}
    return randomise(Forward(run, **operators, norm=nn.BatchNorm2d(norm, eps=1e-2), **layers))


INPUT = noise(2, 3, 6, 6)
SUMS = {
    "+": lambda a, b: a + b,
    "torch.add": torch.add,
    "add": lambda a, b: a.add(b),
    "operator.add": operator.add,
    "-": lambda a, b: a - b,
    "torch.sub": torch.sub,
    "sub": lambda a, b: b.sub(a),
    "identity between": lambda a, b: F.dropout(a, training=False) + b.contiguous(),
    "pools between": lambda a, b: F.avg_pool2d(a, 2) - F.adaptive_avg_pool2d(b, 2),
}


@FORM
@table(SUMS)
def test_norm_after_a_sum_scales_both_convolutions_and_shifts_one(middle, form):
    model = form(convs(lambda m, x: m.norm(middle(m.a(x), m.b(x.tanh())))), INPUT)
    fused = assert_settled(model, INPUT, folded=1, direction="backward")
    assert sorted(fxfuse.report(fused).folded[0].into) == ["a", "b"] or form is not modules


@FORM
def test_norm_after_a_sum_of_three_goes_into_all(form):
    model = form(convs(lambda m, x: m.norm(m.a(x) - (m.b(x) - m.c(x)))), INPUT)
    assert_settled(model, INPUT, folded=1, direction="backward")


@FORM
def test_norms_before_and_after_a_sum_are_all_folded(form):
    def run(m, x):
        return m.norm(m.one(m.a(x)) + m.two(m.b(x)))

    model = form(convs(run, one=nn.BatchNorm2d(4), two=nn.BatchNorm2d(4)), INPUT)
    assert_settled(model, INPUT, folded=3)


@FORM
@pytest.mark.parametrize("call", [torch.add, torch.sub])
def test_norm_after_a_sum_with_alpha_is_never_wrong(call, form):
    model = form(convs(lambda m, x: m.norm(call(m.a(x), m.b(x), alpha=2))), INPUT)
    assert_never_wrong(model, INPUT)
    assert_never_wrong(form(convs(lambda m, x: m.norm(call(m.a(x), m.b(x), alpha=0))), INPUT), INPUT)


UNEQUAL_SUMS = {
    "twice the same": (lambda m, a, b: a + a, (4, 4)),
    "a difference of the same": (lambda m, a, b: a - a, (4, 4)),
    "in place": (lambda m, a, b: a.add_(b), (4, 4)),
    "iadd": (lambda m, a, b: operator.iadd(a, b), (4, 4)),
    "a broadcast image": (lambda m, a, b: a + b.mean((2, 3), keepdim=True), (4, 4)),
    "a broadcast batch": (lambda m, a, b: a + b[:1], (4, 4)),
    "an unbatched part": (lambda m, a, b: a + b[0], (4, 4)),
    "a broadcast row": (lambda m, a, b: a - b[0, :, 0], (4, 4)),
    "a broadcast channel": (lambda m, a, b: a + b, (4, 1)),
    "a broadcast first channel": (lambda m, a, b: a + b, (1, 4)),
    "two broadcast parts": (lambda m, a, b: a[:, :, :1] + b[:, :, :, :1], (4, 4)),
    "parts that overlap": (lambda m, a, b: a[:, :3] + a[:, 1:], (4, 4)),
    "halves of one convolution": (lambda m, a, b: a.chunk(2, 1)[0] - a.chunk(2, 1)[1], (4, 4)),
    "a sum by keyword": (lambda m, a, b: torch.add(input=a, other=b), (4, 4)),
    "a constant": (lambda m, a, b: a + 1, (4, 4)),
    "a constant and a part": (lambda m, a, b: a + 1 + b, (4, 4)),
    "the norm's own statistics": (lambda m, a, b: a + m.norm.running_mean[:, None, None], (4, 4)),
}


@pytest.mark.parametrize("form", FORMS[::3])
@table(UNEQUAL_SUMS)
def test_norm_after_an_unequal_sum_is_never_wrong(middle, form):
    add, outs = middle

    channels = 2 if add is UNEQUAL_SUMS["halves of one convolution"][0] else 4
    channels = 3 if add is UNEQUAL_SUMS["parts that overlap"][0] else channels
    layers = {"a": nn.Conv2d(3, outs[0], 3), "b": nn.Conv2d(3, outs[1], 3), "norm": nn.BatchNorm2d(channels)}
    model = Forward(lambda m, x: m.norm(add(m, m.a(x), m.b(x))), **layers)
    assert_never_wrong(form(randomise(model), INPUT), INPUT)


LEFT_SUMS = {
    "a part is the input": lambda m, x: m.norm(m.a(x) + x[:, :1, 1:-1, 1:-1]),
    "a part is activated": lambda m, x: m.norm(m.a(x) + F.relu(m.b(x))),
    "a part is used elsewhere": lambda m, x: (m.norm(m.a(x) + (y := m.b(x))), F.relu(y)),
    "the sum is used elsewhere": lambda m, x: (m.norm(y := m.a(x) + m.b(x)), F.relu(y)),
    "a part is an output": lambda m, x: ((y := m.a(x)), m.norm(y + m.b(x))),
    "a channel is broadcast": lambda m, x: m.norm(m.a(x) + m.b(x)[:, :1]),
    "rows are added to channels": lambda m, x: m.norm(m.a(x) + m.b(x).transpose(1, 2)),
    "a product": lambda m, x: m.norm(m.a(x) * m.b(x)),
    "a quotient": lambda m, x: m.norm(m.a(x) / m.b(x)),
    "the larger": lambda m, x: m.norm(torch.maximum(m.a(x), m.b(x))),
}


@FORM
@table(LEFT_SUMS)
def test_norm_after_a_sum_is_left_where_not_all_parts_take_it(middle, form):
    assert_settled(form(convs(middle), INPUT), INPUT, left=1)


@FORM
@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.conv(m.norm(x) + x.abs()),
        lambda m, x: m.conv(x.abs() - m.norm(x)),
        lambda m, x: m.conv(m.norm(x) * x),
        lambda m, x: m.conv(m.norm(x) + F.relu(x)),
    ],
)
def test_norm_before_a_sum_with_another_value_is_left(run, form):
    model = randomise(Forward(run, norm=nn.BatchNorm2d(4), conv=nn.Conv2d(4, 3, 3)))
    assert_settled(form(model, X), X, left=1)


@FORM
def test_two_norms_before_a_sum_are_left(form):
    layers = {"one": nn.BatchNorm2d(4), "two": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 3, 3)}
    model = randomise(Forward(lambda m, x: m.conv(m.one(x) + m.two(x.abs())), **layers))
    assert_settled(form(model, X), X, left=2)


@pytest.mark.parametrize(
    ("run", "folded"),
    [
        (lambda m, x: m.conv(m.norm(x) + x), 1),
        (lambda m, x: m.conv(x - m.norm(x)), 1),
        (lambda m, x: m.conv(m.norm(x) - m.other(x)), 2),
    ],
)
def test_norms_in_a_sum_of_one_value_go_into_the_convolution_behind_it(run, folded):
    layers = {"norm": nn.BatchNorm2d(4), "other": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 3, 3)}
    assert_settled(randomise(Forward(run, **layers)), X, folded=folded, direction="merged")


# 19: concatenations.
def cat_of(order, dim):
    def run(m, x):
        return m.norm(torch.cat([m.get_submodule(name)(x) for name in order], dim))

    return run


@FORM
@pytest.mark.parametrize("order", ["ab", "ba", "abc", "cab"])
@pytest.mark.parametrize("dim", [1, -3])
def test_norm_after_a_concat_of_channels_is_parted(dim, order, form):
    outs = {"a": 4, "b": 2, "c": 3}
    model = convs(cat_of(order, dim), (4, 2, 3), sum(outs[name] for name in order))
    fused = assert_settled(form(model, INPUT), INPUT, folded=1, direction="backward")
    assert sorted(fxfuse.report(fused).folded[0].into) == sorted(order) or form is not modules


@FORM
@pytest.mark.parametrize("dim", [0, 2, -1])
def test_norm_after_a_concat_along_another_axis_goes_into_every_part(dim, form):
    assert_settled(form(convs(cat_of("abc", dim)), INPUT), INPUT, folded=1, direction="backward")


CONCATS = {
    "concat": lambda m, x: torch.concat((m.a(x), m.b(x)), dim=1),
    "concatenate": lambda m, x: torch.concatenate([m.a(x), m.b(x)], 1),
    "cat by keyword": lambda m, x: torch.cat(tensors=(m.a(x), m.b(x)), dim=1),
    "axis": lambda m, x: torch.cat([m.a(x), m.b(x)], axis=1),
    "a cat of cats": lambda m, x: torch.cat([torch.cat([m.a(x)], 1), m.b(x)], 1),
    "after pools": lambda m, x: torch.cat([F.avg_pool2d(m.a(x), 2), F.adaptive_avg_pool2d(m.b(x), 2)], 1),
    "before a pool": lambda m, x: F.avg_pool2d(torch.cat([m.a(x), m.b(x)], 1), 3),
    "shuffled": lambda m, x: F.channel_shuffle(torch.cat([m.a(x), m.b(x)], 1), 2),
    "shuffled by hand": lambda m, x: shufflenet(torch.cat([m.a(x), m.b(x)], 1)),
    "a sum of cats": lambda m, x: torch.cat([m.a(x), m.b(x)], 1) + torch.cat([m.c(x), m.d(x)], 1),
    "a norm before": lambda m, x: torch.cat([m.one(m.a(x)), m.b(x)], 1),
}


# An exported graph holds the sizes of its example as numbers, which prove nothing about other inputs.
@pytest.mark.parametrize(
    ("name", "form"),
    [
        case
        for case in itertools.product(CONCATS, (modules, exported))
        if case != ("shuffled by hand", exported)
    ],
)
def test_norm_after_a_concat_written_in_any_way_is_folded(name, form):
    run = CONCATS[name]
    extra = {"one": nn.BatchNorm2d(4)} if name == "a norm before" else {}
    extra |= {"d": nn.Conv2d(3, 4, 3)}
    model = convs(lambda m, x: m.norm(run(m, x)), norm=8, **extra)
    assert_settled(form(model, INPUT), INPUT, folded=1 + (len(extra) == 2))


LEFT_CONCATS = {
    "a part is the input": (lambda m, x: m.norm(torch.cat([m.a(x), x[:, :, 1:-1, 1:-1]], 1)), 7),
    "a part is activated": (lambda m, x: m.norm(torch.cat([F.relu(m.a(x)), m.b(x)], 1)), 8),
    "a part is used elsewhere": (lambda m, x: (m.norm(torch.cat([m.a(x), y := m.b(x)], 1)), F.relu(y)), 8),
    "a part is an output": (lambda m, x: ((y := m.a(x)), m.norm(torch.cat([y, m.b(x)], 1))), 8),
    "the whole is used elsewhere": (
        lambda m, x: (m.norm(y := torch.cat([m.a(x), m.b(x)], 1)), F.relu(y)),
        8,
    ),
    "a part twice, with other maps": (lambda m, x: m.norm(torch.cat([y := m.a(x), y], 1)), 8),
    "parts used in two concats": (
        lambda m, x: (m.norm(torch.cat([y := m.a(x), z := m.b(x)], 1)), torch.cat([z, y], 1).sigmoid()),
        8,
    ),
}


@FORM
@table(LEFT_CONCATS)
def test_norm_after_a_concat_is_left_where_not_all_parts_take_it(middle, form):
    run, channels = middle
    assert_settled(form(convs(run, norm=channels), INPUT), INPUT, left=1)


@FORM
@pytest.mark.parametrize("dim", [0, 2, 3])
def test_norm_after_a_concat_of_a_value_with_itself_is_never_wrong(dim, form):
    model = convs(lambda m, x: m.norm(torch.cat([y := m.a(x), y], dim)))
    assert_never_wrong(form(model, INPUT), INPUT)


def densenet(m, x):
    """Each norm reads all that came before, and so do the norms after it."""
    a = m.a(x)
    b = m.b(F.relu(m.one(a)))
    return m.c(F.relu(m.two(torch.cat([a, b], 1))))


@FORM
def test_norms_of_a_dense_block_are_left(form):
    layers = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 1), "c": nn.Conv2d(8, 2, 1)}
    model = randomise(Forward(densenet, **layers, one=nn.BatchNorm2d(4), two=nn.BatchNorm2d(8)))
    assert_settled(form(model, INPUT), INPUT, left=2)


FORWARD_CONCATS = {
    "first": (lambda m, x: m.conv(torch.cat([m.one(x), F.relu(x)], 1)), 8, 1),
    "second": (lambda m, x: m.conv(torch.cat((F.relu(x), m.one(x), x), dim=-3)), 12, 1),
    "both": (lambda m, x: m.conv(torch.cat([m.one(x), m.two(x)], 1)), 8, 2),
    "twice": (lambda m, x: m.conv(torch.cat([y := m.one(x), F.relu(x), y], 1)), 12, 1),
    "a part of it": (lambda m, x: m.conv(torch.cat([m.one(x)[:, 1:], x], 1)), 7, 1),
    "shuffled": (lambda m, x: m.conv(F.channel_shuffle(torch.cat([x, m.one(x)], 1), 2)), 8, 1),
    "pooled": (lambda m, x: m.conv(F.avg_pool2d(torch.cat([x, m.one(x)], 1), 2)), 8, 1),
    "a part of the whole": (lambda m, x: m.conv(torch.cat([x, m.one(x)], 1)[:, 2:6]), 4, 1),
}


@FORM
@table(FORWARD_CONCATS)
def test_norm_goes_forward_through_a_concat_into_its_own_channels(middle, form):
    run, channels, folded = middle
    layers = {"one": nn.BatchNorm2d(4), "conv": nn.Conv2d(channels, 3, 3)}
    layers |= {"two": nn.BatchNorm2d(4, eps=0.1)} if folded == 2 else {}
    model = form(randomise(Forward(run, **layers)), X)
    assert_settled(model, X, folded=folded, direction="forward", example_inputs=(X,))


@FORM
@pytest.mark.parametrize("dim", [0, 2, 3])
def test_norm_does_not_go_forward_through_a_concat_of_images_with_another_value(dim, form):
    layers = {"norm": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 3, 3)}
    model = randomise(Forward(lambda m, x: m.conv(torch.cat([m.norm(x), F.relu(x)], dim)), **layers))
    assert_settled(form(model, X), X, left=1)


REGROUPED_CONCATS = {
    "inner before": lambda m, x: m.conv(torch.cat([y := m.norm(x).unflatten(1, (2, 2)), y], 2).flatten(1, 2)),
    "outer before": lambda m, x: m.conv(torch.cat([y := m.norm(x).unflatten(1, (2, 2)), y], 1).flatten(1, 2)),
    "inner behind": lambda m, x: m.wide(torch.cat([y := m.conv(x).unflatten(1, (2, 2)), y], 2).flatten(1, 2)),
    "outer behind": lambda m, x: m.wide(torch.cat([y := m.conv(x).unflatten(1, (2, 2)), y], 1).flatten(1, 2)),
}


@FORM
@table(REGROUPED_CONCATS)
def test_concat_along_a_part_of_the_channels_is_never_wrong(middle, form):
    behind = "wide" in middle.__code__.co_names
    conv = nn.Conv2d(4, 4, 1) if behind else nn.Conv2d(8, 3, 1)
    norm = {"wide": nn.BatchNorm2d(8)} if behind else {"norm": nn.BatchNorm2d(4)}
    model = randomise(Forward(middle, conv=conv, **norm))
    assert_never_wrong(form(model, X), X)


@FORM
@pytest.mark.parametrize("dim", [0, 2, 3])
def test_norm_before_a_concat_of_a_value_with_itself_is_never_wrong(dim, form):
    layers = {"norm": nn.BatchNorm2d(4), "conv": nn.Conv2d(4, 3, 3)}
    model = randomise(Forward(lambda m, x: m.conv(torch.cat([y := m.norm(x), y], dim)), **layers))
    assert_never_wrong(form(model, X), X)


# Parts of one convolution's output: each channel has users of its own.
def halves(run, norm=2, **layers):
    operators = {"conv": nn.Conv2d(4, 4, 3), "norm": nn.BatchNorm2d(norm)}
    return randomise(Forward(run, **operators, **layers))


def _half(m, x):
    left, right = m.conv(x).chunk(2, 1)
    return torch.cat([F.relu(left), m.norm(right)], 1)


def _half_by_split(m, x):
    left, right = torch.split(m.conv(x), 2, dim=1)
    return m.norm(left) * right.sigmoid()


def _both_halves(m, x):
    left, right = m.conv(x).chunk(2, 1)
    return m.norm(left), m.two(right)


def _both_halves_by_one_norm(m, x):
    left, right = m.conv(x).split([2, 2], 1)
    return m.norm(left) + m.norm(right)


def _gate(m, x):
    left, right = m.conv(x).chunk(2, 1)
    return m.norm(left * right.sigmoid())


HALVES = {
    "one half": (_half, 1, 0),
    "one half by split": (_half_by_split, 1, 0),
    "both halves": (_both_halves, 2, 0),
    "both halves by one norm": (_both_halves_by_one_norm, 2, 0),
    "gated": (_gate, 0, 1),
    "slices": (lambda m, x: (m.norm((y := m.conv(x))[:, :2]), F.relu(y[:, 2:])), 1, 0),
    "slices that overlap": (lambda m, x: (m.norm((y := m.conv(x))[:, :2]), F.relu(y[:, 1:])), 0, 1),
    "slices of one channel more": (lambda m, x: (m.norm((y := m.conv(x))[:, 1:3]), F.relu(y[:, 2:])), 0, 1),
    "steps": (lambda m, x: (m.norm((y := m.conv(x))[:, ::2]), F.relu(y[:, 1::2])), 1, 0),
    "narrow": (lambda m, x: (m.norm((y := m.conv(x)).narrow(1, 2, 2)), y.narrow(1, 0, 2).relu()), 1, 0),
    "the same half twice": (lambda m, x: (m.norm((y := m.conv(x))[:, :2]), F.relu(y[:, :2])), 0, 1),
    "the whole too": (lambda m, x: (m.norm((y := m.conv(x))[:, :2]), F.relu(y)), 0, 1),
    "the whole is returned": (lambda m, x: (y := m.conv(x), m.norm(y[:, 2:])), 0, 1),
    "a sum over the whole": (lambda m, x: m.norm((y := m.conv(x))[:, 2:]) + y.mean(1, keepdim=True), 0, 1),
    "halves of the image": (lambda m, x: (m.norm((y := m.conv(x))[:, :2, 2:]), F.relu(y[:, :2, :2])), 0, 1),
    "two norms on halves of the image": (
        lambda m, x: (m.norm((y := m.conv(x))[:, :2, 2:]), m.two(y[:, :2, :2])),
        *(0, 2),
    ),
}


@FORM
@table(HALVES)
def test_norm_of_some_channels_is_folded_if_only_others_are_used_elsewhere(middle, form):
    run, folded, left = middle
    extra = {"two": nn.BatchNorm2d(2, eps=1e-2)} if run is _both_halves or left == 2 else {}
    assert_settled(form(halves(run, **extra), X), X, folded=folded, left=left)


def _forward_halves(m, x):
    left, right = m.norm(x).chunk(2, 1)
    return m.conv(left), m.two(right)


def _forward_half(m, x):
    left, right = m.norm(x).chunk(2, 1)
    return m.conv(left), right.relu()


FORWARD_HALVES = {
    "both halves": (_forward_halves, 1),
    "one half, the other not": (_forward_half, 0),
    "one half alone": (lambda m, x: m.conv(m.norm(x).chunk(2, 1)[1]), 1),
    "slices that overlap": (lambda m, x: (m.conv((y := m.norm(x))[:, :2]), m.two(y[:, 1:3])), 1),
    "a slice and the whole": (lambda m, x: (m.conv((y := m.norm(x))[:, :2]), m.whole(y)), 1),
    "a slice, and the whole activated": (lambda m, x: (m.conv((y := m.norm(x))[:, :2]), y.relu()), 0),
}


@FORM
@table(FORWARD_HALVES)
def test_norm_goes_forward_into_all_that_take_parts_of_it(middle, form):
    run, folded = middle
    layers = {"norm": nn.BatchNorm2d(4), "conv": nn.Conv2d(2, 3, 3), "two": nn.Conv2d(2, 5, 2)}
    model = randomise(Forward(run, **layers, whole=nn.Conv2d(4, 2, 1)))
    assert_settled(form(model, X), X, folded=folded, left=1 - folded, example_inputs=(X,))


# Operators in a row.
ROWS = {
    "dropout, pool, flatten": nn.Sequential(nn.Dropout(), nn.AdaptiveAvgPool2d(1), nn.Flatten(2)),
    "pad, pool, upsample": nn.Sequential(nn.ReflectionPad2d(1), nn.AvgPool2d(2), nn.Upsample(scale_factor=2)),
    "shuffle, part, pool": lambda y: F.avg_pool2d(F.channel_shuffle(y, 2)[:, 1:], 2),
    "part, part, part": lambda y: y.chunk(2, 1)[1][:, :, 1:].narrow(1, 1, 1),
    "tokens, mean": lambda y: y.flatten(2).transpose(1, 2).mean(1),
    "channels last, part": lambda y: y.permute(0, 2, 3, 1)[..., 1:3].permute(0, 3, 1, 2),
    "shuffle twice": lambda y: F.channel_shuffle(F.channel_shuffle(y, 2)[:, :2], 2),
    "join of parts": lambda y: torch.cat([y[:, 2:], F.dropout(y[:, :2], training=False)], 1),
    "join of three parts": lambda y: torch.cat([y.split(1, 1)[i] for i in (3, 0, 2)], 1),
    "sum of parts of itself": lambda y: y[:, :2] + y[:, 2:],
}


@BOTH
@FORM
@table(ROWS)
def test_norm_passes_operators_in_a_row(middle, form, way):
    model = form(way(middle), X)
    known = {} if form is modules else {"example_inputs": (X,)}
    if way is forward and middle is ROWS["sum of parts of itself"]:
        assert_settled(model, X, left=1, **known)
    else:
        assert_settled(model, X, folded=1, direction=way.__name__, **known)


@SIZES_FORM
def test_shufflenet_unit_is_folded_whole(form):
    def run(m, x):
        left, right = x.chunk(2, 1)
        return m.after(shufflenet(torch.cat([m.norm1(m.one(left)), m.norm2(m.two(right))], 1)))

    layers = {"one": nn.Conv2d(2, 4, 1), "two": nn.Conv2d(2, 4, 1), "after": nn.BatchNorm2d(8)}
    model = randomise(Forward(run, **layers, norm1=nn.BatchNorm2d(4), norm2=nn.BatchNorm2d(4)))
    assert_settled(form(model, X), X, folded=3)


# What is written to in place between the operators.
@pytest.mark.parametrize("form", FORMS[::3])
@pytest.mark.parametrize(
    "write",
    [
        lambda y: y[:, 2:].zero_(),
        lambda y: y[:, :2].neg_(),
        lambda y: y.view(-1).mul_(2),
        lambda y: y.permute(1, 0, 2, 3)[0].add_(1),
        lambda y: y.flatten(2).relu_(),
        lambda y: y.narrow(1, 0, 2).add_(1),
        lambda y: y.unsqueeze(0).exp_(),
    ],
)
@pytest.mark.parametrize("early", [True, False])
def test_norm_is_never_wrong_where_a_view_is_written_to(early, write, form):
    """`early`: before the norm reads it."""

    def back(m, x):
        y = m.conv(x)
        part = y[:, :2]
        if early:
            write(y)
        z = m.norm(part)
        if not early:
            write(y)
        return z, y

    def ahead(m, x):
        y = m.wide(F.relu(x))
        if early:
            write(y)
        z = m.conv(y)
        if not early:
            write(y)
        return z

    assert_never_wrong(form(halves(back), X), X)
    assert_never_wrong(form(halves(ahead, wide=nn.BatchNorm2d(4)), X), X)
