"""The errors that fxfuse raises. A norm that cannot be folded is a refusal, never one of these."""


class FxfuseError(Exception):
    """Whatever fxfuse raises on purpose."""


class UsageError(FxfuseError):
    """The caller's input cannot be used as it is; the message says what to change."""


class CaptureError(FxfuseError):
    """The model could not be turned into an FX graph; the message names the line and the reason.

    Attributes:
        argument: the argument of forward of which code asks whether it is None, if that is the reason.
    """

    def __init__(self, message: str, argument: str = "") -> None:
        super().__init__(message)
        self.argument = argument


class VerificationError(FxfuseError):
    """Two models that should compute the same function do not."""


class UnsupportedError(FxfuseError):
    """An engine cannot run a graph; the message says why, in half a sentence: a reason of ``lower``."""
