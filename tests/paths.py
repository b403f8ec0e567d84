"""Random models over values of many shapes: what a map can pass, what stops it, and what it goes into.

Sizes agree on purpose, so that a map on the wrong axis gives wrong numbers and no error. A model is plain
data, a list of calls, which a module interprets in its forward. `paths` draws any calls that run; `chains`
draws only what certainly passes, and knows how many norms there are to fold.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import assume
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.strategies import EPSILONS, SEEDS, applied, moderate, noise, normalised

Shape = tuple[int, ...]
_LARGEST = 2000
# What torch raises for shapes that a model does not take.
REJECTED = (RuntimeError, ValueError, IndexError, TypeError)


@dataclass(frozen=True)
class Value:
    """The value of that number: 0 is the input, each call makes the next one, a split one for each part."""

    number: int


@dataclass(frozen=True)
class Size:
    """What ``x.shape[axis]`` gives, or ``x.size(axis)``."""

    value: Value
    axis: int
    written: str


@dataclass(frozen=True)
class Layer:
    """The layer of that number."""

    number: int


@dataclass(frozen=True)
class Constant:
    """The parameter or buffer of that number."""

    number: int


@dataclass(frozen=True)
class Step:
    """One call.

    Attributes:
        do: "F.relu", "torch.add", "operator.mul"; ".view" for a method; "module", "function" or "native" for
            a layer that is called as such.
        args, kwargs: what it is given.
        parts: how many values it gives, in a tuple; 0 for one that is no tuple.
    """

    do: str
    args: tuple[Any, ...]
    kwargs: dict[str, Any] = field(default_factory=dict)
    parts: int = 0


@dataclass(frozen=True)
class Path:
    """A model.

    Attributes:
        shape: of the input.
        other: another shape, which the model may or may not take.
        layers: class names in torch.nn, and their arguments.
        constants: shapes of parameters and buffers, in turn.
        outputs: numbers of values.
    """

    shape: Shape
    other: Shape
    layers: tuple[tuple[str, dict[str, Any]], ...]
    constants: tuple[Shape, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    with_examples: bool
    seed: int

    def model(self) -> PathModel:
        """The model, in eval mode."""
        model = PathModel(self)
        moderate(model, self.seed)
        for number, shape in enumerate(self.constants):
            constant = noise(shape, self.seed + number)
            model.tensor(number).data.copy_(constant.sign() * constant.abs().clamp(0.25, 1.5))
        return model

    def inputs(self) -> tuple[Tensor]:
        """The one input, new in each call: models may write to it."""
        return (noise(self.shape, self.seed),)

    def other_inputs(self) -> tuple[Tensor]:
        """Another input, of another shape."""
        return (noise(self.other, self.seed),)

    def example_inputs(self) -> tuple[Tensor] | None:
        """What fuse is given."""
        return self.inputs() if self.with_examples else None


class PathModel(nn.Module):
    """Makes the calls of a path; torch.fx unrolls the loop."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = path
        self.layers = nn.ModuleList()
        for name, arguments in path.layers:
            self.add_layer(name, arguments)
        for number, shape in enumerate(path.constants):
            self.add_constant(number, shape)

    def add_layer(self, name: str, arguments: dict[str, Any]) -> None:
        self.layers.append(getattr(nn, name)(**arguments).double().eval())

    def add_constant(self, number: int, shape: Shape) -> None:
        tensor = torch.ones(shape, dtype=torch.float64)
        if number % 2:
            self.register_buffer(f"constant_{number}", tensor)
        else:
            setattr(self, f"constant_{number}", nn.Parameter(tensor))

    def tensor(self, number: int) -> Tensor:
        return getattr(self, f"constant_{number}")

    def forward(self, x: Tensor) -> Any:
        values = [x]
        for step in self.path.steps:
            values += self.made(step, values)
        return tuple(values[number] for number in self.path.outputs)

    def made(self, step: Step, values: list[Any]) -> list[Any]:
        """The values that a step makes."""
        args = [self._given(argument, values) for argument in step.args]
        result = called(step.do)(*args, **step.kwargs)
        return [result[number] for number in range(step.parts)] if step.parts else [result]

    def _given(self, argument: Any, values: list[Any]) -> Any:
        match argument:
            case Value(number):
                return values[number]
            case Size(Value(number), axis, written):
                return values[number].shape[axis] if written == "shape" else values[number].size(axis)
            case Layer(number):
                return self.layers[number]
            case Constant(number):
                return self.tensor(number)
            case tuple() | list():
                return type(argument)(self._given(each, values) for each in argument)
        return argument


