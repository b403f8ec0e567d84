"""Wrong folds among hundreds of right ones are found, no more and no fewer, in few checks; searches go on."""

import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fxfuse
from fxfuse import cli, pipeline
from fxfuse.resuming import question
from tests.forms import EXPORT_WARNING
from tests.support import randomise

X = torch.randn(2, 2, 3, 3, generator=torch.Generator().manual_seed(0))
MANY, FEWER = 200, 40


class Block(nn.Module):
    """A mistake in one block is seen behind many others."""

    def __init__(self):
        super().__init__()
        self.conv, self.bn = nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2)

    def forward(self, x):
        return x + torch.tanh(self.bn(self.conv(x)))


def deep(count=MANY):
    """Right folds 0.bn, 1.bn, ..."""
    return randomise(nn.Sequential(*[Block() for _ in range(count)])).float()


def spoil(monkeypatch, names, factor=1.05):
    """Makes the folds of these norms wrong, after they have been tried out."""
    right = pipeline.rewrite

    def wrong(captured, plan, solution, reader):
        for move in plan.moves:
            if move.name in names:
                weight, bias = solution.tensors[move.sites[0].node]
                solution.tensors[move.sites[0].node] = (weight, nn.Parameter(bias * factor))
        return right(captured, plan, solution, reader)

    monkeypatch.setattr(pipeline, "rewrite", wrong)


def folded(model):
    return {fold.norm for fold in fxfuse.report(model).folded}


@pytest.mark.parametrize(
    "count, blocks",
    [(MANY, [198]), (FEWER, [0]), (FEWER, [1, 39]), (FEWER, [0, 1, 2]), (FEWER, [7, 20, 26, 39])],
)
def test_all_that_a_check_needs_to_fail_is_found_and_no_more(count, blocks):
    names = [f"{block}.bn" for block in blocks]
    found = fxfuse.bisect(deep(count), lambda fused: not {*names} <= folded(fused))
    assert {*found.culprits} == {*names} and found.folds == count
    assert found.checks <= (2 * math.log2(count) + 3) * len(names) ** 2


def test_one_of_several_that_each_break_a_check_is_found():
    found = fxfuse.bisect(deep(FEWER), lambda fused: not {"3.bn", "28.bn"} & folded(fused))
    assert found.culprits in {("3.bn",), ("28.bn",)}


@pytest.mark.parametrize("name", ["0.bn", "20.bn", "39.bn"])
def test_a_wrong_fold_is_found_by_what_fuse_verifies(name, monkeypatch):
    spoil(monkeypatch, {name}, factor=1 + 1e-6)
    model = deep(FEWER)
    with pytest.raises(fxfuse.VerificationError):
        fxfuse.fuse(model, example_inputs=(X,))
    found = fxfuse.bisect(model, example_inputs=(X,))
    assert found.culprits == (name,), found
    fused = fxfuse.fuse(model, example_inputs=(X,), leave=found.culprits)
    assert len(fxfuse.report(fused).folded) == FEWER - 1


def test_folds_that_rest_on_others_are_found_with_them():
    model = randomise(
        nn.Sequential(nn.Conv2d(2, 2, 1), nn.BatchNorm2d(2), nn.BatchNorm2d(2), nn.Tanh(), *deep(4))
    )
    found = fxfuse.bisect(model, lambda fused: "2" not in folded(fused))
    assert {*found.culprits} == {"1", "2"}


def test_constants_are_folds_too():
    class Scaled(nn.Module):
        def forward(self, x):
            return 3 * x

    model = nn.Sequential(*deep(4), nn.Conv2d(2, 2, 1), Scaled())
    found = fxfuse.bisect(model.eval(), lambda fused: not fxfuse.report(fused).constants)
    assert found.culprits == ("mul",)


def test_without_a_failure_there_are_no_culprits():
    found = fxfuse.bisect(deep(5), example_inputs=(X,))
    assert found.culprits == () and found.checks == 1
    assert str(found) == "the check passes with all folds (folds: 5, checks: 1)"


def test_wrong_use_is_told():
    with pytest.raises(
        fxfuse.UsageError, match=r"nothing to judge a fold by; pass check=... or example_inputs="
    ):
        fxfuse.bisect(deep(3))
    with pytest.raises(fxfuse.UsageError, match="fails with nothing folded, so no fold can be at fault"):
        fxfuse.bisect(deep(3), lambda _: False)


class InterruptedError(Exception):
    pass


def test_a_search_goes_on_where_it_was_interrupted(tmp_path):
    state, model, made = tmp_path / "state.json", deep(), []

    def check(fused, stop=7):
        if len(made) == stop:
            raise InterruptedError
        made.append(folded(fused))
        return "100.bn" not in made[-1]

    with pytest.raises(InterruptedError):
        fxfuse.bisect(model, check, state=state)
    made.append("interrupted")
    suspects = []
    found = fxfuse.bisect(
        model, check, state=state, progress=lambda folds, checks: suspects.append((folds, checks))
    )
    assert found.culprits == ("100.bn",) and found.checks == len(made) - 1
    assert suspects[0][1] == 7 and min(folds for folds, _ in suspects) == 1
    assert not state.exists()


