"""The table: which operators let an affine map pass, by the name of their function, method or layer.

To teach fxfuse an operator, write how it treats its axes (one of the five kinds of `fxfuse.transparent`) and
give it its names in `TRANSPARENT`; if torch.nn has a layer that does the same, add it to `LAYERS`, whose
attributes then stand for the arguments.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

from torch import fx, nn

from fxfuse import patterns
from fxfuse.channels import Pattern, Shape
from fxfuse.geometry import Window, read_geometry
from fxfuse.refusals import Code
from fxfuse.transparent import Concat, Rearranged, Shapes, Slice, Sum, Transparent, Within


@dataclass(frozen=True)
class Call:
    """A call of an operator, whatever its dialect.

    Attributes:
        input: its first argument.
        given: gives an argument by name; None for one that the operator does not have.
    """

    input: Any
    given: Callable[[str], Any]

    def first(self, *names: str) -> Any:
        """The first of those arguments that is given, or None."""
        return next((found for found in map(self.given, names) if found is not None), None)

    def integers(self, *names: str) -> tuple[int, ...] | None:
        """The first argument that is given of those, as a tuple; None if its numbers are not fixed."""
        value = self.first(*names)
        numbers = tuple(value) if isinstance(value, (tuple, list)) else (value,)
        return numbers if all(type(number) is int for number in numbers) else None


Builder = Callable[[Call], Transparent | None]


def _last(count: int) -> Callable[[int | None], Sequence[int]]:
    return lambda _: range(-count, 0)


def _same(call: Call) -> Transparent:
    return Within(call.input, is_identity=True)


def _dropout(call: Call) -> Transparent | None:
    return _same(call) if call.first("training", "train") is False else None


# ---- within some axes -------------------------------------------------------------------------------


def _average_pool(dims: int) -> Builder:
    """A window that reaches over the edge counts zeros, unless it counts the image's elements only."""

    def build(call: Call) -> Transparent:
        padded = call.integers("padding") is None or any(call.integers("padding") or ())
        counted = padded and call.given("count_include_pad") is not False
        counted = counted or call.given("divisor_override") is not None
        window = None if padded and call.given("count_include_pad") is False else _window(call, dims)
        return Within(call.input, _last(dims), stops_shift=Code.PADDING if counted else None, window=window)

    return build


def _window(call: Call, dims: int) -> Window | None:
    """What is averaged over; None if that is not fixed, or not the same everywhere."""
    sizes, divisor = call.integers("kernel_size"), call.given("divisor_override")
    if sizes is None or call.given("ceil_mode") or type(divisor) not in (int, type(None)):
        return None
    sizes = sizes * dims if len(sizes) == 1 else sizes
    given = {"stride": call.given("stride") or sizes, "padding": call.given("padding") or 0}
    geometry = read_geometry(given, sizes, groups=1, transposed=False)
    return None if geometry is None else Window(geometry.axes, divisor or prod(sizes))


def _adaptive_average_pool(dims: int) -> Builder:
    def build(call: Call) -> Transparent:
        sizes = set(call.integers("output_size") or {None})
        return Within(call.input, _last(dims), size=sizes.pop() if len(sizes) == 1 else None)

    return build


def _max_pool(dims: int) -> Builder:
    def build(call: Call) -> Transparent | None:
        return None if call.given("return_indices") else Within(call.input, _last(dims), monotone=True)

    return build


def _reduced(*, stops_shift: Code | None = None, monotone: bool = False) -> Builder:
    def build(call: Call) -> Transparent | None:
        dims = call.integers("dim")
        if not dims or call.given("dtype") is not None:
            return None
        removes = not call.given("keepdim")
        return Within(call.input, lambda _: dims, removes, stops_shift, monotone, size=1)

    return build


def _interpolated(call: Call) -> Transparent:
    """Every output is an average of inputs; axes 0 and 1 are batch and channels."""
    return Within(call.input, lambda rank: None if rank is None else range(2, rank))


