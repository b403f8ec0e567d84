"""A graph for inputs of one kind: from tensors to tensors, each size a number, no constant computed twice."""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, fx
from torch.utils import _pytree as pytree

from fxfuse.places import place_of

# The entry of a node's meta that tells whether it was seen to write to anything.
WRITES = "fxfuse_writes"

Program = Callable[[Sequence[Tensor]], Sequence[Tensor]]
"""What an engine makes of a graph: a function from its tensors to its results."""


@dataclass(frozen=True)
class Output:
    """A place for a result of the graph."""

    number: int


@dataclass(frozen=True)
class Specialised:
    """A graph for inputs of one kind.

    Attributes:
        module: takes the tensors among the leaves of the inputs, gives a tuple of the tensors among those of
            the outputs. Nodes have their values, without numbers, as ``meta["val"]``.
        places: where these tensors are among the leaves of the inputs.
        results: tensors like those that `module` gives, on the meta device.
        outputs: the leaves of the outputs, with places for these tensors; others do not depend on the inputs.
        structure: that of the outputs.
    """

    module: fx.GraphModule
    places: tuple[int, ...]
    results: tuple[Tensor, ...]
    outputs: tuple[Any, ...]
    structure: pytree.TreeSpec

    def tensors(self, leaves: Sequence[Any]) -> list[Tensor]:
        """What `module` takes."""
        return [leaves[place] for place in self.places]

    def result(self, tensors: Sequence[Tensor]) -> Any:
        """What forward gives, from what `module` does."""
        leaves = [_leaf(each, tensors) for each in self.outputs]
        return pytree.tree_unflatten(leaves, self.structure)

    def run(self, program: Program, leaves: Sequence[Any]) -> Any:
        """What forward gives for inputs with these leaves, by a program for `module`."""
        return self.result(program(self.tensors(leaves)))


def flattened(outputs: Any) -> tuple[list[Any], pytree.TreeSpec]:
    """The leaves of what forward gives, and their structure.

    A ``torch.Size`` is a leaf: as a part of the structure it would come back as a tuple.
    """
    return pytree.tree_flatten(outputs, is_leaf=lambda value: isinstance(value, torch.Size))


def _leaf(output: Any, tensors: Sequence[Tensor]) -> Any:
    if isinstance(output, Output):
        return tensors[output.number]
    # The caller may write to it.
    return output.clone() if isinstance(output, Tensor) else copy.deepcopy(output)


Step = tuple[Any, ...]
"""A function of a tensor, and its further arguments."""


def surround(module: fx.GraphModule, before: Step, after: Sequence[Step]) -> None:
    """Does something to each input of a graph, and to each of its results, in place."""
    graph = module.graph
    for node in graph.find_nodes(op="placeholder"):
        with graph.inserting_before(node.next):
            made = graph.call_function(before[0], (node, *before[1:]))
        made.meta = {**node.meta}
        node.replace_all_uses_with(made, delete_user_cb=lambda user, made=made: user is not made)
    (output,) = graph.find_nodes(op="output")
    results: Any = output.args[0]
    with graph.inserting_before(output):
        made_of = zip(results, after, strict=True)
        output.args = (tuple(graph.call_function(step[0], (each, *step[1:])) for each, step in made_of),)
    module.recompile()


def at(node: fx.Node) -> str:
    """Where a node comes from, for a message."""
    return f"at {place_of(node) or node.name}"
