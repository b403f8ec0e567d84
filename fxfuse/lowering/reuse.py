"""Memory that oneDNN Graph uses again too early, kept from it in a trace, a graph of TorchScript."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fxfuse.lowering.traces import PRODUCTS, read_through_view

# Their kernels write to new memory, unless something follows that does not.
_TO_NEW_MEMORY = PRODUCTS | {
    f"aten::{name}"
    for name in (
        *(
            "_convolution",
            "convolution",
            "conv1d",
            "conv2d",
            "conv3d",
            "cat",
            "mean",
            "layer_norm",
            "batch_norm",
        ),
        *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d"),
    )
}


def keep_what_is_read_later(graph: Any) -> None:
    """Has values read through views by who might overwrite them too early.

    What a kernel gives is in a layout of its own if nobody but such kernels reads it. Then one that reads it
    may write its result to the same memory; whether another one is still to read that, it does not ask. And
    it gives too few results if it does so and is joined to what it reads, which is a second one then.
    """
    numbers: dict[str, int] = {}  # of nodes, by the names of what they give
    ancestors: list[int] = []  # for each node, a bit for each that it depends on, and for itself
    nodes = [*graph.nodes()]
    for number, node in enumerate(nodes):
        depends = 1 << number
        for value in node.inputs():
            depends |= ancestors[numbers[value.debugName()]] if value.debugName() in numbers else 0
        numbers |= {value.debugName(): number for value in node.outputs()}
        ancestors.append(depends)
    for node in nodes:
        for value in node.outputs():
            if node.kind() != "prim::Constant" and value.type().kind() == "TensorType":
                for early, place in [*_too_early(value, numbers, ancestors)]:
                    read_through_view(graph, early, place)


def _too_early(value: Any, numbers: dict[str, int], ancestors: list[int]) -> Iterator[tuple[Any, int]]:
    """The nodes that might overwrite `value` before others have read it, and as which input they read it."""
    readers = []
    for use in value.uses():
        name = next((each.debugName() for each in use.user.outputs()), "")
        readers.append((use.user, numbers.get(name, -1), use.offset))  # -1: it is a result of the graph
    for node, number, place in readers:
        if number < 0 or node.kind() in _TO_NEW_MEMORY:
            continue
        others = {other for _, other, _ in readers if other != number}
        if any(other < 0 or not ancestors[number] >> other & 1 for other in others):
            yield node, place
