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
    return any(variable in _variables(each) for code in nested(function.__code__) for each in _steps(code))


@functools.lru_cache(maxsize=4096)
def compared_by_identity(code: CodeType) -> frozenset[str]:
    """The variables that code compares by ``is``: with None, a bool, a member of an enumeration."""
    found: set[str] = set()
    steps = _steps(code)
    for number, step in enumerate(steps):
        if "NONE" in step.opname:  # a jump
            found |= {*_variables(steps[number - 1])}
        elif step.opname == "IS_OP":
            found |= {name for each in steps[max(0, number - 4) : number] for name in _variables(each)}
    return frozenset(found)


def _steps(code: CodeType) -> list[dis.Instruction]:
    return [*dis.get_instructions(code)]


def _variables(step: dis.Instruction) -> tuple[str, ...]:
    """The variables that an instruction loads or, before it compares, stores; newer versions join several."""
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "STORE_FAST", "STORE_DEREF")):
        return ()
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)
