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

from tests.planting import BUGS

_TESTS = Path(__file__).parent
_PROPERTIES = "tests/test_properties.py"
_CONTROL = "(no bug)"


def verdict(name: str) -> tuple[bool, str]:
    """Whether the tests do what they have to under that bug, and what happened."""
    places = [f"{_PROPERTIES}::{test}" for test in BUGS[name].tests] if name in BUGS else [_PROPERTIES]
    if any((_TESTS / "scenarios").glob("test_*.py")):
        places.append("tests/scenarios")
    options = ("-x", "--tb=line", "-p", "no:cacheprovider", "-p", "tests.planting")
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *options, *places],
        cwd=_TESTS.parent,
        env=os.environ | {"FXFUSE_PLANT": name if name in BUGS else "", "HYPOTHESIS_PROFILE": "planted"},
        capture_output=True,
        text=True,
        check=False,
    )
    failed = re.search(r"^(?:FAILED|ERROR) (?:\S*/)?(\S+)", done.stdout, re.MULTILINE)
    if done.returncode == 0:
        return name not in BUGS, "every test passes"
    if done.returncode == 1 and failed:
        return name in BUGS, failed[1]
    return False, f"pytest did not run: {(done.stderr or done.stdout)[-500:]}"


def main(names: list[str]) -> int:
    """Prints a line for each bug."""
    unknown = set(names) - set(BUGS)
    if unknown:
        print(f"no such bugs: {', '.join(sorted(unknown))}; there are {', '.join(BUGS)}", file=sys.stderr)
        return 2
    runs = [_CONTROL, *(names or BUGS)]
    good = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for name, (as_expected, outcome) in zip(runs, pool.map(verdict, runs), strict=True):
            good.append(as_expected)
            print(f"{'ok' if as_expected else 'WRONG':6}{name:42}{outcome}", flush=True)
    print(f"{sum(good[1:])} of {len(runs) - 1} bugs caught")
    return 0 if all(good) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
