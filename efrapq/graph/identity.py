"""Identity nodes of the main graph, which hand a value on under another name."""

from __future__ import annotations

import onnx_ir as ir

__all__ = ["drop_identities"]


def drop_identities(graph: ir.Graph) -> None:
    """Let what reads an Identity's output read its input.

    An output of the graph keeps its name: the node that makes the value takes it over, unless the value has a name to
    keep itself, as an input, an initializer or another output. Subgraphs stay as they are: what they give may be a
    value from outside, which only an Identity hands on.
    """
    for node in list(graph):
        source = node.inputs[0] if node.op_type == "Identity" and node.domain in ("", "ai.onnx") else None
        if source is None:
            continue
        output = node.outputs[0]
        if output.is_graph_output():
            if source.producer() is None or source.is_graph_output():
                continue
            source.name, output.name = output.name, None
        if not source.is_graph_input():
            source.shape = _known(source.shape, output.shape)
            source.type = source.type or output.type
        ir.convenience.replace_all_uses_with(output, source, replace_graph_outputs=True)
        graph.remove(node, safe=True)


def _known(shape: ir.Shape | None, other: ir.Shape | None) -> ir.Shape | None:
    """What two records of one shape say together."""
    if shape is None or other is None or len(shape) != len(other):
        return other if shape is None else shape
    return ir.Shape([b if isinstance(b, int) else a for a, b in zip(shape, other, strict=True)])
