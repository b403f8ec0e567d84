"""What holds for every model: the same numbers, every norm accounted for, the source left alone."""

from __future__ import annotations

import copy
from collections import defaultdict
from inspect import signature
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from hypothesis import assume, given, reject, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import fxfuse
from tests.paths import REJECTED, Chain, Path, chains, paths
from tests.programs import QUERIES, Program, ProgramModel, norm_form, programs, writes
from tests.strategies import SEEDS, Pair, noise, pairs
from tests.support import assert_exact, assert_untouched, randomise, snapshot

SMALL_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# torch says that this combination is slow.
pytestmark = pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")

Case = Pair | Program | Path
# For what cannot fail in one case only.
FEW = settings(max_examples=settings().max_examples // 4)
cases = st.one_of(pairs(), programs(), paths())


def fused_of(case: Case, model: nn.Module) -> fx.GraphModule:
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


@given(paths())
def test_folded_equals_eager_for_any_path(path: Path) -> None:
    model = path.model()
    fused = fused_of(path, model)
    assert_exact(usable(model, path.inputs()), run(fused, path.inputs()))


@given(paths())
def test_folded_equals_eager_for_other_sizes(path: Path) -> None:
    """Wherever the model takes them; a graph may say that it takes no other number of axes."""
    model = path.model()
    fused = fused_of(path, model)
    expected = on_other_sizes(path, model)
    try:
        actual = run(fused, path.other_inputs())
    except AssertionError as error:
        assert "axes" in str(error)
        assert len(path.other) != len(path.shape) or "squeeze" in repr(path.steps)
    else:
        assert_exact(expected, actual)


def on_other_sizes(path: Path, model: nn.Module) -> Any:
    try:
        return usable(model, path.other_inputs())
    except REJECTED:
        reject()


def usable(model: nn.Module, inputs: tuple[Any, ...]) -> Any:
    """What `model` gives, if it is fit for a comparison: finite, and not so large that it must be inexact."""
    outputs = run(model, inputs)
    assume(all(not bool((output.abs() > 1e6).any()) for output in outputs))
    assume(all(bool(output.isfinite().all()) for output in outputs))
    return outputs


class Centred(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.operator, self.norm = nn.Linear(3, 3), nn.BatchNorm1d(3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.operator(x))
        return x - x.mean(0)


@FEW
@given(SEEDS)
def test_fuse_accepts_outputs_that_are_zero_but_for_rounding(seed: int) -> None:
    inputs = (torch.ones(3, 3, dtype=torch.float64),)
    fused = fxfuse.fuse(randomise(Centred(), seed), example_inputs=inputs)
    assert len(fxfuse.report(fused).folded) == 1


# ---- accounts ---------------------------------------------------------------------------------------


@given(chains())
def test_norms_fold_on_both_sides_of_what_certainly_passes(chain: Chain) -> None:
    model = chain.path.model()
    fused = fused_of(chain.path, model)
    report = fxfuse.report(fused)
    assert (len(report.folded), len(report.constants)) == (chain.norms, chain.constants), report
    assert_exact(run(model, chain.path.inputs()), run(fused, chain.path.inputs()))


@given(programs())
def test_norms_fold_where_operators_are_behind_or_in_front_and_nowhere_else(program: Program) -> None:
    model = program.model()
    report = fxfuse.report(fused_of(program, model))
    moved = [fold for fold in report.folded if fold.direction != "merged"]
    assert len(moved) == len(Rule(program, model).folded), report


class Rule:
    """Which values of a program are made by foldable norms, by the letter of the rule.

    Backward, each value on the way has one reader; a sum is divided. Forward, each of the readers is an
    operator that pads nothing, and nobody writes to what the norm has read.
    """

    def __init__(self, program: Program, model: ProgramModel) -> None:
        self.program, self.model = program, model
        made = (step for step in program.steps if step.do not in QUERIES)
        self.makers = dict(enumerate(made, start=1))
        self.readers: dict[int, set[int]] = defaultdict(set)
        for number, step in self.makers.items():
            for value in {step.source, step.other} if step.do == "add" else {step.source}:
                self.readers[value].add(number)
        for value in program.outputs if program.nested else program.outputs[:1]:
            self.readers[value].add(_OUTPUT)
        for dead in [number for number in self.makers if self._is_unused(number)]:
            for numbers in self.readers.values():
                numbers.discard(dead)
        self.folded: set[int] = set()
        sequences = len(program.shape) == 3  # (batch, length, channels): a norm works along the length
        maps = [] if sequences else self._maps()
        self.folded |= {number for number in maps if self._goes_backward(number)}
        for number in reversed(maps):
            if self._goes_forward(number):
                self.folded.add(number)

    def _is_unused(self, number: int) -> bool:
        """A value that nobody reads or asks for its shape, of what would let a map pass."""
        asked = {step.source for step in self.program.steps if step.do in QUERIES}
        asked |= {step.other for step in self.makers.values() if step.do == "reshape"}
        passes = self.makers[number].do in ("identity", "dropout", "add") and not writes(self.makers[number])
        return passes and number not in asked and not self.readers.get(number)

    def _maps(self) -> list[int]:
        """The values of norms that normalise by statistics that stay as they are."""
        norms = {n: self.model.norms[step.which] for n, step in self.makers.items() if step.do == "norm"}
        trained = {n for n, norm in norms.items() if norm.training or norm_form(self.makers[n]) == "training"}
        moving = {id(norms[number].running_mean) for number in trained}
        return [
            number
            for number, norm in norms.items()
            if number not in trained and norm.running_mean is not None and id(norm.running_mean) not in moving
        ]

    def _goes_backward(self, number: int) -> bool:
        found = self._absorbed_behind(self.makers[number].source)
        if found:
            self.folded.add(number)
        return found

    def _absorbed_behind(self, value: int) -> bool:
        if len(self.readers[value]) != 1 or value == 0:
            return False
        step = self.makers[value]
        if step.do == "add":
            return step.source != step.other and all(map(self._absorbed_behind, (step.source, step.other)))
        return step.do == "operator" or (self._passes(value) and self._absorbed_behind(step.source))

    def _goes_forward(self, number: int) -> bool:
        operators = None if number in self.folded else self._operators_in_front(number)
        if not operators:
            return False
        memory = self._memory(self.makers[number].source)
        between = [self.makers[n] for n in range(number + 1, max(operators) + 1) if writes(self.makers[n])]
        return all(self._memory(step.source) != memory for step in between)

    def _operators_in_front(self, value: int) -> set[int] | None:
        found: set[int] = set()
        for reader in self.readers[value]:
            pads = reader == _OUTPUT or self._pads(reader)
            into = {reader} if not pads and self.makers[reader].do == "operator" else None
            into = self._operators_in_front(reader) if reader != _OUTPUT and self._passes(reader) else into
            if into is None:
                return None
            found |= into
        return found or None

    def _passes(self, value: int) -> bool:
        return self.makers[value].do in ("identity", "dropout") or value in self.folded

    def _pads(self, value: int) -> bool:
        step = self.makers[value]
        # The module and not its spec: it may be that of another one.
        module: Any = self.model.operators[step.which] if step.do == "operator" else None
        widened = isinstance(module, nn.Conv2d) and module.kernel_size != (1, 1)
        return isinstance(module, nn.ConvTranspose2d) or widened

    def _memory(self, value: int) -> int:
        """The value whose memory this one may have: only what is known to make a new tensor does."""
        while value:
            step = self.makers[value]
            if step.do == "operator" or (step.do == "add" and not writes(step)):
                return value
            if step.do == "norm" and value not in self.folded:
                return value
            value = step.source
        return value


_OUTPUT = -1


class _Calls(TorchFunctionMode):
    """Counts the calls, less those that only ask; and the norms: those that use running statistics."""

    def __init__(self) -> None:
        super().__init__()
        self.all = self.norms = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.instance_norm:
            self.norms += not signature(func).bind(*args, **kwargs).arguments["use_input_stats"]
        self.norms += func in (F.batch_norm, torch.batch_norm)
        self.all += getattr(func, "__name__", "") not in ("__get__", "size", "dim", "_assert")
        return func(*args, **kwargs)


def calls(model: nn.Module, inputs: tuple[Any, ...]) -> _Calls:
    model, inputs = copy.deepcopy((model, inputs))
    with _Calls() as counter, torch.no_grad():
        model(*inputs)
    return counter


@given(cases)
def test_every_norm_that_runs_is_folded_or_refused_and_only_the_refused_still_run(case: Case) -> None:
    """A fold is one call less, of a constant too, and a merge some: nothing is computed in their place."""
    model = case.model()
    fused = fused_of(case, model)
    report = fxfuse.report(fused)
    before, after = calls(model, case.inputs()), calls(fused, case.inputs())
    assert report.norms == before.norms == len(report.folded) + len(report.refused), report
    assert after.norms == len(report.refused), report
    gone = len(report.folded) + len(report.constants)
    # What is merged takes sums with it, one for each branch.
    assert after.all == before.all - gone or (report.merged and after.all < before.all - gone), report


@FEW
@given(pairs().filter(lambda pair: pair.operator[0] == "Linear"))
def test_norm_after_linear_waits_for_example_inputs(pair: Pair) -> None:
    report = fxfuse.explain(pair.model())
    assert [refusal.code for refusal in report.refused] == ["FXF105"], report


# ---- modules that are kept ---------------------------------------------------------------------------


@given(cases)
def test_kept_modules_fold_exactly_and_keep_names_and_classes(case: Case) -> None:
    model = case.model()
    source = snapshot(model)
    fused = fxfuse.fuse(model, keep_modules=True)
    report = fxfuse.report(fused)
    assert type(fused) is type(model)
    assert [name for name, _ in fused.named_modules()] == [name for name, _ in model.named_modules()]
    assert report.norms == len(report.folded) + len(report.refused), report
    before, after = calls(model, case.inputs()), calls(fused, case.inputs())
    assert after.norms == before.norms - len(report.folded), report
    names = {record.norm for record in (*report.folded, *report.refused)}
    assert names.issuperset(norms_called(case.model(), case.inputs())), report
    assert_exact(run(model, case.inputs()), run(fused, case.inputs()))
    assert_untouched(source, model)


@given(paths())
def test_kept_modules_fold_exactly_for_other_sizes(path: Path) -> None:
    model = path.model()
    fused = fxfuse.fuse(model, keep_modules=True)
    assert_exact(on_other_sizes(path, model), run(fused, path.other_inputs()))


@FEW
@given(SEEDS, st.integers(2, 4))
def test_kept_modules_take_values_without_a_batch_axis(seed: int, size: int) -> None:
    """Where a norm works along another axis than with one; nothing that is kept could assert the number."""
    model = randomise(nn.Sequential(nn.Conv1d(size, size, 1), nn.BatchNorm1d(size)), seed)
    fused = fxfuse.fuse(model, keep_modules=True)
    for shape in ((size, size), (2, size, size)):
        x = noise(shape, seed)
        assert_exact(run(model, (x,)), run(fused, (x,)))


def norms_called(model: nn.Module, inputs: tuple[Any, ...]) -> set[str]:
    """The names of the norms that run as modules."""
    found: set[str] = set()
    for name, module in model.named_modules():
        if hasattr(module, "running_var"):
            module.register_forward_hook(lambda *_, name=name: found.add(name))
    with torch.no_grad():
        model(*inputs)
    return found


# ---- what must not change ---------------------------------------------------------------------------


@FEW
@given(cases)
def test_source_is_untouched(case: Case) -> None:
    model = case.model()
    before = snapshot(model)
    fused_of(case, model)
    assert_untouched(before, model)


@given(cases)
def test_folding_twice_changes_nothing(case: Case) -> None:
    once = fused_of(case, case.model())
    twice = fused_of(case, once)
    assert not fxfuse.report(twice).folded, fxfuse.report(twice)
    assert len(fxfuse.report(twice).refused) == len(fxfuse.report(once).refused)
    assert_same(once, twice)


@FEW
@given(cases)
def test_folding_is_deterministic(case: Case) -> None:
    model = case.model()
    assert_same(fused_of(case, model), fused_of(case, model))


def assert_same(one: fx.GraphModule, other: fx.GraphModule) -> None:
    """The same graph and, bit for bit, the same tensors under the same names."""
    assert one.code == other.code
    left, right = one.state_dict(), other.state_dict()
    assert list(left) == list(right)
    assert all(torch.equal(tensor, right[name]) for name, tensor in left.items())


# ---- dtypes and memory formats ----------------------------------------------------------------------


@FEW
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
