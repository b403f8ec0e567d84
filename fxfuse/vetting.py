"""What an exported program says in its JSON, before torch believes it.

torch makes Python code out of some of these texts. Symbolic sizes and guards are evaluated. The names of
inputs and weights stand in a generated ``forward``. Operators are looked up by name: ``torch.os.system`` is
found. The structure of the inputs may name modules to import. So each text has to look like what torch.export
writes in its place, and any other text has no quotation marks, out of which it could break.

In torch/_export/serde/serialize.py: ``_parse_sym_expr``, ``deserialize_operator``. In
torch/export/_unlift.py: ``_convert_guards_code_to_fn``. In torch/utils/_pytree.py:
``enum_object_hook``, ``_defaultdict_deserialize``.
"""

from __future__ import annotations

import ast
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping, Set
from typing import Any

import torch
from torch._ops import HigherOrderOperator, OpOverload

# What symbolic sizes are made of, and what guards read of tensors besides.
_SYMBOLIC = {
    "Abs", "Add", "And", "CeilDiv", "CeilToInt", "CleanDiv", "Eq", "Equality", "FloatPow",
    "FloatTrueDiv", "Float", "FloorDiv", "FloorToInt", "Ge", "GreaterThan", "Gt", "Identity",
    "IntTrueDiv", "Integer", "IsNonOverlappingAndDenseIndicator", "LShift", "Le", "LessThan", "Lt",
    "Max", "Min", "Mod", "ModularIndexing", "Mul", "Ne", "Not", "Or", "Piecewise", "Pow",
    "PowByNatural", "PythonMod", "RShift", "Rational", "RoundDecimal", "RoundToInt",
    "StrictGreaterThan", "StrictLessThan", "Symbol", "ToFloat", "TruncToFloat", "TruncToInt",
    "Unequality", "Where", "ceiling", "floor",
}  # fmt: skip
_TENSOR = {
    "size", "stride", "storage_offset", "dim", "len", "max", "min", "isnan", "inf", "sym_float",
    "sym_max", "sym_min", "sym_not",
}  # fmt: skip
_CALCULATION = (
    ast.Expression | ast.Name | ast.Load | ast.Constant | ast.keyword | ast.Tuple | ast.Subscript
    | ast.Compare | ast.cmpop | ast.BinOp | ast.operator | ast.UnaryOp | ast.unaryop | ast.BoolOp
    | ast.boolop | ast.IfExp
)  # fmt: skip
_FUNCTION = re.compile(
    r"_operator\.(abs|add|and_|eq|floordiv|ge|getitem|gt|le|lshift|lt|mod|mul|ne|neg|not_|or_|pos|pow|rshift|sub"
    r"|truediv|xor)|math\.[a-z]\w*|torch\._?sym_\w+"
    r"|torch\._functorch\.predispatch\.(_(add|remove)_batch_dim|_vmap_(in|de)crement_nesting|lazy_load_decompositions)"
)
# Of the operators that take graphs or operators those that do nothing but run them.
_CONTROL = {
    "associative_scan", "auto_functionalized", "auto_functionalized_v2", "cond", "flex_attention",
    "hints_wrapper", "invoke_subgraph", "map_impl", "out_dtype", "scan", "strict_mode",
    "tag_activation_checkpoint", "while_loop", "with_effects", "wrap_activation_checkpoint",
    "wrap_with_autocast", "wrap_with_set_grad_enabled",
}  # fmt: skip
# Dicts with names of tensors, which may be any, for keys.
_NAMED = {
    "tensor_values", "sym_int_values", "sym_float_values", "sym_bool_values", "custom_obj_values",
    "as_string_to_argument", "config", "range_constraints",
}  # fmt: skip
# The keys of a dict of inputs, the type of a named tuple, or nothing.
_CONTEXT = re.compile(r"""null|[\w.]+|\[(("[\w.]*"|\d+)(, ("[\w.]*"|\d+))*)?\]""")
_EXPANDED = 2**28  # so many elements may share a place, as those of an expanded tensor do


class SuspectError(ValueError):
    """Something in a file that torch.export does not write; the message says what."""


def check_program(record: Any) -> None:
    """Raises SuspectError for the first text in the JSON of a program that torch.export does not write."""
    try:
        texts = [*_texts(record, "a name")]
    except RecursionError as error:
        raise SuspectError("its JSON is nested too deeply") from error
    for key, text in texts:
        if not _RULES.get(key, _is_plain)(text):
            raise SuspectError(f"it has the {key} {text[:200]!r}, which torch.export does not write")


