"""Random models: one operator with one norm, and whole programs of them.

Both are drawn as plain data (frozen dataclasses), which Hypothesis prints and shrinks, and built from it.
All tensors are moderate, so that neither a small dtype nor float64 drowns a property in rounding.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.support import randomise

EPSILONS = (1e-5, 1e-3, 1e-1)
SEEDS = st.integers(0, 999)
_FUNCTIONS = {
    nn.Linear: F.linear,
    nn.Conv1d: F.conv1d,
    nn.Conv2d: F.conv2d,
    nn.Conv3d: F.conv3d,
    nn.ConvTranspose1d: F.conv_transpose1d,
    nn.ConvTranspose2d: F.conv_transpose2d,
    nn.ConvTranspose3d: F.conv_transpose3d,
}
_CHANNELS_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def applied(operator: Any, x: Tensor, *, functional: bool) -> Tensor:
    """`operator` on `x`: as a module, or by the function with the parameters that the module holds."""
    if not functional:
        return operator(x)
    function = _FUNCTIONS[type(operator)]
    tensors = (operator.weight, operator.bias)
    if isinstance(operator, nn.Linear):
        return function(x, *tensors)
    stride, padding, dilation, groups = operator.stride, operator.padding, operator.dilation, operator.groups
    if operator.transposed:
        return function(x, *tensors, stride, padding, operator.output_padding, groups, dilation)
    if operator.padding_mode != "zeros":
        x = F.pad(x, operator._reversed_padding_repeated_twice, mode=operator.padding_mode)
        padding = 0
    return function(x, *tensors, stride=stride, padding=padding, dilation=dilation, groups=groups)


def normalised(norm: Any, x: Tensor, form: str) -> Tensor:
    """`norm` on `x`; form: "module", "function", "native", "training" for batch statistics in this call."""
    if form == "module":
        return norm(x)
    statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
    if isinstance(norm, nn.modules.instancenorm._InstanceNorm):
        return F.instance_norm(x, *statistics, use_input_stats=False, eps=norm.eps)
    training = form == "training" or norm.training or norm.running_mean is None
    if form == "native":
        return torch.batch_norm(x, norm.weight, norm.bias, *statistics[:2], training, 0.1, norm.eps, False)
    return F.batch_norm(x, *statistics, training=training, eps=norm.eps)


def moderate(model: nn.Module, seed: int) -> None:
    """As `randomise`, with magnitudes in [1/4, 1] and operators that do not enlarge their input much."""
    randomise(model, seed)
    with torch.no_grad():
        for tensor in {id(t): t for t in (*model.parameters(), *model.buffers())}.values():
            if tensor.is_floating_point():
                tensor.copy_(tensor.sign() * tensor.abs().clamp(0.25, 1.0))
            if tensor.dim() > 1:
                tensor.div_(math.sqrt(tensor[0].numel()))


def noise(shape: Sequence[int], seed: int) -> Tensor:
    """A standard normal tensor in float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ---- one operator, one norm -------------------------------------------------------------------------


@dataclass(frozen=True)
class Pair:
    """A linear operator and the norm after it.

    Attributes:
        operator: class name in torch.nn, and its arguments.
        norm: class name in torch.nn, and its arguments.
        forms: how the operator is called (functional or not), and how the norm is.
        shape: of the input.
        overrides: values of the first channels of the norm's tensors, by name; the rest is random.
    """

    operator: tuple[str, dict[str, Any]]
    norm: tuple[str, dict[str, Any]]
    forms: tuple[bool, str]
    shape: tuple[int, ...]
    overrides: dict[str, list[float]]
    channels_last: bool
    dtype: torch.dtype
    seed: int

    def model(self) -> PairModel:
        """The model, in eval mode."""
        operator, norm = (getattr(nn, name)(**arguments) for name, arguments in (self.operator, self.norm))
        model = PairModel(operator, norm, self.forms)
        moderate(model, self.seed)
        with torch.no_grad():
            for name, values in self.overrides.items():
                tensor = getattr(norm, name)
                if tensor is not None:
                    tensor[: len(values)] = torch.tensor(values[: len(tensor)], dtype=tensor.dtype)
        model.to(self.dtype)
        return model.to(memory_format=_CHANNELS_LAST[len(self.shape)]) if self.channels_last else model

    def inputs(self) -> tuple[Tensor]:
        """The one input."""
        x = noise(self.shape, self.seed).to(self.dtype)
        return (x.to(memory_format=_CHANNELS_LAST[len(self.shape)]) if self.channels_last else x,)

    def example_inputs(self) -> tuple[Tensor] | None:
        """What fuse has to be given: inputs where only they say which axis is normalised."""
        return self.inputs() if self.operator[0] == "Linear" else None


