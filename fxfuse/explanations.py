"""What the refusal codes mean at length: the sections of ``refusals.md``, which lies beside this file."""

from __future__ import annotations

import re
from importlib import resources

from fxfuse.errors import UsageError
from fxfuse.refusals import Code


def is_code(text: str) -> bool:
    """Whether `text` asks for codes: "FXF103", "fxf103", "103"; "FXF1" for those that begin so."""
    return re.fullmatch(r"FXF\d*|\d{3}", text, re.IGNORECASE) is not None


def explanation(text: str) -> str:
    """The section of a code under its reason, in Markdown; of the beginning of codes, a list of these.

    Raises:
        UsageError: there is no such code (the nearest are given).
    """
    wanted = f"FXF{text.upper().removeprefix('FXF')}"
    reasons = {code.value.code: code.value.reason for code in Code}
    if wanted in reasons:
        return f"# {wanted}: {reasons[wanted]}\n\n{section(wanted)}"
    found = [f"- {code}: {reason}" for code, reason in reasons.items() if code.startswith(wanted)]
    if not found:
        number = int(wanted.removeprefix("FXF"))
        near = ", ".join(sorted(reasons, key=lambda code: abs(int(code.removeprefix("FXF")) - number))[:3])
        raise UsageError(f"there is no code {wanted}; nearest: {near}; fxfuse explain FXF lists all of them")
    return "\n".join(found)


def section(code: str) -> str:
    """What stands in ``refusals.md`` under the heading that begins with that code: "FXF101"."""
    text = resources.files("fxfuse").joinpath("refusals.md").read_text(encoding="utf-8")
    return re.split(rf"^### {code}: .*\n", text, flags=re.MULTILINE)[1].partition("\n##")[0].strip() + "\n"
