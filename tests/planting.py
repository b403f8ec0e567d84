"""A pytest plugin that plants the bug named by FXFUSE_PLANT; `planted_bugs` shows that tests catch it."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from uuid import uuid4

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn

from fxfuse import fold as folding
from fxfuse import match, ops, pipeline, rewrite
from fxfuse.affine import AffineMap, exact

# Tests of test_properties.py.
PROGRAMS = ("test_folded_equals_eager_for_any_program",)
NUMBERS = ("test_folded_equals_eager_for_any_operator_and_norm", *PROGRAMS)
FOLDS = ("test_norms_fold_where_an_operator_is_behind_single_uses_and_nowhere_else",)
ACCOUNTS = ("test_every_norm_that_runs_is_folded_or_refused",)
NORMS_LEFT = ("test_no_norm_runs_in_the_folded_model_but_the_refused",)
UNTOUCHED = ("test_source_is_untouched",)
TWICE = ("test_folding_twice_changes_nothing",)
RANK = ("test_norm_after_linear_waits_for_example_inputs",)
KEPT = ("test_weights_keep_dtype_device_and_memory_format",)
ROUNDING = ("test_weights_are_exact_but_for_one_rounding",)
ERROR = ("test_folding_does_not_enlarge_the_error_of_small_dtypes",)
DETERMINISM = ("test_folding_is_deterministic",)


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


def norm_map(change: Callable[..., tuple[Any, ...]]) -> None:
    """Makes AffineMap.from_norm work on what `change` makes of mean, var, weight, bias and eps."""
    original = AffineMap.from_norm
    AffineMap.from_norm = staticmethod(lambda *arguments: original(*change(*arguments)))


def folded_tensors(change: Callable[[Tensor, Tensor, Tensor], tuple[Tensor, Tensor]]) -> None:
    """Passes what is folded through `change`, with the source's weight as its first argument."""

    def changed(original: Callable[..., Any], weight: Tensor, *args: Any, **kwargs: Any) -> Any:
        folded = original(weight, *args, **kwargs)
        return change(weight, *folded) if isinstance(folded, tuple) else folded

    wrap(rewrite, "absorb_output", changed)


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
    wrap(rewrite, "_composed", lambda original, norms, *rest: original(norms[:1], *rest))


# ---- absorbing it -----------------------------------------------------------------------------------


@bug(*NUMBERS)
def do_not_scale_the_bias() -> None:
    def absorbed(original: Any, weight: Tensor, bias: Tensor | None, affine: AffineMap, **rest: Any) -> Any:
        shift = affine.shift if bias is None else affine.shift + exact(bias)
        return original(weight, None, AffineMap(affine.scale, shift), **rest)

    wrap(rewrite, "absorb_output", absorbed)


@bug(*NUMBERS)
def swap_the_axes_of_a_transposed_conv() -> None:
    def by_row(original: Any, scale: Tensor, weight: Tensor, transposed: bool, groups: int) -> Tensor:
        rows = original(scale, weight, transposed, groups)
        square = transposed and rows.shape[0] == rows.shape[1]
        return rows.transpose(0, 1).contiguous() if square else rows

    wrap(folding, "_by_row", by_row)


@bug(*NUMBERS)
def ignore_the_groups_of_a_transposed_conv() -> None:
    def by_row(original: Any, scale: Tensor, weight: Tensor, transposed: bool, groups: int) -> Tensor:
        first = scale.view(groups, -1)[:1].expand(groups, -1).flatten() if transposed else scale
        return original(first, weight, transposed, groups)

    wrap(folding, "_by_row", by_row)


@bug(*KEPT)
def lose_the_memory_format() -> None:
    folded_tensors(lambda _, weight, bias: (weight.contiguous(), bias))


@bug(*KEPT)
def lose_the_dtype() -> None:
    folded_tensors(lambda _, weight, bias: (weight.float(), bias.float()))


