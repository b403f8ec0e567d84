"""fxfuse takes the batch normalisation out of a trained PyTorch network, and says what it did and why.

>>> fused = fxfuse.fuse(model.eval(), example_inputs=(x,))
>>> print(fxfuse.report(fused))
"""

from fxfuse._version import __version__
from fxfuse.comparison import verify
from fxfuse.culprits import Bisection, bisect
from fxfuse.errors import CaptureError, FxfuseError, UsageError, VerificationError
from fxfuse.lowering.allocator import keep_freed_memory
from fxfuse.lowering.lower import lower
from fxfuse.lowering.lowered import Lowered
from fxfuse.pipeline import explain, fuse
from fxfuse.records import Fold, Refusal, Report
from fxfuse.reports import report
from fxfuse.verdict import Comparison

__all__ = [
    "Bisection",
    "CaptureError",
    "Comparison",
    "Fold",
    "FxfuseError",
    "Lowered",
    "Refusal",
    "Report",
    "UsageError",
    "VerificationError",
    "__version__",
    "bisect",
    "explain",
    "fuse",
    "keep_freed_memory",
    "lower",
    "report",
    "verify",
]
