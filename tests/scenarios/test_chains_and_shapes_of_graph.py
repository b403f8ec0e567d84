"""Scenarios 12-23: several operators and norms, and what may stand between them."""

import operator
from typing import Any, NamedTuple

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

import fxfuse
from tests.forms import EXPORT_WARNING, FORMS, Forward, check, functions, modules, noise
from tests.support import randomise

pytestmark = pytest.mark.filterwarnings(EXPORT_WARNING)
WRITTEN = (modules, functions)
IMAGE = (2, 3, 6, 6)


def block(ins=3, outs=4, kernel=3, **options):
    return nn.Sequential(nn.Conv2d(ins, outs, kernel, **options), nn.BatchNorm2d(outs, eps=1e-3))


def between(middle, norm=None, operator=None):
    """operator → `middle` → norm, `middle` being a module or a function of a tensor."""
    layers = {"operator": operator or nn.Conv2d(3, 4, 3), "norm": norm or nn.BatchNorm2d(4)}
    if isinstance(middle, nn.Module):
        return randomise(Forward(lambda m, x: m.norm(m.middle(m.operator(x))), **layers, middle=middle))
    return randomise(Forward(lambda m, x: m.norm(middle(m.operator(x))), **layers))


# 12
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("norms", [2, 3, 5])
def test_norms_in_a_row_are_all_folded(norms, form):
    x = noise(*IMAGE)
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), *(nn.BatchNorm2d(4) for _ in range(norms))))
    check(form(model, x), x, folded=norms)


@pytest.mark.parametrize("form", FORMS)
def test_blocks_in_a_row_are_all_folded(form):
    x = noise(*IMAGE)
    model = randomise(
        nn.Sequential(block(3, 4), block(4, 4, 1, bias=False), nn.ReLU(), block(4, 2, groups=2))
    )
    check(form(model, x), x, folded=3)


@pytest.mark.parametrize("form", WRITTEN)
def test_different_operators_in_a_row_are_all_folded(form):
    model = nn.Sequential(
        *(nn.Conv2d(3, 4, 3, stride=2), nn.BatchNorm2d(4), nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)),
        *(nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 4), nn.BatchNorm1d(4), nn.BatchNorm1d(4)),
    )
    check(form(randomise(model)), noise(2, 3, 5, 5), folded=5)


@pytest.mark.parametrize("form", WRITTEN)
def test_second_norm_is_left_where_the_value_between_is_used(form):
    layers = {"conv": nn.Conv2d(3, 4, 3), "one": nn.BatchNorm2d(4), "two": nn.BatchNorm2d(4)}

    def forward(m, x):
        y = m.one(m.conv(x))
        return y, m.two(y)

    check(form(randomise(Forward(forward, **layers))), noise(*IMAGE), folded=1, left=["FXF101"])


@pytest.mark.parametrize("form", WRITTEN)
def test_norm_behind_a_norm_that_is_left_is_left_too(form):
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.BatchNorm2d(4), nn.BatchNorm2d(4)))
    check(form(model), noise(*IMAGE), left=["FXF102", "FXF107"])


# 13
@pytest.mark.parametrize(
    "middle",
    [
        *(nn.ReLU(), nn.ReLU(inplace=True), nn.LeakyReLU(-1.0), nn.Hardswish(), nn.Softmax(1), nn.PReLU()),
        *(F.relu, torch.relu, torch.relu_, lambda y: F.relu(y, inplace=True), lambda y: y.relu()),
        *(lambda y: y.relu_(), lambda y: y.clamp(min=0), lambda y: y.square(), lambda y: y.abs()),
        *(lambda y: y * y, lambda y: y.mul(y.mean()), lambda y: y % 2, lambda y: y.data),
    ],
)
def test_nothing_folds_across_an_operator_that_changes_values(middle):
    check(between(middle), noise(*IMAGE), left=["FXF102"])


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    "middle",
    [
        *(lambda y: -y, lambda y: y.mul(2), lambda y: y * 2, lambda y: 3 * y / 2 - 1, lambda y: 1 - y),
        *(lambda y: y.clone(), torch.clone, lambda y: y * 0.1 + 0.3),
    ],
)
def test_norm_folds_across_constants_and_copies(middle, form):
    check(form(between(middle)), noise(*IMAGE), folded=1)


