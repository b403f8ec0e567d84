"""What a node is, whatever its dialect: ``call_module``, ``torch.*``, ``F.*`` or ``aten.*``.

`Reader.read` turns a node into one of a few records; the rest of fxfuse sees only these. Linear operators and
norms are read here. What lets a map pass is in `fxfuse.table`, where operators can be added.
"""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxfuse.aliases import is_query, plain_layer, roots
from fxfuse.arithmetic import read_arithmetic
from fxfuse.calls import (
    arguments,
    attribute_name,
    gives_several,
    layer_input,
    operator_name,
    written_inputs,
)
from fxfuse.constants import Constants
from fxfuse.geometry import GEOMETRY, read_geometry
from fxfuse.layers import (
    CONVOLUTIONS,
    INSTANCE_NORMS,
    LINEAR_FUNCTIONS,
    LINEAR_LAYERS,
    LINEAR_NAMES,
    NORM_FUNCTIONS,
    PRODUCTS,
    code_calls_norm,
    has_statistics,
    is_known,
    is_norm,
    is_replaced,
)
from fxfuse.nodes import LeftNorm, Linear, Norm, Op, Opaque, Query, Split, TensorName
from fxfuse.objects import modules_outside
from fxfuse.refusals import Code
from fxfuse.replica import is_plain
from fxfuse.table import LAYERS, LAYERS_LIKE_INPUT, LIKE_ALL, LIKE_INPUT, SPLITS, TRANSPARENT, Call, part
from fxfuse.transparent import Transparent, Within
from fxfuse.tree import NORM_RANKS, attribute, has_hooks, joined, storage

# Operators whose second argument gives its shape or dtype only.
_BY_EXAMPLE = {"reshape_as", "view_as", "expand_as", "type_as"}


