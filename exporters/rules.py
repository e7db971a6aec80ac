"""The vocabulary in which targets state what they accept: each rule a sentence, its source, and a check of the graph.

A target's module names the rules that hold for it; `efrapq.exporters.lint` runs them. The checks read the file alone,
so that they judge what was written and not what the exporter believes to have written.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from efrapq.exporters.saturation import INT16_MAX, walked, worst_pair_sum
from efrapq.graph.layers import WEIGHT_OPS

__all__ = [
    "Finding",
    "Graph",
    "Rule",
    "activations_per_tensor",
    "activations_typed",
    "biases_float",
    "biases_int32",
    "codes_untouched",
    "int4_only_in",
    "int4_through_cast",
    "no_control_flow",
    "pairs_within_int16",
    "scales_positive",
    "shapes_fixed",
    "weights_per_output_channel",
    "weights_signed",
    "weights_symmetric",
    "zero_points_zero",
]

INT4_TYPES = (TensorProto.INT4, TensorProto.UINT4)
# Operators that a quantizer's grid absorbs: between a layer and its QuantizeLinear they cost nothing.
ABSORBED = ("Relu", "Clip")

Finding = tuple[str, str]
Check = Callable[["Graph"], Iterator[Finding]]


@dataclass(frozen=True)
class Rule:
    """words: the rule as a sentence. source: where the target's makers say so. check: yields (node, what is wrong)."""

    words: str
    source: str
    check: Check


@dataclass(frozen=True)
class WeightUse:
    """One heavy operator whose weight is a dequantized constant."""

    node: onnx.NodeProto
    dequantize: onnx.NodeProto
    codes: onnx.TensorProto
    cast: bool


class Graph:
    """A QDQ file as the checks see it."""

    def __init__(self, proto: onnx.ModelProto) -> None:
        self.proto = proto
        self.nodes = list(proto.graph.node)
        self.constants = {t.name: t for t in proto.graph.initializer}
        self.producers = {name: node for node in self.nodes for name in node.output}
        self.outputs = {o.name for o in proto.graph.output}

    @cached_property
    def readers(self) -> dict[str, list[onnx.NodeProto]]:
        found: dict[str, list[onnx.NodeProto]] = {}
        for node in self.nodes:
            for name in node.input:
                found.setdefault(name, []).append(node)
        return found

    @property
    def quantizers(self) -> Iterator[onnx.NodeProto]:
        return (node for node in self.nodes if node.op_type == "QuantizeLinear")

    @property
    def dequantizers(self) -> Iterator[onnx.NodeProto]:
        return (node for node in self.nodes if node.op_type == "DequantizeLinear")

    def array(self, node: onnx.NodeProto, position: int) -> NDArray[np.generic] | None:
        """The constant at an input of a node; None where there is none."""
        name = node.input[position] if len(node.input) > position else ""
        held: NDArray[np.generic] | None = (
            numpy_helper.to_array(self.constants[name]) if name in self.constants else None
        )
        return held

    def constant_codes(self, dequantize: onnx.NodeProto) -> onnx.TensorProto | None:
        """The constant behind a DequantizeLinear, directly or through a Cast."""
        name = dequantize.input[0]
        producer = self.producers.get(name)
        if producer is not None and producer.op_type == "Cast":
            name = producer.input[0]
        return self.constants.get(name)

    def code_type(self, quantize: onnx.NodeProto) -> int:
        """The element type of a QuantizeLinear's codes: that of its zero point, or as the attribute says."""
        name = quantize.input[2] if len(quantize.input) > 2 else ""
        if name in self.constants:
            return int(self.constants[name].data_type)
        return next((int(a.i) for a in quantize.attribute if a.name == "output_dtype" and a.i), int(TensorProto.UINT8))

    @cached_property
    def weights(self) -> list[WeightUse]:
        found = []
        for node in self.nodes:
            if node.op_type not in WEIGHT_OPS or len(node.input) < 2:
                continue
            dequantize = self.producers.get(node.input[1])
            if dequantize is None or dequantize.op_type != "DequantizeLinear":
                continue
            codes = self.constant_codes(dequantize)
            if codes is not None:
                found.append(WeightUse(node, dequantize, codes, codes.name != dequantize.input[0]))
        return found

    def input_is_quantized(self, node: onnx.NodeProto) -> bool:
        data = self.producers.get(node.input[0])
        return data is not None and data.op_type == "DequantizeLinear"

    def highest_code(self, node: onnx.NodeProto) -> int:
        """The largest uint8 code that the node's quantized input can have: what a Clip leaves, or 255."""
        clip = self.producers.get(self.producers[node.input[0]].input[0])
        limit = self.array(clip, 2) if clip is not None and clip.op_type == "Clip" else None
        return 255 if limit is None else int(limit.astype(np.int64).reshape(-1)[0])

    def output_is_quantized(self, node: onnx.NodeProto) -> bool:
        """Whether one QuantizeLinear, behind a Relu or Clip perhaps, is all that reads the node's output."""
        name = node.output[0]
        readers = self.readers.get(name, [])
        if len(readers) == 1 and readers[0].op_type in ABSORBED and name not in self.outputs:
            name = readers[0].output[0]
            readers = self.readers.get(name, [])
        return len(readers) == 1 and readers[0].op_type == "QuantizeLinear" and name not in self.outputs


