"""The zip archives that torch writes: .pt2, .pt and what lies in them.

torch stores without compression, so that no archive of it holds more than its own size. It writes a checksum
for every entry and never compares one; here they are compared.
"""

from __future__ import annotations

import io
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import IO

from fxfuse.errors import UsageError


def opened(path: Path) -> IO[bytes]:
    """The file, to read from; a UsageError if there is none, or it cannot be read."""
    try:
        if path.is_file():
            return path.open("rb")
    except OSError as error:
        raise UsageError(f"{path} cannot be read: {error.strerror}") from error
    raise UsageError(f"there is no file {path}, seen from {Path.cwd()}")


def read_entries(file: IO[bytes], name: str) -> dict[str, bytes]:
    """The entries of the archive in `file`, by their names without the folder around all of them.

    Args:
        file: the archive.
        name: what to call it in messages.

    Raises:
        UsageError: it is no archive, a damaged one, or not one that torch wrote.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            listed = archive.infolist()
            if not listed or min(entry.header_offset for entry in listed):
                raise zipfile.BadZipFile("it does not begin with its first entry")
            _check_sizes(listed, file.seek(0, io.SEEK_END), name)
            entries = {entry.filename.partition("/")[2]: archive.read(entry) for entry in listed}
    except (zipfile.BadZipFile, EOFError, OSError, RuntimeError, ValueError) as error:
        raise UsageError(
            f"{name} is damaged, or not a zip archive ({error}), and what it holds cannot be trusted; "
            "copy or download it again"
        ) from error
    if len(entries) != len(listed):
        raise UsageError(f"{name} is not loaded: two of its {len(listed)} entries have the same name")
    return entries


def rebuilt(entries: Mapping[str, bytes]) -> IO[bytes]:
    """An archive of `entries`, as read_entries gives them, that every reader reads alike."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        for name, content in entries.items():
            archive.writestr(f"model/{name}", content)
    file.seek(0)
    return file


def _check_sizes(listed: list[zipfile.ZipInfo], size: int, name: str) -> None:
    """Before anything is unpacked."""
    for entry in listed:
        if entry.compress_type != zipfile.ZIP_STORED:
            raise UsageError(
                f"{name} is not loaded: its entry {entry.filename!r} is compressed, {entry.compress_size} "
                f"bytes for {entry.file_size}; torch compresses nothing, and a bomb would fill the memory. "
                "Save it again with torch"
            )
    declared = sum(max(entry.file_size, entry.compress_size) for entry in listed)
    if declared > size:
        raise UsageError(
            f"{name} is not loaded: its entries say that they have {declared} bytes, more than the {size} of "
            "the file, and would fill the memory. Copy or download it again"
        )
