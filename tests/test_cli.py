"""The command line: what it prints, what it writes, and how it ends."""

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import pytest
import safetensors.torch
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
    assert json.loads(Path("r.json").read_text())["report"]["schema"] == 4


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


def test_two_outputs_do_not_go_to_one_file(run):
    result = run("fuse", "made_here:network", "--input", "2,3,8,8", "-o", "a.pt2", "--json", "./a.pt2")
    assert result.exit_code == 2 and "another output goes to the same file, a.pt2" in result.stderr
    assert not Path("a.pt2").exists()


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
        (("list", "no such name"), "has 'no such name' in its name"),
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


HOSTILE = "[red]a[/]\x1b[31m\r\n9 of 9 norms folded\u202e:cat:"
SHOWN = r"[red]a[/]\x1b[31m\r\n9 of 9 norms folded\u202e:cat:"


def obeyed(text):
    """The lines of `text` that a name forges, and the characters in it that a terminal obeys."""
    forged = [line for line in text.splitlines() if line.startswith("9 of 9")]
    return forged + [c for c in text if not c.isprintable() and c != "\n"]


def test_markup_and_control_characters_in_names_are_printed_and_not_obeyed(run, monkeypatch):
    model = type(HOSTILE, (nn.ModuleDict,), {"forward": lambda self, x: self[HOSTILE](x)})
    model = model({HOSTILE: nn.BatchNorm2d(3)}).eval()
    loaded = zoo.Loaded(model, HOSTILE, (torch.randn(1, 3, 4, 4),))
    monkeypatch.setattr(zoo, "load", lambda *_, **__: loaded)
    for command in ("explain", "fuse", "verify"):
        result = run(command, HOSTILE)
        assert result.exit_code == 0, result.output
        assert result.stdout.startswith(f"{SHOWN}: {SHOWN}\n")
        assert command == "verify" or result.stdout.count(SHOWN) > 3
        assert obeyed(result.output) == []


@pytest.mark.usefixtures("run")
def test_layer_names_cannot_become_code():
    """torch.fx puts names between quotation marks as they are."""
    name = '" + str(exec("open(chr(112), chr(119))")) + "'
    model = type("Named", (nn.ModuleDict,), {"forward": lambda self, x: self[name](x)})
    model, x = model({name: nn.BatchNorm2d(3)}).eval(), torch.randn(1, 3, 4, 4)
    fused = fxfuse.fuse(model)
    assert "would not stay a name in generated code" in fxfuse.report(fused).notes[0]
    assert torch.equal(fused(x), model(x)) and not Path("p").exists()


@pytest.mark.parametrize(
    "arguments",
    [
        ("explain", HOSTILE),
        ("explain", f"{HOSTILE}.pt2"),
        ("explain", "made_here:network", HOSTILE),
        ("explain", "made_here:network", "--weights", f"{HOSTILE}.pt"),
        ("explain", "made_here:network", "--json", f"{HOSTILE}/r.json"),
        ("explain", "made_here:hostile"),
        ("list", HOSTILE),
    ],
)
def test_errors_print_names_and_do_not_obey_them(run, arguments):
    made = f"\ndef hostile():\n    raise ValueError({HOSTILE!r})\n"
    Path("made_here.py").write_text(FACTORY + made)
    result = run(*arguments)
    assert result.exit_code == 2 and r"\x1b[31m" in result.stderr
    assert obeyed(result.output) == []


@pytest.fixture
def program(run):
    """The bytes of a program that was folded."""
    assert run("fuse", "made_here:network", "--input", "2,3,8,8", "-o", "folded.pt2").exit_code == 0
    return Path("folded.pt2").read_bytes()


def test_a_damaged_program_ends_with_2_and_leaves_no_output(run, program):
    for content in (program[: len(program) // 2], program.replace(b"aten.conv2d", b"aten.conv3d"), b""):
        Path("damaged.pt2").write_bytes(content)
        for arguments in (
            ("fuse", "damaged.pt2", "-o", "new.pt2", "--json", "new.json"),
            ("explain", "damaged.pt2"),
            ("verify", "made_here:network", "damaged.pt2", "--input", "2,3,8,8"),
        ):
            result = run(*arguments)
            assert result.exit_code == 2, result.output
            assert "damaged.pt2 is damaged" in result.stderr and "Traceback" not in result.output
    assert sorted(path.suffix for path in Path.cwd().iterdir() if path.is_file()) == [".pt2", ".pt2", ".py"]


def test_weights_come_from_a_file(run):
    made = zoo.load("made_here:network").model
    tensors = {name: value * 2 for name, value in made.state_dict().items()}
    safetensors.torch.save_file(tensors, "w.safetensors")
    torch.save({"state_dict": tensors}, "w.pth")
    arguments = ("fuse", "made_here:network", "--input", "2,3,8,8", "--weights", "w.safetensors")
    result = run(*arguments, "-o", "folded.pt2")
    assert result.exit_code == 0 and "made_here:network: from w.safetensors" in result.stdout, result.output
    arguments = ("verify", "made_here:network", "folded.pt2", "--input", "2,3,8,8")
    assert run(*arguments, "--weights", "w.pth").exit_code == 0
    assert run(*arguments).exit_code == 1
    assert "from w.pth" in run("explain", "made_here:network", "--weights", "w.pth").stdout


@pytest.mark.usefixtures("run")
def test_weights_of_a_name_replace_random_ones():
    tensors = zoo.load("torchvision:resnet18", seed=3).model.state_dict()
    safetensors.torch.save_file(tensors, "w.safetensors")
    loaded = zoo.load("torchvision:resnet18", weights=Path("w.safetensors"))
    assert loaded.weights == "from w.safetensors"
    assert all(torch.equal(value, tensors[name]) for name, value in loaded.model.state_dict().items())


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("explain", "folded.pt2", "--weights", "w.pt"), "folded.pt2 has its own weights"),
        (("explain", "made_here:network", "--weights", "absent.pt"), "there is no file absent.pt"),
        (
            ("fuse", "made_here:network", "--weights", "w.pt"),
            "w.pt does not fit Sequential: 10 missing: 0.weight",
        ),
        (("fuse", "folded.pt2", "-o", "link.pt2"), "it is the same file as folded.pt2"),
        (("fuse", "folded.pt2", "--json", "folded.pt2"), "it is the same file as folded.pt2"),
        (
            ("explain", "made_here:network", "--weights", "w.pt", "--json", "w.pt"),
            "it is the same file as w.pt",
        ),
        (
            ("verify", "made_here:network", "folded.pt2", "--json", "folded.pt2"),
            "the same file as folded.pt2",
        ),
        (("fuse", "absent.pt2", "-o", "absent.pt2"), "there is no file absent.pt2"),
        (("fuse", "folded.pt2", "-o", "/proc/new.pt2"), "cannot write /proc/new.pt2"),
    ],
)
def test_files_that_do_not_fit_end_with_2_and_are_what_they_were(run, program, arguments, said):
    torch.save({}, "w.pt")
    Path("link.pt2").symlink_to("folded.pt2")
    result = run(*arguments)
    assert result.exit_code == 2, result.output
    assert said in result.stderr
    assert Path("folded.pt2").read_bytes() == program


