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
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from tests.planting import BUGS

_TESTS = Path(__file__).parent
_PROPERTIES = "tests/test_properties.py"
_CONTROL = "(no bug)"


def verdict(name: str) -> tuple[bool, str]:
    """Whether the tests do what they have to under that bug, and a line that says what happened."""
    names = BUGS[name].tests if name in BUGS else ()
    places = [f"{_PROPERTIES}::{test}" for test in names] or [_PROPERTIES]
    if any((_TESTS / "scenarios").glob("test_*.py")):
        places.append("tests/scenarios")
    start = time.perf_counter()
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-x", "--tb=line", "-p", "no:cacheprovider", "-p", "tests.planting"]
        + places,
        cwd=_TESTS.parent,
        env=os.environ | {"FXFUSE_PLANT": name if name in BUGS else "", "HYPOTHESIS_PROFILE": "planted"},
        capture_output=True,
        text=True,
        check=False,
    )
    seconds = time.perf_counter() - start
    failed = re.search(r"^(?:FAILED|ERROR) \S*?([^/\s]+)(?: - |$)", done.stdout, re.MULTILINE)
    expected = pytest_failed = done.returncode == 1 and failed is not None
    if name == _CONTROL:
        expected = done.returncode == 0
    outcome = failed[1] if failed else {0: "every test passes"}.get(done.returncode, done.stderr[-500:])
    return (
        expected,
        f"{name:42} {'' if expected or not pytest_failed else 'FAILS: '}{outcome}  {seconds:.0f} s",
    )


def main(names: list[str]) -> int:
    """Prints a line for each bug."""
    unknown = set(names) - set(BUGS)
    if unknown:
        print(f"no such bugs: {', '.join(sorted(unknown))}; there are {', '.join(BUGS)}", file=sys.stderr)
        return 2
    as_expected = []
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for good, line in pool.map(verdict, [_CONTROL, *(names or BUGS)]):
            as_expected.append(good)
            print(f"{'ok' if good else 'NOT CAUGHT':10} {line}", flush=True)
    print(f"{sum(as_expected[1:])} of {len(as_expected) - 1} bugs caught")
    return 0 if all(as_expected) else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
