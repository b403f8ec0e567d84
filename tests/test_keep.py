"""Modules that are kept, and models that cannot be traced whole: right however they are called."""

from __future__ import annotations

import copy
import pickle

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn

import fxfuse
from tests.forms import noise
from tests.support import assert_exact, assert_untouched, randomise, snapshot

X = noise(2, 3, 6, 6)


class Block(nn.Module):
    def __init__(self, channels=3):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(channels, channels, 3, padding=1, bias=False), nn.BatchNorm2d(channels)
        self.stride = 1

    def forward(self, x):
        return F.relu(self.bn(self.conv(x)))


class NormAct(nn.BatchNorm2d):
    """As timm's: the activation is in the norm's own forward."""

    def __init__(self, channels):
        super().__init__(channels)
        self.act = nn.ReLU()

    def forward(self, x):
        torch._assert(x.ndim == 4, "expected 4 axes")
        statistics = (self.running_mean, self.running_var, self.weight, self.bias)
        return self.act(F.batch_norm(x, *statistics, training=False, eps=self.eps))


class SameConv(nn.Conv2d):
    """A convolution with a forward of its own."""

    def forward(self, x):
        return F.conv2d(F.pad(x, (1, 1, 1, 1)), self.weight, self.bias)


class Model(nn.Module):
    """The blocks and a forward given as a function."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.__class__ = type("Model", (Model,), {"forward": forward})


def blocks(count=2):
    return {f"block{number}": Block() for number in range(count)}


def kept(model, *calls, folded, refused=(), keep_modules=True):
    """Folds `model` with its modules kept, and compares every call of `calls` (tuples of args and kwargs)."""
    model = randomise(model)
    before = snapshot(model)
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    assert_untouched(before, model)
    report = fxfuse.report(fused)
    assert type(fused) is type(model)
    assert (len(report.folded), sorted(left.code for left in report.refused)) == (folded, sorted(refused)), (
        report
    )
    for args, options in calls:
        with torch.no_grad():
            expected = model(*copy.deepcopy(args), **options)
            assert_exact(expected, fused(*copy.deepcopy(args), **options))
    again = fxfuse.fuse(fused, keep_modules=keep_modules)
    assert not fxfuse.report(again).folded
    return fused


def norms(model):
    return [module for module in model.modules() if isinstance(module, nn.modules.batchnorm._BatchNorm)]


def test_class_attributes_and_names_are_kept_and_norms_become_identities():
    fused = kept(nn.Sequential(Block(), Block()), ((X,), {}), folded=2)
    assert [type(module) for module in fused] == [Block, Block]
    assert type(fused[0].bn) is nn.Identity and type(fused[1].conv) is nn.Conv2d
    assert fused[1].stride == 1 and "1.conv.bias" in fused.state_dict()
    assert not norms(fused)
    assert_exact(fused(X), pickle.loads(pickle.dumps(copy.deepcopy(fused)))(X))


@pytest.mark.parametrize("conv", [nn.Conv2d(3, 4, 3, padding=1), SameConv(3, 4, 3, bias=False)])
@pytest.mark.parametrize("norm", [nn.BatchNorm2d(4), NormAct(4)])
def test_norms_and_convs_with_a_forward_of_their_own_keep_the_rest_of_it(conv, norm):
    model = nn.Sequential(copy.deepcopy(conv), copy.deepcopy(norm))
    fused = kept(model, ((X,), {}), folded=1)
    assert type(fused[0]) is type(conv) and not norms(fused)
    assert isinstance(getattr(fused[1], "act", nn.ReLU()), nn.ReLU)


def test_a_norm_is_folded_forward_in_place_too():
    def forward(self, x):
        return self.conv(self.bn(F.relu(x)))

    kept(Model(forward, bn=nn.BatchNorm2d(3), conv=nn.Conv2d(3, 4, 1)), ((X,), {}), folded=1)


@pytest.mark.parametrize(
    ("forward", "code"),
    [
        (lambda m, x: m.bn(m.conv(x)) + m.conv(x), "FXF501"),
        (lambda m, x: m.bn(m.conv(m.bn(m.conv(x)))), "FXF501"),
        (lambda m, x: m.bn(m.conv(x)) * m.conv.weight.sum(), "FXF501"),
        (lambda m, x: m.bn(m.conv(x)) * m.bn.running_var.sum(), "FXF501"),
        (lambda m, x: m.bn(F.conv2d(x, m.conv.weight, m.conv.bias)), "FXF502"),
        (lambda m, x: F.batch_norm(m.conv(x), m.bn.running_mean, m.bn.running_var), "FXF502"),
        (lambda m, x: m.bn(m.conv(x)) * m.bn.num_features, "FXF502"),
    ],
)
def test_what_is_used_elsewhere_or_is_no_module_stays_with_modules_kept(forward, code):
    model = Model(forward, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    count = fxfuse.explain(randomise(model), keep_modules=True).norms
    assert count
    kept(model, ((X,), {}), folded=0, refused=[code] * count)


def optional(self, x, mask=None, double=False):
    y = self.block0(x)
    if mask is not None:
        y = y * mask
    y = self.conv(y)
    return self.bn(y) * 2 if double else self.bn(y)


def skipping(self, x, mask=None, double=False):  # noqa: ARG001
    y = self.conv(self.block0(x))
    return y if double else self.bn(y)


CALLS = [((X,), {}), ((X, noise(2, 3, 6, 6, seed=4)), {}), ((X,), {"double": True}), ((X, X, True), {})]


@pytest.mark.parametrize("keep_modules", [True, False])
@pytest.mark.parametrize(("forward", "folded", "refused"), [(optional, 2, ()), (skipping, 1, ["FXF503"])])
def test_folds_hold_for_every_choice_of_options(forward, folded, refused, keep_modules):
    parts = {"block0": Block(), "conv": nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3)}
    kept(Model(forward, **parts), *CALLS, folded=folded, refused=refused, keep_modules=keep_modules)


def by_value(self, x):
    if x.sum() > 0:
        return self.block0(x)
    return self.block1(x) * 2


def by_size(self, x):
    y = self.block0(x)
    for _ in range(x.shape[-1] // 4):
        y = self.block1(y)
    return y


def own_norm(self, x):
    y = self.bn(self.conv(x))
    return self.block0(y) if x.shape[0] > 1 else y


@pytest.mark.parametrize("keep_modules", [True, False])
@pytest.mark.parametrize(
    ("forward", "folded", "refused"),
    [(by_value, 2, ()), (by_size, 2, ()), (own_norm, 2, ["FXF209"])],
)
@pytest.mark.parametrize("inside", [True, False])
def test_control_flow_stays_and_what_it_only_calls_is_folded(forward, folded, refused, inside, keep_modules):
    own = {"conv": nn.Conv2d(3, 3, 1), "bn": nn.BatchNorm2d(3)} if forward is own_norm else {}
    model = Model(forward, **blocks(2 - bool(own)), **own)
    calls = [((X,), {}), ((-X.abs(),), {}), ((noise(1, 3, 9, 9),), {}), ((noise(5, 3, 4, 4),), {})]
    if own and not inside:
        folded -= 1
    if not inside:
        kept(model, *calls, folded=folded, refused=refused, keep_modules=keep_modules)
        return
    around = nn.Sequential(Block(), model, nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3))
    folded = folded + 2 - bool(own)
    model = randomise(around)
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    report = fxfuse.report(fused)
    assert (len(report.folded), [left.code for left in report.refused]) == (folded, list(refused)), report
    assert isinstance(fused, nn.Sequential if keep_modules else fx.GraphModule)
    for args, _ in calls:
        assert_exact(model(*args), fused(*args))


def reads_a_weight(self, x):
    return self.block0(x) * self.block0.conv.weight.sum() if x.sum() > 0 else self.block1(x)


def calls_a_part(self, x):
    return self.block0.conv(x) if x.sum() > 0 else self.block0(x) + self.block1(x)


def walks_through_children(self, x):
    return sum(block.bn(x) for block in self.children()) if x.sum() > 0 else self.block0(x) - self.block1(x)


def asks_for_its_class(self, x):
    return self.block0(x) if x.sum() > 0 and type(self.block0) is Block else self.block1(x)


@pytest.mark.parametrize(
    ("forward", "folded"),
    [(reads_a_weight, 1), (calls_a_part, 1), (walks_through_children, 0), (asks_for_its_class, 2)],
)
def test_what_untraced_code_reaches_into_stays(forward, folded):
    model = Model(forward, **blocks())
    kept(model, ((X.abs(),), {}), ((-X.abs(),), {}), folded=folded, refused=["FXF210"] * (2 - folded))


def test_a_sequence_that_untraced_code_walks_through_stays():
    def forward(self, x):
        outputs = [x * 0]
        for layer in self.layers:
            x = layer(x)
            if x.mean() > 0:
                outputs.append(x)
        return sum(output.sum() for output in outputs)

    layers = nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3), nn.ReLU(), Block())
    kept(Model(forward, layers=layers), ((X,), {}), ((-X,), {}), folded=1, refused=["FXF209"])


def test_a_block_that_is_called_with_no_tensor_is_not_taken_for_one_that_is():
    class Either(Block):
        def forward(self, x):
            return self.conv(X) if x is None else self.bn(self.conv(x))

    def forward(self, x):
        return self.inner(None) if x.sum() > 0 else self.inner(x)

    kept(Model(forward, inner=Either()), ((X.abs(),), {}), ((-X.abs(),), {}), folded=0, refused=["FXF503"])


def test_a_block_under_two_parents_is_folded_once_and_a_conv_under_two_is_left():
    def forward(self, x):
        return self.block0(x) if x.sum() > 0 else self.block1(x)

    shared = Block()
    model = Model(forward, block0=shared, block1=shared)
    kept(model, ((X.abs(),), {}), ((-X.abs(),), {}), folded=1)
    parts = blocks()
    parts["block1"].conv = parts["block0"].conv
    kept(Model(forward, **parts), ((X.abs(),), {}), ((-X.abs(),), {}), folded=0, refused=["FXF501"] * 2)


def test_hooks_elsewhere_go_on_running_and_hooked_modules_are_left():
    model = randomise(nn.Sequential(Block(), nn.ReLU(), Block()))
    seen = []
    model[1].register_forward_hook(lambda *_: seen.append(1))
    model[2].register_forward_hook(lambda _module, _args, output: output * 2)
    fused = fxfuse.fuse(model, keep_modules=True)
    report = fxfuse.report(fused)
    assert (len(report.folded), [left.code for left in report.refused]) == (1, ["FXF208"])
    assert_exact(model(X), fused(X))
    assert len(seen) == 2


def test_a_list_beside_the_modules_holds_the_identity_too():
    def forward(self, x):
        for layer in self.plain:
            x = layer(x)
        return x

    model = Model(forward, conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3))
    model.plain = [model.conv, model.bn]
    fused = kept(model, ((X,), {}), folded=1)
    assert type(fused.plain[1]) is nn.Identity


@pytest.mark.parametrize(
    "reparametrize", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm, nn.utils.spectral_norm]
)
@pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning")
def test_computed_weights_are_folded_in_place(reparametrize):
    model = nn.Sequential(reparametrize(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4))
    fused = kept(model, ((X,), {}), folded=1)
    assert not fused[0]._forward_pre_hooks


def test_a_graph_module_may_be_kept_as_well():
    model = fx.symbolic_trace(randomise(nn.Sequential(Block(), Block())))
    fused = fxfuse.fuse(model, keep_modules=True)
    assert len(fxfuse.report(fused).folded) == 2 and not norms(fused)
    assert_exact(model(X), fused(X))


def test_the_result_is_verified_on_example_inputs():
    model = randomise(Model(optional, block0=Block(), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3)))
    report = fxfuse.report(fxfuse.fuse(model, example_inputs=(X,)))
    assert report.verification.ok and report.verification.conclusive
    assert "options (mask, double)" in report.notes[0]


class KeepsState(Block):
    def __init__(self):
        super().__init__()
        self.calls, self.log = 0, []


def counts(self, x):
    self.calls = self.calls + 1
    return Block.forward(self, x) * self.calls


def appends(self, x):
    self.log.append(None)
    return Block.forward(self, x) * len(self.log)


def swallows(self, x):
    try:
        factor = 2.0 if x.sum() > 0 else 3.0
    except Exception:
        factor = 1.0
    return Block.forward(self, x) * factor


@pytest.mark.parametrize("forward", [counts, appends, swallows])
@pytest.mark.parametrize("inside", [True, False])
def test_state_that_forward_keeps_and_errors_that_it_catches_are_not_fixed_by_a_trace(forward, inside):
    block = KeepsState()
    block.__class__ = type("KeepsState", (KeepsState,), {"forward": forward})
    model = randomise(nn.Sequential(Block(), block) if inside else block)
    fused = fxfuse.fuse(model)
    for x in (X, X, -X):
        with torch.no_grad():
            assert_exact(model(x), fused(x))


class Sum(nn.Module):
    """A sum of which the second part may be missing, without a default that would say so."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)

    def forward(self, x, other):
        if other is None:
            return self.bn(self.conv(x))
        return self.bn(self.conv(x + other))


