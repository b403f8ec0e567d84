"""The command line: what it prints, what it writes, and how it ends."""

import json
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from torch import nn

import fxfuse
from fxfuse import cli, zoo
from tests.forms import EXPORT_WARNING
from tests.support import randomise

FACTORY = """
import torch
from torch import nn

def network():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.BatchNorm2d(4))
    for norm in (model[1], model[3]):
        norm.running_mean.uniform_(-1, 1)
        norm.running_var.uniform_(0.5, 2)
    return model

def untraceable():
    class Branches(nn.Module):
        def forward(self, x):
            return x if x.sum() > 0 else -x
    return Branches()

def text():
    return "no module"
"""


@pytest.fixture
def run(tmp_path, monkeypatch):
    (tmp_path / "made_here.py").write_text(FACTORY)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    monkeypatch.delitem(sys.modules, "made_here", raising=False)

    def invoke(*arguments):
        with warnings.catch_warnings():
            return CliRunner().invoke(cli.main, arguments)

    return invoke


def test_fuse_says_what_became_of_every_norm_and_verifies(run):
    result = run("fuse", "made_here:network", "--input", "2,3,8,8")
    assert result.exit_code == 0, result.output
    assert "1 of 2 norms folded" in result.stdout
    assert "FXF102" in result.stdout and "ReLU" in result.stdout
    assert "equal but for rounding" in result.stdout


def test_fuse_without_a_known_input_says_that_it_did_not_verify(run):
    result = run("fuse", "made_here:network")
    assert result.exit_code == 0 and "not verified" in result.stdout


def test_json_is_complete_and_strict(run):
    result = run("fuse", "made_here:network", "--input", "2,3,8,8", "--json", "-")
    record = json.loads(result.stdout, parse_constant=pytest.fail)
    assert record["report"]["norms"] == 2
    assert [(fold["norm"], fold["into"]) for fold in record["report"]["folded"]] == [("1", ["0"])]
    assert {"norm", "code", "reason", "hint", "where"} == set(record["report"]["refused"][0])
    assert record["report"]["verification"]["ok"] is True
    assert run("explain", "made_here:network", "--json", "r.json").exit_code == 0
    assert json.loads(Path("r.json").read_text())["report"]["schema"] == 2


def test_a_folded_model_can_be_written_loaded_and_verified_for_any_batch_size(run):
    assert run("fuse", "made_here:network", "--input", "1,3,8,8", "-o", "folded.pt2").exit_code == 0
    result = run("verify", "made_here:network", "folded.pt2", "--input", "5,3,8,8")
    assert result.exit_code == 0 and "equal but for rounding" in result.stdout, result.output
    result = run("explain", "folded.pt2")
    assert "0 of 1 norms folded" in result.stdout  # the one after the ReLU
    assert sorted(path.name for path in Path.cwd().glob("*.pt2")) == ["folded.pt2"]


@pytest.mark.filterwarnings(EXPORT_WARNING)
@pytest.mark.parametrize("decomposed", [False, True])
def test_an_exported_program_is_folded_into_an_exported_program(run, decomposed):
    model, x = (
        randomise(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4))).float(),
        torch.randn(2, 3, 8, 8),
    )
    program = torch.export.export(model, (x,), dynamic_shapes=({0: torch.export.Dim.AUTO},))
    torch.export.save(program.run_decompositions() if decomposed else program, "model.pt2")
    result = run("fuse", "model.pt2", "-o", "folded.pt2", "--json", "r.json")
    assert result.exit_code == 0, result.output
    record = json.loads(Path("r.json").read_text())
    assert [(fold["norm"], fold["into"]) for fold in record["report"]["folded"]] == [("1", ["0"])]
    assert record["report"]["verification"]["ok"] is True
    folded = torch.export.load("folded.pt2")
    assert {*folded.state_dict} == {"0.weight", "0.bias"}
    y = torch.randn(5, 3, 8, 8)
    torch.testing.assert_close(folded.module()(y), model(y))
    result = run("verify", "model.pt2", "folded.pt2", "--input", "7,3,8,8")
    assert result.exit_code == 0 and "equal but for rounding" in result.stdout, result.output
    assert "the shapes of the source" in run("fuse", "model.pt2", "-o", "again.pt2").stdout
    result = run("fuse", "model.pt2", "-o", "model.pt2")
    assert result.exit_code == 2 and "it is the same file as model.pt2, which would be lost" in result.output
    result = run("fuse", "absent.pt2", "-o", "folded.pt2")
    assert result.exit_code == 2 and "there is no file absent.pt2" in result.output


