"""A graph for one kind of inputs: what is gone from it, and what it cannot hold."""

from __future__ import annotations

import contextlib
import copy
from collections import Counter
from dataclasses import dataclass
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils.rnn import pack_padded_sequence

import fxfuse
from fxfuse.lowering import specialise as specialising
from fxfuse.lowering.specialise import specialise
from tests.lowering import ENGINES, Net, WithSecond, Written, X, folded, near, needs_bfloat16
from tests.support import randomise

pytestmark = pytest.mark.filterwarnings("ignore")  # of the engines; their numbers are what is looked at


@pytest.fixture
def whole_modules(monkeypatch):
    """Has a trace call the modules in a `Written` as they are."""
    monkeypatch.setattr(fx.Tracer, "is_leaf_module", lambda self, module, _: not isinstance(module, Written))


def test_what_gives_what_it_is_given_is_gone():
    modules = {"dropout": nn.Dropout(), "same": nn.Identity(), "act": nn.ReLU(inplace=True)}
    model = folded(
        Written(lambda m, y: m.act(m.same(m.dropout(F.dropout2d(y, training=False)))).clone(), **modules)
    )
    graph = specialise(model, (X,))
    assert [str(node.target) for node in graph.module.graph.nodes if node.op.startswith("call")] == [
        "conv",
        "act",
        "clone",
    ]
    assert torch.equal(graph.run(lambda tensors: graph.module(*tensors), [X]), model(X))


