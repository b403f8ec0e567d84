"""Models that tools for folding get wrong without a word: what each tool makes of them.

Every model is small, in eval mode, with random statistics; its output in each tool is compared with a float64
run of eager PyTorch. A tool is *right* up to a relative distance (L2) of 1e-3, else the distance is shown; it
may also raise, which nobody overlooks. How many norms a tool removed is not asked here: see benchmarks.reach.

AIMET and torchao are asked where they are installed: ``pip install -c constraints.txt -e '.[peers]'``, in an
environment of its own.
"""

from __future__ import annotations

import copy
import importlib.util
import logging
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import Any, cast

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, nn
from torch.ao.quantization import quantize_fx
from torch.fx.experimental.optimization import fuse as fx_fuse

import fxfuse
from benchmarks.inference import distance, in_runtime
from benchmarks.pages import table
from benchmarks.record import surroundings, write
from fxfuse import zoo

COMMAND = "python -m benchmarks.silent"
RIGHT = 1e-3
Call = Callable[[Tensor], Tensor]


class _Model(nn.Module):
    """Layers, and a forward that is given."""

    def __init__(self, forward: Callable[[Any, Tensor], Tensor], **layers: nn.Module) -> None:
        super().__init__()
        self.does = forward
        for name, layer in layers.items():
            setattr(self, name, layer)

    def forward(self, x: Tensor) -> Tensor:
        return self.does(self, x)


