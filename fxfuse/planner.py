"""The plan of which every move can be made.

A plan is carried out as a whole or not at all, since a later move may rely on an earlier one. So it is made
anew without the moves that fail, until none does.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping
from types import MappingProxyType
from typing import Any

from torch import fx

from fxfuse.capture import Capture, reshaped_in_place
from fxfuse.match import match
from fxfuse.ops import Reader
from fxfuse.plan import Direction, Plan
from fxfuse.refusals import Code
from fxfuse.shapes import GraphShapes
from fxfuse.solve import Folded, Solution, solve


def planned(
    graph: fx.Graph,
    reader: Reader,
    shapes: GraphShapes,
    *,
    assumes: bool = True,
    fixed: bool = True,
    regions: Mapping[fx.Node, Hashable] = MappingProxyType({}),
) -> tuple[Plan, Solution]:
    """A plan of which every move can be made; moves whose numbers do not allow it are planned around.

    Args:
        graph: the graph; it is not changed.
        reader: reads its nodes.
        shapes: what is known of the shapes of its values.
        assumes: whether moves may assume what the graph then has to assert.
        fixed: whether the tensors stay as they are, so that moves may depend on their numbers.
        regions: parts of the graph from one to another of which no map may move, by the nodes in them.
    """
    barred: dict[tuple[fx.Node, Direction], Code] = {}
    solved: dict[tuple[Any, ...], Folded | Code] = {}
    while True:
        plan = match(graph, reader, shapes, barred)
        failed = {move: Code.LAYOUT for move in plan.moves if move.node in plan.stuck}
        if not assumes:
            relaid = frozenset[fx.Node]().union(*plan.views.values())
            failed |= {move: Code.RANK_UNKNOWN for move in plan.moves if move.assumed}
            failed |= {move: Code.LAYOUT for move in plan.moves if move.node in relaid}
        if not fixed:
            conditions = ((move, site.channels.needs) for move in plan.moves for site in move.sites)
            failed |= {move: code for move, needs in conditions for code in needs}
        pairs = ((move, site.node) for move in plan.moves for site in move.sites)
        crossing = {move for move, site in pairs if regions.get(site) != regions.get(move.node)}
        failed |= dict.fromkeys(crossing, Code.PRESERVED)
        solution = Solution() if failed else solve(plan, reader, solved)
        failed |= solution.failed
        if not failed:
            return plan, solution
        barred |= {(move.node, move.direction): code for move, code in failed.items()}


def planned_guarded(
    capture: Capture,
    reader: Reader,
    observed: Mapping[fx.Node, Any],
    *,
    stays: Code | None = None,
    fixed: bool = True,
    regions: Mapping[fx.Node, Hashable] = MappingProxyType({}),
) -> tuple[Plan, Solution]:
    """The same for the graph of a compiler, which guards the shapes that it has observed.

    Args:
        capture: the graph; it is not changed.
        reader: reads its nodes.
        observed: what the compiler saw, unless it is in the graph itself.
        stays: why all norms are to be left, if they are.
        fixed: whether the tensors stay as they are.
        regions: parts of the graph from one to another of which no map may move, by the nodes in them.
    """
    shapes = GraphShapes(capture.graph, reader, observed, guarded=True)
    if reshaped_in_place(capture.graph) is not None:
        stays = Code.RESHAPED
    if stays is None:
        return planned(capture.graph, reader, shapes, fixed=fixed, regions=regions)
    directions: tuple[Direction, ...] = ("backward", "forward")
    barred = {(node, direction): stays for node in capture.graph.nodes for direction in directions}
    return match(capture.graph, reader, shapes, barred), Solution()
