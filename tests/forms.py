"""One model in several forms, and a check that does not take the report's word for it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

import fxfuse
from tests.support import folds

CONVS = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
TRANSPOSED = {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d}
NORMS = {1: nn.BatchNorm1d, 2: nn.BatchNorm2d, 3: nn.BatchNorm3d}
_FUNCTIONS = {
    **{CONVS[dims]: getattr(F, f"conv{dims}d") for dims in (1, 2, 3)},
    **{TRANSPOSED[dims]: getattr(F, f"conv_transpose{dims}d") for dims in (1, 2, 3)},
}

# torch deep-copies the specification of an exported module's inputs through a type that it deprecates.
EXPORT_WARNING = "ignore:.*LeafSpec.* is deprecated:FutureWarning"


class Forward(nn.Module):
    """The given layers as attributes, and `forward(self, *inputs)` as the forward."""

    def __init__(self, forward: Callable[..., Any], **layers: Any) -> None:
        super().__init__()
        self.__dict__["written"] = forward
        for name, layer in layers.items():
            if isinstance(layer, Tensor) and not isinstance(layer, nn.Parameter):
                self.register_buffer(name, layer)
            else:
                setattr(self, name, layer)

    def forward(self, x: Any) -> Any:
        return self.written(self, x)


class Function(nn.Module):
    """`layer` written as a call of its function in ``torch.nn.functional``."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        layer = self.layer
        if isinstance(layer, nn.Linear):
            return F.linear(x, layer.weight, layer.bias)
        if isinstance(layer, _BatchNorm):
            mean, var = layer.running_mean, layer.running_var
            return F.batch_norm(x, mean, var, layer.weight, layer.bias, training=mean is None, eps=layer.eps)
        call, tensors = _FUNCTIONS[type(layer)], (layer.weight, layer.bias)
        stride, padding, dilation, groups = layer.stride, layer.padding, layer.dilation, layer.groups
        if isinstance(layer, _ConvTransposeNd):
            return call(x, *tensors, stride, padding, layer.output_padding, groups, dilation)
        if layer.padding_mode != "zeros":
            x = F.pad(x, layer._reversed_padding_repeated_twice, mode=layer.padding_mode)
            padding = 0
        return call(x, *tensors, stride, padding, dilation, groups)


def modules(model: nn.Module, *_: Any) -> nn.Module:
    return model


def functions(model: nn.Module, *_: Any) -> nn.Module:
    """`model` with each linear operator and batch norm called as a function; what is shared stays shared."""
    model = copy.deepcopy(model)
    made: dict[nn.Module, nn.Module] = {}
    for parent in list(model.modules()):
        for name, child in parent._modules.items():
            if isinstance(child, (nn.Linear, _ConvNd, _BatchNorm)):
                parent._modules[name] = made.setdefault(child, Function(child))
    return model.eval()


def traced(model: nn.Module, *_: Any) -> nn.Module:
    return fx.symbolic_trace(model)


def exported(model: nn.Module, *inputs: Any) -> nn.Module:
    """The aten graph of `model`, marked as being in eval mode, which torch does not do by itself."""
    graph = torch.export.export(model, inputs).module()
    for module in graph.modules():
        module.training = False
    return graph


FORMS = (modules, functions, traced, exported)


def check(
    model: nn.Module,
    *inputs: Any,
    folded: int = 0,
    left: Sequence[str] = (),
    example_inputs: Sequence[Any] | None = None,
) -> fx.GraphModule:
    """As `folds`; also counts the norms in the graph itself, and wants equal bits where none is folded."""
    fused = folds(model, *inputs, folded=folded, refused=left, example_inputs=example_inputs)
    assert norm_calls(fused) == len(left)
    if not folded and not fxfuse.report(fused).merged:
        with torch.no_grad():
            outputs = [torch.utils._pytree.tree_leaves(m(*copy.deepcopy(inputs))) for m in (model, fused)]
        tensors = [[leaf for leaf in leaves if isinstance(leaf, Tensor)] for leaves in outputs]
        assert all(torch.equal(one, other) for one, other in zip(*tensors, strict=True))
    return fused


def norm_calls(graph: nn.Module) -> int:
    """How many norms with running statistics a run of `graph` executes; of modules, how many there are."""
    if not isinstance(graph, fx.GraphModule):
        return sum(_is_norm(module) for module in graph.modules())
    return sum(_norms_of(graph, node) for node in graph.graph.nodes)


def _norms_of(graph: fx.GraphModule, node: fx.Node) -> int:
    if node.op == "call_module":
        return sum(_is_norm(module) for module in graph.get_submodule(str(node.target)).modules())
    name = getattr(node.target, "__name__", "") if node.op == "call_function" else ""
    return int("batch_norm" in name or "instance_norm" in name)


def _is_norm(module: nn.Module) -> bool:
    return isinstance(module, _BatchNorm) or isinstance(getattr(module, "running_var", None), Tensor)


def noise(*shape: int, seed: int = 1) -> Tensor:
    """Standard normal, float64."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
