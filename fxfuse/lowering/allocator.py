"""What the C library does with memory that is freed: a setting of the whole process."""

from __future__ import annotations

import ctypes
import platform

from fxfuse.errors import UsageError

# From glibc's malloc.h.
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3
_MOST = 2**31 - 1  # the value is an int
_LARGEST = 1 << 30  # a block of this size is mapped by itself all the same


def keep_freed_memory() -> None:
    """Lets this process keep the memory that it frees, for good: for eager PyTorch and for engines alike.

    By default glibc gives large blocks back to the system at once, and each activation that is allocated
    again is mapped and zeroed anew, page by page. That can cost more than the arithmetic, above all with
    large batches. The price is that the process stays as large as it ever was.

    ``fxfuse.lower`` does not do this by itself, since it concerns everything in the process.

    Raises:
        UsageError: the C library is not glibc, or does not take the setting.
    """
    name, _ = platform.libc_ver()
    if name != "glibc":
        raise UsageError("keep_freed_memory() sets up glibc's malloc, which this process does not use")
    library = ctypes.CDLL(None)
    settings = ((_M_MMAP_THRESHOLD, _LARGEST), (_M_TRIM_THRESHOLD, _MOST))
    if not all(library.mallopt(option, value) for option, value in settings):
        raise UsageError("glibc did not take the setting; another allocator may be in its place")
