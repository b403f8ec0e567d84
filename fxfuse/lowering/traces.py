"""Traces of torch's that may have missed something."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import fx

from fxfuse.lowering.specialised import UnsupportedError

_TracerWarning = torch.jit._trace.TracerWarning
_OWN = {"torch", "_operator", "math", "builtins"}


@contextmanager
def followed(module: fx.GraphModule) -> Iterator[None]:
    """Holds a trace of `module` by TorchScript, whose warnings nobody is to see.

    Raises:
        UnsupportedError: code that is not torch's own reads numbers, and the trace holds one case only.
    """
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always")
        yield
    missed = [str(each.message) for each in noted if issubclass(each.category, _TracerWarning)]
    # In torch's own code it is sizes that are read.
    if missed and any(_is_foreign(node, module) for node in module.graph.nodes):
        raise UnsupportedError(f"a trace cannot follow forward: {missed[0].partition('.')[0]}")


def _is_foreign(node: fx.Node, module: fx.GraphModule) -> bool:
    """Whether it calls code that is not torch's own."""
    if node.op == "call_module":
        code = type(module.get_submodule(str(node.target))).__module__
    else:
        code = getattr(node.target, "__module__", None) or "torch"
    return node.op in ("call_module", "call_function") and code.partition(".")[0] not in _OWN