@pytest.mark.parametrize(
    "write",
    [
        *(lambda y: F.relu(y, inplace=True), lambda y: y.relu_(), torch.relu_),
        *(lambda y: y.mul_(2), lambda y: y.zero_(), lambda y: y[:, 0].zero_(), lambda y: y.view(-1).neg_()),
        *(lambda y: y.detach().exp_(), lambda y: torch.add(y, 1, out=y), lambda y: y.data.neg_()),
        lambda y: y.__setitem__((slice(None), 0), 5.0),
        lambda y: operator.iadd(y, 1),
        lambda y: operator.imul(y, 2),
    ],
)
@pytest.mark.parametrize("alias", [lambda y: y, nn.Identity(), nn.Dropout(), lambda y: y.contiguous()])
def test_nothing_folds_where_the_output_of_the_conv_is_written_to(alias, write):
    def forward(m, x):
        y = m.conv(x)
        write(m.alias(y) if isinstance(alias, nn.Module) else alias(y))
        return m.norm(y)

    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    layers |= {"alias": alias} if isinstance(alias, nn.Module) else {}
    check(randomise(Forward(forward, **layers)), noise(*IMAGE), left=["FXF101"])


@pytest.mark.parametrize("write", [lambda y: y.relu_(), lambda y: F.relu(y, True), lambda y: y.add_(1)])
def test_output_of_the_norm_and_input_of_the_conv_may_be_written_to(write):
    def forward(m, x):
        x = x + 1
        y = m.conv(x)
        write(x)
        z = m.norm(y)
        write(z)
        return x, z

    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    check(randomise(Forward(forward, **layers)), noise(*IMAGE), folded=1)


# 14
@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    "middle",
    [
        *(nn.AvgPool2d(2), nn.AvgPool2d(3, 1, 1, count_include_pad=False), nn.AdaptiveAvgPool2d(1)),
        *(lambda y: F.avg_pool2d(y, 2), lambda y: y.mean((2, 3), keepdim=True)),
    ],
)
def test_norm_after_average_pooling_is_folded(middle, form):
    check(form(between(middle)), noise(*IMAGE), folded=1)


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("middle", [nn.MaxPool2d(2), lambda y: F.max_pool2d(y, 2), nn.AdaptiveMaxPool2d(1)])
def test_norm_after_a_maximum_is_left_unless_it_keeps_the_order(middle, form):
    model = between(middle)
    check(form(model), noise(*IMAGE), left=["FXF306"])
    with torch.no_grad():
        model.norm.weight.abs_()  # a scale of zero stays
    check(form(model), noise(*IMAGE), folded=1)


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    ("middle", "code"),
    [
        *((nn.LPPool2d(2, 2), "FXF102"), (nn.AvgPool2d(3, 1, 1), "FXF305")),
        (nn.AvgPool2d(2, divisor_override=3), "FXF305"),
    ],
)
def test_norm_after_pooling_that_is_no_average_is_left(middle, code, form):
    check(form(between(middle)), noise(*IMAGE), left=[code])


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "middle",
    [
        *(nn.Identity(), nn.Dropout(0.9), nn.Dropout(1.0), nn.Dropout(inplace=True), nn.Dropout2d()),
        *(nn.AlphaDropout(), nn.FeatureAlphaDropout(), nn.Sequential(nn.Identity(), nn.Dropout())),
        *(
            nn.Sequential(),
            lambda y: F.dropout(y, 0.5, training=False),
            lambda y: torch.dropout(y, 0.5, False),
        ),
        *(
            lambda y: F.dropout2d(y, training=False),
            lambda y: F.alpha_dropout(y, 0.5),
            lambda y: y.contiguous(),
        ),
        lambda y: F.dropout(F.feature_alpha_dropout(input=y, training=False), training=False, p=0.1),
    ],
)
def test_identity_and_dropout_in_eval_mode_let_a_norm_pass(middle, form):
    x = noise(*IMAGE)
    check(form(between(middle), x), x, folded=1)


@pytest.mark.parametrize("middle", [nn.Identity(1, key=2), nn.Dropout(inplace=True)])
@pytest.mark.parametrize("form", WRITTEN)
def test_identity_and_dropout_before_and_between_chained_norms_let_them_pass(middle, form):
    model = nn.Sequential(
        middle, nn.Conv2d(3, 4, 3), middle, nn.BatchNorm2d(4), middle, nn.BatchNorm2d(4), middle
    )
    check(form(randomise(model)), noise(*IMAGE), folded=2)


@pytest.mark.parametrize("middle", [nn.Dropout(0.0), nn.Dropout2d(0.0), lambda y: F.dropout(y, 0.0)])
def test_dropout_in_train_mode_stops_a_norm(middle):
    model = between(middle)
    if isinstance(middle, nn.Module):
        model.middle.train()
    check(model, noise(*IMAGE), left=["FXF102"])


