"""Scenarios 50-55 and 31: constants per channel are affine maps; weights may be expressions of parameters."""

import copy
import itertools
import operator

import pytest
import torch
import torch.nn.functional as F
from torch import fx, nn
from torch.nn.utils import parametrizations

import fxfuse
from fxfuse.zoo import torchvision
from tests.forms import EXPORT_WARNING, FORMS, Forward, check, exported, modules, noise, traced
from tests.scenarios.test_chains_through_operators import AnyCode, Branches
from tests.support import assert_exact, assert_untouched, folds, randomise, snapshot

pytestmark = [
    pytest.mark.filterwarnings(EXPORT_WARNING),
    pytest.mark.filterwarnings("ignore:.*weight_norm.* is deprecated:FutureWarning"),
]
X = noise(2, 3, 6, 6)
FORM = pytest.mark.parametrize("form", FORMS)
GRAPHS = pytest.mark.parametrize("form", (modules, traced, exported))
DIALECTS = pytest.mark.parametrize("form", (traced, exported))
ARITHMETIC = {
    *("add", "sub", "mul", "div", "truediv", "rsub", "radd", "rmul", "rtruediv"),
    *("iadd", "isub", "imul", "itruediv", "multiply", "divide", "subtract", "true_divide", "addcmul", "pow"),
    *("floordiv", "mod", "floor_divide", "remainder"),
}


def arithmetic(graph):
    """How many additions, subtractions, multiplications and divisions a run of `graph` executes."""
    calls = [node.target for node in graph.graph.nodes if node.op in ("call_function", "call_method")]
    names = [call if isinstance(call, str) else getattr(call, "__name__", "") for call in calls]
    return sum(name.partition(".")[0].strip("_") in ARITHMETIC for name in names)


def assert_settled(model, *inputs, constants=0, kept=0, folded=0, left=0, example_inputs=None):
    """As `folds`, with the number of constants that are folded and of additions, ..., that are kept."""
    codes = [AnyCode()] * left
    fused = folds(model, *inputs, folded=folded, refused=codes, example_inputs=example_inputs)
    assert len(fxfuse.report(fused).constants) == constants
    assert arithmetic(fused) == kept, fused.code
    assert not fxfuse.report(fxfuse.fuse(fused, example_inputs=example_inputs)).constants
    if not constants and not folded:
        assert_same_bits(model, fused, *inputs)
    return fused


def assert_same(model, *inputs, example_inputs=None):
    """The folded `model`, which computes the same, whatever was folded."""
    before = snapshot(model)
    fused = fxfuse.fuse(model, example_inputs=example_inputs)
    assert_untouched(before, model)
    with torch.no_grad():
        assert_exact(model(*copy.deepcopy(inputs)), fused(*copy.deepcopy(inputs)))
    return fused


def assert_unfolded(model, *inputs, example_inputs=None):
    """The folded `model`, in which no constant is folded."""
    fused = fxfuse.fuse(model, example_inputs=example_inputs)
    assert not fxfuse.report(fused).constants
    assert_same_bits(model, fused, *inputs)
    return fused


def assert_same_bits(model, fused, *inputs):
    with torch.no_grad():
        outputs = [torch.utils._pytree.tree_leaves(each(*copy.deepcopy(inputs))) for each in (model, fused)]
    for one, other in zip(*outputs, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0, equal_nan=True)


def model_of(run, **layers):
    """`run` over a convolution from 3 channels to 4, and other layers."""
    return randomise(Forward(run, **{"conv": nn.Conv2d(3, 4, 3), **layers}))


def table(name, entries):
    return pytest.mark.parametrize(name, entries.values(), ids=entries.keys())


# 50
SHAPES = {
    "(C, 1, 1)": noise(4, 1, 1),
    "(1, C, 1, 1)": noise(1, 4, 1, 1),
    "(1, 1, 1)": noise(1, 1, 1),
    "(1,)": noise(1),
    "()": noise(1)[0],
    "number": -1.7,
    "int": 3,
}
OPERATIONS = {
    "y * c": lambda y, c: y * c,
    "c * y": lambda y, c: c * y,
    "y + c": lambda y, c: y + c,
    "c + y": lambda y, c: c + y,
    "y - c": lambda y, c: y - c,
    "c - y": lambda y, c: c - y,
    "y / c": lambda y, c: y / c,
}
WRITTEN = {
    "torch.mul": torch.mul,
    "torch.mul, constant first": lambda y, c: torch.mul(c, y),
    "torch.mul by keyword": lambda y, c: torch.mul(other=c, input=y),
    "mul": lambda y, c: y.mul(c),
    "multiply": lambda y, c: y.multiply(c),
    "torch.multiply": torch.multiply,
    "operator.mul": operator.mul,
    "torch.add": torch.add,
    "add": lambda y, c: y.add(c),
    "add by keyword": lambda y, c: y.add(other=c),
    "torch.sub": torch.sub,
    "sub": lambda y, c: y.sub(c),
    "torch.sub, constant first": lambda y, c: torch.sub(c, y),
    "torch.subtract": torch.subtract,
    "torch.rsub": torch.rsub,
    "torch.div": torch.div,
    "div": lambda y, c: y.div(c),
    "torch.true_divide": torch.true_divide,
    "torch.divide": torch.divide,
    "div without rounding": lambda y, c: torch.div(y, c, rounding_mode=None),
}


def with_constant(operation, c, conv=None):
    """A convolution and `operation` with the constant `c`, which is a buffer if it is a tensor."""
    conv = conv or nn.Conv2d(3, 4, 3)
    if isinstance(c, torch.Tensor):
        return model_of(lambda m, x: operation(m.conv(x), m.c), conv=conv, c=c.clone())
    return model_of(lambda m, x: operation(m.conv(x), c), conv=conv)


@table("operation", OPERATIONS)
@table("c", SHAPES)
def test_constant_per_channel_is_folded(c, operation):
    fused = assert_settled(with_constant(operation, c), X, constants=1)
    (fold,) = fxfuse.report(fused).constants
    assert fold.into == ("conv",) and fold.direction == "backward"
    assert not fxfuse.report(fused).norms


@pytest.mark.parametrize("form", FORMS[1:])
def test_constants_per_channel_are_folded_in_every_dialect(form):
    cases = list(itertools.product(OPERATIONS.values(), SHAPES.values()))
    model = Branches(with_constant(operation, c) for operation, c in cases)
    assert_settled(form(model, X), X, constants=len(cases))


@GRAPHS
def test_constant_is_folded_however_the_operation_is_written(form):
    model = Branches(with_constant(operation, SHAPES["(C, 1, 1)"]) for operation in WRITTEN.values())
    assert_settled(form(model, X), X, constants=len(WRITTEN))


