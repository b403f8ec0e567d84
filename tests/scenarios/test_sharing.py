"""Scenarios 24-32: modules, parameters and values that have more than one user."""

import copy
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, parametrize, prune, spectral_norm, weight_norm

import fxfuse
from tests.forms import EXPORT_WARNING, FORMS, Forward, check, functions, modules, noise
from tests.support import assert_exact, assert_untouched, folds, randomise, snapshot

pytestmark = pytest.mark.filterwarnings(EXPORT_WARNING)
WRITTEN = (modules, functions)
X = noise(2, 4, 6, 6)


def layers(*names):
    """conv…: 4 channels to 4, image size kept; norm…: 4 channels."""
    return {
        name: nn.Conv2d(4, 4, 3, padding=1) if name.startswith("conv") else nn.BatchNorm2d(4, eps=1e-3)
        for name in names
    }


def model_of(forward, *names, **more):
    return randomise(Forward(forward, **layers(*names), **more))


# 24
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: (m.norm(m.conv(x)), m.conv(x)),
        lambda m, x: (m.conv(x), m.norm(m.conv(x))),
        lambda m, x: m.conv(m.norm(m.conv(x)).relu()),
        lambda m, x: m.norm(m.conv(m.conv(x))),
        lambda m, x: m.conv(x) + m.norm(m.conv(x + 1)) * m.conv(x - 1),
        lambda m, x: m.conv(m.conv(m.norm(m.conv(m.conv(x))))),
    ],
)
def test_call_of_a_conv_without_a_norm_is_unchanged(forward, form):
    check(form(model_of(forward, "conv", "norm"), X), X, folded=1)


# 25
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("forward", "folded"),
    [
        (lambda m, x: m.norm1(m.conv(x)) - m.norm2(m.conv(x)), 2),
        (lambda m, x: m.norm2(m.conv(m.norm1(m.conv(x)))), 2),
        (lambda m, x: m.norm1(m.conv(m.norm1(m.conv(x)))), 2),
        (lambda m, x: m.norm1(m.norm1(m.conv(x))), 2),
        (lambda m, x: m.norm1(m.norm2(m.norm1(m.conv(x)))) + m.norm2(m.conv(x)), 4),
        (lambda m, x: m.norm1(m.conv(m.norm1(m.conv(m.norm1(m.conv(x)).relu())).relu())), 3),
        (lambda m, x: m.norm1(m.conv(m.conv(x))), 1),
    ],
)
def test_each_call_of_a_conv_takes_the_norm_behind_it(forward, folded, form):
    check(form(model_of(forward, "conv", "norm1", "norm2"), X), X, folded=folded)


@pytest.mark.parametrize("form", WRITTEN)
def test_two_norms_on_one_value_are_both_left(form):
    def forward(m, x):
        y = m.conv(x)
        return m.norm1(y) * m.norm2(y)

    check(form(model_of(forward, "conv", "norm1", "norm2")), X, left=["FXF101", "FXF101"])


@pytest.mark.parametrize("form", WRITTEN)
def test_two_norms_on_one_value_that_are_added_up_are_both_folded(form):
    def forward(m, x):
        y = m.conv(x)
        return m.norm1(y) + m.norm2(y)

    check(form(model_of(forward, "conv", "norm1", "norm2")), X, folded=2)


@pytest.mark.parametrize("form", WRITTEN)
def test_one_norm_called_twice_on_one_value_is_left_twice(form):
    def forward(m, x):
        y = m.conv(x)
        return m.norm(y) * m.norm(y)

    check(form(model_of(forward, "conv", "norm")), X, left=["FXF101", "FXF101"])


# 26
@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("forward", "folded", "left"),
    [
        (lambda m, x: m.norm(m.conv1(x)) + m.norm(m.conv2(x)), 2, []),
        (lambda m, x: m.norm(m.conv1(x)) + m.norm(m.conv2(x).relu()), 1, ["FXF102"]),
        (lambda m, x: m.norm(m.conv1(m.norm(x).relu())), 1, ["FXF103"]),
    ],
)
def test_norm_that_is_called_elsewhere_stays_what_it_was_there(forward, folded, left, form):
    check(form(model_of(forward, "conv1", "conv2", "norm"), X), X, folded=folded, left=left)