def judging(tolerance, factor=1.0):
    """A check as it is written in a file, of which numbers are edited."""
    names = {"__name__": "checks"}
    exec(f"def check(fused, factor={factor}):\n return factor * 1e-6 <= max({tolerance}, 0)", names)
    return names["check"]


def test_a_check_of_which_a_number_was_edited_is_another_one():
    asked = [
        question(deep(3), judging(*numbers), (X,), [])
        for numbers in ((1e-12,), (1e-12,), (1e-2,), (1e-12, 2.0))
    ]
    assert asked[0] == asked[1] and asked[2] != asked[0] != asked[3]


def test_a_state_of_another_search_is_not_used(tmp_path):
    state, first = tmp_path / "state.json", iter([None])
    wrong = {"1.bn"}

    def check(fused):
        return not wrong & folded(fused)

    def other(fused):
        return not wrong & folded(fused) or True

    with pytest.raises(StopIteration):
        fxfuse.bisect(deep(3), check, state=state, progress=lambda *_: next(first))
    changed, renamed = deep(3), deep(3)
    with torch.no_grad():
        changed[1].bn.running_mean[0] += 1
    renamed[1].bn.eps = 1e-2
    searches = [(deep(4), check, X), (changed, check, X), (renamed, check, X), (deep(3), check, X + 1)]
    searches += [(deep(3), each, X) for each in (other, None)]
    for model, judge, x in searches:
        with pytest.raises(
            fxfuse.UsageError, match=r"state.json is the state of another bisection: .*remove it"
        ):
            fxfuse.bisect(model, judge, example_inputs=(x,), state=state)
    state.write_text("[]")
    with pytest.raises(fxfuse.UsageError, match="is no state of a bisection"):
        fxfuse.bisect(deep(3), check, state=state)


def test_a_check_gets_the_folds_that_example_inputs_allow():
    model = randomise(nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4)))
    x = torch.randn(5, 3, dtype=torch.float64)
    assert fxfuse.bisect(model, lambda fused: "1" not in folded(fused), example_inputs=(x,)).culprits == (
        "1",
    )


MODULE = """
import sys
sys.path.insert(0, {root!r})
import pytest
from tests.test_culprits import deep, spoil

WRONG = {wrong!r}


def factory():
    if WRONG:
        spoil(pytest.MonkeyPatch(), set(WRONG), factor=2.0)
        WRONG.clear()
    return deep(12)
"""


@pytest.fixture
def commanded(tmp_path):
    """Runs Python in a process of its own, in which a model is folded wrongly."""
    root = Path(__file__).parents[1]

    def run(*arguments, wrong=("5.bn",)):
        (tmp_path / "made_wrong.py").write_text(MODULE.format(root=str(root), wrong={*wrong}))
        return subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )

    return run


BISECT = ("-m", "fxfuse", "bisect", "made_wrong:factory", "--input", "2,2,3,3")


@pytest.mark.parametrize("options", [[], ["--tolerance", "1e-3"]])
def test_the_command_names_the_culprit_and_leaves_a_script_that_shows_it(options, commanded):
    done = commanded(*BISECT, *options)
    assert done.returncode == 0, done.stderr
    assert "the check fails with these folds alone (folds: 12," in done.stdout and "\n  5.bn\n" in done.stdout
    assert "fxfuse.fuse(model, leave=['5.bn'])" in done.stdout
    assert "check 1: 12 folds" in done.stderr
    shown = commanded("fxfuse-bisect.py")
    assert shown.returncode == 1 and "passed" not in shown.stdout, shown.stdout
    mended = commanded("fxfuse-bisect.py", wrong=())
    assert mended.returncode == 0 and mended.stdout == "passed\n", mended.stderr
    assert commanded(*BISECT, *options).stdout == done.stdout


@pytest.mark.filterwarnings(EXPORT_WARNING)
def test_any_command_can_be_the_check(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("check.py").write_text(
        "import os, sys, zipfile\n"
        "assert sys.argv[1] == os.environ['FXFUSE_MODEL']\n"
        "archive = zipfile.ZipFile(sys.argv[1])\n"
        "sys.exit(not any(b'2.bn.running_mean' in archive.read(name) for name in archive.namelist()))\n"
    )
    Path("made_to_search.py").write_text(MODULE.format(root=str(Path(__file__).parents[1]), wrong=set()))
    command = f"{sys.executable} check.py {{}}"
    options = ["made_to_search:factory", "--input", "2,2,3,3", "--check", command]
    result = CliRunner().invoke(cli.main, ["bisect", *options])
    assert result.exit_code == 0 and "\n  2.bn\n" in result.stdout, result.output
    assert not Path("fxfuse-bisect.json").exists()
    assert f"criteria.CommandPasses({command!r}, inputs)" in Path("fxfuse-bisect.py").read_text()
    missing = ["--check", "no-such-program {}", "--state", "other.json"]
    result = CliRunner().invoke(cli.main, ["bisect", *options[:3], *missing])
    assert result.exit_code == 2 and "'no-such-program {}' did not run (exit code 127)" in result.stderr
    result = CliRunner().invoke(cli.main, ["bisect", *options, "--tolerance", "1"])
    assert result.exit_code == 2 and "use one of them" in result.stderr
    result = CliRunner().invoke(cli.main, ["bisect", "made_to_search:factory"])
    assert result.exit_code == 2 and "say which with --input" in result.stderr