@pytest.mark.parametrize(
    "layer",
    [
        *(nn.Conv2d(3, 4, 3, bias=False), nn.Conv2d(3, 4, 3, padding=1, groups=1, stride=2)),
        *(nn.ConvTranspose2d(3, 4, 3), nn.ConvTranspose2d(3, 4, 2, stride=2, bias=False)),
    ],
)
@table("operation", OPERATIONS)
def test_constant_is_folded_into_any_convolution(operation, layer):
    assert_settled(with_constant(operation, SHAPES["(C, 1, 1)"], layer), X, constants=1)


@GRAPHS
@table("operation", OPERATIONS)
def test_constant_that_is_a_parameter_is_folded(operation, form):
    model = model_of(lambda m, x: operation(m.conv(x), m.c), c=nn.Parameter(noise(4, 1, 1)))
    assert_settled(form(model, X), X, constants=1)


def test_zero_and_negative_constants_are_exact():
    c = torch.tensor([0.0, -2.0, 1e-3, 5.0], dtype=torch.float64).view(4, 1, 1)
    for operation in ("y * c", "c - y", "y + c"):
        assert_same(with_constant(OPERATIONS[operation], c), X)
    assert_same(with_constant(OPERATIONS["y * c"], 0), X)


LINEAR = {
    "(F,)": (noise(4), (noise(5, 3), noise(2, 5, 3), noise(2, 3, 5, 3))),
    "(1, F)": (noise(1, 4), (noise(5, 3), noise(2, 5, 3))),
    "(1, 1, F)": (noise(1, 1, 4), (noise(2, 5, 3),)),
    "(1,)": (noise(1), (noise(5, 3), noise(2, 5, 3))),
    "()": (noise(1)[0], (noise(5, 3),)),
    "number": (0.1, (noise(5, 3), noise(2, 5, 3))),
}


@pytest.mark.parametrize("form", FORMS[::3])
@table("case", LINEAR)
def test_constant_per_feature_is_folded_into_a_linear_layer(case, form):
    c, inputs = case
    for x in inputs:
        model = form(with_constant(OPERATIONS["c - y"], c, nn.Linear(3, 4)), x)
        assert_settled(model, x, constants=1, example_inputs=(x,))
        assert_same(model, x)


# 51: what broadcasts along another axis, or makes the value larger, in a convolution's output (4, 4, 4, 4).
TRAPS = [
    *((1, 4, 1), (4, 1), (4,), (1, 4), (1, 1, 4, 1), (1, 1, 1, 4), (4, 1, 1, 1), (4, 4, 4), (1, 4, 4, 4)),
    *((4, 4), (4, 4, 1), (4, 1, 4), (4, 4, 1, 1), (1, 4, 4, 1), (1, 4, 1, 4), (4, 4, 4, 4)),
    *((1, 1, 4, 1, 1), (1, 1, 1, 1, 1), (4, 1, 1, 1, 1), (2, 1, 1, 1, 1)),
]
IMAGE = noise(4, 3, 4, 4)


@pytest.mark.parametrize("shape", TRAPS, ids=str)
@pytest.mark.parametrize("operation", ["y * c", "c - y"])
def test_constant_over_another_axis_is_left(operation, shape):
    model = with_constant(OPERATIONS[operation], noise(*shape), nn.Conv2d(3, 4, 1))
    assert_settled(model, IMAGE, kept=1)
    assert_settled(model, IMAGE, kept=1, example_inputs=(IMAGE,))


@pytest.mark.parametrize("form", FORMS[2:])
@pytest.mark.parametrize("operation", ["y * c", "c - y"])
def test_constant_over_another_axis_is_left_in_every_dialect(operation, form):
    operation = OPERATIONS[operation]
    model = Branches(with_constant(operation, noise(*shape), nn.Conv2d(3, 4, 1)) for shape in TRAPS)
    assert_settled(form(model, IMAGE), IMAGE, kept=len(TRAPS))


@GRAPHS
@pytest.mark.parametrize("shape", [(4, 1, 1), (1, 4, 1, 1), (4, 4, 4), (2, 1, 1)], ids=str)
def test_constant_that_makes_several_channels_of_one_is_left(shape, form):
    model = Branches(with_constant(op, noise(*shape), nn.Conv2d(3, 1, 1)) for op in OPERATIONS.values())
    x = noise(4, 3, 4, 4) if shape != (2, 1, 1) else noise(4, 3, 2, 4)
    assert_settled(form(model, x), x, kept=len(OPERATIONS))


@pytest.mark.parametrize(
    ("shape", "x"),
    [
        *(((4, 1), noise(4, 3)), ((4, 1), noise(2, 4, 3)), ((1, 4, 1), noise(2, 4, 3))),
        *(
            ((1, 1, 4), noise(5, 3)),
            ((1, 1, 1), noise(5, 3)),
            ((4, 4), noise(2, 4, 3)),
            ((5, 4), noise(5, 3)),
        ),
    ],
)
@pytest.mark.parametrize("operation", ["y * c", "y + c"])
def test_constant_over_another_axis_than_the_features_is_left(operation, shape, x):
    model = with_constant(OPERATIONS[operation], noise(*shape), nn.Linear(3, 4))
    assert_settled(model, x, kept=1)
    assert_settled(model, x, kept=1, example_inputs=(x,))
    assert_settled(exported(model, x), x, kept=1)


def test_constant_for_several_features_after_a_linear_layer_of_one_is_left():
    assert_settled(with_constant(OPERATIONS["y * c"], noise(4), nn.Linear(3, 1)), noise(5, 3), kept=1)


@table("c", SHAPES)
@table("operation", OPERATIONS)
def test_constant_is_never_wrong_without_a_batch_axis(operation, c):
    """A constant with a batch axis gives one to a value without: to be refused, or right."""
    model = with_constant(operation, c)
    fused = fxfuse.fuse(model)
    try:
        actual = fused(X[0])
    except (AssertionError, RuntimeError):
        return
    assert_exact(model(X[0]), actual)


@table("operation", OPERATIONS)
@pytest.mark.parametrize("shape", ["(C, 1, 1)", "(1, 1, 1)", "()", "int"])
def test_constant_that_adds_no_axis_is_folded_for_values_without_a_batch_axis_too(shape, operation):
    model = with_constant(operation, SHAPES[shape])
    fused = assert_settled(model, X, constants=1)
    assert_exact(model(X[0]), fused(X[0]))


