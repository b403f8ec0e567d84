"""What the codes mean: an example gives each code, and its mend folds the norm; how it is printed."""

import contextlib
import io
import re
import runpy

import pytest
from click.testing import CliRunner
from rich.console import Console
from torch import nn

import fxfuse
from fxfuse import cli, render
from fxfuse.explanations import section
from fxfuse.refusals import Code
from tests.forms import EXPORT_WARNING

ALL = [code.value.code for code in Code]
BRANCHES = [code for code in ALL if code.startswith("FXF7")]
CODES = [code for code in ALL if code not in BRANCHES]
# There is no other way to write these.
NO_MEND = {"FXF101", "FXF702", "FXF705"}
# What else an example shows: this code is about the norm before, which is left for a reason of its own.
BESIDES = {"FXF107": {"FXF102"}}


def examples(code):
    return re.findall(r"^```python\n(.*?)^```$", section(code), re.MULTILINE | re.DOTALL)


def printed(source, tmp_path):
    script = tmp_path / "example.py"
    script.write_text(source)
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        runpy.run_path(str(script))
    return stdout.getvalue()


@pytest.mark.filterwarnings(EXPORT_WARNING)
@pytest.mark.parametrize("code", CODES)
def test_example_gives_its_code_and_no_other(code, tmp_path):
    example, *_ = examples(code)
    shown = printed(example, tmp_path)
    assert {*re.findall(r"^  left .*  (FXF\d{3}): ", shown, re.MULTILINE)} == {code} | BESIDES.get(
        code, set()
    )
    assert ": 0 of " in shown


@pytest.mark.filterwarnings(EXPORT_WARNING)
@pytest.mark.parametrize("code", [code for code in CODES if code not in NO_MEND])
def test_mended_example_folds_every_norm(code, tmp_path):
    example, mended = examples(code)
    shown = printed(example + mended, tmp_path).removeprefix(printed(example, tmp_path))
    assert re.match(r"\w+: ([1-9]) of \1 norms folded\b", shown), shown


@pytest.mark.parametrize("code", BRANCHES)
def test_example_of_branches_gives_its_code_and_no_other(code, tmp_path):
    shown = printed(examples(code)[0], tmp_path)
    assert re.findall(r"^  apart .*  (FXF\d{3}): ", shown, re.MULTILINE) == [code]
    assert "merged" not in shown


@pytest.mark.parametrize("code", [code for code in BRANCHES if code not in NO_MEND])
def test_mended_example_of_branches_is_one_operator(code, tmp_path):
    example, mended = examples(code)
    shown = printed(example + mended, tmp_path).removeprefix(printed(example, tmp_path))
    assert "1 operator does what several did" in shown and "apart" not in shown


@pytest.mark.parametrize("code", ALL)
def test_section_says_what_to_do(code):
    meaning, advice = section(code).split("\nWhat to do: ")
    assert meaning.index("```python") > 50 and len(advice) > 8
    assert len(examples(code)) == (1 if code in NO_MEND else 2)


class Chosen(nn.Module):
    """Modules are kept because forward takes an option, not because the caller asked for it."""

    def __init__(self, *, shared):
        super().__init__()
        self.one, self.norm = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)
        self.two = self.one if shared else nn.Conv2d(3, 4, 3)

    def forward(self, x, rectify=False):
        y = self.norm(self.one(x)) + self.two(x)
        return y.relu() if rectify else y


def test_hint_holds_where_options_of_forward_keep_the_modules():
    (left,) = fxfuse.explain(Chosen(shared=True).eval()).refused
    hint = "leave out keep_modules=True if it was given, or give each call a module of its own"
    assert (left.code, left.hint) == ("FXF501", hint)
    assert len(fxfuse.explain(Chosen(shared=False).eval()).folded) == 1


def run(*arguments):
    return CliRunner().invoke(cli.main, ["explain", *arguments])


@pytest.mark.parametrize("asked", ["FXF103", "fxf103", "103"])
def test_a_code_is_explained_with_its_reason_its_example_and_what_to_do(asked):
    result = run(asked)
    assert result.exit_code == 0 and not result.stderr
    assert result.stdout == f"# FXF103: {Code.NOTHING_BEFORE.value.reason}\n\n{section('FXF103')}"


def test_sections_end_where_the_next_begins():
    for code in ALL:
        assert "\n#" not in section(code) and len(section(code)) > 300
    assert section("FXF112").endswith("```\n")  # the last one of its chapter


@pytest.mark.parametrize("beginning", ["FXF", "FXF3", "fxf30"])
def test_the_beginning_of_codes_lists_these_in_one_line_each(beginning):
    reasons = {code.value.code: code.value.reason for code in Code}
    shown = run(beginning).stdout.splitlines()
    assert shown == [f"- {code}: {reasons[code]}" for code in ALL if code.startswith(beginning.upper())]
    assert shown


@pytest.mark.parametrize("unknown", ["FXF190", "190", "fxf190"])
def test_unknown_code_ends_with_2_and_names_the_nearest(unknown):
    result = run(unknown)
    assert result.exit_code == 2 and not result.stdout
    near = r"FXF20\d, FXF20\d, FXF20\d"
    message = rf"Error: there is no code FXF190; nearest: {near}; fxfuse explain FXF lists all of them\n"
    assert re.fullmatch(message, result.stderr)


@pytest.mark.parametrize("options", [("--json", "-"), ("--input", "1,3,8,8")])
def test_options_that_belong_to_models_are_not_ignored(options):
    result = run("FXF103", *options)
    assert result.exit_code == 2 and "FXF103 is a code and no model" in result.stderr


def test_a_terminal_gets_no_markdown_marks(monkeypatch, capsys):
    monkeypatch.setattr(Console, "is_terminal", True)
    render.show_markdown("# FXF1: a _reason_\n\n```python\nprint(1)\n```\n")
    shown = re.sub(r"\x1b\[[0-9;]*m", "", capsys.readouterr().out)
    assert "FXF1: a reason" in shown and "print(1)" in shown
    assert not {"#", "`", "_"} & {*shown}


def test_report_names_the_command_where_norms_are_left_and_only_there(capsys):
    for model, line in (
        (nn.Sequential(nn.ReLU(), nn.BatchNorm2d(3), nn.BatchNorm2d(3)), "fxfuse explain FXF102 says more"),
        (nn.Sequential(nn.Conv2d(3, 3, 1), nn.BatchNorm2d(3)), "1 of 1 norms folded"),
    ):
        render.show(render.report_view(fxfuse.explain(model.eval())))
        assert capsys.readouterr().out.splitlines()[-1] == line
