"""Files that are written whole, or not at all."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

from fxfuse.errors import UsageError


def check_writable(path: Path, *, kept: Iterable[Path]) -> None:
    """Raises UsageError if `path` cannot be written, or is one of the files `kept` under whatever name."""
    try:
        _check_place(path)
        same = [other for other in kept if path.exists() and other.exists() and path.samefile(other)]
    except OSError as error:
        raise UsageError(f"cannot write {path}: {error.strerror}") from error
    if same:
        raise UsageError(
            f"cannot write {path}: it is the same file as {same[0]}, which would be lost; use another name"
        )


def _check_place(path: Path) -> None:
    if path.is_dir():
        raise UsageError(f"cannot write {path}: it is a folder")
    if not path.parent.is_dir():
        raise UsageError(f"cannot write {path}: there is no folder {path.parent}")
    if path.exists() and not path.is_file():
        raise UsageError(f"cannot write {path}: it is no regular file")
    if not os.access(path if path.exists() else path.parent, os.W_OK):
        raise UsageError(f"cannot write {path}: permission denied")


@contextmanager
def written(path: Path) -> Iterator[Path]:
    """A file to write in place of `path`; it gets that name when the block ends, if it ends well.

    The file lies in a folder beside the one it replaces, so that the renaming is one step; a link is
    followed. Its permissions are those that ``open`` would give, or those of the file that it replaces.

    Raises:
        UsageError: the file system refuses, as where it is full. Nothing is left behind then, nor after
            any other error, and a file that was there is what it was.
    """
    target = path.resolve()
    try:
        with tempfile.TemporaryDirectory(prefix=".fxfuse-", dir=target.parent) as folder:
            part = Path(folder, target.name)
            yield part
            if target.exists():
                shutil.copymode(target, part)
            part.replace(target)
    except OSError as error:
        raise UsageError(
            f"cannot write {path}: {error.strerror or error}. "
            "Nothing was written; make room, or name another place"
        ) from error
