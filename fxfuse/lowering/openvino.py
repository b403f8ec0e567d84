"""The engine "openvino": it reads the module itself, without ONNX, and the memory of tensors."""

from __future__ import annotations

import threading
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from fxfuse.lowering.specialised import Specialised


def compile(graph: Specialised, inputs: Sequence[Tensor], dtype: torch.dtype | None) -> Any:
    """A function of a list of tensors, for inputs like these."""
    import openvino  # noqa: PLC0415 - it need not be installed

    with torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of TorchScript, which openvino uses
        model = openvino.convert_model(
            graph.module, example_input=tuple(inputs), input=[list(tensor.shape) for tensor in inputs]
        )
    settings = {
        "INFERENCE_PRECISION_HINT": "bf16" if dtype is torch.bfloat16 else "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    request = openvino.compile_model(model, "CPU", settings).create_infer_request()

    def shared(tensor: Tensor) -> Any:
        return openvino.Tensor(tensor.detach().contiguous().numpy(), shared_memory=True)

    runs = threading.Lock()  # a request runs once at a time

    def run(tensors: Sequence[Tensor]) -> list[Tensor]:
        results = [torch.empty(like.shape, dtype=like.dtype) for like in graph.results]
        with runs:
            for number, tensor in enumerate(tensors):
                request.set_input_tensor(number, shared(tensor))
            for number, tensor in enumerate(results):
                request.set_output_tensor(number, shared(tensor))
            request.infer()
        return results

    return run
