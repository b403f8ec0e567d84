"""What a trace of a model could fix for ever, lose, or write to, without a word."""

import copy
import logging
import random
import threading
import types
import weakref
from array import array
from collections import deque
from functools import cached_property, lru_cache, partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.testing import assert_close

import fxfuse
from fxfuse.capture import capture
from tests.forms import EXPORT_WARNING, Forward, check, exported, noise, traced
from tests.support import assert_exact, assert_untouched, randomise, snapshot

pytestmark = pytest.mark.filterwarnings(EXPORT_WARNING)
X = noise(2, 3, 6, 6)


def conv_norm(norm):
    return randomise(nn.Sequential(nn.Conv2d(3, 4, 3), norm))


class Called(nn.Conv2d):
    def __call__(self, x):
        return 2 * super().__call__(x)


def accumulated(m, x):
    total = torch.zeros(2, 4, 4, 4, dtype=torch.float64)
    total += m.norm(m.conv(x))
    return total


def filled(m, x):
    total = torch.zeros(2, 4, 4, 4, dtype=torch.float64)
    total[:, :2] += m.norm(m.conv(x))[:, :2]
    return total


def added_in_place(m, x):
    y = same = m.norm(m.conv(x))
    y += 1
    return y * same


def other_eps(m, x):
    m.norm.eps = 0.5
    y = m.norm(m.conv(x))
    m.norm.eps = 1e-5
    return y


def other_padding(m, x):
    m.conv.padding = (1, 1)
    y = m.norm(m.conv(x))
    m.conv.padding = (0, 0)
    return y


def unpacked_if_a_tuple(m, x):
    y = m.pool(m.norm(m.conv(x)))
    return y if isinstance(y, torch.Tensor) else y[0]


def in_autocast(m, x):
    with torch.autocast("cpu", torch.bfloat16):
        return m.norm(m.conv(x.float()))


def doubled_when_called(m, x):
    return m.norm(m.called(x))


def by_python_chance(m, x):
    return m.norm(m.conv(x)) * random.random()


@pytest.mark.parametrize(
    "forward",
    [
        *(accumulated, filled, added_in_place, other_eps, other_padding, unpacked_if_a_tuple, in_autocast),
        *(by_python_chance, doubled_when_called),
    ],
)
def test_result_is_right_on_each_run(forward):
    layers = {
        "conv": nn.Conv2d(3, 4, 3),
        "norm": nn.BatchNorm2d(4),
        "pool": nn.MaxPool2d(2, return_indices=True),
        "called": Called(3, 4, 3),
    }
    model = randomise(Forward(forward, **layers))
    if forward is in_autocast:
        model.float()
    before = snapshot(model)
    fused = copy.deepcopy(fxfuse.fuse(model))
    assert_untouched(before, model)
    assert fxfuse.report(fused).norms == 1
    for run in range(3):
        random.seed(run)
        expected = model(X)
        random.seed(run)
        assert_close(fused(X), expected, rtol=1e-10 if forward is not in_autocast else 0.05, atol=1e-10)


def maybe_normalised(x, mean, var):
    return x if x.sum() > 1e9 else F.batch_norm(x, mean, var)


def test_norm_inside_a_function_that_cannot_be_traced_is_accounted_for():
    def forward(m, x):
        return maybe_normalised(m.conv(x), m.norm.running_mean, m.norm.running_var)

    model = randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    fused = fxfuse.fuse(model)
    assert_exact(model(X), fused(X))
    assert fxfuse.report(fused).norms == 1


def test_norm_called_as_a_function_inside_a_hooked_module_is_accounted_for():
    pair = randomise(nn.Sequential(nn.Conv2d(3, 4, 3), Statistics(4)))
    pair.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    check(nn.Sequential(pair).eval(), X, left=["FXF208"])


class Branches(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)

    def forward(self, x):
        taken = (lambda x: self.norm(self.conv(x)).flatten(), lambda x: self.conv(x).flatten())
        return torch.cond(x.sum() > 0, *taken, (x,))


class Statistics(nn.Module):
    """A norm that is no subclass of torch's."""

    def __init__(self, channels):
        super().__init__()
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.running_mean, self.running_var)


def test_norm_in_a_branch_of_an_exported_condition_is_accounted_for():
    model = exported(randomise(Branches()), X)
    fused = fxfuse.fuse(model)
    assert_exact((model(X), model(-X)), (fused(X), fused(-X)))
    assert fxfuse.report(fused).norms == 1


