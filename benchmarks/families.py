"""Every model of timm and torchvision, inputs for them, and processes that go through them all.

A sweep outlives a model that kills its process or takes too long, and its own interruption: what is done
lies line by line in a file, and the next sweep of the same code goes on from there.
"""

from __future__ import annotations

import gc
import inspect
import json
import math
import multiprocessing
import signal
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import is_dataclass
from multiprocessing.connection import Connection, wait
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm, _NormBase
from torch.utils import _pytree as pytree

from fxfuse import zoo

WORKERS = 2
INT8 = "+int8"
SIZES = tuple((side, side) for side in (64, 96, 128, 224, 256))
Record = dict[str, Any]
Size = tuple[int, int]
Task = Callable[[str], Record]

_spawn = multiprocessing.get_context("spawn")


def specs(pattern: str = "") -> list[str]:
    """The models with `pattern` in their names; quantisable ones also in their quantised form, ``…+int8``."""
    quantised = [name + INT8 for name in zoo.names() if name.startswith("torchvision:quantized_")]
    return [name for name in [*zoo.names(), *quantised] if pattern in name]


def place(spec: str) -> tuple[str, str]:
    """Library and family, the module that defines the model: ("timm", "levit")."""
    library, _, name = spec.removesuffix(INT8).partition(":")
    if library == "timm":
        return library, str(zoo.timm().models.model_entrypoint(name).__module__).rpartition(".")[2]
    builder = zoo.torchvision().models.get_model_builder(name)
    return library, builder.__module__.removeprefix("torchvision.models.")


def build(spec: str) -> nn.Module:
    """The model in eval mode, on torch's default device, with the weights that its constructor draws."""
    library, _, name = spec.removesuffix(INT8).partition(":")
    if library == "timm":
        return zoo.timm().create_model(name).eval()  # type: ignore[no-any-return]
    models = zoo.torchvision().models
    taken = inspect.signature(models.get_model_builder(name)).parameters
    wanted: Record = {"weights_backbone": None, "quantize": spec.endswith(INT8)}
    options = {key: value for key, value in wanted.items() if key in taken}
    if name.removeprefix("quantized_") in ("inception_v3", "googlenet"):
        options["init_weights"] = False  # they warn unless told whether to draw weights, which takes long
    return models.get_model(name, weights=None, **options).eval()  # type: ignore[no-any-return]


def build_without_memory(spec: str) -> nn.Module:
    """The model on the meta device; a quantised one, which has to compute its weights, on the CPU."""
    if spec.endswith(INT8):
        return build(spec)
    try:
        with torch.device("meta"):
            return build(spec)
    except NotImplementedError:  # torchvision's regnets compute their widths with tensors
        return build(spec).to("meta")


def draw(model: nn.Module) -> None:
    """Draws all parameters in place: none is zero, and layers keep about the size of their input."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1:
            nn.init.normal_(parameter, std=1 / math.sqrt(parameter[0].numel()))
        else:
            low, high = (-0.3, 0.3) if name.endswith("bias") else (0.5, 1.5)
            nn.init.uniform_(parameter, low, high)


def settle(model: nn.Module, inputs: tuple[Any, ...]) -> None:
    """Gives norms the statistics of a run on `inputs`, disturbed: activations neither die nor explode.

    Where they grow, an attention becomes a choice by the last digit, and rounding is no small error any more.
    """
    norms = counted_norms(model)
    for norm in norms:
        norm.train().momentum = 1.0  # what the run sees becomes the running statistics
    model(*inputs)
    for norm in norms:
        mean, var = norm.eval().get_buffer("running_mean"), norm.get_buffer("running_var")
        mean.add_(var.sqrt() * torch.empty_like(mean).uniform_(-0.3, 0.3))
        var.mul_(torch.empty_like(var).uniform_(0.5, 2.0))


def prepared(spec: str) -> tuple[nn.Module, nn.Module, Size]:
    """A model in float64, drawn and settled; what is run of it; and the size of images that it takes."""
    model = build(spec).double()
    draw(model)
    source = runnable(spec, model)
    size = smallest_size(spec, source)
    settle(source, images(spec, 3, size))
    return model, source, size


def counted_norms(model: nn.Module) -> list[_NormBase]:
    """The norms with running statistics: those that fxfuse counts if they are called."""
    return [m for m in model.modules() if isinstance(m, _NormBase) and m.running_var is not None]


def outputs(model: nn.Module, inputs: Iterable[tuple[Any, ...]]) -> list[Tensor]:
    """All leaves of what `model` returns for each of the inputs."""
    results = [model(*given) for given in inputs]
    opened = [vars(result) if is_dataclass(result) else result for result in results]
    return [torch.as_tensor(leaf) for leaf in pytree.tree_leaves(opened) if leaf is not None]


def runnable(spec: str, model: nn.Module) -> nn.Module:
    """What is run of `model`: of a detector only the backbone, because boxes are chosen by comparisons."""
    return model.get_submodule("backbone") if place(spec)[1].startswith("detection.") else model


def images(spec: str, batch: int, size: Size) -> tuple[Any, ...]:
    """Random images, two of them for optical flow; for video clips of 8, of 16 where the images are large."""
    family = place(spec)[1]
    frames = (16 if size[0] > 128 else 8,) if family.startswith("video.") else ()
    pair = torch.randn(2, batch, 3, *frames, *size, dtype=torch.float64)
    return tuple(pair) if family.startswith("optical_flow.") else (pair[0],)


def smallest_size(spec: str, model: nn.Module) -> Size:
    """The first of a few image sizes that `model` takes; the last one is the size that it was made for."""
    _, height, width = getattr(model, "pretrained_cfg", {}).get("input_size", (3, 320, 320))
    for size in SIZES:
        try:
            outputs(model, [images(spec, 1, size)])
        except Exception:  # a third-party model, which may raise anything on images that are too small
            continue
        return size
    return height, width


def is_norm(module: nn.Module) -> bool:
    """Whether `module` is a batch norm, torchvision's frozen one included."""
    return isinstance(module, _BatchNorm) or type(module).__name__ == "FrozenBatchNorm2d"


