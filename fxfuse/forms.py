"""Values as linear functions of one other value: convolutions, norms, averages and sums, put together."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

from torch import fx

from fxfuse.channels import Channels
from fxfuse.geometry import Geometry, Window, multiplications, point
from fxfuse.nodes import Affine, Linear, Norm


@dataclass(frozen=True)
class Total:
    """A sum, each part with a factor."""

    factors: tuple[float, ...]


@dataclass(frozen=True)
class Form:
    """The value of `node` as a linear function of that of `source`, but for a shift.

    Attributes:
        node: the node of the last step.
        source: the node that it is a function of.
        step: the last step: an operator, a sum, or a form, of what its one part gives; None for the source
            itself, and for what gives its input as it is.
        parts: what the last step is done to: one form, of a sum several.
        nodes: those that compute it, `source` not among them.
        geometry: that of a kernel which can be the same function; None if it maps each element by itself.
        channels, in_channels: how many come out and go in; None if any number may.
        axis: that of the channels, counted from the end; None if any may be.
        host: the operator that has that geometry; None if none has.
        shifts: whether something may be added, by its kind and not by its numbers.
        cost: how many multiplications and additions of channels each place of the output takes.
        depth: how many steps there are one after another.
        acts: for a norm or a constant, how it acts on the channels.
        assumed: the numbers of axes that are assumed of nodes.
    """

    node: fx.Node
    source: fx.Node
    step: Step | None = None
    parts: tuple[Form, ...] = ()
    nodes: frozenset[fx.Node] = frozenset()
    geometry: Geometry | None = None
    channels: int | None = None
    in_channels: int | None = None
    axis: int | None = None
    host: fx.Node | None = None
    shifts: bool = False
    cost: int = 0
    depth: int = 0
    acts: Channels | None = None
    assumed: frozenset[tuple[fx.Node, int]] = frozenset()

    def steps(self) -> Iterator[Form]:
        """This form and all that it is made of, the parts before the whole."""
        for part in self.parts:
            yield from part.steps()
        if isinstance(self.step, Form):
            yield from self.step.steps()
        else:
            yield self

    @property
    def sources(self) -> frozenset[fx.Node]:
        """The source, and the values on the way that several steps read."""
        inner = [each.sources for each in (*self.parts, self.step) if isinstance(each, Form)]
        return frozenset({self.source}).union(*inner)

    @property
    def has_constants(self) -> bool:
        """Whether something is multiplied by a constant on the way, or one is added."""
        return any(isinstance(form.step, Affine) for form in self.steps())

    @property
    def is_read_by_an_operator(self) -> bool:
        """Whether an operator reads what has the dtype of the source, and not what constants made of it."""
        if isinstance(self.step, Linear) and not self.parts[0].has_constants:
            return True
        if isinstance(self.step, Form):
            inner = self.parts[0]
            return inner.is_read_by_an_operator or (
                not inner.has_constants and self.step.is_read_by_an_operator
            )
        return any(part.is_read_by_an_operator for part in self.parts)

    def seen_as(self, dims: int) -> Geometry | None:
        """The geometry among operators with `dims` spatial axes."""
        if self.geometry is not None or self.channels is None:
            return self.geometry
        return point(dims, self.channels)

    @property
    def saved(self) -> int:
        """How much less than all steps the one operator costs that does it all; more, if it is negative."""
        assert self.geometry is not None and self.channels is not None and self.in_channels is not None
        return self.cost - multiplications(self.geometry, self.channels, self.in_channels)


Step = Linear | Norm | Affine | Window | Total | Form