class Reader:
    """Reads the nodes of one graph over the modules of `root`.

    Attributes:
        root: the modules.
        graph: the graph.
        constants: the nodes whose values do not depend on the input.
    """

    def __init__(self, root: nn.Module, graph: fx.Graph) -> None:
        self.root = root
        self._read: dict[fx.Node, Op] = {}
        self._writes: dict[fx.Node, list[fx.Node]] = {}
        self._tensors: dict[str, Tensor] = {}
        self.graph = graph
        self._roots = roots(graph, root, self.written_inputs, {})
        written = [each for node in graph.nodes for each in self.written_inputs(node)]
        changed = frozenset[fx.Node]().union(*(self._roots[each] for each in written))
        self._written = {storage(tensor) for node in graph.nodes for tensor in self._may_write_to(node)}
        inconstant = {node for node in graph.nodes if self._roots[node] & changed}
        self.constants = Constants(graph, self._unwritten, inconstant)

    def tensor(self, source: TensorName) -> Tensor:
        """A parameter or buffer by its qualified name, or the value of a constant node."""
        if not isinstance(source, str):
            value = self.constants.value(source)
        elif source in self._tensors:
            return self._tensors[source]
        else:
            value = self._tensors[source] = attribute(self.root, source)
        assert isinstance(value, Tensor)
        return value

    def forget_tensors(self) -> None:
        """Reads all tensors anew from now on; what the nodes are stays."""
        self._tensors.clear()
        self.constants.forget()

    def is_query(self, user: fx.Node, value: fx.Node) -> bool:
        """Whether `user` wants no more of `value` than its shape, dtype or device."""
        named = user.op != "call_module" and operator_name(user) in _BY_EXAMPLE
        return (named and user.all_input_nodes[0] is not value) or isinstance(self.read(user), Query)

    def is_unused(self, node: fx.Node) -> bool:
        """Whether nobody reads what `node` only passes on."""
        passes = not node.users and isinstance(self.read(node), Transparent)
        return passes and not self.written_inputs(node)

    def _unwritten(self, name: str) -> Any:
        value = attribute(self.root, name)
        return None if isinstance(value, Tensor) and storage(value) in self._written else value

    def read(self, node: fx.Node) -> Op:
        """What `node` is, or was when it was first read."""
        if node not in self._read:
            readers = {"call_module": self._module, "call_function": self._call, "call_method": self._call}
            self._read[node] = readers[node.op](node) if node.op in readers else Opaque()
        return self._read[node]

    def layer(self, node: fx.Node) -> nn.Module | None:
        """The module that `node` calls, if the call does what the module's class says and nothing more."""
        return plain_layer(self.root, node)

    def written_inputs(self, node: fx.Node) -> list[fx.Node]:
        """The inputs that `node` may write to: all, if it is a module that is not known here."""
        if node not in self._writes:
            self._writes[node] = self._written_inputs(node)
        return self._writes[node]

    def _written_inputs(self, node: fx.Node) -> list[fx.Node]:
        if node.op != "call_module":
            return written_inputs(node)
        module = attribute(self.root, str(node.target))
        known = self.layer(node) is not None and is_known(module) and not any(module.children())
        return [] if known and not getattr(module, "inplace", False) else node.all_input_nodes

    def _may_write_to(self, node: fx.Node) -> list[Any]:
        """Tensors of the model that `node` may write to: all of its own, if it is a module not known here."""
        sources = {root for each in self.written_inputs(node) for root in self._roots[each]}
        written = [attribute(self.root, str(each.target)) for each in sources if each.op == "get_attr"]
        called = attribute(self.root, str(node.target)) if node.op == "call_module" else None
        reached = set() if called is None or is_known(called) else modules_outside(called)
        written += [tensor for each in reached for tensor in (*each.parameters(), *each.buffers())]
        for module in () if called is None else called.modules():
            if has_hooks(module) or not is_known(module) or getattr(module, "max_norm", None) is not None:
                written += [*module.parameters(), *module.buffers()]
            elif is_norm(module) and module.training:
                written += module.buffers()
        return written

    def _module(self, node: fx.Node) -> Op:
        module = attribute(self.root, str(node.target))
        name = f"{node.target} ({type(module).__name__})"
        if not node.all_input_nodes:
            return Opaque(detail=name)  # nothing that a graph could change goes in
        for kind in type(module).__mro__:
            if kind in NORM_RANKS:
                return self._norm_module(node, module, kind)
            if kind in LINEAR_LAYERS:
                return self._linear_module(node, module, kind)
        if is_norm(module):
            return LeftNorm(str(node.target), Code.NORM_OWN_FORWARD, type(module).__name__)
        if self.layer(node) is None:
            return Opaque(detail=name)
        if type(module) in LAYERS:
            call = Call(layer_input(node), lambda argument: getattr(module, argument, None))
            return TRANSPARENT[LAYERS[type(module)]](call) or Opaque(detail=name)
        like = (layer_input(node),) if type(module) in LAYERS_LIKE_INPUT else ()
        return Opaque(detail=name, like=like)

    def _norm_module(self, node: fx.Node, module: Any, kind: type[nn.Module]) -> Op:
        name = str(node.target)
        instance = kind in INSTANCE_NORMS
        if instance and not module.track_running_stats:
            return Opaque(detail=f"{name} ({type(module).__name__} without running statistics)")
        if has_hooks(module):
            return LeftNorm(name, Code.NORM_HOOKS)
        if is_replaced(module, kind):
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
            channels=module.running_mean.numel(),
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
        if is_replaced(module, kind):
            return Opaque(Code.OPERATOR_OWN_FORWARD, f"{name} ({type(module).__name__})")
        if module.training:
            return Opaque(Code.OPERATOR_TRAINING, name)
        names = (f"{name}.weight", None if module.bias is None else f"{name}.bias")
        settings = {part: getattr(module, part) for part in GEOMETRY if hasattr(module, part)}
        found = self._linear(layer_input(node), names, LINEAR_LAYERS[kind], module.__dict__ | settings)
        is_plain = len(node.args) + len(node.kwargs) == 1  # a transposed convolution may be given a size
        return found if is_plain or not isinstance(found, Linear) else replace(found, geometry=None)

    def _linear_function(self, bound: Mapping[str, Any], name: str) -> Op:
        weight, bias = self._source(bound["weight"]), self._source(bound["bias"])
        if weight is None or (bias is None and bound["bias"] is not None):
            return Opaque(Code.OPERATOR_COMPUTED, str(bound["weight"] if weight is None else bound["bias"]))
        if name in CONVOLUTIONS:
            kind = (self.tensor(weight).dim() - 2, bound["transposed"])
        else:
            kind = LINEAR_FUNCTIONS[name]
        return self._linear(bound["input"], (weight, bias), kind, bound)

    def _product(self, bound: Mapping[str, Any], name: str) -> Op:
        """A linear layer as the product of two matrices; the second is often a parameter, transposed."""
        source, matrix, added = (None if each is None else bound[each] for each in PRODUCTS[name])
        if any(bound.get(factor, 1) != 1 for factor in ("alpha", "beta")):
            return Opaque(detail=f"{name} with a factor")
        transposed = self._transposed_attribute(matrix)
        weight, bias = transposed or self._source(matrix), self._source(added)
        if weight is None or (bias is None and added is not None):
            return Opaque(Code.OPERATOR_COMPUTED, str(matrix if weight is None else added))
        op = self._linear(source, (weight, bias), (0, transposed is None), {})
        if not isinstance(op, Linear):
            return op
        if bias is not None and self.tensor(bias).shape != (op.channels,):
            return Opaque(Code.OPERATOR_COMPUTED, str(added))
        return replace(op, rank=2)

    def _transposed_attribute(self, value: Any) -> str | None:
        """The name of the matrix of which `value` is the transpose, if it has one."""
        if value not in self.constants or value.op == "get_attr" or len(value.all_input_nodes) != 1:
            return None
        name = attribute_name(value.all_input_nodes[0])
        if name is None or self.tensor(name).dim() != 2:
            return None
        turned, given = self.tensor(name).t(), self.tensor(value)
        same = storage(turned) == storage(given) and turned.storage_offset() == given.storage_offset()
        return name if same and (turned.shape, turned.stride()) == (given.shape, given.stride()) else None

    def _source(self, value: Any) -> TensorName | None:
        """A constant as a name, if it is a parameter or buffer, or as a node, if it is computed."""
        name = attribute_name(value)
        return name if name is not None else value if value in self.constants else None

    def _linear(
        self,
        source: Any,
        names: tuple[TensorName, TensorName | None],
        kind: tuple[int, bool],
        settings: Mapping[str, Any],
    ) -> Op:
        left = self._not_constant(names)
        if left is not None:
            return Opaque(*left)
        (dims, transposed), groups, weight = kind, settings.get("groups", 1), self.tensor(names[0])
        if type(groups) is not int or weight.dim() != dims + 2 or not isinstance(source, fx.Node):
            return Opaque(detail=f"{names[0]} ({weight.dim()} axes)")
        out, into = weight.shape[0], weight.shape[1] * groups
        if transposed:
            out, into = weight.shape[1] * groups, weight.shape[0]
        bordered = dims > 0 and (transposed or _pads_with_zeros(settings, weight.shape[2:]))
        kernel = weight.shape[2:]
        geometry = None if 0 in kernel else read_geometry(settings, kernel, groups, transposed=transposed)
        return Linear(source, *names, out, into, dims, transposed, groups, bordered, geometry)

    def _norm_function(self, node: fx.Node, bound: Mapping[str, Any], kind: str) -> Op:
        name = _norm_name(node, bound)
        known = NORM_FUNCTIONS[kind]
        trains = bound[known] if isinstance(known, str) else known
        if kind == "instance_norm" and trains is True:
            return Opaque(detail=f"{name} (instance_norm without running statistics)")
        if bound.get("running_mean") is None or bound["running_var"] is None:
            return LeftNorm(name, Code.BATCH_STATISTICS)
        if trains is not False:
            return LeftNorm(name, Code.NORM_TRAINING)
        if gives_several(node) and not self._gives_first_only(node):
            return LeftNorm(name, Code.TUPLE_OUTPUT)
        parts = {part: bound[part] for part in ("running_mean", "running_var", "weight", "bias")}
        names = {part: self._source(value) for part, value in parts.items()}
        mean, var = names["running_mean"], names["running_var"]
        computed = any(names[part] is None and value is not None for part, value in parts.items())
        eps = bound.get("eps", bound.get("epsilon"))
        if computed or mean is None or var is None or not isinstance(eps, (int, float)):
            return LeftNorm(name, Code.NORM_COMPUTED)
        channels = self.tensor(mean).numel()
        return self._if_constant(
            Norm(bound["input"], name, mean, var, names["weight"], names["bias"], float(eps), channels)
        )

    def _gives_first_only(self, node: fx.Node) -> bool:
        """Whether of the values that `node` gives nobody reads any but the first."""
        return all(
            user.target is operator.getitem and (user.args[1] == 0 or not user.users) for user in node.users
        )

    def _if_constant(self, norm: Norm) -> Op:
        names = (norm.mean, norm.var, norm.weight, norm.bias)
        left = self._not_constant(names)
        if left is not None:
            code = Code.NORM_COMPUTED if left[0] is Code.OPERATOR_COMPUTED else left[0]
            return LeftNorm(norm.name, code, left[1])
        flat = all(self.tensor(name).dim() == 1 for name in names if name is not None)
        return norm if flat else LeftNorm(norm.name, Code.NORM_COMPUTED, str(norm.mean))

    def _not_constant(self, names: Iterable[TensorName | None]) -> tuple[Code, str] | None:
        """Why one of these cannot be folded, and which."""
        for name in names:
            tensor = None if name is None else self.tensor(name)
            if tensor is not None and storage(tensor) in self._written:
                return Code.STATE_MUTATED, str(name)
            if tensor is not None and not _is_plain(tensor):
                return Code.OPERATOR_COMPUTED, str(name)
        return None

    # ---- functions and methods ----

    def _call(self, node: fx.Node) -> Op:
        name = operator_name(node)
        if is_query(node) or node.target in (torch.is_tensor, torch.ops.aten._assert_tensor_metadata.default):
            return Query()
        if node in self.constants or not name or node.kwargs.get("out") is not None:
            return Opaque(detail=getattr(node.target, "__name__", str(node.target)))
        return read_arithmetic(node, name, self.constants) or self._operator(node, name)

    def _operator(self, node: fx.Node, name: str) -> Op:
        described = name if node.op == "call_function" else f".{node.target}()"
        bound = _bound(node)
        if bound is None:
            return Opaque(detail=described)
        if node.op == "call_function" and name in LINEAR_NAMES:
            return self._product(bound, name) if name in PRODUCTS else self._linear_function(bound, name)
        if node.op == "call_function" and name in NORM_FUNCTIONS:
            return self._norm_function(node, bound, name)
        if name == "getitem":
            found = self._item(bound)
        else:
            passes = not gives_several(node) or self._gives_first_only(node)
            found = self._passed(name, bound) if passes else None
        return found or Opaque(detail=described, like=self._like(name, bound))

    def _item(self, bound: Mapping[str, Any]) -> Op | None:
        source = bound["input"]
        op = self.read(source) if isinstance(source, fx.Node) else None
        if isinstance(op, Split):
            return part(Call(op.input, arguments(source).get), bound["index"])
        if op is not None and gives_several(source):
            # What gives a tuple is read as if it gave the first value alone; nobody reads the others.
            known = isinstance(op, (Norm, Transparent)) or (isinstance(op, Opaque) and bool(op.like))
            return Within(source, is_identity=True) if known and self._gives_first_only(source) else None
        return self._passed("getitem", bound)

    def _passed(self, name: str, bound: Mapping[str, Any]) -> Op | None:
        first = next(iter(bound.values()), None)
        if name in SPLITS and isinstance(first, fx.Node):
            return Split(first)
        usable = isinstance(first, (fx.Node, tuple, list))
        found = TRANSPARENT[name](Call(first, bound.get)) if name in TRANSPARENT and usable else None
        sources = () if found is None else found.inputs
        fits = found is not None and all(isinstance(source, fx.Node) for source in sources)
        return found if fits else None

    def _like(self, name: str, bound: Mapping[str, Any]) -> tuple[fx.Node, ...]:
        operands = [value for value in bound.values() if isinstance(value, fx.Node)]
        if name in LIKE_ALL:
            return tuple(operands)
        return tuple(operands[:1]) if name in LIKE_INPUT else ()


