"""What a node of a graph can be, as far as folding is concerned."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import fx

from fxfuse.channels import Shape
from fxfuse.geometry import Geometry
from fxfuse.refusals import Code
from fxfuse.transparent import Transparent

TensorName = str | fx.Node
"""A parameter or buffer by its qualified name, or a node that computes it from such alone."""


@dataclass(frozen=True)
class Linear:
    """A convolution, transposed convolution or linear layer.

    Attributes:
        input: the node whose value it maps.
        weight: (out, in/groups, *kernel), transposed (in, out/groups, *kernel).
        bias: (out,); None without bias.
        channels: how many channels come out.
        in_channels: how many channels go in.
        dims: number of spatial axes; 0 for a linear layer.
        transposed: whether the weight's axes are those of a transposed convolution.
        groups: number of groups.
        bordered: whether its borders see something else than its input: zeros, or less than the kernel.
        geometry: where it looks; None if that is not fixed.
        rank: how many axes its input must have, if it is a product of matrices; None if it does not check.
    """

    input: fx.Node
    weight: TensorName
    bias: TensorName | None
    channels: int
    in_channels: int
    dims: int
    transposed: bool = False
    groups: int = 1
    bordered: bool = False
    geometry: Geometry | None = None
    rank: int | None = None


@dataclass(frozen=True)
class Norm:
    """A norm that, by its running statistics, is an affine map per channel.

    Attributes:
        input: the node whose value it normalises.
        name: qualified name of the norm.
        mean, var: the running statistics, (channels,).
        weight, bias: γ and β, (channels,); None without.
        eps: ε.
        channels: number of channels.
        ranks: the numbers of axes that its input may have; None if it does not check.
        unbatched: whether the batch axis may be missing, so that channels are counted from the end.
    """

    input: fx.Node
    name: str
    mean: TensorName
    var: TensorName
    weight: TensorName | None
    bias: TensorName | None
    eps: float
    channels: int
    ranks: frozenset[int] | None = None
    unbatched: bool = False


@dataclass(frozen=True)
class Affine:
    """A constant multiplied or added: x·c, x/c, x + k·c, c − x, −x.

    Attributes:
        input: x.
        constant: c, a number or a constant node.
        role: what c does to x.
        shape: of c; () for a number.
        dtype: of c if it takes part in type promotion, which numbers and tensors without axes do not.
        negative: whether x is negated before c is added.
        factor: k.
        norm: the name of the norm that it is a part of: one that computes γ/√(σ² + ε) in its forward, as
            torchvision's FrozenBatchNorm2d does.
    """

    input: fx.Node
    constant: float | fx.Node
    role: Literal["times", "over", "plus"]
    shape: Shape = ()
    dtype: torch.dtype | None = None
    negative: bool = False
    factor: float = 1.0
    norm: str | None = None


@dataclass(frozen=True)
class Split:
    """Several parts of its input, in a tuple."""

    input: fx.Node


@dataclass(frozen=True)
class Query:
    """Asks for shape, dtype or device, never for values."""


@dataclass(frozen=True)
class Opaque:
    """Anything else.

    Attributes:
        code, detail: why a known operator was not taken for one.
        like: the nodes to whose shapes, broadcast, its own is equal; empty if that is not known.
    """

    code: Code = Code.OPAQUE_PRODUCER
    detail: str = ""
    like: tuple[fx.Node, ...] = ()


@dataclass(frozen=True)
class LeftNorm:
    """A norm that is not an affine map, or not safely one: it stays, and `code` says why."""

    name: str
    code: Code
    detail: str = ""


Op = Linear | Norm | Affine | Transparent | Split | Query | Opaque | LeftNorm