@pytest.mark.parametrize("shape", ["(C, 1, 1)", "(1, C, 1, 1)"])
@pytest.mark.parametrize("keep_modules", [True, False])
def test_norm_after_a_constant_is_never_wrong_without_a_batch_axis(keep_modules, shape):
    model = model_of(lambda m, x: m.norm(m.conv(x) * m.c), c=SHAPES[shape].clone(), norm=nn.BatchNorm2d(4))
    fused = fxfuse.fuse(model, keep_modules=keep_modules)
    assert_exact(model(X), fused(X))
    adds_an_axis = shape == "(1, C, 1, 1)"
    if adds_an_axis and keep_modules:
        assert_exact(model(X[0]), fused(X[0]))
    elif adds_an_axis:
        with pytest.raises(AssertionError, match="4 axes"):
            fused(X[0])
    else:
        with pytest.raises(ValueError, match="expected 4D"):
            model(X[0])


# What is neither affine per channel nor a constant.
NOT_AFFINE = {
    "c / y": lambda m, x: m.c / m.conv(x),
    "1 / y": lambda m, x: 1 / m.conv(x),
    "reciprocal": lambda m, x: m.conv(x).reciprocal(),
    "y ** 2": lambda m, x: m.conv(x) ** 2,
    "y // c": lambda m, x: m.conv(x) // m.c,
    "y % c": lambda m, x: m.conv(x) % m.c,
    "c ** y": lambda m, x: m.c.abs() ** m.conv(x).tanh(),
    "floor": lambda m, x: torch.div(m.conv(x), m.c, rounding_mode="floor"),
    "trunc": lambda m, x: m.conv(x).div(m.c, rounding_mode="trunc"),
    "squeeze-excite": lambda m, x: m.conv(x) * x.mean((1, 2, 3), keepdim=True).sigmoid(),
    "a number from the input": lambda m, x: m.conv(x) + x.mean(),
    "a constant times a number from the input": lambda m, x: m.conv(x) + (m.c * x.mean()).sum(),
    "the input": lambda m, x: m.conv(x) + x[:, :1, 1:-1, 1:-1],
    "itself": lambda m, x: (y := m.conv(x)) * y,
    "complex": lambda m, x: (m.conv(x) * 1j).imag,
}


@GRAPHS
@table("run", NOT_AFFINE)
def test_what_is_not_affine_per_channel_is_left(run, form):
    assert_unfolded(form(model_of(run, c=noise(4, 1, 1)), X), X)


@pytest.mark.parametrize("form", FORMS[:3])
def test_size_of_the_input_is_no_constant(form):
    assert_unfolded(form(model_of(lambda m, x: m.conv(x) / x.shape[-1])), X)  # an export makes it one


@pytest.mark.parametrize("form", FORMS[::3])
@pytest.mark.parametrize(
    "run",
    [
        *(lambda m, x: torch.add(m.conv(x), m.c, alpha=2), lambda m, x: torch.sub(m.conv(x), m.c, alpha=-3)),
        *(lambda m, x: torch.add(m.c, m.conv(x), alpha=2), lambda m, x: torch.rsub(m.conv(x), m.c, alpha=2)),
        *(lambda m, x: torch.addcmul(m.conv(x), m.c, m.c), lambda m, x: torch.lerp(m.conv(x), m.c, 0.25)),
        *(lambda m, x: -m.conv(x), lambda m, x: m.conv(x).neg() + 1, lambda m, x: m.conv(x) * True),
        *(lambda m, x: +m.conv(x), lambda m, x: m.conv(x) + (m.c > 0), lambda m, x: m.conv(x) * (m.c > 0)),
        *(lambda m, x: torch.where(m.c > 0, m.conv(x), 0.0), lambda m, x: sum([m.conv(x), m.c])),
        *(lambda m, x: m.conv(x) + m.conv.bias[:, None, None], lambda m, x: m.conv(x) * m.conv.weight.sum()),
        *(
            lambda m, x: m.conv(x) * m.c[:, 0],
            lambda m, x: x * m.c,
        ),
    ],
)
def test_other_arithmetic_is_exact(run, form):
    x = noise(2, 4, 4, 4)
    assert_same(form(model_of(run, conv=nn.Conv2d(4, 4, 1), c=noise(4, 1, 1)), x), x)


# In place.
@pytest.mark.parametrize(
    "write",
    [
        *(lambda y, c: y.mul_(c), lambda y, c: y.add_(c), lambda y, c: y.sub_(c), lambda y, c: y.div_(c)),
        *(
            operator.imul,
            operator.iadd,
            operator.isub,
        ),
        *(lambda y, c: operator.itruediv(y, 2), lambda y, c: torch.mul(y, c, out=y), lambda y, c: y.neg_()),
        *(lambda y, c: y[:, 1:].mul_(3), lambda y, c: y.view(-1).add_(1), lambda y, c: c.mul(2)),
    ],
)
@pytest.mark.parametrize("used", ["the result", "the value", "both", "the value before"])
def test_constant_in_place_is_exact(used, write):
    def run(m, x):
        y = m.conv(x)
        before = y.relu() if used == "the value before" else y
        z = write(y, m.c)
        return {"the result": z, "the value": y, "both": (y, z)}.get(used, (before, z))

    with torch.no_grad():
        model = model_of(run, c=noise(4, 1, 1))
        assert_same(model, X)
        if used == "both":
            assert_same(exported(model, X), X)


# 52
PROMOTED = {
    "float32, float64": (torch.float32, noise(4, 1, 1)),
    "float16, float32": (torch.float16, noise(4, 1, 1).float()),
    "bfloat16, float16": (torch.bfloat16, noise(4, 1, 1).half()),
    "float16, bfloat16": (torch.float16, noise(4, 1, 1).bfloat16()),
    "float32, complex64": (torch.float32, noise(4, 1, 1).to(torch.complex64)),
    "float64, complex64": (torch.float64, noise(4, 1, 1).to(torch.complex64)),
    "float32, complex number": (torch.float32, 2j),
}
NOT_PROMOTED = {
    "float32, float64 of no axes": (torch.float32, noise(1)[0]),
    "float32, float16": (torch.float32, noise(4, 1, 1).half()),
    "float32, int64": (torch.float32, torch.tensor([3, -1, 2, 1]).view(4, 1, 1)),
    "float16, int64": (torch.float16, torch.tensor([3, -1, 2, 1]).view(4, 1, 1)),
    "float64, float32": (torch.float64, noise(4, 1, 1).float()),
    "float32, number": (torch.float32, 0.1),
    "bfloat16, int": (torch.bfloat16, 3),
}


def _in(dtype, c, operation):
    """A convolution in `dtype`, and `operation` with `c` as it is."""
    model = with_constant(operation, 1.0).to(dtype)
    model.__dict__["written"] = lambda m, x: operation(m.conv(x), m.c if isinstance(c, torch.Tensor) else c)
    if isinstance(c, torch.Tensor):
        model.register_buffer("c", c)
    return model


