"""Nodes that the table lacks: one-node models in ONNX Runtime, on the CPU and without gradient.

A node with subgraphs (If, Loop, Scan) may read values from outside of them, which are not among its inputs: `reads`
lists both, and whoever runs a node gives it values for both.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from efrapq.graph.ops_call import element_type

__all__ = ["OrtFallback", "reads"]

# What a session was made for: the element type and declared shape of each input (None where one is left out).
_Kind = tuple[torch.dtype, tuple[int | None, ...]]
_Key = tuple[ir.Node, tuple[_Kind | None, ...]]


class OrtFallback:
    """Runs single nodes through ONNX Runtime; a session is made for each node and kind of inputs, and kept."""

    def __init__(self, opset_imports: Mapping[str, int]) -> None:
        self._opset_imports = dict(opset_imports)
        self._sessions: dict[_Key, Any] = {}

    def run(self, node: ir.Node, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The node's outputs, on the device of the inputs; an empty tensor for one that is left out.

        inputs: a value for each of `reads(node)`. Raises what ONNX Runtime raises (its errors derive from Exception
        only), and ValueError for tensors that it cannot be given.
        """
        if len(inputs) != (wanted := len(reads(node))):
            raise ValueError(f"it reads {wanted} values and is given {len(inputs)}")
        given = {name: t for name, t in zip(_names(node), inputs, strict=True) if t is not None}
        key = (node, tuple(None if t is None else (t.dtype, _declared_shape(t)) for t in inputs))
        if key not in self._sessions:
            self._sessions[key] = self._session(node, given)
        feeds = {name: t.detach().cpu().numpy() for name, t in given.items()}
        results = iter(self._sessions[key].run(None, feeds))
        device = next((t.device for t in given.values() if t.device.type != "cpu"), torch.device("cpu"))
        placed = []
        for output in node.outputs:
            # The copy is needed: ONNX Runtime may hand out memory that is not writable.
            tensor = torch.from_numpy(next(results).copy()) if output.name else torch.empty(0)
            placed.append(tensor if tensor.dtype == torch.int64 else tensor.to(device))
        return tuple(placed)

    def _session(self, node: ir.Node, given: Mapping[str, Tensor]) -> Any:
        import onnx
        import onnxruntime as ort

        proto = ir.to_proto(node)
        for i, (old, new) in enumerate(zip(proto.input, _names(node), strict=False)):
            proto.input[i] = new if old else ""
        declared = [
            onnx.helper.make_tensor_value_info(name, int(element_type(t)), _declared_shape(t))
            for name, t in given.items()
        ]
        # Output types are left for ONNX Runtime to infer.
        results = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
        graph = onnx.helper.make_graph([proto], "node", declared, results)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self._opsets(node).items()]
        # The highest IR version that every supported ONNX Runtime reads.
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, not logged
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])

    def _opsets(self, node: ir.Node) -> dict[str, int]:
        """The opsets for the one node: of the standard's the oldest that has it as it is, since the runtime need not
        know the model's own. The nodes of subgraphs may need that one."""
        import onnx

        if node.domain not in ("", "ai.onnx") or next(_subgraphs(node), None) is not None:
            return self._opset_imports
        return {
            domain: version
            if domain not in ("", "ai.onnx")
            else int(onnx.defs.get_schema(node.op_type, version, "").since_version)
            for domain, version in self._opset_imports.items()
        }


def reads(node: ir.Node) -> tuple[ir.Value | None, ...]:
    """The node's inputs, None where one is left out, and after them what its subgraphs read from outside, by name."""
    free = {value for graph in _subgraphs(node) for value in _free(graph)}
    return (*node.inputs, *sorted(free, key=lambda value: value.name or ""))


def _names(node: ir.Node) -> list[str]:
    """A name for each of what a node reads: captured values keep theirs, as the subgraphs know them.

    Inputs are renamed, since one value may be given at two places, to names that nothing in the node has.
    """
    captured = [value.name or "" for value in reads(node)[len(node.inputs) :] if value is not None]
    taken = {value.name for value in node.outputs} | {name for graph in _subgraphs(node) for name in _inner(graph)}
    prefix = "i"
    while any(f"{prefix}{i}" in taken for i in range(len(node.inputs))):
        prefix += "_"
    return [*(f"{prefix}{i}" for i in range(len(node.inputs))), *captured]


def _declared_shape(tensor: Tensor) -> tuple[int | None, ...]:
    """Vectors describe shapes, axes and scales: shape inference counts them. Of the rest only the rank is declared."""
    return tuple(tensor.shape) if tensor.dim() == 1 else (None,) * tensor.dim()


def _free(graph: ir.Graph) -> set[ir.Value]:
    """What a subgraph and those in it read and do not hold."""
    held = {*graph.inputs, *graph.initializers.values(), *(value for node in graph for value in node.outputs)}
    read = set(graph.outputs)
    for node in graph:
        read |= {value for value in reads(node) if value is not None}
    return read - held


def _inner(graph: ir.Graph) -> set[str]:
    """All names of values in a subgraph and those in it."""
    values = {*graph.inputs, *graph.outputs, *graph.initializers.values()}
    names = set()
    for node in graph:
        values |= {value for value in (*node.inputs, *node.outputs) if value is not None}
        for nested in _subgraphs(node):
            names |= _inner(nested)
    return names | {value.name for value in values if value.name}


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()
