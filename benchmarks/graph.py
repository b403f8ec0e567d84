"""A picture of a graph before and after: a residual block of a ResNet whose shortcut has a convolution."""

from __future__ import annotations

import matplotlib as mpl
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import nn

import fxfuse
from benchmarks.record import RESULTS
from fxfuse import zoo
from fxfuse.drawing import Drawing, Node, Row, drawing

COMMAND = "python -m benchmarks.graph"
COLOURS = {"gone": "#D55E00", "folded": "#009E73", "same": "#777777", "left": "#E69F00", "new": "#0072B2"}


def drawn() -> Drawing:
    """What is to be drawn."""
    source = zoo.load("torchvision:resnet18", seed=0).model
    assert isinstance(source, nn.Module)
    block = source.get_submodule("layer2.0")
    x = torch.randn(1, 64, 56, 56)
    fused = fxfuse.fuse(block, example_inputs=(x,))
    found = drawing(block, fused, fxfuse.report(fused), (x,))
    assert found is not None
    return found


def picture(found: Drawing) -> Figure:
    """Both graphs, side by side."""
    mpl.rcParams.update({"svg.fonttype": "none", "svg.hashsalt": "graph", "font.size": 9})
    figure = Figure(figsize=(7.5, 0.24 * len(found.rows) + 0.5), layout="constrained")
    for axes, side in zip(figure.subplots(1, 2), ("before", "after"), strict=True):
        _draw(axes, found.rows, side)
    return figure


def _draw(axes: Axes, rows: tuple[Row, ...], side: str) -> None:
    nodes: list[Node | None] = [getattr(row, side) for row in rows]
    lanes = 1 + max(node.lane for node in nodes if node is not None)
    for number, (row, node) in enumerate(zip(rows, nodes, strict=True)):
        if node is None:
            continue
        for source in node.inputs:
            above = nodes[source]
            assert above is not None
            axes.plot(
                [above.lane, above.lane, node.lane],
                [source, number - 1, number],
                color="0.75",
                linewidth=1.2,
                zorder=0,
            )
        colour = COLOURS[row.state]
        axes.plot(node.lane, number, "o", color=colour, markersize=6)
        weight = "bold" if row.state in ("gone", "folded") else "normal"
        name = "" if node.name.endswith(node.operator) else node.name
        axes.text(lanes + 0.2, number, f"{node.operator}  {name}", color=colour, va="center", weight=weight)
    axes.set(xlim=(-0.5, lanes + 6), ylim=(len(rows) - 0.4, -0.6))
    axes.set_title(side, loc="left", fontsize=10)
    axes.axis("off")


def main() -> None:
    """Draws it."""
    picture(drawn()).savefig(RESULTS / "graph.svg", metadata={"Date": None})


if __name__ == "__main__":
    main()