@GRAPHS
@table("case", PROMOTED)
@pytest.mark.parametrize("operation", ["y * c", "c - y"])
def test_constant_that_changes_the_dtype_is_left(operation, case, form):
    dtype, c = case
    model = _in(dtype, c, OPERATIONS[operation])
    assert arithmetic(assert_unfolded(form(model, X.to(dtype)), X.to(dtype))) == 1


@GRAPHS
@table("case", NOT_PROMOTED)
@pytest.mark.parametrize("operation", ["y * c", "c - y"])
def test_dtype_stays_as_it_is_without_constants(operation, case, form):
    dtype, c = case
    model = _in(dtype, c, OPERATIONS[operation])
    fused = fxfuse.fuse(form(model, X.to(dtype)))
    expected, actual = model(X.to(dtype)), fused(X.to(dtype))
    assert actual.dtype == expected.dtype == dtype
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(actual, expected, rtol=tolerance, atol=tolerance * expected.abs().max().item())


# 53
def _convnext(m, x):
    y = m.linear(x.permute(0, 2, 3, 1)) * m.gamma
    return x + y.permute(0, 3, 1, 2)


def _convnext_channels_first(m, x):
    y = m.linear(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
    return x + y.mul(m.gamma.reshape(1, -1, 1, 1))


LAYER_SCALES = {
    "convolution": lambda m, x: x + m.same(x.abs()) * m.gamma[:, None, None],
    "scale first": lambda m, x: m.gamma.view(1, -1, 1, 1) * m.same(x.abs()) + x,
    "dropout between": lambda m, x: x + F.dropout(m.same(x.abs()), training=False) * m.gamma.view(-1, 1, 1),
    "ReLU after": lambda m, x: F.relu(x + m.same(x.abs()) * m.gamma[None, :, None, None]),
    "after a norm": lambda m, x: x + m.norm(m.same(x.abs())) * m.gamma[:, None, None],
    "ConvNeXt": _convnext,
    "ConvNeXt, channels first": _convnext_channels_first,
}


@FORM
@table("run", LAYER_SCALES)
def test_layer_scale_is_folded_and_the_skip_stays(run, form):
    extra = {"norm": nn.BatchNorm2d(3)} if run is LAYER_SCALES["after a norm"] else {}
    layers = {"same": nn.Conv2d(3, 3, 3, padding=1), "linear": nn.Linear(3, 3)}
    model = form(model_of(run, **layers, **extra, gamma=nn.Parameter(noise(3))), X)
    assert_settled(model, X, constants=1, kept=1, folded=len(extra))


class LayerScale(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.gamma = nn.Parameter(noise(channels))

    def forward(self, x):
        return x * self.gamma


@GRAPHS
def test_layer_scale_of_a_vision_transformer_is_folded(form):
    layers = {"one": nn.Linear(3, 8), "two": nn.Linear(8, 3), "scale": LayerScale(3)}
    model = model_of(lambda m, x: x + m.scale(m.two(F.gelu(m.one(x)))), **layers)
    assert_settled(form(model, noise(2, 5, 3)), noise(2, 5, 3), constants=1, kept=1)


# 54
@pytest.mark.parametrize("form", FORMS[::3])
@pytest.mark.parametrize("value", [float("inf"), float("-inf"), float("nan")])
@pytest.mark.parametrize("operation", ["y * c", "c - y"])
def test_infinite_and_undefined_constants_are_left(operation, value, form):
    c = noise(4, 1, 1)
    c[2] = value
    for constant in (c, value):
        model = with_constant(OPERATIONS[operation], constant)
        assert arithmetic(assert_unfolded(form(model, X), X)) == 1


@pytest.mark.parametrize("divisor", [0, 0.0, torch.zeros(4, 1, 1, dtype=torch.float64)])
def test_division_by_zero_is_left(divisor):
    assert arithmetic(assert_unfolded(with_constant(OPERATIONS["y / c"], divisor), X)) == 1


@pytest.mark.parametrize("c", [1e308, 1e300, 1e-308, 5e-324])
def test_constant_that_overflows_or_underflows_a_weight_is_left_or_exact(c):
    model = with_constant(OPERATIONS["y * c"], c)
    with torch.no_grad():
        model.conv.weight.mul_(100)
    fused = fxfuse.fuse(model)
    expected, actual = model(X), fused(X)
    torch.testing.assert_close(actual, expected, rtol=1e-9, atol=5e-324, equal_nan=True)


@pytest.mark.parametrize("c", [1e3, 1e-6])
def test_constant_that_leaves_the_range_of_float16_is_left(c):
    model = _in(torch.float16, c, OPERATIONS["y * c"])
    with torch.no_grad():
        model.conv.weight.fill_(100 if c > 1 else 1e-2)
    assert arithmetic(assert_unfolded(model, X.half())) == 1


# 55
CHAINS = {
    "mul-add-mul-add": (lambda m, x: (m.conv(x) * m.a + m.b) * m.c + m.d, 4),
    "sub-div": (lambda m, x: (m.conv(x) - m.a) / m.b, 2),
    "numbers": (lambda m, x: 2 - (m.conv(x) * 0.1 - 1) / 3, 4),
    "numbers and tensors": (lambda m, x: (m.a - 2 * m.conv(x)) * m.b + 1, 4),
    "ten": (lambda m, x: (((((m.conv(x) * 2 + 1) * m.a + m.b) / 3 - m.c) * m.d + m.a) - 1) * 2, 10),
}


@FORM
@table("case", CHAINS)
def test_chain_of_constants_becomes_one_convolution(case, form):
    run, constants = case
    tensors = {name: noise(4, 1, 1, seed=seed) for seed, name in enumerate("abcd")}
    assert_settled(form(model_of(run, **tensors), X), X, constants=constants)


WITH_NORMS = {
    "constant, norm": (lambda m, x: m.norm(m.conv(x) * m.c), 1, 1),
    "norm, constant": (lambda m, x: m.norm(m.conv(x)) * m.c, 1, 1),
    "on both sides": (lambda m, x: (m.norm(m.conv(x) * 2 + m.c) - m.c) / 3, 4, 1),
    "between norms": (lambda m, x: m.two(m.norm(m.conv(x)) * m.c), 1, 2),
}


@FORM
@table("case", WITH_NORMS)
def test_constants_and_norms_are_folded_together(case, form):
    run, constants, norms = case
    layers = {"norm": nn.BatchNorm2d(4), **({"two": nn.BatchNorm2d(4)} if norms == 2 else {})}
    assert_settled(form(model_of(run, **layers, c=noise(4, 1, 1)), X), X, constants=constants, folded=norms)


# Constants that are expressions of parameters and buffers.
EXPRESSIONS = {
    "view": lambda m: m.c.view(1, -1, 1, 1),
    "reshape": lambda m: m.c.reshape(-1, 1, 1),
    "[:, None, None]": lambda m: m.c[:, None, None],
    "unsqueeze": lambda m: m.c.unsqueeze(-1).unsqueeze(-1),
    "product": lambda m: (m.c * m.d).view(-1, 1, 1),
    "rsqrt": lambda m: (m.d * (m.c.square() + 1e-3).rsqrt()).reshape(1, -1, 1, 1),
    "exp": lambda m: torch.exp(m.c)[:, None, None],
    "softplus": lambda m: F.softplus(m.c)[None, :, None, None],
    "part": lambda m: torch.cat([m.c[2:], m.d[:2]]).view(4, 1, 1),
    "sum": lambda m: m.c.sum(),
    "detach": lambda m: m.c.detach().view(4, 1, 1),
    "size": lambda m: m.c.view(m.c.shape[0], 1, 1) * m.c.shape[0] ** -0.5,
    "parameter of a norm": lambda m: m.norm.weight.view(-1, 1, 1),
    "bias of the convolution": lambda m: m.conv.bias.view(-1, 1, 1),
    "weight of the convolution": lambda m: m.conv.weight.mean((1, 2, 3)).view(-1, 1, 1),
}


def with_expression(expression):
    layers = {"norm": nn.BatchNorm2d(4), "c": nn.Parameter(noise(4)), "d": noise(4, seed=2)}
    return model_of(lambda m, x: 1 - m.conv(x) * expression(m), **layers)


@table("expression", EXPRESSIONS)
def test_constant_may_be_an_expression_of_parameters(expression):
    assert_settled(with_expression(expression), X, constants=2)


@DIALECTS
def test_constants_may_be_expressions_of_parameters_in_every_dialect(form):
    model = Branches(map(with_expression, EXPRESSIONS.values()))
    assert_settled(form(model, X), X, constants=2 * len(EXPRESSIONS))


# Who else uses the value, or the constant.
@GRAPHS
@pytest.mark.parametrize(
    ("run", "kept"),
    [
        (lambda m, x: ((y := m.conv(x)) * m.c, F.relu(y)), 1),
        (lambda m, x: (y := m.conv(x), y + m.c), 1),
        (lambda m, x: ((y := m.conv(x)) * m.c).relu() + (y * 2).relu(), 3),
        (lambda m, x: (m.conv(x).relu() * m.c).tanh(), 1),
        (lambda m, x: (x * m.c.sum()).relu(), 1),
    ],
)
def test_constant_is_left_where_its_value_is_used_elsewhere_or_not_linear(run, kept, form):
    model = form(model_of(run, c=nn.Parameter(noise(4, 1, 1))), X)
    assert arithmetic(assert_unfolded(model, X)) == kept


USED_TWICE = {
    "one constant after two convolutions": (
        lambda m, x: (m.conv(x) * m.c).relu() - (m.b(x) * m.c).relu(),
        2,
        1,
    ),
    "one convolution twice": (lambda m, x: (m.conv(x) * m.c).relu() + m.conv(x), 1, 1),
    "one convolution, two constants": (
        lambda m, x: (m.conv(x) * m.c).relu() - (m.conv(x) + m.c).relu(),
        2,
        1,
    ),
    "a constant that is returned": (lambda m, x: (m.conv(x) * m.c, m.c), 1, 0),
    "a constant used for the input too": (lambda m, x: (m.conv(x) * m.c).relu() + (x.mean() * m.c), 1, 2),
    "a value used twice after the constant": (lambda m, x: (y := m.conv(x) * m.c).relu() + y, 1, 1),
}


@FORM
@table("case", USED_TWICE)
def test_each_constant_is_folded_where_it_stands(case, form):
    run, constants, kept = case
    model = form(model_of(run, b=nn.Conv2d(3, 4, 3), c=nn.Parameter(noise(4, 1, 1))), X)
    assert_settled(model, X, constants=constants, kept=kept)


@pytest.mark.parametrize("form", FORMS[::3])
@pytest.mark.parametrize(
    "write",
    [
        *(
            lambda m: m.c.add_(1),
            lambda m: m.c[0].zero_(),
            lambda m: m.c.view(-1).mul_(2),
            lambda m: m.d.mul_(3),
        ),
        *(lambda m: operator.iadd(m.c, 1), lambda m: m.c.copy_(m.d), lambda m: m.conv.bias.detach().add_(1)),
    ],
)
@pytest.mark.parametrize("before", [True, False])
def test_constant_that_forward_writes_to_is_exact(before, write, form):
    def run(m, x):
        if before:
            write(m)
        y = m.conv(x) * (m.c + m.d)
        if not before:
            write(m)
        return y

    model = model_of(run, c=noise(4, 1, 1), d=noise(4, 1, 1, seed=2))
    fused = copy.deepcopy(fxfuse.fuse(form(copy.deepcopy(model), X)))
    for _ in range(2):
        assert_exact(model(X), fused(X))


# Through other operators: multiplication needs no more than a scale may, addition no more than a shift may.
THROUGH = {
    "pool": (lambda y: F.avg_pool2d(y, 2), (4, 1, 1), True, True),
    "padded pool": (lambda y: F.avg_pool2d(y, 3, padding=1), (4, 1, 1), True, False),
    "zero padding": (lambda y: F.pad(y, (1, 1)), (4, 1, 1), True, False),
    "reflection": (lambda y: F.pad(y, (1, 1, 0, 1), mode="reflect"), (4, 1, 1), True, True),
    "max pool": (lambda y: F.max_pool2d(y, 2), (4, 1, 1), False, True),
    "flatten(2)": (lambda y: y.flatten(2), (4, 1), True, True),
    "flatten(1)": (lambda y: y.flatten(1), (64,), False, False),
    "mean": (lambda y: y.mean((2, 3)), (4,), True, True),
    "channels last": (lambda y: y.permute(0, 2, 3, 1), (4,), True, True),
    "channels last, another axis": (lambda y: y.permute(0, 2, 3, 1), (4, 1, 1), False, False),
    "transpose": (lambda y: y.transpose(2, 3), (4, 1, 1), True, True),
    "transpose of channels": (lambda y: y.transpose(1, 2), (4, 1, 1), False, False),
    "half": (lambda y: y.chunk(2, 1)[1], (2, 1, 1), True, True),
    "upsampling": (lambda y: F.interpolate(y, scale_factor=2), (4, 1, 1), True, True),
    "shuffle": (lambda y: F.channel_shuffle(y, 2), (4, 1, 1), True, True),
    "pixel_shuffle": (lambda y: F.pixel_shuffle(y, 2), (1, 1, 1), True, True),
    "ReLU": (F.relu, (4, 1, 1), False, False),
}


def through(case):
    """A scale, and a shift, behind an operator."""
    middle, shape, *_ = case
    c = noise(*shape) - 5  # negative: a max pooling does not let it pass
    scaled = model_of(lambda m, x: middle(m.conv(x)) * m.c, c=c)
    return scaled, model_of(lambda m, x: middle(m.conv(x)) + m.c, c=c)


@table("case", THROUGH)
def test_constant_passes_operators_as_a_norm_does(case):
    for model, passes in zip(through(case), case[2:], strict=True):
        assert_settled(model, X, constants=int(passes), kept=int(not passes))


@DIALECTS
def test_constants_pass_operators_in_every_dialect(form):
    model = Branches(model for case in THROUGH.values() for model in through(case))
    passing = sum(scale + shift for *_, scale, shift in THROUGH.values())
    assert_settled(form(model, X), X, constants=passing, kept=2 * len(THROUGH) - passing)


@FORM
def test_constant_after_a_sum_or_a_concat_goes_into_all_parts(form):
    layers = {"b": nn.Conv2d(3, 4, 3), "c": noise(4, 1, 1), "d": noise(8, 1, 1)}
    summed = model_of(lambda m, x: (m.conv(x) + m.b(x.tanh())) * m.c - 1, **layers)
    joined = model_of(lambda m, x: torch.cat([m.conv(x), m.b(x)], 1) * m.d + m.d, **layers)
    assert_settled(form(summed, X), X, constants=2, kept=1)
    assert_settled(form(joined, X), X, constants=2)


# Forward.
def into(run, layer=None, **constants):
    """`run`, of a value that is known to be float64, into a convolution or another layer."""
    layers = {"first": nn.Conv2d(3, 4, 1), "last": layer or nn.Conv2d(4, 2, 3)}
    return randomise(Forward(lambda m, x: m.last(run(F.relu(m.first(x)), m)), **layers, **constants))


@table("operation", OPERATIONS)
def test_constant_goes_forward_where_it_cannot_go_backward(operation):
    for c in (noise(4, 1, 1), noise(1, 4, 1, 1)):
        fused = assert_settled(into(lambda y, m: operation(y, m.c), c=c), X, constants=1)
        assert [fold.direction for fold in fxfuse.report(fused).constants] == ["forward"]
    assert_settled(into(lambda y, m: operation(y, 2.3)), X, constants=1)


@pytest.mark.parametrize("form", FORMS[1:])
def test_constants_go_forward_in_every_dialect(form):
    model = Branches(
        into(lambda y, m, operation=operation: operation(y, m.c), c=noise(4, 1, 1))
        for operation in OPERATIONS.values()
    )
    assert_settled(form(model, X), X, constants=len(OPERATIONS))


@pytest.mark.parametrize("layer", [nn.Conv2d(4, 2, 3, padding=1), nn.ConvTranspose2d(4, 2, 3)])
@table("operation", OPERATIONS)
def test_only_a_scale_goes_forward_into_zero_padding(operation, layer):
    scales = operation in [OPERATIONS[name] for name in ("y * c", "c * y", "y / c")]
    model = into(lambda y, m: operation(y, m.c), layer, c=noise(4, 1, 1))
    assert_settled(model, X, constants=int(scales), kept=int(not scales))


@pytest.mark.parametrize("shape", [shape for shape in TRAPS if len(shape) < 5], ids=str)
def test_constant_over_another_axis_does_not_go_forward(shape):
    model = into(lambda y, m: y * m.c, nn.Conv2d(4, 2, 1), c=noise(*shape))
    assert_settled(model, IMAGE, kept=1)
    assert_settled(model, IMAGE, kept=1, example_inputs=(IMAGE,))


@GRAPHS
def test_constants_and_norms_go_forward_together(form):
    layers = {"norm": nn.BatchNorm2d(4), "c": noise(4, 1, 1)}
    assert_settled(form(into(lambda y, m: m.norm(y * m.c) + m.c, **layers), X), X, constants=2, folded=1)
    assert_settled(form(into(lambda y, m: (y * m.c + 1) / 2 - m.c, **layers), X), X, constants=4)


@GRAPHS
@pytest.mark.parametrize(
    ("run", "constants", "kept"),
    [
        (lambda m, x: m.last((y := F.relu(m.first(x))) * m.c) + y.mean(), 1, 1),
        (lambda m, x: (m.last(y := F.relu(m.first(x)) * m.c), y.relu()), 0, 1),
        (lambda m, x: m.last(F.relu(F.relu(m.first(x)) * m.c)), 0, 1),
        (lambda m, x: m.last((y := F.relu(m.first(x))) * m.c + y.abs()), 0, 2),
    ],
)
def test_constant_goes_forward_only_into_all_that_use_its_value(run, constants, kept, form):
    layers = {"first": nn.Conv2d(3, 4, 1), "last": nn.Conv2d(4, 2, 3), "c": noise(4, 1, 1)}
    assert_settled(form(randomise(Forward(run, **layers)), X), X, constants=constants, kept=kept)


# Input normalisation.
def _normalised(m, x):
    return m.conv((x - m.mean) / m.std)


NORMALISATIONS = {
    "tensors": (_normalised, 2),
    "mul": (lambda m, x: m.conv((x - m.mean) * m.std), 2),
    "torch": (lambda m, x: m.conv(torch.div(torch.sub(x, m.mean), m.std)), 2),
    "numbers": (lambda m, x: m.conv((x - 0.45) / 0.226), 2),
    "a number": (lambda m, x: m.conv(x / 255), 1),
    "from -1 to 1": (lambda m, x: m.conv(x * 2 - 1), 2),
    "before a norm": (lambda m, x: m.norm(m.conv((x - m.mean) / m.std)), 2),
}


def normaliser(run, conv=None):
    norm = {"norm": nn.BatchNorm2d(4)} if run is NORMALISATIONS["before a norm"][0] else {}
    tensors = {"mean": noise(3, 1, 1), "std": noise(1, 3, 1, 1).exp()}
    return model_of(run, conv=conv or nn.Conv2d(3, 4, 3, stride=2), **tensors, **norm)


@FORM
@table("case", NORMALISATIONS)
def test_normalisation_of_the_input_is_folded_if_its_dtype_is_known(case, form):
    run, constants = case
    model = form(normaliser(run), X)
    norms = int(run is NORMALISATIONS["before a norm"][0])
    assert_settled(model, X, constants=constants, folded=norms, example_inputs=(X,))
    assert_same(model, X)


@pytest.mark.parametrize("form", FORMS[:2])
@pytest.mark.parametrize("mode", ["reflect", "replicate", "circular"])
def test_normalisation_of_the_input_is_folded_into_padding_that_is_not_zero(mode, form):
    model = form(normaliser(_normalised, nn.Conv2d(3, 4, 3, padding=1, padding_mode=mode)))
    assert_settled(model, X, constants=2, example_inputs=(X,))


@FORM
@pytest.mark.parametrize("case", ["tensors", "mul", "from -1 to 1", "numbers"])
def test_shift_of_the_input_stays_before_zero_padding(case, form):
    model = form(normaliser(NORMALISATIONS[case][0], nn.Conv2d(3, 4, 3, padding=1)), X)
    fused = assert_same(model, X, example_inputs=(X,))
    assert 1 <= arithmetic(fused) == 2 - len(fxfuse.report(fused).constants)


@pytest.mark.parametrize("form", FORMS[:3])
@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64, torch.bool])
@pytest.mark.parametrize(
    "run",
    [
        *(lambda m, x: m.conv(x / 255), lambda m, x: m.conv(x * 2.0 + 1), lambda m, x: m.conv(x * m.std)),
        lambda m, x: m.conv((x + m.mean) / m.std),
    ],
)
def test_normalisation_that_makes_floats_of_integers_is_left(run, dtype, form):
    x = (9 * X).abs().to(dtype)
    model = form(normaliser(run).float())
    assert_unfolded(model, x)
    assert_unfolded(model, x, example_inputs=(x,))


