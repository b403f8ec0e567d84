"""The other ways into fxfuse: each gets models that the tests fold by a symbolic trace, and folds as much.

`folds` gives its models to `enter`, for the tests that conftest.py picks. A compiler guards shapes, sees
through hooks and decomposes writes, so it may fold more. Where it folds less, the test is named here, with
the reason.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Sequence
from typing import Any

import pytest
import torch
from torch import fx, nn
from torch._dynamo import register_backend

import fxfuse

_GATHERED = "padding with pixels and some resampling are a gather"
_MULTIPLIED = "a linear layer over tokens in another order is a product of batches of matrices"
_REPEATED = "the statistics of an instance norm are repeated for each image"

# Programs that have been decomposed: the test, how many norms fold, and why not all.
FEWER = {
    "test_instance_norm_with_running_statistics_is_folded_with_and_without_a_batch[1-True]": (0, _REPEATED),
    "test_instance_norm_with_running_statistics_is_folded_with_and_without_a_batch[2-False]": (0, _REPEATED),
    "test_norm_after_resampling_shuffling_or_slicing_is_folded[middle5-4-4-modules]": (0, _GATHERED),
    "test_norm_of_sequences_passes_operators_too[Upsample linear-backward]": (0, _GATHERED),
    "test_norm_of_volumes_passes_operators_too[ReflectionPad3d-backward]": (0, _GATHERED),
    "test_norm_with_a_shift_goes_forward_where_no_zeros_are_padded[same, reflect-0-modules]": (0, _GATHERED),
    "test_operators_let_norms_pass_in_every_dialect[functions-backward]": (16, _GATHERED),
    "test_norm_goes_forward_into_a_linear_layer_on_what_were_its_channels[permute-modules]": (0, _MULTIPLIED),
    "test_norm_over_all_tokens_of_a_batch_reaches_the_linear_layer[shape0-<lambda>0-<lambda>0-modules]": (
        *(0, _MULTIPLIED),
    ),
    "test_norm_over_all_tokens_of_a_batch_reaches_the_linear_layer[shape1-<lambda>0-<lambda>0-modules]": (
        *(0, _MULTIPLIED),
    ),
}
# Models in which a module has two names, which torch.export does not take.
NOT_EXPORTED = {
    "test_identity_and_dropout_before_and_between_chained_norms_let_them_pass[functions-middle0]",
}

# The test that runs, if it is one of those that are picked.
current: str | None = None


@register_backend(name="as_it_is")
def _as_it_is(graph: fx.GraphModule, _inputs: Sequence[Any], **_: Any) -> Callable[..., Any]:
    return graph.forward


def enter(model: nn.Module, inputs: Sequence[Any], folded: int, check: Callable[[Any, Any], None]) -> None:
    """Folds `model` through torch.compile and torch.export too.

    Args:
        model: the source.
        inputs: its inputs.
        folded: how many norms fold by a symbolic trace.
        check: compares two outputs.
    """
    if current is None or isinstance(model, fx.GraphModule):
        return
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # of torch's own compilers, about the models
        torch.compiler.reset()
        twin = copy.deepcopy(model)
        run = torch.compile(twin, backend="fxfuse", options={"then": "as_it_is"})
        check(model(*copy.deepcopy(inputs)), run(*copy.deepcopy(inputs)))
        try:
            report = fxfuse.report(run)
        except fxfuse.UsageError:
            assert not folded, "Dynamo gave no graph"
        else:
            assert len(report.folded) >= folded, report
        inputs = tuple(inputs)
        if current in NOT_EXPORTED:
            with pytest.raises(KeyError, match="Conv2d"):
                torch.export.export(copy.deepcopy(model), copy.deepcopy(inputs), strict=False)
            return
        program = torch.export.export(copy.deepcopy(model), copy.deepcopy(inputs), strict=False)
        assert _folded(program, inputs, check) >= folded
        decomposed = _folded(program.run_decompositions(), inputs, check)
        if current in FEWER:
            assert decomposed == FEWER[current][0] < folded
        else:
            assert decomposed >= folded


def _folded(program: Any, inputs: Sequence[Any], check: Callable[[Any, Any], None]) -> int:
    """How many norms of a program are folded. Copies of it run, since it may write to its own buffers."""
    fused = fxfuse.fuse(program)
    outputs = [copy.deepcopy(each).module()(*copy.deepcopy(inputs)) for each in (program, fused)]
    check(*outputs)
    return len(fxfuse.report(fused).folded)
