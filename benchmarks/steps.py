"""What each step towards the engine "torch" brings: the same folded network, run in ever other ways.

*prepacked* is what fxfuse does not do: every convolution, with the activation behind it, as one call of
torch's own oneDNN operators on packed weights. *oneDNN Graph* is the engine with its channels first. Beside
them Inductor with freezing is called from Python, from C++, and as the package that AOTInductor makes. The
ways are timed side by side (`fxfuse.lowering.timing`), the outputs compared before.
"""

from __future__ import annotations

import argparse
import copy
import statistics
import sys
import tempfile
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any
from unittest.mock import patch

import torch
import torch.nn.functional as F
from rich.progress import track
from torch import Tensor, fx, nn

import fxfuse
from benchmarks.pages import table
from benchmarks.record import surroundings, write
from fxfuse import zoo
from fxfuse.lowering import channels_last, onednn, torchscript
from fxfuse.lowering.engines import ENGINES, Engine
from fxfuse.lowering.timing import samples

COMMAND = "python -m benchmarks.steps"
CASES = (
    *(("torchvision:mobilenet_v2", batch) for batch in (1, 8)),
    *(("torchvision:resnet50", batch) for batch in (1, 8)),
    ("torchvision:efficientnet_b0", 1),
)
# Edits of a graph, the function that makes them, and models with something to edit.
EDITS: tuple[tuple[str, tuple[Any, str], str, int], ...] = (
    ("attention as one call", (onednn, "write_out"), "timm:maxvit_tiny_tf_224", 2),
    ("shuffles step by step", (channels_last, "_join_shuffle"), "torchvision:shufflenet_v2_x1_0", 8),
    ("kernels of reference", (torchscript, "lay_out_operands"), "timm:efficientformerv2_s0", 2),
    ("concatenations of all parts", (onednn, "grow"), "torchvision:densenet121", 1),
    ("concatenations of all parts", (onednn, "grow"), "torchvision:densenet121", 8),
)
POST_OPS: dict[Any, tuple[str, list[float]]] = {
    nn.ReLU: ("relu", []),
    F.relu: ("relu", []),
    nn.ReLU6: ("hardtanh", [0.0, 6.0]),
    nn.SiLU: ("swish", []),
    nn.Sigmoid: ("sigmoid", []),
}
LAST = torch.channels_last


class Prepacked(fx.Interpreter):
    """Runs a graph, and writes one down in which convolutions are calls of oneDNN's operators."""

    def __init__(self, module: fx.GraphModule) -> None:
        super().__init__(module)
        self.ops: Any = torch.ops.mkldnn
        self.written = fx.Graph()
        self.copies: dict[fx.Node, fx.Node] = {}
        self.root: dict[str, Any] = dict(module.named_modules(remove_duplicate=False))

    def run_node(self, n: fx.Node) -> Any:
        """Runs it, and copies it, as a oneDNN call or a part of one where it can be one."""
        value = super().run_node(n)
        layer = self.root.get(str(n.target)) if n.op == "call_module" else None
        made = None
        if isinstance(layer, nn.Conv2d):
            made = self.convolution(n, layer)
        elif n.op in ("call_module", "call_function"):
            made = self.joined(n, type(layer) if layer is not None else n.target)
        self.copies[n] = made or self.written.node_copy(n, self.copies.__getitem__)
        return value

    def convolution(self, node: fx.Node, layer: nn.Conv2d) -> fx.Node:
        """The call on a packed weight."""
        (source,) = node.all_input_nodes
        geometry = [list(each) for each in (layer.padding, layer.stride, layer.dilation)]
        size = list(self.env[source].shape)
        weight = layer.weight.detach().to(memory_format=LAST)
        self.root[f"{node.name}_w"] = self.ops._reorder_convolution_weight(
            weight, *geometry, layer.groups, size
        )
        self.root[f"{node.name}_b"] = None if layer.bias is None else layer.bias.detach()
        weight_, bias = self.written.get_attr(f"{node.name}_w"), None
        if layer.bias is not None:
            bias = self.written.get_attr(f"{node.name}_b")
        args: Any = (self.copies[source], weight_, bias, *geometry, layer.groups, "none", [], None)
        return self.written.call_function(self.ops._convolution_pointwise.default, args)

    def joined(self, node: fx.Node, kind: Any) -> fx.Node | None:
        """The call before it, with it in it."""
        inputs = node.all_input_nodes
        calls = [self.copies[each] for each in inputs if len(each.users) == 1]
        if kind in POST_OPS and calls and calls[0].target is self.ops._convolution_pointwise.default:
            name, scalars = POST_OPS[kind]
            calls[0].args = (*calls[0].args[:7], name, scalars, None)
            return calls[0]
        return None


