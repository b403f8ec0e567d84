"""What a node is, whatever its dialect: ``call_module``, ``torch.*``, ``F.*`` or ``aten.*``.

`Reader.read` turns a node into one of a few records. The rest of fxfuse sees only these, so an operator
that is to be understood is added here, in one of the tables, and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.instancenorm import _InstanceNorm

from fxfuse.calls import arguments, attribute_name, layer_input, origins, torch_name, written_inputs
from fxfuse.refusals import Code
from fxfuse.replica import is_plain
from fxfuse.tree import NORM_RANKS, attribute, has_hooks


@dataclass(frozen=True)
class Linear:
    """A convolution, transposed convolution or linear layer, with weight and bias of its own.

    Attributes:
        input: the node whose value it maps.
        weight: qualified name of the weight, (out, in/groups, *kernel), transposed (in, out/groups, *kernel).
        bias: qualified name of the bias, (out,); None without bias.
        dims: number of spatial axes; 0 for a linear layer.
        transposed: whether the weight's axes are those of a transposed convolution.
        groups: number of groups.
    """

    input: fx.Node
    weight: str
    bias: str | None
    dims: int
    transposed: bool = False
    groups: int = 1

    def channels(self, weight: Tensor) -> int:
        """How many channels come out."""
        return weight.shape[1] * self.groups if self.transposed else weight.shape[0]


@dataclass(frozen=True)
class Norm:
    """A norm that, by its running statistics, is an affine map per channel.

    Attributes:
        input: the node whose value it normalises.
        name: qualified name of the norm.
        mean, var: qualified names of the running statistics, (channels,).
        weight, bias: qualified names of γ and β, (channels,); None without.
        eps: ε.
        ranks: the numbers of axes that its input may have; None if it does not check.
        unbatched: whether the batch axis may be missing, so that channels are counted from the end.
    """

    input: fx.Node
    name: str
    mean: str
    var: str
    weight: str | None
    bias: str | None
    eps: float
    ranks: frozenset[int] | None = None
    unbatched: bool = False


@dataclass(frozen=True)
class Transparent:
    """Gives its input on, unchanged."""

    input: fx.Node


@dataclass(frozen=True)
class Query:
    """Asks for shape, dtype or device, never for values."""


@dataclass(frozen=True)
class Opaque:
    """Anything else. `code` and `detail` say why a known operator was not taken for one."""

    code: Code = Code.OPAQUE_PRODUCER
    detail: str = ""


@dataclass(frozen=True)
class LeftNorm:
    """A norm that is not an affine map, or not safely one: it stays, and `code` says why."""

    name: str
    code: Code
    detail: str = ""


Op = Linear | Norm | Transparent | Query | Opaque | LeftNorm

_LINEAR_MODULES: dict[type[nn.Module], tuple[int, bool]] = {
    nn.Linear: (0, False),
    nn.Conv1d: (1, False),
    nn.Conv2d: (2, False),
    nn.Conv3d: (3, False),
    nn.ConvTranspose1d: (1, True),
    nn.ConvTranspose2d: (2, True),
    nn.ConvTranspose3d: (3, True),
}
_LINEAR_FUNCTIONS: dict[str, tuple[int, bool]] = {
    "linear": (0, False),
    "conv1d": (1, False),
    "conv2d": (2, False),
    "conv3d": (3, False),
    "conv_transpose1d": (1, True),
    "conv_transpose2d": (2, True),
    "conv_transpose3d": (3, True),
}
_INSTANCE_NORMS = (nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d)
# Norm function → the argument that says whether statistics of the input are used instead of the given ones.
_NORM_FUNCTIONS = {"batch_norm": "training", "instance_norm": "use_input_stats"}
# Norms that return a tuple: (normalised, statistics saved for the backward pass, ...).
_TUPLE_NORMS = {
    *("native_batch_norm", "_native_batch_norm_legit", "_native_batch_norm_legit_no_training"),
    *("_batch_norm_impl_index", "_batch_norm_no_update", "_batch_norm_with_update"),
    *("_batch_norm_with_update_functional", "cudnn_batch_norm", "miopen_batch_norm"),
}
_DROPOUT_MODULES = (
    nn.Dropout,
    nn.Dropout1d,
    nn.Dropout2d,
    nn.Dropout3d,
    nn.AlphaDropout,
    nn.FeatureAlphaDropout,
)
_DROPOUT_FUNCTIONS = {
    *("dropout", "dropout1d", "dropout2d", "dropout3d"),
    *("alpha_dropout", "feature_alpha_dropout", "feature_dropout"),
    *("dropout_", "alpha_dropout_", "feature_alpha_dropout_", "feature_dropout_"),
}
_QUERY_ATTRIBUTES = {"shape", "ndim", "dtype", "device", "is_cuda", "layout"}
_QUERY_METHODS = {
    "size",
    "dim",
    "ndimension",
    "numel",
    "nelement",
    "is_floating_point",
    "is_complex",
    "element_size",
}
_KNOWN_FUNCTIONS = {
    *_LINEAR_FUNCTIONS,
    *_NORM_FUNCTIONS,
    *_TUPLE_NORMS,
    *_DROPOUT_FUNCTIONS,
    *("numel", "is_floating_point", "is_complex"),
}
# What a subclass may not override and still be taken for the class that it comes from.
_BEHAVIOUR = (
    *("__call__", "_call_impl", "forward", "_conv_forward", "_output_padding", "_check_input_dim"),
    *("_get_no_batch_dim", "_handle_no_batch_input", "_apply_instance_norm"),
)


class Reader:
    """Reads the nodes of one graph over the modules of `root`."""

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self._read: dict[fx.Node, Op] = {}
        self._origins = origins(graph)
        self._written = {_storage(tensor) for node in graph.nodes for tensor in self._may_write_to(node)}

    def tensor(self, name: str) -> Tensor:
        """The parameter or buffer of that qualified name."""
        value = attribute(self.root, name)
        assert isinstance(value, Tensor)
        return value

    def read(self, node: fx.Node) -> Op:
        """What `node` is, or was when it was first read."""
        if node not in self._read:
            readers = {"call_module": self._module, "call_function": self._function, "call_method": _method}
            self._read[node] = readers[node.op](node) if node.op in readers else Opaque()
        return self._read[node]

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The module that `node` calls, if the call does what the module's class says and nothing more."""
        module = attribute(self.root, str(node.target)) if node.op == "call_module" else None
        return None if module is None or has_hooks(module) or "forward" in module.__dict__ else module

    def _may_write_to(self, node: fx.Node) -> list[Any]:
        """Tensors of the model that `node` may write to: all of its own, if it is a module not known here."""
        called = attribute(self.root, str(node.target)) if node.op == "call_module" else None
        inputs = node.all_input_nodes if getattr(called, "inplace", False) else written_inputs(node)
        names = [self._origins[source] for source in inputs]
        written: list[Any] = [attribute(self.root, name) for name in names if name is not None]
        for module in () if called is None else called.modules():
            if has_hooks(module) or not _is_known(module) or getattr(module, "max_norm", None) is not None:
                written += module.parameters()
                written += module.buffers()
            elif is_norm(module) and module.training:
                written += module.buffers()
        return written

    def _module(self, node: fx.Node) -> Op:
        module = attribute(self.root, str(node.target))
        for kind in type(module).__mro__:
            if kind in NORM_RANKS:
                return self._norm_module(node, module, kind)
            if kind in _LINEAR_MODULES:
                return self._linear_module(node, module, kind)
        if is_norm(module):
            return LeftNorm(str(node.target), Code.NORM_OWN_FORWARD, type(module).__name__)
        identity = type(module) is nn.Identity or (type(module) in _DROPOUT_MODULES and not module.training)
        if identity and self.layer(node) is not None:
            return Transparent(layer_input(node))
        return Opaque(detail=f"{node.target} ({type(module).__name__})")

    def _norm_module(self, node: fx.Node, module: Any, kind: type[nn.Module]) -> Op:
        name = str(node.target)
        instance = kind in _INSTANCE_NORMS
        if instance and not module.track_running_stats:
            return Opaque(detail=f"{name} ({type(module).__name__} without running statistics)")
        if has_hooks(module):
            return LeftNorm(name, Code.NORM_HOOKS)
        if _replaced(module, kind):
            return LeftNorm(name, Code.NORM_OWN_FORWARD, type(module).__name__)
        if module.training:
            return LeftNorm(name, Code.NORM_TRAINING)
        if module.running_mean is None or module.running_var is None:
            return LeftNorm(name, Code.BATCH_STATISTICS)
        owned = {**module._parameters, **module._buffers}
        if any(
            getattr(module, part) is not owned.get(part)
            for part in ("running_mean", "running_var", "weight", "bias")
        ):
            return LeftNorm(name, Code.NORM_COMPUTED)
        norm = Norm(
            input=layer_input(node),
            name=name,
            mean=f"{name}.running_mean",
            var=f"{name}.running_var",
            weight=None if module.weight is None else f"{name}.weight",
            bias=None if module.bias is None else f"{name}.bias",
            eps=module.eps,
            ranks=NORM_RANKS[kind],
            unbatched=instance,
        )
        return self._if_constant(norm)

    def _linear_module(self, node: fx.Node, module: Any, kind: type[nn.Module]) -> Op:
        name = str(node.target)
        parts = ("weight", "bias")
        computed = [part for part in parts if part not in module._parameters or hasattr(type(module), part)]
        if computed:
            return Opaque(Code.OPERATOR_COMPUTED, f"{name}.{computed[0]}")
        if has_hooks(module):
            return Opaque(Code.OPERATOR_HOOKS, name)
        if _replaced(module, kind):
            return Opaque(Code.OPERATOR_OWN_FORWARD, f"{name} ({type(module).__name__})")
        if module.training:
            return Opaque(Code.OPERATOR_TRAINING, name)
        bias = None if module.bias is None else f"{name}.bias"
        dims, transposed = _LINEAR_MODULES[kind]
        groups = getattr(module, "groups", 1)
        return self._if_constant(Linear(layer_input(node), f"{name}.weight", bias, dims, transposed, groups))

    def _function(self, node: fx.Node) -> Op:
        name = torch_name(node.target)
        if name not in _KNOWN_FUNCTIONS:
            return _python_function(node)
        bound = arguments(node)
        if name in _LINEAR_FUNCTIONS:
            return self._linear_function(bound, *_LINEAR_FUNCTIONS[name])
        if name in _TUPLE_NORMS:
            return LeftNorm(_norm_name(node, bound), Code.TUPLE_OUTPUT)
        if name in _NORM_FUNCTIONS:
            return self._norm_function(node, bound, name)
        if name in _DROPOUT_FUNCTIONS and bound.get("training", bound.get("train")) is False:
            return Transparent(bound["self" if "self" in bound else "input"])
        if name in _QUERY_METHODS:
            return Query()
        return Opaque(detail=name)

    def _linear_function(self, bound: Mapping[str, Any], dims: int, transposed: bool) -> Op:
        weight, bias = attribute_name(bound["weight"]), attribute_name(bound["bias"])
        if weight is None or (bias is None and bound["bias"] is not None):
            return Opaque(Code.OPERATOR_COMPUTED, str(bound["weight"] if weight is None else bound["bias"]))
        groups = bound.get("groups", 1)
        if not isinstance(groups, int) or self.tensor(weight).dim() != dims + 2:
            return Opaque(detail=f"{weight} ({self.tensor(weight).dim()} axes)")
        return self._if_constant(Linear(bound["input"], weight, bias, dims, transposed, groups))

    def _norm_function(self, node: fx.Node, bound: Mapping[str, Any], kind: str) -> Op:
        name = _norm_name(node, bound)
        if kind == "instance_norm" and bound[_NORM_FUNCTIONS[kind]] is True:
            return Opaque(detail=f"{name} (instance_norm without running statistics)")
        if bound["running_mean"] is None or bound["running_var"] is None:
            return LeftNorm(name, Code.BATCH_STATISTICS)
        if bound[_NORM_FUNCTIONS[kind]] is not False:
            return LeftNorm(name, Code.NORM_TRAINING)
        parts = {part: bound[part] for part in ("running_mean", "running_var", "weight", "bias")}
        names = {part: attribute_name(value) for part, value in parts.items()}
        mean, var = names["running_mean"], names["running_var"]
        computed = any(names[part] is None and value is not None for part, value in parts.items())
        if computed or mean is None or var is None or not isinstance(bound["eps"], (int, float)):
            return LeftNorm(name, Code.NORM_COMPUTED)
        return self._if_constant(
            Norm(bound["input"], name, mean, var, names["weight"], names["bias"], float(bound["eps"]))
        )

    def _if_constant(self, op: Linear | Norm) -> Op:
        names = (op.weight, op.bias) if isinstance(op, Linear) else (op.mean, op.var, op.weight, op.bias)
        for name in names:
            tensor = None if name is None else self.tensor(name)
            if tensor is None:
                continue
            mutated = _storage(tensor) in self._written
            if not mutated and _is_plain(tensor) and (isinstance(op, Linear) or tensor.dim() == 1):
                continue
            if isinstance(op, Norm):
                return LeftNorm(op.name, Code.STATE_MUTATED if mutated else Code.NORM_COMPUTED, str(name))
            return Opaque(Code.STATE_MUTATED if mutated else Code.OPERATOR_COMPUTED, str(name))
        return op