class PairModel(nn.Module):
    def __init__(self, operator: nn.Module, norm: nn.Module, forms: tuple[bool, str]) -> None:
        super().__init__()
        self.operator, self.norm, self.forms = operator, norm, forms

    def forward(self, x: Tensor) -> Tensor:
        x = applied(self.operator, x, functional=self.forms[0])
        return normalised(self.norm, x, self.forms[1])


@st.composite
def pairs(draw: st.DrawFn, dtypes: Sequence[torch.dtype] = (torch.float64,)) -> Pair:
    """Any linear operator with any norm over running statistics."""
    kind = draw(st.sampled_from(("Conv", "ConvTranspose", "Linear")))
    dims = 0 if kind == "Linear" else draw(st.sampled_from((2, 1, 3)))
    groups, before, after = (draw(st.integers(1, 3)) for _ in range(3))
    if dims:
        channels = {"in_channels": groups * before, "out_channels": groups * after, "groups": groups}
        geometry, sizes = draw(_transposed(dims) if kind == "ConvTranspose" else _convolved(dims))
    else:
        channels, geometry, sizes = {"in_features": before, "out_features": groups * after}, {}, ()
    arguments = {**channels, **geometry, "bias": draw(st.booleans())}
    return Pair(
        operator=(f"{kind}{dims}d" if dims else kind, arguments),
        norm=draw(_norms(dims, groups * after)),
        forms=(draw(st.booleans()), draw(st.sampled_from(("module", "function")))),
        shape=(draw(st.integers(1, 2)), groups * before if dims else before, *sizes),
        overrides=draw(_overrides()),
        channels_last=dims > 1 and draw(st.booleans()),
        dtype=draw(st.sampled_from(dtypes)),
        seed=draw(SEEDS),
    )


@st.composite
def _norms(draw: st.DrawFn, dims: int, channels: int) -> tuple[str, dict[str, Any]]:
    batch = f"BatchNorm{max(dims, 1)}d"
    # An instance norm after a linear layer takes the batch for channels, which is another property.
    kinds = (batch, "SyncBatchNorm", f"InstanceNorm{dims}d") if dims else (batch, "SyncBatchNorm")
    arguments = {"eps": draw(st.sampled_from(EPSILONS)), "affine": draw(st.booleans())}
    return draw(st.sampled_from(kinds)), {"num_features": channels, "track_running_stats": True, **arguments}


def _overrides() -> st.SearchStrategy[dict[str, list[float]]]:
    def some(*values: float) -> st.SearchStrategy[list[float]]:
        return st.lists(st.sampled_from(values), max_size=3)

    return st.fixed_dictionaries(
        {
            "weight": some(0.0, -0.75, 1.0),
            "bias": some(0.0, -1.0),
            "running_mean": some(0.0, -1.0),
            "running_var": some(0.0, 1e-7, 1.0),
        }
    )


Geometry = tuple[dict[str, Any], tuple[int, ...]]


def _axes(draw: st.DrawFn, dims: int, low: int, high: int) -> tuple[int, ...]:
    return tuple(draw(st.integers(low, high)) for _ in range(dims))


@st.composite
def _convolved(draw: st.DrawFn, dims: int) -> Geometry:
    """Arguments of a convolution, and image sizes that it takes."""
    kernel, dilation = _axes(draw, dims, 1, 3), _axes(draw, dims, 1, 2)
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    named = draw(st.sampled_from((None, "valid", "same")))
    stride = (1,) * dims if named == "same" else _axes(draw, dims, 1, 3)
    padding = (0,) * dims if named else _axes(draw, dims, 0, 2)
    # Reflection needs an image larger than the padding.
    least = [max(r + 1 - 2 * p, p + 1, r + 1 if named else 1) for r, p in zip(reach, padding, strict=True)]
    sizes = tuple(size + draw(st.integers(0, 2)) for size in least)
    mode = draw(st.sampled_from(("zeros", "reflect", "replicate", "circular")))
    return {
        "kernel_size": kernel,
        "stride": stride,
        "padding": named or padding,
        "dilation": dilation,
        "padding_mode": mode,
    }, sizes


