"""The documentation says what the code does."""

import re
from pathlib import Path

import fxfuse
from fxfuse.refusals import Code

ROOT = Path(__file__).parents[1]


def test_every_refusal_code_is_documented_once_and_no_other():
    documented = re.findall(r"^### (.*)$", (ROOT / "fxfuse" / "refusals.md").read_text(), re.MULTILINE)
    assert documented == sorted(f"{code.value.code}: {code.value.reason}" for code in Code)


def test_every_refusal_code_has_a_reason_and_a_hint_of_one_line():
    for code in Code:
        assert code.value.reason and code.value.hint
        assert "\n" not in code.value.reason + code.value.hint


def test_everything_public_has_a_docstring():
    for name in fxfuse.__all__:
        assert name == "__version__" or getattr(fxfuse, name).__doc__


def test_decisions_are_short_records():
    for record in {*(ROOT / "docs" / "decisions").glob("*.md")} - {ROOT / "docs" / "decisions" / "index.md"}:
        assert re.match(r"\d{4}-[a-z0-9-]+\.md", record.name)
        assert len(record.read_text().splitlines()) <= 40
