"""The drawing of two graphs in DOT, the language of Graphviz."""

from __future__ import annotations

from collections.abc import Iterator

from fxfuse.drawing import Drawing, State
from fxfuse.visible import one_line

_STYLES: dict[State, str] = {
    "same": "",
    "gone": ', color="#a4161a", fillcolor="#fdeaea", style="filled,dashed"',
    "folded": ', color="#1a6e33", fillcolor="#e6f6ea", style=filled',
    "left": ', color="#7a4b00", fillcolor="#fff4d6", style=filled',
    "new": ', color="#0b57b0", fillcolor="#e8f0fe", style=filled',
}


def dot(drawing: Drawing) -> str:
    """A digraph with a cluster for each of the graphs; node ``before_7`` and ``after_7`` are in row 7."""
    lines = ["digraph fxfuse {", "  rankdir=TB", '  node [shape=box, fontname="Helvetica", fontsize=10]']
    for side in ("before", "after"):
        lines += [f"  subgraph cluster_{side} {{", f'    label="{side}"', *_cluster(drawing, side), "  }"]
    return "\n".join([*lines, "}", ""])


def _cluster(drawing: Drawing, side: str) -> Iterator[str]:
    for number, row in enumerate(drawing.rows):
        node = row.before if side == "before" else row.after
        if node is not None:
            label = "\\n".join(map(_escaped, (node.operator, node.name, row.shape)))
            yield f'    {side}_{number} [label="{label}"{_STYLES[row.state]}]'
            yield from (f"    {side}_{source} -> {side}_{number}" for source in node.inputs)


def _escaped(text: str) -> str:
    return one_line(text).replace("\\", "\\\\").replace('"', '\\"')