def norms_inside(module: nn.Module) -> list[str]:
    """Qualified names, relative to `module`, of the norms below it: modules, calls in graphs and in code."""
    found = []
    for path, child in module.named_modules():
        if is_norm(child):
            found += [path] if path else []
        elif isinstance(child, fx.GraphModule):
            reader = Reader(child, child.graph)
            calls = [reader.read(node) for node in child.graph.nodes if node.op == "call_function"]
            found += [f"{path}.{op.name}".lstrip(".") for op in calls if isinstance(op, Norm | LeftNorm)]
        elif not _is_known(child) and any(
            map(calls_norm, filter(inspect.isfunction, vars(type(child)).values()))
        ):
            found.append(path)
    return found


def calls_norm(function: Any, seen: frozenset[Any] = frozenset()) -> bool:
    """Whether the code of a function that is not traced through calls a norm, itself or by others."""
    function = inspect.unwrap(function)
    code = getattr(function, "__code__", None)
    if code is None or code in seen:
        return False
    if not {*_NORM_FUNCTIONS, *_TUPLE_NORMS}.isdisjoint(code.co_names):
        return True
    called = [function.__globals__.get(name) for name in code.co_names]
    return any(
        calls_norm(each, seen | {code})
        for each in called
        if inspect.isfunction(each) and not each.__module__.startswith("torch")
    )


