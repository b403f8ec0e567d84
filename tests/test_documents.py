"""What README and documentation show runs, and gives what they show.

The ``python`` blocks of a page are one program; a ``text`` block right behind one is what it prints. Lines of
``console`` blocks that begin with ``$`` are commands, the others what they print. Numbers may differ by two
percent, and ``...`` stands for anything.
"""

from __future__ import annotations

import contextlib
import io
import math
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from markdown_it import MarkdownIt

ROOT = Path(__file__).parents[1]
_MADE = {"results", "decisions", "_build"}
DOCS = sorted(page for page in (ROOT / "docs").rglob("*.md") if not _MADE & {*page.parts})
PAGES = [ROOT / "README.md", *DOCS]
NUMBER = r"[-+]?\d+(?:\.\d+)?(?:e[-+]?\d+)?"
_BLOCK = "==== block {} ===="


def _name(page):
    return str(page.relative_to(ROOT))


def fences(page):
    return [token for token in MarkdownIt().parse(page.read_text()) if token.type == "fence"]


def programs(page):
    """The python blocks, with what each is said to print; None if nothing is said."""
    found, end = [], None
    for token in fences(page):
        if token.info == "python":
            found.append([token.content, None])
        elif token.info == "text" and found and _only_blank(page, end, token.map[0]):
            found[-1][1] = token.content
        end = token.map[1] if token.info == "python" else None
    return found


def _only_blank(page, end, start):
    return end is not None and not "".join(page.read_text().splitlines()[end:start]).strip()


def commands(page):
    """The commands of the console blocks, with what each is said to print."""
    found = []
    for token in fences(page):
        for line in token.content.splitlines() if token.info == "console" else ():
            if line.startswith("$ "):
                found.append([line[2:].partition("  #")[0], ""])
            else:
                found[-1][1] += f"{line}\n"
    return found


def shows(expected, found):
    """Whether `found` is what a page shows."""
    pieces = re.split(rf"(\.\.\.|{NUMBER}|\s+)", expected.strip())
    numbers = [piece for piece in pieces if re.fullmatch(NUMBER, piece)]
    pattern = "".join(
        ".*?"
        if piece == "..."
        else rf"({NUMBER})"
        if re.fullmatch(NUMBER, piece)
        else r"\s+"
        if piece.isspace()
        else re.escape(piece)
        for piece in pieces
    )
    match = re.fullmatch(pattern, found.strip(), re.DOTALL)
    if match is None:
        return False
    return all(map(_is_near, numbers, match.groups()))


def _is_near(expected, found):
    if expected.isdigit() and found.isdigit():
        return expected == found
    return math.isclose(float(expected), float(found), rel_tol=0.02)


@pytest.mark.filterwarnings("ignore")  # of torch's compilers and exporters
@pytest.mark.parametrize("page", [page for page in PAGES if programs(page)], ids=_name)
def test_code_runs_and_prints_what_is_shown(page, tmp_path, monkeypatch):
    blocks = programs(page)
    script = tmp_path / f"{page.stem.replace('-', '_')}_page.py"
    marked = (f"print({_BLOCK.format(n)!r})\n{code}" for n, (code, _) in enumerate(blocks))
    script.write_text("\n".join(marked))
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])
    torch.compiler.reset()
    with contextlib.redirect_stdout(io.StringIO()) as stdout:
        runpy.run_path(str(script), run_name="page")
    rest = stdout.getvalue()
    for number, (code, expected) in reversed([*enumerate(blocks)]):
        rest, _, printed = rest.rpartition(f"{_BLOCK.format(number)}\n")
        if expected is not None:
            assert shows(expected, printed), f"{code}\nprinted:\n{printed}\nshown:\n{expected}"


@pytest.mark.parametrize("page", [page for page in PAGES if commands(page)], ids=_name)
def test_commands_run_and_print_what_is_shown(page, tmp_path):
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    settings = os.environ | {"PATH": path, "NO_COLOR": "1", "COLUMNS": "110", "OMP_NUM_THREADS": "1"}
    for command, expected in commands(page):
        if command.startswith("make "):
            assert f"\n{command.split()[1]}:" in (ROOT / "Makefile").read_text()
            continue
        done = subprocess.run(
            command, shell=True, cwd=tmp_path, env=settings, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}\n{done.stderr}"
        assert not expected or shows(expected, done.stdout), f"{command}\nprinted:\n{done.stdout}"


def test_every_page_is_in_the_documentation():
    listed = (ROOT / "docs" / "index.md").read_text()
    for page in DOCS:
        name = page.relative_to(ROOT / "docs").with_suffix("").as_posix()
        assert name == "index" or re.search(rf"^{name}$", listed, re.MULTILINE), name


@pytest.mark.parametrize(
    ("shown", "printed", "same"),
    [
        ("20 of 20 folded", "20 of 20 folded\n", True),
        ("20 of 20 folded", "20 of 21 folded", False),
        ("error 0.0312", "error 0.0311", True),
        ("error 0.0312", "error 0.0412", False),
        ("error 2.1e-07", "error 9.9e-07", False),
        ("a\n...\nb", "a\nany\nthing\nb", True),
        ("a\n...\nb", "a\nany\nthing", False),
        ("True", "False", False),
        ("a  b", "a b", True),
    ],
)
def test_what_is_shown_is_compared(shown, printed, same):
    assert shows(shown, printed) == same