def prepacked(folded: fx.GraphModule, x: Tensor) -> Callable[[], Any]:
    """`folded` as calls of oneDNN's operators."""
    writer = Prepacked(folded)
    x = x.contiguous(memory_format=LAST)
    writer.run(x)
    root = {name: each for name, each in writer.root.items() if name and each is not None}
    return partial(fx.GraphModule(root, writer.written).eval(), x)


class Product(nn.Module):
    """A 1×1 convolution as a linear layer, over the channels of every place."""

    def __init__(self, conv: nn.Conv2d) -> None:
        super().__init__()
        self.linear = nn.Linear(conv.in_channels, conv.out_channels, conv.bias is not None)
        self.linear.load_state_dict(dict(conv.state_dict(), weight=conv.weight.flatten(1)))

    def forward(self, x: Tensor) -> Tensor:
        """What the convolution gives for images (N, C, H, W)."""
        y: Tensor = self.linear(x.permute(0, 2, 3, 1))
        return y.permute(0, 3, 1, 2)


def with_products(folded: fx.GraphModule) -> fx.GraphModule:
    """`folded` with linear layers in the places of its 1×1 convolutions."""
    twin = copy.deepcopy(folded)
    for name, layer in folded.named_modules():
        plain = isinstance(layer, nn.Conv2d) and layer.kernel_size == layer.stride == (1, 1)
        if plain and layer.groups == 1 and layer.padding == (0, 0):
            twin.set_submodule(name, Product(layer))
    return twin


def ways(folded: fx.GraphModule, x: Tensor) -> dict[str, Callable[[], Any]]:
    """What is timed."""
    last = copy.deepcopy(folded).to(memory_format=LAST)  # type: ignore[call-overload]
    found: dict[str, Callable[[], Any]] = {
        "folded": partial(folded, x),
        "channels last": partial(last, x.contiguous(memory_format=LAST)),
        "prepacked": prepacked(folded, x),
    }
    whole = Engine(onednn.compile)
    with patch.dict(ENGINES, {"torch": whole}):
        with patch.object(onednn, "put_channels_last", lambda *_: None):
            found["oneDNN Graph"] = partial(lowered(folded, x), x)
        engine = lowered(folded, x)
        found["with channels last"] = partial(engine, x)
        found["1×1 convolutions as linears"] = partial(lowered(with_products(folded), x), x)
        size = len(x) // 2
        while size:
            engine(x[:size])
            found[f"in slices of {size}"] = partial(sliced, engine, x, size)
            size //= 2
    return found | compiled(folded, x)


def without(
    way: str, edit: tuple[Any, str], folded: fx.GraphModule, x: Tensor
) -> dict[str, Callable[[], Any]]:
    """The engine without an edit, and as it is."""
    found: dict[str, Callable[[], Any]] = {"folded": partial(folded, x)}
    with patch.dict(ENGINES, {"torch": Engine(onednn.compile)}):
        with patch.object(*edit, lambda *_: None):
            found[way] = partial(lowered(folded, x), x)
        found["engine"] = partial(lowered(folded, x), x)
    return found


