"""What can be told of a Python function from its code."""

from __future__ import annotations

import ast
import dis
import functools
import inspect
from itertools import chain
from types import CodeType, FunctionType


def nested(code: CodeType) -> list[CodeType]:
    """`code` and the code of what is defined in it."""
    inner = (each for each in code.co_consts if isinstance(each, CodeType))
    return [code, *chain.from_iterable(map(nested, inner))]


@functools.lru_cache(maxsize=64)
def _compiled(source: str) -> tuple[ast.Module, frozenset[CodeType]]:
    tree = ast.parse(source)
    return tree, frozenset(nested(compile(tree, "", "exec", dont_inherit=True)))


def definition(code: CodeType) -> ast.FunctionDef | None:
    """The definition that `code` was compiled from; None if its file is missing, or is another by now."""
    try:
        tree, codes = _compiled("".join(inspect.findsource(code)[0]))
    except (OSError, SyntaxError, ValueError):
        return None
    for node in ast.walk(tree) if code in codes else ():
        if isinstance(node, ast.FunctionDef) and node.name == code.co_name:
            lines = {node.lineno, *(decorator.lineno for decorator in node.decorator_list)}
            if min(lines) == code.co_firstlineno:
                return node
    return None


def reads(function: FunctionType, variable: str) -> bool:
    """Whether the code of `function` uses its variable of that name."""
    return any(variable in _variables(each) for code in nested(function.__code__) for each in steps_of(code))


@functools.lru_cache(maxsize=4096)
def compared_by_identity(code: CodeType) -> frozenset[str]:
    """The variables that code compares by ``is``: with None, a bool, a member of an enumeration."""
    found: set[str] = set()
    steps = steps_of(code)
    for number, step in enumerate(steps):
        reach = 4 if step.opname == "IS_OP" else 0
        if "NONE" in step.opname:  # a jump
            reach = 4 if steps[number - 1].opname.startswith("BINARY_") else 1  # x[0] is None, x is None
        found |= {name for each in steps[max(0, number - reach) : number] for name in _variables(each)}
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def compared_with_values(code: CodeType) -> frozenset[str]:
    """The variables that code compares with anything but None, or looks up in something."""
    found: set[str] = set()
    steps = steps_of(code)
    for number, step in enumerate(steps):
        before = steps[max(0, number - 4) : number]
        with_none = any(each.opname == "LOAD_CONST" and each.argval is None for each in before[-2:])
        if step.opname in ("COMPARE_OP", "CONTAINS_OP") or (step.opname == "IS_OP" and not with_none):
            found |= {name for each in before for name in _variables(each)}
    return frozenset(found)


@functools.lru_cache(maxsize=4096)
def steps_of(code: CodeType) -> list[dis.Instruction]:
    """The instructions of `code`."""
    return [*dis.get_instructions(code)]


def _variables(step: dis.Instruction) -> tuple[str, ...]:
    """The variables that an instruction loads or, before it compares, stores; newer versions join several."""
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST", "STORE_DEREF")):
        return ()
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)
