"""The errors that fxfuse raises, and what others say. A norm that cannot be folded is a refusal, no error."""

import re

_COLOURS = re.compile(r"\x1b\[[0-9;]*m")


def first_line(error: BaseException) -> str:
    """What an error says, in one line without colours; its type, if it says nothing.

    The list of signatures that torch adds to a call that fits none is not part of it.
    """
    line = _COLOURS.sub("", str(error)).strip().partition("\n")[0]
    return line.removesuffix("but expected one of:").rstrip(",: ") or type(error).__name__


def with_type(error: BaseException) -> str:
    """The type of an error, and what it says in one line."""
    name, line = type(error).__name__, first_line(error)
    return name if line == name else f"{name}: {line}"


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