def test_normalisation_that_promotes_its_input_is_left():
    model = normaliser(_normalised)
    x = X.float()
    assert_unfolded(model, x, example_inputs=(x,))
    assert_unfolded(model, x)


# 37: a batch norm that is written as a multiplication and an addition of buffers.
def frozen(channels):
    norm = torchvision().ops.FrozenBatchNorm2d(channels, eps=1e-3)
    norm.weight.copy_(torch.linspace(-1.5, 2, channels))
    norm.bias.copy_(torch.linspace(1, -2, channels))
    return norm


@FORM
def test_frozen_norm_is_folded_and_reported_by_its_name(form):
    model = randomise(
        Forward(lambda m, x: F.relu(m.norm(m.conv(x))), conv=nn.Conv2d(3, 4, 3), norm=frozen(4))
    )
    source = form(model, X)
    if form not in (traced, exported):
        fused = assert_settled(source, X, folded=1)
        assert [(fold.norm, fold.direction) for fold in fxfuse.report(fused).folded] == [("norm", "backward")]
        return
    fused = fxfuse.fuse(source)  # a trace shows only what the norm computes
    assert arithmetic(fused) == 0
    assert_exact(model(X), fused(X))


def test_frozen_norms_are_counted_and_named_in_a_residual_block():
    block = torchvision().models.resnet.BasicBlock(4, 4, norm_layer=frozen)
    fused = assert_settled(randomise(block), noise(2, 4, 5, 5), folded=2, kept=1)
    assert {fold.norm: fold.into for fold in fxfuse.report(fused).folded} == {
        "bn1": ("conv1",),
        "bn2": ("conv2",),
    }