def test_subclass_of_identity_is_taken_for_what_it_computes():
    class Doubled(nn.Identity):
        def forward(self, x):
            return 2 * x

    class Squared(nn.Identity):
        def forward(self, x):
            return x.square()

    check(between(Doubled()), noise(*IMAGE), folded=1)
    check(between(Squared()), noise(*IMAGE), left=["FXF102"])


# 15
@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    "other",
    [
        *(
            lambda y: y,
            F.relu,
            lambda y: y.sum(),
            lambda y: (y > 0).sum(),
            lambda y: [y, {"y": y}],
        ),
        *(lambda y: y[:0], lambda y: y.detach(), lambda y: y.T, lambda y: y.data),
    ],
)
@pytest.mark.filterwarnings("ignore:The use of `x.T` on tensors of dimension other than 2")
def test_norm_is_left_where_the_output_of_the_conv_is_used_elsewhere(other, form):
    def forward(m, x):
        y = m.conv(x)
        return other(y), m.norm(y)

    model = randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    check(form(model), noise(*IMAGE), left=["FXF101"])


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    "query",
    [
        *(lambda y: y.shape[0], lambda y: y.size(), lambda y: y.size(1), lambda y: y.dim(), lambda y: y.ndim),
        *(lambda y: y.numel(), torch.numel, lambda y: y.dtype, lambda y: y.device),
        *(lambda y: y.is_floating_point(), torch.is_floating_point, lambda y: y.is_cuda, torch.zeros_like),
    ],
)
def test_queries_of_shape_and_kind_are_no_users(query, form):
    def forward(m, x):
        y = m.conv(x)
        return query(y), m.norm(y)

    model = randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    check(form(model), noise(*IMAGE), folded=1)


# 16
class Out(NamedTuple):
    y: Tensor
    rest: Any


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    "result",
    [
        lambda y: (y, y.relu(), y + 1),
        lambda y: {"a": [y, (y, {"b": y * 2})], "c": None, "d": 3},
        lambda y: ((y,), [[y.mean()], y], "text", 1.5, True),
        lambda y: Out(y, Out(y.sum(), [y])),
    ],
)
def test_structure_of_nested_outputs_is_kept(result, form):
    def forward(m, x):
        return result(m.norm(m.conv(x)))

    model = randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    check(form(model), noise(*IMAGE), folded=1)


# 17
class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.left, self.right = block(3, 4), block(2, 4, bias=False)

    def forward(self, x, y):
        return self.left(x) + self.right(y)


@pytest.mark.parametrize("form", FORMS)
def test_both_sides_of_a_sum_of_two_inputs_are_folded(form):
    inputs = noise(*IMAGE), noise(2, 2, 6, 6)
    check(form(randomise(TwoInputs()), *inputs), *inputs, folded=2)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("add", [lambda a, b: a + b, torch.add, lambda a, b: a.add_(b)])
def test_residual_block_with_a_downsample_branch_is_folded(add, form):
    model = randomise(
        Forward(
            lambda m, x: F.relu(add(m.body(x), m.downsample(x))),
            body=nn.Sequential(
                block(3, 4, stride=2, padding=1), nn.ReLU(inplace=True), block(4, 4, padding=1)
            ),
            downsample=block(3, 4, 1, stride=2),
        )
    )
    x = noise(*IMAGE)
    check(form(model, x), x, folded=3)


@pytest.mark.parametrize("form", WRITTEN)
def test_residual_block_with_an_identity_branch_is_folded(form):
    model = randomise(Forward(lambda m, x: x + m.body(x), body=block(3, 3, padding=1)))
    check(form(model), noise(*IMAGE), folded=1)


# 18
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "add", [operator.add, operator.sub, torch.add, lambda a, b: torch.sub(a, b, alpha=3)]
)
def test_norm_after_a_sum_of_two_convs_goes_into_both(add, form):
    layers = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    x = noise(*IMAGE)
    model = randomise(Forward(lambda m, x: m.norm(add(m.a(x), m.b(x.tanh()))), **layers))
    fused = check(form(model, x), x, folded=1)
    (fold,) = fxfuse.report(fused).folded
    assert [name.removesuffix(".layer") for name in fold.into] == ["a", "b"]


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("add", "code"),
    [
        *(
            (lambda a, b: a + b.relu(), "FXF102"),
            (lambda a, b: a * b, "FXF102"),
            (lambda a, b: a + a, "FXF101"),
        ),
        (lambda a, b: a + b + a.mean(), "FXF101"),
    ],
)
def test_norm_after_a_sum_of_which_not_all_can_absorb_is_left(add, code, form):
    layers = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    x = noise(*IMAGE)
    model = randomise(Forward(lambda m, x: m.norm(add(m.a(x), m.b(x))), **layers))
    check(form(model, x), x, left=[code])


