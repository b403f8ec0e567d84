"""A pytest plugin that plants the bug named by FXFUSE_PLANT; `planted_bugs` shows that tests catch it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any
from uuid import uuid4

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfuse import (
    algebra,
    backend,
    branches,
    channels,
    check,
    culprits,
    dynamo,
    exchange,
    following,
    geometry,
    inline,
    inputs,
    keep,
    kernels,
    linearity,
    match,
    memory,
    mergeable,
    ops,
    options,
    pipeline,
    planner,
    precision,
    program,
    rewrite,
    solve,
    table,
    tracer,
    transparent,
    unit,
)
from fxfuse import fold as folding
from fxfuse.affine import AffineMap, exact
from fxfuse.channels import KEPT
from fxfuse.exposure import Kind
from fxfuse.fold import Absorption
from fxfuse.layout import Layouts
from fxfuse.nodes import Affine, Linear, Norm, Opaque
from fxfuse.plan import Plan
from fxfuse.records import Refusal
from fxfuse.refusals import Code
from fxfuse.shapes import GraphShapes
from fxfuse.transparent import Concat, Slice, Sum, Within

# Tests of test_properties.py.
PROGRAMS = ("test_folded_equals_eager_for_any_program",)
NUMBERS = ("test_folded_equals_eager_for_any_operator_and_norm", *PROGRAMS)
SIZES = ("test_folded_equals_eager_for_other_sizes",)
PATHS = ("test_folded_equals_eager_for_any_path", *SIZES)
CHAINS = ("test_norms_fold_on_both_sides_of_what_certainly_passes",)
FOLDS = ("test_norms_fold_where_operators_are_behind_or_in_front_and_nowhere_else",)
ACCOUNTS = ("test_every_norm_that_runs_is_folded_or_refused_and_only_the_refused_still_run",)
KEEPING = (
    "test_kept_modules_fold_exactly_and_keep_names_and_classes",
    "test_kept_modules_fold_exactly_for_other_sizes",
)
UNBATCHED = ("test_kept_modules_take_values_without_a_batch_axis",)
UNTOUCHED = ("test_source_is_untouched",)
TWICE = ("test_folding_twice_changes_nothing",)
RANK = ("test_norm_after_linear_waits_for_example_inputs",)
FORMAT = ("test_weights_keep_dtype_device_and_memory_format",)
ROUNDING = ("test_weights_are_exact_but_for_one_rounding",)
ERROR = ("test_folding_does_not_enlarge_the_error_of_small_dtypes",)
DETERMINISM = ("test_folding_is_deterministic",)
# Other files.
KEPT_MODULES = ("tests/test_keep.py",)
LAYOUTS = ("tests/test_layout.py",)
BACKEND = ("tests/test_backend.py",)
PROGRAM = ("tests/test_program.py",)
VERIFIER = ("tests/test_algebra.py",)
BRANCHES = ("tests/test_branches.py",)
CHECK = ("tests/test_check.py",)
CULPRITS = ("tests/test_culprits.py",)
SCENARIOS = ("tests/scenarios/test_ways_of_writing.py", "tests/upstream_bugs")


@dataclass(frozen=True)
class Bug:
    """A bug, how it is planted, and the few tests of which one has to fail."""

    plant: Callable[[], None]
    tests: tuple[str, ...]


BUGS: dict[str, Bug] = {}


def bug(*tests: str) -> Callable[[Callable[[], None]], None]:
    """Registers a bug under the words of its function's name."""

    def register(plant: Callable[[], None]) -> None:
        BUGS[plant.__name__.replace("_", " ")] = Bug(plant, tests)

    return register


def wrap(owner: Any, name: str, wrapper: Callable[..., Any]) -> None:
    """Replaces a function or method that exists; `wrapper` gets the original as its first argument."""
    setattr(owner, name, _bound(wrapper, getattr(owner, name)))


def _bound(wrapper: Callable[..., Any], original: Callable[..., Any]) -> Callable[..., Any]:
    # A function, not a partial: as a method it has to be given self.
    return lambda *args, **kwargs: wrapper(original, *args, **kwargs)


def without_trial() -> None:
    """Lets wrong folds pass that are undone otherwise, so that tests have to find them by their numbers."""
    planner.errors = lambda *_: {}


