"""``torch.export``: an exported program is folded in its own graph, and stays one.

Its inputs and outputs, their names, its dynamic shapes and its dialect are those of the source. Parameters
and buffers that nobody reads any more are gone from its signature and its state_dict.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from torch import Tensor, fx
from torch._guards import detect_fake_mode
from torch.export import ExportedProgram
from torch.export.exported_program import ModuleCallEntry
from torch.export.graph_signature import (
    ExportGraphSignature,
    InputKind,
    InputSpec,
    OutputKind,
    TensorArgument,
)
from torch.nn import Parameter

from fxfuse.capture import reshaped_in_place
from fxfuse.lifting import lift, lower
from fxfuse.ops import Reader
from fxfuse.planner import nothing_planned, planned
from fxfuse.records import Report
from fxfuse.refusals import Code
from fxfuse.rewrite import gone, rewrite
from fxfuse.shapes import GraphShapes
from fxfuse.solve import Solution
from fxfuse.tree import attribute, storage

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# The order in which a program has its inputs.
_ORDER = [InputKind.TOKEN, *_WEIGHTS, InputKind.CUSTOM_OBJ, InputKind.USER_INPUT]


def fold_program(program: ExportedProgram) -> tuple[ExportedProgram, Report]:
    """The folded program, and what became of every norm of it.

    Args:
        program: in the ATen dialect, before or after ``run_decompositions``; it is not changed.
    """
    tensors = {**program.state_dict, **program.constants}
    lifted = lift(program.graph_module, _foldable(program.graph_signature, tensors), tensors)
    graph = lifted.capture.graph
    reader = Reader(lifted.capture.root, graph)
    shapes = GraphShapes(graph, reader, {}, guarded=True)
    name = type(program).__name__
    if reshaped_in_place(graph) is None:
        plan, solution = planned(graph, reader, shapes)
    else:
        plan, solution = nothing_planned(graph, reader, shapes, Code.RESHAPED), Solution()
    names = {node.name: _reached(node, gone(plan)) for node in gone(plan)}
    norms, constants = rewrite(lifted.capture, plan, solution, reader)
    inputs = _Inputs(program, graph)
    weights = {name: attribute(lifted.capture.root, name) for name in lower(lifted, inputs.new).values()}
    folded = _program(program, graph, inputs.specs, names, tensors | weights)
    return folded, Report(name, tuple(norms), plan.refusals, tuple(constants))


def _foldable(signature: ExportGraphSignature, tensors: Mapping[str, Any]) -> dict[int, str]:
    """The places and names of the weights that no run of the program changes."""
    mutations = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
    changed = [tensors.get(str(spec.target)) for spec in signature.output_specs if spec.kind in mutations]
    written = {storage(tensor) for tensor in changed}
    weights = {
        place: str(spec.target) for place, spec in enumerate(signature.input_specs) if spec.kind in _WEIGHTS
    }
    return {
        place: name
        for place, name in weights.items()
        if isinstance(tensors.get(name), Tensor) and storage(tensors[name]) not in written
    }


def _reached(node: fx.Node, inputs: Mapping[fx.Node, fx.Node]) -> fx.Node:
    return _reached(inputs[node], inputs) if node in inputs else node


class _Inputs:
    """The inputs of a program's graph, while it is edited."""

    def __init__(self, program: ExportedProgram, graph: fx.Graph) -> None:
        self._graph = graph
        placeholders = graph.find_nodes(op="placeholder")
        self._mode = detect_fake_mode([node.meta.get("val") for node in placeholders])
        self._specs = dict(zip(placeholders, program.graph_signature.input_specs, strict=True))

    @property
    def specs(self) -> list[InputSpec]:
        """The specifications of the inputs that there are, in their order."""
        return [self._specs[node] for node in self._graph.find_nodes(op="placeholder")]

    def new(self, name: str, value: Tensor) -> fx.Node:
        """An input for a new weight, behind the others of its kind."""
        kind = InputKind.PARAMETER if isinstance(value, Parameter) else InputKind.BUFFER
        later = _ORDER[_ORDER.index(kind) + 1 :]
        behind = next(node for node in self._graph.nodes if self._kind(node) in later)
        with self._graph.inserting_before(behind):
            node = self._graph.placeholder(f"{kind.name[0].lower()}_{name.replace('.', '_')}")
        node.target = node.name
        node.meta["val"] = value if self._mode is None else self._mode.from_tensor(value, static_shapes=True)
        persistent = None if kind is InputKind.PARAMETER else True
        self._specs[node] = InputSpec(kind, TensorArgument(node.name), name, persistent)
        return node

    def _kind(self, node: fx.Node) -> InputKind:
        return self._specs[node].kind if node in self._specs else InputKind.USER_INPUT


def _program(
    source: ExportedProgram,
    graph: fx.Graph,
    specs: list[InputSpec],
    replaced: Mapping[str, fx.Node],
    values: Mapping[str, Any],
) -> ExportedProgram:
    """The program of an edited graph.

    Args:
        source: the program that it comes from.
        graph: the graph.
        specs: the specifications of its inputs.
        replaced: the names of nodes that are gone, and the nodes that are read instead.
        values: parameters, buffers and constants by their names; some may be others than in the source.
    """
    outputs = source.graph_signature.output_specs
    for spec in outputs:
        if spec.arg.name in replaced:
            replaced[spec.arg.name].name = spec.arg.name  # an output keeps its name
    names = {old: node.name for old, node in replaced.items()}
    old = {spec.target for spec in source.graph_signature.input_specs if spec.kind in _WEIGHTS}
    state, constants = (
        {name: value for name, value in home.items() if name not in old}
        for home in (source.state_dict, source.constants)
    )
    for spec in specs:
        if spec.kind in _WEIGHTS:
            value = values[str(spec.target)]
            is_parameter = spec.kind is InputKind.PARAMETER
            home = state if is_parameter or spec.persistent else constants
            home[str(spec.target)] = value if is_parameter else value.detach()
    return ExportedProgram(
        source.graph_module,
        graph,
        ExportGraphSignature(list(specs), [replace(spec) for spec in outputs]),
        state,
        dict(source.range_constraints),
        [_renamed(entry, names) for entry in source.module_call_graph],
        source.example_inputs,
        constants,
        verifiers=source.verifiers,
    )


def _renamed(entry: ModuleCallEntry, names: Mapping[str, str]) -> ModuleCallEntry:
    """The inputs and outputs of a module that is to be found again (torch.export.unflatten)."""
    if entry.signature is None:
        return entry
    inputs, outputs = (
        [replace(value, name=names.get(value.name, value.name)) for value in values]
        for values in (entry.signature.inputs, entry.signature.outputs)
    )
    return replace(entry, signature=replace(entry.signature, inputs=inputs, outputs=outputs))