# 19
@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("eps", [1e-5, 0.1])
@pytest.mark.parametrize(
    ("order", "dim", "left"),
    [
        *(("ab", 1, []), ("ba", 1, []), ("ba", -3, []), ("abc", 1, []), ("cab", 1, []), ("ab", 0, [])),
        *(("ba", 2, []), ("abc", -1, [])),
        *(("aba", 1, ["FXF101"]), ("bab", -3, ["FXF101"]), ("aa", 2, ["FXF101"])),
    ],
)
def test_norm_after_a_concat_is_divided_with_its_eps_or_left(order, dim, left, eps, form):
    def forward(m, x):
        parts = {key: getattr(m, key)(x) for key in sorted(order)}
        return m.norm(torch.cat([parts[key] for key in order], dim))

    layers = {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(3, 4, 3, bias=False)}
    layers |= {"c": nn.ConvTranspose2d(3, 4, 3, padding=2)}
    norm = nn.BatchNorm2d(4 * len(order) if dim in (1, -3) else 4, eps=eps)
    model = form(randomise(Forward(forward, **layers, norm=norm)))
    check(model, noise(*IMAGE), folded=1 - len(left), left=left)


@pytest.mark.parametrize("form", WRITTEN)
def test_norms_before_a_concat_are_folded_and_the_one_after_it_is_left(form):
    def forward(m, x):
        part = m.a(x)
        return m.norm(torch.cat((part, m.b(x), x[:, :, 1:-1, 1:-1]), 1)), part

    model = form(randomise(Forward(forward, a=block(), b=block(), norm=nn.BatchNorm2d(11))))
    x = noise(*IMAGE)
    check(model, x, folded=2, left=["FXF101"])
    check(model, x, folded=2, left=["FXF101"], example_inputs=(x,))


# 20
@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    "middle",
    [
        *(nn.Flatten(2), lambda y: y.flatten(2), lambda y: torch.flatten(y, 2), lambda y: y.flatten(-2)),
        *(lambda y: y.view(y.shape[0], 4, -1), lambda y: y.reshape(y.size(0), y.size(1), -1)),
    ],
)
def test_norm_after_a_reshape_that_keeps_the_channels_is_folded(middle, form):
    check(form(between(middle, nn.BatchNorm1d(4))), noise(*IMAGE), folded=1)


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    ("middle", "channels"),
    [
        *(
            (lambda y: y.view(2, 4, -1), 4),  # on two images it keeps the channels, on one it does not
            (lambda y: y.view(-1, 4, 16), 4),
            (lambda y: y.reshape(2, 8, -1), 8),
            (lambda y: y.view(2, 16, 4), 16),
        ),
        *((lambda y: y.reshape(2, 4, 4, 4).transpose(1, 2).flatten(2), 4), (lambda y: y.flatten(1), 64)),
    ],
)
def test_norm_after_a_reshape_that_may_mix_the_channels_is_left(middle, channels, form):
    check(form(between(middle, nn.BatchNorm1d(channels))), noise(*IMAGE), left=["FXF108"])


# 21
@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    ("middle", "code", "known"),
    [
        *(
            (lambda y: y.reshape(3, 3, 3), "FXF105", "FXF108"),
            (lambda y: y.view(3, 3, 3), "FXF105", "FXF108"),
            (lambda y: y.transpose(0, 1), "FXF105", "FXF104"),
        ),
        *((lambda y: y.flip(1), "FXF102", "FXF102"), (lambda y: y.squeeze(), "FXF102", "FXF102")),
    ],
)
def test_reshape_of_square_sizes_is_never_taken_for_the_channel_axis(middle, code, known, form):
    x = noise(3, 3, 3)
    model = form(between(middle, nn.BatchNorm1d(3), nn.Linear(3, 3)))
    check(model, x, left=[code])
    check(model, x, left=[known], example_inputs=(x,))


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    ("middle", "certain"),
    [
        *((lambda y: y.transpose(1, 2), False), (lambda y: torch.transpose(y, 1, 2), False)),
        *((lambda y: y.swapaxes(1, 2).contiguous(), False), (lambda y: y.flatten(0, 1), False)),
        *((lambda y: y.mT, False), (lambda y: y.permute(0, 2, 1), True)),  # permute names all axes
    ],
)
def test_features_that_are_moved_to_the_norms_axis_are_folded_where_the_axes_are_known(middle, certain, form):
    x = noise(3, 3, 3)
    model = form(between(middle, nn.BatchNorm1d(3), nn.Linear(3, 3)))
    check(model, x, folded=int(certain), left=[] if certain else ["FXF105"])
    fused = check(model, x, folded=1, example_inputs=(x,))
    with pytest.raises(RuntimeError if certain else (AssertionError, IndexError)):
        fused(noise(3, 3))


