"""The engine "openvino": it reads the module itself, without ONNX, and the memory of tensors."""

from __future__ import annotations

import logging
import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.errors import UnsupportedError
from fxfuse.lowering.attention import without_masked_rows
from fxfuse.lowering.dtypes import check_no_integers
from fxfuse.lowering.specialised import Specialised
from fxfuse.precision import setting


def compile(graph: Specialised, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> Any:
    """A function of a list of tensors, for inputs like these.

    Raises:
        UnsupportedError: a result is of integers, or OpenVINO does not compute in `dtype` on this processor.
    """
    check_no_integers(graph)
    import openvino  # noqa: PLC0415 - it need not be installed

    own = without_masked_rows(graph.module)  # a copy: openvino may read the memory of its weights later on
    level = logging.root.level
    # Where openvino cannot convert a module, it sets the level of all loggers.
    with torch.no_grad(), warnings.catch_warnings(), setting(lambda: level, logging.root.setLevel, level):
        warnings.simplefilter("ignore")  # of sizes that are numbers in a trace
        model = openvino.convert_model(
            own, example_input=tuple(inputs), input=[list(tensor.shape) for tensor in inputs]
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
    nodes = [each.input_value(0).get_node() for each in compiled.get_runtime_model().get_results()]
    passed = {number for number, node in enumerate(nodes) if node.get_type_name() == "Parameter"}
    runs = threading.Lock()  # a request runs once at a time

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        given = [tensor.detach().contiguous() for tensor in tensors]  # which openvino does not keep alive
        results = [torch.empty(like.shape, dtype=like.dtype) for like in graph.results]
        with runs:
            for number, tensor in enumerate(given):
                request.set_input_tensor(number, openvino.Tensor(tensor.numpy(), shared_memory=True))
            for number, tensor in enumerate(results):
                if number not in passed:
                    request.set_output_tensor(number, openvino.Tensor(tensor.numpy(), shared_memory=True))
            request.infer()
            for number in passed:  # inputs, which it writes nowhere else
                results[number].copy_(torch.from_numpy(request.get_output_tensor(number).data))
        return results

    wide = [number for number, tensor in enumerate(inputs) if tensor.dtype is torch.int64]

    def run_if_they_fit(tensors: Sequence[Tensor]) -> list[Tensor]:
        if all(_fits_in_32_bits(tensors[number]) for number in wide):
            return run(tensors)
        with torch.no_grad():
            return [result.clone(memory_format=torch.contiguous_format) for result in own(*tensors)]

    return run_if_they_fit if wide else run


def _fits_in_32_bits(tensor: Tensor) -> bool:
    """Whether OpenVINO reads its integers as they are. Of -2³¹ it does not make True."""
    least, most = torch.aminmax(tensor)
    return int(least) > -(2**31) and int(most) < 2**31
