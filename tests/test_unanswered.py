"""Code that asks what only the run can answer, or looks where no trace looks: right however it is called."""

from __future__ import annotations

import copy
import dataclasses
import functools
import logging
import types
from collections.abc import Mapping, Sequence
from enum import Enum

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from tests.forms import noise
from tests.support import assert_exact, randomise

X = noise(2, 3, 6, 6)
MODES = pytest.mark.parametrize("keep_modules", [True, False])


class Base(nn.Module):
    """A convolution and a norm."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x):
        return self.bn(self.conv(x))


def of_class(forward, base=Base, **parts):
    model = type("Model", (base,), {"forward": forward})()
    for name, part in parts.items():
        setattr(model, name, part)
    return randomise(model)


def right(model, *calls, keep_modules, folded=None):
    """Each call, a tuple of arguments or a dict of them, gives what the model gives."""
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    report = fxfuse.report(fused)
    assert folded is None or len(report.folded) == folded, report
    assert len({*(f.norm for f in report.folded), *(r.norm for r in report.refused)}) == report.norms
    for call in calls:
        args, options = ((), call) if isinstance(call, dict) else (call, {})
        with torch.no_grad():
            assert_exact(model(*args, **options), fused(*args, **options))
    return fused


# ---- dicts, sets, texts ----


def heads(self, x, task):
    y = self.conv(x)
    if task in self.heads:
        y = self.heads[task](y)
    return self.bn(y)


def in_a_set(self, x, mode):
    return x if mode in {"raw", "plain"} else self.bn(self.conv(x))


def by_text(self, x, task):
    head = getattr(self, f"head_{task}", None)
    y = self.bn(self.conv(x))
    return y if head is None else head(y)


def by_str(self, x, mode):
    return {"raw": self.conv}.get(str(mode), self.bn)(self.conv(x))


TABLE = {6: 3.0}


def by_size(self, x, _):
    return self.bn(self.conv(x)) * TABLE.get(x.shape[-1], 1.0)


@MODES
@pytest.mark.parametrize("forward", [heads, in_a_set, by_text, by_str, by_size])
def test_what_an_argument_is_looked_up_as(forward, keep_modules):
    parts = {"heads": nn.ModuleDict({"a": nn.Sequential(nn.Conv2d(3, 3, 1), nn.ReLU())}), "head_a": nn.ReLU()}
    model = of_class(forward, **parts)
    right(model, (X, "a"), (X, "b"), (X, "raw"), (X[..., :4], "raw"), keep_modules=keep_modules)


def asserted(self, x):
    torch._assert(x.shape[1] == 3, f"expected 3 channels, not {x.shape[1]} of {x}")
    return self.bn(self.conv(x))


@MODES
def test_a_message_for_people_may_hold_any_value(keep_modules):
    right(of_class(asserted), (X,), keep_modules=keep_modules, folded=1)


# ---- None, identity ----


def helper(model, x, cond):
    return model.conv(x) if cond is None else model.bn(model.conv(x)) * cond


class Optional(Base):
    def forward(self, x, cond=None):
        y = self.conv(x)
        return y if cond is None else self.bn(y) * cond


class Mode(Enum):
    A = 1
    B = 2


def in_a_helper(self, x, cond):
    return helper(self, x, cond)


def below(self, x, cond):
    return self.inner(x, cond)


def in_a_generator(self, x, cond):
    return self.conv(x) if any(each is None for each in (x, cond)) else self.bn(self.conv(x)) * cond


def in_a_walrus(self, x, cond):
    return self.conv(x) if (k := cond) is None else self.bn(self.conv(x)) * k


def with_a_number(self, x, cond=1.0):
    return self.bn(self.conv(x)) if cond is not None else self.conv(x)


def unpacked(self, x, cond):
    pair = (x, cond)
    y, z = pair
    return self.conv(y) if z is None else self.bn(self.conv(y)) * z


@MODES
@pytest.mark.parametrize(
    "forward", [in_a_helper, below, in_a_generator, in_a_walrus, with_a_number, unpacked]
)
def test_whether_an_argument_is_none_is_asked_anywhere(forward, keep_modules):
    model = of_class(forward, inner=Optional())
    right(model, (X, 2.0), (X, None), {"x": X, "cond": None}, keep_modules=keep_modules)


def flag(self, x, on):
    return self.bn(self.conv(x)) if on is True else self.conv(x)


def member(self, x, mode):
    return self.bn(self.conv(x)) if mode is Mode.A else self.conv(x)


@MODES
@pytest.mark.parametrize(("forward", "values"), [(flag, (True, False, 1)), (member, (Mode.A, Mode.B))])
def test_which_object_an_argument_is(forward, values, keep_modules):
    right(of_class(forward), *((X, value) for value in values), keep_modules=keep_modules)


def in_a_pair(self, inputs):
    x, mask = inputs
    return self.bn(self.conv(x)) if mask is None else self.conv(x) * mask


@MODES
def test_a_part_of_an_input_may_be_none(keep_modules):
    right(of_class(in_a_pair), ((X, None),), ((X, 2.0),), keep_modules=keep_modules)


def pad_of(x):
    return None if x.shape[-1] % 4 == 0 else (0, 1)


def padded(self, x):
    pad = pad_of(x)
    if pad is not None:
        x = F.pad(x, pad)
    return self.bn(self.conv(x))


class Pair(nn.Module):
    def forward(self, x):
        return (x, None) if x.sum() > 0 else (x, x)


def auxiliary(self, x):
    y, aux = self.pair(x)
    if aux is not None:
        y = y + aux
    return self.bn(self.conv(y))


@MODES
@pytest.mark.parametrize("forward", [padded, auxiliary])
def test_what_untraced_code_gives_may_be_none(forward, keep_modules):
    model = of_class(forward, pair=Pair())
    right(model, (X.abs(),), (-X.abs(),), (X[..., :4],), keep_modules=keep_modules)


# ---- types and attributes ----


def of_a_sequence(self, x):
    return self.conv(x[0]) if isinstance(x, Sequence) else self.bn(self.conv(x))


def of_a_list(self, x):
    if isinstance (x, list):  # fmt: skip
        return self.conv(x[0])
    return self.bn(self.conv(x))


@MODES
@pytest.mark.parametrize("forward", [of_a_sequence, of_a_list])
def test_which_type_an_input_is_of(forward, keep_modules):
    right(of_class(forward), (X,), ([X],), keep_modules=keep_modules)


def sized(self, x, size=4):
    if isinstance(size, int):
        size = (size, size)
    return F.adaptive_avg_pool2d(self.bn(self.conv(x)), size)


@MODES
def test_which_type_an_argument_with_a_default_is_of(keep_modules):
    right(of_class(sized), (X,), (X, 2), (X, (1, 2)), keep_modules=keep_modules)


class Holding(nn.Module):
    def forward(self, x):
        return types.SimpleNamespace(logits=x) if x.sum() > 0 else {"feat": x}


def mapping(self, x):
    out = self.inner(x)
    out = out["feat"] if isinstance(out, Mapping) else out.logits
    return self.bn(self.conv(out))


def attribute(self, x):
    out = self.inner(x)
    out = getattr(out, "logits", out)
    return self.bn(self.conv(out["feat"] if isinstance(out, dict) else out))


@MODES
@pytest.mark.parametrize("forward", [mapping, attribute])
def test_what_a_value_of_unknown_type_has(forward, keep_modules):
    right(of_class(forward, inner=Holding()), (X.abs(),), (-X.abs(),), keep_modules=keep_modules)


# ---- weights under other names ----


class Tied(nn.Module):
    def __init__(self):
        super().__init__()
        self.dec, self.enc = nn.ConvTranspose2d(4, 3, 1, bias=False), nn.Conv2d(3, 4, 1, bias=False)
        self.enc.weight, self.bn = self.dec.weight, nn.BatchNorm2d(4)

    def forward(self, x):
        return F.conv_transpose2d(torch.relu(self.bn(self.enc(x))), self.enc.weight)


class Named(Base):
    def __init__(self):
        super().__init__()
        self.w = self.conv.weight

    def forward(self, x):
        return self.bn(self.conv(x)) * self.conv.weight.sum() + self.w.sum()


@MODES
@pytest.mark.parametrize("model", [Tied, Named])
def test_a_weight_with_two_names(model, keep_modules):
    right(randomise(model()), (X,), keep_modules=keep_modules)


def by_parameters(self, x):
    return self.bn(self.conv(x)) / next(self.conv.parameters()).flatten(1).norm(dim=1).max()


def by_a_dict(self, x):
    return self.bn(self.conv(x)) + dict(self.conv.named_parameters())["weight"].sum()


def penalised(self, x):
    return self.bn(self.conv(x)), sum(each.pow(2).sum() for each in self.conv.parameters())


@MODES
@pytest.mark.parametrize("forward", [by_parameters, by_a_dict, penalised])
def test_weights_that_are_read_past_the_trace(forward, keep_modules):
    right(of_class(forward), (X,), keep_modules=keep_modules)


# ---- a look into modules that are folded later ----


class Leaf(nn.Module):
    def __init__(self):
        super().__init__()
        self.block = Base()

    def forward(self, x):
        return self.block(x / 2 if x.mean() > 100 else x)


LOOKS = {
    "isinstance": lambda self, x: self.leaf(x) * (2 if isinstance(self.leaf.block.bn, nn.BatchNorm2d) else 1),
    "an attribute": lambda self, x: self.leaf(x) * self.leaf.block.bn.num_features,
    "parameters": lambda self, x: self.leaf(x) + sum(p.pow(2).sum() for p in self.leaf.parameters()),
    "modules": lambda self, x: self.leaf(x) * sum(isinstance(m, nn.BatchNorm2d) for m in self.modules()),
}


@MODES
@pytest.mark.parametrize("forward", LOOKS.values(), ids=LOOKS.keys())
def test_traced_code_that_looks_into_an_untraced_module(forward, keep_modules):
    def run(self, x):
        return forward(self, x)

    model = randomise(type("Parent", (nn.Module,), {"forward": forward if keep_modules else run})())
    model.leaf = randomise(Leaf())
    right(model, (X,), (X * 1000,), keep_modules=keep_modules)


class Branching(nn.Module):
    def __init__(self, inner, looks):
        super().__init__()
        self.inner, self.looks = inner, looks

    def forward(self, x):
        x = x + 1 if x.sum() > 0 else x
        if self.looks:
            return self.inner(x) * self.inner.conv.weight.sum()
        return self.inner(x)


@MODES
@pytest.mark.parametrize("order", [(False, True), (True, False)])
def test_a_module_under_two_parents_of_which_one_looks_into_it(order, keep_modules):
    shared = Base()
    model = randomise(nn.Sequential(*(Branching(shared, looks) for looks in order)))
    right(model, (X,), (-X,), keep_modules=keep_modules, folded=0)


def wired(self, x):
    h = torch.relu(x)
    y = self.bn(self.conv(h))
    return y + (x if isinstance(self.bn, nn.Identity) else h)


def by_another_constant(self, x):
    y = self.bn(self.conv(x))
    return y * (self.g if hasattr(self.bn, "running_mean") else self.h)


@MODES
@pytest.mark.parametrize("forward", [wired, by_another_constant])
def test_code_that_wires_the_same_calls_otherwise(forward, keep_modules):
    constants = {"g": nn.Parameter(torch.ones(())), "h": nn.Parameter(torch.ones(()))}
    right(of_class(forward, **constants), (X,), keep_modules=keep_modules)


# ---- other methods, other copies ----


class Features(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.block, self.norm = nn.Conv2d(3, 3, 1), Base(), nn.BatchNorm2d(3)
        self.head = nn.Linear(3, 2)

    def forward_features(self, x):
        return self.norm(torch.relu(self.block(self.stem(x))))

    def forward(self, x):
        return self.head(self.forward_features(x).mean((2, 3)))


def test_other_methods_of_a_kept_module_give_what_they_gave():
    model = randomise(Features())
    kept = right(model, (X,), keep_modules=True, folded=1)
    assert [left.code for left in fxfuse.report(kept).refused] == ["FXF504"]
    assert_exact(model.forward_features(X), kept.forward_features(X))
    right(model, (X,), keep_modules=False, folded=2)


class Stages(nn.Module):
    """Its modules once more, in a tuple, in a named one and in a partial."""

    def __init__(self):
        super().__init__()
        self.one, self.two = Base(), Base()
        self.three = Base()
        self.stages, self.run = ([self.one], self.two), functools.partial(self.three)

    def forward(self, x):
        return self.run(self.stages[1](self.stages[0][0](x)))


@MODES
def test_the_result_runs_its_own_modules(keep_modules):
    fused = right(randomise(Stages()), (X,), keep_modules=keep_modules)
    assert fused.float()(X.float()).dtype == torch.float32


@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_a_kept_module_can_be_scripted():
    fused = fxfuse.fuse(randomise(Base()), keep_modules=True)
    assert_exact(fused(X), torch.jit.script(fused)(X))


@MODES
@pytest.mark.filterwarnings("ignore:.*torch.jit.script")
def test_scripted_submodules_are_called(keep_modules):
    def forward(self, x):
        return self.bn(self.conv(self.scripted(x)))

    model = of_class(forward)
    model.scripted = torch.jit.script(nn.ReLU())
    right(model, (X,), keep_modules=keep_modules, folded=1)


# ---- what fuse does to the source ----


class Remembers(Base):
    seen: list = []  # noqa: RUF012

    def __init__(self):
        super().__init__()
        self.state = types.SimpleNamespace(last=None, all=[])

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.state.last is not None:
            y = y + 0.5 * self.state.last
        self.state.last = y.detach()
        self.state.all.append(y)
        self.seen.append(y)
        return y


@MODES
def test_state_in_objects_and_classes_is_not_touched(keep_modules):
    model = randomise(Remembers())
    fxfuse.fuse(model, keep_modules=keep_modules)
    assert model.state.last is None and not model.state.all and not model.seen
    assert isinstance(model(X), torch.Tensor)
    Remembers.seen.clear()


# ---- errors of any kind ----


def raises(self, x):
    if type(self.bn) is not nn.BatchNorm2d:
        raise Exception("unknown norm")
    return self.bn(self.conv(x))


def demands_a_tensor(self, x):
    if type(x) is not torch.Tensor:
        raise Exception("bad input")
    return self.bn(self.conv(x))


def iterates(self, x):
    return self.bn(self.conv(x.to(next(self.bn.parameters()).dtype)))


class Decorator:
    """A decorator that is no function."""

    def __init__(self, function):
        self.function = function

    def __get__(self, owner, kind=None):
        return functools.partial(self.function, owner)

    def __call__(self, *args):
        return self.function(*args)


def with_a_keyword(function):
    @functools.wraps(function)
    def wrapper(self, x, *args, raw=False, **options):
        return self.conv(x) if raw else function(self, x, *args, **options)

    return wrapper


@MODES
@pytest.mark.parametrize("forward", [raises, demands_a_tensor, iterates, Decorator(Base.forward)])
def test_fuse_raises_nothing_of_the_models_own(forward, keep_modules):
    right(of_class(forward), (X,), keep_modules=keep_modules)


@MODES
def test_a_decorator_may_take_arguments_of_its_own(keep_modules):
    model = of_class(with_a_keyword(Base.forward))
    right(model, (X,), {"x": X, "raw": True}, keep_modules=keep_modules)


# ---- accounts ----


@pytest.mark.parametrize("branches", [True, False])
@MODES
def test_frozen_norms_are_accounted_for(keep_modules, branches):
    class Frozen(nn.Module):
        def __init__(self):
            super().__init__()
            for name in ("weight", "bias", "running_mean", "running_var"):
                self.register_buffer(name, torch.ones(3))

        def forward(self, x):
            scale = self.weight * (self.running_var + 1e-5).rsqrt()
            shift = self.bias - self.running_mean * scale
            return x * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.frozen = nn.Conv2d(3, 3, 1), Frozen()

        def forward(self, x):
            if branches and x.sum() > 0:
                return x
            return self.frozen(self.conv(x))

    calls = [(X.abs(),), (-X.abs(),), *([(X[0],)] if keep_modules else [])]
    fused = right(randomise(Model()), *calls, keep_modules=keep_modules)
    assert fxfuse.report(fused).norms == 1
    assert len(fxfuse.report(fused).folded) == (not branches)


# ---- found by a second attack ----


def asked_by_name(self, x):
    import builtins

    y = self.conv(x)
    if builtins.isinstance(y, torch.Tensor):
        y = torch.relu(y)
    return self.bn(y)


@MODES
def test_isinstance_is_answered_whatever_its_source(keep_modules):
    space = {"torch": torch}
    exec(
        "def forward(self, x):\n"
        "    y = self.conv(x)\n"
        "    if isinstance(y, torch.Tensor): y = torch.relu(y)\n"
        "    return self.bn(y)\n",
        space,
    )
    right(of_class(space["forward"]), (X,), keep_modules=keep_modules, folded=0)
    right(of_class(asked_by_name), (X,), keep_modules=keep_modules, folded=0)


def asked_in_hot_code(self, x):
    y = self.conv(x)
    if isinstance(y, torch.Tensor):
        y = torch.relu(y)
    return self.bn(y)


@MODES
def test_isinstance_is_answered_in_code_that_is_hot(keep_modules):
    """The interpreter specialises it, and calls from another instruction."""
    model = of_class(asked_in_hot_code)
    for _ in range(200):
        model(X[:1, :, :1, :1])
    right(model, (X,), keep_modules=keep_modules, folded=0)


def by_the_name_of_a_method(self, x):
    return self.bn(self.conv(getattr(x, "contiguous")()))  # noqa: B009


@MODES
def test_getattr_without_a_default_is_an_access_as_any(keep_modules):
    model = of_class(by_the_name_of_a_method)
    for _ in range(200):
        model(X[:1, :, :1, :1])
    right(model, (X,), keep_modules=keep_modules, folded=1)


class Embedding(Base):
    def embed(self, x):
        return self.conv(x)


class Neck(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn, self.fc = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.Linear(3, 2)

    def encode(self, x, normalize=True):
        y = self.conv(x)
        return self.bn(y) if normalize else y

    def together(self, x):
        x = self.conv(x)
        x = self.bn(x)
        return torch.relu(x)

    def forward(self, x):
        return self.fc(torch.relu(self.encode(x)).mean((2, 3)))


class Together(Neck):
    def encode(self, x, *, double=False):
        x = self.bn(self.conv(x))
        return x * 2 if double else x


def test_methods_that_forward_does_not_call_give_what_they_gave():
    model = randomise(Embedding())
    fused = right(model, (X,), keep_modules=True, folded=0)
    assert_exact(model.embed(X), fused.embed(X))
    model = randomise(Neck())
    fused = right(model, (X,), keep_modules=True, folded=0)
    assert_exact(model.encode(X, normalize=False), fused.encode(X, normalize=False))
    model = randomise(Together())
    fused = right(model, (X,), keep_modules=True, folded=1)
    assert_exact(model.encode(X, double=True), fused.encode(X, double=True))
    assert_exact(model.together(X), fused.together(X))


class Keyed(nn.Module):
    """Its modules and parameters are keys and members."""

    def __init__(self):
        super().__init__()
        self.layers = nn.ModuleList([Base(), Base()])
        self.scale, self.special = {self.layers[0]: 2.0}, {self.layers[1]}
        self.frozen, self.weights = frozenset({self.layers[0].bn}), {self.layers[0].conv.weight: 0.5}

    def forward(self, x):
        for layer in self.layers:
            x = layer(x) * self.scale.get(layer, 1.0) * self.weights.get(layer.conv.weight, 1.0)
            x = x + 1 if layer in self.special else x
            x = x * 3 if layer.bn in self.frozen else x
        return x


@MODES
def test_modules_that_are_keys_are_those_of_the_copy(keep_modules):
    right(randomise(Keyed()), (X,), keep_modules=keep_modules)


def part_of_a_pair(self, inputs):
    y = self.conv(inputs[0])
    return y if inputs[1] is None else self.bn(y) * inputs[1]


def part_of_a_dict(self, batch):
    y = self.conv(batch["x"])
    return y if batch["mask"] is None else self.bn(y) * batch["mask"]


@MODES
def test_a_part_of_an_input_is_compared_in_place(keep_modules):
    right(of_class(part_of_a_pair), ((X, None),), ((X, 2.0),), keep_modules=keep_modules)
    calls = [({"x": X, "mask": mask},) for mask in (None, 2.0)]
    right(of_class(part_of_a_dict), *calls, keep_modules=keep_modules)


def overwritten(self, x):
    y, aux = self.pair(x)
    if aux is not None:
        y = y + aux
    aux = self.conv(y)
    return self.bn(aux)


@MODES
def test_a_variable_that_is_overwritten_later(keep_modules):
    right(of_class(overwritten, pair=Pair()), (X.abs(),), (-X.abs(),), keep_modules=keep_modules)


def raw(self, x, ret=False):
    y = self.conv(x)
    return y if ret == "raw" else self.bn(y)


def third(self, x, flag=False):
    y = self.conv(x)
    return y if flag is None else self.bn(y)


def one_of(self, x, mode=None):
    y = self.conv(x)
    return y if mode in ("raw", "plain") else self.bn(y)


@MODES
@pytest.mark.parametrize("forward", [raw, third, one_of])
def test_options_with_more_than_two_values(forward, keep_modules):
    values = ({}, {"ret": "raw"}, {"flag": None}, {"mode": "raw"}, {"ret": True}, {"flag": True})
    known = [{"x": X, **each} for each in values if {*each} <= {*forward.__code__.co_varnames}]
    right(of_class(forward), *known, keep_modules=keep_modules)


def of_a_shape(self, x):
    y = self.conv(x if hasattr(x, "shape") else x[0])
    return self.bn(y) if hasattr(x, "shape") else y


def called(self, x):
    if callable(x):
        x = x()
    return self.bn(self.conv(x))


@MODES
def test_what_an_input_has_or_does(keep_modules):
    right(of_class(of_a_shape), (X,), ([X],), keep_modules=keep_modules)
    right(of_class(called), (X,), (lambda: X,), keep_modules=keep_modules)


DEVICES = {torch.device("cpu"): 2.0}


def by_device(self, x):
    return self.bn(self.conv(x)) * DEVICES.get(x.device, 1.0)


def by_kind_of_device(self, x):
    return self.bn(self.conv(x)) * (3.0 if x.device.type in {"cpu", "cuda"} else 1.0)


@MODES
@pytest.mark.parametrize("forward", [by_device, by_kind_of_device])
def test_attributes_of_values_are_known_at_run_time_only(forward, keep_modules):
    right(of_class(forward), (X,), keep_modules=keep_modules)


class Memory:
    last = None


class Deep(Base):
    def __init__(self, objects):
        super().__init__()
        self.memories = [Memory() for _ in range(objects)]

    def forward(self, x):
        y = self.bn(self.conv(x))
        if self.memories[0].last is not None:
            y = y + self.memories[0].last
        self.memories[0].last = y.detach()
        return y


def adds(m):
    m.calls = m.calls + 1


def adds_in_place(m):
    m.calls += 1


@MODES
@pytest.mark.parametrize("count", [adds, adds_in_place])
def test_a_buffer_that_is_computed_from_itself_is_no_cache(count, keep_modules):
    def forward(self, x):
        count(self)
        return self.bn(self.conv(x)) * self.calls

    model = randomise(of_class(forward))
    model.register_buffer("calls", torch.zeros(1))
    twin = copy.deepcopy(model)
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    assert float(model.calls) == 0
    with torch.no_grad():
        for _ in range(3):
            assert_exact(twin(X), fused(X))


@MODES
@pytest.mark.parametrize("objects", [1, 20_000])
def test_state_in_objects_in_lists_is_not_touched(objects, keep_modules):
    model = randomise(Deep(objects))
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    assert model.memories[0].last is None
    twin = copy.deepcopy(model)
    with torch.no_grad():
        for _ in range(2):
            assert_exact(twin(X), fused(X))


@dataclasses.dataclass(slots=True)
class Slots:
    count: int = 0

    def __call__(self):
        self.count += 1
        return self.count


def counter():
    count = 0

    def call():
        nonlocal count
        count += 1
        return count

    return call


def filling():
    def call():
        nonlocal count
        count = 1 if call.called else 2
        call.called = True
        return count

    call.called = False
    if call.called:
        count = 0
    return call


class Ticking(nn.Module):
    def __init__(self, tick):
        super().__init__()
        self.block, self.tick = Base(), tick

    def forward(self, x):
        return self.block(x) * self.tick()


class Unset:
    """Slots that are set by the first call."""

    __slots__ = ("__dict__", "count")

    def __getattr__(self, name):
        raise RuntimeError(f"there is no {name}")

    def __call__(self):
        self.count = 2 if "called" in vars(self) else 1
        vars(self)["called"] = True
        return self.count


def by_keyword():
    def call(*, state={"count": 0}):  # noqa: B006
        state["count"] += 1
        return state["count"]

    call.__kwdefaults__ = {"state": {"count": 0}}
    return call


STATES = {
    "closure": counter,
    "slots that are empty": Unset,
    "default": by_keyword,
    "slots": Slots,
    "empty cell": filling,
    "method": lambda: Slots().__call__,
    "partial": lambda: functools.partial(counter()),
}


@MODES
@pytest.mark.parametrize("state", STATES)
def test_state_in_closures_and_slots_is_not_touched(keep_modules, state):
    model, twin = (randomise(Ticking(STATES[state]())) for _ in range(2))
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    with torch.no_grad():
        for _ in range(3):
            assert_exact(twin(X), fused(X))
    assert len(fxfuse.report(fused).folded) == 1


class Methodical(Base):
    def forward(self, x, seen=[]):  # noqa: B006
        y = super().forward(x)
        seen.append(y.detach())
        return y + seen[0]


@MODES
def test_state_in_defaults_of_methods_is_not_touched(keep_modules):
    model = randomise(Methodical())
    fxfuse.fuse(model, keep_modules=keep_modules)
    assert Methodical.forward.__defaults__ == ([],)


def ramps():
    kept = {}

    def call():
        if "ramp" not in kept:
            kept["ramp"] = torch.arange(6.0, dtype=torch.float64)
        return kept["ramp"]

    return call


def lazy():
    ramp = None

    def call():
        nonlocal ramp
        logging.getLogger("tests").debug("called")
        if ramp is None:
            ramp = torch.arange(6.0, dtype=torch.float64)
        return ramp

    return call


@dataclasses.dataclass(slots=True)
class Ramp:
    ramp: torch.Tensor | None = None

    def __call__(self):
        if self.ramp is None:
            self.ramp = torch.arange(6.0, dtype=torch.float64)
        return self.ramp


@pytest.mark.parametrize("make", [ramps, lazy, Ramp, lambda: functools.partial(ramps())])
def test_caches_of_constants_are_no_state(make):
    model, twin = randomise(Ticking(make())), randomise(Ticking(make()))
    fused = fxfuse.fuse(model)
    assert isinstance(fused, torch.fx.GraphModule) and len(fxfuse.report(fused).folded) == 1
    assert_exact(twin(X), fused(X))
    assert_exact(twin(X), model(X))


def test_a_profiler_changes_nothing():
    import cProfile

    profile = cProfile.Profile()
    profile.enable()
    try:
        fused = fxfuse.fuse(randomise(Base()), keep_modules=True)
    finally:
        profile.disable()
    assert len(fxfuse.report(fused).folded) == 1


def test_graph_modules_without_meta_are_taken():
    graph = torch.fx.symbolic_trace(randomise(nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))))
    del graph.__dict__["meta"]
    assert len(fxfuse.report(fxfuse.fuse(graph)).folded) == 1


def test_assertions_with_messages_fold_in_kept_modules_too():
    class Checked(nn.BatchNorm2d):
        def forward(self, x):
            torch._assert(x.ndim == 4, f"expected 4D input (got {x.ndim}D input)")
            return super().forward(x)

    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv, self.bn = nn.Conv2d(3, 3, 1), Checked(3)

        def forward(self, x):
            y = self.bn(self.conv(x))
            torch._assert(y.ndim == 4, f"expected {y.ndim}")
            return y

    right(randomise(Model()), (X,), keep_modules=True, folded=1)
