"""The engine "onnxruntime": the module as an ONNX file in memory, and the memory of tensors bound to it."""

from __future__ import annotations

import contextlib
import io
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.lowering.attention import without_masked_rows
from fxfuse.lowering.dtypes import check_no_integers
from fxfuse.lowering.specialised import Specialised


def compile(graph: Specialised, inputs: Sequence[Tensor], _: torch.dtype | None) -> Any:
    """A function of a list of tensors, for inputs like these."""
    check_no_integers(graph)
    import onnxruntime  # noqa: PLC0415 - it need not be installed

    with torch.no_grad(), warnings.catch_warnings(), contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("ignore")  # of the exporter
        program = torch.onnx.export(
            without_masked_rows(graph.module), tuple(inputs), dynamo=True, verbose=False
        )
    assert program is not None
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    options.add_session_config_entry("session.intra_op.allow_spinning", "1")
    session = onnxruntime.InferenceSession(
        program.model_proto.SerializeToString(), options, providers=["CPUExecutionProvider"]
    )
    names = [each.name for each in session.get_inputs()], [each.name for each in session.get_outputs()]

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        given = [tensor.detach().contiguous() for tensor in tensors]
        results = [torch.empty(like.shape, dtype=like.dtype) for like in graph.results]
        binding = session.io_binding()
        for bind, places, values in zip(
            (binding.bind_input, binding.bind_output), names, (given, results), strict=True
        ):
            for name, tensor in zip(places, values, strict=True):
                kind = tensor.numpy().dtype
                bind(name, "cpu", 0, kind, tuple(tensor.shape), tensor.data_ptr())
        session.run_with_iobinding(binding)
        return results

    return run
