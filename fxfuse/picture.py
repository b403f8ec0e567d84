"""Where everything of a drawing stands in an SVG picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from fxfuse.drawing import Drawing, Node, Row

ROW = 20
"""The height of a row."""
_HALF = 600  # the width of one graph
_MARGIN = 16
_LANES = 160  # the most that its lanes take
_LANE = 16  # the most that one of them takes


@dataclass(frozen=True)
class Line:
    """A row of the picture.

    Attributes:
        row: the row of the drawing.
        y: its middle.
        spots: the middle of the node before and of that after; None where it is not.
    """

    row: Row
    y: int
    spots: Sequence[float | None]


@dataclass(frozen=True)
class Half:
    """What is drawn of one of the graphs.

    Attributes:
        left, right: where it begins and ends.
        text: where the text begins.
        edges: the lines between the nodes, as data of an SVG path.
    """

    left: float
    right: float
    text: float
    edges: str


@dataclass(frozen=True)
class Picture:
    """Both graphs, before and after."""

    width: float
    height: int
    halves: tuple[Half, ...]
    lines: tuple[Line, ...]


def picture(drawing: Drawing) -> Picture:
    """The picture of a drawing, one unit for a pixel."""
    sides = [row.before for row in drawing.rows], [row.after for row in drawing.rows]
    lanes = 1 + max((node.lane for side in sides for node in side if node is not None), default=0)
    lane = min(_LANE, _LANES / lanes)
    begins = (0, _HALF + _MARGIN)
    spots = [[_spot(node, left, lane) for node in side] for side, left in zip(sides, begins, strict=True)]
    halves = tuple(
        Half(left, left + _HALF, left + 2 * _MARGIN + lanes * lane, _edges(side, places))
        for side, left, places in zip(sides, begins, spots, strict=True)
    )
    lines = tuple(
        Line(row, _middle(number), places)
        for number, (row, *places) in enumerate(zip(drawing.rows, *spots, strict=True))
    )
    return Picture(halves[1].right, ROW * len(lines), halves, lines)


def _edges(nodes: Sequence[Node | None], spots: Sequence[float | None]) -> str:
    return " ".join(
        _edge((spots[source], source), (spots[row], row))
        for row, node in enumerate(nodes)
        if node is not None
        for source in node.inputs
    )


def _spot(node: Node | None, left: float, lane: float) -> float | None:
    return None if node is None else round(left + _MARGIN + lane * node.lane, 1)


def _middle(row: int) -> int:
    return ROW * row + ROW // 2


def _edge(source: tuple[float | None, int], target: tuple[float | None, int]) -> str:
    """Straight down in the lane of the source, and over to that of the target between the last two rows."""
    (x, row), (end, target_row) = source, target
    down, y = _middle(target_row - 1), _middle(target_row)
    if x == end:
        return f"M{x} {_middle(row)}V{y}"
    return f"M{x} {_middle(row)}V{down}C{x} {down + ROW // 2} {end} {y - ROW // 2} {end} {y}"