@pytest.mark.parametrize(("norm", "left"), [(nn.BatchNorm2d, []), (Statistics, ["FXF502"])])
def test_graph_module_that_calls_a_graph_module_accounts_for_its_norms(norm, left):
    graph = fx.Graph()
    graph.output(graph.call_module("inner", (graph.placeholder("x"),)))
    model = fx.GraphModule({"inner": traced(conv_norm(norm(4)))}, graph).eval()
    check(model, X, folded=1 - len(left), left=left)


def test_exported_module_is_fused_as_torch_gives_it():
    """torch marks an exported module as being in training mode, and has no way to change that."""
    check(torch.export.export(conv_norm(nn.BatchNorm2d(4)), (X,)).module(), X, folded=1)


@pytest.mark.filterwarnings("error")
def test_exported_module_is_fused_without_a_warning():
    assert len(fxfuse.report(fxfuse.fuse(exported(conv_norm(nn.BatchNorm2d(4)), X))).folded) == 1


def test_what_forward_stores_in_containers_does_not_reach_the_source():
    def forward(m, x):
        m.nested["list"].append(x)
        return m.norm(m.conv(x))

    model = randomise(Forward(forward, conv=nn.Conv2d(3, 4, 3), norm=nn.BatchNorm2d(4)))
    model.nested = {"list": []}
    fxfuse.fuse(model)
    assert model.nested == {"list": []}


def test_replaced_forward_of_a_submodule_does_not_reach_the_source():
    def forward(self, x):
        self.last = x
        return self[1](self[0](x))

    model = nn.Sequential(conv_norm(nn.BatchNorm2d(4))).eval()
    model[0].forward = types.MethodType(forward, model[0])
    before = snapshot(model)
    fused = fxfuse.fuse(model)
    assert_untouched(before, model)
    expected = fused(X)
    assert not hasattr(model[0], "last")
    assert_exact(model(X), expected)
    assert fused[0].last is model[0].last is X and fxfuse.report(fused).norms == 1


@pytest.mark.parametrize("name", ["meta", "graph", "code", "module", "x"])
def test_submodules_with_names_that_graph_modules_use_are_right_or_refused(name):
    forward = lambda m, x: m.norm(getattr(m, name)(x))  # noqa: E731
    model = randomise(Forward(forward, **{name: nn.Conv2d(3, 4, 3)}, norm=nn.BatchNorm2d(4)))
    fused = fxfuse.fuse(model)
    report = fxfuse.report(fused)
    assert_exact(model(X), fused(X))
    assert report.norms == 1
    if name in ("meta", "graph", "code"):
        with pytest.raises(fxfuse.CaptureError, match=name):
            capture(model)
        assert report.refused and name in " ".join(report.notes)
    else:
        assert report.folded


@pytest.mark.parametrize("register", ["register_module_forward_hook", "register_module_forward_pre_hook"])
def test_hook_on_all_modules_goes_on_seeing_what_it_saw_or_is_refused(register):
    def hook(module, inputs, output=None):
        if isinstance(module, (nn.Conv2d, nn.BatchNorm2d)):
            return 2 * output if output is not None else (2 * inputs[0],)
        return None

    model = conv_norm(nn.BatchNorm2d(4))
    handle = getattr(nn.modules.module, register)(hook)
    try:
        assert_exact(model(X), fxfuse.fuse(model)(X))
    except fxfuse.FxfuseError as error:
        assert "hook" in str(error)
    finally:
        handle.remove()


def counted(change):
    """A forward that multiplies by what `change` makes of the state that the module holds."""
    return lambda m, x: m.norm(m.conv(x)) * change(m)


def appended(values):
    values.append(1)
    return len(values)


def grown(values):
    values.add(len(values) + 1)
    return len(values)


def counted_up(attributes):
    attributes["held"] += 1
    return attributes["held"]


def refilled(nested):
    nested[:] = [[], nested[0] + nested[1]]
    return 1 + len(nested[0])


def registered(module):
    before = module.level
    module.register_buffer("level", torch.full_like(before, 3.0))
    return before