FROZEN = {
    "forward": (lambda m, x: m.last(m.norm(F.relu(m.conv(x)))), 1, 0),
    "both sides": (lambda m, x: m.last(m.norm(m.conv(x))), 1, 0),
    "two calls": (
        lambda m, x: m.last(m.norm(m.conv(x))).relu() + m.norm(m.conv(x))[:, :, 1:-1, 1:-1].relu(),
        2,
        0,
    ),
    "after a norm": (lambda m, x: m.norm(m.other(m.conv(x))), 2, 0),
    "between activations": (lambda m, x: F.relu(m.norm(F.relu(m.conv(x)))), 0, 1),
    "on an image": (lambda m, x: F.relu(m.norm(x.repeat(1, 2, 1, 1)[:, :4])), 0, 1),
    "its value used": (lambda m, x: (y := m.conv(x), m.norm(y)), 0, 1),
}


@table("case", FROZEN)
def test_frozen_norm_is_accounted_for_wherever_it_stands(case):
    run, folded, left = case
    layers = {"norm": frozen(4), "last": nn.Conv2d(4, 4, 3), "other": nn.BatchNorm2d(4)}
    if run is not FROZEN["after a norm"][0]:
        del layers["other"]
    model = model_of(run, **layers)
    report = fxfuse.explain(model)
    assert (len(report.folded), len(report.refused)) == (folded, left)
    assert {record.norm for record in (*report.folded, *report.refused)} <= {"norm", "other"}
    fused = assert_same(model, X)
    assert not report.constants
    assert (arithmetic(fused) > 1) == bool(left)


