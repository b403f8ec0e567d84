"""How fast networks run: as they are, in compilers and runtimes, and in these behind fxfuse.

Every peer runs the source (*alone*) and what ``fxfuse.fuse`` made of it (*behind*); the engine "torch" is
fxfuse's own, and "auto" the one that fxfuse chooses by its own timing. One process for each model and batch.
First each way is made ready, which is timed, and its outputs are compared with a float64 run of the source.
Then all are called in an order that is drawn anew in every round, each after a pause and an uncounted call,
since the threads of the one before may still spin (`fxfuse.lowering.timing`). Memory is what the process
needs at its peak, beyond what it had before that way was made: until it is ready, and in one more call.

The run is resumable: a model and batch is kept as soon as it is done, with the commit that it was measured
at, and not measured again unless ``--again`` says so. There is a file for each set of instructions that
processors have, such as ``docs/results/inference-avx2.json``.
"""

from __future__ import annotations

import argparse
import copy
import json
import multiprocessing
import statistics
import sys
import time
import warnings
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from typing import Any

import torch
from rich.progress import Progress
from torch import Tensor, fx, nn
from torch.fx.experimental.optimization import fuse as fx_fuse
from torch.utils import _pytree as pytree

import fxfuse
from benchmarks.floor import floor
from benchmarks.inference_page import AUTO, Record, page, picture
from benchmarks.memory import peak, trimmed
from benchmarks.record import INSTRUCTIONS, RESULTS, surroundings, write
from fxfuse import zoo
from fxfuse.errors import with_type
from fxfuse.lowering.auto import fastest_of, times_of
from fxfuse.lowering.engines import ENGINES
from fxfuse.lowering.lowered import Lowered, lowered
from fxfuse.lowering.specialised import Specialised
from fxfuse.lowering.timing import samples

COMMAND = "python -m benchmarks.inference"
NAME = f"inference-{INSTRUCTIONS.lower()}"
TORCHVISION = (
    *("resnet18", "resnet50", "mobilenet_v2", "mobilenet_v3_large", "efficientnet_b0", "regnet_y_400mf"),
    *("densenet121", "inception_v3", "shufflenet_v2_x1_0", "vgg16_bn", "convnext_tiny", "deeplabv3_resnet50"),
)
TIMM = ("repvgg_a2", "mobileone_s1", "fastvit_t8", "repvit_m1", "levit_128s", "maxvit_tiny_tf_224")
MODELS = (*(f"torchvision:{name}" for name in TORCHVISION), *(f"timm:{name}" for name in TIMM))
QUICK = ("torchvision:mobilenet_v2", "timm:repvgg_a2")
SMALLER = {"torchvision:deeplabv3_resnet50": 128}  # side of the image, else 224
BATCHES = (1, 8, 32)
# An output that is relatively further (L2) than this from a float64 run of the source is wrong.
WRONG = {None: 1e-4, torch.bfloat16: 0.5}
SECONDS = 40.0  # after which no round of a model begins
Call = Callable[[], Any]


def _tensors(results: Any) -> tuple[Tensor, ...]:
    return tuple(pytree.tree_leaves(results))


def in_runtime(engine: str, model: nn.Module, x: Tensor) -> Call:
    """`model` as it is, in the way in which fxfuse calls that engine."""
    graph = fx.Graph()  # of which the engine sees nothing but a call
    given = graph.placeholder("x")
    given.meta["val"] = x.to("meta")
    graph.output(graph.call_function(_tensors, (graph.call_module("model", (given,)),)))
    module = fx.GraphModule({"model": model}, graph).eval()
    results = tuple(result.to("meta") for result in module(x))
    specialised = Specialised(module, (0,), results, (), pytree.tree_structure(0))
    return partial(ENGINES[engine].compile(specialised, [x], None), [x])


def compiled(model: nn.Module, x: Tensor, *, freezing: bool) -> Call:
    """`model` in Inductor; a copy, since the instances of a class share what Dynamo compiles."""
    model = copy.deepcopy(model)
    call = torch.compile(model, fullgraph=False, dynamic=False, options={"freezing": freezing})
    with torch._inductor.config.patch(freezing=freezing):  # Dynamo asks this one too
        call(x)
    return partial(call, x)


def last(model: nn.Module, x: Tensor) -> Call:
    """`model` with channels last."""
    twin = copy.deepcopy(model).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return partial(twin, x.contiguous(memory_format=torch.channels_last))


def in_torch(prefix: str, model: nn.Module, x: Tensor) -> dict[str, Callable[[], Call]]:
    """How `model` is made ready in ways that keep its weights where they are."""
    return {
        f"{prefix}eager": lambda: partial(model, x),
        f"{prefix}eager, channels_last": lambda: last(model, x),
        f"{prefix}inductor": lambda: compiled(model, x, freezing=False),
    }