@pytest.mark.parametrize("form", WRITTEN)
def test_square_linear_and_norm_over_the_other_axis_are_never_wrong(form):
    x = noise(3, 3, 3)
    model = form(between(nn.Identity(), nn.BatchNorm1d(3), nn.Linear(3, 3)))
    check(model, x, left=["FXF105"])
    check(model, x, left=["FXF104"], example_inputs=(x,))


# 22
@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize("size", [4, 5])
def test_norm_after_linear_and_unsqueeze_is_folded_where_the_axes_are_known(size, form):
    model, x = form(between(lambda y: y.unsqueeze(-1), nn.BatchNorm1d(4), nn.Linear(size, 4))), noise(3, size)
    check(model, x, left=["FXF105"])
    fused = check(model, x, folded=1, example_inputs=(x,))
    with pytest.raises(AssertionError, match="2 axes"):
        fused(noise(3, 4, size))


# 23
@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    ("middle", "outs", "channels"),
    [
        (lambda y: F.interpolate(y, scale_factor=2.0), 4, 4),
        (nn.Upsample(scale_factor=2, mode="bilinear"), 4, 4),
        *((nn.PixelShuffle(2), 8, 2), (lambda y: F.pixel_shuffle(y, 2), 8, 2), (nn.ChannelShuffle(2), 6, 6)),
        *((nn.ReflectionPad2d(1), 4, 4), (lambda y: F.pad(y, (1, 1, 0, 1), mode="circular"), 4, 4)),
        *((lambda y: y.chunk(2, 1)[1], 4, 2), (lambda y: y[:, :2], 4, 2), (lambda y: y[:, 1::2], 5, 2)),
    ],
)
def test_norm_after_resampling_shuffling_or_slicing_is_folded(middle, outs, channels, form):
    model = between(middle, nn.BatchNorm2d(channels), nn.Conv2d(3, outs, 3))
    check(form(model), noise(*IMAGE), folded=1)


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(
    ("middle", "channels", "code"),
    [
        *((nn.ZeroPad2d(1), 4, "FXF305"), (lambda y: F.pad(y, (1, 1)), 4, "FXF305")),
        *((lambda y: F.pixel_unshuffle(y, 2), 16, "FXF108"), (nn.PixelUnshuffle(2), 16, "FXF108")),
        *((lambda y: y[:, [1, 0, 3, 2]], 4, "FXF102"), (lambda y: y.roll(1, 1), 4, "FXF102")),
    ],
)
def test_norm_after_zero_padding_or_another_order_is_left(middle, channels, code, form):
    check(form(between(middle, nn.BatchNorm2d(channels))), noise(*IMAGE), left=[code])


@pytest.mark.parametrize("form", WRITTEN)
@pytest.mark.parametrize(("sizes", "number"), [([1, 3], -1), ([1, 2, 1], -2)])
def test_norm_after_a_part_that_is_counted_from_the_end_is_folded(sizes, number, form):
    model = between(lambda y: y.split(sizes, 1)[number], nn.BatchNorm2d(sizes[number]), nn.Conv2d(3, 4, 3))
    check(form(model), noise(*IMAGE), folded=1)


@pytest.mark.parametrize("form", WRITTEN)
def test_norm_of_which_no_channel_is_read_is_left(form):
    def forward(m, x):
        y = m.conv(x).relu()
        return torch.cat([m.norm(y).chunk(2, 1)[0], y], 1)[:, 2:]

    model = randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    check(form(model), noise(2, 3, 6, 6), left=["FXF102"])


def test_every_norm_of_a_small_network_is_accounted_for():
    model = randomise(
        Forward(
            lambda m, x: m.head(F.relu(m.late(torch.cat([m.stem(x), m.side(x)], 1))).flatten(1)),
            stem=block(3, 4),
            side=nn.Sequential(block(3, 4), nn.ReLU()),
            late=nn.BatchNorm2d(8),
            head=nn.Sequential(nn.Linear(128, 5), nn.BatchNorm1d(5)),
        )
    )
    fused = check(model, noise(*IMAGE), folded=3, left=["FXF102"])
    assert {fold.norm: fold.into for fold in fxfuse.report(fused).folded} == {
        "stem.1": ("stem.0",),
        "side.0.1": ("side.0.0",),
        "head.1": ("head.0",),
    }