# 31: weights that are expressions of parameters alone.
PARAMETRISATIONS = {
    "weight_norm, old": nn.utils.weight_norm,
    "weight_norm": parametrizations.weight_norm,
    "weight_norm of everything": lambda layer: parametrizations.weight_norm(layer, dim=None),
    "spectral_norm, old": nn.utils.spectral_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "orthogonal": parametrizations.orthogonal,
    "spectral_norm of weight_norm": lambda layer: parametrizations.spectral_norm(
        parametrizations.weight_norm(layer)
    ),
}
LAYERS = {
    "Conv2d": (lambda: nn.Conv2d(3, 4, 3, padding=1), nn.BatchNorm2d(4), X),
    "grouped": (lambda: nn.Conv2d(6, 4, 3, groups=2, bias=False), nn.BatchNorm2d(4), noise(2, 6, 5, 5)),
    "ConvTranspose1d": (lambda: nn.ConvTranspose1d(3, 4, 3), nn.BatchNorm1d(4), noise(2, 3, 5)),
    "Linear": (lambda: nn.Linear(5, 4), nn.BatchNorm1d(4), noise(6, 5)),
}


def _reparametrised(make, layer, norm):
    model = nn.Sequential(nn.Flatten() if isinstance(layer, nn.Linear) else nn.Identity(), make(layer), norm)
    return randomise(model)


@table("make", PARAMETRISATIONS)
@table("case", LAYERS)
def test_norm_after_a_reparametrised_layer_is_folded(case, make):
    build, norm, x = case
    model = _reparametrised(make, build(), norm)
    check(model, x, folded=1)


@pytest.mark.parametrize("form", (traced, exported))
@pytest.mark.parametrize("make", ["weight_norm", "spectral_norm", "orthogonal"])
def test_norm_after_a_reparametrised_layer_is_folded_in_a_graph(make, form):
    build, norm, x = LAYERS["Conv2d"]
    check(form(_reparametrised(PARAMETRISATIONS[make], build(), norm), x), x, folded=1)


@table("make", PARAMETRISATIONS)
def test_norm_before_a_reparametrised_layer_goes_forward(make):
    model = randomise(nn.Sequential(nn.BatchNorm2d(3), make(nn.Conv2d(3, 4, 3))))
    check(model, X, folded=1)


@table("make", PARAMETRISATIONS)
def test_reparametrised_layer_without_a_norm_is_exact(make):
    assert_same(randomise(nn.Sequential(make(nn.Conv2d(3, 4, 3)), nn.ReLU())), X)