def test_verification_that_fails_ends_with_1(run):
    assert run("fuse", "made_here:network", "--input", "1,3,8,8", "-o", "folded.pt2").exit_code == 0
    program = torch.export.load("folded.pt2")
    next(iter(program.state_dict.values())).data.mul_(1.01)
    torch.export.save(program, "wrong.pt2")
    result = run("verify", "made_here:network", "wrong.pt2", "--input", "2,3,8,8")
    assert result.exit_code == 1 and "NOT equal" in result.stdout


def test_fuse_of_a_model_that_cannot_be_traced_says_why_and_verifies(run):
    result = run("fuse", "made_here:untraceable", "--input", "1,3,8,8")
    assert result.exit_code == 0, result.output
    assert "the modules were kept" in result.stdout and "return x if x.sum() > 0 else -x" in result.stdout
    assert "equal but for rounding" in result.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("fuse", "resnet18"), "use torchvision:NAME, timm:NAME"),
        (("fuse", "torchvision:resnet81"), "nearest: resnet"),
        (("fuse", "timm:efficientnetb0"), "nearest: efficientnet"),
        (("fuse", "no_such_module:x"), "cannot load no_such_module:x"),
        (("fuse", "made_here:missing"), "no attribute 'missing'"),
        (("fuse", "made_here:text"), "gave a str, not a torch.nn.Module"),
        (
            ("fuse", "made_here:untraceable", "--input", "1,3,8,8", "-o", "folded.pt2"),
            "torch.export cannot write it",
        ),
        (("fuse", "absent.pt2"), "there is no file absent.pt2"),
        (("fuse", "damaged.pt2"), "not a zip archive"),
        (("fuse", "made_here:network", "--input", "1,3,x"), "'1,3,x' is no shape"),
        (("fuse", "made_here:network", "--input", "1,5,8,8"), "rejects the example inputs (1, 5, 8, 8)"),
        (("fuse", "made_here:network", "-o", "folded.pt2"), "say which with --input"),
        (("fuse", "made_here:network", "-o", "nowhere/folded.pt2"), "cannot write nowhere/folded.pt2"),
        (("explain", "made_here:network", "--json", "nowhere/r.json"), "cannot write nowhere/r.json"),
        (("verify", "made_here:network"), "no input is known"),
        (("list", "no such name"), "no model has 'no such name'"),
    ],
)
def test_wrong_use_ends_with_2_and_a_message(run, arguments, said):
    Path("damaged.pt2").write_text("PK")
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr and "Traceback" not in result.stderr
    assert not Path("folded.pt2").exists()


def test_an_unwritable_output_is_told_before_the_work(run, monkeypatch):
    monkeypatch.setattr(zoo, "load", lambda *_, **__: pytest.fail("the model was loaded first"))
    assert run("fuse", "torchvision:resnet18", "-o", "nowhere/x.pt2").exit_code == 2


def test_list_gives_the_names_that_load_takes(run):
    result = run("list", "regnety_00")
    assert "timm:regnety_002" in result.stdout.splitlines()
    assert all("regnety_00" in line for line in result.stdout.splitlines())


def test_random_weights_and_statistics_are_announced(run):
    result = run("explain", "torchvision:resnet18")
    assert "random weights and random statistics" in result.stdout
    assert "20 of 20 norms folded" in result.stdout


def test_the_demonstration_recognises_the_cat_before_and_after(run):
    result = run("demo")
    assert result.exit_code == 0, result.output
    first = next(line for line in result.stdout.splitlines() if "guess 1" in line)
    assert first.count("285 Egyptian cat") == 2 and first.count("0.78") + first.count("0.79") == 2
    executed = next(line for line in result.stdout.splitlines() if "norms executed" in line)
    assert [cell.strip() for cell in executed.split("│")[2:4]] == ["49", "0"]


def test_python_m_fxfuse_is_the_command():
    shown = subprocess.run(
        [sys.executable, "-m", "fxfuse", "--version"], capture_output=True, text=True, check=True
    )
    assert fxfuse.__version__ in shown.stdout


def test_nothing_of_the_progress_bar_reaches_a_pipe():
    command = [
        sys.executable,
        "-W",
        "ignore",
        "-m",
        "fxfuse",
        "explain",
        "torchvision:alexnet",
        "--json",
        "-",
    ]
    shown = subprocess.run(command, capture_output=True, text=True, check=True)
    assert json.loads(shown.stdout)["report"]["norms"] == 0
    assert "loading" not in shown.stderr and "━" not in shown.stderr


def test_markup_in_names_is_printed_and_not_interpreted(run, monkeypatch):
    model = nn.ModuleDict({"[bold]a": nn.BatchNorm2d(3)})
    monkeypatch.setattr(type(model), "forward", lambda self, x: self["[bold]a"](x), raising=False)
    loaded = zoo.Loaded(model.eval(), "its own", None)
    monkeypatch.setattr(zoo, "load", lambda *_, **__: loaded)
    result = run("explain", "made_here:network")
    assert "[bold]a" in result.stdout
