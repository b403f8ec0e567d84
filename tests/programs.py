"""Random programs: operators, norms and what may stand between them, over a pool of values.

A program has shared modules, tied tensors, branches, several outputs, in-place steps, and every dialect.
It is plain data that a module interprets in its forward, where torch.fx unrolls the loop.
"""

from __future__ import annotations

import itertools
import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from hypothesis import strategies as st
from torch import Tensor, nn

from tests.strategies import EPSILONS, SEEDS, applied, moderate, noise, normalised

QUERIES = ("rank", "size")
FORMS = 24
_TRAINING_FORM = 7  # not at an end of the range, where Hypothesis looks most often


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
    """One step. Values are numbered: 0 is the input, each step but the QUERIES makes the next one.

    Attributes:
        do: a key of DO, or one of QUERIES, which only ask for the shape.
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


def writes(step: Step) -> bool:
    """Whether the step writes to its source."""
    return step.do in ("relu", "add") and step.form % 5 >= 3


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
_LARGEST_POOL = 3
_VARIANTS = FORMS * _LARGEST_POOL
# What is drawn at once: a step, or an operator, what may stand between, and its norm.
_NAMES = (
    *("operator", "relu", "add", "norm", "identity", "dropout", "reshape", "rank", "size"),
    *("operator norm", "norm operator", "operator norm", "operator norm norm"),
    *(f"operator {between} norm" for between in ("rank", "identity", "dropout", "size", "relu", "add")),
)
# How far back a value was made: mostly it is the last one. Relative, as that is what shrinks well.
_BACK = (0, 0, 0, 0, 1, 2, 3, 0, 0)
_SOURCES = tuple(itertools.product(_BACK, (0, 1, 2)))
_Drawn = tuple[str, tuple[int, int], int]
_PHRASES = st.tuples(st.sampled_from(_NAMES), st.sampled_from(_SOURCES), st.integers(0, _VARIANTS**3 - 1))


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
        mode=st.sampled_from(("eval",) * 8 + ("training", "untracked", "eval")),
        sharing=_SHARING,
    )
    # In sequences a norm does not normalise the channels of a linear layer; the sizes agree all the same.
    rows, sequences, images = (2, channels), (2, channels, channels), (2, channels, 3, 4)
    shape = draw(st.sampled_from((rows, rows, sequences))) if linear else images
    pool = tuple(draw(st.lists(kind, min_size=1, max_size=_LARGEST_POOL)) for kind in (operators, norms))
    steps, values = _resolved(draw(st.lists(_PHRASES, min_size=1, max_size=8)), *map(len, pool))
    outputs = draw(st.lists(st.sampled_from(_BACK), min_size=1, max_size=3))
    return Program(
        shape,
        *map(tuple, pool),
        steps=steps,
        outputs=tuple(values - 1 - back % values for back in outputs),
        nested=draw(st.booleans()),
        with_examples=linear or draw(st.booleans()),
        seed=draw(SEEDS),
    )


def _resolved(drawn: list[_Drawn], operators: int, norms: int) -> tuple[tuple[Step, ...], int]:
    """Steps over numbered values, and how many values there are."""
    steps, values = [], 1
    for phrase, (back, other), variant in drawn:
        for position, do in enumerate(phrase.split()):
            pool = {"operator": operators, "norm": norms}.get(do, 1)
            form, which = divmod(variant // _VARIANTS**position % _VARIANTS, _LARGEST_POOL)
            source = values - 1 - (back % values if position == 0 else 0)
            steps.append(Step(do, source, values - 1 - other % values, which % pool, form))
            values += do not in QUERIES
    return tuple(steps), values
