"""Models on which other tools raise, or silently fold nothing."""

import re

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrizations, spectral_norm, weight_norm

import fxfuse
from fxfuse.capture import capture
from tests.forms import EXPORT_WARNING, FORMS, Forward, check, exported, functions, modules, noise, traced
from tests.support import assert_exact, assert_untouched, randomise, snapshot

pytestmark = pytest.mark.filterwarnings(EXPORT_WARNING)
X = noise(2, 3, 6, 6)


def conv_norm(**options):
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4, **options)))


@pytest.mark.parametrize("form", [modules, functions, traced])
def test_model_in_training_mode_is_a_usage_error(form):
    """torch.fx's fuse: an assertion without a message."""
    model = form(conv_norm()).train()
    with pytest.raises(fxfuse.UsageError, match=r"call model\.eval\(\)"):
        fxfuse.fuse(model)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("bias", [True, False])
def test_linear_then_norm_without_affine_parameters(bias, form):
    """torch.fx's fuse: a TypeError."""
    model = randomise(nn.Sequential(nn.Linear(5, 4, bias=bias), nn.BatchNorm1d(4, affine=False, eps=0.1)))
    x = noise(3, 5)
    check(form(model, x), x, folded=1, example_inputs=(x,))


@pytest.mark.filterwarnings("ignore:`torch.nn.utils.weight_norm` is deprecated:FutureWarning")
@pytest.mark.parametrize(
    "wrap", [weight_norm, spectral_norm, parametrizations.weight_norm, parametrizations.spectral_norm]
)
@pytest.mark.parametrize(
    ("kind", "arguments", "channels", "left"),
    [
        *((nn.Conv2d, (3, 4, 3), 4, []), (nn.ConvTranspose2d, (3, 4, 3), 4, [])),
        (nn.Linear, (6, 3), 3, ["FXF104"]),
    ],
)
def test_weight_norm_and_spectral_norm(kind, arguments, channels, left, wrap):
    """torch.fx's fuse: a fold into the stale weight, or a crash."""
    model = randomise(nn.Sequential(wrap(kind(*arguments)), nn.BatchNorm2d(channels)))
    model(X)  # a weight that a hook computes is set by a run
    with torch.no_grad():
        for parameter in model[0].parameters():
            parameter.mul_(2)
    check(model, X, folded=1 - len(left), left=left)


@pytest.mark.parametrize("form", [modules, traced])
def test_norm_without_running_statistics(form):
    """torch.fx's fuse: an AttributeError of None."""
    check(form(conv_norm(track_running_stats=False)), X, left=["FXF201"])


@pytest.mark.parametrize("form", [modules, traced, exported])
def test_norm_called_by_keyword(form):
    """torch.fx's fuse: an IndexError, for it reads the first positional argument."""
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    model = randomise(Forward(lambda m, x: m.norm(input=m.conv(input=x)), **layers))
    check(form(model, X), X, folded=1)


@pytest.mark.parametrize("form", [modules, traced, exported])
@pytest.mark.parametrize(
    "call",
    [
        lambda m, y: F.batch_norm(y, m.running_mean, m.running_var, m.weight, m.bias, False, 0.1, m.eps),
        lambda m, y: F.batch_norm(y, running_var=m.running_var, running_mean=m.running_mean, bias=m.bias),
        lambda m, y: torch.batch_norm(
            y, m.weight, m.bias, m.running_mean, m.running_var, m.training, 0, 1, False
        ),
        lambda m, y: F.batch_norm(y, m.running_mean, m.running_var, training=m.training, eps=1e-3),
    ],
)
def test_functional_norm(call, form):
    """torch.fx's fuse (pytorch #122070): nothing was folded, and nobody was told."""
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    check(form(randomise(Forward(lambda m, x: call(m.norm, m.conv(x)), **layers)), X), X, folded=1)


def padded(x):
    return F.pad(x, (0, 1)) if x.shape[-1] % 2 else x


def test_control_flow_in_a_function_is_traced_around():
    """pytorch #87777: one piece of control flow, and nothing at all was folded."""
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    model = randomise(Forward(lambda m, x: m.norm(m.conv(padded(x))), **layers))
    fused = check(model, X, folded=1)
    assert_exact(model(noise(1, 3, 4, 5)), fused(noise(1, 3, 4, 5)))


def branching(m, x):
    if x.shape[-1] % 2:
        x = F.pad(x, (0, 1))
    return m.norm(m.conv(x))


def test_control_flow_in_forward_is_kept_and_a_note_names_the_line():
    """The same: what the forward calls is folded inside, and both branches stay."""
    model = type("Branching", (nn.Module,), {"forward": branching})()
    model.conv = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))
    model.norm = nn.BatchNorm2d(4)
    randomise(model)
    before = snapshot(model)
    line = r"in branching: if x\.shape\[-1\] % 2:"
    with pytest.raises(fxfuse.CaptureError, match=line):
        capture(model)
    fused = fxfuse.fuse(model)
    assert_untouched(before, model)
    report = fxfuse.report(fused)
    assert [fold.norm for fold in report.folded] == ["conv.2"]
    assert [(refusal.norm, refusal.code) for refusal in report.refused] == [("norm", "FXF209")]
    assert re.search(line, "\n".join(report.notes))
    for width in (5, 6):
        assert_exact(model(noise(1, 3, 4, width)), fused(noise(1, 3, 4, width)))


@pytest.mark.parametrize(
    ("norm", "x"),
    [
        (nn.BatchNorm1d(3), noise(2, 3)),
        (nn.BatchNorm1d(3, affine=False), noise(2, 3, 4)),
        (nn.BatchNorm2d(3), X),
        (nn.BatchNorm3d(3), noise(2, 3, 2, 2, 2)),
    ],
)
def test_norm_as_the_root_module(norm, x):
    """pytorch #102085: torch.fx's fuse looked for the parent of the empty name."""
    check(randomise(norm), x, left=["FXF103"])


def test_modules_of_any_kind_as_the_root_module():
    for root in (nn.Conv2d(3, 4, 1), nn.ReLU(), nn.Sequential(), nn.Flatten()):
        check(randomise(root), X)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("operator", [nn.Conv2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 3), nn.Linear(6, 4)])
def test_folding_goes_on_in_every_form_of_graph(operator, form):
    """pytorch #127513, #131693: a new form of graph came, and folding silently stopped."""
    linear = isinstance(operator, nn.Linear)
    head = nn.Flatten(0, 2) if linear else nn.Identity()
    model = nn.Sequential(head, operator, nn.BatchNorm1d(4) if linear else nn.BatchNorm2d(4))
    check(form(randomise(model), X), X, folded=1, example_inputs=(X,))
