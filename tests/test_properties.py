"""What holds for every model: the same numbers, every norm accounted for, the source left alone."""

from __future__ import annotations

import copy
from collections import Counter
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import fxfuse
from tests.programs import QUERIES, Program, ProgramModel, norm_form, programs
from tests.strategies import SEEDS, Pair, pairs
from tests.support import assert_exact, assert_untouched, randomise, snapshot

SMALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# torch says that this combination is slow.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

cases = st.one_of(pairs(), programs())


def fused_of(case: Pair | Program, model: nn.Module) -> fx.GraphModule:
    return fxfuse.fuse(model, example_inputs=case.example_inputs())


def run(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What a copy of `model` gives for copies of `inputs`: either may be written to."""
    with torch.no_grad():
        return copy.deepcopy(model)(*copy.deepcopy(inputs))


# ---- numbers ----------------------------------------------------------------------------------------


@given(pairs())
def test_folded_equals_eager_for_any_operator_and_norm(pair: Pair) -> None:
    model = pair.model()
    fused = fused_of(pair, model)
    assert len(fxfuse.report(fused).folded) == 1, fxfuse.report(fused)
    assert_exact(run(model, pair.inputs()), run(fused, pair.inputs()))


@given(programs())
def test_folded_equals_eager_for_any_program(program: Program) -> None:
    model = program.model()
    expected = run(model, program.inputs())
    assert_exact(expected, run(fused_of(program, model), program.inputs()))


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.operator, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.operator(x))
        return x - x.mean(0)


@given(SEEDS)
def test_fuse_accepts_outputs_that_are_zero_but_for_rounding(seed: int) -> None:
    inputs = (torch.ones(3, 3, dtype=torch.float64),)
    fused = fxfuse.fuse(randomise(Centred(), seed), example_inputs=inputs)
    assert len(fxfuse.report(fused).folded) == 1


# ---- accounts ---------------------------------------------------------------------------------------


@given(programs())
def test_norms_fold_where_an_operator_is_behind_single_uses_and_nowhere_else(program: Program) -> None:
    model = program.model()
    report = fxfuse.report(fused_of(program, model))
    assert len(report.folded) == len(foldable(program, model)), report


def foldable(program: Program, model: ProgramModel) -> set[int]:
    """The numbers of the values that foldable norms make, by the letter of the rule."""
    if len(program.shape) == 3:  # (batch, length, channels): a norm works along the length
        return set()
    makers = dict(enumerate((step for step in program.steps if step.do not in QUERIES), start=1))
    uses = Counter(program.outputs if program.nested else program.outputs[:1])
    for step in makers.values():
        uses.update((step.source, step.other) if step.do == "add" else (step.source,))
    norms = {number: model.norms[step.which] for number, step in makers.items() if step.do == "norm"}
    trained = {n for n, norm in norms.items() if norm.training or norm_form(makers[n]) == "training"}
    moving = {id(norms[number].running_mean) for number in trained}
    folded: set[int] = set()
    for number, norm in norms.items():
        if number in trained or norm.running_mean is None or id(norm.running_mean) in moving:
            continue
        value = makers[number].source
        while uses[value] == 1 and value and (makers[value].do in ("identity", "dropout") or value in folded):
            value = makers[value].source
        if uses[value] == 1 and value and makers[value].do == "operator":
            folded.add(number)
    return folded


class _CountNorms(TorchFunctionMode):
    """Counts the norms that run: batch norms, and instance norms that use running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.instance_norm:
            self.count += not signature(func).bind(*args, **kwargs).arguments["use_input_stats"]
        self.count += func in (F.batch_norm, torch.batch_norm)
        return func(*args, **kwargs)


def norms_run(model: nn.Module, inputs: tuple[Any, ...]) -> int:
    with _CountNorms() as counter:
        run(model, inputs)
    return counter.count


@given(cases)
def test_every_norm_that_runs_is_folded_or_refused(case: Pair | Program) -> None:
    model = case.model()
    report = fxfuse.report(fused_of(case, model))
    assert report.norms == norms_run(model, case.inputs()), report
    assert report.norms == len(report.folded) + len(report.refused), report


@given(cases)
def test_no_norm_runs_in_the_folded_model_but_the_refused(case: Pair | Program) -> None:
    fused = fused_of(case, case.model())
    assert norms_run(fused, case.inputs()) == len(fxfuse.report(fused).refused), fxfuse.report(fused)


@given(pairs().filter(lambda pair: pair.operator[0] == "Linear"))
def test_norm_after_linear_waits_for_example_inputs(pair: Pair) -> None:
    report = fxfuse.explain(pair.model())
    assert [refusal.code for refusal in report.refused] == ["FXF105"], report


# ---- what must not change ---------------------------------------------------------------------------


@given(cases)
def test_source_is_untouched(case: Pair | Program) -> None:
    model = case.model()
    before = snapshot(model)
    fused_of(case, model)
    assert_untouched(before, model)


@given(cases)
def test_folding_twice_changes_nothing(case: Pair | Program) -> None:
    once = fused_of(case, case.model())
    twice = fused_of(case, once)
    assert not fxfuse.report(twice).folded, fxfuse.report(twice)
    assert len(fxfuse.report(twice).refused) == len(fxfuse.report(once).refused)
    assert_same(once, twice)


@given(cases)
def test_folding_is_deterministic(case: Pair | Program) -> None:
    model = case.model()
    assert_same(fused_of(case, model), fused_of(case, model))


def assert_same(one: fx.GraphModule, other: fx.GraphModule) -> None:
    """The same graph and, bit for bit, the same tensors under the same names."""
    assert one.code == other.code
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# ---- dtypes and memory formats ----------------------------------------------------------------------


@given(pairs((torch.float64, *SMALL_DTYPES)))
def test_weights_keep_dtype_device_and_memory_format(pair: Pair) -> None:
    model = pair.model()
    fused = fused_of(pair, model)
    (fold,) = fxfuse.report(fused).folded
    source, folded = model.operator.weight, fused.get_submodule(*fold.into)
    for tensor in (folded.weight, folded.bias):
        assert (tensor.dtype, tensor.device) == (source.dtype, source.device)
    assert folded.weight.stride() == source.stride()


def in_float64(model: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    return run(copy.deepcopy(model).double(), tuple(x.double() for x in inputs))


def magnitude(folded: nn.Module, inputs: tuple[Tensor, ...]) -> Tensor:
    """Σ|w·x| + |b| in float64: what comes out if no two terms cancel. Subnormal weights count as normal."""
    folded = copy.deepcopy(folded)
    with torch.no_grad():
        for parameter in folded.parameters():
            parameter.copy_(parameter.abs() + torch.finfo(parameter.dtype).tiny)
    return in_float64(folded, tuple(x.abs() for x in inputs))


@given(pairs(SMALL_DTYPES))
def test_weights_are_exact_but_for_one_rounding(pair: Pair) -> None:
    """Each term of the folded sum is off by half a unit in the last place at most."""
    model, inputs = pair.model(), pair.inputs()
    fused = fused_of(pair, model)
    error = (in_float64(fused, inputs) - in_float64(model, inputs)).abs()
    half_unit = torch.finfo(pair.dtype).eps / 2
    assert bool((error <= half_unit * (1 + 1e-6) * magnitude(fused, inputs)).all())


@given(pairs(SMALL_DTYPES))
def test_folding_does_not_enlarge_the_error_of_small_dtypes(pair: Pair) -> None:
    """At most twice the source's distance from float64, and a few units for weights rounded anew."""
    model, inputs = pair.model(), pair.inputs()
    fused = fused_of(pair, model)
    truth = in_float64(model, inputs)
    before, after = ((run(m, inputs).double() - truth).norm() for m in (model, fused))
    assert after <= 2 * before + 2 * torch.finfo(pair.dtype).eps * magnitude(fused, inputs).norm()