def check_tensors(record: Any, sizes: Mapping[str, int]) -> None:
    """Raises SuspectError for the first tensor in a list that does not lie in the archive as plain numbers.

    Args:
        record: the list, as JSON.
        sizes: the entries in which tensors may lie, and how many bytes they have.
    """
    check_program(record)
    match record:
        case {"config": dict(tensors)}:
            for name, tensor in tensors.items():
                _check_tensor(name, tensor, sizes)
        case _:
            raise SuspectError("it does not list its tensors")


def _check_tensor(name: str, tensor: Any, sizes: Mapping[str, int]) -> None:
    match tensor:
        case {"path_name": str(place), "use_pickle": False, "tensor_meta": {"sizes": list(axes)}}:
            elements = math.prod(_size(name, axis) for axis in axes)
            available = sizes.get(place, 0)
            if elements > (max(available, _EXPANDED) if available else 0):
                raise SuspectError(f"its tensor {name!r} has {elements} elements in {available} bytes")
        case _:
            raise SuspectError(f"its tensor {name!r} is a pickled object")


def _size(name: str, axis: Any) -> int:
    match axis:
        case {"as_int": int(size)}:
            return size
    raise SuspectError(f"its tensor {name!r} has a size {axis!r}, and not a number")


def _texts(record: Any, key: str) -> Iterator[tuple[str, str]]:
    """All texts in `record`, each after the key under which it stands; keys are texts as well."""
    if isinstance(record, str):
        yield key, record
    elif isinstance(record, list):
        for value in record:
            yield from _texts(value, key)
    elif isinstance(record, dict):
        if key in _RULES:  # a text is wanted; what torch does with a dict in its place, nobody knows
            raise SuspectError(f"it has a dict as {key}, where torch.export writes a text")
        for name, value in record.items():
            yield "key", name
            yield from _texts(value, f"value in {key}" if key in _NAMED else name)


def _is_arithmetic(text: str, calls: Set[str], attributes: Set[str]) -> bool:
    """Whether to evaluate `text` is to calculate: it calls `calls` and reads `attributes`, nothing else."""
    try:
        nodes = [*ast.walk(ast.parse(text, mode="eval"))]
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return False
    return (
        "#" not in text and "\n" not in text and all(_calculates(node, calls, attributes) for node in nodes)
    )


def _calculates(node: ast.AST, calls: Set[str], attributes: Set[str]) -> bool:
    match node:
        case ast.Call(func=ast.Name(id=name) | ast.Attribute(attr=name)):
            return name in calls
        case ast.Attribute(attr=name):
            return name in attributes
        case ast.Constant(value=str(text)):  # sympy evaluates texts in expressions too
            return re.fullmatch(r"\w*|[\d.]+(e[+-]?\d+)?", text) is not None
    return isinstance(node, _CALCULATION)


def _is_operator(name: str) -> bool:
    """Whether `name` is arithmetic, or an operator of torch that touches no files."""
    if _FUNCTION.fullmatch(name):
        return True
    if not re.fullmatch(r"torch\.ops(\.\w+){2,3}", name):
        return False
    found: Any = torch.ops
    for part in name.split(".")[2:]:
        found = getattr(found, part, None)
    if isinstance(found, HigherOrderOperator):
        return found._name in _CONTROL
    return isinstance(found, OpOverload) and all(a.name != "filename" for a in found._schema.arguments)


def _is_structure(text: str) -> bool:
    """Whether `text` is a pytree that names nothing to import."""
    try:
        _, tree = json.loads(text)
        return _is_tree(tree)
    except (ValueError, TypeError, KeyError, RecursionError):
        return False


def _is_tree(tree: Any) -> bool:
    kind, context = (tree[name] or "null" for name in ("type", "context"))
    return (
        re.fullmatch(r"[\w.]+", kind) is not None
        and _CONTEXT.fullmatch(context) is not None
        and all(_is_tree(child) for child in tree["children_spec"])
    )


def _is_symbolic(text: str) -> bool:
    return _is_arithmetic(text, _SYMBOLIC, set())


def _is_guard(text: str) -> bool:
    return _is_arithmetic(text, _SYMBOLIC | _TENSOR, _TENSOR)


def _is_word(text: str) -> bool:
    return re.fullmatch(r"\w*", text) is not None


def _is_plain(text: str) -> bool:
    return re.fullmatch(r"""[^"'\\\x00-\x1f\x7f]*""", text) is not None


def _is_note(_: str) -> bool:
    return True


# By the key under which a text stands.
_RULES: dict[str, Callable[[str], bool]] = {
    **dict.fromkeys(("name", "as_name", "forward_arg_names"), _is_word),
    **dict.fromkeys(("target", "as_operator"), _is_operator),
    **dict.fromkeys(("in_spec", "out_spec"), _is_structure),
    **dict.fromkeys(
        ("stack_trace", "nn_module_stack", "torch_fn", "source_fn_stack", "custom", "from_node"), _is_note
    ),
    "expr_str": _is_symbolic,
    "guards_code": _is_guard,
}