def test_sizes_constants_assertions_and_containers_are_gone():
    def function(m, y):
        assert_(y.shape[1] == 8, "channels")
        batch, channels, height, width = y.shape
        y = y.view(batch, 2, channels // 2, height, width).transpose(1, 2).reshape(batch, -1, height, width)
        first, second = y.chunk(2, 1)
        table = m.table.softmax(0)[torch.arange(4)].sum()
        return first * table + second

    model = folded(Written(function, table=nn.Parameter(torch.randn(4, 3))))
    graph = specialise(model, (X,))
    names = Counter(str(getattr(node.target, "__name__", node.target)) for node in graph.module.graph.nodes)
    assert not {"getattr", "size", "floordiv", "_assert", "softmax", "arange", "eq", "sum"} & set(names), (
        names
    )
    assert names.total() < len(model.graph.nodes) - 8
    with torch.no_grad():
        assert torch.equal(graph.result(graph.module(X)), model(X))


def assert_(condition, message):
    torch._assert(condition, message)


fx.wrap("assert_")

torch.library.define("fxfuse_tests::positive", "(Tensor x) -> Tensor")


@torch.library.impl("fxfuse_tests::positive", "CPU")
def positive(x):
    return x[x > 0].clone()


UNSUPPORTED = {
    "an operator of another library": (
        lambda m, y: y.relu() / torch.ops.fxfuse_tests.positive(y).shape[0],
        "sizes of fxfuse_tests::positive may depend on numbers",
    ),
    "numbers": (lambda m, y: y * y.amax().item(), "reads numbers"),
    "numbers through numpy": (lambda m, y: by_numpy(y), "reads numbers"),
    "numbers in a list": (lambda m, y: by_list(y), "reads numbers"),
    "numbers one by one": (lambda m, y: by_element(y), "reads numbers"),
    "a mask": (lambda m, y: y[y > 0].sum(), "reads numbers"),
    "random numbers": (lambda m, y: F.dropout(y, 0.5, training=True), "random numbers"),
    "input is written to": (lambda m, y, z: (z.add_(y), z.relu())[1], "forward writes to its inputs"),
    "state is written to": (lambda m, y: y * m.count.copy_(y.mean()), "may write to what the module holds"),
    "constant is written to": (
        lambda m, y: (m.count + 1).add_(y.sum()),
        "may write to what the module holds",
    ),
}


@fx.wrap
def by_numpy(y):
    return y * float(y.detach().numpy().max())


@fx.wrap
def by_list(y):
    return y * max(y.flatten().tolist())


@fx.wrap
def by_element(y):
    found = []
    y.detach().clone().apply_(lambda each: (found.append(each), each)[1])
    return y * max(found)


@pytest.mark.parametrize("way", UNSUPPORTED)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_no_program_can_hold_runs_as_it_was_folded(way, engine):
    function, reason = UNSUPPORTED[way]
    has_second = way == "input is written to"
    model = randomise((WithSecond if has_second else Written)(function)).float()
    model.register_buffer("count", torch.zeros(()))
    graph = fx.GraphModule(model, fx.Tracer().trace(model))
    inputs = (X, torch.randn(2, 8, 12, 12)) if has_second else (X,)
    lowered = fxfuse.lower(graph, inputs, engine)
    assert reason in lowered.lowering.reason, lowered.lowering
    twin = copy.deepcopy(graph)
    torch.manual_seed(0)
    result = lowered(*copy.deepcopy(inputs))
    torch.manual_seed(0)
    assert torch.equal(result, twin(*copy.deepcopy(inputs)))


def padding(m, z):
    return m.rows.index_select(0, z.reshape(1)).expand(2, 8)


NUMBERS = {
    "padding": lambda m, y, z: F.pad(y, (1, 1), value=z),
    "roll": lambda m, y, z: y.roll(z, 2),
    "part": lambda m, y, z: y[:, :z],
    "mask": lambda m, y, z: m.coder(y.flatten(2), src_key_padding_mask=padding(m, z)),
    "masked mean": lambda m, y, z: y.relu()[y > z].sum() / y[y > z].shape[0],
    "where": lambda m, y, z: y.relu() * torch.where(y > z)[0].size(0),
    "chosen": lambda m, y, z: y.relu()[y > 0].sum() * z,
}


@pytest.mark.parametrize("way", NUMBERS)
@pytest.mark.parametrize("engine", ENGINES)
def test_numbers_of_tensors_are_not_fixed(way, engine):
    model = randomise(WithSecond(NUMBERS[way])).float()
    model.coder = nn.TransformerEncoder(nn.TransformerEncoderLayer(144, 2, 16, batch_first=True), 1).eval()
    model.register_buffer("rows", torch.arange(8) > torch.tensor([[9], [5], [3], [4]]))
    graph = fx.GraphModule(model, fx.Tracer().trace(model))
    lowered = fxfuse.lower(graph, (X, torch.tensor(1)), engine)
    reason = lowered.lowering.reason
    assert any(word in reason for word in ("numbers", "integers", "padding")), lowered.lowering
    with torch.no_grad():
        for number in (1, 2, 3):
            torch.testing.assert_close(lowered(X, torch.tensor(number)), graph(X, torch.tensor(number)))


@pytest.mark.parametrize("training", [False, True])
def test_nothing_of_the_module_is_written_to(training):
    """Neither a counter, nor statistics of a norm, whose kernel counts no version."""

    def function(m, y):
        if training:
            return F.batch_norm(y, m.mean, m.count8, training=True)
        return y * m.count8.add_(y.abs().mean()).sum()

    model = randomise(Written(function)).float()
    model.register_buffer("mean", torch.zeros(8))
    model.register_buffer("count8", torch.ones(8))
    graph = fx.GraphModule(model, fx.Tracer().trace(model))
    for way in (graph, copy.deepcopy(graph)):
        before = {name: tensor.clone() for name, tensor in way.state_dict().items()}
        lowered = fxfuse.lower(way, (X,))
        assert "write" in lowered.lowering.reason
        assert all(torch.equal(before[name], tensor) for name, tensor in way.state_dict().items())
    twin = copy.deepcopy(graph)
    for _ in range(2):
        assert torch.equal(lowered(X), twin(X))


@fx.wrap
def longest(lengths, limit):
    return min(limit, max(lengths.tolist()))


def test_numbers_that_are_a_limit_of_the_example_are_not_fixed():
    def function(_, y, z):
        return y[..., : longest(z, y.size(3))].relu().sum(-1)

    lowered = fxfuse.lower(folded(WithSecond(function)), (X, torch.tensor([12, 20])))
    assert "reads numbers" in lowered.lowering.reason


@needs_bfloat16
def test_a_conversion_that_does_nothing_stays_for_another_dtype():
    def function(_, y):
        return (y[:, :2].float().sigmoid() * 8 + 600) * 8

    lowered = fxfuse.lower(folded(Written(function)), (X,), dtype=torch.bfloat16)
    assert not lowered.lowering.reason
    with torch.no_grad():
        assert float((lowered(X) - lowered.folded(X)).abs().max()) < 1


@fx.wrap
def with_size(y):
    y = y * 2
    return y, y.shape[1]


def in_steps(m, y):
    constant = m.scale * 2
    constant[:4].fill_(2.0)
    return y * constant


# What has nothing to do with numbers of the inputs, though it might.
STATIC = {
    "elements by their places": lambda m, y: y[:, torch.tensor([3, 1, 1])].relu(),
    "a constant that is made in steps": lambda m, y: in_steps(m, y).relu(),
    "a size from a function that is not traced": lambda m, y: (r := with_size(y))[0].relu() + r[1],
    "a size that is multiplied": lambda m, y: y.relu() * with_size(y)[1] ** -0.5,
}


@pytest.mark.parametrize("way", STATIC)
@pytest.mark.parametrize("engine", ENGINES)
def test_what_only_looks_as_if_it_read_numbers(way, engine):
    model = randomise(Written(STATIC[way])).float()
    model.scale = nn.Parameter(torch.randn(8, 1, 1))
    lowered = fxfuse.lower(fxfuse.fuse(model), (X,), engine)
    assert not lowered.lowering.reason
    near(lowered, X)


@fx.wrap
def through_numpy(y, weight):
    weight.numpy()[...] *= 0.5
    return y * weight


def test_weights_are_not_given_to_what_is_not_traced():
    model = randomise(Written(lambda m, y: through_numpy(y, m.scale).relu())).float()
    model.scale = nn.Parameter(torch.randn(8, 1, 1), requires_grad=False)
    graph = fx.GraphModule(model, fx.Tracer().trace(model))
    before = model.scale.clone()
    lowered = fxfuse.lower(graph, (X,))
    assert "may write to what the module holds" in lowered.lowering.reason
    assert torch.equal(graph.scale, before)


class Whole(nn.Module):
    """A module that is not traced, and writes to its own buffers."""

    def __init__(self, write):
        super().__init__()
        self.write = write
        self.register_buffer("scale", torch.rand(8))

    def forward(self, y):
        self.write(y, self.scale)
        return y * self.scale.view(8, 1, 1)


class WithWhole(fx.Tracer):
    def is_leaf_module(self, m, module_qualified_name):
        return isinstance(m, Whole) or super().is_leaf_module(m, module_qualified_name)


@pytest.mark.parametrize(
    "write",
    [
        lambda y, scale: scale.mul_(0.5),
        lambda y, scale: torch._foreach_mul_([scale], 0.5),
        lambda y, scale: torch.batch_norm_update_stats(y, scale, None, 0.1),
        lambda y, scale: F.batch_norm(y, scale, torch.ones(8), training=True),
    ],
)
def test_operators_that_write_to_what_the_module_holds(write):
    model = randomise(Written(lambda m, y: m.whole(y).relu(), whole=Whole(write))).float()
    graph = fx.GraphModule(model, WithWhole().trace(model))
    before = graph.whole.scale.clone()
    lowered = fxfuse.lower(graph, (X,))
    assert "writes to its inputs, or to what the module holds" in lowered.lowering.reason
    assert torch.equal(graph.whole.scale, before)


class Unseen(nn.Module):
    """A function that is called as a whole."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, y):
        return self.function(y)


UNSEEN = {"data": lambda y: y * y.data.sigmoid(), "copy": lambda y: y * copy.deepcopy(y).sigmoid()}


@pytest.mark.usefixtures("whole_modules")
@pytest.mark.parametrize("way", ["data", "data of a module", "copy of a module"])
def test_what_tracers_do_not_see_is_refused(way):
    """They take it for a constant, or end the process."""
    name, _, of_module = way.partition(" of ")
    unseen = Unseen(UNSEEN[name])
    model = folded(Written(lambda m, y: (m.unseen if of_module else UNSEEN[name])(y), unseen=unseen))
    for engine in (*ENGINES, "inductor"):
        lowered = fxfuse.lower(model, (X,), engine)
        assert "past all operators" in lowered.lowering.reason
        near(lowered, X)


@pytest.mark.usefixtures("whole_modules")
def test_constants_of_a_tracer_are_seen_in_the_comparison(monkeypatch):
    """A program is compiled with other numbers than it is compared with, whatever these are."""
    monkeypatch.setattr(specialising, "PureFunctions", lambda pure: contextlib.nullcontext())
    model = folded(Written(lambda m, y: m.unseen(y), unseen=Unseen(UNSEEN["data"])))
    for seed in range(5):
        x = torch.randn(X.shape, generator=torch.Generator().manual_seed(seed))
        for batch in (x, x[:1], torch.zeros_like(x), torch.cat([x] * 5)):
            lowered = fxfuse.lower(model, (batch,))
            assert "other numbers" in lowered.lowering.reason
    near(lowered, X)


PAST_OPERATORS = {
    "elements of a new tensor": lambda y: y * torch.tensor([(y.detach().amax() > 100).float(), 2.0]).sum(),
    "of another": lambda y: y * y.new_tensor([y.detach().amax()]),
    "bounds": lambda y: y.tensor_split(y.detach().amax().clamp(1, 5).long().reshape(1), 3)[0].sum() * y,
    "text": lambda y: y * (len(f"{y.detach()}") > 1),
    "an old constructor": lambda y: y * torch.Tensor([2.0, (y.detach().amax() > 100).float()]).sum(),
    "that of a type": lambda y: y * torch.FloatTensor([2.0, y.detach().amax() > 100]).sum(),
    "that of a tensor": lambda y: y * y.new([2.0, (y.detach().amax() > 100).float()]).sum(),
}


@pytest.mark.usefixtures("whole_modules")
@pytest.mark.parametrize("way", PAST_OPERATORS)
def test_numbers_that_no_mode_sees_are_refused(way):
    model = folded(Written(lambda m, y: m.unseen(y), unseen=Unseen(PAST_OPERATORS[way])))
    lowered = fxfuse.lower(model, (X,))
    assert "past all operators" in lowered.lowering.reason
    near(lowered, X)


def mean_of_packed(y, lengths):
    data = pack_padded_sequence(y.flatten(2).mT, lengths, batch_first=True).data
    return data.sum(0) / data.shape[0]


def mean_of_sparse(y, mask):
    rows, columns = mask.to_sparse().indices().unbind()
    found = y.flatten(2).mT[rows, columns]
    return found.sum(0) / found.shape[0]


fx.wrap("mean_of_packed")
fx.wrap("mean_of_sparse")
# A function of an input, that input, and another one for which it gives another size.
SIZES = {
    "packed": (lambda m, y, z: mean_of_packed(y, z), torch.tensor([144, 144]), torch.tensor([9, 2])),
    "sparse": (lambda m, y, z: mean_of_sparse(y, z), torch.ones(2, 144) > 0, torch.eye(144)[:2] > 0),
}


@pytest.mark.parametrize("way", SIZES)
def test_sizes_that_depend_on_numbers_in_silence(way):
    function, example, other = SIZES[way]
    model = folded(WithSecond(function))
    lowered = fxfuse.lower(model, (X, example))
    assert "numbers" in lowered.lowering.reason
    assert torch.equal(lowered(X, other), model(X, other))


LAYER = nn.TransformerEncoderLayer(8, 2, 16, batch_first=True)
ENCODER = nn.TransformerEncoder(LAYER, 1, mask_check=False).eval()


@fx.wrap
def hidden_encoder(y, mask):
    return ENCODER(y, None, mask)


def test_padding_that_torch_leaves_out_unless_it_is_traced():
    encoder = copy.deepcopy(ENCODER)
    model = folded(
        WithSecond(lambda m, y, z: m.encoder(y.flatten(2).mT, src_key_padding_mask=z), encoder=encoder)
    )
    lowered = fxfuse.lower(model, (X, torch.zeros(2, 144) > 0))
    assert "padding" in lowered.lowering.reason
    mask = torch.arange(144) > torch.tensor([[100], [143]])
    with torch.no_grad():
        assert torch.equal(lowered(X, mask), model(X, mask)) and not model(X, mask)[0, 101:].any()
    hidden = folded(WithSecond(lambda m, y, z: hidden_encoder(y.flatten(2).mT, z)))
    assert "padding" in fxfuse.lower(hidden, (X, torch.zeros(2, 144) > 0)).lowering.reason
    without = folded(Written(lambda m, y: m.encoder(y.flatten(2).mT), encoder=encoder))
    near(fxfuse.lower(without, (X,)), X, limit=1e-4)


def test_an_encoder_that_leaves_out_nothing():
    encoder = nn.TransformerEncoder(LAYER, 1, enable_nested_tensor=False)
    model = folded(
        WithSecond(lambda m, y, z: m.encoder(y.flatten(2).mT, src_key_padding_mask=z), encoder=encoder)
    )
    lowered = fxfuse.lower(model, (X, torch.zeros(2, 144) > 0))
    assert not lowered.lowering.reason


def test_attention_with_padding():
    """Other layers than an encoder leave out nothing."""
    layer = nn.MultiheadAttention(8, 2, batch_first=True)

    def attend(m, y, z):
        tokens = y.flatten(2).mT
        return m.layer(tokens, tokens, tokens, key_padding_mask=z, need_weights=False)[0]

    lowered = fxfuse.lower(folded(WithSecond(attend, layer=layer)), (X, torch.zeros(2, 144) > 0))
    assert not lowered.lowering.reason
    mask = torch.arange(144) > torch.tensor([[100], [143]])
    with torch.no_grad():
        error = (lowered(X, mask) - lowered.folded(X, mask)).abs().max()
    assert error < 1e-4 * lowered.folded(X, mask).abs().max()


@pytest.mark.parametrize("where", ["root", "layer", "everywhere"])
def test_hooks_are_run(where):
    calls = []
    model = folded(Net())
    hooked = model if where == "root" else next(each for each in model.modules() if type(each) is nn.Linear)
    hooked.register_full_backward_hook(lambda *_: None)  # which never runs: there are no gradients
    assert not fxfuse.lower(model, (X,)).lowering.reason
    register = torch.nn.modules.module.register_module_forward_hook
    if where != "everywhere":
        register = hooked.register_forward_hook
    with contextlib.ExitStack() as stack:
        stack.callback(register(lambda module, *_: calls.append(module)).remove)
        lowered = fxfuse.lower(model, (X,))
        calls.clear()
        lowered(X)
    assert calls.count(hooked) == 1 and "hooks" in lowered.lowering.reason


class Halving(nn.Module):
    def forward(self, module, inputs):
        return (inputs[0] / 2,)


def test_a_hook_may_be_a_method_of_python():
    model, seen = folded(Net()), {}
    model.register_forward_pre_hook(seen.setdefault)
    lowered = fxfuse.lower(model, (X,))
    assert "hooks" in lowered.lowering.reason
    lowered(X)
    assert model in seen


def test_a_graph_that_is_a_hook_is_one():
    model = folded(Net())
    model.register_forward_pre_hook(fx.symbolic_trace(Halving()))
    lowered = fxfuse.lower(model, (X,))
    assert "hooks" in lowered.lowering.reason
    assert torch.equal(lowered(X), model(X))


def test_memory_of_inputs_that_is_read_as_it_lies():
    model = folded(WithSecond(lambda m, y, z: y + torch.as_strided(z, (2, 8, 12, 12), (12, 12, 1, 1)).relu()))
    x = torch.randn(2, 600)[:, ::2]
    lowered = fxfuse.lower(model, (X, x))
    assert "lie in memory" in lowered.lowering.reason
    assert torch.equal(lowered(X, x), model(X, x))
    for function in (
        lambda z: torch.as_strided_copy(z, (2, 8, 12, 12), (12, 12, 1, 1)),
        lambda z: torch.as_strided_scatter(z, torch.ones(2, 30), (2, 30), (300, 1))[:, :1, None, None],
    ):
        model = folded(WithSecond(lambda m, y, z, function=function: y + function(z)))
        lowered = fxfuse.lower(model, (X, x))
        assert "lie in memory" in lowered.lowering.reason
        assert torch.equal(lowered(X, x), model(X, x))
    inner = folded(Written(lambda m, y: torch.as_strided(y + 1, (2, 8, 3, 3), (9, 9, 3, 1)).relu()))
    near(fxfuse.lower(inner, (X,)), X)


class Counting(nn.Module):
    """It is called as a whole, and holds a tensor that is no buffer."""

    def __init__(self):
        super().__init__()
        self.calls = torch.zeros(())

    def forward(self, y):
        self.calls += 1
        return y * 2


@pytest.mark.usefixtures("whole_modules")
def test_attributes_are_not_written_to():
    model = folded(Written(lambda m, y: m.counting(y), counting=Counting()))
    before = float(model.counting.calls)
    lowered = fxfuse.lower(model, (X,))
    assert "writes" in lowered.lowering.reason
    assert float(model.counting.calls) == before


class Notes:
    """An object of the model's own."""

    def __init__(self):
        self.calls = 0


@dataclass(slots=True)
class Slots:
    """The same without a dict."""

    calls: int = 0


def counter():
    """A function that counts its calls."""
    calls = 0

    def call():
        nonlocal calls
        calls += 1

    return call


class Remembering(nn.Module):
    """It is called as a whole, and what it gives depends on what it was called with before."""

    def __init__(self, remember):
        super().__init__()
        self.remember = remember
        self.last = torch.zeros(8, 1, 1)
        self.calls, self.all, self.counts = 0, [], {"calls": torch.zeros(())}
        self.seen, self.kinds, self.notes = set(), Counter(), Notes()
        self.slots, self.space, self.nested = Slots(), SimpleNamespace(calls=0), [[1], 2]
        self.closure = counter()
        self.register_buffer("centre", torch.zeros(8, 1, 1))

    def forward(self, y):
        result = y - self.last - self.centre + self.calls + len(self.all) + self.counts["calls"]
        result = result + len(self.seen) + self.kinds.total() + self.notes.calls + self.slots.calls
        result = result + self.space.calls + len(self.nested) + self.closure.__closure__[0].cell_contents
        self.remember(self, y)
        return result


REMEMBERED = {
    "tensor": lambda m, y: setattr(m, "last", y[0, :, :1, :1] * 0.5),
    "buffer": lambda m, y: setattr(m, "centre", m.centre * 0.9 + 1),
    "number": lambda m, y: setattr(m, "calls", m.calls + 1),
    "list": lambda m, y: m.all.append(y),
    "tensor in a dict": lambda m, y: m.counts["calls"].add_(1),
    "dict": lambda m, y: m.counts.update(calls=m.counts["calls"] + 1),
    "key": lambda m, y: m.counts.update({len(m.counts): 3}),
    "set": lambda m, y: m.seen.add(len(m.seen)),
    "counter": lambda m, y: m.kinds.update("a"),
    "object": lambda m, y: setattr(m.notes, "calls", m.notes.calls + 1),
    "slots": lambda m, y: setattr(m.slots, "calls", m.slots.calls + 1),
    "namespace": lambda m, y: setattr(m.space, "calls", m.space.calls + 1),
    "place in a list": lambda m, y: m.nested[0].extend(m.nested[1:]) or m.nested.__delitem__(slice(1, None)),
    "closure": lambda m, y: m.closure(),
}


@pytest.mark.usefixtures("whole_modules")
@pytest.mark.parametrize("way", REMEMBERED)
@pytest.mark.parametrize("engine", ENGINES)
@pytest.mark.parametrize("batch", [2, 10])
def test_what_is_remembered_from_call_to_call(way, engine, batch):
    model = folded(Written(lambda m, y: m.memory(y), memory=Remembering(REMEMBERED[way])))
    images = torch.cat([X] * 5)[:batch]
    lowered = fxfuse.lower(model, (images,), engine)
    expected = "writes to its inputs" if way == "tensor in a dict" else "sets attributes"
    assert expected in lowered.lowering.reason
    twin = copy.deepcopy(model)
    for x in (images, images + 1, images - 1) if way != "closure" else ():  # copies share that
        assert torch.equal(lowered(x), twin(x))


@pytest.mark.usefixtures("whole_modules")
@pytest.mark.parametrize(
    "way", ["tensor", "buffer", "number", "list", "tensor in a dict", "dict", "key", "set", "counter"]
)
def test_lowering_leaves_the_memory_of_a_model_as_it_was(way):
    model = folded(Written(lambda m, y: m.memory(y), memory=Remembering(REMEMBERED[way])))
    twin = copy.deepcopy(model)
    lowered = fxfuse.lower(model, (X,))
    for x in (X, X + 1, X - 1):
        assert torch.equal(lowered(x), twin(x))


class Handing(nn.Module):
    """It is called as a whole, and gives what it was called with when it is called with nothing."""

    def __init__(self):
        super().__init__()
        self.kept = None

    def forward(self, y=None):
        if y is None:
            y, self.kept = self.kept, None
        else:
            self.kept = y
        return y


@pytest.mark.parametrize("batch", [2, 10])
def test_what_is_handed_over_within_a_call(batch):
    """It looks like a constant, and nothing remembers it from one call to the next."""
    model = folded(Written(lambda m, y: m.hands(y).relu() + m.hands(), hands=Handing()))
    images = torch.cat([X] * 5)[:batch]
    lowered = fxfuse.lower(model, (images,))
    assert "other numbers" in lowered.lowering.reason
    near(lowered, images)


class Frame:
    """An object, the text of which is no code."""

    def __init__(self, size):
        self.size = size


@fx.wrap
def framed(size):
    return Frame(size)


@fx.wrap
def cropped(y, frame):
    return y[..., : frame.size]


def test_objects_that_are_passed_on():
    lowered = fxfuse.lower(folded(Written(lambda m, y: cropped(y, framed(y.shape[-1] - 1)).relu())), (X,))
    assert "an object is passed on" in lowered.lowering.reason
    near(lowered, X)


class Caching(nn.Module):
    """It is called as a whole, and keeps what is the same in each call."""

    def forward(self, y):
        self.shape, self.kind = y.shape[1:], (y.dtype, 8 // 2 + 0.5)
        return y * 2


@pytest.mark.usefixtures("whole_modules")
def test_what_is_set_to_what_it_was_is_nothing():
    model = folded(Written(lambda m, y: m.cache(y), cache=Caching()))
    model(X)
    lowered = fxfuse.lower(model, (X,))
    assert not lowered.lowering.reason
    near(lowered, X)


@pytest.mark.parametrize("layer", [nn.LSTM, nn.GRU, nn.RNN])
@pytest.mark.parametrize("batch", [2, 9])
def test_recurrent_layers(layer, batch):
    model = folded(
        Written(lambda m, y: m.layer(y.flatten(2).mT)[0].relu(), layer=layer(8, 4, batch_first=True))
    )
    x = torch.randn(batch, 3, 5, 5)
    lowered = fxfuse.lower(model, (x,))
    assert not lowered.lowering.reason
    near(lowered, x)


def test_a_constant_that_is_written_to_after_it_was_read():
    def function(m, y):
        constant = m.scale * 2
        z = y * constant
        constant += 1
        return z + constant

    model = randomise(Written(function)).float()
    model.scale = nn.Parameter(torch.randn(8, 1, 1))
    lowered = fxfuse.lower(fxfuse.fuse(model), (X,))
    assert "writes to a constant" in lowered.lowering.reason
    near(lowered, X)


def test_checks_of_dtypes_in_exported_graphs_read_no_numbers():
    model = folded(Written(lambda _, y: y.float().softmax(1)))
    model = fxfuse.fuse(torch.export.export(model, (X,)).module())
    lowered = fxfuse.lower(model, (X,))
    assert "_assert_tensor_metadata" in model.code and not lowered.lowering.reason
    torch.testing.assert_close(lowered(X), model(X), rtol=1e-5, atol=1e-5)


def test_weights_of_inference_mode():
    scale = torch.randn(8, 1, 1)
    with torch.inference_mode():
        model = folded(Written(lambda m, y: y.relu() + m.scale.exp(), scale=nn.Parameter(scale.clone())))
        expected = model(X)
    lowered = fxfuse.lower(model, (X,))
    assert not lowered.lowering.reason
    with torch.no_grad():
        torch.testing.assert_close(lowered(X), expected, rtol=1e-5, atol=1e-5)
