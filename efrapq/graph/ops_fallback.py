"""Nodes that the table lacks: one-node models in ONNX Runtime, on the CPU and without gradient."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import onnx_ir as ir
import torch
from torch import Tensor

from efrapq.graph.ops_call import element_type

__all__ = ["OrtFallback", "captured_names"]

# Session key: the node, and the element type and rank of each input (None where an input is left out).
_Key = tuple[ir.Node, tuple[tuple[torch.dtype, int] | None, ...]]


class OrtFallback:
    """Runs single nodes through ONNX Runtime; a session is made for each node and kind of inputs, and kept."""

    def __init__(self, opset_imports: Mapping[str, int]) -> None:
        self._opset_imports = dict(opset_imports)
        self._sessions: dict[_Key, Any] = {}

    def run(self, node: ir.Node, inputs: Sequence[Tensor | None]) -> tuple[Tensor, ...]:
        """The node's outputs, on the device of the inputs.

        Raises what ONNX Runtime raises (its errors derive from Exception only), and ValueError for tensors that
        it cannot be given.
        """
        given = {f"i{i}": t for i, t in enumerate(inputs) if t is not None}
        key = (node, tuple(None if t is None else (t.dtype, t.dim()) for t in inputs))
        if key not in self._sessions:
            self._sessions[key] = self._session(node, given)
        feeds = {name: t.detach().cpu().numpy() for name, t in given.items()}
        results = self._sessions[key].run(None, feeds)
        device = next((t.device for t in given.values() if t.device.type != "cpu"), torch.device("cpu"))
        placed = []
        for result in results:
            # The copy is needed: ONNX Runtime may hand out memory that is not writable.
            tensor = torch.from_numpy(result.copy())
            placed.append(tensor if tensor.dtype == torch.int64 else tensor.to(device))
        return tuple(placed)

    def _session(self, node: ir.Node, given: Mapping[str, Tensor]) -> Any:
        import onnx
        import onnxruntime as ort

        proto = ir.to_proto(node)
        for i, name in enumerate(proto.input):
            proto.input[i] = f"i{i}" if name else ""
        declared = [
            onnx.helper.make_tensor_value_info(name, int(element_type(t)), [None] * t.dim())
            for name, t in given.items()
        ]
        # Output types are left for ONNX Runtime to infer.
        results = [onnx.ValueInfoProto(name=name) for name in proto.output if name]
        graph = onnx.helper.make_graph([proto], "node", declared, results)
        opsets = [onnx.helper.make_opsetid(domain, version) for domain, version in self._opset_imports.items()]
        # The highest IR version that every supported ONNX Runtime reads.
        model = onnx.helper.make_model(graph, opset_imports=opsets, ir_version=10)
        options = ort.SessionOptions()
        options.log_severity_level = 4  # what goes wrong is raised, not logged
        return ort.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])


def captured_names(node: ir.Node) -> list[str]:
    """The values that the node's subgraphs (If, Loop, Scan) read from outside of them, sorted."""
    return sorted({name for graph in _subgraphs(node) for name in _free_names(graph)})


def _free_names(graph: ir.Graph) -> set[str]:
    bound = {value.name for value in graph.inputs} | set(graph.initializers)
    bound |= {value.name for inner in graph for value in inner.outputs}
    read = {value.name for inner in graph for value in inner.inputs if value is not None}
    read |= {value.name for value in graph.outputs}
    for inner in graph:
        for nested in _subgraphs(inner):
            read |= _free_names(nested)
    return {name for name in read - bound if name}


def _subgraphs(node: ir.Node) -> Iterator[ir.Graph]:
    for attribute in node.attributes.values():
        if attribute.type == ir.AttributeType.GRAPH:
            yield attribute.as_graph()
        elif attribute.type == ir.AttributeType.GRAPHS:
            yield from attribute.as_graphs()