@pytest.mark.parametrize("form", FORMS)
def test_norm_that_is_called_on_both_sides_of_a_conv_goes_into_it_twice(form):
    model = form(model_of(lambda m, x: m.norm(m.conv(m.norm(x))), "norm", conv=nn.Conv2d(4, 4, 3)), X)
    fused = check(model, X, folded=2, example_inputs=(X,))
    assert sorted(fold.direction for fold in fxfuse.report(fused).folded) == ["backward", "forward"]


# 27
def tied(part):
    model = model_of(lambda m, x: m.norm(m.conv1(x)) + m.conv2(x), "conv1", "conv2", "norm")
    for name in ("weight", "bias") if part == "both" else (part,):
        setattr(model.conv2, name, getattr(model.conv1, name))
    return model


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("part", ["weight", "bias", "both"])
def test_conv_with_a_tied_weight_or_bias_is_unchanged(part, form):
    check(form(tied(part), X), X, folded=1)


@pytest.mark.parametrize("form", WRITTEN)
def test_conv_over_the_same_storage_is_unchanged(form):
    model = model_of(lambda m, x: m.norm(m.conv1(x)) + m.conv2(x), "conv1", "conv2", "norm")
    model.conv2.weight = nn.Parameter(model.conv1.weight.data)
    check(form(model), X, folded=1)


@pytest.mark.parametrize("form", WRITTEN)
def test_two_convs_with_a_tied_weight_take_their_own_norms(form):
    def forward(m, x):
        return m.norm1(m.conv1(x)) + m.norm2(m.conv2(x))

    model = model_of(forward, "conv1", "conv2", "norm1", "norm2")
    model.conv2.weight, model.norm2.weight = model.conv1.weight, model.norm1.weight
    model.norm2.running_mean = model.norm1.running_var
    check(form(model), X, folded=2)


@pytest.mark.parametrize("form", WRITTEN)
def test_embedding_tied_to_a_folded_linear_layer_is_unchanged(form):
    def forward(m, x):
        embedded = m.embedding(x)
        return m.norm(m.linear(embedded)), embedded

    model = randomise(
        Forward(forward, embedding=nn.Embedding(5, 3), linear=nn.Linear(3, 5), norm=nn.BatchNorm1d(5))
    )
    model.linear.weight = model.embedding.weight
    x = torch.tensor([4, 0, 2, 2])
    check(form(model), x, folded=1, example_inputs=(x,))


# 28
@pytest.mark.parametrize("form", FORMS)
def test_module_under_two_names_is_counted_once_for_each_call(form):
    model = model_of(lambda m, x: m.norm(m.again(x)), "conv", "norm")
    model.again, model.other = model.conv, model.norm
    check(form(model, X), X, folded=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    ("forward", "folded"),
    [
        (lambda m, x: m.norm(m.again(x)) + m.conv(x), 1),
        (lambda m, x: m.other(m.conv(x)) + m.norm(m.again(x + 1)), 2),
        (lambda m, x: m.other(m.norm(m.again(m.conv(x)))), 2),
    ],
)
def test_module_called_under_two_names_is_still_one_module(forward, folded, form):
    model = model_of(forward, "conv", "norm")
    model.again, model.other = model.conv, model.norm
    check(form(model, X), X, folded=folded)


def test_block_under_two_names_is_still_one_block():
    block = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model = randomise(nn.Sequential(block, nn.Sequential(block, nn.ReLU()), block[0]))
    check(model, X, folded=2)


# 29
@pytest.mark.parametrize("form", FORMS)
def test_loop_over_chunks_folds_each_call(form):
    def forward(m, x):
        parts = x.chunk(3)
        return torch.cat([m.norm(m.conv(parts[i])) for i in range(3)] + [m.conv(parts[0])])

    x = noise(3, 4, 5, 5)
    check(form(model_of(forward, "conv", "norm"), x), x, folded=3)


