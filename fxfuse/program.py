"""``torch.export``: an exported program is folded in its own graph, and stays one.

Its inputs and outputs, their names, its dynamic shapes and its dialect are those of the source. Parameters
and buffers that nobody reads any more are gone from its signature and its state_dict.
"""

from __future__ import annotations

import copy
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

from fxfuse.leave import Leave
from fxfuse.lifting import Lifted, lift, lower
from fxfuse.ops import Reader
from fxfuse.plan import Change, Move, Plan
from fxfuse.planner import planned_guarded
from fxfuse.records import Report
from fxfuse.refusals import Code
from fxfuse.replica import replicated
from fxfuse.rewrite import gone, rewrite
from fxfuse.tree import attribute, storage

_WEIGHTS = (InputKind.PARAMETER, InputKind.BUFFER, InputKind.CONSTANT_TENSOR)
# The order in which a program has its inputs.
_ORDER = [InputKind.TOKEN, *_WEIGHTS, InputKind.CUSTOM_OBJ, InputKind.USER_INPUT]


def fold_program(program: ExportedProgram, leave: Leave) -> tuple[ExportedProgram, Report]:
    """The folded program, and what became of every norm of it.

    Args:
        program: in the ATen dialect, before or after ``run_decompositions``; it is not changed.
        leave: the norms that are to stay.
    """
    tensors = replicated({**program.state_dict, **program.constants})
    copied = lifted(program, tensors)
    captured = copied.capture
    reader = Reader(captured.root, captured.graph)
    regions = _regions(program, captured.graph)

    def forbid(plan: Plan, change: Change) -> Code | None:
        return leave(plan, change) or _crossing(regions, change)

    plan, solution = planned_guarded(captured, reader, {}, forbid=forbid)
    replaced = {old.name: node for old, node in gone(plan).items()}
    rewritten = rewrite(captured, plan, solution, reader)
    inputs = _Inputs(program, captured.graph)
    weights = {name: attribute(captured.root, name) for name in lower(copied, inputs.new).values()}
    folded = _program(program, captured.graph, inputs.specs, replaced, tensors | weights)
    name, constants, merged = type(program).__name__, rewritten.constants, rewritten.merged
    return folded, Report(name, rewritten.norms, plan.refusals, constants, merged, plan.apart)


def lifted(program: ExportedProgram, tensors: Mapping[str, Any]) -> Lifted:
    """A copy of the graph of `program`, in which the weights that no run changes are attributes.

    Args:
        program: the program.
        tensors: its parameters, buffers and constants by their names.
    """
    return lift(program.graph_module, _foldable(program.graph_signature, tensors), tensors)


def _regions(program: ExportedProgram, graph: fx.Graph) -> dict[fx.Node, frozenset[str]]:
    """For each node the modules in which it is of those whose calls are preserved, to be exchanged."""
    preserved = {entry.fqn for entry in program.module_call_graph if entry.signature and entry.fqn}
    if not preserved:
        return {}
    stacks = {node: node.meta.get("nn_module_stack", {}).values() for node in graph.nodes}
    return {node: frozenset(name for name, _ in stack) & preserved for node, stack in stacks.items()}


def _crossing(regions: Mapping[fx.Node, frozenset[str]], change: Change) -> Code | None:
    """A map that leaves a module which may be exchanged would be lost with it, or come on top of another."""
    nodes = {site.node for site in change.sites} if isinstance(change, Move) else {change.host, *change.gone}
    return Code.PRESERVED if len({regions.get(node) for node in {change.node, *nodes}}) > 1 else None


def _foldable(signature: ExportGraphSignature, tensors: Mapping[str, Any]) -> dict[str, int]:
    """The places among the inputs of the weights that no run of the program changes, by their names."""
    mutations = (OutputKind.BUFFER_MUTATION, OutputKind.PARAMETER_MUTATION)
    changed = [tensors.get(str(spec.target)) for spec in signature.output_specs if spec.kind in mutations]
    written = {storage(tensor) for tensor in changed}
    weights = {
        str(spec.target): place for place, spec in enumerate(signature.input_specs) if spec.kind in _WEIGHTS
    }
    return {
        name: place
        for name, place in weights.items()
        if isinstance(tensors.get(name), Tensor) and storage(tensors[name]) not in written
    }


