"""A plan → the folded tensors, and the moves whose numbers do not allow it.

What has to be true of a map's numbers is decided here: that they are finite in the weight's dtype, and what
the operators on the way need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfuse.affine import AffineMap, exact
from fxfuse.fold import Absorption, absorb, absorb_unchecked
from fxfuse.nodes import Affine, Linear, Norm, TensorName
from fxfuse.ops import Reader
from fxfuse.plan import Move, Plan, Site
from fxfuse.refusals import Code
from fxfuse.replica import alias

Folded = tuple[Tensor, Tensor | None]

_HOLDS: Mapping[Code, Callable[[AffineMap], Tensor]] = {
    Code.PADDING: lambda affine: (affine.shift == 0).all(),
    Code.NEGATIVE_SCALE: lambda affine: (affine.scale >= 0).all(),
}


@dataclass
class Solution:
    """What a plan comes to.

    Attributes:
        tensors: the folded weight and bias of every operator that changes.
        absorptions: what they are computed from.
        failed: the moves that cannot be made, with the reason.
        errors: how far the folds of a move are from the source, as `fxfuse.check` measures it.
    """

    tensors: dict[fx.Node, Folded] = field(default_factory=dict)
    absorptions: dict[fx.Node, Absorption] = field(default_factory=dict)
    failed: dict[Move, Code] = field(default_factory=dict)
    errors: dict[Move, float] = field(default_factory=dict)


@dataclass
class _Taken:
    """What one operator takes up, in the order in which it is to be composed."""

    operator: Linear
    moves: list[Move] = field(default_factory=list)
    before: AffineMap | None = None
    after: AffineMap | None = None


def solve(plan: Plan, reader: Reader, solved: dict[tuple[Any, ...], Folded | Code]) -> Solution:
    """Computes the folded tensors of `plan`.

    Args:
        plan: the plan.
        reader: reads the graph and its tensors.
        solved: what has been computed for this graph, by operator and the sources that it takes up; added to.
    """
    solution = Solution()
    pieces = [*_pieces(plan, reader)]
    for move, site, piece in pieces:
        broken = next((code for code in site.channels.needs if not _holds(code, piece)), None)
        if broken is not None:
            solution.failed.setdefault(move, broken)
    if solution.failed:
        return solution
    for operator, parts in _composed(pieces).items():
        key = (operator, *((move.node, move.direction) for move in parts.moves))
        solution.absorptions[operator] = what = _absorption(parts, reader)
        if key not in solved:
            solved[key] = _folded(operator, parts, what, reader)
        tensors = solved[key]
        if isinstance(tensors, Code):
            solution.failed.setdefault(parts.moves[-1], tensors)
        else:
            solution.tensors[operator] = tensors
    return solution


def solve_unchecked(plan: Plan, reader: Reader) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """The folded weights and biases, in operators that autograd differentiates and compilers trace.

    Nothing is checked: `plan` has been solved before, and has no move that depends on a map's numbers.
    """
    composed = _composed(_pieces(plan, reader))
    return {node: absorb_unchecked(_absorption(parts, reader)) for node, parts in composed.items()}


def sources(plan: Plan, reader: Reader) -> set[str]:
    """The names of the parameters and buffers from which the folded tensors of `plan` are computed."""
    found: set[str] = set()
    for move in plan.moves:
        source = move.source
        if isinstance(source, Norm):
            used: list[Any] = [source.mean, source.var, source.weight, source.bias]
        else:
            used = [source.constant]
        used += [tensor for site in move.sites for tensor in (site.operator.weight, site.operator.bias)]
        for each in used:
            found |= {each} if isinstance(each, str) else set()
            found |= reader.constants.names(each) if isinstance(each, fx.Node) else set()
    return found


def _pieces(plan: Plan, reader: Reader) -> Iterator[tuple[Move, Site, AffineMap]]:
    """What each operator takes up of each map, in the order of the moves."""
    for move in plan.moves:
        affine = affine_of(move.source, reader, reader.tensor(move.sites[0].operator.weight).device)
        for site in move.sites:
            yield move, site, affine.taken(site.channels.index, shift=site.channels.shift)


def _composed(pieces: Iterable[tuple[Move, Site, AffineMap]]) -> dict[fx.Node, _Taken]:
    """What each operator takes up in all, of moves that come as `match` found them."""
    found: dict[fx.Node, _Taken] = {}
    for move, site, piece in pieces:
        taken = found.setdefault(site.node, _Taken(site.operator))
        if site.side == "output":
            taken.after = piece if taken.after is None else taken.after.then(piece)
        else:
            taken.before = piece if taken.before is None else piece.then(taken.before)
        taken.moves.append(move)
    return found


def affine_of(source: Norm | Affine, reader: Reader, device: torch.device) -> AffineMap:
    """The map of a norm, on the norm's device, or of arithmetic with a constant, on `device`."""
    if isinstance(source, Norm):
        weight = None if source.weight is None else reader.tensor(source.weight)
        bias = None if source.bias is None else reader.tensor(source.bias)
        return AffineMap.from_norm(
            reader.tensor(source.mean), reader.tensor(source.var), weight, bias, source.eps
        )
    value = exact(number(source, reader).to(device)).flatten()
    if source.role == "plus":
        return AffineMap(torch.full_like(value, -1.0 if source.negative else 1.0), source.factor * value)
    return AffineMap(value if source.role == "times" else 1 / value, torch.zeros_like(value))


def number(source: Affine, reader: Reader) -> Tensor:
    """The constant that it multiplies or adds."""
    if isinstance(source.constant, fx.Node):
        return reader.tensor(source.constant)
    return torch.tensor(source.constant, dtype=torch.float64)


def _holds(code: Code, piece: AffineMap) -> bool:
    return not piece.scale.is_meta and bool(_HOLDS[code](piece))


def _folded(operator: fx.Node, taken: _Taken, what: Absorption, reader: Reader) -> Folded | Code:
    folded = absorb(what)
    if isinstance(folded, Code):
        return folded
    weight = taken.operator.weight
    if isinstance(weight, str):
        new = alias(what.weight, folded[0])
    else:
        new = nn.Parameter(folded[0], _trains(weight, reader))
    if what.bias is None and not any(_shifts(move, operator) for move in taken.moves):
        return new, None
    return new, nn.Parameter(folded[1], _needs_gradient(new, what.bias, taken.moves, reader))


def _absorption(taken: _Taken, reader: Reader) -> Absorption:
    linear = taken.operator
    bias = None if linear.bias is None else reader.tensor(linear.bias)
    weight = reader.tensor(linear.weight)
    return Absorption(weight, bias, taken.before, taken.after, linear.transposed, linear.groups)


def _shifts(move: Move, operator: fx.Node) -> bool:
    """Whether `move` may add something, by its kind and not by its numbers."""
    can = isinstance(move.source, Norm) or move.source.role == "plus"
    return can and any(site.channels.shift for site in move.sites if site.node is operator)


def _needs_gradient(weight: Tensor, bias: Tensor | None, moves: list[Move], reader: Reader) -> bool:
    """As the bias that was there; a new one as the norm's β, or as the weight where there is neither."""
    if bias is not None:
        return bias.requires_grad
    norms = [move.source for move in moves if isinstance(move.source, Norm)]
    betas = [_trains(norm.bias, reader) for norm in norms if norm.bias is not None]
    return any(betas) if betas else weight.requires_grad


def _trains(source: TensorName, reader: Reader) -> bool:
    if isinstance(source, fx.Node):
        return reader.constants.trains(source)
    return reader.tensor(source).requires_grad
