"""Keeps the kernels of oneDNN Graph from overwriting what another one reads later.

What a kernel gives is in a layout of its own if nobody but such kernels reads it. Then one that reads it may
write its result to the same memory; whether another one is still to read that, it does not ask (torch 2.13,
``torch/csrc/jit/codegen/onednn/kernel.cpp``). With a reader that is no such kernel, as a view, the layout is
torch's, and nothing is written there.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

# Their kernels write to new memory, unless something follows that does not.
_TO_NEW_MEMORY = {
    *("_convolution", "convolution", "conv1d", "conv2d", "conv3d", "linear", "addmm", "matmul", "mm", "bmm"),
    *("max_pool2d", "avg_pool2d", "adaptive_avg_pool2d", "cat", "mean", "layer_norm", "batch_norm"),
}


def keep_what_is_read_later(graph: Any) -> None:
    """Has each value of a trace that might be overwritten too early read by a view, too.

    Args:
        graph: the ``torch.Graph`` of TorchScript, without branches, which is changed. What it writes in place
            is written to new memory then, and what it computes twice, once: both would be done later anyway.
    """
    passes: Any = torch._C
    passes._jit_pass_remove_mutation(graph)
    passes._jit_pass_cse(graph)
    made: dict[str, int] = {}  # by the name of a value, the number of the node that gives it
    before: list[int] = []  # for each node, a bit for each that it depends on, and for itself
    nodes = [*graph.nodes()]
    for number, node in enumerate(nodes):
        depends = 1 << number
        for value in node.inputs():
            depends |= before[made[value.debugName()]] if value.debugName() in made else 0
        made |= {value.debugName(): number for value in node.outputs()}
        before.append(depends)
    for node in nodes:
        for value in node.outputs():
            if node.kind() == "prim::Constant" or value.type().kind() != "TensorType":
                continue
            for later, place in _read_later(value, made, before):
                view = graph.create("aten::alias", [value], 1)
                view.insertBefore(later)
                view.output().setType(value.type())
                later.replaceInput(place, view.output())
                break


def _read_later(value: Any, made: dict[str, int], before: list[int]) -> Iterator[tuple[Any, int]]:
    """The nodes that read `value`, and as which input, perhaps after another one has overwritten it."""
    readers = []
    for use in value.uses():
        name = next((each.debugName() for each in use.user.outputs()), None)
        if name not in made:  # the result of the graph is no kernel
            return
        readers.append((use.user, made[name], use.offset))
    for node, number, _ in readers:
        if node.kind().partition("::")[2] not in _TO_NEW_MEMORY:
            for other, its_number, place in readers:
                if its_number != number and not before[number] >> its_number & 1:
                    yield other, place
