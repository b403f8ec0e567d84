"""The examples run, and print what they promise."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"
PRINTED = {
    "photograph.py": r"49 of 49 norms folded.*before: class 285, probability (0\.78\d|0\.79\d)\n"
    r"after: class 285, probability \1",
    "detector.py": r"(\d+) of \1 norms folded.*still a BackboneWithFPN\nnorms left: 0\nall levels",
    "ahead_of_time.py": r"34 of 34 norms folded.*batch 2 is the same: True\nbatch 5 is the same: True",
    # transformers is no dependency of the tests: make examples runs it.
    "huggingface.py": r"(\d+) of \1 norms folded.*still a ResNetForImageClassification\nnorms left: 0\n"
    r"the same logits: True",
}
HEAVY = {"huggingface.py": "transformers"}


def test_every_example_is_run():
    assert {path.name for path in EXAMPLES.glob("*.py")} == {*PRINTED}


@pytest.mark.parametrize("name", PRINTED)
def test_an_example_prints_what_it_promises(name, tmp_path):
    if name in HEAVY:
        pytest.importorskip(HEAVY[name], reason=f"make examples installs {HEAVY[name]}")
    if name == "ahead_of_time.py" and shutil.which("g++") is None:
        pytest.skip("AOTInductor needs a C++ compiler")
    settings = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name)],
        cwd=tmp_path,
        env=settings,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert re.search(PRINTED[name], done.stdout, re.DOTALL), done.stdout
