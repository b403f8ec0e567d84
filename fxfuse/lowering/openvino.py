"""The engine "openvino": it reads the module itself, without ONNX, and the memory of tensors."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.errors import UnsupportedError
from fxfuse.lowering.dtypes import check_no_integers
from fxfuse.lowering.specialised import Specialised


def compile(graph: Specialised, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> Any:
    """A function of a list of tensors, for inputs like these.

    Raises:
        UnsupportedError: a result is of integers, or OpenVINO does not compute in `dtype` on this processor.
    """
    check_no_integers(graph)
    import openvino  # noqa: PLC0415 - it need not be installed

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of sizes that are numbers in a trace
        model = openvino.convert_model(
            graph.module, example_input=tuple(inputs), input=[list(tensor.shape) for tensor in inputs]
        )
    precision = "bf16" if dtype is torch.bfloat16 else "f32"
    settings = {
        "INFERENCE_PRECISION_HINT": precision,
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    compiled = openvino.compile_model(model, "CPU", settings)
    if compiled.get_property("INFERENCE_PRECISION_HINT").get_type_name() != precision:
        raise UnsupportedError("OpenVINO has no bfloat16 for this processor")
    request = compiled.create_infer_request()
    runs = threading.Lock()  # a request runs once at a time

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        given = [tensor.detach().contiguous() for tensor in tensors]  # which openvino does not keep alive
        results = [torch.empty(like.shape, dtype=like.dtype) for like in graph.results]
        with runs:
            for put, values in ((request.set_input_tensor, given), (request.set_output_tensor, results)):
                for number, tensor in enumerate(values):
                    put(number, openvino.Tensor(tensor.numpy(), shared_memory=True))
            request.infer()
        return results

    return run
