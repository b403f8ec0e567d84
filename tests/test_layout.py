"""A norm gives a value in the order of its axes; what comes after it may rely on that."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from fxfuse import aliases
from fxfuse.tree import storage
from tests.forms import noise
from tests.support import assert_exact, randomise


class Transposed(nn.Module):
    """A norm of channels that a linear layer gives last."""

    def __init__(self):
        super().__init__()
        self.linear, self.bn, self.relu = nn.Linear(4, 6), nn.BatchNorm2d(6), nn.ReLU(inplace=True)

    def forward(self, x):
        return self.after(self.bn(self.linear(x).permute(0, 3, 2, 1)))


def transposed(after):
    return randomise(type("Transposed", (Transposed,), {"after": after})())


def view(_self, y):
    return y.view(y.shape[0], -1)


def view_behind_an_activation(_self, y):
    return F.relu(y).view(y.shape[0], y.shape[1] * y.shape[2] * y.shape[3])


def view_as(_self, y):
    return y.view_as(torch.ones(2, 6, 15))


def view_by_name(_self, y):
    return y.view(size=(2, 90))


def view_that_is_written_to(self, y):
    return self.relu(y.view(y.shape[0], -1)) + y.flatten(1)


def contiguous(_self, y):
    return y.contiguous().view(y.shape[0], -1)


def reshape(_self, y):
    return y.reshape(y.shape[0], -1)


X = noise(2, 5, 3, 4)


@pytest.mark.parametrize("after", [view, view_behind_an_activation, view_as, view_by_name])
def test_a_view_becomes_a_reshape_in_a_graph_and_keeps_the_norm_in_a_module(after):
    model = transposed(after)
    fused = fxfuse.fuse(model)
    assert not fxfuse.report(fused).refused
    assert "reshape" in fused.code
    assert_exact(model(X), fused(X))
    kept = fxfuse.fuse(model, keep_modules=True)
    assert [left.code for left in fxfuse.report(kept).refused] == ["FXF109"]
    assert_exact(model(X), kept(X))


@pytest.mark.parametrize("after", [contiguous, reshape])
@pytest.mark.parametrize("keep_modules", [True, False])
def test_other_readers_do_not_mind(after, keep_modules):
    model = transposed(after)
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    assert not fxfuse.report(fused).refused
    assert_exact(model(X), fused(X))


def test_a_view_that_somebody_writes_to_keeps_the_norm():
    model = transposed(view_that_is_written_to)
    fused = fxfuse.fuse(model)
    assert [left.code for left in fxfuse.report(fused).refused] == ["FXF109"]
    assert_exact(model(X), fused(X))


def test_a_view_after_an_operator_and_its_norm_stays_a_view():
    model = randomise(Flat())
    fused = fxfuse.fuse(model)
    assert not fxfuse.report(fused).refused
    assert "reshape" not in fused.code
    assert_exact(model(noise(2, 3, 4, 4)), fused(noise(2, 3, 4, 4)))


class Flat(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(4)

    def forward(self, x):
        return self.bn(self.conv(x)).view(x.shape[0], -1)


class Opaque(nn.Module):
    """Cannot be traced, and demands a layout."""

    def forward(self, y):
        return y.view(y.shape[0], -1) if y.sum() < 1e9 else y


def opaque(self, y):
    return self.opaque_part(y)


def test_code_that_is_not_traced_may_mind():
    model = transposed(opaque)
    model.opaque_part = Opaque()
    for keep_modules in (True, False):
        fused = fxfuse.fuse(model, keep_modules=keep_modules)
        assert [left.code for left in fxfuse.report(fused).refused] == ["FXF109"]
        assert_exact(model(X), fused(X))


class Sliced(nn.Module):
    """Some channels of what a convolution gives, normalised, and read in a way that minds the layout."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(3, 4, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        return self.after(self.bn(self.conv(x)[:, :2]))


class Cropped(Sliced):
    """Some pixels of what a convolution gives."""

    def forward(self, x):
        return self.after(self.bn(self.conv(x)[:, :2, ::2, 1:]))


READS = {
    "view of one size": lambda _, y: y.view(-1),
    "view of a shape": lambda _, y: y.view((y + 1).shape),
    "unsafe view": lambda _, y: torch.ops.aten._unsafe_view.default(y, [-1]),
    "aten view": lambda _, y: torch.ops.aten.view.default(y, [-1]),
    "aten view_as": lambda _, y: torch.ops.aten.view_as.default(y, (y + 1).flatten(1)),
    "as strided": lambda _, y: torch.as_strided(y, (2, 4), (8, 1)),
    "complex": lambda _, y: torch.view_as_complex(y[..., :2]).abs(),
    "bits": lambda _, y: y.view(torch.int64),
    "stride": lambda _, y: y * float(y.stride()[0]),
}