def _bound(node: fx.Node) -> dict[str, Any] | None:
    """The arguments of a call by name; None if it fits no signature that is known."""
    if node.target is getattr or getattr(node.target, "__module__", "") == "_operator":
        second = "index" if operator_name(node) == "getitem" else "other"
        return dict(zip(("input", second), node.args, strict=False))
    try:
        return arguments(node)
    except TypeError:
        return None


def _pads_with_zeros(settings: Mapping[str, Any], kernel: Sequence[int]) -> bool:
    """Whether a convolution sees zeros beyond the border. Code that gives no fixed padding may."""
    padding = settings["padding"]
    if settings.get("padding_mode", "zeros") != "zeros" or padding == "valid":
        return False
    if padding == "same":
        return any(size != 1 for size in kernel)
    widths = padding if isinstance(padding, (tuple, list)) else (padding,)
    return any(type(width) is not int or width != 0 for width in widths)


def norms_inside(module: nn.Module) -> list[str]:
    """Qualified names, relative to `module`, of the norms below it: modules, calls in graphs and in code."""
    found = []
    for path, child in module.named_modules():
        if is_norm(child):
            found += [path] if path else []
        elif isinstance(child, fx.GraphModule):
            reader = Reader(child, child.graph)
            calls = [reader.read(node) for node in child.graph.nodes if node.op == "call_function"]
            found += [joined(path, op.name) for op in calls if isinstance(op, Norm | LeftNorm)]
        elif code_calls_norm(child) or has_statistics(child):
            found.append(path)
    return found


def _is_plain(tensor: Tensor) -> bool:
    """Whether the values are just what is stored: no quantised, sharded or fake tensor, and real numbers."""
    return is_plain(tensor) and tensor.is_floating_point() and tensor.layout is torch.strided


def _norm_name(node: fx.Node, bound: Mapping[str, Any]) -> str:
    owner, _, leaf = (attribute_name(bound.get("running_mean")) or "").rpartition(".")
    return owner if leaf == "running_mean" and owner else node.name