def _padded(call: Call) -> Transparent | None:
    widths = call.first("pad", "padding")
    if not isinstance(widths, (tuple, list)) or call.given("value") not in (None, 0):
        return None
    fills = call.given("mode") in (None, "constant", "zeros")
    crops = all(type(width) is int and width <= 0 for width in widths)
    stops_shift = Code.PADDING if fills and not crops else None
    return Within(call.input, _last(len(widths) // 2), stops_shift=stops_shift)


def _mirrored(call: Call) -> Transparent | None:
    widths = call.integers("padding", "pad")
    return None if widths is None else Within(call.input, _last(len(widths) // 2))


# ---- into other axes --------------------------------------------------------------------------------


def _flatten(call: Call) -> Transparent | None:
    start, end = call.given("start_dim"), call.given("end_dim")
    if type(start) is not int or type(end) is not int:
        return None
    rank = start + 1 if start >= 0 and end == -1 else None
    return Rearranged(call.input, lambda shape, _: patterns.flattened(shape, start, end), rank=rank)


def _unflatten(call: Call) -> Transparent | None:
    axis, sizes = call.given("dim"), call.first("sizes", "unflattened_size")
    if type(axis) is not int or not isinstance(sizes, (tuple, list)):
        return None

    def pattern(shape: Shape, shapes: Shapes) -> Pattern | None:
        place = axis % len(shape)
        known = [shapes.size(size) for size in sizes]
        return patterns.aligned(shape, (*shape[:place], *known, *shape[place + 1 :]))

    return Rearranged(call.input, pattern)


def _reshape(call: Call) -> Transparent | None:
    sizes = call.first("shape", "size")
    if not isinstance(sizes, (tuple, list)):
        return None
    return Rearranged(
        call.input,
        lambda shape, shapes: patterns.aligned(shape, [shapes.size(size) for size in sizes]),
        rank=len(sizes),
    )


def _reshape_as(call: Call) -> Transparent:
    def pattern(shape: Shape, shapes: Shapes) -> Pattern | None:
        other = shapes.of(call.given("other"))
        return None if other is None else patterns.aligned(shape, other)

    return Rearranged(call.input, pattern)


def _permuted(order: Callable[[Call, int], Sequence[int] | None]) -> Builder:
    def build(call: Call) -> Transparent:
        def pattern(shape: Shape, _: Shapes) -> Pattern | None:
            places = order(call, len(shape))
            return None if places is None else patterns.permuted(shape, places)

        dims = call.integers("dims")
        count = None if dims is None else len(dims)
        return Rearranged(call.input, pattern, rank=count, takes=count)

    return build


def _transposed(call: Call, rank: int) -> Sequence[int] | None:
    one, other = call.integers("dim0", "axis0"), call.integers("dim1", "axis1")
    if one is None or other is None:
        return None
    places = [*range(rank)]
    places[one[0]], places[other[0]] = places[other[0]], places[one[0]]
    return places


def _moved(call: Call, rank: int) -> Sequence[int] | None:
    sources, targets = call.integers("source"), call.integers("destination")
    if sources is None or targets is None or len(sources) != len(targets):
        return None
    goals = dict(zip((t % rank for t in targets), (s % rank for s in sources), strict=True))
    rest = iter(place for place in range(rank) if place not in goals.values())
    return [goals[place] if place in goals else next(rest) for place in range(rank)]


def _unsqueeze(call: Call) -> Transparent | None:
    axis = call.given("dim")
    if type(axis) is not int:
        return None
    return Rearranged(call.input, lambda shape, _: patterns.with_ones(shape, [axis]))


def _squeeze(call: Call) -> Transparent | None:
    places = call.integers("dim")
    return Rearranged(call.input, lambda shape, _: patterns.squeezed(shape, places)) if places else None


def _by_factor(pattern: Callable[[Shape, int], Pattern | None], argument: str) -> Builder:
    def build(call: Call) -> Transparent | None:
        factor = call.given(argument)
        if type(factor) is not int:
            return None
        return Rearranged(call.input, lambda shape, _: pattern(shape, factor))

    return build


# ---- some elements, several values ------------------------------------------------------------------


def _indexed(call: Call) -> Transparent | None:
    """x[..., None], x[:, a:b], x[:, i]: new axes, or some or one of the elements along one axis."""
    items = call.given("index")
    items = items if isinstance(items, tuple) else (items,)
    if any(not (item is None or item is Ellipsis or type(item) in (int, slice)) for item in items):
        return None
    gap = items.index(Ellipsis) if Ellipsis in items else len(items)
    # Places before the ellipsis count from the front, those after it from the back.
    places = {
        number if number < gap else number - len(items): item
        for number, item in enumerate(items)
        if item is not Ellipsis and item != slice(None)
    }
    if not places:
        return _same(call)
    if all(item is None for item in places.values()):
        return Rearranged(call.input, lambda shape, _: patterns.with_ones(shape, [*places]))
    if all(type(item) is int for item in places.values()):
        return Within(call.input, lambda _: tuple(places), removes=True, view=True)
    if not all(isinstance(item, slice) for item in places.values()):
        return None
    if len(places) > 1:
        return Within(call.input, lambda _: tuple(places), view=True)
    ((axis, item),) = places.items()
    return _taken(call, axis, item.start, item.stop, item.step)


def _taken(call: Call, axis: int, start: Any, stop: Any, step: Any) -> Transparent:
    fixed = all(bound is None or type(bound) is int for bound in (start, stop, step))
    return Slice(call.input, axis, lambda size: range(size)[start:stop:step] if fixed else None)


def _sliced(call: Call) -> Transparent | None:
    axis = call.given("dim")
    bounds = (call.given("start"), call.given("end"), call.given("step"))
    return _taken(call, axis, *bounds) if type(axis) is int else None


def _narrowed(call: Call) -> Transparent | None:
    axis, start, length = (call.given(name) for name in ("dim", "start", "length"))
    if any(type(number) is not int for number in (axis, start, length)):
        return None
    return Slice(call.input, axis, lambda size: range(size)[start:][:length])


def _selected(call: Call) -> Transparent | None:
    axis = call.integers("dim")
    return None if axis is None else Within(call.input, lambda _: axis, removes=True, view=True)


def part(call: Call, number: Any) -> Slice | None:
    """One part of what `SPLITS` gives: ``x.chunk(n, dim)[number]``."""
    axis, chunks = call.given("dim"), call.given("chunks")
    sizes = call.first("split_size", "split_sizes", "split_size_or_sections")
    listed = sizes if isinstance(sizes, (tuple, list)) else ()
    if type(axis) is not int or type(number) is not int or number < -len(listed):
        return None

    def taken(size: int) -> Sequence[int] | None:
        if isinstance(sizes, (tuple, list)):
            if any(type(width) is not int for width in sizes) or number >= len(sizes):
                return None
            start = sum(sizes[: number % len(sizes)])
            return range(size)[start : start + sizes[number]]
        width = -(-size // chunks) if type(chunks) is int else sizes
        return range(size)[number * width : (number + 1) * width] if type(width) is int else None

    return Slice(call.input, axis, taken)


def _concatenated(call: Call) -> Transparent | None:
    parts, axis = call.input, call.given("dim")
    nodes = isinstance(parts, (tuple, list)) and all(isinstance(each, fx.Node) for each in parts)
    return Concat(tuple(parts), axis) if nodes and type(axis) is int else None


def _summed(sign: int) -> Builder:
    def build(call: Call) -> Transparent | None:
        other, alpha = call.given("other"), call.given("alpha")
        factor = 1 if alpha is None else alpha
        factors = (1.0, float(sign * factor)) if type(factor) in (int, float) else None
        return Sum((call.input, other), factors) if isinstance(other, fx.Node) else None

    return build


def _named(builder: Builder, *names: str) -> dict[str, Builder]:
    return dict.fromkeys(names, builder)


# Functions that in eval mode give what they are given.
DROPOUTS = (
    *("dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("feature_dropout", "alpha_dropout", "feature_alpha_dropout"),
)
TRANSPARENT: Mapping[str, Builder] = {
    **_named(_same, "contiguous", "clone", "identity"),
    **_named(_dropout, *DROPOUTS, "native_dropout"),
    **{f"avg_pool{dims}d": _average_pool(dims) for dims in (1, 2, 3)},
    **{f"{head}adaptive_avg_pool{d}d": _adaptive_average_pool(d) for d in (1, 2, 3) for head in ("", "_")},
    **{f"{head}max_pool{dims}d": _max_pool(dims) for dims in (1, 2, 3) for head in ("", "adaptive_")},
    **{f"max_pool{dims}d_with_indices": _max_pool(dims) for dims in (2, 3)},
    "mean": _reduced(),
    "sum": _reduced(stops_shift=Code.PADDING),
    "amax": _reduced(monotone=True),
    **_named(_interpolated, "interpolate", "upsample", "upsample_nearest", "upsample_bilinear"),
    **_named(_interpolated, *(f"upsample_nearest{dims}d" for dims in (1, 2, 3))),
    **_named(_interpolated, "upsample_linear1d", "upsample_bilinear2d", "upsample_trilinear3d"),
    **_named(_padded, "pad", "constant_pad_nd"),
    **_named(_mirrored, *(f"{kind}_pad{d}d" for kind in ("reflection", "replication") for d in (1, 2, 3))),
    "flatten": _flatten,
    "unflatten": _unflatten,
    **_named(_reshape, "reshape", "view", "_unsafe_view"),
    **_named(_reshape_as, "reshape_as", "view_as"),
    "permute": _permuted(lambda call, _: call.integers("dims")),
    **_named(_permuted(_transposed), "transpose", "swapaxes", "swapdims"),
    **_named(_permuted(_moved), "movedim", "moveaxis"),
    "mT": _permuted(lambda _, rank: (*range(rank - 2), rank - 1, rank - 2)),
    "t": _permuted(lambda _, rank: (1, 0) if rank == 2 else None),
    "unsqueeze": _unsqueeze,
    "squeeze": _squeeze,
    "pixel_shuffle": _by_factor(patterns.pixel_shuffled, "upscale_factor"),
    "pixel_unshuffle": _by_factor(patterns.pixel_unshuffled, "downscale_factor"),
    **_named(_by_factor(patterns.channel_shuffled, "groups"), "channel_shuffle", "native_channel_shuffle"),
    "getitem": _indexed,
    "slice": _sliced,
    "narrow": _narrowed,
    "select": _selected,
    **_named(_concatenated, "cat", "concat", "concatenate"),
    "add": _summed(1),
    **_named(_summed(-1), "sub", "subtract"),
}

# Operators that give a tuple of parts; `part` is one of them.
SPLITS = frozenset({"chunk", "split", "split_with_sizes"})

LAYERS: Mapping[type[nn.Module], str] = {
    nn.Identity: "identity",
    **dict.fromkeys((nn.Dropout, nn.Dropout1d, nn.Dropout2d, nn.Dropout3d), "dropout"),
    **dict.fromkeys((nn.AlphaDropout, nn.FeatureAlphaDropout), "dropout"),
    nn.AvgPool1d: "avg_pool1d",
    nn.AvgPool2d: "avg_pool2d",
    nn.AvgPool3d: "avg_pool3d",
    nn.AdaptiveAvgPool1d: "adaptive_avg_pool1d",
    nn.AdaptiveAvgPool2d: "adaptive_avg_pool2d",
    nn.AdaptiveAvgPool3d: "adaptive_avg_pool3d",
    nn.MaxPool1d: "max_pool1d",
    nn.MaxPool2d: "max_pool2d",
    nn.MaxPool3d: "max_pool3d",
    nn.AdaptiveMaxPool1d: "adaptive_max_pool1d",
    nn.AdaptiveMaxPool2d: "adaptive_max_pool2d",
    nn.AdaptiveMaxPool3d: "adaptive_max_pool3d",
    **dict.fromkeys((nn.Upsample, nn.UpsamplingNearest2d, nn.UpsamplingBilinear2d), "interpolate"),
    **dict.fromkeys((nn.ConstantPad1d, nn.ConstantPad2d, nn.ConstantPad3d), "pad"),
    **dict.fromkeys((nn.ZeroPad1d, nn.ZeroPad2d, nn.ZeroPad3d), "pad"),
    **dict.fromkeys((nn.ReflectionPad1d, nn.ReflectionPad2d, nn.ReflectionPad3d), "reflection_pad1d"),
    **dict.fromkeys((nn.ReplicationPad1d, nn.ReplicationPad2d, nn.ReplicationPad3d), "reflection_pad1d"),
    **dict.fromkeys((nn.CircularPad1d, nn.CircularPad2d, nn.CircularPad3d), "reflection_pad1d"),
    nn.Flatten: "flatten",
    nn.Unflatten: "unflatten",
    nn.PixelShuffle: "pixel_shuffle",
    nn.PixelUnshuffle: "pixel_unshuffle",
    nn.ChannelShuffle: "channel_shuffle",
}

# What they give has the shape and dtype of their first argument.
LIKE_INPUT = frozenset(
    {
        *("relu", "relu6", "leaky_relu", "prelu", "elu", "selu", "celu", "gelu", "silu", "mish", "sigmoid"),
        *("tanh", "hardswish", "hardsigmoid", "hardtanh", "softplus", "softsign"),
        *("layer_norm", "group_norm", "normalize", "native_layer_norm", "native_group_norm"),
    }
)
LAYERS_LIKE_INPUT = (
    *(nn.ReLU, nn.ReLU6, nn.LeakyReLU, nn.PReLU, nn.ELU, nn.SELU, nn.CELU, nn.GELU, nn.SiLU, nn.Mish),
    *(nn.Sigmoid, nn.Tanh, nn.Hardswish, nn.Hardsigmoid, nn.Hardtanh, nn.Softplus, nn.Softsign),
    *(nn.LayerNorm, nn.GroupNorm),
)
# Element by element of all values that it is given, which are broadcast to each other.
LIKE_ALL = frozenset({"mul", "div", "true_divide", "truediv", "pow", "maximum", "minimum", "clamp"})