@pytest.mark.parametrize("after", READS.values(), ids=READS.keys())
@pytest.mark.parametrize("keep_modules", [True, False])
@pytest.mark.parametrize("base", [Sliced, Cropped])
def test_whoever_minds_the_layout_gets_what_it_expects(base, keep_modules, after):
    model = randomise(type("Model", (base,), {"after": after})())
    x = noise(2, 3, 4, 4) if base is Sliced else noise(2, 3, 8, 5)
    assert_exact(model(x), fxfuse.fuse(model, keep_modules=keep_modules)(x))


@pytest.mark.parametrize("keep_modules", [True, False])
def test_an_instance_norm_gives_no_channels_last_memory(keep_modules):
    class Normed(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv = nn.Conv2d(3, 4, 3)
            self.norm = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)

        def forward(self, x):
            return self.norm(self.conv(x)).view(x.shape[0], -1)

    model = randomise(Normed())
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    x = noise(2, 3, 6, 6)
    for each in (x, x.to(memory_format=torch.channels_last)):
        assert_exact(model(each), fused(each))


def test_a_hook_may_put_a_value_into_another_order():
    class Hooked(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.q = nn.Conv2d(3, 4, 1), nn.Sequential(nn.ReLU())
            self.bn, self.b = nn.BatchNorm2d(4), nn.Conv1d(4, 3, 1)

        def forward(self, x):
            y = self.bn(self.q(self.a(x)))
            return self.b(y.view(y.shape[0], y.shape[1], -1))

    model = randomise(Hooked())
    model.q.register_forward_hook(lambda _module, _args, output: output.transpose(2, 3))
    x = noise(2, 3, 4, 5)
    assert_exact(model(x), fxfuse.fuse(model)(x))


def flattened(self, y):
    return y, self.relu(y.flatten(1))


def reshaped(self, y):
    return y, self.relu(y.reshape(y.shape[0], -1))


def copied_back(_self, y):
    z = y.permute(0, 3, 2, 1).contiguous()
    return y, z.relu_()


def by_a_layer(self, y):
    return y, self.relu(nn.Flatten()(y))


@pytest.mark.parametrize("after", [flattened, reshaped, copied_back, by_a_layer])
@pytest.mark.parametrize("keep_modules", [True, False])
def test_what_may_be_a_view_or_a_copy_is_the_same_for_who_writes_to_it(keep_modules, after):
    model = transposed(after)
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    with torch.no_grad():
        assert_exact(model(X), fused(X))


class Instances(nn.Module):
    """Instance norms between convolutions, which hand channels-last memory on."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3)
        self.i = nn.InstanceNorm2d(4, affine=True, track_running_stats=True)
        self.bn = nn.BatchNorm2d(4)

    def forward(self, x):
        return self.after(x, torch.relu(self.i(self.a(x))))


@pytest.mark.parametrize(
    "after",
    [
        lambda self, x, y: self.b(y).view(x.shape[0], -1),
        lambda self, x, y: self.bn(y).view(x.shape[0], -1),
        lambda _, x, y: torch.cat([y, y], 1).view(x.shape[0], -1),
        lambda _, x, y: torch.ones_like(y).view(x.shape[0], -1) * y.flatten(1),
    ],
)
@pytest.mark.parametrize("keep_modules", [True, False])
def test_a_layout_goes_on_through_operators_that_hand_it_on(keep_modules, after):
    model = randomise(type("Model", (Instances,), {"after": after})())
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    x = noise(2, 3, 8, 8)
    for each in (x, x.to(memory_format=torch.channels_last)):
        assert_exact(model(each), fused(each))


@pytest.mark.parametrize("dims", [1, 2, 3])
def test_poolings_and_reductions_give_new_memory_even_where_they_change_nothing(dims):
    x, axes = torch.randn(1, 2, *[1] * dims), [*range(2, 2 + dims)]
    poolings = {f"{kind}_pool{dims}d" for kind in ("adaptive_avg", "adaptive_max", "avg", "max")}
    reductions = {"mean", "sum", "amax", "amin"}
    assert poolings | reductions <= aliases.FRESH
    results = [getattr(F, name)(x, 1) for name in poolings]
    results += [getattr(x, name)(axes, keepdim=True) for name in reductions]
    for result in results:
        assert torch.equal(result, x) and storage(result) != storage(x)
