"""Models by name: ``torchvision:NAME``, ``timm:NAME``, ``package.module:factory`` or a ``.pt2`` file.

Weights are used if they already lie in the local cache of torchvision or Hugging Face. Nothing is
downloaded: any other model gets random weights and, since a new norm does nothing, random statistics.
"""

from __future__ import annotations

import difflib
import functools
import importlib
import importlib.util
import inspect
import sys
import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from fxfuse.archive import read_program
from fxfuse.checkpoint import load_weights
from fxfuse.errors import UsageError
from fxfuse.layers import has_statistics

RANDOM = "random weights and random statistics"


@dataclass(frozen=True)
class Loaded:
    """A model in eval mode, and what is known about it.

    Attributes:
        model: the module; the exported program, if it comes out of a file.
        weights: where its weights come from, in words.
        inputs: positional inputs on which it runs; None if nobody says.
    """

    model: nn.Module | ExportedProgram
    weights: str
    inputs: tuple[Any, ...] | None


def load(spec: str, *, seed: int = 0, weights: str | Path | None = None) -> Loaded:
    """Loads the model that `spec` names.

    Args:
        spec: its name.
        seed: draws random weights and inputs.
        weights: a .safetensors file, or one of torch.save, whose tensors replace all weights of the model.

    Raises:
        UsageError: there is no such model (the nearest names are given), its library is not installed,
            the factory does not give a module, or a file cannot be read or does not fit.
    """
    if spec.lower().endswith(".pt2"):
        if weights is not None:
            raise UsageError(f"{spec} has its own weights, which {weights} cannot replace; leave it out")
        program = read_program(Path(spec))
        args, kwargs = program.example_inputs or (None, {})
        return Loaded(program, f"from {Path(spec).name}", None if kwargs else args)
    loaded = _built(spec, seed)
    if weights is not None:
        assert isinstance(loaded.model, nn.Module)
        return replace(loaded, weights=load_weights(loaded.model, Path(weights)))
    return loaded


def _built(spec: str, seed: int) -> Loaded:
    source, colon, name = spec.partition(":")
    if not colon or not source:
        raise UsageError(
            f"{spec!r} names no model; use torchvision:NAME, timm:NAME, package.module:factory or FILE.pt2"
        )
    torch.manual_seed(seed)
    if source == "torchvision":
        return _torchvision(name)
    if source == "timm":
        return _timm(name)
    return _factory(source, name)


def names(pattern: str = "") -> list[str]:
    """The names, with `pattern` in them, of the models of torchvision and timm, where these are installed."""
    known = []
    if importlib.util.find_spec("torchvision"):
        known += [f"torchvision:{name}" for name in torchvision().models.list_models()]
    if importlib.util.find_spec("timm"):
        known += [f"timm:{name}" for name in timm().list_models()]
    return [name for name in known if pattern in name]


@functools.cache
def torchvision() -> ModuleType:
    """The torchvision package, importable also beside a torch that it was not built for.

    Without its compiled extension torchvision fails on import, where it describes the operators nms and
    qnms. They are declared here, without an implementation: models and transforms do not need them.
    """
    found = importlib.util.find_spec("torchvision")
    if found is None or found.origin is None:
        raise UsageError("torchvision, which has that model, is not installed; pip install 'fxfuse[zoo]'")
    extensions = [*Path(found.origin).parent.glob("_C*.so"), *Path(found.origin).parent.glob("_C*.pyd")]
    try:
        for extension in extensions:
            torch.ops.load_library(str(extension))  # type: ignore[no-untyped-call]
    except OSError:
        extensions = []
    if not extensions and not hasattr(torch.ops.torchvision, "nms"):
        for operator in ("nms", "qnms"):
            schema = "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor"
            torch.library.define(f"torchvision::{operator}", schema)
        warnings.warn(
            "torchvision was built for another torch: detection operators (nms, ...) are unavailable",
            RuntimeWarning,
            stacklevel=2,
        )
    return importlib.import_module("torchvision")