def called(do: str) -> Callable[..., Any]:
    """What a step calls."""
    space, dot, name = do.rpartition(".")
    if not dot:
        return _LAYER_CALLS[do]
    if not space:
        return lambda x, *args, **kwargs: getattr(x, name)(*args, **kwargs)
    return getattr({"F": F, "torch": torch, "operator": operator}[space], name)


def _function(layer: nn.Module, x: Tensor) -> Tensor:
    if isinstance(layer, nn.modules.batchnorm._BatchNorm):
        return normalised(layer, x, "function")
    return applied(layer, x, functional=True)


_LAYER_CALLS = {
    "module": lambda layer, x: layer(x),
    "function": _function,
    "native": lambda layer, x: normalised(layer, x, "native"),
}


# ---- drawing a path -----------------------------------------------------------------------------------


class Drawing:
    """A path in the making. Calls are tried out, and those that do not run are left out."""

    def __init__(self, draw: st.DrawFn, shape: Shape) -> None:
        self.draw = draw
        self._model = PathModel(Path(shape, shape, (), (), (), (), False, 0))
        self._values = [torch.zeros(shape, dtype=torch.float64)]
        self.layers: list[tuple[str, dict[str, Any]]] = []
        self.constants: list[Shape] = []
        self.steps: list[Step] = []
        self.last = Value(0)
        # With keep_modules=True nothing folds that is not called as a module.
        self._only_modules = draw(st.booleans())

    def pick(self, *choices: Any) -> Any:
        """One of these."""
        return self.draw(st.sampled_from(choices))

    def shape(self, value: Value | None = None) -> Shape:
        """That of a value, or of the last one."""
        return tuple(self._values[(value or self.last).number].shape)

    def values(self) -> list[Value]:
        """All values, the last first."""
        return [Value(number) for number in reversed(range(len(self._values)))]

    def layer(self, name: str, **arguments: Any) -> Layer:
        """A new layer."""
        self.layers.append((name, arguments))
        self._model.add_layer(name, arguments)
        return Layer(len(self.layers) - 1)

    def constant(self, shape: Shape) -> Constant:
        """A new parameter or buffer."""
        self._model.add_constant(len(self.constants), shape)
        self.constants.append(shape)
        return Constant(len(self.constants) - 1)

    def form(self, *others: str) -> str:
        """How a layer is called: as a module, or in one of these ways."""
        return "module" if self._only_modules else self.pick("module", *others)

    def add(self, do: str, *args: Any, split: bool = False, **kwargs: Any) -> bool:
        """Makes a call, and its value, or one of its parts, the last one; False if it does not run."""
        step = Step(do, args, kwargs)
        try:
            with torch.no_grad():
                made = self._model.made(step, self._values) if not split else self._parts(step)
        except REJECTED:
            return False
        if any(not isinstance(value, Tensor) or not 0 < value.numel() <= _LARGEST for value in made):
            return False
        self.last = Value(len(self._values) + (self.pick(*range(len(made))) if split else 0))
        self.steps.append(Step(do, args, kwargs, len(made) if split else 0))
        self._values += made
        return True

    def path(self, outputs: Sequence[Value], *, with_examples: bool = False) -> Path:
        """What has been drawn so far."""
        return Path(
            shape=self.shape(Value(0)),
            other=self._other_shape(),
            layers=tuple(self.layers),
            constants=tuple(self.constants),
            steps=tuple(self.steps),
            outputs=tuple(value.number for value in outputs),
            with_examples=with_examples or self.pick(True, False),
            seed=self.draw(SEEDS),
        )

    def _parts(self, step: Step) -> list[Tensor]:
        return [*self._model.made(step, self._values)[0]]

    def _other_shape(self) -> Shape:
        """More or fewer images, larger ones, an axis more or less, or as many numbers in another order."""
        batch, *sizes = self.shape(Value(0))
        choices = [(batch + 1, *sizes), (1, *sizes)]
        if len(sizes) > 1:
            choices += [(batch, sizes[0], *(size + 2 for size in sizes[1:]))]
            choices += [tuple(sizes)] * (1 if len(sizes) > 2 else 4)
        else:
            choices += [(batch, *sizes, *sizes)] * 2
        if len(sizes) > 1 and sizes[-1] % 2 == 0:
            choices += [(2 * batch, *sizes[:-1], sizes[-1] // 2)] * 4
        if len(sizes) > 1 and batch % 2 == 0:
            choices += [(batch // 2, *sizes[:-1], 2 * sizes[-1])] * 4
        return self.pick(*choices)


def _axis(d: Drawing) -> int:
    rank = len(d.shape())
    return d.pick(*range(1, rank), *range(-rank, 0), 0)


def _dims(d: Drawing) -> int:
    """Number of spatial axes that an operator over the last value can have."""
    rank = len(d.shape())
    return d.pick(*([dims for dims in (rank - 2, rank - 2, rank - 1) if 1 <= dims <= 3] or [1]))


# Linear operators.


def _conv(d: Drawing) -> bool:
    shape, dims = d.shape(), len(d.shape()) - 2
    if not 1 <= dims <= 2:
        return _linear(d)
    transposed = d.pick(False, False, False, True)
    name = f"Conv{'Transpose' if transposed else ''}{dims}d"
    channels, out = shape[1], d.pick(shape[1], shape[0], 4)
    groups = d.pick(1, 1, math.gcd(channels, out))
    arguments = {"kernel_size": d.pick(1, 2, 3), "padding": d.pick(0, 0, 1), "stride": d.pick(1, 1, 2)}
    mode = (
        {} if transposed else {"padding_mode": d.pick("zeros", "zeros", "reflect", "replicate", "circular")}
    )
    return _layer(
        d,
        name,
        in_channels=channels,
        out_channels=out,
        groups=groups,
        bias=d.pick(True, False),
        **arguments,
        **mode,
    )


def _linear(d: Drawing) -> bool:
    width = d.shape()[-1]
    return _layer(d, "Linear", in_features=width, out_features=d.pick(width, 4), bias=d.pick(True, False))


def _layer(d: Drawing, name: str, **arguments: Any) -> bool:
    """A new layer; now and then one that is there already, whether it fits or not."""
    alike = [Layer(number) for number, (other, _) in enumerate(d.layers) if other == name]
    layer = d.pick(*alike) if alike and d.pick(False, False, False, True) else d.layer(name, **arguments)
    return d.add(d.form("function"), layer, d.last)


# Maps.


def _norm(d: Drawing) -> bool:
    shape = d.shape()
    if not 2 <= len(shape) <= 5:
        return False
    name = f"BatchNorm{max(1, len(shape) - 2)}d"
    arguments = {"num_features": shape[1], "eps": d.pick(*EPSILONS), "affine": d.pick(True, True, False)}
    alike = [Layer(number) for number, (other, _) in enumerate(d.layers) if other == name]
    layer = d.pick(*alike) if alike and d.pick(False, False, False, True) else d.layer(name, **arguments)
    return d.add(d.form("function", "native"), layer, d.last)


_ARITHMETIC = ("mul", "add", "sub", "truediv")
_TORCH_NAMES = {"truediv": "div"}


def _affine(d: Drawing) -> bool:
    name = d.pick(*_ARITHMETIC)
    constant = d.pick(2.0, -0.5, 1.5) if d.pick(False, False, True) else d.constant(_broadcast(d))
    # Where a nonlinearity may have made zeros, c / x is infinite.
    first = (name != "truediv" or "Layer" in repr(d.steps[-1:])) and d.pick(False, True)
    return _calculated(d, name, constant, first=first)


def _calculated(d: Drawing, name: str, constant: Any, *, first: bool) -> bool:
    other = _TORCH_NAMES.get(name, name)
    if first:
        return d.add(d.pick(f"operator.{name}", f"torch.{other}"), constant, d.last)
    written = (f"operator.{name}", f"torch.{other}", f".{other}", f".{other}_", f"operator.i{name}")
    scaled = {"alpha": 0.5} if name in ("add", "sub") and d.pick(False, False, True) else {}
    return d.add(d.pick(*(written[1:4] if scaled else written)), d.last, constant, **scaled)


def _broadcast(d: Drawing) -> Shape:
    """Along one axis, the channels in most cases; or of one element; or as large as the value, or larger."""
    shape = d.shape()
    place = d.pick(1, 1, 1, *range(len(shape))) % len(shape)
    along = (shape[place], *(1,) * (len(shape) - place - 1))
    ones = (1,) * (len(shape) - len(along))
    swapped = (d.shape(Value(0))[1], *along[1:])
    return d.pick(
        along, along, (*ones, *along), (), (1,), (1,) * len(shape), shape, (1, *ones, *along), swapped
    )


# What a map may pass.


def _same(d: Drawing) -> bool:
    return d.pick(
        lambda: d.add(d.pick(".contiguous", "torch.clone", ".clone"), d.last),
        lambda: d.add("module", d.layer(d.pick("Identity", "Dropout")), d.last),
        lambda: d.add("F.dropout", d.last, 0.5, False),
    )()


def _reshape(d: Drawing) -> bool:
    shape = d.shape()
    target = [(size, place) for place, size in enumerate(shape)]
    place = d.pick(*range(len(shape)))
    kind = d.pick("merge", "split", "mix")
    if kind == "merge":
        taken = shape[place : place + 2]
        target[place : place + 2] = [(math.prod(taken), None)]
    elif kind == "split":
        factor = d.pick(*_divisors(shape[place]))
        target[place : place + 1] = [(factor, None), (shape[place] // factor, None)]
    else:
        mixed = d.pick(shape[::-1], (*shape[1:], shape[0]), (shape[0], *shape[2:], *shape[1:2]))
        target = [(size, None) for size in mixed]
    queries = d.pick(False, True)
    sizes: list[Any] = [
        Size(d.last, where, d.pick("shape", "size")) if queries and where is not None else size
        for size, where in target
    ]
    if d.pick(False, True):
        new = [number for number, (_, where) in enumerate(target) if where is None]
        sizes[d.pick(*new, *range(len(sizes)))] = -1
    do = d.pick(".reshape", ".view", "torch.reshape")
    packed = (tuple(sizes),) if do == "torch.reshape" or d.pick(False, True) else sizes
    return d.add(do, d.last, *packed)


def _flatten(d: Drawing) -> bool:
    rank = len(d.shape())
    start = d.pick(*range(rank))
    end = d.pick(-1, *range(start, rank))
    if d.pick(False, True):
        return d.add("module", d.layer("Flatten", start_dim=start, end_dim=end), d.last)
    return d.add(d.pick(".flatten", "torch.flatten"), d.last, start, end)


def _unflatten(d: Drawing) -> bool:
    axis = _axis(d)
    size = d.shape()[axis]
    factor = d.pick(*_divisors(size))
    sizes = d.pick((factor, size // factor), (factor, -1), (-1, factor))
    return d.add(d.pick(".unflatten", "torch.unflatten"), d.last, axis, sizes)


def _squeeze(d: Drawing) -> bool:
    ones = [place for place, size in enumerate(d.shape()) if size == 1]
    axis = d.pick(*ones, *(place - len(d.shape()) for place in ones)) if ones else _axis(d)
    return d.add(d.pick(".squeeze", "torch.squeeze"), d.last, axis)


def _unsqueeze(d: Drawing) -> bool:
    axis = _axis(d)
    if axis >= 0 and d.pick(False, True):
        return d.add("operator.getitem", d.last, (*(slice(None),) * axis, None))
    return d.add(d.pick(".unsqueeze", "torch.unsqueeze"), d.last, axis)


def _permute(d: Drawing) -> bool:
    rank = len(d.shape())
    if d.pick(False, True):
        do = d.pick(".permute", "torch.permute")
        order = d.pick(*itertools.islice(itertools.permutations(range(rank)), 24))
        return d.add(do, d.last, order)
    return d.add(d.pick(".transpose", "torch.transpose", ".swapaxes", ".movedim"), d.last, _axis(d), _axis(d))


def _split(d: Drawing) -> bool:
    axis = _axis(d)
    size = d.shape()[axis]
    if d.pick(False, True):
        return d.add(d.pick(".chunk", "torch.chunk"), d.last, d.pick(2, 3), axis, split=True)
    sizes = d.pick(-(-size // 2), [1, size - 1], [size // 2, size - size // 2])
    return d.add(d.pick(".split", "torch.split"), d.last, sizes, axis, split=True)


def _slice(d: Drawing) -> bool:
    axis = _axis(d)
    size = d.shape()[axis]
    start, length = d.pick(0, 1), d.pick(1, size // 2, size - 1)
    if d.pick(False, False, True):
        return d.add("torch.narrow", d.last, axis, start, length)
    if d.pick(False, False, True):
        return d.add(d.pick("torch.select", ".select"), d.last, axis, start)
    item = d.pick(slice(start, start + length), slice(start, None, 2), slice(None, -1), start)
    index = (*(slice(None),) * axis, item) if axis >= 0 else (..., item, *(slice(None),) * (-1 - axis))
    return d.add("operator.getitem", d.last, index)


def _average(d: Drawing) -> bool:
    dims = _dims(d)
    if d.pick(False, False, False, True):
        name, arguments = "adaptive_avg_pool", {"output_size": d.pick(1, 2)}
    else:
        kernel = d.pick(2, 3, 1)
        padding, stride = d.pick(kernel // 2, kernel // 2, 0), d.pick(1, 2)
        name, arguments = "avg_pool", {"kernel_size": kernel, "stride": stride, "padding": padding}
        arguments |= {"ceil_mode": d.pick(False, True), "count_include_pad": d.pick(True, True, False)}
        arguments |= {"divisor_override": 3} if dims == 2 and d.pick(False, False, False, True) else {}
    return _pooled(d, name, dims, arguments)


def _maximum(d: Drawing) -> bool:
    return _pooled(
        d, "max_pool", _dims(d), {"kernel_size": 2, "stride": d.pick(1, 2), "padding": d.pick(0, 1)}
    )


def _pooled(d: Drawing, name: str, dims: int, arguments: dict[str, Any]) -> bool:
    if d.pick(False, True):
        layer = "".join(part.capitalize() for part in name.split("_"))
        return d.add("module", d.layer(f"{layer}{dims}d", **arguments), d.last)
    return d.add(f"F.{name}{dims}d", d.last, **arguments)


def _reduce(d: Drawing) -> bool:
    rank = len(d.shape())
    axes = d.pick((2, 3), (-2, -1), *((place - rank,) for place in range(rank)), *((p,) for p in range(rank)))
    dim = axes[0] if len(axes) == 1 and d.pick(False, True) else axes
    do = d.pick(".mean", "torch.mean", ".mean", "torch.sum", ".sum", "torch.amax")
    return d.add(do, d.last, dim, keepdim=d.pick(True, False))


def _interpolate(d: Drawing) -> bool:
    linear = {3: "linear", 4: "bilinear"}.get(len(d.shape()), "nearest")
    mode = d.pick("nearest", linear, "nearest-exact")
    aligned = {"align_corners": d.pick(True, False)} if mode == linear != "nearest" else {}
    if d.pick(False, True):
        return d.add("module", d.layer("Upsample", scale_factor=2, mode=mode, **aligned), d.last)
    return d.add("F.interpolate", d.last, mode=mode, **d.pick({"size": 3}, {"scale_factor": 2}), **aligned)


def _pad(d: Drawing) -> bool:
    dims = _dims(d)
    widths = tuple(d.pick((1, 0), (1, 1), (0, 1), (-1, 0)) for _ in range(dims))
    mode = d.pick("constant", "constant", "reflect", "replicate", "circular")
    value = {"value": d.pick(0.0, 0.0, 0.5)} if mode == "constant" else {}
    return d.add("F.pad", d.last, tuple(itertools.chain(*widths)), mode=mode, **value)


def _shuffle(d: Drawing) -> bool:
    name, layer = d.pick(
        ("pixel_shuffle", "PixelShuffle"),
        ("pixel_unshuffle", "PixelUnshuffle"),
        ("channel_shuffle", "ChannelShuffle"),
    )
    if d.pick(False, True):
        return d.add("module", d.layer(layer, **{_FACTORS[name]: 2}), d.last)
    return d.add(f"torch.{name}", d.last, 2)


_FACTORS = {
    "pixel_shuffle": "upscale_factor",
    "pixel_unshuffle": "downscale_factor",
    "channel_shuffle": "groups",
}


# What takes two values, and what stops a map.


def _sum(d: Drawing) -> bool:
    others = [value for value in d.values() if value != d.last and _broadcasts(d.shape(), d.shape(value))]
    other = d.pick(*(others or [d.last])[:4])
    values = d.pick((d.last, other), (other, d.last))
    name = d.pick("add", "add", "sub")
    scaled = {"alpha": 0.5} if d.pick(False, False, False, True) else {}
    written = (f"torch.{name}", f".{name}", f".{name}_", f"operator.{name}", f"operator.i{name}")
    return d.add(d.pick(*(written[:3] if scaled else written)), *values, **scaled)


def _broadcasts(one: Shape, other: Shape) -> bool:
    return all(
        left == right or 1 in (left, right) for left, right in zip(one[::-1], other[::-1], strict=False)
    )


def _cat(d: Drawing) -> bool:
    axis = d.pick(1, 1, -1, _axis(d))
    shape = d.shape()
    place = axis % len(shape)
    fitting = [
        value
        for value in d.values()
        if len(d.shape(value)) == len(shape)
        and all(
            p == place or one == two for p, (one, two) in enumerate(zip(shape, d.shape(value), strict=True))
        )
    ]
    others = [value for value in fitting if value != d.last] or fitting
    other = d.pick(*others[:4])
    values = d.pick((d.last, other), (other, d.last), (d.last, other, other), (d.last, d.last))
    return d.add(d.pick("torch.cat", "torch.concat"), values, axis)


def _nonlinear(d: Drawing) -> bool:
    return d.pick(
        lambda: d.add(d.pick("F.relu", ".relu", "torch.sigmoid", "F.relu_"), d.last),
        lambda: d.add("module", d.layer("ReLU", inplace=d.pick(False, True)), d.last),
        lambda: d.add("F.relu", d.last),
    )()


def _written(d: Drawing) -> bool:
    """Writes to a value that others may still read."""
    last, value = d.last, d.pick(*d.values()[1:3], d.last)
    done = d.pick(
        lambda: d.add("F.relu_", value),
        lambda: d.add(".mul_", value, 2.0),
        lambda: d.add("operator.iadd", value, 1.0),
    )()
    d.last = last
    return done


def _gate(d: Drawing) -> bool:
    others = [value for value in d.values() if _broadcasts(d.shape(), d.shape(value))]
    return d.add(d.pick("operator.mul", "torch.mul", "torch.maximum"), d.last, d.pick(*others[:3]))


_PASSES = (
    *(
        _same,
        _reshape,
        _reshape,
        _reshape,
        _flatten,
        _unflatten,
        _squeeze,
        _unsqueeze,
        _permute,
        _split,
        _slice,
    ),
    *(_average, _maximum, _reduce, _interpolate, _pad, _shuffle),
)
# Those that pass or stop a map by their arguments, more often than others.
_DOUBTFUL = (
    *(_average, _maximum, _reduce, _pad, _cat, _slice, _split, _affine, _written, _reshape) * 4,
    *(*_PASSES, _sum, _gate),
)
_WORDS = {
    "operator": lambda d: d.pick(_conv, _conv, _linear)(d),
    "norm": _norm,
    "map": lambda d: d.pick(_norm, _affine, _affine)(d),
    "pass": lambda d: d.pick(*_PASSES)(d),
    "join": lambda d: d.pick(_sum, _cat)(d),
    "stop": lambda d: d.pick(_nonlinear, _gate)(d),
}
# What is drawn at once. "beside" takes up the value that the operator before it has taken; "back" any value.
_PHRASES = (
    *("operator map", "operator pass map", "operator pass pass map", "operator norm map"),
    *("norm operator", "norm pass operator", "norm pass pass operator", "map pass operator", "map operator"),
    *("operator beside operator join norm", "operator beside operator join pass map"),
    *("operator norm beside operator join norm", "norm operator beside operator", "norm join operator"),
    *("pass", "stop", "join", "back", "norm", "operator", "pass norm", "operator stop norm"),
)


def paths() -> st.SearchStrategy[Path]:
    """Any calls that run one after another; or all but one of them such that a map passes."""
    doubtful = st.one_of(_backward(doubtful=True), _forward(doubtful=True))
    return st.one_of(_any_calls(), doubtful.map(lambda chain: chain.path))


@st.composite
def _any_calls(draw: st.DrawFn) -> Path:
    """Calls in phrases that a map may follow."""
    d = Drawing(draw, draw(st.sampled_from(_SHAPES)))
    before = Value(0)
    for phrase in draw(st.lists(st.sampled_from(_PHRASES), min_size=1, max_size=4)):
        for word in phrase.split():
            if word in ("beside", "back"):
                d.last = before if word == "beside" else d.pick(*d.values()[:4])
                continue
            before = d.last if word == "operator" else before
            if d.shape():
                _WORDS[word](d)
    outputs = draw(st.lists(st.sampled_from(d.values()[:5]), max_size=1))
    return d.path([d.last, *outputs])


_SHAPES = (
    *((4, 4, 4, 4), (4, 4, 4, 4), (2, 4, 6, 6), (3, 3, 3, 3), (2, 2, 2, 2), (1, 4, 4, 3)),
    *((4, 4, 4), (2, 4, 3), (4, 4), (2, 4)),
)


# ---- what certainly passes ----------------------------------------------------------------------------


@dataclass(frozen=True)
class Chain:
    """A path on which every map certainly gets through, unless it has been drawn as doubtful.

    Attributes:
        norms, constants: how many of each there are.
    """

    path: Path
    norms: int
    constants: int


class Follow:
    """Draws calls that let a map pass, and follows the axis on which it acts.

    Attributes:
        place: that axis, counted from the front.
        backward: which way the map goes.
    """

    def __init__(self, d: Drawing, place: int, *, backward: bool) -> None:
        self.d = d
        self.place = place
        self.backward = backward
        self.norms = self.constants = 0

    @property
    def rank(self) -> int:
        return len(self.d.shape())

    def others(self) -> list[int]:
        """The other axes."""
        return [place for place in range(self.rank) if place != self.place]

    def calls(self, *, doubtful: bool) -> None:
        """Draws calls; if `doubtful` one of them may stop the map, or part of it."""
        doubt = self.d.pick(0, 1) if doubtful else None
        for number in range(self.d.pick(0, 1, 2, 3) if doubt is None else doubt + 1):
            if number == doubt:
                self.d.pick(*_DOUBTFUL)(self.d)
                self.place = min(self.place, self.rank - 1)
                assume(self.rank > 1)
            else:
                self._passed()

    def _passed(self) -> None:
        steps = [self._same, self._permuted, self._merged, self._parted, self._widened, self._windows]
        steps += [self._reduced, self._sliced, self._taken, self._shuffled, self._pixels]
        self.d.pick(*steps, *[self._calculated] * 3 * self.backward)()

    def normalised(self) -> None:
        """A norm, along that axis."""
        if self.place != 1:
            self._to(1)
        self.norms += _norm(self.d)

    def absorbed(self) -> list[Value]:
        """Operators that take up a map that goes forward."""
        d = self.d
        if self.rank > 2 and self.place in (1, self.rank - 1) and d.pick(True, False):
            d.add(d.pick(".flatten", "torch.flatten"), d.last, 1)
            self.place = 1
        elif self.rank in (3, 4) and d.pick(True, False):
            self._to(1)
        else:
            self._to(self.rank - 1)
        taken, made = d.last, []
        for _ in range(d.pick(1, 2)):
            d.last = taken
            made += [d.last] if (_linear if self.place == self.rank - 1 else _unpadded)(d) else []
        return made

    def _to(self, place: int) -> None:
        if place != self.place and self.d.add(".transpose", self.d.last, self.place, place):
            self.place = place

    def _same(self) -> None:
        _same(self.d)

    def _calculated(self) -> None:
        shape = self.d.shape()
        along = (shape[self.place], *(1,) * (self.rank - self.place - 1))
        constant = self.d.pick(2.0, None, None)
        constant = (
            self.d.constant(self.d.pick(along, (1, *along)[-self.rank :], (), (1,)))
            if constant is None
            else constant
        )
        name = self.d.pick(*_ARITHMETIC)
        first = name != "truediv" and self.d.pick(False, True)
        self.constants += _calculated(self.d, name, constant, first=first)

    def _permuted(self) -> None:
        order = self.d.draw(st.permutations(range(self.rank)))
        if self.d.add(self.d.pick(".permute", "torch.permute"), self.d.last, tuple(order)):
            self.place = order.index(self.place)

    def _merged(self) -> None:
        starts = [start for start in range(self.rank - 1) if self.place not in (start, start + 1)]
        start = self.d.pick(*starts) if starts else None
        if start is not None and self._reshaped(start, 2, (-1,), "flatten", start, start + 1):
            self.place -= start < self.place

    def _parted(self) -> None:
        axis = self.d.pick(*self.others())
        factor = self.d.pick(*_divisors(self.d.shape()[axis]))
        parts = self.d.pick((factor, -1), (-1, factor))
        if self.rank < 5 and self._reshaped(axis, 1, parts, "unflatten", axis, parts):
            self.place += axis < self.place

    def _reshaped(self, axis: int, gone: int, new: tuple[int, ...], method: str, *args: Any) -> bool:
        """Some axes replaced, by a method of that name or by a reshape that asks for the other sizes."""
        d = self.d
        if d.pick(False, True):
            return d.add(f".{method}", d.last, *args)
        sizes = [Size(d.last, place, d.pick("shape", "size")) for place in range(self.rank)]
        return d.add(".reshape", d.last, *sizes[:axis], *new, *sizes[axis + gone :])

    def _widened(self) -> None:
        axis = self.d.pick(*range(self.rank + 1))
        if self.rank < 5 and self.d.add(".unsqueeze", self.d.last, axis):
            self.place += axis <= self.place
            if self.d.pick(False, True) and self.d.add(".squeeze", self.d.last, axis):
                self.place -= axis < self.place

    def _windows(self) -> None:
        d = self.d
        dims = d.pick(1, 2)
        if self.rank - dims not in (1, 2) or self.place >= self.rank - dims:
            return
        d.pick(
            lambda: d.add(f"F.adaptive_avg_pool{dims}d", d.last, d.pick(1, 2)),
            lambda: d.add(f"F.avg_pool{dims}d", d.last, 2, ceil_mode=d.pick(False, True)),
            lambda: d.add(f"F.avg_pool{dims}d", d.last, 3, 1, 1, count_include_pad=False),
            lambda: d.add("F.pad", d.last, (1, 0) * dims, mode=d.pick("reflect", "replicate", "circular")),
            lambda: self.rank == dims + 2 and _interpolate(d),
        )()

    def _reduced(self) -> None:
        axis, keepdim = self.d.pick(*self.others()), self.d.pick(True, False)
        written = self.d.pick(axis, axis - self.rank)
        if (keepdim or self.rank > 2) and self.d.add(".mean", self.d.last, written, keepdim=keepdim):
            self.place -= axis < self.place and not keepdim

    def _sliced(self) -> None:
        axis = self.d.pick(*self.others())
        if self.rank > 2 and self.d.pick(False, True):
            self.place -= self.d.add(".select", self.d.last, axis, 0) and axis < self.place
        else:
            self.d.add("torch.narrow", self.d.last, axis, 0, max(1, self.d.shape()[axis] - 1))

    def _taken(self) -> None:
        """Some of the channels; one alone would be no axis that can be followed."""
        d, size = self.d, self.d.shape()[self.place]
        if size < 4:
            return
        if self.backward and d.pick(False, True):
            d.add(d.pick(".chunk", ".split"), d.last, 2, self.place, split=True)
            return
        item = d.pick(slice(1, None), slice(None, -1), slice(None, None, 2), slice(1, 3))
        d.add("operator.getitem", d.last, (*(slice(None),) * self.place, item))

    def _shuffled(self) -> None:
        if self.rank > 2:
            self.d.add("torch.channel_shuffle", self.d.last, 2)

    def _pixels(self) -> None:
        """A map passes only towards where there are more channels."""
        if self.rank > 2 and self.place <= self.rank - 3 and (not self.backward or self._quarter() > 1):
            self.d.add(f"torch.pixel_{'' if self.backward else 'un'}shuffle", self.d.last, 2)

    def _quarter(self) -> int:
        return self.d.shape()[self.place] // (4 if self.place == self.rank - 3 else 1)


def _divisors(size: int) -> list[int]:
    return [number for number in range(1, size + 1) if size % number == 0]


def _unpadded(d: Drawing) -> bool:
    dims, channels = len(d.shape()) - 2, d.shape()[1]
    groups, mode = d.pick(1, channels), d.pick("zeros", "reflect", "replicate", "circular")
    arguments = {"kernel_size": d.pick(1, 2), "padding": int(mode != "zeros"), "padding_mode": mode}
    layer = d.layer(
        f"Conv{dims}d",
        in_channels=channels,
        out_channels=channels,
        groups=groups,
        bias=d.pick(True, False),
        **arguments,
    )
    return d.add(d.form("function"), layer, d.last)


@st.composite
def chains(draw: st.DrawFn) -> Chain:
    """Norms of which all fold: behind operators, or in front of them."""
    return draw(_backward() if draw(st.booleans()) else _forward())


@st.composite
def _backward(draw: st.DrawFn, *, doubtful: bool = False) -> Chain:
    """One or two operators, put together, then norms among what lets their maps pass."""
    d = Drawing(draw, draw(st.sampled_from(((4, 4, 4, 4), (2, 4, 6, 6), (4, 4, 4), (4, 4), (3, 2, 5)))))
    linear = len(d.shape()) == 2 or d.pick(False, True)
    f = Follow(d, len(d.shape()) - 1 if linear else 1, backward=True)
    (_linear if linear else _conv)(d)
    assume(d.steps)
    if d.pick(False, True):
        ((name, arguments),) = d.layers
        first = d.last
        d.add("module", d.layer(name, **arguments), Value(0))
        if d.pick(True, False):
            d.add(d.pick("operator.add", "operator.sub", ".add_", "operator.iadd"), first, d.last)
        else:
            d.add("torch.cat", (first, d.last), d.pick(*range(len(d.shape()))))
    for _ in range(d.pick(1, 2)):
        f.calls(doubtful=doubtful)
        f.normalised()
    others = d.values()[1:4] if doubtful and d.pick(False, True) else []
    outputs = [d.last, *([d.pick(*others)] if others else [])]
    return Chain(d.path(outputs, with_examples=linear), f.norms, f.constants)


@st.composite
def _forward(draw: st.DrawFn, *, doubtful: bool = False) -> Chain:
    """A norm, what lets its map pass, and one or two operators without zero padding."""
    d = Drawing(draw, draw(st.sampled_from(((4, 4, 4, 4), (2, 4, 6, 6), (4, 4, 4), (3, 2, 5), (4, 4)))))
    f = Follow(d, 1, backward=False)
    for _ in range(d.pick(1, 2)):
        f.normalised()
        f.calls(doubtful=doubtful)
    outputs = f.absorbed()
    assume(outputs)
    checks_rank = d.steps[0].do == "module" and len(d.shape(Value(0))) == 4
    outputs += d.values()[:1] if doubtful and d.pick(False, False, True) else []
    return Chain(d.path(outputs, with_examples=not checks_rank), f.norms, 0)
