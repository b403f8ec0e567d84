"""Weights out of a file, into a model that was built without them."""

from __future__ import annotations

import importlib
import importlib.util
import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from fxfuse.container import opened, read_entries
from fxfuse.errors import UsageError, first_line

SUFFIXES = (".safetensors", ".pt", ".pth", ".bin")
# Under these keys training loops put the weights in what they save.
_WRAPPERS = ("state_dict", "model_state_dict", "model")
_SHOWN = 3


def load_weights(model: nn.Module, path: Path) -> str:
    """Replaces every parameter and buffer of `model` by the one in the file; says where they are from.

    Nothing is unpickled but tensors. Values are taken as they are, NaN and infinity too; the words tell.

    Raises:
        UsageError: there is no such file, it is damaged, it holds more than tensors, or its names or shapes
            are not those of the model, which has to be built again then.
    """
    with opened(path):
        tensors = _tensors(path)
    own = {name: value for name, value in model.state_dict().items() if isinstance(value, Tensor)}
    other = [name for name, value in own.items() if name in tensors and tensors[name].shape != value.shape]
    fitting = {name: value for name, value in tensors.items() if name not in other} if other else tensors
    result = model.load_state_dict(fitting, strict=False)
    # A norm counts batches in training only, and old checkpoints do not have its counter.
    missing = [
        name for name in result.missing_keys if name not in other and not name.endswith("num_batches_tracked")
    ]
    shapes = [
        f"{name} {tuple(tensors[name].shape)} where the model has {tuple(own[name].shape)}" for name in other
    ]
    problems = (
        _listed("missing", missing),
        _listed("unexpected", result.unexpected_keys),
        _listed("of another shape", shapes),
    )
    if any(problems):
        raise UsageError(
            f"{path} does not fit {type(model).__name__}: {'; '.join(filter(None, problems))}. With these "
            "weights it would compute something else; name the architecture that they were saved from"
        )
    loaded = [value for value in model.state_dict().values() if isinstance(value, Tensor)]
    broken = sum(not value.isfinite().all() for value in loaded)
    return f"from {path.name}" + (
        f", {broken} of {len(loaded)} tensors hold NaN or infinity" if broken else ""
    )


def _listed(what: str, names: list[str]) -> str:
    """``3 missing: a, b, c``, with the first few names; nothing if there are none."""
    more = f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else ""
    return f"{len(names)} {what}: {', '.join(names[:_SHOWN])}{more}" if names else ""


def _tensors(path: Path) -> Mapping[str, Tensor]:
    if path.suffix.lower() not in SUFFIXES:
        raise UsageError(f"{path} is no file of weights by its name; those end in {', '.join(SUFFIXES)}")
    found = _safetensors(path) if path.suffix.lower() == ".safetensors" else _unwrapped(_pickled(path))
    if not isinstance(found, dict) or not all(isinstance(value, Tensor) for value in found.values()):
        raise UsageError(
            f"{path} holds a {type(found).__name__}, and not tensors by name; "
            "save the weights alone: torch.save(model.state_dict(), FILE)"
        )
    return found


def _safetensors(path: Path) -> Any:
    if importlib.util.find_spec("safetensors") is None:
        raise UsageError(f"to read {path} safetensors is needed; pip install 'fxfuse[zoo]'")
    library = importlib.import_module("safetensors")
    try:
        return importlib.import_module("safetensors.torch").load_file(path)
    except (library.SafetensorError, OSError) as error:
        raise UsageError(
            f"{path} is no safetensors file, or a damaged one ({error}); copy or download it again"
        ) from error


def _pickled(path: Path) -> Any:
    """What torch.save wrote, if it is made of tensors and plain containers."""
    with opened(path) as file:
        if file.read(2) == b"PK":  # torch before 1.6 wrote no archives
            read_entries(file, str(path))
    try:
        with warnings.catch_warnings(action="ignore"):  # torch remarks on pickles that are not its own
            return torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        raise UsageError(
            f"{path} is damaged, or holds Python objects, as a whole module does, and to unpickle "
            "those runs code out of the file. Copy it again, or where you trust it save the weights alone: "
            "torch.save(model.state_dict(), FILE)"
        ) from error
    except (RuntimeError, OSError, ValueError, LookupError, EOFError, TypeError) as error:
        told = f"{path} is damaged, or no file of torch.save ({first_line(error)}); copy it again"
        raise UsageError(told) from error


def _unwrapped(found: Any) -> Any:
    for key in _WRAPPERS:
        if isinstance(found, dict) and isinstance(found.get(key), dict):
            return found[key]
    return found
