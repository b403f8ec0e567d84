"""Each fold, tried out: what the folded operator gives is what the operators of the source gave.

The source's side is computed as a sum of products and by torch's own batch norm, and not by the arithmetic of
`fxfuse.affine` and `fxfuse.fold`. Everything is in float64, on a small random input: one that covers the
kernel once and is zero in all but a few input channels, so that little of a large weight has to be read. All
output channels are looked at. Two things are asked:

* algebra: folded in float64, does the operator give the same? That does not depend on the model's dtype.
* rounding: are the folded weight and bias those numbers, each rounded once?

What the graph was read as, and where a map was found to go, is taken as given: ``verify`` looks at that.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import Tensor, fx

from fxfuse.affine import exact
from fxfuse.channels import KEPT, every
from fxfuse.fold import Absorption, absorb_unchecked
from fxfuse.nodes import Norm, TensorName
from fxfuse.ops import Reader
from fxfuse.plan import Move, Plan, Site
from fxfuse.solve import Solution, number

# In-channels, of each group, in which the input is not zero.
_CHANNELS = 4
# Sums in float64 may differ by this, relative to what is summed.
_SUMS = 2.0**-42


def errors(plan: Plan, solution: Solution, reader: Reader) -> dict[Move, float]:
    """How far the folds of each move are from the source: relative L2 distance; infinite if they are wrong.

    What has no numbers (tensors on the meta device) is left out.
    """
    taken: dict[fx.Node, list[tuple[Move, Site]]] = defaultdict(list)
    for move in plan.moves:
        for site in move.sites:
            taken[site.node].append((move, site))
    generator = torch.Generator("cpu").manual_seed(0)
    found: dict[Move, float] = {}
    with torch.no_grad():
        for node, (weight, bias) in solution.tensors.items():
            if not weight.is_meta:
                trial = _Trial(solution.absorptions[node], taken[node], reader, generator)
                error = trial.error(weight, bias)
                found |= {move: max(error, found.get(move, 0.0)) for move, _ in taken[node]}
    return found


class _Trial:
    """One operator of the source, the norms and constants that it takes up, and an input for it."""

    def __init__(
        self,
        what: Absorption,
        taken: Sequence[tuple[Move, Site]],
        reader: Reader,
        generator: torch.Generator,
    ) -> None:
        self.operator = taken[0][1].operator
        self.reader = reader
        self.before = [each for each in reversed(taken) if each[1].side == "input"]
        self.after = [each for each in taken if each[1].side == "output"]
        groups, count = what.groups, self.operator.in_channels // what.groups
        # What a shift before the operator adds comes out of all channels.
        size = count if self.before else min(count, _CHANNELS)
        start = int(torch.randint(count - size + 1, (), generator=generator, device="cpu"))
        self.channels = slice(start, start + size)
        bias = None if what.bias is None else exact(what.bias)
        self.source = replace(what, weight=self._some(what.weight), bias=bias)
        seen = 1 if what.transposed else math.prod(what.weight.shape[2:])
        x = torch.rand((1, groups * size, seen), dtype=torch.float64, generator=generator, device="cpu") - 0.5
        self.x = x.to(self.source.weight.device)

    def error(self, weight: Tensor, bias: Tensor | None) -> float:
        """The relative L2 distance of the operator with these from the source; infinite if they are wrong."""
        expected = self._expected(lambda part: part)
        right_weight, right_bias = absorb_unchecked(self.source)
        difference = self._run(self.x, right_weight, right_bias) - expected
        # Where large numbers cancel, it is these that count.
        if not _within(difference, expected, _SUMS) and not _within(difference, self._expected(abs), _SUMS):
            return math.inf
        weight_change = self._some(weight) - right_weight
        bias_change = (0.0 if bias is None else exact(bias)) - right_bias
        limits = torch.finfo(weight.dtype)
        # Half a unit in the last place; float16 and bfloat16 are rounded by way of float32.
        unit = 0.5 * (1 + 2.0**-12) * limits.eps + 2.0**-51
        for change, right in ((weight_change, right_weight), (bias_change, right_bias)):
            if not _within(change, right.abs() + limits.tiny, unit):
                return math.inf
        difference += self._run(self.x, weight_change, bias_change)
        size = torch.linalg.vector_norm(expected)
        return float(torch.linalg.vector_norm(difference) / size) if size else 0.0

    def _expected(self, part: Callable[[Tensor], Tensor]) -> Tensor:
        """What the source gives; with ``part=abs`` the magnitudes of what is summed on the way."""
        value = part(self.x)
        for move, site in self.before:
            value = self._mapped(value, move, site, part)
        bias = None if self.source.bias is None else part(self.source.bias)
        value = self._run(value, part(self.source.weight), bias)
        for move, site in self.after:
            value = self._mapped(value, move, site, part)
        return value

    def _run(self, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """At one place: (1, in, kernel) → (1, out, 1), or transposed (1, in, 1) → (1, out, kernel)."""
        groups, channels = self.operator.groups, self.operator.channels
        if self.operator.transposed:
            rows = x.view(groups, 1, -1) @ weight.reshape(groups, weight.shape[0] // groups, -1)
        else:
            rows = weight.reshape(groups, channels // groups, -1) @ x.view(groups, -1, 1)
        value = rows.view(1, channels, -1)
        # The bias of a linear function may have a batch axis, or be one number.
        return value if bias is None else value + bias.view(-1, bias.shape[-1] if bias.dim() else 1, 1)

    def _some(self, weight: Tensor) -> Tensor:
        """The weights of the channels in which the input is not zero, in float64."""
        if not self.operator.transposed:
            return exact(weight[:, self.channels])
        grouped = weight.view(self.operator.groups, -1, *weight.shape[1:])
        return exact(grouped[:, self.channels].flatten(0, 1))

    def _mapped(self, value: Tensor, move: Move, site: Site, part: Callable[[Tensor], Tensor]) -> Tensor:
        """What `move` makes of a value with the channels of `site`."""
        index, source = site.channels.index, move.source
        places = None if index == every(len(index)) else torch.tensor(index, device=value.device)

        def taken(tensor: Tensor) -> Tensor:
            numbers = exact(tensor)
            return part(numbers[: len(index)] if places is None else numbers[places.clamp_min(0)])

        def named(name: TensorName | None) -> Tensor | None:
            return None if name is None else taken(self.reader.tensor(name))

        if isinstance(source, Norm):
            var = taken(self.reader.tensor(source.var))
            centred, bias = value, None
            if site.channels.shift:
                centred = value + part(-taken(self.reader.tensor(source.mean))).view(-1, 1)
                bias = named(source.bias)
            mapped = F.batch_norm(
                centred, torch.zeros_like(var), var, named(source.weight), bias, eps=source.eps
            )
        else:
            constant = taken(number(source, self.reader).to(value.device).flatten()).view(-1, 1)
            if source.role == "times":
                mapped = value * constant
            elif source.role == "over":
                mapped = value / constant
            else:
                mapped = part(-value if source.negative else value)
                if site.channels.shift:
                    mapped = mapped + part(source.factor * constant)
        if places is not None and KEPT in index:
            mapped = torch.where((places >= 0).view(-1, 1), mapped, value)
        return mapped


def _within(difference: Tensor, magnitude: Tensor, relative: float) -> bool:
    """Whether no element differs by more than that; NaN does."""
    return bool((difference.abs() <= relative * magnitude.abs()).all())