def sweep(task: Task, names: Sequence[str], file: Path, *, limit: float) -> dict[str, Record]:
    """What `task` returns for each name, of which `file` keeps what is done.

    A name whose process dies, or works on it for more than `limit` seconds, gets ``{"failed": reason}``.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    whole = file.read_text().rpartition("\n")[0].splitlines() if file.exists() else []
    file.write_text("".join(f"{line}\n" for line in whole))  # less a last line that was cut off
    done: dict[str, Record] = {line.pop("model"): line for line in map(json.loads, whole)}
    columns = (TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True)) as progress, file.open("a") as out:
        bar = progress.add_task(file.name.partition("-")[0], total=len(names))
        progress.update(bar, completed=sum(name in done for name in names))
        for name, record in _each(task, [name for name in names if name not in done], limit):
            done[name] = json.loads(json.dumps(record))  # as it will be read again
            print(json.dumps({"model": name, **record}), file=out, flush=True)
            progress.update(bar, advance=1, description=name)
    return {name: done[name] for name in names}


def _each(task: Task, names: Sequence[str], limit: float) -> Iterator[tuple[str, Record]]:
    waiting = deque(names)
    workers = [_Worker(task, limit) for _ in range(min(WORKERS, len(names)))]
    try:
        while True:
            for worker in workers:
                if not worker.name and waiting:
                    worker.give(waiting.popleft())
            busy = {worker.pipe: worker for worker in workers if worker.name}
            if not busy:
                return
            wait(list(busy), timeout=1)
            for worker in busy.values():
                name, record = worker.name, worker.result()
                if record is not None:
                    yield name, record
    finally:
        for worker in workers:
            worker.stop()


class _Worker:
    """A process that works on one name after another; a new one takes the place of one that died."""

    def __init__(self, task: Task, limit: float) -> None:
        self._task, self._limit = task, limit
        self.name = ""
        self._start()

    def _start(self) -> None:
        self.pipe, end = _spawn.Pipe()
        self._process = _spawn.Process(target=_serve, args=(self._task, end), daemon=True)
        self._process.start()
        end.close()

    def give(self, name: str) -> None:
        """Begins with `name`."""
        self.name, self._deadline = name, time.monotonic() + self._limit
        self.pipe.send(name)

    def result(self) -> Record | None:
        """What became of the name that was given; None while that is open."""
        try:
            record: Record | None = self.pipe.recv() if self.pipe.poll() else None
        except (EOFError, ConnectionResetError):
            self._process.join()
            record = {"failed": f"its process ended with exit code {self._process.exitcode}"}
        if record is None and time.monotonic() > self._deadline:
            record = {"failed": f"it took more than {self._limit:.0f} s"}
        if record is not None:
            self.name = ""
            if "failed" in record:
                self.stop()
                self._start()
        return record

    def stop(self) -> None:
        """Ends the process, whatever it does."""
        self._process.kill()
        self._process.join()
        self.pipe.close()


def _serve(task: Task, pipe: Connection[Record, str]) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this process
    torch.set_num_threads(1)
    while True:
        pipe.send(task(pipe.recv()))
        gc.collect()