@st.composite
def _transposed(draw: st.DrawFn, dims: int) -> Geometry:
    """Arguments of a transposed convolution, and image sizes with which something comes out of it."""
    kernel, dilation = _axes(draw, dims, 1, 3), _axes(draw, dims, 1, 2)
    stride, padding = _axes(draw, dims, 1, 3), _axes(draw, dims, 0, 2)
    extra = tuple(
        draw(st.integers(0, max(s, d) - 1)) for s, d in zip(stride, dilation, strict=True)
    )  # torch's own bound
    sizes = []
    for k, d, s, p, e in zip(kernel, dilation, stride, padding, extra, strict=True):
        lacking = max(0, 2 * p - d * (k - 1) - e)
        sizes.append(1 + -(-lacking // s) + draw(st.integers(0, 2)))
    return {
        "kernel_size": kernel,
        "stride": stride,
        "padding": padding,
        "dilation": dilation,
        "output_padding": extra,
    }, tuple(sizes)


# ---- programs ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class OperatorSpec:
    """An operator of the pool, as many channels out as in.

    sharing: "same" if it is the module before it in the pool, "tied" if it only has its tensors.
    """

    name: str
    kernel: int = 1
    depthwise: bool = False
    bias: bool = True
    sharing: str = "own"

    def module(self, channels: int) -> nn.Module:
        if self.name == "Linear":
            return nn.Linear(channels, channels, bias=self.bias)
        groups = channels if self.depthwise else 1
        arguments = {"padding": self.kernel // 2, "groups": groups, "bias": self.bias}
        return getattr(nn, self.name)(channels, channels, self.kernel, **arguments)


@dataclass(frozen=True)
class NormSpec:
    """A norm of the pool. mode: "eval", "training", or "untracked" without running statistics."""

    eps: float
    affine: bool = True
    mode: str = "eval"
    sharing: str = "own"

    def module(self, kind: type[nn.Module], channels: int) -> nn.Module:
        norm = kind(channels, self.eps, affine=self.affine, track_running_stats=self.mode != "untracked")
        return norm.train(mode=self.mode == "training")


@dataclass(frozen=True)
class Step:
    """One step. Values are numbered: 0 is the input, each step but "rank" and "size" makes the next one.

    Attributes:
        do: a key of DO, or "rank" or "size", which only ask for the shape.
        source: number of the value that it works on.
        other: number of a second value, for "add" and "reshape".
        which: index into the pool of operators or norms.
        form: below FORMS; which of the ways to write it.
    """

    do: str
    source: int
    other: int
    which: int
    form: int


@dataclass(frozen=True)
class Program:
    """A model over values of one shape, so that every step can follow on every other."""

    shape: tuple[int, ...]
    operators: tuple[OperatorSpec, ...]
    norms: tuple[NormSpec, ...]
    steps: tuple[Step, ...]
    outputs: tuple[int, ...]
    nested: bool
    with_examples: bool
    seed: int

    def model(self) -> ProgramModel:
        """The model, in eval mode but for the norms whose mode says otherwise."""
        model = ProgramModel(self)
        training = [norm for norm in model.norms if norm.training]
        moderate(model, self.seed)
        for norm in training:
            norm.train()
        return model

    def inputs(self) -> tuple[Tensor]:
        """The one input, new in each call: programs may write to it."""
        return (noise(self.shape, self.seed),)

    def example_inputs(self) -> tuple[Tensor] | None:
        """What fuse is given."""
        return self.inputs() if self.with_examples else None


def norm_form(step: Step) -> str:
    """How a norm step is written."""
    return "training" if step.form == _TRAINING_FORM else ("module", "function", "native")[step.form % 3]


def _added(x: Tensor, other: Tensor) -> Tensor:
    x += other
    return x


_RELUS = (
    lambda model, x: model.relu(x),
    lambda _, x: F.relu(x),
    lambda _, x: x.relu(),
    lambda model, x: model.relu_in_place(x),
    lambda _, x: F.relu_(x),
)
_ADDS = (
    operator.add,
    torch.add,
    lambda x, other: x.add(other),
    lambda x, other: x.add_(other),
    _added,
)
# What a step computes, from its two values.
DO = {
    "operator": lambda model, step, x, _: applied(
        model.operators[step.which], x, functional=bool(step.form % 2)
    ),
    "norm": lambda model, step, x, _: normalised(model.norms[step.which], x, norm_form(step)),
    "identity": lambda model, step, x, _: x.contiguous() if step.form % 2 else model.identity(x),
    "dropout": lambda model, step, x, _: F.dropout(x, 0.5, False) if step.form % 2 else model.dropout(x),
    "relu": lambda model, step, x, _: _RELUS[step.form % 5](model, x),
    "add": lambda _, step, x, other: _ADDS[step.form % 5](x, other),
    "reshape": lambda _, __, x, other: x.reshape(other.shape),
}


class ProgramModel(nn.Module):
    """Runs the steps of a program; torch.fx unrolls the loop."""

    def __init__(self, program: Program) -> None:
        super().__init__()
        self.program = program
        self.identity, self.dropout = nn.Identity(), nn.Dropout(0.5)
        self.relu, self.relu_in_place = nn.ReLU(), nn.ReLU(inplace=True)
        channels = program.shape[1 if len(program.shape) == 4 else -1]
        norm = nn.BatchNorm2d if len(program.shape) == 4 else nn.BatchNorm1d
        self.operators = _pool(program.operators, lambda spec: spec.module(channels))
        self.norms = _pool(program.norms, lambda spec: spec.module(norm, channels))

    def forward(self, x: Tensor) -> Any:
        values, sizes = [x], []
        for step in self.program.steps:
            source, other = values[step.source], values[step.other]
            if step.do == "rank":
                torch._assert(source.ndim == len(self.program.shape), "rank")
            elif step.do == "size":
                sizes.append(source.size(0))
            else:
                values.append(DO[step.do](self, step, source, other))
        first, *rest = (values[number] for number in self.program.outputs)
        return {"first": first, "rest": (tuple(rest), {"sizes": sizes})} if self.program.nested else first


def _pool(specs: Sequence[Any], module: Callable[[Any], nn.Module]) -> nn.ModuleList:
    pool: list[nn.Module] = []
    for spec in specs:
        new = module(spec)
        if pool and spec.sharing == "same":
            new = pool[-1]
        elif pool and spec.sharing == "tied":
            _tie(new, pool[-1])
        pool.append(new)
    return nn.ModuleList(pool)


def _tie(module: nn.Module, other: nn.Module) -> None:
    """Gives `module` the tensors of `other` that both have in the same shape."""
    theirs = dict([*other.named_parameters(), *other.named_buffers()])
    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        if name in theirs and tensor.shape == theirs[name].shape:
            setattr(module, name, theirs[name])


_SHARING = st.sampled_from(("own", "own", "tied", "same"))
FORMS = 12
_TRAINING_FORM = 7  # not at an end of the range, where Hypothesis looks most often
# How far back the value was made that a step works on: mostly it is the last one.
_BACK = st.sampled_from((0,) * 6 + (1, 2, 3))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Programs over images, or over the rows of linear layers, with shared modules and branches."""
    linear = draw(st.booleans())
    channels = draw(st.integers(1, 4))
    names = ("Linear",) if linear else ("Conv2d", "ConvTranspose2d")
    operators = st.builds(
        OperatorSpec,
        name=st.sampled_from(names),
        kernel=st.sampled_from((1, 3)),
        depthwise=st.booleans(),
        bias=st.booleans(),
        sharing=_SHARING,
    )
    norms = st.builds(
        NormSpec,
        eps=st.sampled_from(EPSILONS),
        affine=st.sampled_from((True, True, False)),
        mode=st.sampled_from(("eval",) * 10 + ("training", "untracked")),
        sharing=_SHARING,
    )
    # With three axes a batch norm does not normalise a linear layer's channels; the sizes agree all the same.
    shape = draw(st.sampled_from(((2, channels), (2, channels, channels)))) if linear else (2, channels, 3, 4)
    pool = tuple(draw(st.lists(kind, min_size=1, max_size=3)) for kind in (operators, norms))
    steps, values = _resolved(draw(st.lists(_phrases(), min_size=1, max_size=8)), *map(len, pool))
    outputs = draw(st.lists(_BACK, min_size=1, max_size=3))
    return Program(
        shape,
        *map(tuple, pool),
        steps=steps,
        outputs=tuple(values - 1 - back % values for back in outputs),
        nested=draw(st.booleans()),
        with_examples=linear or draw(st.booleans()),
        seed=draw(SEEDS),
    )


_Drawn = tuple[str, int, int, int, int]


def _phrases() -> st.SearchStrategy[list[_Drawn]]:
    """One step, or an operator and what may stand between it and its norm. Values are relative."""

    def step(*names: str, back: st.SearchStrategy[int] = _BACK) -> st.SearchStrategy[_Drawn]:
        return st.tuples(st.sampled_from(names), back, _BACK, st.integers(0, 2), st.integers(0, FORMS - 1))

    last = st.just(0)
    between = step("rank", "norm", "identity", "dropout", "size", "relu", "add", back=last)
    block = st.builds(
        lambda first, middle, end: [first, *middle, end],
        step("operator"),
        st.lists(between, max_size=2),
        step("norm", back=last),
    )
    single = step("relu", "add", "norm", "operator", "identity", "dropout", "reshape", "rank", "size")
    return st.one_of(single.map(lambda drawn: [drawn]), block)


def _resolved(phrases: list[list[_Drawn]], operators: int, norms: int) -> tuple[tuple[Step, ...], int]:
    """Steps over numbered values, and how many values there are. Relative ones are what shrinks well."""
    steps, values = [], 1
    for do, back, other, which, form in (drawn for phrase in phrases for drawn in phrase):
        pool = {"operator": operators, "norm": norms}.get(do, 1)
        steps.append(Step(do, values - 1 - back % values, values - 1 - other % values, which % pool, form))
        values += do not in ("rank", "size")
    return tuple(steps), values