def is_norm(module: nn.Module) -> bool:
    """Whether fxfuse accounts for `module`: batch norms, and instance norms with running statistics."""
    if isinstance(module, _InstanceNorm):
        return module.track_running_stats
    return isinstance(module, _BatchNorm)


def _python_function(node: fx.Node) -> Op:
    if node.target is getattr and node.args[1] in _QUERY_ATTRIBUTES:
        return Query()
    if node.target in (torch.is_tensor, torch.ops.aten._assert_tensor_metadata.default):
        return Query()
    return Opaque(detail=getattr(node.target, "__name__", str(node.target)))


def _method(node: fx.Node) -> Op:
    if node.target in _QUERY_METHODS:
        return Query()
    if node.target == "contiguous" and isinstance(node.args[0], fx.Node):
        return Transparent(node.args[0])
    return Opaque(detail=f".{node.target}()")


def _is_known(module: nn.Module) -> bool:
    """Whether the class of `module` is torch.nn's, or behaves like one of the tables above."""
    kinds = [kind for kind in type(module).__mro__ if kind in _LINEAR_MODULES or kind in NORM_RANKS]
    torch_own = type(module).__module__.startswith("torch.nn.modules") and "forward" not in module.__dict__
    return torch_own or (bool(kinds) and not _replaced(module, kinds[0]))


def _replaced(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether `module` behaves differently from its ancestor `kind`, by its class or by itself."""
    return any(
        name in module.__dict__ or getattr(type(module), name, None) is not getattr(kind, name, None)
        for name in _BEHAVIOUR
    )


def _storage(tensor: Any) -> int:
    """What two tensors have in common if writing to one may change the other."""
    plain = isinstance(tensor, Tensor) and tensor.layout is torch.strided and not tensor.is_meta
    return tensor.untyped_storage().data_ptr() if plain else id(tensor)


def _is_plain(tensor: Tensor) -> bool:
    """Whether the values are just what is stored: no quantised, sharded or fake tensor, and real numbers."""
    return is_plain(tensor) and tensor.is_floating_point() and tensor.layout is torch.strided


def _norm_name(node: fx.Node, bound: Mapping[str, Any]) -> str:
    owner, _, leaf = (attribute_name(bound.get("running_mean")) or "").rpartition(".")
    return owner if leaf == "running_mean" and owner else node.name