@pytest.mark.parametrize("form", WRITTEN)
def test_recurrence_folds_each_step(form):
    def forward(m, x):
        for _ in range(3):
            x = torch.tanh(m.norm(m.conv(x)))
        return m.conv(x)

    check(form(model_of(forward, "conv", "norm")), X, folded=3)


# 30
def parameters(*shape):
    return nn.Parameter(torch.empty(*shape))


@pytest.mark.parametrize("form", FORMS[::2])
@pytest.mark.parametrize(
    ("forward", "folded"),
    [
        (lambda m, x: m.norm(F.conv2d(x, m.weight)) + F.conv2d(x, m.weight), 1),
        (lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias)) + F.conv2d(x, m.weight, m.bias), 1),
        (lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias)) + m.bias.sum() + m.weight.mean(), 1),
        (lambda m, x: m.norm(F.conv2d(F.conv2d(x, m.weight, m.bias), m.weight)), 1),
        (lambda m, x: m.norm(F.conv2d(m.norm(F.conv2d(x, m.weight, m.bias)), m.weight, m.bias)), 2),
        (
            lambda m, x: m.norm(F.conv2d(x, m.weight, m.bias)) + F.conv_transpose2d(x, m.weight),
            1,
        ),
        (lambda m, x: (m.norm(F.conv2d(x, m.weight)), m.weight), 1),
    ],
)
def test_parameter_that_is_read_elsewhere_is_unchanged_there(forward, folded, form):
    model = randomise(
        Forward(forward, weight=parameters(4, 4, 1, 1), bias=parameters(4), norm=nn.BatchNorm2d(4))
    )
    check(form(model), X, folded=folded)


@pytest.mark.parametrize("form", [FORMS[0], *FORMS[2:]])
@pytest.mark.parametrize(
    "forward",
    [
        lambda m, x: m.norm(m.conv(x)) + m.conv.weight.sum(),
        lambda m, x: m.norm(m.conv(x)) * m.conv.bias.view(4, 1, 1),
        lambda m, x: m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1),
        lambda m, x: F.conv2d(m.norm(m.conv(x)), m.conv.weight.transpose(0, 1), m.conv.bias),
        lambda m, x: (m.norm(m.conv(x)), m.conv.weight.flatten(), m.norm.running_mean + 1, m.norm.bias),
        lambda m, x: m.norm(m.conv.forward(x)) + m.conv(x),
    ],
)
def test_weight_that_is_read_in_forward_is_unchanged_there(forward, form):
    check(form(model_of(forward, "conv", "norm"), X), X, folded=1)


def test_parameters_that_forward_iterates_over_are_unchanged_and_can_be_copied():
    def forward(m, x):
        return m.norm(m.conv(x)) + sum(parameter.sum() for parameter in m.conv.parameters())

    model = model_of(forward, "conv", "norm")
    twin = copy.deepcopy(check(model, X, folded=1))
    assert_exact(model(X), twin(X))


def test_parameters_of_lists_and_dicts_are_folded():
    model = randomise(
        Forward(
            lambda m, x: m.norm(F.conv2d(x, m.weights[0], m.named["bias"])) + F.conv2d(x, m.weights[1]),
            weights=nn.ParameterList([parameters(4, 4, 1, 1), parameters(4, 4, 1, 1)]),
            named=nn.ParameterDict({"bias": parameters(4)}),
            norm=nn.BatchNorm2d(4),
        )
    )
    check(model, X, folded=1)


@pytest.mark.parametrize("kind", ["buffer", "attribute"])
@pytest.mark.parametrize("bias", [True, False])
def test_weight_that_is_no_parameter_is_folded_or_left_but_never_ignored(kind, bias):
    model = model_of(lambda m, x: m.norm(F.conv2d(x, m.kernel, m.offset)), "norm")
    tensors = {"kernel": noise(4, 4, 1, 1), "offset": noise(4) if bias else None}
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor) if kind == "buffer" else setattr(model, name, tensor)
    check(model, X, folded=1)


