"""A script that shows how a model fails a check with the least folds."""

from __future__ import annotations

from collections.abc import Sequence

from fxfuse._version import __version__
from fxfuse.criteria import CommandPasses, Within

_SCRIPT = """\
'''Folds a model only where fxfuse bisect {version} found that it fails a check, and runs that check.

The exit code is 1 if it still fails.
'''

import sys

import torch

import fxfuse
from fxfuse import criteria, zoo
from fxfuse.pipeline import folded
from fxfuse.inputs import sample
from fxfuse.tree import as_module

CULPRITS = {names!r}

loaded = {loading}
sizes = [torch.Size(shape) for shape in {shapes!r}]
inputs = tuple(sample(as_module(loaded.model), sizes, {seed!r})) or loaded.inputs
report = fxfuse.explain(loaded.model, example_inputs=inputs)
others = [name for name in report.names if name not in CULPRITS]
{check}
print("passed")
"""
_VERIFIED = """\
try:
    fxfuse.fuse(loaded.model, example_inputs=inputs, leave=others)
except fxfuse.VerificationError as error:
    sys.exit(str(error))"""
_CHECKED = """\
check = criteria.{check}
fused = folded(loaded.model, example_inputs=inputs, leave=others, verifies=False)
if not check(fused):
    sys.exit("failed")"""


def reproduction(
    loading: str,
    shapes: Sequence[tuple[int, ...]],
    seed: int,
    names: Sequence[str],
    check: CommandPasses | Within | None,
) -> str:
    """The text of the script.

    Args:
        loading: the expression that loads the model, by ``zoo.load``.
        shapes: of its inputs; without any its own inputs are used.
        seed: with which they are drawn.
        names: of the folds that are made.
        check: that they break.
    """
    checked = _VERIFIED
    if isinstance(check, CommandPasses):
        checked = _CHECKED.format(check=f"CommandPasses({check.command!r}, inputs)")
    elif isinstance(check, Within):
        checked = _CHECKED.format(check=f"Within({check.tolerance!r}, loaded.model, inputs)")
    return _SCRIPT.format(
        version=__version__,
        loading=loading,
        names=list(names),
        seed=seed,
        shapes=list(shapes),
        check=checked,
    )