@bug(*ROUNDING)
def compute_in_the_dtype_of_the_weight() -> None:
    def absorbed(original: Any, weight: Tensor, bias: Tensor | None, affine: AffineMap, **rest: Any) -> Any:
        scale, shift = (part.to(weight.dtype).double() for part in (affine.scale, affine.shift))
        return original(weight, bias, AffineMap(scale, shift), **rest)

    wrap(rewrite, "absorb_output", absorbed)


@bug(*ERROR)
def round_through_bfloat16() -> None:
    folded_tensors(lambda _, weight, bias: (weight.bfloat16().to(weight.dtype), bias))


@bug(*UNTOUCHED)
def change_the_source_in_place() -> None:
    folded_tensors(lambda source, weight, bias: (source.detach().copy_(weight), bias))


# ---- where to fold ----------------------------------------------------------------------------------


@bug(*PROGRAMS)
def ignore_a_second_user() -> None:
    wrap(match._Matcher, "_is_query", lambda _, __, node: node.op != "output")


@bug(*PROGRAMS)
def ignore_that_a_value_is_an_output() -> None:
    wrap(
        match._Matcher, "_is_query", lambda original, self, node: node.op == "output" or original(self, node)
    )


@bug(*PROGRAMS)
def ignore_sharing() -> None:
    wrap(rewrite._Editor, "_is_only_user", lambda *_: True)


@bug(*PROGRAMS, *FOLDS)
def ignore_the_rank_of_linear_layers() -> None:
    wrap(match._Matcher, "_right_rank", lambda *_: None)


@bug(*RANK)
def assume_two_axes_after_a_linear_layer() -> None:
    def rank(original: Any, *args: Any) -> Any:
        found = original(*args)
        return 2 if found is match.Code.RANK_UNKNOWN else found

    wrap(match._Matcher, "_right_rank", rank)


def _see_through(is_transparent: Callable[[fx.Node], bool]) -> None:
    def read(original: Any, self: ops.Reader, node: fx.Node) -> ops.Op:
        return ops.Transparent(node.args[0]) if is_transparent(node) else original(self, node)

    wrap(ops.Reader, "read", read)


@bug(*PROGRAMS)
def take_relu_for_transparent() -> None:
    _see_through(lambda node: node.target in ("relu", torch.relu, F.relu, F.relu_))


@bug(*PROGRAMS)
def take_add_for_transparent() -> None:
    _see_through(lambda node: getattr(node.target, "__name__", node.target) == "add")


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
        return original(self, node, {**bound, ops._NORM_FUNCTIONS[kind]: False}, kind)

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
    ops._DROPOUT_FUNCTIONS.clear()


@bug(*FOLDS)
def count_queries_as_users() -> None:
    wrap(match._Matcher, "_is_query", lambda *_: False)


@bug(*TWICE)
def fold_one_norm_at_a_time() -> None:
    def matched(original: Any, *args: Any) -> match.Plan:
        plan = original(*args)
        later = [match.Refusal.because(move.norm.name, match.Code.OTHER_USERS) for move in plan.moves[1:]]
        return match.Plan(plan.moves[:1], (*plan.refusals, *later))

    wrap(pipeline, "match", matched)


@bug(*DETERMINISM)
def name_copies_at_random() -> None:
    wrap(rewrite._Editor, "_fresh", lambda original, *args: f"{original(*args)}_{uuid4().hex}")


@bug(*ACCOUNTS)
def forget_the_norms_that_are_left() -> None:
    wrap(pipeline, "match", lambda original, *args: match.Plan(original(*args).moves, ()))


@bug(*NORMS_LEFT)
def leave_the_norm_where_it_was() -> None:
    wrap(rewrite._Editor, "erase_norms", lambda *_: None)


if os.environ.get("FXFUSE_PLANT"):
    BUGS[os.environ["FXFUSE_PLANT"]].plant()