# 31
class Standardised(nn.Conv2d):
    def forward(self, x):
        weight = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        return F.conv2d(x, weight / weight.std((1, 2, 3), keepdim=True), self.bias, padding=1)


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def conv():
    return nn.Conv2d(4, 4, 3, padding=1)


def pruned():
    layer = conv()
    prune.random_unstructured(layer, "weight", 0.5)
    return layer


COMPUTED = [
    *(lambda: parametrizations.weight_norm(conv()), lambda: parametrizations.spectral_norm(conv())),
    *(lambda: weight_norm(conv()), lambda: weight_norm(conv(), dim=None), lambda: spectral_norm(conv())),
    lambda: parametrize.register_parametrization(conv(), "weight", Doubled()),
    lambda: parametrize.register_parametrization(conv(), "bias", Doubled()),
    *(lambda: Standardised(4, 4, 3), pruned),
]


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("run_before", [True, False])
@pytest.mark.parametrize("wrapped", COMPUTED)
def test_conv_whose_weight_is_computed_is_folded_on_the_computed_value(wrapped, run_before):
    """A weight that a hook computes is set by a run, and is out of date once its parameters change."""
    model = randomise(Forward(lambda m, x: m.norm(m.conv(x)), conv=wrapped(), norm=nn.BatchNorm2d(4)))
    if run_before:
        model(X)
        with torch.no_grad():
            for parameter in model.conv.parameters():
                parameter.mul_(3)
    check(model, X, folded=1)


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize("wrapped", COMPUTED)
def test_computed_weight_that_is_used_elsewhere_is_unchanged_there(wrapped):
    def forward(m, x):
        return m.norm(m.conv(x)) * m.conv(x + 1)

    check(randomise(Forward(forward, conv=wrapped(), norm=nn.BatchNorm2d(4))), X, folded=1)