class _Inputs:
    """The inputs of a program's graph, while it is edited."""

    def __init__(self, program: ExportedProgram, graph: fx.Graph) -> None:
        self._graph = graph
        placeholders = graph.find_nodes(op="placeholder")
        self._mode = detect_fake_mode([node.meta.get("val") for node in placeholders])
        specs = copy.deepcopy(program.graph_signature.input_specs)
        self._specs = dict(zip(placeholders, specs, strict=True))

    @property
    def specs(self) -> list[InputSpec]:
        """The specifications of the inputs that there are, in their order."""
        return [self._specs[node] for node in self._graph.find_nodes(op="placeholder")]

    def new(self, name: str, value: Tensor) -> fx.Node:
        """An input for a new weight, behind the others of its kind."""
        kind = InputKind.PARAMETER if isinstance(value, Parameter) else InputKind.BUFFER
        later = _ORDER[_ORDER.index(kind) + 1 :]
        behind = next(n for n in self._graph.nodes if n.op != "placeholder" or self._specs[n].kind in later)
        with self._graph.inserting_before(behind):
            node = self._graph.placeholder(f"{kind.name[0].lower()}_{name.replace('.', '_')}")
        node.target = node.name
        node.meta["val"] = value if self._mode is None else self._mode.from_tensor(value, static_shapes=True)
        persistent = None if kind is InputKind.PARAMETER else True
        self._specs[node] = InputSpec(kind, TensorArgument(node.name), name, persistent)
        return node


def _program(
    source: ExportedProgram,
    graph: fx.Graph,
    specs: list[InputSpec],
    replaced: Mapping[str, fx.Node],
    tensors: Mapping[str, Any],
) -> ExportedProgram:
    """The program of an edited graph.

    Args:
        source: the program that it comes from.
        graph: the graph.
        specs: the specifications of its inputs.
        replaced: the names of nodes that are gone, and the nodes that are read instead.
        tensors: parameters, buffers and constants by their names; some may be others than in the source.
    """
    outputs = copy.deepcopy(source.graph_signature.output_specs)  # passes of torch rename in them
    renamed: dict[str, str] = {}
    for spec in outputs:
        if spec.arg.name in replaced:  # an output keeps its name
            node = replaced[spec.arg.name]
            renamed[node.name] = spec.arg.name
            node.name = spec.arg.name
    renamed |= {old: node.name for old, node in replaced.items()}
    weights = {spec.target for spec in source.graph_signature.input_specs if spec.kind in _WEIGHTS}
    state, constants = (
        {name: tensors[name] for name in home if name not in weights}
        for home in (source.state_dict, source.constants)
    )
    for spec in specs:
        if spec.kind in _WEIGHTS:
            value = tensors[str(spec.target)]
            is_parameter = spec.kind is InputKind.PARAMETER
            home = state if is_parameter or spec.persistent else constants
            # A bias that was folded is a Parameter, also in the place of a buffer.
            home[str(spec.target)] = value if is_parameter else value.detach()
    return ExportedProgram(
        source.graph_module,
        graph,
        ExportGraphSignature(specs, outputs),
        state,
        dict(source.range_constraints),
        [_with_names(entry, renamed) for entry in source.module_call_graph],
        source.example_inputs,
        constants,
        verifiers=source.verifiers,
    )


def _with_names(entry: ModuleCallEntry, names: Mapping[str, str]) -> ModuleCallEntry:
    """The inputs and outputs of a module that is to be found again (torch.export.unflatten)."""
    if entry.signature is None:
        return entry
    inputs, outputs = (
        [replace(value, name=names.get(value.name, value.name)) for value in values]
        for values in (entry.signature.inputs, entry.signature.outputs)
    )
    return replace(entry, signature=replace(entry.signature, inputs=inputs, outputs=outputs))