def compiled(folded: fx.GraphModule, x: Tensor) -> dict[str, Callable[[], Any]]:
    """Inductor's kernels, called in three ways."""
    found: dict[str, Callable[[], Any]] = {}
    for way, in_cpp in {"Inductor": False, "Inductor, C++ wrapper": True}.items():
        twin = copy.deepcopy(folded)  # what is compiled of one is not looked up for another
        options: dict[str, Any] = {"freezing": True, "cpp_wrapper": in_cpp}
        found[way] = partial(torch.compile(twin, fullgraph=True, dynamic=False, options=options), x)
        with torch._inductor.config.patch(freezing=True):  # Dynamo asks for it, too
            found[way]()
    exported = torch.export.export(folded, (x,))
    with tempfile.TemporaryDirectory() as folder:
        path = torch._inductor.aoti_compile_and_package(
            exported, package_path=f"{folder}/model.pt2", inductor_configs={"freezing": True}
        )
        package: Any = torch._inductor.aoti_load_package(path)
    return {**found, "AOTInductor": partial(package, x)}


def lowered(folded: nn.Module, x: Tensor) -> nn.Module:
    """`folded` on the engine, which has to take it."""
    found = fxfuse.lower(folded, (x,))
    if found.lowering.reason:
        raise RuntimeError(found.lowering.reason)
    return found


def sliced(engine: Callable[[Tensor], Tensor], x: Tensor, size: int) -> Tensor:
    """The batch in slices."""
    return torch.cat([engine(part) for part in torch.split(x, size)])


@torch.no_grad()
def measure(
    name: str, batch: int, rounds: int, ways: Callable[[fx.GraphModule, Tensor], dict[str, Callable[[], Any]]]
) -> dict[str, Any]:
    """The times of one model and batch in some ways, in milliseconds."""
    source = zoo.load(name, seed=0).model
    assert isinstance(source, nn.Module)
    folded = fxfuse.fuse(source)
    assert isinstance(folded, fx.GraphModule)
    x = torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0))
    calls = ways(folded, x)
    expected = folded(x)
    for way, call in calls.items():
        error = float((call() - expected).norm() / expected.norm())
        if not error < 1e-4:
            raise AssertionError(f"{name}, {way}: relative error {error}")
    return {"name": name, "batch": batch, "milliseconds": samples(calls, rounds, 120.0)}


def page(record: dict[str, Any]) -> str:
    """The results as a page for the documentation."""
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    machine = record["machine"]
    text = f"""# What each step of the engine "torch" brings

Made by `{record["command"]}` at {record["commit"]}: {machine["processor"]}, {machine["cores"]} cores,
{machine["threads"]} threads, {versions}. Medians of {record["rounds"]} rounds, all ways of a table side by
side. *prepacked*: each convolution with its activation as one call of torch's oneDNN operators on packed
weights, which fxfuse does not use. *oneDNN Graph*: the engine with its channels first. *Inductor* has frozen
weights in all three ways. *engine*: as `fxfuse.lower` has it, without slices; above it, without one edit.
"""
    for case in record["cases"]:
        medians = {way: statistics.median(times) for way, times in case["milliseconds"].items()}
        rows = [
            [way, f"{median:.3g}", f"{medians['folded'] / median:.2f}"] for way, median in medians.items()
        ]
        text += f"\n## {case['name']}, batch {case['batch']}\n\n"
        text += table([["", "ms", "speed, folded eager = 1"], *rows])
    return text


def main() -> None:
    """Measures and writes the page."""
    parser = argparse.ArgumentParser(prog=COMMAND, description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="counted calls of each way")
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    tasks: list[Any] = [(name, batch, options.rounds, ways) for name, batch in CASES]
    tasks += [(name, batch, options.rounds, partial(without, way, edit)) for way, edit, name, batch in EDITS]
    cases = [measure(*task) for task in track(tasks, disable=not sys.stderr.isatty())]
    record = {**surroundings(COMMAND), "rounds": options.rounds, "cases": cases}
    text = page(record)
    print(text)
    write("steps", record, text)


if __name__ == "__main__":
    main()