class Counting(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("count", torch.zeros(1))

    def forward(self, weight):
        return weight * self.count.add_(1)


def test_conv_whose_weight_is_another_at_each_call_is_left():
    layer = parametrize.register_parametrization(conv(), "weight", Counting())
    model = randomise(Forward(lambda m, x: m.norm(m.conv(x)), conv=layer, norm=nn.BatchNorm2d(4)))
    before = snapshot(model)
    fused = copy.deepcopy(fxfuse.fuse(model))
    assert_untouched(before, model)
    assert [refusal.code for refusal in fxfuse.report(fused).refused] == ["FXF303"]
    for _ in range(2):
        assert_exact(model(X), fused(X))


def on_expression(weight):
    forward = lambda m, x: m.norm(F.conv2d(x, weight(m, x)))  # noqa: E731
    layers = {"weight": parameters(4, 4, 1, 1), "mask": noise(4, 4, 1, 1), "norm": nn.BatchNorm2d(4)}
    return randomise(Forward(forward, **layers))


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "weight",
    [
        *(lambda m, x: m.weight * m.mask, lambda m, x: m.weight + 0, lambda m, x: m.weight.abs()),
        *(lambda m, x: m.weight[:4], lambda m, x: m.weight.clone(), lambda m, x: m.weight.to(torch.float64)),
        *(lambda m, x: F.normalize(m.weight), lambda m, x: m.weight.transpose(0, 1)),
        lambda m, x: torch.where(m.mask > 0, m.weight, m.mask),
    ],
)
def test_conv_whose_weight_is_an_expression_is_folded_on_its_value(weight, form):
    check(form(on_expression(weight), X), X, folded=1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize(
    "weight",
    [
        *(lambda m, x: m.weight * x.mean(), lambda m, x: m.weight[: x.shape[1]] * x.sum().sigmoid()),
        *(lambda m, x: x[:, :, :1, :1].repeat(2, 1, 1, 1), lambda m, x: F.dropout(m.weight, 0.0, True)),
    ],
)
def test_conv_whose_weight_is_no_constant_is_left(weight, form):
    check(form(on_expression(weight), X), X, left=["FXF303"])


def test_conv_is_folded_once_its_parametrization_is_removed():
    model = model_of(lambda m, x: m.norm(m.conv(x)), "norm", conv=parametrizations.weight_norm(conv()))
    parametrize.remove_parametrizations(model.conv, "weight")
    check(model, X, folded=1)


@pytest.mark.parametrize("part", ["weight", "bias"])
def test_norm_whose_parameters_are_computed_is_folded_on_their_values(part):
    model = model_of(lambda m, x: m.norm(m.conv(x)) + m.norm(m.conv(x + 1)), "conv", "norm")
    parametrize.register_parametrization(model.norm, part, Doubled())
    check(model, X, folded=2)


@pytest.mark.parametrize("part", ["running_mean", "running_var", "weight", "bias"])
@pytest.mark.parametrize("constant", [True, False])
def test_norm_with_an_expression_for_a_part_is_folded_if_it_is_constant(constant, part):
    def forward(m, x):
        parts = {name: getattr(m.norm, name) for name in ("running_mean", "running_var", "weight", "bias")}
        value = parts[part].abs() + (0.5 if constant else x.square().mean())
        return F.batch_norm(m.conv(x), **parts | {part: value})

    folds = {"folded": 1} if constant else {"left": ["FXF205"]}
    check(model_of(forward, "conv", "norm"), X, **folds)


def test_bias_from_a_computed_beta_needs_gradients_as_that_does():
    def forward(m, x):
        norm = m.norm
        return F.batch_norm(m.conv(x), norm.running_mean, norm.running_var, None, norm.bias * 2)

    model = model_of(forward, "norm", conv=nn.Conv2d(4, 4, 3, bias=False))
    model.conv.requires_grad_(False)
    assert check(model, X, folded=1).conv.bias.requires_grad
    model.norm.requires_grad_(False)
    assert not check(model, X, folded=1).conv.bias.requires_grad


# 32
def doubled(_module, _inputs, output):
    return 2 * output


def doubled_with_kwargs(_module, _args, _kwargs, output):
    return 2 * output


def doubled_inputs(_module, inputs):
    return (2 * inputs[0],)


def doubled_gradients(_module, gradients, *_):
    return tuple(2 * gradient for gradient in gradients)


HOOKS = {
    "forward": lambda m: m.register_forward_hook(doubled),
    "forward with kwargs": lambda m: m.register_forward_hook(doubled_with_kwargs, with_kwargs=True),
    "forward, always called": lambda m: m.register_forward_hook(doubled, always_call=True),
    "pre-forward": lambda m: m.register_forward_pre_hook(doubled_inputs),
    "backward": lambda m: m.register_full_backward_hook(doubled_gradients),
    "pre-backward": lambda m: m.register_full_backward_pre_hook(doubled_gradients),
}


@pytest.mark.parametrize("hook", HOOKS)
@pytest.mark.parametrize(("name", "code"), [("conv", "FXF301"), ("norm", "FXF203")])
def test_norm_is_left_where_it_or_its_conv_has_a_hook_which_goes_on_running(name, code, hook):
    model = model_of(lambda m, x: m.norm(m.conv(x)), "conv", "norm")
    bare = copy.deepcopy(model)
    HOOKS[hook](getattr(model, name))
    fused = check(model, X, left=[code])
    x = X.clone().requires_grad_()
    gradients = [torch.autograd.grad(m(x).sum(), x)[0] for m in (model, fused, bare)]
    assert torch.equal(gradients[0], gradients[1]) and not torch.equal(gradients[0], gradients[2])


@pytest.mark.parametrize("name", ["conv", "norm"])
def test_norm_is_folded_once_the_hook_is_removed(name):
    model = model_of(lambda m, x: m.norm(m.conv(x)), "conv", "norm")
    getattr(model, name).register_forward_hook(doubled).remove()
    check(model, X, folded=1)


def test_hooks_of_the_module_around_are_kept_and_those_of_the_root_too():
    model = randomise(nn.Sequential(nn.Sequential(conv(), nn.BatchNorm2d(4)), conv(), nn.BatchNorm2d(4)))
    HOOKS["forward"](model[0])
    HOOKS["forward"](model)
    HOOKS["pre-forward"](model)
    check(model, X, folded=1, left=["FXF208"])


def test_hook_on_dropout_between_is_kept():
    model = randomise(nn.Sequential(conv(), nn.Dropout(), nn.BatchNorm2d(4)))
    HOOKS["forward"](model[1])
    check(model, X, left=["FXF102"])


# State that forward writes to: what is folded could not follow it.
WRITES = {
    "mean, in place": lambda m: m.norm.running_mean.add_(1),
    "variance, in place": lambda m: m.norm.running_var.mul_(2),
    "mean, copied": lambda m: m.norm.running_mean.copy_(m.norm.running_var),
    "mean, zeroed": lambda m: m.norm.running_mean.zero_(),
    "mean and variance, by a norm": lambda m: F.batch_norm(
        # no random numbers: torch.export forgets their generator
        torch.arange(8, dtype=torch.float64).view(2, 4),
        m.norm.running_mean,
        m.norm.running_var,
        training=True,
    ),
    "weight, in place": lambda m: m.kernel.mul_(2),
    "weight, by an initialiser": lambda m: nn.init.constant_(m.kernel, 3.0),
    "weight, by a foreach function": lambda m: torch._foreach_mul_([m.kernel], 2.0),
    "weight, as out": lambda m: torch.mul(m.kernel, 2, out=m.kernel),
    "weight, an item set": lambda m: m.kernel.__setitem__(0, 1.0),
    "weight, through an item": lambda m: m.kernel[0].zero_(),
    "weight, through a view": lambda m: m.kernel.view(-1).add_(1),
    "weight, through a chunk": lambda m: m.kernel.chunk(2)[0].neg_(),
    "weight, detached": lambda m: m.kernel.detach().mul_(2),
    "weight, detached, by an operator": lambda m: operator.imul(m.kernel.detach(), 2),
}


@pytest.mark.parametrize("form", FORMS[::3])
@pytest.mark.parametrize("write", WRITES)
@pytest.mark.parametrize("before", [True, False])
def test_norm_is_left_where_forward_writes_to_what_would_be_folded(before, write, form):
    def forward(m, x):
        if before:
            WRITES[write](m)
        y = m.norm(F.conv2d(x, m.kernel))
        if not before:
            WRITES[write](m)
        return y

    model = model_of(forward, "norm", kernel=noise(4, 4, 1, 1))
    fused = copy.deepcopy(fxfuse.fuse(form(copy.deepcopy(model), X)))
    for _ in range(2):
        assert_exact(model(X), fused(X))
    report = fxfuse.report(fused)
    assert not [fold for fold in report.folded if fold.norm == "norm"], report


def test_norm_in_train_mode_does_not_update_the_statistics_of_one_that_was_folded():
    model = model_of(lambda m, x: m.norm2(m.conv(x)) + m.norm1(x), "conv", "norm1", "norm2")
    model.norm2.running_mean, model.norm2.running_var = model.norm1.running_mean, model.norm1.running_var
    model.norm1.train()
    fused = copy.deepcopy(fxfuse.fuse(model))
    for _ in range(2):
        assert_exact(model(X), fused(X))


def test_embedding_that_renormalises_a_tied_weight_is_not_parted_from_it():
    model = randomise(
        Forward(
            lambda m, x: m.norm(m.linear(m.embedding(x).flatten(1))),
            embedding=nn.Embedding(5, 3, max_norm=0.1),
            linear=nn.Linear(3, 5),
            norm=nn.BatchNorm1d(5),
        )
    )
    model.linear.weight = model.embedding.weight
    x = torch.tensor([4, 0, 2, 2])
    fused = copy.deepcopy(fxfuse.fuse(copy.deepcopy(model)))
    assert_exact(model(x), fused(x))


def test_counter_that_forward_writes_to_does_not_keep_a_norm_from_folding():
    def forward(m, x):
        m.count.add_(1)
        return m.norm(m.conv(x)) + m.count * 0

    folds(model_of(forward, "conv", "norm", count=torch.zeros(1)), X, folded=1)