def add_below(self, x, other):
    return self.block0(self.sum(x, other))


@pytest.mark.parametrize("keep_modules", [True, False])
def test_an_argument_that_is_compared_with_none_is_an_option(keep_modules):
    calls = [((X, X), {}), ((X, None), {}), ((X,), {"other": None})]
    kept(Sum(), *calls, folded=1, keep_modules=keep_modules)
    # Further below it is not known what it gets, but what is called besides can be folded.
    model = Model(add_below, sum=Sum(), **blocks(1))
    kept(model, *calls, folded=2, keep_modules=keep_modules)


def passes_an_option_on(self, x, r=None):
    return self.inner(x, r)


class ReluFirst(Block):
    def forward(self, x, r=False):
        y = self.conv(x)
        return self.bn(F.relu(y) if r else y)


@pytest.mark.parametrize("keep_modules", [True, False])
def test_an_option_that_is_passed_on_is_one_below_too(keep_modules):
    model = Model(passes_an_option_on, inner=ReluFirst())
    calls = [((X,), {}), ((X,), {"r": True}), ((X, False), {})]
    kept(model, *calls, folded=0, refused=["FXF503"], keep_modules=keep_modules)


@pytest.mark.parametrize(
    "question",
    [
        lambda self: 2.0 if isinstance(self.bn, nn.BatchNorm2d) else 3.0,
        lambda self: 2.0 if self.conv.bias is None else 3.0,
        lambda self: sum(parameter.numel() for parameter in self.parameters()),
        lambda self: 1.0 + len(list(self.bn.buffers())),
        lambda self: sum(parameter.sum() for parameter in self.conv.parameters()),
        lambda self: next(self.conv.parameters()).abs().max(),
        lambda self: len(self.state_dict()),
    ],
)
def test_a_forward_that_asks_about_its_modules_gets_the_same_answer(question):
    def forward(self, x):
        return self.bn(self.conv(x)) * self.question()

    model = Model(forward, conv=nn.Conv2d(3, 3, 1, bias=False), bn=nn.BatchNorm2d(3))
    type(model).question = question
    randomise(model)
    fused = fxfuse.fuse(model, keep_modules=True)
    assert [left.code for left in fxfuse.report(fused).refused] in (["FXF502"], ["FXF210"], ["FXF504"])
    assert_exact(model(X), fused(X))


