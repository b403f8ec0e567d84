"""Values that share memory: what is written to in one place is seen in another."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import fxfuse
from tests.forms import Forward, noise
from tests.support import assert_exact, randomise

X = noise(2, 3, 8, 6)


def assert_never_wrong(run, *inputs, **layers):
    """Folded or not, the result is that of the model; and so are the inputs afterwards."""
    tensors = {name: layers.pop(name) for name in [*layers] if isinstance(layers[name], torch.Tensor)}
    model = randomise(Forward(run, **layers))
    for name, tensor in tensors.items():
        model.register_buffer(name, tensor.clone())
    fused = fxfuse.fuse(model)
    inputs = inputs or (X,)
    with torch.no_grad():
        theirs, ours = [each.clone() for each in inputs], [each.clone() for each in inputs]
        assert_exact(model(*theirs), fused(*ours))
        assert_exact(theirs, ours)
    return fxfuse.report(fused)


def parts():
    return {"a": nn.Conv2d(3, 4, 3), "b": nn.Conv2d(4, 4, 1), "bn": nn.BatchNorm2d(4)}


def frozen(m, x):
    scale = m.bn.weight * (m.bn.running_var + 1e-5).rsqrt()
    scale.clamp_(-0.5, 0.5)
    shift = m.bn.bias - m.bn.running_mean * scale
    return m.a(x) * scale.view(1, -1, 1, 1) + shift.view(1, -1, 1, 1)


def clamped_weight(m, x):
    weight = m.b.weight / 3
    weight.clamp_(min=0.0)
    return m.bn(F.conv2d(m.a(x), weight))


def scaled_by_the_input(m, x):
    weight = m.b.weight * 1
    weight.mul_(x.mean())
    return m.bn(F.conv2d(m.a(x), weight))


def positional(m, x):
    gamma = m.bn.weight * 2
    torch.clamp_(gamma, 0.5)
    return m.a(x) * gamma.view(-1, 1, 1)


@pytest.mark.parametrize("run", [frozen, clamped_weight, scaled_by_the_input, positional])
def test_what_is_computed_from_parameters_and_then_changed_is_no_constant(run):
    assert_never_wrong(run, **parts())


def skip_in_place(m, x):
    h = F.relu(m.a(x))
    skip = h
    h += x.mean()
    y = m.bn(h)
    skip *= x.mean()
    return m.b(y), skip


def result_of_a_method(m, x):
    h = torch.tanh(m.a(x))
    y = m.bn(h.mul_(2))
    return m.b(y), h.relu_()


def result_of_add(m, x):
    h = torch.tanh(m.a(x))
    y = m.bn(h.add_(m.a(x)))
    return m.b(y), h.relu_()


def second_of_several(m, x):
    h = torch.tanh(m.a(x))
    y = m.bn(h)
    view = torch.broadcast_tensors(x[:, :1, 2:, 2:], h)[1]
    return m.b(y), view.mul_(3)


def positional_in_place(m, x):
    h = torch.tanh(m.a(x))
    y = m.bn(h)
    return m.b(y), torch.relu_(h)


def out_of_a_sum(m, x):
    buffer = m.a(x).relu()
    z = torch.add(m.a(x), m.a(x + 1), out=buffer)
    return m.bn(z), buffer


def out_of_a_concat(m, x):
    buffer = m.a(x).relu()
    z = torch.cat((m.a(x),), out=buffer)
    return m.bn(z), buffer


def out_of_a_mean(m, x):
    buffer = m.a(x).mean((2, 3), True)
    z = torch.mean(m.a(x), (2, 3), True, out=buffer)
    return m.bn(z), buffer


def weight_through_another(m, x):
    torch.broadcast_tensors(x[:1, :1, :1, :1], m.b.weight)[1].mul_(0.5)
    return m.bn(m.b(m.a(x)))


LIBRARY = torch.library.Library("fxfuse_tests", "DEF")
LIBRARY.define("act(Tensor(a!) x) -> Tensor(a!)")
LIBRARY.impl("act", lambda x: x.mul_(3), "CPU")


def by_a_custom_operator(m, x):
    h = torch.tanh(m.a(x))
    y = m.bn(h)
    return m.b(y), torch.ops.fxfuse_tests.act(h)


def in_a_tuple(m, x):
    h = torch.tanh(m.a(x))
    parts = h.chunk(2, 1) + (x,)  # noqa: RUF005
    y = m.bn(h)
    return m.b(y), parts[0].mul_(3)


def by_a_number(m, x):
    h = torch.tanh(m.a(x))
    y = m.bn(h)
    return m.b(y), F.relu(h, inplace=1)


def through_another_buffer(m, x):
    h = m.cache.copy_(torch.tanh(m.a(x)))
    y = m.bn(h)
    m.seen.mul_(3)
    return m.b(y)


def test_two_buffers_over_one_storage_are_one():
    model = Forward(through_another_buffer, **parts())
    model.register_buffer("cache", torch.zeros(2, 4, 6, 4, dtype=torch.float64))
    model.register_buffer("seen", model.cache.view(-1))
    model = randomise(model)
    fused = fxfuse.fuse(model)
    with torch.no_grad():
        assert_exact(model(X), fused(X))


RUNS = [
    *(skip_in_place, result_of_a_method, result_of_add, second_of_several, positional_in_place),
    *(out_of_a_sum, out_of_a_concat, out_of_a_mean),
    *(by_a_custom_operator, in_a_tuple, by_a_number),
]


@pytest.mark.parametrize("run", RUNS)
def test_a_write_is_seen_by_all_who_share_the_memory(run):
    assert_never_wrong(run, **parts())


def test_a_weight_that_is_reached_through_another_function_is_no_constant():
    model = randomise(Forward(weight_through_another, **parts()))
    fused = fxfuse.fuse(model)
    assert not fxfuse.report(fused).folded


def write_to_the_input(_module, args):
    args[0].mul_(2)


@pytest.mark.parametrize("hooked", ["a sequence", "an identity"])
def test_a_hooked_module_may_write_to_its_input(hooked):
    def run(m, x):
        h = torch.tanh(m.a(x))
        y = m.bn(h)
        return m.b(y), m.hooked(h)

    layer = nn.Sequential(nn.ReLU(inplace=True)) if hooked == "a sequence" else nn.Identity()
    model = randomise(Forward(run, **parts(), hooked=layer))
    hook = (lambda *_: None) if hooked == "a sequence" else write_to_the_input
    model.hooked.register_forward_pre_hook(hook)
    fused = fxfuse.fuse(model)
    with torch.no_grad():
        assert_exact(model(X), fused(X))


def transposed(m, x):
    return m.b(m.bn(x).transpose_(2, 3)) + x[..., :1, :1]


def with_an_axis(m, x):
    v = x.flatten(1) * torch.sigmoid(x.flatten(1))
    v.unsqueeze_(0)
    return m.linear(m.norm(v))


def test_a_shape_that_is_changed_in_place_is_never_wrong():
    x = noise(2, 4, 5, 5)
    model = randomise(Forward(transposed, b=nn.Conv2d(4, 4, 1), bn=nn.BatchNorm2d(4)))
    fused = fxfuse.fuse(model)
    with torch.no_grad():
        assert_exact(model(x.clone()), fused(x.clone()))
    x = noise(8, 8)
    assert_never_wrong(with_an_axis, x, linear=nn.Linear(8, 5), norm=nn.BatchNorm1d(8))


@pytest.mark.parametrize("keep_modules", [True, False])
def test_part_of_a_split_that_is_written_to_can_be_run_with_gradients(keep_modules):
    def run(m, x):
        a, b = m.conv(x).chunk(2, 1)
        return torch.cat([m.relu(m.one(a)), m.two(b)], 1)

    layers = {"one": nn.BatchNorm2d(3), "two": nn.BatchNorm2d(3), "relu": nn.ReLU(inplace=True)}
    model = randomise(Forward(run, conv=nn.Conv2d(3, 6, 1), **layers))
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    assert_exact(model(X), fused(X))
    assert len(fxfuse.report(fused).folded) == 1


@pytest.mark.parametrize(
    "bounds",
    [
        lambda h, m: torch.clamp(h, min=m.floor),
        lambda h, m: h.clamp(max=m.floor),
        lambda h, m: h.clamp(0.1, 0.5),
    ],
)
def test_clamping_to_a_tensor_broadcasts(bounds):
    def run(m, x):
        return m.linear(m.norm(bounds(x.flatten(1), m)))

    layers = {"linear": nn.Linear(8, 5), "norm": nn.BatchNorm1d(8)}
    assert_never_wrong(run, noise(8, 8), **layers, floor=noise(1, 8, 1))


def indices(m, x):
    return torch.ops.aten.adaptive_max_pool2d.default(m.a(x), [2, 2])[1] * 0.5


def tuple_of_a_pooling(m, x):
    return m.linear(m.norm(torch.tanh(torch.adaptive_max_pool1d(m.conv(x), 4)[0])))


def test_operators_that_give_several_values_are_no_pooling():
    layers = {"conv": nn.Conv1d(3, 4, 1), "linear": nn.Linear(4, 3), "norm": nn.BatchNorm1d(4)}
    assert_never_wrong(tuple_of_a_pooling, noise(2, 3, 6), **layers)
    model = randomise(Forward(indices, a=nn.Conv2d(3, 4, 3)))
    assert_exact(model(X), fxfuse.fuse(model)(X))


def test_a_value_of_which_only_the_shape_is_read_gives_nothing_on():
    def run(m, x):
        return m.b(torch.ops.aten.reshape_as.default(torch.tanh(m.a(x)), m.bn(m.a(x))))

    assert_never_wrong(run, **parts())


@pytest.mark.parametrize(
    "run",
    [
        lambda m, x: m.bn(m.a(x)).mean((0, 1, 2, 3)) * m.one,
        lambda m, x: m.bn(m.a(x))[0, 0, 0, 0] + m.one,
        *(
            lambda m, x: m.bn(m.a(x)).mean((0, 1, 2, 3)).flatten(),
            lambda m, x: m.bn(m.a(x)).sum((0, 1, 2, 3)).view(1),
        ),
        lambda m, x: m.bn(m.a(x)).mean((0, 1, 2, 3)).squeeze(0),
        lambda m, x: m.bn(m.a(x)).mean((0, 1, 2, 3)).transpose(0, -1),
        lambda m, x: m.bn(m.a(x)).mean((0, 1, 2, 3)).unsqueeze(0).flatten(),
    ],
)
def test_values_without_axes_are_exact(run):
    assert_never_wrong(run, **parts(), one=torch.ones(1, dtype=torch.float64) * 1.5)