def norm_map(change: Callable[..., tuple[Any, ...]]) -> None:
    """Makes AffineMap.from_norm work on what `change` makes of mean, var, weight, bias and eps."""
    original = AffineMap.from_norm
    AffineMap.from_norm = staticmethod(lambda *arguments: original(*change(*arguments)))


def folded_tensors(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Passes what is folded through `change`, with the source's weight as its first argument."""

    def changed(original: Callable[..., Any], what: Absorption) -> Any:
        folded = original(what)
        return change(what.weight, *folded) if isinstance(folded, tuple) else folded

    wrap(solve, "absorb", changed)


def entry(prefix: str, **changes: Any) -> None:
    """Changes what the table's operators of such a name read as, and those of the layers that do the same."""
    for name, build in table.TRANSPARENT.items():
        if name.startswith(prefix):
            table.TRANSPARENT[name] = _changed(build, changes)


def _changed(build: Callable[..., Any], changes: dict[str, Any]) -> Callable[..., Any]:
    def built(call: table.Call) -> Any:
        found = build(call)
        return None if found is None else replace(found, **changes)

    return built


def read_as(change: Callable[[ops.Reader, Any], Any], kind: type) -> None:
    """Passes what is read as `kind` through `change`."""

    def read(original: Callable[..., Any], self: ops.Reader, node: fx.Node) -> Any:
        found = original(self, node)
        return change(self, found) if isinstance(found, kind) else found

    wrap(ops.Reader, "read", read)


# ---- the affine map ---------------------------------------------------------------------------------


@bug(*NUMBERS)
def drop_eps() -> None:
    norm_map(lambda mean, var, weight, bias, eps: (mean, var, weight, bias, 0.0))


@bug(*NUMBERS)
def use_the_default_eps() -> None:
    norm_map(lambda mean, var, weight, bias, eps: (mean, var, weight, bias, 1e-5))


@bug(*NUMBERS)
def drop_the_square_root() -> None:
    norm_map(lambda mean, var, weight, bias, eps: (mean, (exact(var) + eps) ** 2, weight, bias, 0.0))


@bug(*NUMBERS)
def drop_the_mean() -> None:
    norm_map(lambda mean, *rest: (torch.zeros_like(mean), *rest))


@bug(*NUMBERS)
def drop_the_scale() -> None:
    norm_map(lambda mean, var, weight, bias, eps: (mean, var, None, bias, eps))


@bug(*NUMBERS)
def forget_the_shift() -> None:
    norm_map(lambda mean, var, weight, bias, eps: (mean, var, weight, None, eps))


@bug(*PROGRAMS)
def compose_chains_in_the_wrong_order() -> None:
    wrap(AffineMap, "then", lambda original, first, after: original(after, first))


@bug(*PROGRAMS)
def fold_only_the_first_norm_of_a_chain() -> None:
    def composed(original: Any, pieces: Any) -> Any:
        seen = set()
        first = []
        for move, site, piece in pieces:
            if site.side == "input" or site.node not in seen:
                first.append((move, site, piece))
                seen.add(site.node)
        return original(first)

    wrap(solve, "_composed", composed)


@bug(*PATHS, *CHAINS)
def compose_what_goes_forward_in_the_wrong_order() -> None:
    def composed(original: Any, pieces: Any) -> Any:
        pieces = [*pieces]
        inputs = iter([each for each in pieces if each[1].side == "input"][::-1])
        found = original([next(inputs) if each[1].side == "input" else each for each in pieces])
        return {each[1].node: found[each[1].node] for each in pieces}

    wrap(solve, "_composed", composed)


@bug(*PATHS, *CHAINS)
def take_division_for_multiplication() -> None:
    read_as(lambda _, found: replace(found, role=found.role.replace("over", "times")), Affine)


@bug(*PATHS, *CHAINS)
def forget_that_a_constant_is_subtracted_from() -> None:
    read_as(lambda _, found: replace(found, negative=False), Affine)


@bug(*PATHS)
def forget_alpha() -> None:
    read_as(lambda _, found: replace(found, factor=1.0 if found.factor > 0 else -1.0), Affine)


@bug(*PATHS)
def take_c_over_x_for_x_over_c() -> None:
    def arithmetic(original: Any, node: fx.Node, name: str, constants: Any) -> Any:
        swapped = SimpleNamespace(args=node.args[::-1], kwargs=node.kwargs)
        found = original(node, name, constants)
        return original(swapped, name, constants) if found is None and "div" in name else found

    wrap(ops, "read_arithmetic", arithmetic)


# ---- absorbing it -----------------------------------------------------------------------------------


@bug(*NUMBERS)
def do_not_scale_the_bias() -> None:
    def absorbed(original: Any, what: Absorption) -> Any:
        if what.after is not None and what.bias is not None:
            after = AffineMap(what.after.scale, what.after.shift + exact(what.bias))
            what = replace(what, after=after, bias=None)
        return original(what)

    wrap(solve, "absorb", absorbed)


@bug(*NUMBERS)
def swap_the_axes_of_a_transposed_conv() -> None:
    def scale(original: Any, what: Absorption) -> Tensor:
        found = original(what)
        square = what.transposed and found.shape[0] == found.shape[1]
        return found.transpose(0, 1).contiguous() if square else found

    wrap(folding, "_scale", scale)


@bug(*NUMBERS)
def ignore_the_groups_of_a_transposed_conv() -> None:
    def scale(original: Any, what: Absorption) -> Tensor:
        if what.transposed and what.after is not None:
            after = replace(what.after, scale=_of_the_first_group(what.after.scale, what.groups))
            what = replace(what, after=after)
        return original(what)

    wrap(folding, "_scale", scale)


@bug(*PATHS, *CHAINS)
def ignore_the_groups_on_the_input_side() -> None:
    def scale(original: Any, what: Absorption) -> Tensor:
        if what.before is not None:
            before = replace(what.before, scale=_of_the_first_group(what.before.scale, what.groups))
            what = replace(what, before=before)
        return original(what)

    wrap(folding, "_scale", scale)


@bug(*PATHS, *CHAINS)
def ignore_the_groups_of_what_the_bias_takes_up() -> None:
    def absorbed(original: Any, what: Absorption) -> Any:
        folded = original(what)
        if what.before is None or not isinstance(folded, tuple):
            return folded
        wrong = AffineMap(what.before.scale, _of_the_first_group(what.before.shift, what.groups))
        return folded[0], original(replace(what, before=wrong))[1]

    wrap(solve, "absorb", absorbed)


def _of_the_first_group(values: Tensor, groups: int) -> Tensor:
    return values.view(groups, -1)[:1].expand(groups, -1).flatten()


@bug(*PATHS, *CHAINS)
def forget_the_shift_of_what_goes_forward() -> None:
    def absorbed(original: Any, what: Absorption) -> Any:
        before = what.before and AffineMap(what.before.scale, torch.zeros_like(what.before.shift))
        return original(replace(what, before=before))

    wrap(solve, "absorb", absorbed)


@bug(*FORMAT)
def lose_the_memory_format() -> None:
    folded_tensors(lambda _, weight, bias: (weight.contiguous(), bias))


@bug(*FORMAT)
def lose_the_dtype() -> None:
    folded_tensors(lambda _, weight, bias: (weight.float(), bias.float()))


@bug(*ROUNDING)
def compute_in_the_dtype_of_the_weight() -> None:
    def absorbed(original: Any, what: Absorption) -> Any:
        dtype = what.weight.dtype
        scale, shift = (part.to(dtype).double() for part in (what.after.scale, what.after.shift))
        return original(replace(what, after=AffineMap(scale, shift)))

    wrap(solve, "absorb", absorbed)


@bug(*ERROR)
def round_through_bfloat16() -> None:
    folded_tensors(lambda _, weight, bias: (weight.bfloat16().to(weight.dtype), bias))


@bug(*UNTOUCHED)
def change_the_source_in_place() -> None:
    folded_tensors(lambda source, weight, bias: (source.detach().copy_(weight), bias))


# ---- where to fold ----------------------------------------------------------------------------------


@bug(*PROGRAMS)
def ignore_a_second_user() -> None:
    def check(original: Any, self: match._Matcher, value: fx.Node, *rest: Any) -> None:
        if any(user.op == "output" for user in value.users):
            original(self, value, *rest)

    wrap(match._Matcher, "_check_only_reader", check)


@bug(*PROGRAMS)
def ignore_that_a_value_is_an_output() -> None:
    def readers(original: Any, self: match._Matcher, value: fx.Node) -> list[fx.Node]:
        found = original(self, value)
        return [reader for reader in found if reader.op != "output"]

    wrap(match._Matcher, "_readers", readers)


@bug(*PROGRAMS)
def ignore_sharing() -> None:
    wrap(rewrite._Editor, "_is_only_user", lambda *_: True)


@bug(*PROGRAMS, *FOLDS)
def ignore_the_axis() -> None:
    def site(original: Any, self: Any, node: fx.Node, side: Any, op: Linear, acting: Any) -> Any:
        return original(self, node, side, op, replace(acting, axes=(-1 - op.dims,)))

    wrap(match._Matcher, "_site", site)


@bug(*RANK)
def assume_two_axes_after_a_linear_layer() -> None:
    def acting(original: Any, self: match._Matcher, source: Norm | Affine) -> Any:
        try:
            return original(self, source)
        except match._Stop as stop:
            if stop.code is not Code.RANK_UNKNOWN or not isinstance(source, Norm):
                raise
            return channels.Channels((-1,), tuple(range(source.channels)))

    wrap(match._Matcher, "_channels", acting)


@bug(*SIZES)
def forget_to_assert_what_is_assumed() -> None:
    wrap(GraphShapes, "assumed", lambda *_: frozenset())


@bug(*SIZES)
def take_sizes_that_were_seen_for_known() -> None:
    def of(original: Any, self: GraphShapes, node: fx.Node) -> Any:
        found, seen = original(self, node), self.seen(node)
        return found if found is None or seen is None else tuple(seen)

    wrap(GraphShapes, "of", of)


def _see_through(is_transparent: Callable[[fx.Node], bool]) -> None:
    def read(original: Any, self: ops.Reader, node: fx.Node) -> ops.Op:
        return Within(node.args[0]) if is_transparent(node) else original(self, node)

    wrap(ops.Reader, "read", read)


@bug(*PROGRAMS)
def take_relu_for_transparent() -> None:
    _see_through(lambda node: node.target in ("relu", torch.relu, F.relu, F.relu_))


@bug(*PROGRAMS)
def take_add_for_transparent() -> None:
    def adds_values(node: fx.Node) -> bool:
        return getattr(node.target, "__name__", node.target) == "add" and len(node.all_input_nodes) == 2

    _see_through(adds_values)


@bug(*PROGRAMS)
def take_a_norm_in_training_mode_for_eval() -> None:
    def module(original: Any, self: ops.Reader, node: fx.Node, norm: nn.Module, *rest: Any) -> Any:
        return original(self, node, norm.eval(), *rest)

    wrap(ops.Reader, "_norm_module", module)


def _see_no_writes() -> None:
    wrap(ops.Reader, "_may_write_to", lambda *_: [])


@bug(*PROGRAMS)
def ignore_the_training_argument_of_a_norm() -> None:
    def function(original: Any, self: ops.Reader, node: fx.Node, bound: Any, kind: str) -> Any:
        return original(self, node, {**bound, ops.NORM_FUNCTIONS[kind]: False}, kind)

    wrap(ops.Reader, "_norm_function", function)
    _see_no_writes()


@bug(*PROGRAMS, *FOLDS)
def fold_statistics_that_move() -> None:
    _see_no_writes()


# ---- accounts ---------------------------------------------------------------------------------------


@bug(*FOLDS)
def fold_no_functional_operator() -> None:
    wrap(ops.Reader, "_linear_function", lambda *_: ops.Opaque())


@bug(*FOLDS)
def stop_at_dropout() -> None:
    table.TRANSPARENT["dropout"] = lambda call: None


@bug(*FOLDS)
def count_queries_as_users() -> None:
    wrap(ops.Reader, "is_query", lambda *_: False)


@bug(*TWICE)
def fold_one_norm_at_a_time() -> None:
    def matched(original: Any, *args: Any) -> Plan:
        plan = original(*args)
        later = [move.source.name for move in plan.moves[1:] if isinstance(move.source, Norm)]
        refusals = [Refusal.because(name, Code.OTHER_USERS) for name in later]
        return replace(plan, moves=plan.moves[:1], refusals=(*plan.refusals, *refusals))

    wrap(planner, "match", matched)


@bug(*DETERMINISM)
def name_copies_at_random() -> None:
    wrap(rewrite._Editor, "_fresh", lambda original, *args: f"{original(*args)}_{uuid4().hex}")


@bug(*ACCOUNTS)
def forget_the_norms_that_are_left() -> None:
    wrap(planner, "match", lambda original, *args: replace(original(*args), refusals=()))


@bug(*ACCOUNTS)
def leave_the_norm_where_it_was() -> None:
    wrap(rewrite, "bypass", lambda *_: None)


# ---- what maps may pass -----------------------------------------------------------------------------


@bug(*PATHS)
def ignore_count_include_pad() -> None:
    entry("avg_pool", stops_shift=None)


@bug(*PATHS)
def let_the_shift_pass_a_zero_padding() -> None:
    entry("pad", stops_shift=None)


@bug(*PATHS)
def let_the_shift_pass_a_sum_over_an_axis() -> None:
    entry("sum", stops_shift=None)


@bug(*PATHS)
def let_every_scale_pass_a_maximum() -> None:
    entry("max_pool", monotone=False)
    entry("amax", monotone=False)


@bug(*PATHS)
def let_the_shift_pass_a_zero_padding_convolution() -> None:
    wrap(ops, "_pads_with_zeros", lambda *_: False)


@bug(*PATHS)
def let_the_shift_pass_a_transposed_convolution() -> None:
    read_as(lambda _, found: replace(found, bordered=found.bordered and not found.transposed), Linear)


@bug(*PATHS)
def drop_what_the_way_needs() -> None:
    wrap(solve, "_holds", lambda *_: True)


@bug(*PATHS)
def ignore_the_axes_within_which_an_operator_works() -> None:
    def passed(original: Any, self: Within, acting: Any, _: set[int]) -> Any:
        return original(self, acting, set())

    wrap(Within, "_passed", passed)


@bug(*PATHS, *CHAINS)
def forget_the_axes_that_are_gone() -> None:
    def forward(original: Any, self: Within, source: fx.Node, acting: Any, shapes: Any) -> Any:
        return original(replace(self, removes=False), source, acting, shapes)

    wrap(Within, "forward", forward)


@bug(*PATHS, *CHAINS)
def permute_the_wrong_way_round() -> None:
    def through(original: Any, pattern: Any, acting: Any, *, backward: bool) -> Any:
        return original(pattern, acting, backward=not backward)

    wrap(transparent, "through", through)


@bug(*PATHS, *CHAINS)
def repeat_the_whole_index_instead_of_each_entry() -> None:
    _spread("whole")


@bug(*PATHS, *CHAINS)
def repeat_each_entry_instead_of_the_whole_index() -> None:
    _spread("each")


def _spread(way: str) -> None:
    def repeated(original: Any, *args: Any, **kwargs: Any) -> Any:
        found = original(*args, **kwargs)
        return found if isinstance(found, Code) or found.spread is None else replace(found, spread=way)

    wrap(channels, "_repeated", repeated)


@bug(*PATHS)
def ignore_where_a_slice_begins() -> None:
    def taken(original: Any, self: Slice, size: Any) -> Any:
        found = original(self, size)
        return None if found is None else range(len(found))

    wrap(Slice, "taken", taken)


@bug(*PATHS)
def ignore_who_else_reads_what_is_sliced() -> None:
    def check(original: Any, self: match._Matcher, value: fx.Node, reader: fx.Node, acting: Any) -> None:
        if not isinstance(self.reader.read(reader), Slice):
            original(self, value, reader, acting)

    wrap(match._Matcher, "_check_only_reader", check)


@bug(*PATHS)
def map_the_channels_that_are_kept() -> None:
    def taken(original: Any, self: AffineMap, index: tuple[int, ...], *args: Any, **kwargs: Any) -> Any:
        return original(self, tuple(max(place, 0) for place in index), *args, **kwargs)

    wrap(AffineMap, "taken", taken)


@bug(*PATHS)
def give_the_parts_of_a_concat_the_wrong_channels() -> None:
    def backward(original: Any, self: Concat, *args: Any) -> Any:
        parts = original(self, *args)
        return parts[::-1] if isinstance(parts, list) else parts

    wrap(Concat, "backward", backward)


@bug(*PATHS)
def forget_the_other_parts_of_a_concat() -> None:
    def forward(original: Any, self: Concat, source: fx.Node, acting: Any, shapes: Any) -> Any:
        found = original(self, source, acting, shapes)
        if isinstance(found, Code) or KEPT not in found.index:
            return found
        return replace(found, index=tuple(number % len(acting.index) for number in range(len(found.index))))

    wrap(Concat, "forward", forward)


@bug(*PROGRAMS, *PATHS)
def put_the_shift_into_both_summands() -> None:
    wrap(Sum, "backward", lambda _, self, acting, __: [acting] * len(self.inputs))


@bug(*PROGRAMS, *PATHS)
def scale_only_one_summand() -> None:
    def backward(_: Any, __: Sum, acting: Any, ___: Any) -> Any:
        return [acting, replace(acting, index=(KEPT,) * len(acting.index))]

    wrap(Sum, "backward", backward)


@bug(*PROGRAMS, *PATHS)
def fold_into_one_branch_only() -> None:
    wrap(match._Matcher, "_sites", lambda original, *args: original(*args)[:1])


@bug(*PROGRAMS, *PATHS)
def fold_although_a_branch_refuses() -> None:
    _although_a_branch_refuses("_backward")


@bug(*PROGRAMS, *PATHS)
def fold_although_another_consumer_refuses() -> None:
    """Such as the ReLU beside a convolution."""

    def readers(original: Any, self: match._Matcher, value: fx.Node) -> list[fx.Node]:
        found = original(self, value)
        return [reader for reader in found if not isinstance(self.reader.read(reader), Opaque)] or found

    def forward(original: Any, self: match._Matcher, *args: Any) -> Iterator[Any]:
        self._readers = lambda value: readers(type(self)._readers, self, value)
        try:
            yield from original(self, *args)
        finally:
            del self.__dict__["_readers"]

    wrap(match._Matcher, "_forward", forward)


def _although_a_branch_refuses(direction: str) -> None:
    def absorbed(original: Any, *args: Any) -> Iterator[Any]:
        found = False
        try:
            for site in original(*args):
                found = True
                yield site
        except match._Stop:
            if not found:
                raise

    wrap(match._Matcher, direction, absorbed)


@bug(*PROGRAMS, *PATHS)
def ignore_writes_on_the_way_forward() -> None:
    wrap(memory.Memory, "writer_between", lambda *_: None)


@bug(*PATHS)
def put_a_constant_on_the_channels_wherever_it_lies() -> None:
    def read(_: ops.Reader, found: Affine) -> Affine:
        acts = [size for size in found.shape if size != 1]
        return replace(found, shape=(*acts, 1, 1)) if len(acts) == 1 else found

    read_as(read, Affine)


@bug(*PATHS)
def ignore_that_a_constant_may_add_axes() -> None:
    def read(_: ops.Reader, found: Affine) -> Affine:
        ones = next((place for place, size in enumerate(found.shape) if size != 1), len(found.shape))
        return replace(found, shape=found.shape[ones:])

    read_as(read, Affine)


@bug()
def ignore_the_dtype_of_constants() -> None:
    read_as(lambda _, found: replace(found, dtype=None), Affine)


@bug(*ACCOUNTS)
def leave_constants_where_they_were() -> None:
    def bypass(original: Any, graph: fx.Graph, inputs: dict[fx.Node, fx.Node]) -> None:
        kept = {node: source for node, source in inputs.items() if "norm" in str(node.target)}
        original(graph, kept or inputs)

    wrap(rewrite, "bypass", bypass)


# ---- modules that are kept --------------------------------------------------------------------------


@bug(*KEEPING, *KEPT_MODULES)
def exchange_modules_that_are_called_twice() -> None:
    def stays(original: Any, *args: Any) -> Any:
        code = original(*args)
        return None if code is Code.SHARED else code

    wrap(exchange.KeepingReader, "_stays", stays)
    wrap(unit.Unit, "_disputed", lambda *_: {})


@bug(*KEPT_MODULES)
def trace_one_choice_of_the_options() -> None:
    wrap(unit, "variants", lambda original, *args: original(*args)[:1])


@bug(*KEPT_MODULES)
def take_exposed_modules_for_called() -> None:
    def uses(original: Any, module: nn.Module) -> Any:
        return {name: replace(use, kind=Kind.CALLED) for name, use in original(module).items()}

    wrap(keep, "uses_of_submodules", uses)


@bug(*KEPT_MODULES)
def fold_what_the_rest_of_the_model_has_too() -> None:
    wrap(keep._Folder, "_shared_below", lambda *_: iter(()))


@bug(*UNBATCHED)
def assume_ranks_in_modules_that_are_kept() -> None:
    def planned(original: Any, *args: Any) -> Any:
        return original(*args[:3])

    wrap(unit, "planned", planned)


@bug(*KEPT_MODULES)
def believe_that_forward_does_not_ask_about_its_modules() -> None:
    wrap(unit.Unit, "_unproved", lambda *_: {})


@bug(*KEPT_MODULES)
def fold_although_a_hook_looks() -> None:
    for place in (keep, pipeline):
        wrap(place, "hooks_look", lambda *_: False)


@bug(*KEPT_MODULES)
def trust_modules_that_hold_others() -> None:
    wrap(ops, "modules_outside", lambda *_: set())


@bug(*KEPT_MODULES)
def take_required_arguments_for_given() -> None:
    for place in (options, tracer):
        wrap(place, "compared_by_identity", lambda *_: frozenset())


@bug(*LAYOUTS)
def leave_views_as_they_are() -> None:
    wrap(match, "layouts", lambda *_: Layouts())


# ---- the graphs of compilers ------------------------------------------------------------------------


@bug(*BACKEND)
def never_fold_again() -> None:
    wrap(following.Watch, "is_stale", lambda *_: False)


@bug(*BACKEND)
def trust_norms_to_count_versions() -> None:
    wrap(following, "_joined", lambda *_: [])


@bug(*BACKEND)
def trust_optimisers_to_count_versions() -> None:
    wrap(following._Steps, "_step", lambda *_: None)


@bug(*BACKEND)
def share_folded_weights_among_instances() -> None:
    def first(original: Any, self: Any, inputs: Any) -> Any:
        if not hasattr(self, "first"):
            self.first = original(self, inputs)
        return self.first

    wrap(following.Followers, "follow", first)


@bug(*BACKEND)
def fold_although_gradients_are_asked_for() -> None:
    wrap(dynamo, "gives_gradients", lambda *_: False)


@bug(*BACKEND)
def cut_gradients_off_inside() -> None:
    wrap(inline, "solve_unchecked", lambda original, *args: _detached(original(*args)))


def _detached(tensors: dict[Any, tuple[Tensor, Tensor]]) -> dict[Any, tuple[Tensor, ...]]:
    return {node: tuple(tensor.detach() for tensor in pair) for node, pair in tensors.items()}


@bug(*BACKEND)
def make_moves_inside_that_depend_on_numbers() -> None:
    wrap(backend, "_depends_on_numbers", lambda *_: None)


@bug(*BACKEND)
def let_sizes_of_weights_be_symbols() -> None:
    wrap(dynamo, "static_sizes", lambda original, _: original([]))


@bug(*PROGRAM)
def move_maps_out_of_modules_that_may_be_exchanged() -> None:
    wrap(program, "_crossing", lambda *_: None)


@bug(*PROGRAM)
def fold_what_a_program_writes_to() -> None:
    wrap(program, "storage", lambda _, value: id(object()))


@bug(*PROGRAM)
def let_outputs_lose_their_names() -> None:
    wrap(program, "gone", lambda *_: {})


@bug(*SCENARIOS)
def take_observed_shapes_for_facts_in_every_graph() -> None:
    original = GraphShapes.__init__

    def guarded(self: Any, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs | {"guarded": True})

    GraphShapes.__init__ = guarded


@bug(*SCENARIOS)
def take_several_outputs_for_one() -> None:
    wrap(ops.Reader, "_gives_first_only", lambda *_: True)


@bug(*SCENARIOS)
def forget_that_a_matrix_is_transposed() -> None:
    wrap(ops.Reader, "_transposed_attribute", lambda _, __, value: str(value.all_input_nodes[0].target))


@bug(*VERIFIER)
def take_a_part_of_an_output_for_explained() -> None:
    wrap(algebra, "_by_part", lambda _, tensor, axis: torch.zeros(tensor.shape[axis]))


@bug(*VERIFIER)
def explain_every_difference() -> None:
    wrap(algebra, "_agreement", lambda original, *given: replace(original(*given), ok=True))


@bug(*VERIFIER)
def do_not_fold_once_more_in_float64() -> None:
    wrap(pipeline, "compared", lambda original, *given, refold: original(*given))


@bug(*VERIFIER)
def leave_reduced_precision_on() -> None:
    wrap(precision, "_set", lambda *_: None)


@bug(*VERIFIER)
def draw_normal_inputs_only() -> None:
    wrap(inputs, "_sample", lambda original, shape, _, generator: original(shape, "normal", generator))


@bug(*VERIFIER)
def take_all_models_for_precise_in_float64() -> None:
    wrap(precision.LeastPrecision, "__init__", _always_precise)


def _always_precise(original: Any, self: Any) -> None:
    original(self)
    type(self).eps = property(lambda _: torch.finfo(torch.float64).eps, lambda *_: None)


@bug(*CHECK)
def try_no_fold_out() -> None:
    without_trial()


@bug(*CHECK)
def try_the_weights_out_and_not_the_biases() -> None:
    wrap(
        check, "absorb_unchecked", lambda original, what: (original(what)[0], original(what)[1].detach() * 0)
    )


@bug(*CULPRITS)
def stop_at_the_first_half() -> None:
    wrap(culprits, "_minimal", lambda _, names, __: list(names)[: len(names) // 2 + 1])


@bug(*BRANCHES)
def put_a_kernel_one_tap_off_the_middle() -> None:
    def shifted(original: Any, self: Any, other: Any) -> slice:
        found = original(self, other)
        off = int(found.start > 0)
        return slice(found.start - off, found.stop - off, found.step)

    wrap(geometry.Axis, "places", shifted)


@bug(*BRANCHES)
def hold_kernels_of_any_stride() -> None:
    wrap(
        geometry.Axis,
        "holds",
        lambda original, self, other: original(self, replace(other, stride=self.stride)),
    )


@bug(*BRANCHES)
def hold_any_padding_mode() -> None:
    wrap(
        geometry.Geometry,
        "holds",
        lambda original, self, other: original(self, replace(other, fill=self.fill)),
    )


@bug(*BRANCHES)
def add_branches_that_are_subtracted() -> None:
    wrap(kernels.Kernel, "times", lambda original, self, factor: original(self, abs(factor)))


@bug(*BRANCHES)
def forget_the_bias_of_the_first_in_a_row() -> None:
    def then(original: Any, self: Any, after: Any) -> Any:
        return original(replace(self, bias=torch.zeros_like(self.bias)), after)

    wrap(kernels.Kernel, "then", then)


@bug(*BRANCHES)
def merge_whatever_it_costs() -> None:
    def pays(_: Any, form: Any) -> bool:
        return form.host is not None and form.depth > 1

    wrap(branches, "pays", pays)


@bug(*BRANCHES)
def merge_values_that_others_read() -> None:
    def before(_: Any, self: Any, value: fx.Node, __: fx.Node) -> Any:
        value = self.value(value)
        return {value: linearity.Form(value, value)} | self.of(value)

    wrap(linearity.Forms, "before", before)


@bug(*BRANCHES)
def merge_across_writes() -> None:
    wrap(memory.Memory, "writer_between", lambda *_: None)


@bug(*BRANCHES)
def merge_what_has_another_dtype() -> None:
    wrap(mergeable.Judge, "_has_dtype_of_weights", lambda *_: True)


@bug(*BRANCHES)
def subtract_what_stays_of_a_sum() -> None:
    def without(original: Any, self: Any, values: Any) -> Any:
        self._parts = {
            node: {key: (part, abs(factor)) for key, (part, factor) in inside.items()}
            for node, inside in self._parts.items()
        }
        return original(self, values)

    wrap(branches._Sums, "without", without)


if os.environ.get("FXFUSE_PLANT"):
    planted = BUGS[os.environ["FXFUSE_PLANT"]]
    if planted.tests != CHECK:
        without_trial()
    planted.plant()
