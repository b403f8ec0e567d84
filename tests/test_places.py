"""Reports name the line of the model's own code, in every way into fxfuse."""

import inspect

import pytest
import torch
from torch import nn

import fxfuse
from tests.forms import EXPORT_WARNING
from tests.support import randomise

X = torch.randn(2, 3, 8, 8, dtype=torch.float64)


class Named(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3)
        self.bn = nn.BatchNorm2d(4)
        self.left = nn.BatchNorm2d(4)
        self.inner = nn.Sequential(nn.Conv2d(4, 4, 1), nn.BatchNorm2d(4))

    def forward(self, x):
        y = self.bn(self.conv(x))
        return self.left(torch.relu(y)) + self.inner(y)


class Untraceable(Named):
    def forward(self, x):
        return super().forward(x) if x.sum() > 0 else x


def line_of(text):
    lines, first = inspect.getsourcelines(Named)
    return f"tests/test_places.py:{first + next(n for n, line in enumerate(lines) if text in line)} in "


def compiled(model):
    run = torch.compile(model, backend="fxfuse", options={"then": "eager"})
    run(X)
    return fxfuse.report(run)


@pytest.mark.filterwarnings(EXPORT_WARNING)
@pytest.mark.parametrize(
    "reported",
    [
        fxfuse.explain,
        lambda model: fxfuse.explain(model, keep_modules=True),
        lambda model: fxfuse.explain(torch.export.export(model, (X,))),
        lambda model: fxfuse.explain(torch.export.export(model, (X,)).run_decompositions()),
        compiled,
    ],
)
@torch.no_grad()
def test_every_norm_is_reported_with_the_line_that_calls_it(reported):
    report = reported(randomise(Named()))
    places = {
        record.norm.rpartition("L['self'].")[2]: record.where for record in (*report.folded, *report.refused)
    }
    assert len(places) == 3 and len(report.folded) == 2
    assert places["bn"].startswith(line_of("self.bn(self.conv(x))")), places
    assert places["left"].startswith(line_of("self.left(")), places
    assert places["inner.1"].startswith(line_of("self.inner(y)")), places


def test_without_code_of_its_own_a_model_has_no_place():
    model = randomise(nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4)))
    report = fxfuse.explain(model)
    assert [record.where for record in (*report.folded, *report.refused)] == ["", ""]


def test_a_norm_that_cannot_be_traced_is_reported_with_the_forward_that_calls_it():
    report = fxfuse.explain(randomise(Untraceable()))
    assert {left.norm for left in report.refused} == {"bn", "left"}
    forward = inspect.getsourcelines(Untraceable.forward)[1]
    assert {left.where for left in report.refused} == {
        f"tests/test_places.py:{forward} in Untraceable.forward"
    }