@functools.cache
def timm() -> ModuleType:
    """The timm package, which needs torchvision to be importable."""
    if importlib.util.find_spec("timm") is None:
        raise UsageError("timm, which has that model, is not installed; pip install 'fxfuse[zoo]'")
    torchvision()
    return importlib.import_module("timm")


def randomise(model: nn.Module) -> nn.Module:
    """Draws statistics and affine parameters for every norm in `model`, in place: none stays the identity."""
    with torch.no_grad():
        for module in model.modules():
            if has_statistics(module):
                ranges = {
                    "running_mean": (-0.3, 0.3),
                    "running_var": (0.5, 2.0),
                    "weight": (0.5, 1.5),
                    "bias": (-0.3, 0.3),
                }
                for name, (low, high) in ranges.items():
                    tensor = getattr(module, name, None)
                    if tensor is not None:
                        tensor.uniform_(low, high)
    return model


def _torchvision(name: str) -> Loaded:
    models = torchvision().models
    _check_name(name, models.list_models(), "torchvision")
    weights = models.get_model_weights(name).DEFAULT
    options: dict[str, Any] = {}
    if "weights_backbone" in inspect.signature(models.get_model_builder(name)).parameters:
        options["weights_backbone"] = None
    # They warn unless told whether to draw weights, which takes long.
    if name in ("inception_v3", "googlenet"):
        options["init_weights"] = False
    model = models.get_model(name, weights=None, **options)
    file = Path(torch.hub.get_dir(), "checkpoints", weights.url.rpartition("/")[2])
    if file.exists():
        load_weights(model, file)
        return Loaded(model.eval(), f"pretrained ({weights})", _image(weights.transforms()))
    return Loaded(randomise(model).eval(), RANDOM, _image(weights.transforms()))


def _image(transforms: Any) -> tuple[Any, ...] | None:
    """An image, or a clip of 16, of the size that a torchvision preset gives."""
    size = getattr(transforms, "crop_size", None) or getattr(transforms, "resize_size", None)
    if not size:
        return None
    height, width = (size[0], size[-1])
    frames = [16] if type(transforms).__name__ == "VideoClassification" else []
    return (torch.randn(1, 3, *frames, height, width),)


def _timm(name: str) -> Loaded:
    library = timm()
    _check_name(name.partition(".")[0], library.list_models(), "timm")
    model = library.create_model(name)
    shape = model.pretrained_cfg.get("input_size", (3, 224, 224))
    file = _cached_file(model.pretrained_cfg.get("hf_hub_id"))
    if file is not None:
        load_weights(model, Path(file))
        return Loaded(model.eval(), f"pretrained ({file})", (torch.randn(1, *shape),))
    return Loaded(randomise(model).eval(), RANDOM, (torch.randn(1, *shape),))


def _cached_file(repository: str | None) -> str | None:
    if not repository:
        return None
    hub = importlib.import_module("huggingface_hub")
    found = hub.try_to_load_from_cache(repository, "model.safetensors")
    return found if isinstance(found, str) else None


def _check_name(name: str, known: list[str], source: str) -> None:
    if name not in known:
        near = ", ".join(difflib.get_close_matches(name, known, n=5, cutoff=0.4)) or "none is near"
        raise UsageError(f"{source} has no model {name!r}; nearest: {near}; fxfuse list prints all names")


def _factory(module_name: str, factory_name: str) -> Loaded:
    here = str(Path.cwd())
    if here not in sys.path:
        sys.path.insert(0, here)
    try:
        model = getattr(importlib.import_module(module_name), factory_name)()
    except Exception as error:  # nothing but the user's own code runs here, and it may raise anything
        raise UsageError(
            f"cannot load {module_name}:{factory_name}: {type(error).__name__}: {error}; the module is "
            "imported from here or from what is installed, and the factory called without arguments"
        ) from error
    if not isinstance(model, nn.Module):
        raise UsageError(
            f"{module_name}:{factory_name} gave a {type(model).__name__}, not a torch.nn.Module; "
            "it has to return the model"
        )
    return Loaded(model.eval(), "weights as the factory makes them", None)
