"""fxfuse takes the batch normalisation out of a trained PyTorch network, and says what it did and why.

>>> fused = fxfuse.fuse(model.eval(), example_inputs=(x,))
>>> print(fxfuse.report(fused))
"""

from fxfuse._version import __version__
from fxfuse.comparison import verify
from fxfuse.errors import CaptureError, FxfuseError, UsageError, VerificationError
from fxfuse.pipeline import explain, fuse
from fxfuse.records import Fold, Refusal, Report
from fxfuse.reports import report
from fxfuse.verdict import Comparison

__all__ = [
    "CaptureError",
    "Comparison",
    "Fold",
    "FxfuseError",
    "Refusal",
    "Report",
    "UsageError",
    "VerificationError",
    "__version__",
    "explain",
    "fuse",
    "report",
    "verify",
]
