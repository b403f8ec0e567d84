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

import torch
from torch import fx, nn
from torch._dynamo import register_backend

import fxfuse

_COMPUTED = (
    "a norm whose parameters are computed: a trace from Python stores their values, a compiler does not"
)
_GATHERED = "decomposed, padding with pixels and some resampling are a gather"
_MULTIPLIED = "decomposed, a linear layer over tokens in another order is a product of batches of matrices"
_REPEATED = "decomposed, the statistics of an instance norm are repeated for each image"
_FACTORISED = "an orthogonal weight is computed by functions that are not known to be pure"
_FUNCTIONAL = "decomposed, native batch norm gives its statistics too"

FEWER = {
    "dynamo": {
        "test_norm_after_a_reparametrised_layer_is_folded": _FACTORISED,
        "test_norm_whose_parameters_are_computed_is_folded_on_their_values": _COMPUTED,
    },
    "exported": {"test_norm_whose_parameters_are_computed_is_folded_on_their_values": _COMPUTED},
    "decomposed": {
        **dict.fromkeys(
            (
                "test_instance_norm_with_running_statistics_is_folded_with_and_without_a_batch",
                "test_norm_called_as_a_function_is_folded",
                "test_norm_of_any_kind_goes_forward",
            ),
            _REPEATED,
        ),
        **dict.fromkeys(
            (
                "test_norm_after_resampling_shuffling_or_slicing_is_folded",
                "test_norm_goes_forward_into_the_head",
                "test_norm_of_sequences_passes_operators_too",
                "test_norm_of_volumes_passes_operators_too",
                "test_norm_passes_operator_that_keeps_channels_apart",
                "test_norm_passes_operators_in_a_row",
                "test_norm_then_conv_with_padding_keeps_the_border",
                "test_norm_with_a_shift_goes_forward_where_no_zeros_are_padded",
                "test_norm_without_a_shift_goes_forward_everywhere",
                "test_operators_let_norms_pass_in_every_dialect",
            ),
            _GATHERED,
        ),
        "test_norm_goes_forward_into_a_linear_layer_on_what_were_its_channels": _MULTIPLIED,
        "test_norm_over_all_tokens_of_a_batch_reaches_the_linear_layer": _MULTIPLIED,
        "test_norm_after_a_reparametrised_layer_is_folded": _FACTORISED,
        "test_norm_before_a_reparametrised_layer_goes_forward": _FACTORISED,
        "test_norm_whose_parameters_are_computed_is_folded_on_their_values": _COMPUTED,
        "test_native_norm_is_folded_unless_its_other_outputs_are_used": _FUNCTIONAL,
    },
}
# What torch.export does not take: modules under two names, outputs that are no tensors, writes to constants.
NOT_EXPORTED = {
    "test_identity_and_dropout_before_and_between_chained_norms_let_them_pass",
    "test_module_called_under_two_names_is_still_one_module",
    "test_module_under_two_names_is_counted_once_for_each_call",
    "test_norm_is_left_where_the_output_of_the_conv_is_used_elsewhere",
    "test_nothing_folds_across_an_operator_that_changes_values",
    "test_nothing_folds_where_the_output_of_the_conv_is_written_to",
    "test_queries_of_shape_and_kind_are_no_users",
    "test_same_module_under_two_attribute_names",
}

# The name of the test that runs, if it is one of those that are picked.
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
            _count("dynamo", fxfuse.report(run), folded)
        except fxfuse.UsageError:
            assert not folded, "Dynamo gave no graph"
        try:
            program = torch.export.export(copy.deepcopy(model), copy.deepcopy(tuple(inputs)), strict=False)
        except Exception:
            if current in NOT_EXPORTED:
                return
            raise
        for kind, each in (("exported", program), ("decomposed", program.run_decompositions())):
            fused = fxfuse.fuse(each)
            outputs = [copy.deepcopy(one).module()(*copy.deepcopy(inputs)) for one in (each, fused)]
            check(*outputs)
            _count(kind, fxfuse.report(fused), folded)


def _count(kind: str, report: fxfuse.Report, folded: int) -> None:
    assert len(report.folded) >= folded or current in FEWER[kind], f"{kind}: {report}"