def name_of(node: onnx.NodeProto) -> str:
    return str(node.name or node.output[0])


def type_name(element: int) -> str:
    return str(TensorProto.DataType.Name(element)).lower()


def attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    return next((int(a.i) for a in node.attribute if a.name == name), default)


# The checks. Each takes what the target allows and gives a function of the graph.


def activations_typed(*allowed: int) -> Check:
    def check(graph: Graph) -> Iterator[Finding]:
        for node in graph.quantizers:
            kind = graph.code_type(node)
            if kind not in allowed:
                yield (
                    name_of(node),
                    f"its codes are {type_name(kind)}, not {' or '.join(type_name(a) for a in allowed)}",
                )

    return check


def activations_per_tensor(graph: Graph) -> Iterator[Finding]:
    for node in graph.quantizers:
        scale = graph.array(node, 1)
        if scale is not None and scale.size > 1:
            yield name_of(node), f"it has {scale.size} scales; an activation has one"


def zero_points_zero(graph: Graph) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        zero_point = graph.array(node, 2)
        if zero_point is not None and (zero_point.astype(np.int64) != 0).any():
            yield name_of(node), f"its zero point is {int(zero_point.astype(np.int64).reshape(-1)[0])}, not 0"


def scales_positive(graph: Graph) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.op_type not in ("QuantizeLinear", "DequantizeLinear"):
            continue
        scale = graph.array(node, 1)
        if scale is None:
            yield name_of(node), "its scale is computed at run time"
        elif not (scale.astype(np.float64) > 0).all():
            yield name_of(node), "its scale is not positive"


def codes_untouched(graph: Graph) -> Iterator[Finding]:
    for node in graph.dequantizers:
        producer = graph.producers.get(node.input[0])
        if producer is None or producer.op_type == "QuantizeLinear" or graph.constant_codes(node) is not None:
            continue
        yield name_of(node), f"a {producer.op_type} stands between it and the QuantizeLinear"


def weights_signed(graph: Graph) -> Iterator[Finding]:
    return _weights_around(graph, {TensorProto.INT8: 0, TensorProto.INT4: 0})


def weights_symmetric(graph: Graph) -> Iterator[Finding]:
    """Signed around 0, or uint8 around 128."""
    return _weights_around(graph, {TensorProto.INT8: 0, TensorProto.UINT8: 128, TensorProto.INT4: 0})


def _weights_around(graph: Graph, middles: Mapping[int, int]) -> Iterator[Finding]:
    """Weights whose codes are of another type than these, or have another zero point than their type's."""
    *most, last = (type_name(kind) for kind in middles)
    for use in graph.weights:
        kind = use.codes.data_type
        if kind not in middles:
            yield name_of(use.node), f"its weight codes are {type_name(kind)}, not {', '.join(most)} or {last}"
        zero_point, middle = graph.array(use.dequantize, 2), middles.get(kind, 0)
        found = np.zeros(1) if zero_point is None else zero_point.astype(np.int64)
        if (found != middle).any():
            yield name_of(use.node), f"its weight has a zero point other than {middle}"


def pairs_within_int16(graph: Graph) -> Iterator[Finding]:
    """No two products of a uint8 activation and a signed weight add up to more than int16 holds."""
    for use in graph.weights:
        if use.codes.data_type != TensorProto.INT8 or use.node.op_type == "ConvTranspose":
            continue
        if not graph.input_is_quantized(use.node):
            continue
        codes = numpy_helper.to_array(use.codes)
        axis = attribute(use.dequantize, "axis", 1)
        worst = worst_pair_sum(walked(codes, axis), graph.highest_code(use.node)) if codes.ndim > 1 else 0
        if worst > INT16_MAX:
            yield name_of(use.node), f"a pair of its products can reach {worst:,}"


