"""The time that is left if every layer runs on the fastest kernel, and nothing runs between them.

Each convolution and linear layer of a folded network is run by itself, on an input of the shape that it gets,
on each of torch's kernels: as it is, with channels last, prepacked by oneDNN, and as a linear layer where it
is a convolution with one tap. The floor is the sum of the least times. Inputs are warm, activations and
additions are free, and other operators (attention, pooling) count nothing; but each call costs some ten
microseconds, which engines save in part, so that small networks may be faster than that.
"""

from __future__ import annotations

import statistics
import time
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, fx, nn

Layer = nn.Conv2d | nn.Linear
LAST = torch.channels_last


class _Layers(fx.Interpreter):
    """Notes the convolutions and linear layers that a graph runs, with the shapes of their inputs."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.found: Counter[tuple[Any, ...]] = Counter()
        self.layers: dict[tuple[Any, ...], Layer] = {}

    def call_module(self, target: Any, args: Any, kwargs: Any) -> Any:
        """Runs it."""
        layer = self.fetch_attr(target)
        if isinstance(layer, (nn.Conv2d, nn.Linear)):
            key = repr(layer), tuple(args[0].shape)
            self.found[key] += 1
            self.layers[key] = layer
        return super().call_module(target, args, kwargs)


def floor(folded: fx.GraphModule, x: Tensor, rounds: int = 5) -> float:
    """Milliseconds."""
    noted = _Layers(folded)
    noted.run(x)
    total = 0.0
    for key, count in noted.found.items():
        calls = kernels(noted.layers[key], torch.randn(key[1]))
        total += count * min(_milliseconds(call, rounds) for call in calls)
    return total


def kernels(layer: Layer, x: Tensor) -> Iterator[Callable[[], Tensor]]:
    """The ways in which torch can run it."""
    ops: Any = torch.ops.mkldnn
    weight, bias = layer.weight.detach(), None if layer.bias is None else layer.bias.detach()
    yield partial(layer, x)
    if isinstance(layer, nn.Linear):
        packed = ops._reorder_linear_weight(weight, x.numel() // x.shape[-1])
        yield partial(ops._linear_pointwise, x, packed, bias, "none", [], "")
        return
    last, filters = x.contiguous(memory_format=LAST), weight.contiguous(memory_format=LAST)
    geometry = [list(each) for each in (layer.padding, layer.stride, layer.dilation)]
    yield partial(layer, last)
    packed = ops._reorder_convolution_weight(filters, *geometry, layer.groups, list(x.shape))
    yield partial(ops._convolution_pointwise, last, packed, bias, *geometry, layer.groups, "none", [], "")
    if (layer.kernel_size, layer.stride, layer.padding, layer.groups) == ((1, 1), (1, 1), (0, 0), 1):
        rows = last.permute(0, 2, 3, 1).flatten(0, 2)
        packed = ops._reorder_linear_weight(weight.flatten(1), len(rows))
        yield partial(ops._linear_pointwise, rows, packed, bias, "none", [], "")


def _milliseconds(call: Callable[[], Tensor], rounds: int) -> float:
    call()
    times = []
    for _ in range(rounds):
        begun = time.perf_counter()
        call()
        times.append(1e3 * (time.perf_counter() - begun))
    return statistics.median(times)
