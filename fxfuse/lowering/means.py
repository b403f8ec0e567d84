"""Means over images as poolings whose window is the whole image.

oneDNN Graph has poolings, and neither means nor adaptive poolings. What it gives to an operator that it does
not have, it may lay out anew, and once more what it takes up behind it: in a squeeze-and-excitation block
that is the largest value there is.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfuse.aliases import plain_layer
from fxfuse.calls import arguments, operator_name


def as_poolings(module: fx.GraphModule) -> None:
    """Writes the graph with poolings, in place. Sizes are those of the nodes' ``meta["val"]``."""
    graph = module.graph
    for node in list(graph.nodes):
        sources = [each for each in node.all_input_nodes if _is_image(each)]
        if len(sources) != 1 or not _is_mean(module, node):
            continue
        (source,) = sources
        size = [*source.meta["val"].shape[2:]]
        with graph.inserting_before(node):
            pooled = graph.call_function(F.avg_pool2d, (source, size, size))
            if node.meta["val"].dim() == 2:
                pooled = graph.call_method("flatten", (pooled, 1))
        pooled.meta = dict(node.meta)
        node.replace_all_uses_with(pooled)
        graph.erase_node(node)
    module.recompile()


def _is_image(node: fx.Node) -> bool:
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dim() == 4


def _is_mean(module: fx.GraphModule, node: fx.Node) -> bool:
    """Whether it gives the mean over each image: of (batch, channels, height, width) one for each channel."""
    layer = plain_layer(module, node)
    if layer is not None:
        return isinstance(layer, nn.AdaptiveAvgPool2d) and layer.output_size in (1, (1, 1))
    name = operator_name(node)
    if name == "adaptive_avg_pool2d":
        return [*node.meta["val"].shape[2:]] == [1, 1]
    if name != "mean":
        return False
    given = arguments(node)
    axes = given.get("dim")
    over_image = isinstance(axes, (tuple, list)) and {axis % 4 for axis in axes} == {2, 3}
    return over_image and given.get("dtype") is None
