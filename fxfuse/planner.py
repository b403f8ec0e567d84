"""The plan of which every move can be made.

A plan is carried out as a whole or not at all, since a later move may rely on an earlier one. So it is made
anew without the moves that fail, until none does.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import fx

from fxfuse.match import match
from fxfuse.ops import Reader
from fxfuse.plan import Direction, Move, Plan
from fxfuse.refusals import Code
from fxfuse.shapes import GraphShapes
from fxfuse.solve import Folded, Solution, solve


def planned(
    graph: fx.Graph, reader: Reader, shapes: GraphShapes, *, assumes: bool = True, fixed: bool = True
) -> tuple[Plan, Solution]:
    """A plan of which every move can be made; moves whose numbers do not allow it are planned around.

    Args:
        graph: the graph; it is not changed.
        reader: reads its nodes.
        shapes: what is known of the shapes of its values.
        assumes: whether moves may assume what the graph then has to assert.
        fixed: whether the tensors stay as they are, so that moves may depend on their numbers.
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
            failed |= {move: code for move in plan.moves for code in _conditions(move)}
        solution = Solution() if failed else solve(plan, reader, solved)
        failed |= solution.failed
        if not failed:
            return plan, solution
        barred |= {(move.node, move.direction): code for move, code in failed.items()}


def _conditions(move: Move) -> Iterator[Code]:
    """What has to be true of the numbers of the map that `move` moves."""
    for site in move.sites:
        yield from site.channels.needs


def nothing_planned(graph: fx.Graph, reader: Reader, shapes: GraphShapes, code: Code) -> Plan:
    """A plan without moves: all norms are left, for that reason if there is no other."""
    directions: tuple[Direction, ...] = ("backward", "forward")
    barred = {(node, direction): code for node in graph.nodes for direction in directions}
    return match(graph, reader, shapes, barred)
