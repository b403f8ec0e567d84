"""Where the time of a call goes, by kind of kernel, in the engine "torch" and in the two runtimes.

Each engine runs the folded network by itself, in a process of its own. The kernels' times are those that the
engine tells: oneDNN's verbose mode, OpenVINO's performance counters, ONNX Runtime's profile; medians over
some calls. The whole call is timed without any of that. What is left is *between kernels*: looking them up,
allocating, waiting for threads, Python, and operators that are not oneDNN's; below 0 where counting costs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import re
import statistics
import sys
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from torch import Tensor, fx, nn

import fxfuse
from benchmarks.pages import table
from benchmarks.record import surroundings, write
from fxfuse import zoo

COMMAND = "python -m benchmarks.kinds"
# Networks, and how many images.
CASES = (
    *(
        (f"torchvision:{name}", 1)
        for name in (
            *("mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf", "densenet121", "shufflenet_v2_x1_0"),
            *("mobilenet_v2", "resnet50"),
        )
    ),
    ("torchvision:shufflenet_v2_x1_0", 32),
    ("timm:maxvit_tiny_tf_224", 8),
)
CALLS = 15
POINTWISE, DEPTHWISE, JOINED = "1×1 convolution", "depthwise convolution", "1×1, and a depthwise one in it"
KINDS = (POINTWISE, DEPTHWISE, JOINED, "other convolution", "linear", "other kernels")
BETWEEN = "between kernels"
Times = dict[str, float]
# A call, and what tells the times of the kernels of some calls.
Ways = tuple[Callable[[], Any], Callable[[], list[Times]]]


def _summed(kernels: Iterable[tuple[str, float]]) -> Times:
    found: Times = defaultdict(float)
    for kind, milliseconds in kernels:
        found[kind] += milliseconds
    return found


def in_torch(folded: fx.GraphModule, x: Tensor) -> Ways:
    """A call of the engine "torch", and what tells the times of its kernels."""
    lowered = fxfuse.lower(folded, (x,))
    if lowered.lowering.reason:
        raise RuntimeError(lowered.lowering.reason)

    def one() -> Times:
        with _printed() as file, torch.backends.mkldnn.verbose(1):  # type: ignore[no-untyped-call]
            lowered(x)
        lines = [line for line in file.read_text().splitlines() if ",primitive,exec," in line]
        file.unlink()
        return _summed((_kind_in_onednn(line), float(line.rpartition(",")[2])) for line in lines)

    return lambda: lowered(x), lambda: [one() for _ in range(CALLS)]


def _kind_in_onednn(line: str) -> str:
    primitive, sizes = line.split(",")[5], line.split(",")[-2]
    if primitive in ("inner_product", "matmul"):
        return "linear"
    if primitive != "convolution":
        return "other kernels"
    if "+dw:" in line:
        return JOINED
    groups = re.search(r"g(\d+)", sizes)
    if groups and f"ic{groups[1]}oc" in sizes:
        return DEPTHWISE
    return POINTWISE if "kh1" in sizes and "kw1" in sizes else "other convolution"


@contextmanager
def _printed() -> Iterator[Path]:
    """A file that has what is printed meanwhile, by libraries too."""
    sys.stdout.flush()
    handle, name = tempfile.mkstemp()
    kept = os.dup(1)
    os.dup2(handle, 1)
    try:
        yield Path(name)
    finally:
        os.dup2(kept, 1)
        os.close(kept)
        os.close(handle)


def in_openvino(folded: fx.GraphModule, x: Tensor) -> Ways:
    """The same for OpenVINO."""
    import openvino  # noqa: PLC0415 - only the process that needs it pays for it

    model = openvino.convert_model(folded, example_input=x, input=[list(x.shape)])
    settings = {
        "INFERENCE_PRECISION_HINT": "f32",
        "INFERENCE_NUM_THREADS": torch.get_num_threads(),
        "PERFORMANCE_HINT": "LATENCY",
    }
    plain, counted = (
        openvino.compile_model(model, "CPU", settings | more).create_infer_request()
        for more in ({}, {"PERF_COUNT": True})
    )
    given = [x.numpy()]

    def one() -> Times:
        counted.infer(given)
        return _summed(
            (_kind_in_openvino(each.node_type, each.exec_type), each.real_time.total_seconds() * 1e3)
            for each in counted.get_profiling_info()
        )

    return lambda: plain.infer(given), lambda: [one() for _ in range(CALLS)]


def _kind_in_openvino(kind: str, kernel: str) -> str:
    if kind == "GroupConvolution":
        return DEPTHWISE if "_dw" in kernel else "other convolution"
    if kind == "Convolution":
        return POINTWISE if "1x1" in kernel else "other convolution"
    return "linear" if kind in ("FullyConnected", "MatMul") else "other kernels"


def in_onnxruntime(folded: fx.GraphModule, x: Tensor) -> Ways:
    """The same for ONNX Runtime."""
    import onnxruntime  # noqa: PLC0415 - only the process that needs it pays for it

    program = torch.onnx.export(folded, (x,), dynamo=True, verbose=False)
    assert program is not None
    text = program.model_proto.SerializeToString()

    def session(*, profiles: bool) -> Any:
        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        options.enable_profiling = profiles
        options.profile_file_prefix = str(Path(tempfile.gettempdir()) / f"kinds-{os.getpid()}")
        return onnxruntime.InferenceSession(text, options, providers=["CPUExecutionProvider"])

    plain, profiled = session(profiles=False), session(profiles=True)
    given = {plain.get_inputs()[0].name: x.numpy()}

    def told() -> list[Times]:
        for _ in range(CALLS):
            profiled.run(None, given)
        file = Path(profiled.end_profiling())
        events = [each for each in json.loads(file.read_text()) if each["name"].endswith("_kernel_time")]
        file.unlink()
        size = len(events) // CALLS  # each call runs the same kernels
        return [
            _summed((_kind_in_onnxruntime(each["args"]), each["dur"] / 1e3) for each in events[start:][:size])
            for start in range(0, len(events), size)
        ]

    return lambda: plain.run(None, given), told


def _kind_in_onnxruntime(told: dict[str, Any]) -> str:
    if told["op_name"] in ("Gemm", "MatMul", "FusedGemm", "FusedMatMul"):
        return "linear"
    if "Conv" not in told["op_name"]:
        return "other kernels"
    shape = next(iter(told["input_type_shape"][1].values()))
    if shape[1] == 1:
        return DEPTHWISE
    return POINTWISE if shape[2:] == [1, 1] else "other convolution"


ENGINES = {"fxfuse, torch": in_torch, "openvino": in_openvino, "onnxruntime": in_onnxruntime}


@torch.no_grad()
def measure(name: str, engine: str, batch: int) -> dict[str, float]:
    """Milliseconds of a call, by kind of kernel."""
    warnings.simplefilter("ignore")
    source = zoo.load(name, seed=0).model
    assert isinstance(source, nn.Module)
    folded = fxfuse.fuse(source)
    assert isinstance(folded, fx.GraphModule)
    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    call, told = ENGINES[engine](folded, x)
    times: list[float] = []
    for number in range(CALLS + 2):
        started = time.perf_counter()
        call()
        if number > 1:  # the first ones warm up
            times.append(1e3 * (time.perf_counter() - started))
    kernels = told()
    found = {kind: statistics.median(each.get(kind, 0.0) for each in kernels) for kind in KINDS}
    whole = statistics.median(times)
    return found | {BETWEEN: whole - sum(found.values()), "whole call": whole}


def rows(times: dict[str, dict[str, float]]) -> Iterator[Sequence[object]]:
    """The table of one network."""
    yield ["ms", *times]
    for kind in (*KINDS, BETWEEN, "whole call"):
        if any(abs(each[kind]) >= 0.005 for each in times.values()):
            yield [kind, *(f"{each[kind]:.2f}" for each in times.values())]


def page(record: dict[str, Any]) -> str:
    """The results as a page for the documentation."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"]
    text = f"""# Where the time of a call goes

Made by `{record["command"]}` at {record["commit"]}: {machine["processor"]}, {machine["cores"]} cores,
{machine["threads"]} threads, {versions}.

Folded networks, float32. The times of kernels are those that each engine tells of itself, medians of
{CALLS} calls, each engine in a process of its own; *between kernels* is what is left of the whole call,
which was timed without the engine's own counting.
"""
    for case in record["cases"]:
        images = "one image" if case["batch"] == 1 else f"{case['batch']} images"
        text += f"\n## {case['model']}, {images}\n\n{table(rows(case['milliseconds']))}"
    return text


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--model", action="append", help="torchvision:NAME or timm:NAME, once for each")
    parser.add_argument("--batch", type=int, default=1, help="images in a call of these")
    options = parser.parse_args()
    if options.batch != 1 and not options.model:
        parser.error("--batch is for networks that are named by --model")
    cases = [(name, options.batch) for name in options.model or ()] or CASES
    found: list[dict[str, Any]] = [
        {"model": name, "batch": batch, "milliseconds": {}} for name, batch in cases
    ]
    runs = [(case, engine) for case in found for engine in ENGINES]
    for case, engine in track(runs, disable=not sys.stderr.isatty()):
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            case["milliseconds"][engine] = pool.apply(measure, (case["model"], engine, case["batch"]))
    record = {**surroundings(COMMAND), "cases": found}
    text = page(record)
    print(text)
    write("kinds", record, text)


if __name__ == "__main__":
    main()