STATES = {
    "a set in a list": (
        {"held": [{1}]},
        counted(lambda m: grown(m.held[0])),
    ),
    "a deque in a dict": ({"held": {"a": deque()}}, counted(lambda m: appended(m.held["a"]))),
    "a list in a tuple": ({"held": ([],)}, counted(lambda m: appended(m.held[0]))),
    "a list in a partial": ({"held": partial(int, [])}, counted(lambda m: appended(m.held.args[0]))),
    "keys": ({"held": {1: 2.0}}, counted(lambda m: m.held.update({len(m.held) + 1: 2.0}) or len(m.held))),
    "the order of lists": ({"held": [[1], [2]]}, counted(lambda m: refilled(m.held))),
    "a hidden list": ({"_held": []}, counted(lambda m: appended(m._held))),
    "the attributes themselves": (
        {"held": 1},
        counted(lambda m: counted_up(vars(m))),
    ),
    "an array": ({"held": np.ones(1)}, counted(lambda m: float(np.add(m.held, 1, out=m.held)[0]))),
    "bytes": ({"held": bytearray(b"a")}, counted(lambda m: m.held.append(1) or len(m.held))),
    "a generator": ({"held": random.Random(3)}, counted(lambda m: m.held.random())),
    "a generator of numpy": ({"held": np.random.default_rng(3)}, counted(lambda m: float(m.held.random()))),
    "a generator of torch": (
        {"held": torch.Generator().manual_seed(3)},
        counted(lambda m: torch.rand(4, 1, 1, generator=m.held)),
    ),
    "a buffer": ({}, counted(registered)),
    "an array of objects": ({"held": np.array([[], None], object)}, counted(lambda m: appended(m.held[0]))),
    "an old generator of numpy": ({"held": np.random.RandomState(3)}, counted(lambda m: m.held.rand())),
    "an array of numbers": ({"held": array("d", [1])}, counted(lambda m: appended(m.held))),
    "its modules": ({}, counted(lambda m: m._modules.pop("spare", None) is None)),
    "a list of modules": ({}, counted(lambda m: len(m.many.append(nn.Identity())))),
    "a list of a module in it": ({}, counted(lambda m: appended(m.spare.held))),
}


@pytest.mark.parametrize("state", STATES)
def test_state_that_forward_changes_is_changed_in_each_call(state):
    held, forward = STATES[state]
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    model = randomise(Forward(forward, **layers, spare=nn.Identity(), many=nn.ModuleList()))
    model.register_buffer("level", torch.tensor(2.0))
    model.spare.held = []
    vars(model).update(copy.deepcopy(held))
    twin = copy.deepcopy(model)
    fused = fxfuse.fuse(model)
    assert fxfuse.report(fused).norms == 1
    for _ in range(3):
        expected = twin(X)
        assert_exact(expected, fused(X))
    if state != "a generator of torch":  # which is shared
        twin = copy.deepcopy(model)
        assert_exact(twin(X), model(X))


class WithProperties(Forward):
    @cached_property
    def levels(self):
        return torch.full((4, 1, 1), 2.0, dtype=torch.float64)

    @cached_property
    def times(self):
        return 3


def in_a_dict(m):
    if "a" not in m._cache:
        m._cache["a"] = torch.full((4, 1, 1), 2.0, dtype=torch.float64)
    return m._cache["a"]


def in_a_buffer(m):
    if not hasattr(m, "table"):
        m.register_buffer("table", torch.full((4, 1, 1), 2.0, dtype=torch.float64))
    return m.table


def of_weights(m):
    if m.doubled is None:
        m.doubled = m.level * 2
    return m.doubled


def drawn(_):
    return torch.rand(4, 1, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)


CACHES = {
    "cached properties": lambda m: m.levels * m.times,
    "a tensor in a dict": in_a_dict,
    "a buffer": in_a_buffer,
    "what comes of weights": of_weights,
    "a generator that forward makes": drawn,
}


@pytest.mark.parametrize("cache", CACHES)
def test_constants_that_forward_keeps_are_no_state(cache):
    layers = {"conv": nn.Conv2d(3, 4, 3), "norm": nn.BatchNorm2d(4)}
    model = randomise(WithProperties(lambda m, x: m.norm(m.conv(x)) * CACHES[cache](m), **layers))
    model.level, model.doubled = nn.Parameter(torch.ones(4, 1, 1, dtype=torch.float64)), None
    itself = {}
    itself["again"] = itself
    others = [threading.Lock(), logging.getLogger("a"), itself, weakref.ref(model.conv), lru_cache(len)]
    vars(model).update(_cache={}, others=others)
    fused = fxfuse.fuse(model)
    assert len(fxfuse.report(fused).folded) == 1 and not model._cache and not hasattr(model, "table")
    assert_close(fused(X), model(X))
    assert_close(fused(X + 1), model(X + 1))