def test_suffixes_may_be_capitals(run, program):
    Path("M.PT2").write_bytes(program)
    assert run("fuse", "M.PT2", "-o", "N.PT2").exit_code == 0
    assert "0 of 1 norms folded" in run("explain", "N.PT2").stdout


def test_a_model_without_norms_is_said_to_have_none(run):
    for command in ("explain", "fuse", "verify"):
        result = run(command, "torchvision:alexnet")
        assert "there are no norms to fold" in result.stdout and "0 of 0" not in result.stdout


@pytest.mark.usefixtures("run")
def test_a_disk_that_is_full_ends_with_2_and_leaves_nothing():
    """Each file may have four kilobytes, which torch alone answers by ending the process."""
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096)); "
    command = "from fxfuse.cli import main; main()"
    arguments = ["fuse", "made_here:network", "--input", "2,3,8,8", "-o", "new.pt2"]
    ended = subprocess.run(
        [sys.executable, "-B", "-W", "ignore", "-c", limited + command, *arguments],
        capture_output=True,
        text=True,
        check=False,
    )
    assert ended.returncode == 2 and ended.stderr.startswith("Error: cannot write new.pt2: File too large")
    assert [path.name for path in Path.cwd().iterdir()] == ["made_here.py"]


@pytest.mark.parametrize("verb", ["fuse", "explain", "verify", "bisect"])
def test_the_last_line_repeats_the_run(run, verb):
    words = [verb, "made_here:network", "--input", "2,3,8,8", "--seed", "3"]
    first = run(*words)
    assert first.exit_code == 0, first.output
    *_, last = first.stdout.splitlines()
    assert last == f"again: fxfuse {' '.join(words)}"
    again = run(*shlex.split(last)[2:])
    assert [line for line in again.stdout.splitlines() if "error" not in line] == [
        line for line in first.stdout.splitlines() if "error" not in line
    ]


def test_words_with_spaces_are_quoted_in_the_last_line(run):
    result = run("explain", "made_here:network", "--html", "a report.html")
    assert result.stdout.splitlines()[-1] == "again: fxfuse explain made_here:network --html 'a report.html'"


def test_json_on_stdout_is_nothing_but_json(run):
    assert "again" not in run("explain", "made_here:network", "--json", "-").stdout


def test_an_interrupted_run_leaves_nothing(tmp_path):
    slow = """
def slow():
    import signal, time
    signal.signal(signal.SIGINT, signal.default_int_handler)  # shells have what runs behind them ignore it
    open('begun', 'w').close()
    time.sleep(60)
"""
    (tmp_path / "made_here.py").write_text(FACTORY + slow)
    words = [sys.executable, "-m", "fxfuse", "fuse", "made_here:slow", "-o", "folded.pt2"]
    with subprocess.Popen(words, cwd=tmp_path, stderr=subprocess.PIPE, text=True) as running:
        for _ in range(600):
            if (tmp_path / "begun").exists():
                break
            time.sleep(0.1)
        running.send_signal(signal.SIGINT)
        _, told = running.communicate(timeout=60)
    assert running.returncode == 130 and "Interrupted" in told and "Traceback" not in told
    assert {path.name for path in tmp_path.iterdir()} <= {"made_here.py", "begun", "__pycache__"}


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_shells_can_complete_the_commands(shell):
    settings = os.environ | {"_FXFUSE_COMPLETE": f"{shell}_source"}
    command = str(Path(sys.executable).parent / "fxfuse")
    done = subprocess.run([command], env=settings, capture_output=True, text=True, check=True)
    assert "_FXFUSE_COMPLETE" in done.stdout


def test_no_colour_where_none_is_wanted(run, monkeypatch):
    monkeypatch.setenv("NO_COLOR", "1")
    monkeypatch.setenv("FORCE_COLOR", "1")
    shown = run("explain", "made_here:network").stdout
    assert "\x1b[" in shown and not re.search(r"\x1b\[[\d;]*[349]\dm", shown)
