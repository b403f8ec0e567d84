"""What bugs are planted in is still there."""

import subprocess
import sys


def test_every_bug_can_be_planted():
    program = """
from tests.planting import BUGS
for name, bug in BUGS.items():
    print(name)
    bug.plant()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, f"{done.stdout.splitlines()[-1:]}\n{done.stderr}"
