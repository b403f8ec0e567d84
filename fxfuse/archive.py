"""Exported programs out of ``.pt2`` files that nobody vouches for.

torch.export.load unpickles: example inputs, weights that are no plain tensors, custom objects. It loads
compiled libraries out of the archive, and compares no checksums. So the archive is read here, entry by entry,
and torch is given another one, made of the entries that were found to be harmless: two readers of a zip file
can disagree about what is in it. In torch/export/pt2_archive/_package.py: ``_load_state_dict``,
``_load_constants``, ``_load_aoti``; in torch/_export/serde/serialize.py: ``deserialize_torch_artifact``.
"""

from __future__ import annotations

import io
import json
import pickle
import re
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch.export import ExportedProgram
from torch.export.pt2_archive._package import load_pt2

from fxfuse.container import opened, read_entries, rebuilt
from fxfuse.errors import UsageError
from fxfuse.vetting import SuspectError, check_program, check_tensors

_PROGRAM = "models/model.json"
_INPUTS = "data/sample_inputs/model.pt"
_CONFIGS = {
    "data/weights/": "data/weights/model_weights_config.json",
    "data/constants/": "data/constants/model_constants_config.json",
}
_NEEDED = {"archive_format", "archive_version", ".data/version", _PROGRAM, _INPUTS, *_CONFIGS.values()}
_FREE = re.compile(
    r"byteorder|data/(weights/weight|constants/tensor)_\d+|extra/.*|\.data/serialization_id|\.format_version"
)
_OLD = "serialized_exported_program.json"


def read_program(path: Path) -> ExportedProgram:
    """The exported program in a file. Nothing in the file is unpickled, imported or run.

    Raises:
        UsageError: there is no such file, it is damaged, or something in it is not what torch.export.save
            writes of a program of plain tensors.
    """
    with opened(path) as file:
        entries = read_entries(file, str(path))
    try:
        _check_entries(entries)
        entries[_INPUTS] = _inputs(entries[_INPUTS])
    except SuspectError as error:
        raise UsageError(
            f"{path} is not loaded: {error}. It could run code of others or fill the memory; save the "
            "program again with torch.export.save, from a source that you trust"
        ) from error
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "The given buffer is not writable")  # which is torch's own
            return load_pt2(rebuilt(entries)).exported_programs["model"]
    except Exception as error:  # torch answers to what does not fit together with whatever it stumbles over
        reason = str(error).strip().rpartition("\n")[2]
        raise UsageError(
            f"{path} holds a program that torch {torch.__version__} cannot read "
            f"({type(error).__name__}: {reason}); export it again with this version"
        ) from error


def _check_entries(entries: Mapping[str, bytes]) -> None:
    """Raises SuspectError for the first entry that is more than data, or that is missing."""
    if _OLD in entries:
        raise SuspectError("it has an old format of torch, which is made of pickled objects")
    for name in entries:
        if name not in _NEEDED and not _FREE.fullmatch(name):
            raise SuspectError(f"it has an entry {name!r}, which no program of plain tensors has")
    missing = sorted(_NEEDED - entries.keys())
    if missing:
        raise SuspectError(f"it is no exported program, for it has no entry {missing[0]!r}")
    check_program(_json(entries, _PROGRAM))
    for folder, config in _CONFIGS.items():
        sizes = {name.removeprefix(folder): len(content) for name, content in entries.items()}
        check_tensors(_json(entries, config), sizes)


def _json(entries: Mapping[str, bytes], name: str) -> Any:
    try:
        return json.loads(entries[name].decode())
    except (ValueError, RecursionError) as error:
        raise SuspectError(f"its entry {name!r} is no JSON ({error})") from error


def _inputs(content: bytes) -> bytes:
    """The example inputs, pickled anew: torch unpickles whatever it cannot load as tensors."""
    if not content:
        return content
    read_entries(io.BytesIO(content), "the archive of its example inputs")
    try:
        inputs = torch.load(io.BytesIO(content), weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, ValueError, LookupError, EOFError) as error:
        raise SuspectError("its example inputs are pickled objects, and not tensors only") from error
    file = io.BytesIO()
    torch.save(inputs, file)
    return file.getvalue()