@torch.no_grad()
def measure(name: str, batch: int, rounds: int, without: str) -> Record:
    """Everything about one model and batch, but for ways that have `without` in their names."""
    warnings.simplefilter("ignore")
    torch._dynamo.config.recompile_limit = 64
    torch._inductor.config.force_disable_caches = (
        True  # so that the time until ready is that of the first time
    )
    source = zoo.load(name, seed=0).model
    assert isinstance(source, nn.Module)
    side = SMALLER.get(name, 224)
    x = torch.randn(batch, 3, side, side, generator=torch.Generator().manual_seed(0))
    exact = [each.double() for each in pytree.tree_leaves(copy.deepcopy(source).double()(x.double()))]
    started = time.perf_counter()
    folded = fxfuse.fuse(source)
    fold_seconds = time.perf_counter() - started
    made: dict[str, Lowered] = {}

    def lower(engine: str, dtype: torch.dtype | None) -> Call:
        found = lowered(folded, (x,), engine, dtype)
        if found.lowering.reason:
            raise RuntimeError(found.lowering.reason)
        if dtype is None:
            made[engine] = found
        return partial(found, x)

    ways = in_torch("", source, x) | {
        "torch.fx": lambda: partial(fx_fuse(source), x),
        "inductor, freezing": lambda: compiled(source, x, freezing=True),
        "onnxruntime": lambda: in_runtime("onnxruntime", source, x),
        "openvino": lambda: in_runtime("openvino", source, x),
    }
    ways |= in_torch("fxfuse, ", folded, x)
    # The engine is Inductor with freezing.
    names = {engine: "inductor, freezing" if engine == "inductor" else engine for engine in ENGINES}
    for engine, called in names.items():
        ways[f"fxfuse, {called}"] = partial(lower, engine, None)
    for engine in ("torch", "openvino"):
        ways[f"fxfuse, {engine}, bfloat16"] = partial(lower, engine, torch.bfloat16)
    found: Record = {"fold_seconds": fold_seconds, "ways": {}}
    calls: dict[str, Call] = {}
    for way, make in ways.items():
        if without and without in way:
            continue
        try:
            found["ways"][way], calls[way] = ready(make, exact)
        except Exception as error:  # a peer raises what it likes; the table names it
            found["ways"][way] = {"failed": with_type(error)[:200]}
            continue
        if found["ways"][way]["error"] > WRONG[torch.bfloat16 if "bfloat16" in way else None]:
            del calls[way]
    chosen = fastest_of(made, times_of(made, folded, (x,)))
    for way, times in samples(calls, rounds, SECONDS).items():
        found["ways"][way] |= {"milliseconds": times, "median": statistics.median(times)}
    found["ways"][AUTO] = found["ways"][f"fxfuse, {names[chosen.engine]}"] | {"chosen": chosen.engine}
    if isinstance(folded, fx.GraphModule):
        found["floor"] = floor(folded, x)
    return found


def ready(make: Callable[[], Call], exact: Sequence[Tensor]) -> tuple[Record, Call]:
    """A way to call a model, how long and how much memory it took to make, and how far it is from `exact`."""
    made: list[Any] = []
    before = trimmed()
    started = time.perf_counter()

    def first() -> None:
        made.append(make())
        made.append(made[0]())

    made_with = peak(first, before)
    seconds = time.perf_counter() - started
    call, result = made
    far = max(distance(a, b) for a, b in zip(pytree.tree_leaves(result), exact, strict=True))
    trimmed()
    memory = {"ready": made_with, "call": peak(call, before)}
    return {"ready_seconds": seconds, "error": far, "megabytes": memory}, call


def distance(tensor: Tensor, exact: Tensor) -> float:
    """Relative L2."""
    return float((tensor.double() - exact).norm() / exact.norm())


def main() -> None:
    """Measures what is missing, and writes the page of all that is there."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument(
        "--quick", action="store_true", help="two models, one image, without Inductor, nothing is written"
    )
    parser.add_argument("--model", action="append", help="torchvision:NAME or timm:NAME, once for each")
    parser.add_argument("--batch", action="append", type=int, help="images in a call, once for each")
    parser.add_argument("--rounds", type=int, help="counted calls of each way; 11, or 5 with --quick")
    parser.add_argument("--again", action="store_true", help="measure anew what is there")
    parser.add_argument(
        "--without", default="", help="leave out ways that have this in their names, where memory is short"
    )
    options = parser.parse_args()
    names = options.model or (QUICK if options.quick else MODELS)
    batches = options.batch or ((1,) if options.quick else BATCHES)
    rounds = options.rounds or (5 if options.quick else 11)
    file = RESULTS / f"{NAME}.json"
    record: Record = {"models": {}, "command": COMMAND, "instructions": INSTRUCTIONS}
    if file.exists() and not options.quick:
        record = json.loads(file.read_text())
    cells = [(f"{name}, batch {batch}", name, batch) for batch in batches for name in names]
    with Progress(disable=not sys.stderr.isatty()) as bar:
        for key, name, batch in bar.track(cells):
            if key in record["models"] and not options.again:
                continue
            # A process of its own: what engines leave behind is gone with it.
            with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
                without = "inductor" if options.quick else options.without
                try:
                    found = pool.submit(measure, name, batch, rounds, without).result()
                except BrokenProcessPool:
                    print(f"{key}: its process was killed; memory may have run out", file=sys.stderr)
                    continue
            made = surroundings(COMMAND)
            record["models"][key] = found | {"name": name, "batch": batch, "made": made}
            if not options.quick:
                write(NAME, record, page(record))
    if options.quick:
        print(page(record))
        return
    for batch in sorted({each["batch"] for each in record["models"].values()}):
        picture(record, batch, RESULTS / f"{NAME}-{batch}.svg")
    write(NAME, record, page(record))


if __name__ == "__main__":
    main()