def standardised(weight, eps=1e-4):
    mean = weight.mean((1, 2, 3), keepdim=True)
    var = weight.var((1, 2, 3), keepdim=True, unbiased=False)
    return (weight - mean) / (var + eps).sqrt()


def standardised_by_batch_norm(weight, gain=None):
    """timm's StdConv2d: a batch norm of the weight, in train mode."""
    flat = weight.reshape(1, weight.shape[0], -1)
    return F.batch_norm(flat, None, None, weight=gain, training=True, momentum=0.0, eps=1e-6).reshape_as(
        weight
    )


class StdConv2d(nn.Conv2d):
    def forward(self, x):
        weight = standardised_by_batch_norm(self.weight)
        return F.conv2d(x, weight, self.bias, self.stride, self.padding, self.dilation, self.groups)


class WeightStandardised(nn.Conv2d):
    def forward(self, x):
        return self._conv_forward(x, standardised(self.weight), self.bias)


COMPUTED = {
    "mask": lambda m, x: F.conv2d(x, m.kernel * m.mask),
    "mask and bias": lambda m, x: F.conv2d(x, m.kernel * m.mask, m.bias * 2, padding=1),
    "scaled": lambda m, x: F.conv2d(x, m.kernel * 0.1),
    "scaled by size": lambda m, x: F.conv2d(x, m.kernel / m.kernel[0].numel() ** 0.5),
    "flipped": lambda m, x: F.conv2d(x, m.kernel.flip(2, 3)),
    "transposed": lambda m, x: F.conv2d(x, m.other.transpose(0, 1)),
    "joined": lambda m, x: F.conv2d(x, torch.cat([m.kernel[2:], m.kernel[:2] + 1])),
    "summed": lambda m, x: F.conv2d(x, m.kernel + m.other.transpose(0, 1), m.bias),
    "padded": lambda m, x: F.conv2d(x, F.pad(m.kernel, (1, 1, 1, 1))),
    "normalised": lambda m, x: F.conv2d(x, F.normalize(m.kernel, dim=1), m.bias),
    "standardised": lambda m, x: F.conv2d(x, standardised(m.kernel)),
    "standardised by batch norm": lambda m, x: F.conv2d(x, standardised_by_batch_norm(m.kernel), m.bias),
    "standardised with a gain": lambda m, x: F.conv2d(x, standardised_by_batch_norm(m.kernel, m.bias)),
    "StdConv2d": lambda m, x: m.std(x),
    "WeightStandardised": lambda m, x: m.standard(x),
}


def computed(run):
    tensors = {"kernel": nn.Parameter(noise(4, 3, 3, 3)), "bias": nn.Parameter(noise(4))}
    tensors |= {"other": noise(3, 4, 3, 3, seed=4), "mask": (noise(4, 3, 3, 3, seed=5) > 0).double()}
    layers = {"std": StdConv2d(3, 4, 3, padding=1), "standard": WeightStandardised(3, 4, 3, bias=False)}
    return randomise(Forward(run, **tensors, **layers))


def normed(run, channels=4):
    model = computed(run)
    model.norm = randomise(nn.BatchNorm2d(channels))
    return model


PADDED = ("mask and bias", "StdConv2d")


@table("run", COMPUTED)
def test_norm_after_an_operator_with_a_computed_weight_is_folded(run):
    fused = check(normed(lambda m, x: m.norm(run(m, x))), X, folded=1)
    assert fxfuse.report(fused).norms == 1


@pytest.mark.parametrize("name", COMPUTED)
def test_norm_before_an_operator_with_a_computed_weight_goes_forward(name):
    model = normed(lambda m, x: COMPUTED[name](m, m.norm(x)), 3)
    left = int(name in PADDED)
    folds(model, X, folded=1 - left, refused=[AnyCode()] * left)


@DIALECTS
def test_norms_around_operators_with_computed_weights_are_folded_in_every_dialect(form):
    after = Branches(normed(lambda m, x, run=run: m.norm(run(m, x))) for run in COMPUTED.values())
    check(form(after, X), X, folded=len(COMPUTED))
    inside = [run for name, run in COMPUTED.items() if name not in PADDED]
    before = Branches(normed(lambda m, x, run=run: run(m, m.norm(x)), 3) for run in inside)
    check(form(before, X), X, folded=len(inside))


@GRAPHS
@table("run", COMPUTED)
def test_normalisation_of_a_weight_is_no_norm(run, form):
    fused = assert_same(form(computed(run), X), X)
    assert fxfuse.report(fused).norms == 0


@GRAPHS
@pytest.mark.parametrize(
    ("run", "folded"),
    [
        (lambda m, x: m.norm(F.conv2d(x, w := m.kernel * m.mask)).relu() + F.conv2d(x, w), 1),
        (lambda m, x: (m.norm(F.conv2d(x, w := m.kernel * m.mask)), w), 1),
        (lambda m, x: m.norm(F.conv2d(x, m.kernel * m.mask)) + F.conv2d(x, m.kernel), 1),
        (lambda m, x: m.norm(F.conv2d(x, w := m.kernel * 2)) + m.norm(F.conv2d(x + 1, w)), 2),
        (lambda m, x: m.norm(F.conv2d(x, m.kernel * x.mean())), 0),
        (lambda m, x: m.norm(F.conv2d(x, m.kernel * x[0, :, :3, :3])), 0),
        (lambda m, x: m.norm(F.conv2d(x, m.kernel, m.bias * x.mean())), 0),
    ],
)
def test_computed_weight_that_is_used_elsewhere_or_depends_on_the_input_is_exact(run, folded, form):
    calls = 2 if folded == 2 else 1
    check(form(normed(run), X), X, folded=folded, left=[AnyCode()] * (calls - folded))


@pytest.mark.parametrize("form", FORMS[::3])
@pytest.mark.parametrize("before", [True, False])
def test_computed_weight_of_a_tensor_that_forward_writes_to_is_exact(before, form):
    def run(m, x):
        if before:
            m.mask.mul_(2)
        y = m.norm(F.conv2d(x, m.kernel * m.mask))
        if not before:
            m.mask.mul_(2)
        return y

    model = normed(run)
    fused = copy.deepcopy(fxfuse.fuse(form(copy.deepcopy(model), X)))
    for _ in range(2):
        assert_exact(model(X), fused(X))


def test_source_keeps_its_parametrisation():
    model = randomise(nn.Sequential(parametrizations.weight_norm(nn.Conv2d(3, 4, 3)), nn.BatchNorm2d(4)))
    fused = check(model, X, folded=1)
    assert torch.nn.utils.parametrize.is_parametrized(model[0], "weight")
    assert isinstance(fused, fx.GraphModule)
