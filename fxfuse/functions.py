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


def compared_with_none(function: FunctionType) -> set[str]:
    """The variables of which the code asks ``is None`` or ``is not None``."""
    found: set[str] = set()
    for code in nested(function.__code__):
        steps = _steps(code)
        for number, step in enumerate(steps):
            compared = steps[number - 1 : number] if "NONE" in step.opname else []  # a jump
            if step.opname == "IS_OP":
                compared = steps[number - 2 : number]
                compared = compared if any(_is_none(each) for each in compared) else []
            found |= {name for each in compared for name in _variables(each)}
    return found


def _steps(code: CodeType) -> list[dis.Instruction]:
    return [*dis.get_instructions(code)]


def _is_none(step: dis.Instruction) -> bool:
    return step.opname == "LOAD_CONST" and step.argval is None


def _variables(step: dis.Instruction) -> tuple[str, ...]:
    """The variables that an instruction loads: several, in newer versions of Python."""
    if not step.opname.startswith(("LOAD_FAST", "LOAD_DEREF")):
        return ()
    return step.argval if isinstance(step.argval, tuple) else (step.argval,)
