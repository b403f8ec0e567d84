"""A plan → the folded tensors, and the moves whose numbers do not allow it.

What has to be true of a map's numbers is decided here: that they are finite in the weight's dtype, and what
the operators on the way need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from torch import Tensor, fx, nn

from fxfuse.affine import AffineMap, exact
from fxfuse.fold import Absorption, absorb, absorb_unchecked, rounded
from fxfuse.kernels import Kernel
from fxfuse.maps import affine_of
from fxfuse.merging import Merger, absorption
from fxfuse.nodes import Linear, Norm, TensorName
from fxfuse.ops import Reader
from fxfuse.plan import Change, Merge, Move, Plan, Site
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
        absorptions: what they are computed from; also those of what goes when operators become one.
        failed: the moves and merges that cannot be made, with the reason.
        errors: how far the folds of each are from the source, as `fxfuse.check` measures it.
    """

    tensors: dict[fx.Node, Folded] = field(default_factory=dict)
    absorptions: dict[fx.Node, Absorption] = field(default_factory=dict)
    failed: dict[Change, Code] = field(default_factory=dict)
    errors: dict[Change, float] = field(default_factory=dict)


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
    composed = _composed(pieces)
    solution.absorptions = {node: _absorption(parts, reader) for node, parts in composed.items()}
    merged = frozenset[fx.Node]().union(*(merge.form.nodes for merge in plan.merges))
    for operator, parts in composed.items():
        if operator in merged:
            continue
        key = (operator, *((move.node, move.direction) for move in parts.moves))
        if key not in solved:
            solved[key] = _folded(operator, parts, solution.absorptions[operator], reader)
        tensors = solved[key]
        if isinstance(tensors, Code):
            solution.failed.setdefault(parts.moves[-1], tensors)
        else:
            solution.tensors[operator] = tensors
    for merge in plan.merges:
        found = _merged(merge, solution.absorptions, reader)
        if isinstance(found, Code):
            whole = [node for node in merge.form.nodes - {*merge.operators} if node in composed]
            last: list[Change] = [composed[node].moves[-1] for node in whole]
            solution.failed |= dict.fromkeys(last or [merge], found)
        else:
            solution.tensors[merge.host] = found
    return solution


def solve_unchecked(plan: Plan, reader: Reader) -> dict[fx.Node, tuple[Tensor, Tensor]]:
    """The folded weights and biases, in operators that autograd differentiates and compilers trace.

    Nothing is checked: `plan` has been solved before, and has no move that depends on a map's numbers.
    """
    composed = _composed(_pieces(plan, reader))
    absorptions = {node: _absorption(parts, reader) for node, parts in composed.items()}
    merged = frozenset[fx.Node]().union(*(merge.form.nodes for merge in plan.merges))
    found = {node: absorb_unchecked(what) for node, what in absorptions.items() if node not in merged}
    for merge in plan.merges:
        kernel = merged_kernel(merge, absorptions, reader)
        weight = reader.tensor(merge.operators[merge.host].weight)
        found[merge.host] = (
            kernel.weight.to(weight.device, weight.dtype),
            kernel.bias.to(weight.device, weight.dtype),
        )
    return found


def sources(plan: Plan, reader: Reader) -> set[str]:
    """The names of the parameters and buffers from which the folded tensors of `plan` are computed."""
    found: set[str] = set()
    used: list[Any] = []
    for change in plan.changes:
        if isinstance(change, Merge):
            operators = [*change.operators.values()]
        else:
            operators, source = [site.operator for site in change.sites], change.source
            if isinstance(source, Norm):
                used += [source.mean, source.var, source.weight, source.bias]
            else:
                used.append(source.constant)
        used += [tensor for operator in operators for tensor in (operator.weight, operator.bias)]
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


def _holds(code: Code, piece: AffineMap) -> bool:
    return not piece.scale.is_meta and bool(_HOLDS[code](piece))


def _folded(operator: fx.Node, taken: _Taken, what: Absorption, reader: Reader) -> Folded | Code:
    folded = absorb(what)
    if isinstance(folded, Code):
        return folded
    new = _like(taken.operator.weight, folded[0], reader)
    if what.bias is None and not any(_shifts(move, operator) for move in taken.moves):
        return new, None
    return new, nn.Parameter(folded[1], _needs_gradient(new, what.bias, taken.moves, reader))


def _merged(merge: Merge, absorptions: Mapping[fx.Node, Absorption], reader: Reader) -> Folded | Code:
    host = merge.operators[merge.host]
    folded = rounded(merged_kernel(merge, absorptions, reader).operator, reader.tensor(host.weight))
    if isinstance(folded, Code):
        return folded
    new = _like(host.weight, folded[0], reader)
    if not merge.form.shifts:
        return new, None
    bias = None if host.bias is None else reader.tensor(host.bias)
    norms = [move for move in merge.moves if isinstance(move.source, Norm)]
    return new, nn.Parameter(folded[1], _needs_gradient(new, bias, norms, reader))


def _like(source: TensorName, tensor: Tensor, reader: Reader) -> Tensor:
    """A new weight, which asks for gradients as the one did in whose place it comes."""
    if isinstance(source, str):
        return alias(reader.tensor(source), tensor)
    return nn.Parameter(tensor, _trains(source, reader))


def merged_kernel(merge: Merge, absorptions: Mapping[fx.Node, Absorption], reader: Reader) -> Kernel:
    """What becomes of the operator that stays, in float64."""
    host = merge.operators[merge.host]
    assert merge.form.channels is not None
    merger = Merger(reader, absorptions, host.dims, exact(reader.tensor(host.weight)[:0]).device)
    return merger.kernel(merge.form, merge.form.channels)


def _absorption(taken: _Taken, reader: Reader) -> Absorption:
    return replace(absorption(taken.operator, reader), before=taken.before, after=taken.after)


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