class Holder(nn.Module):
    """Holds a module that is not its own, and cannot be traced."""

    def __init__(self, held, writes=False):
        super().__init__()
        self.held, self.writes = [held], writes

    def forward(self, x):
        if x.sum() > 1e9:
            return x
        if self.writes:
            self.held[0].weight.data.mul_(1.0)
            return x
        return self.held[0](x)


@pytest.mark.parametrize("keep_modules", [True, False])
@pytest.mark.parametrize("writes", [True, False])
@pytest.mark.parametrize("part", ["conv", "bn"])
def test_what_an_untraced_module_holds_of_the_others_stays(part, writes, keep_modules):
    model = Model(
        lambda self, x: self.holder(self.bn(self.conv(x))), conv=nn.Conv2d(3, 3, 1), bn=nn.BatchNorm2d(3)
    )
    model.holder = Holder(getattr(model, part), writes)
    randomise(model)
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    assert [left.code for left in fxfuse.report(fused).refused] == ["FXF206"]
    assert_exact(model(X), fused(X))


def hook_that_looks(module, _args, output):
    return output + module.conv.weight.sum()


def hook_that_computes(_module, _args, output):
    return output * 2


@pytest.mark.parametrize("keep_modules", [True, False])
def test_a_hook_of_the_model_that_looks_at_the_model_leaves_it_as_it_is(keep_modules):
    calls = ((X,), {})
    model = Block()
    model.register_forward_hook(hook_that_computes)
    randomise(model)
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    assert len(fxfuse.report(fused).folded) == 1
    assert_exact(model(X), fused(X))
    model = Block()
    model.register_forward_hook(hook_that_looks)
    kept(model, calls, folded=0, refused=["FXF210"], keep_modules=keep_modules)
    other = randomise(Block())
    model = Block()
    model.register_forward_hook(lambda _module, _args, output: other(output))
    kept(model, calls, folded=0, refused=["FXF210"], keep_modules=keep_modules)
