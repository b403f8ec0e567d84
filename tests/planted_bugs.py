"""Shows that the tests can fail: plants one bug at a time and runs the tests that have to catch it.

    python -m tests.planted_bugs            all bugs
    python -m tests.planted_bugs "drop eps" these bugs

Exit code 1 if a bug is not caught, or if the tests fail without one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.planting import BACKEND, BUGS, CHECK, CULPRITS, KEPT_MODULES, LAYOUTS, PROGRAM, SCENARIOS, VERIFIER

_TESTS = Path(__file__).parent
_PROPERTIES = "tests/test_properties.py"
_EVERYTHING = (
    _PROPERTIES,
    *(*KEPT_MODULES, *LAYOUTS, *BACKEND, *PROGRAM, *SCENARIOS, *VERIFIER, *CHECK, *CULPRITS),
)
_CONTROL = "(no bug)"


def failures(name: str) -> set[str]:
    """The tests that fail under that bug, the first only; all that fail without a bug.

    Raises:
        RuntimeError: pytest did not run, as when what a bug replaces is not there any more.
    """
    planted = name in BUGS
    places = [_place(test) for test in BUGS[name].tests] if planted else [*_EVERYTHING]
    places.append("tests/scenarios")
    options = ["--tb=no", "-p", "no:cacheprovider", "-p", "tests.planting", *["-x"] * planted]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *places],
        cwd=_TESTS.parent,
        env=os.environ | {"FXFUSE_PLANT": name if planted else "", "HYPOTHESIS_PROFILE": "planted"},
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode not in (0, 1):
        raise RuntimeError(f"pytest did not run under {name!r}: {(done.stderr or done.stdout)[-500:]}")
    return set(re.findall(r"^(?:FAILED|ERROR) (?:\S*?/)*(\S+\.py::.+?)(?: - |$)", done.stdout, re.MULTILINE))


def _place(test: str) -> str:
    return test if test.startswith("tests/") else f"{_PROPERTIES}::{test}"


def main(names: list[str]) -> int:
    """Prints a line for each bug."""
    unknown = set(names) - set(BUGS)
    if unknown:
        print(f"no such bugs: {', '.join(sorted(unknown))}; there are {', '.join(BUGS)}", file=sys.stderr)
        return 2
    runs = names or [*BUGS]
    caught = 0
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        always, *planted = pool.map(failures, [_CONTROL, *runs])
    for test in sorted(always):
        print(f"fails without any bug: {test}")
    for name, failed in zip(runs, planted, strict=True):
        caught += bool(failed - always)
        print(f"{name:42}{', '.join(failed - always) or 'NOT CAUGHT'}")
    print(f"{caught} of {len(runs)} bugs caught")
    return 0 if caught == len(runs) and not always else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
