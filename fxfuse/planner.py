"""The plan of which every move can be made.

A plan is carried out as a whole or not at all, since a later move may rely on an earlier one. So it is made
anew without the moves that fail, until none does.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import fx

from fxfuse.capture import Capture, reshaped_in_place
from fxfuse.check import errors
from fxfuse.match import match
from fxfuse.ops import Reader
from fxfuse.plan import Change, Direction, Plan
from fxfuse.refusals import Code
from fxfuse.shapes import GraphShapes
from fxfuse.solve import Folded, Solution, solve

Forbid = Callable[[Plan, Change], Code | None]


def planned(
    graph: fx.Graph, reader: Reader, shapes: GraphShapes, forbid: Forbid = lambda *_: None
) -> tuple[Plan, Solution]:
    """A plan of which every move can be made, and has been tried out; the others are planned around.

    Args:
        graph: the graph; it is not changed.
        reader: reads its nodes.
        shapes: what is known of the shapes of its values.
        forbid: why a move or merge of a plan is not to be made; None if it may be.
    """
    barred: dict[tuple[fx.Node, Direction], Code] = {}
    solved: dict[tuple[Any, ...], Folded | Code] = {}
    while True:
        plan = match(graph, reader, shapes, barred)
        codes = {
            each: Code.LAYOUT if each.node in plan.stuck else forbid(plan, each) for each in plan.changes
        }
        failed = {each: code for each, code in codes.items() if code is not None}
        if not failed:
            solution = solve(plan, reader, solved)
            failed = solution.failed
            if not failed:
                solution.errors = errors(plan, solution, reader)
                failed = {each: Code.CHECK for each, error in solution.errors.items() if not error < math.inf}
            if not failed:
                return plan, solution
        barred |= {(each.node, each.direction): code for each, code in failed.items()}


def planned_guarded(
    capture: Capture,
    reader: Reader,
    observed: Mapping[fx.Node, Any],
    *,
    stays: Code | None = None,
    forbid: Forbid = lambda *_: None,
) -> tuple[Plan, Solution]:
    """The same for the graph of a compiler, which guards the shapes that it has observed.

    Args:
        capture: the graph; it is not changed.
        reader: reads its nodes.
        observed: what the compiler saw, unless it is in the graph itself.
        stays: why all norms are to be left, if they are.
        forbid: as above.
    """
    shapes = GraphShapes(capture.graph, reader, observed, guarded=True)
    if reshaped_in_place(capture.graph) is not None:
        stays = Code.RESHAPED
    return planned(capture.graph, reader, shapes, forbid if stays is None else lambda *_: stays)
