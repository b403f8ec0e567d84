"""Batches in slices: only where samples are apart, and as large as pays."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

import fxfuse
from fxfuse.lowering import engines
from fxfuse.lowering import slices as cutting
from fxfuse.lowering.candidates import Compiler
from fxfuse.lowering.specialise import specialise, without_numbers
from tests.lowering import WithSecond, Written, folded, near
from tests.support import randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines; their numbers are what is looked at


BATCH = torch.randn(8, 3, 12, 12, generator=torch.Generator().manual_seed(2))
APART = {
    "pooling": lambda m, y: F.max_pool2d(y.relu(), 2),
    "residual": lambda m, y: F.relu(m.other(y) + F.gelu(y) * 2),
    "squeeze and excitation": lambda m, y: y * torch.sigmoid(m.other(y.mean((2, 3), keepdim=True))),
    "classifier": lambda m, y: m.head(F.adaptive_avg_pool2d(y, 1).flatten(1)).softmax(1),
    "view": lambda m, y: m.head(y.mean((2, 3)).view(y.shape[0], -1)).relu(),
    "tokens": lambda m, y: m.head(y.flatten(2).transpose(1, 2)).relu().mean(1),
    "attention": lambda m, y: (y @ y.transpose(2, 3)).softmax(-1) @ y,
    "shuffle": lambda m, y: m.other(shuffled(y)),
    "result of none": lambda m, y: (y.relu(), m.shift * 2),
    "parts": lambda m, y: torch.cat([m.other(y), y.chunk(2, 1)[1], y.chunk(2, 1)[0]], 1),
    "constants": lambda m, y: (y + m.shift).relu() * m.shift,
    "norms": lambda m, y: F.group_norm(F.layer_norm(y, (12,)), 2).relu(),
    "layers": lambda m, y: m.norm(y).relu(),
    "windows": lambda m, y: joined(F.relu(m.head(m.head(windows(y)).relu())), y.shape[0]),
    "windows, counted": lambda m, y: m.head(windows(y).reshape(y.shape[0] * 9, 16, 8)).relu().mean(1),
    "attention in windows": lambda m, y: joined(attention(m, windows(y), m.mask), y.shape[0]),
    "upsampling": lambda m, y: F.interpolate(F.pad(y, (1, 1)), scale_factor=2.0).relu(),
}
MIXED = {
    "softmax over samples": lambda m, y: y.relu().softmax(0),
    "mean of samples": lambda m, y: y.relu() - y.mean(0, keepdim=True),
    "mean of all": lambda m, y: y.relu() - y.mean(),
    "largest of all": lambda m, y: y.relu() / y.abs().amax(),
    "more samples": lambda m, y: torch.cat([y, -y]).relu(),
    "samples as channels": lambda m, y: m.wide(y.transpose(0, 1)).relu().transpose(0, 1),
    "other order": lambda m, y: y.relu().flip(0),
    "moved": lambda m, y: y.relu().roll(1, 0),
    "some": lambda m, y: y.relu()[::2],
    "neighbours": lambda m, y: y.relu()[1:] - y.relu()[:-1],
    "sums": lambda m, y: y.relu().cumsum(0),
    "products of samples": lambda m, y: y.relu().flatten(1) @ y.flatten(1).t(),
    "one of its own for each": lambda m, y: y.relu() + m.each,
    "number of samples": lambda m, y: y.relu() * y.shape[0],
    "number of samples as a shift": lambda m, y: F.relu(y + y.size(0)),
    "number of samples as an axis": lambda m, y: (
        y[:, :, 0, 0].relu().reshape(y.shape[0], y.shape[0], -1).transpose(1, 2)
    ),
    "number of samples as groups": lambda m, y: F.channel_shuffle(y.relu(), y.shape[0]),
    "normalised over samples": lambda m, y: F.normalize(y.relu(), dim=0),
    "norm over everything": lambda m, y: F.layer_norm(y.relu(), y.shape),
    "grouped": lambda m, y: y.relu().view(2, 4, 8, 12, 12).mean(0),
    "statistics": lambda m, y: F.batch_norm(y.relu(), None, None, training=True),
    "mixed in a reshape": lambda m, y: y.relu().reshape(-1, 16, 12, 12)[:, :8],
    "where the largest is": lambda m, y: torch.where(y.amax() > 100, y.relu(), y.sigmoid()),
    "sorted": lambda m, y: y.relu().sort(0)[0],
    "windows of all samples in turn": lambda m, y: m.head(
        y.reshape(y.shape[0], 8, 9, 16).permute(2, 0, 3, 1).reshape(-1, 16, 8)
    ).relu(),
    "windows that are exchanged": lambda m, y: joined(m.head(windows(y)).relu().flip(0), y.shape[0]),
    "attention over windows": lambda m, y: attention(m, windows(y).transpose(0, 1), m.mask[:1, :1]),
    "more places for fewer samples": lambda m, y: (
        y.relu().reshape(y.shape[0], 2, 2, -1).reshape(8, -1).softmax(1).reshape(y.shape)
    ),
    "windows of pairs": lambda m, y: m.head(windows(y).reshape(-1, 32, 8)).relu().softmax(1),
}


def windows(y):
    """Of 4×4 pixels, one after the other: (batch · 9, 16, 8)."""
    return y.reshape(y.shape[0], 8, 3, 4, 3, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, 8)


def joined(y, batch):
    return y.reshape(-1, 3, 3, 4, 4, 8).permute(0, 5, 1, 3, 2, 4).reshape(batch, 8, 12, 12)


def attention(m, y, mask):
    return F.scaled_dot_product_attention(m.head(y) / 16, y, y, attn_mask=mask)  # no sharp choices


def shuffled(y):
    size = y.shape[0]
    return y.reshape(size, 2, 4, 12, 12).transpose(1, 2).reshape(size, 8, 12, 12)


# Those that have no program at all.
REASONS = {
    "statistics": "it gives other numbers: error against float64 ",
}


def with_parts(function):
    parts = {
        "other": nn.Conv2d(8, 8, 1),
        "head": nn.Linear(8, 8),
        "norm": nn.LayerNorm((8, 12, 12)),
        "wide": nn.Conv2d(8, 8, 1),
    }
    model = randomise(Written(function, **parts)).float()
    model.shift = nn.Parameter(torch.randn(8, 1, 1))
    model.mask = nn.Parameter(torch.randn(16, 16))
    model.each = nn.Parameter(torch.randn(8, 1, 1, 1))
    return model


@pytest.fixture
def slices(monkeypatch):
    """Has slices of two samples taken wherever they may be, and counts that."""
    taken = []

    def one_by_one(programs):
        taken.append([size for size, _ in programs])
        return own(programs)

    own = cutting._one_by_one
    monkeypatch.setattr(cutting, "_one_by_one", one_by_one)
    monkeypatch.setattr(cutting, "medians", lambda *_, **__: {"small": 1.0, "large": 3.0})
    return taken


@pytest.mark.parametrize("way", APART)
def test_samples_that_are_kept_apart_may_run_in_slices(way, slices):
    lowered = fxfuse.lower(fxfuse.fuse(with_parts(APART[way])), (BATCH,))
    assert not lowered.lowering.reason and slices == [[2] * 4]
    near(lowered, BATCH)
    near(lowered, torch.randn(12, 3, 12, 12))
    near(lowered, torch.randn(7, 3, 12, 12))
    near(lowered, torch.randn(11, 3, 12, 12))
    assert slices == [[2] * 4, [2] * 6, [2, 2, 2, 2, 3]]


kept = {}


@fx.wrap
def cached(y):
    if "ramp" not in kept:
        kept["ramp"] = torch.ones_like(y[:1, :1]).cumsum(-1)
    return y + kept["ramp"]


def test_what_functions_keep_has_numbers(slices):
    lowered = fxfuse.lower(fxfuse.fuse(with_parts(lambda m, y: cached(y).relu())), (BATCH,))
    assert type(kept["ramp"]) is Tensor and not slices
    near(lowered, BATCH)


def test_what_takes_no_smaller_batch(slices, caplog):
    model = fxfuse.fuse(with_parts(lambda m, y: y.relu() * (12 // (y.shape[0] // 4))))
    with caplog.at_level("INFO", "fxfuse"):
        lowered = fxfuse.lower(model, (BATCH,))
    assert not lowered.lowering.reason and not slices
    assert "a batch of 8 runs as a whole: ZeroDivisionError: " in caplog.text
    near(lowered, BATCH)


def test_nothing_but_slices_is_computed(slices, monkeypatch):
    made, asked = [], []
    monkeypatch.setattr(
        Compiler,
        "compile",
        lambda self, given, own=Compiler.compile: (made.append(len(given[0])), own(self, given))[1],
    )
    monkeypatch.setattr(
        cutting, "specialise", lambda module, given: (asked.append(given[0]), specialise(module, given))[1]
    )
    lowered = fxfuse.lower(fxfuse.fuse(with_parts(APART["residual"])), (torch.randn(16, 3, 12, 12),))
    assert not lowered.lowering.reason and slices == [[2] * 8] and made == [2, 4]
    assert [(type(each) is Tensor, len(each)) for each in asked] == [(False, 16)]


def test_slices_are_doubled_while_it_pays(monkeypatch):
    times = iter([{"small": 1.0, "large": 1.5}, {"small": 1.0, "large": 1.8}, {"small": 1.0, "large": 1.9}])
    monkeypatch.setattr(cutting, "medians", lambda *_, **__: next(times))
    # Of 1.9 the next doubling would save 0.1 in 3.8.
    size, _ = cutting._Slices(*prepared(64))._fastest()
    assert size == 16 and not [*times]


def test_no_sample_is_left_alone(monkeypatch, slices):
    monkeypatch.setattr(cutting, "medians", lambda *_, **__: {"small": 1.0, "large": 1.0})
    lowered = fxfuse.lower(fxfuse.fuse(with_parts(APART["classifier"])), (torch.randn(9, 3, 12, 12),))
    assert not lowered.lowering.reason and slices == [[4, 5]]


def test_slices_that_are_slower_are_not_taken(monkeypatch):
    monkeypatch.setattr(cutting, "medians", lambda *_, **__: {"small": 1.0, "large": 2.1})
    size, made = cutting._Slices(*prepared(32))._fastest()
    assert size == 2 and len(made.inputs[0]) == 2


# What a kernel might do to the samples of a slice.
MISTAKES = {
    **{f"shifted by {count}": lambda y, count=count: y.roll(count, 0) for count in range(1, 8)},
    **{f"{one} and {one + 1} exchanged": lambda y, one=one: exchanged(y, one) for one in range(7)},
    **{f"{one} for all": lambda y, one=one: y[[one] * len(y)] for one in range(8)},
    "backwards": lambda y: y.flip(0)[[*range(1, len(y)), 0]],
    "one is off": lambda y: torch.cat([y[:-1], y[-1:] * (1 + 1e-3)]),
}


def exchanged(y, one):
    order = [*range(len(y))]
    order[one], order[one + 1] = order[one + 1], order[one]
    return y[order]


@pytest.mark.parametrize("equal", [False, True])
@pytest.mark.parametrize("way", MISTAKES)
def test_mistakes_are_seen_though_only_two_samples_are_computed(way, equal, monkeypatch):
    own = engines.ENGINES["torch"]

    def compile(graph, inputs, dtype):
        program = own.compile(graph, inputs, dtype)
        return lambda given: [MISTAKES[way](result) for result in program(given)]

    monkeypatch.setitem(engines.ENGINES, "torch", dataclasses.replace(own, compile=compile))
    monkeypatch.setattr(cutting, "_SLICE", 8)
    model = fxfuse.fuse(with_parts(APART["windows"]))
    batch = BATCH[:1].repeat(16, 1, 1, 1) if equal else torch.cat([BATCH, -BATCH])
    assert "other numbers" in fxfuse.lower(model, (batch,)).lowering.reason


def test_what_depends_on_the_number_of_samples(monkeypatch):
    monkeypatch.setattr(cutting, "medians", lambda *_, **__: {"small": 1.0, "large": 1.0})
    model = fxfuse.fuse(with_parts(lambda m, y: (y.relu(), y.shape[0], torch.arange(y.shape[0]))))
    for batch in (8, 11, 16):
        x = torch.randn(batch, 3, 12, 12)
        lowered = fxfuse.lower(model, (x,))
        assert not lowered.lowering.reason
        result, number, places = lowered(x + 1)
        torch.testing.assert_close(result, model(x + 1)[0])
        assert number == batch and torch.equal(places, torch.arange(batch))


def test_batches_with_channels_last(slices):
    lowered = fxfuse.lower(
        fxfuse.fuse(with_parts(APART["residual"])), (BATCH.contiguous(memory_format=torch.channels_last),)
    )
    assert not lowered.lowering.reason and slices == [[2] * 4]
    near(lowered, BATCH)
    near(lowered, BATCH.contiguous(memory_format=torch.channels_last))


def prepared(batch):
    model = fxfuse.fuse(with_parts(APART["residual"]))
    inputs = (torch.randn(batch, 3, 12, 12),)
    with torch.no_grad():
        whole = specialise(model, without_numbers(inputs))
    return Compiler(model, model, engines.ENGINES["torch"], None), inputs, batch, whole


@pytest.mark.parametrize("way", MIXED)
def test_samples_that_are_mixed_run_together(way, slices):
    lowered = fxfuse.lower(fxfuse.fuse(with_parts(MIXED[way])), (BATCH,))
    assert not slices
    assert lowered.lowering.reason.startswith(REASONS.get(way, "")) and (way in REASONS) == bool(
        lowered.lowering.reason
    )
    near(lowered, BATCH, limit=1e-4)


def test_slices_that_are_no_blocks_of_memory_are_not_taken(slices):
    model = folded(nn.Sequential(nn.Conv1d(4, 17, 3), nn.ReLU(), nn.Conv1d(17, 8, 3)))
    x = torch.randn(500, 16, 4).permute(1, 2, 0)
    lowered = fxfuse.lower(model, (x,))
    assert not lowered.lowering.reason and not slices
    near(lowered, x)
    near(lowered, x.contiguous())
    assert slices == [[2] * 8]


def test_several_inputs_run_in_slices_if_all_are_batches(slices):
    model = folded(WithSecond(lambda m, y, z: F.relu(y + z)))
    near(fxfuse.lower(model, (BATCH, torch.randn(8, 8, 12, 12))), BATCH, torch.randn(8, 8, 12, 12))
    assert slices == [[2] * 4]
    near(fxfuse.lower(model, (BATCH, torch.randn(1, 8, 12, 12))), BATCH, torch.randn(1, 8, 12, 12))
    near(fxfuse.lower(model, (BATCH, torch.randn(8, 12, 12))), BATCH, torch.randn(8, 12, 12))
    assert slices == [[2] * 4]