def weights_per_output_channel(graph: Graph) -> Iterator[Finding]:
    """Conv along axis 0, ConvTranspose along axis 1; a matrix along either of its axes, as its layout has it."""
    wanted = {"Conv": 0, "ConvTranspose": 1}
    for use in graph.weights:
        scale = graph.array(use.dequantize, 1)
        if scale is None or scale.size == 1:
            continue
        if scale.ndim != 1 or attribute(use.dequantize, "block_size", 0):
            yield name_of(use.node), "its weight has scales by block"
            continue
        axis = attribute(use.dequantize, "axis", 1)
        axis += len(use.codes.dims) if axis < 0 else 0
        expected = wanted.get(use.node.op_type)
        if expected is not None and axis != expected:
            yield name_of(use.node), f"its scales run along axis {axis}, not {expected}"


def biases_float(graph: Graph) -> Iterator[Finding]:
    for node in graph.dequantizers:
        codes = graph.constant_codes(node)
        if codes is not None and codes.data_type == TensorProto.INT32:
            yield name_of(node), "it dequantizes int32"


def biases_int32(graph: Graph) -> Iterator[Finding]:
    """Where input and weight are quantized: int32 codes whose scale is the product of the two scales."""
    for use in graph.weights:
        if len(use.node.input) < 3 or not use.node.input[2] or not graph.input_is_quantized(use.node):
            continue
        dequantize = graph.producers.get(use.node.input[2])
        if dequantize is None or dequantize.op_type != "DequantizeLinear":
            yield name_of(use.node), "its bias is float beside a quantized input and weight"
            continue
        codes = graph.constant_codes(dequantize)
        if codes is None or codes.data_type != TensorProto.INT32:
            yield name_of(use.node), "its bias codes are not constant int32"
            continue
        data = graph.producers[use.node.input[0]]
        scales = [graph.array(n, 1) for n in (dequantize, data, use.dequantize)]
        if any(s is None for s in scales):
            continue  # scales_positive names it
        bias, x, w = (np.asarray(s, np.float64).reshape(-1) for s in scales)
        product = np.tile(w, max(bias.size // w.size, 1)) * x
        if product.size != bias.size or not np.allclose(bias, product, rtol=1e-5, atol=0):
            yield name_of(use.node), "the scale of its bias is not the product of its input's and its weight's"


def int4_only_in(ops: frozenset[str], beside: str) -> Check:
    """4-bit codes only in constants, for these operators, and beside "float" or "quantized" activations."""

    def check(graph: Graph) -> Iterator[Finding]:
        for node in graph.quantizers:
            if graph.code_type(node) in INT4_TYPES:
                yield name_of(node), "an activation has 4-bit codes"
        for use in graph.weights:
            if use.codes.data_type not in INT4_TYPES:
                continue
            if use.node.op_type not in ops:
                yield name_of(use.node), f"a 4-bit weight of {use.node.op_type}, not of {' or '.join(sorted(ops))}"
            elif beside == "float" and graph.input_is_quantized(use.node):
                yield name_of(use.node), "a 4-bit weight beside a quantized input"
            elif beside == "quantized" and not graph.input_is_quantized(use.node):
                yield name_of(use.node), "a 4-bit weight beside a float input"
            elif beside == "quantized" and not graph.output_is_quantized(use.node):
                yield name_of(use.node), "a 4-bit weight whose layer has a float output"

    return check


def int4_through_cast(graph: Graph) -> Iterator[Finding]:
    for use in graph.weights:
        if use.codes.data_type in INT4_TYPES and not use.cast and graph.input_is_quantized(use.node):
            yield name_of(use.node), "its int4 weight goes to DequantizeLinear without a Cast to int8"


def shapes_fixed(graph: Graph) -> Iterator[Finding]:
    for value in graph.proto.graph.input:
        if value.name in graph.constants:
            continue
        dims = value.type.tensor_type.shape.dim
        if not value.type.tensor_type.HasField("shape") or any(d.dim_value < 1 for d in dims):
            shape = "×".join(str(d.dim_value or d.dim_param or "?") for d in dims)
            yield str(value.name), f"the size of this input is dynamic ({shape})"


def no_control_flow(graph: Graph) -> Iterator[Finding]:
    for node in graph.nodes:
        if node.op_type in ("If", "Loop", "Scan"):
            yield name_of(node), f"{node.op_type} is not supported"
