"""Runs of forward in which nothing happens that a graph for one kind of inputs cannot hold."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch._ops import OpOverload
from torch.overrides import TorchFunctionMode
from torch.utils import _pytree as pytree
from torch.utils._python_dispatch import TorchDispatchMode

from fxfuse.errors import UnsupportedError
from fxfuse.guards import patched
from fxfuse.tree import storage


class PureOperators(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Refuses operators, before they are run, that a graph for one kind of inputs cannot hold.

    Attributes:
        kept: the memory of inputs and of what the module holds.
        is_static: whether what runs depends on no inputs.
        writes: whether anything was written to since it was set.
    """

    supports_higher_order_operators = True

    def __init__(self, kept: set[int]) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.kept = kept
        self.is_static = True
        self.writes = False

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        given = kwargs or {}
        if not isinstance(func, OpOverload):
            raise UnsupportedError("forward calls a graph inside of it")
        if not self.is_static:
            self._check_reads(func, args)
        written = _written(func, args, given)
        self.writes |= bool(written)
        if any(storage(tensor) in self.kept for tensor in written):
            raise UnsupportedError("forward writes to its inputs, or to what the module holds")
        result = func(*args, **given)
        if not self.is_static and not all(map(_is_strided, pytree.tree_leaves(result))):
            raise UnsupportedError("sizes of sparse or nested tensors depend on numbers")
        return result

    def _check_reads(self, func: OpOverload, args: Any) -> None:
        """Raises an UnsupportedError if it reads what the inputs of another call may have otherwise."""
        name = func._schema.name
        if _tells_numbers(func, args):
            raise UnsupportedError("forward reads numbers of its inputs")
        if func.namespace not in _TAGGED and name not in _STATIC:
            raise UnsupportedError(f"sizes of {name} may depend on numbers")
        if name.startswith("aten::as_strided") and storage(args[0]) in self.kept:
            raise UnsupportedError("what forward reads depends on how its inputs lie in memory")


def _is_strided(leaf: Any) -> bool:
    """Whether it is a tensor of one block of memory, or none."""
    return not isinstance(leaf, Tensor) or (leaf.layout is torch.strided and not leaf.is_nested)


class PureFunctions(TorchFunctionMode):
    """Refuses what gives the numbers of tensors away without an operator, unless they depend on no inputs."""

    def __init__(self, operators: PureOperators) -> None:
        super().__init__()
        self.operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if not self.operators.is_static and _gives_away(func, args, kwargs or {}):
            raise UnsupportedError("forward reads numbers of its inputs past all operators")
        return func(*args, **(kwargs or {}))


@contextmanager
def no_padding_left_out() -> Iterator[None]:
    """Refuses encoders that leave out padding: they do not where a mode or a trace is on."""
    original = vars(nn.TransformerEncoder)["forward"]

    def forward(encoder: nn.TransformerEncoder, *args: Any, **kwargs: Any) -> Any:
        mask = kwargs.get("src_key_padding_mask", args[2] if len(args) > 2 else None)
        if mask is not None and encoder.use_nested_tensor:
            raise UnsupportedError("an encoder leaves out padding, but not where it is traced")
        return original(encoder, *args, **kwargs)

    with patched(nn.TransformerEncoder, "forward", forward):
        yield


_GIVEN_AWAY = {
    *("numpy", "tolist", "__array__", "__dlpack__", "data_ptr", "storage", "untyped_storage"),
    *("apply_", "map_", "map2_", "__deepcopy__", "__reduce_ex__", "__repr__", "__format__"),
    # Constructors such as torch.Tensor call these where no mode for operators sees it.
    *("__float__", "__int__", "__index__", "__bool__", "__complex__", "item"),
}
# These read the numbers of tensors among their arguments, from that place on.
_READ = {"tensor": 0, "as_tensor": 0, "asarray": 0, "new_tensor": 1, "new": 1, "tensor_split": 1}


def _gives_away(func: Any, args: Any, kwargs: Any) -> bool:
    """Whether it gives numbers of tensors away without an operator that a mode or a tracer sees."""
    name = getattr(func, "__name__", "")
    read = pytree.tree_leaves((args[_READ[name] :], kwargs)) if name in _READ else []
    if any(isinstance(leaf, Tensor) for leaf in read):
        return True
    return bool(name in _GIVEN_AWAY or func == Tensor.data.__get__)  # type: ignore[attr-defined]


def _written(func: OpOverload, args: Any, kwargs: Any) -> list[Tensor]:
    """The tensors that an operator writes to."""
    arguments = func._schema.arguments
    taken = {argument.name: value for argument, value in zip(arguments, args, strict=False)} | kwargs
    written = [
        taken.get(argument.name)
        for argument in arguments
        if argument.alias_info is not None and argument.alias_info.is_write
    ]
    if taken.get("training") or "update_stats" in func._schema.name:  # norms do not say so
        written += [taken.get("running_mean"), taken.get("running_var")]
    return [leaf for leaf in pytree.tree_leaves(written) if isinstance(leaf, Tensor)]


def _tells_numbers(func: Any, args: Any) -> bool:
    """Whether it gives numbers of tensors to Python, or tensors of sizes that depend on numbers."""
    if func is torch.ops.aten.index.Tensor:  # of indices sizes do not depend, but of masks
        return any(each is not None and each.dtype in (torch.bool, torch.uint8) for each in args[1])
    if {torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape} & set(func.tags):
        return True
    if func is torch.ops.aten._pack_padded_sequence.default:  # does not say so
        return True
    name = func._schema.name.partition("::")[2]
    plain = any(isinstance(each.type, _NUMBERS) for each in func._schema.returns)
    return plain and not name.startswith("sym_") and name != "is_same_size"


# Libraries whose operators say what their sizes depend on, and operators of others that depend on no numbers.
_TAGGED = {"aten", "prim", "prims", "quantized", "quantized_decomposed", "mkldnn"}
_STATIC = {f"torchvision::{name}" for name in ("roi_align", "roi_pool", "ps_roi_align", "deform_conv2d")}
_NUMBERS = (torch.BoolType, torch.IntType, torch.FloatType, torch.NumberType)