def _conv(into: int = 4, out: int = 4, kernel: int = 3, **settings: Any) -> nn.Conv2d:
    return nn.Conv2d(into, out, kernel, padding=settings.pop("padding", kernel // 2), **settings)


def _hooked() -> nn.Module:
    conv = _conv()
    conv.register_forward_hook(lambda _module, _inputs, output: 2 * output)
    return nn.Sequential(conv, nn.BatchNorm2d(4))


def _twice_named() -> nn.Module:
    conv = _conv()
    return _Model(lambda m, x: m.bn(m.one(x)) + m.other(x), one=conv, other=conv, bn=nn.BatchNorm2d(4))


CASES: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "one convolution called twice, a norm after one call": (
        lambda: _Model(lambda m, x: m.bn(m.conv(x)) + m.conv(x), conv=_conv(), bn=nn.BatchNorm2d(4)),
        (2, 4, 8, 8),
    ),
    "one convolution, two norms": (
        lambda: _Model(
            lambda m, x: m.bn(m.conv(x)) * m.other(m.conv(x)),
            conv=_conv(),
            bn=nn.BatchNorm2d(4),
            other=nn.BatchNorm2d(4),
        ),
        (2, 4, 8, 8),
    ),
    "the same convolution and norm in a row, twice": (
        lambda: _Model(lambda m, x: m.bn(m.conv(m.bn(m.conv(x)).relu())), conv=_conv(), bn=nn.BatchNorm2d(4)),
        (2, 4, 8, 8),
    ),
    "one module under two names": (_twice_named, (2, 4, 8, 8)),
    "the weight of a convolution read in forward": (
        lambda: _Model(
            lambda m, x: m.bn(m.conv(x)) + m.conv.weight.mean(), conv=_conv(), bn=nn.BatchNorm2d(4)
        ),
        (2, 4, 8, 8),
    ),
    "a forward hook on the convolution": (_hooked, (2, 4, 8, 8)),
    "a convolution with a second reader": (
        lambda: _Model(lambda m, x: m.bn(y := m.conv(x)) + y, conv=_conv(), bn=nn.BatchNorm2d(4)),
        (2, 4, 8, 8),
    ),
    "linear → BatchNorm1d on (N, C, L), as many features as channels": (
        lambda: nn.Sequential(nn.Linear(5, 4), nn.BatchNorm1d(4)),
        (2, 4, 5),
    ),
    "a square transposed convolution": (
        lambda: nn.Sequential(nn.ConvTranspose2d(4, 4, 3), nn.BatchNorm2d(4)),
        (2, 4, 8, 8),
    ),
    "a transposed convolution, 6 → 9 channels in 3 groups": (
        lambda: nn.Sequential(nn.ConvTranspose2d(6, 9, 3, groups=3), nn.BatchNorm2d(9)),
        (2, 6, 8, 8),
    ),
    "norm → 1×1 convolution with padding": (
        lambda: nn.Sequential(nn.BatchNorm2d(4), _conv(kernel=1, padding=1)),
        (2, 4, 8, 8),
    ),
    "a norm with an ε of 0.1 after a concatenation": (
        lambda: _Model(
            lambda m, x: m.bn(torch.cat([m.one(x), m.other(x)], 1)),
            one=_conv(),
            other=_conv(),
            bn=nn.BatchNorm2d(8, eps=0.1),
        ),
        (2, 4, 8, 8),
    ),
    "matmul → transpose → norm, all sizes 4": (
        lambda: _Model(
            lambda m, x: m.bn(m.lin(x).transpose(1, 2)), lin=nn.Linear(4, 4), bn=nn.BatchNorm1d(4)
        ),
        (4, 4, 4),
    ),
    "F.batch_norm, its statistics by keyword": (
        lambda: _Model(
            lambda m, x: F.batch_norm(
                m.conv(x), running_var=m.bn.running_var, running_mean=m.bn.running_mean, weight=m.bn.weight
            ),
            conv=_conv(),
            bn=nn.BatchNorm2d(4),
        ),
        (2, 4, 8, 8),
    ),
}


def _randomised(model: nn.Module, generator: torch.Generator) -> nn.Module:
    for module in model.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            assert module.running_mean is not None and module.running_var is not None
            module.running_mean.normal_(generator=generator)
            module.running_var.uniform_(0.3, 3, generator=generator)
            module.weight.data.normal_(generator=generator)
            module.bias.data.normal_(generator=generator)
    return model.eval()


def _frozen(model: nn.Module, x: Tensor) -> Call:
    torch.compiler.reset()
    with torch._inductor.config.patch(freezing=True):
        compiled = torch.compile(model, dynamic=False, options={"freezing": True})
        compiled(x)
    return cast(Call, compiled)


def _runtime(engine: str, model: nn.Module, x: Tensor) -> Call:
    call = in_runtime(engine, model, x)
    return lambda _: cast(Tensor, call()[0])


def _compiled(model: nn.Module, _: Tensor) -> Call:
    torch.compiler.reset()
    return cast(Call, torch.compile(model, backend="fxfuse", options={"then": "eager"}))


def _aimet(model: nn.Module, x: Tensor) -> Call:
    zoo.torchvision()  # which AIMET imports, and which need not fit this torch
    from aimet_torch.batch_norm_fold import fold_all_batch_norms  # noqa: PLC0415

    model = copy.deepcopy(model)
    fold_all_batch_norms(model, tuple(x.shape), dummy_input=x)
    return model


def _torchao(model: nn.Module, x: Tensor) -> Call:
    """What it does before it quantizes, with nothing to quantize."""
    from torchao.quantization.pt2e.quantize_pt2e import prepare_pt2e  # noqa: PLC0415
    from torchao.quantization.pt2e.quantizer import Quantizer  # noqa: PLC0415

    class Nothing(Quantizer):  # type: ignore[misc]
        def annotate(self, model: Any) -> Any:
            return model

        def validate(self, model: Any) -> None:
            pass

    return cast(Call, prepare_pt2e(torch.export.export(model, (x,)).module(), Nothing()))


PEERS = {"AIMET": ("aimet_torch", _aimet), "torchao": ("torchao", _torchao)}
TOOLS: dict[str, Callable[[nn.Module, Tensor], Call]] = {
    "fxfuse.fuse": lambda model, _: fxfuse.fuse(model),
    "fxfuse, kept modules": lambda model, _: fxfuse.fuse(model, keep_modules=True),
    "fxfuse backend": _compiled,
    "fxfuse.lower": lambda model, x: fxfuse.lower(fxfuse.fuse(model), (x,)),
    "torch.fx": lambda model, _: fx_fuse(model),
    "torch.ao fuse_fx": lambda model, _: quantize_fx.fuse_fx(model),
    **{name: fold for name, (package, fold) in PEERS.items() if importlib.util.find_spec(package)},
    "TorchScript freeze": lambda model, x: torch.jit.freeze(torch.jit.trace(model, x)),  # type: ignore[no-untyped-call]
    "Inductor, freezing": _frozen,
    "ONNX Runtime": partial(_runtime, "onnxruntime"),
    "OpenVINO": partial(_runtime, "openvino"),
}


@torch.no_grad()
def measure(make: Callable[[], nn.Module], shape: Sequence[int], tool: str) -> float | str:
    """The relative distance of what a tool makes of a model from the model; an error if the tool raises."""
    torch.manual_seed(0)
    generator = torch.Generator().manual_seed(1)
    model = _randomised(make(), generator)
    x = torch.randn(*shape, generator=generator)
    exact = copy.deepcopy(model).double()(x.double())
    try:
        result = TOOLS[tool](model, x)(x)
    except Exception as error:  # a tool raises what it likes
        return type(error).__name__
    return distance(result, exact)


@torch.no_grad()
def stale(tool: str) -> float | str:
    """The same for a model whose weights are changed after the tool has seen it."""
    torch.manual_seed(0)
    conv = _conv()
    model = _randomised(nn.Sequential(conv, nn.BatchNorm2d(4)), torch.Generator().manual_seed(1))
    x = torch.randn(2, 4, 8, 8)
    call = TOOLS[tool](model, x)
    call(x)
    conv.weight.mul_(3)
    return distance(call(x), copy.deepcopy(model).double()(x.double()))


def rows(found: dict[str, dict[str, float | str]]) -> Iterator[Sequence[object]]:
    """The table."""
    yield ["model", *TOOLS]
    for case, results in found.items():
        yield [case, *(_cell(results[tool]) for tool in TOOLS)]


def _cell(found: float | str) -> str:
    if isinstance(found, str):
        return f"raises {found}"
    return "right" if found <= RIGHT else f"**{found:.2g}**"


def main() -> None:
    """Measures and writes the page."""
    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cases = [(case, tool) for case in CASES for tool in TOOLS]
    found: dict[str, dict[str, float | str]] = {case: {} for case in CASES}
    for case, tool in track(cases, disable=not sys.stderr.isatty()):
        found[case][tool] = measure(*CASES[case], tool)
    compiled = ("Inductor, freezing", "fxfuse backend")
    changed = {tool: stale(tool) for tool in compiled}
    record = {**surroundings(COMMAND), "found": found, "weights changed after compilation": changed}
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    told = ", ".join(f"{tool}: {_cell(each)}" for tool, each in changed.items())
    text = f"""# Wrong without a word

Made by `{COMMAND}` at {record["commit"]}: {versions}.

What tools make of models that are easy to fold wrongly. *right*: the output is that of eager PyTorch in
float64, up to a relative distance of {RIGHT:g}; a number in bold is that distance, where it is more. Whether
a norm was removed is not asked here. torchao: what its `prepare_pt2e` does where nothing is to be quantized.

{table(rows(found))}
Compiled, and the weights changed afterwards: {told}.
"""
    print(text)
    write("silent", record, text)


if __name__ == "__main__":
    main()
