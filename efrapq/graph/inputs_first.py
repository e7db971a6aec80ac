"""Matrices as weight-only kernels want them: the inputs on the first axis."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from efrapq.graph import constants as const
from efrapq.graph.layers import Layer

__all__ = ["inputs_first"]


def inputs_first(graph: ir.Graph, layer: Layer) -> bool:
    """Rewrite a Gemm with transB into one without, its weight transposed under the same name; whether it was one.

    ONNX Runtime computes a Gemm with transB in float, dequantizing its weight each time, and one without in
    MatMulNBits.
    """
    if layer.op_type != "Gemm" or layer.channel_axis != 0:
        return False
    weight = graph.initializers[layer.weight].const_value
    assert weight is not None
    outputs, inputs = const.sizes(weight)
    turned = const.changed(weight, np.transpose, (inputs, outputs))
    const.replace_input(graph, layer.node, 1, layer.weight, turned)
    layer.node.attributes.pop("transB")
    return True
