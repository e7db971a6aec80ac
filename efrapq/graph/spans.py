"""Activations whose channels may be scaled without a change in what the network computes.

A layer that writes can multiply its output channels by positive factors if every layer that reads them divides its
input channels by the same: what lies between has to let factors through. Such are Relu, pooling, Flatten, Add (with
the same factors on both sides), and a Clip from 0 while the channels stay below its limit. Cross-layer equalization:
Nagel et al. 2019, arXiv 1906.04721; here over residual streams too.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import onnx_ir as ir
from numpy.typing import NDArray

from efrapq.graph import constants as const
from efrapq.graph.layers import Layer

Number = TypeVar("Number", np.float32, np.int64)

__all__ = ["Span", "find_spans", "over_inputs", "scale_span"]

# One input, one output, every channel on its own, f(s x) = s f(x) for s > 0.
HOMOGENEOUS = frozenset({"AveragePool", "GlobalAveragePool", "GlobalMaxPool", "LeakyRelu", "MaxPool", "Relu"})


@dataclass(frozen=True)
class Span:
    """values: all that share one factor per channel, in topological order. writers, readers: names of the layers at
    either end. channels: how many. limit: of the Clips between, infinity where there is none. after: value → the
    readers that what is in it reaches.
    """

    values: tuple[str, ...]
    writers: tuple[str, ...]
    readers: tuple[str, ...]
    channels: int
    limit: float
    after: Mapping[str, tuple[str, ...]]

    @property
    def name(self) -> str:
        """Its first value's: unique."""
        return self.values[0]


def find_spans(graph: ir.Graph, layers: Sequence[Layer]) -> list[Span]:
    """All spans of a prepared graph, in topological order."""
    by_node = {id(layer.node): layer for layer in layers}
    owner: dict[str, str] = {}

    def find(name: str) -> str:
        while owner.setdefault(name, name) != name:
            owner[name] = owner[owner[name]]
            name = owner[name]
        return name

    made = [(node, value) for node in graph for value in node.outputs]
    for node, value in made:
        find(str(value.name))
        for source in _tied(node):
            owner[find(str(value.name))] = find(str(source.name))
    members: dict[str, list[ir.Value]] = {}
    for _, value in made:
        members.setdefault(find(str(value.name)), []).append(value)
    spans = [_closed(values, by_node) for values in members.values()]
    return [span for span in spans if span is not None]


def _tied(node: ir.Node) -> list[ir.Value]:
    """The inputs that have the output's factors; none where factors do not get through."""
    if node.domain not in ("", "ai.onnx") or len([o for o in node.outputs if o.name]) != 1:
        return []
    first = node.inputs[0] if node.inputs else None
    if first is None:
        return []
    if node.op_type in HOMOGENEOUS or _limit(node) is not None:
        return [first]
    if node.op_type == "Flatten" and node.attributes.get_int("axis", 1) == 1:
        return [first]
    if node.op_type == "Add":
        shapes = [None if v is None or v.shape is None else list(v.shape) for v in node.inputs]
        constant = any(const.constant_or_none(v) is not None for v in node.inputs)
        same = shapes[0] is not None and shapes[0] == shapes[1]
        return [v for v in node.inputs if v is not None] if same and not constant else []
    return []


def _limit(node: ir.Node) -> float | None:
    """Where a Clip from 0 ends; None for any other node."""
    if node.op_type != "Clip" or len(node.inputs) < 2:
        return None
    low = const.array_or_none(node.inputs[1])
    high = const.array_or_none(node.inputs[2]) if len(node.inputs) > 2 and node.inputs[2] is not None else np.inf
    if low is None or high is None or low.size != 1 or np.size(high) != 1 or float(low.reshape(-1)[0]) != 0.0:
        return None
    return float(np.reshape(high, -1)[0])


def _closed(values: list[ir.Value], by_node: Mapping[int, Layer]) -> Span | None:
    """The span of values that belong together, if nothing but layers and what is tied writes and reads them."""
    names = {str(value.name) for value in values}
    writers: dict[str, Layer] = {}
    readers: dict[str, Layer] = {}
    read_by: dict[str, list[str]] = {name: [] for name in names}
    next_to: dict[str, list[str]] = {name: [] for name in names}
    limits = [np.inf]
    for value in values:
        node = value.producer()
        if node is None or value.is_graph_output():
            return None
        layer = by_node.get(id(node))
        if layer is not None and _writes(layer):
            writers[layer.name] = layer
        elif not _tied(node):
            return None
        limit = _limit(node)
        if limit is not None:
            limits.append(limit)
        for use in value.uses():
            reader = by_node.get(id(use.node))
            if reader is not None and use.idx == 0 and reader.op_type in ("Conv", "Gemm"):
                readers[reader.name] = reader
                read_by[str(value.name)].append(reader.name)
            elif len(use.node.outputs) == 1 and str(use.node.outputs[0].name) in names and _tied(use.node):
                next_to[str(value.name)].append(str(use.node.outputs[0].name))
            else:
                return None
    counts = {_outputs(layer) for layer in writers.values()}
    if not readers or len(counts) != 1:
        return None
    channels = counts.pop()
    if any(_inputs(layer) % channels for layer in readers.values()):
        return None
    after = {name: tuple(_reached(name, read_by, next_to)) for name in names}
    ordered = tuple(str(value.name) for value in values)
    return Span(ordered, tuple(writers), tuple(readers), channels, min(limits), after)


def _reached(name: str, read_by: Mapping[str, list[str]], next_to: Mapping[str, list[str]]) -> dict[str, None]:
    """The readers at or behind a value, as an ordered set."""
    seen, found, open_ = {name}, {}, [name]
    while open_:
        current = open_.pop()
        found.update(dict.fromkeys(read_by[current]))
        fresh = [n for n in next_to[current] if n not in seen]
        seen.update(fresh)
        open_ += fresh
    return found


def _writes(layer: Layer) -> bool:
    known_bias = layer.bias is not None or len(layer.node.inputs) < 3 or layer.node.inputs[2] is None
    return layer.op_type in ("Conv", "Gemm") and known_bias


def _shape(layer: Layer) -> tuple[int, ...]:
    constant = const.constant_or_none(layer.node.inputs[1])
    assert constant is not None
    return tuple(constant.shape.numpy())


def _outputs(layer: Layer) -> int:
    return _shape(layer)[layer.channel_axis]


def _inputs(layer: Layer) -> int:
    shape = _shape(layer)
    return shape[1] * layer.groups if layer.op_type == "Conv" else shape[1 - layer.channel_axis]


def scale_span(graph: ir.Graph, layers: Mapping[str, Layer], span: Span, factors: NDArray[np.float32]) -> None:
    """Multiply the channels of a span by factors, (channels,) float32 > 0, in its layers' weights and biases."""
    for name in span.writers:
        layer = layers[name]
        shape = _shape(layer)
        axis = [1] * len(shape)
        axis[layer.channel_axis] = -1
        _scale(graph, layer.node, 1, factors.reshape(axis))
        if layer.bias is not None:
            _scale(graph, layer.node, 2, factors)
    for name in span.readers:
        layer = layers[name]
        _scale(graph, layer.node, 1, np.reciprocal(over_inputs(layer, factors)))


def over_inputs(layer: Layer, factors: NDArray[Number]) -> NDArray[Number]:
    """Something of each channel, (channels,), for each of a layer's inputs: in a shape that goes with the weight's."""
    shape = _shape(layer)
    # Behind a Flatten a channel is a run of inputs.
    spread = np.repeat(factors, _inputs(layer) // len(factors))
    if layer.op_type == "Gemm":
        return spread.reshape((1, -1) if layer.channel_axis == 0 else (-1, 1))
    per_output = np.repeat(spread.reshape(layer.groups, shape[1]), shape[0] // layer.groups, axis=0)
    return per_output.reshape(*shape[:2], *[1] * (len(shape) - 2))


def _scale(graph: ir.Graph, node: ir.Node, position: int, factors: NDArray[np.float32]) -> None:
    value = node.inputs[position]
    assert value is not None
    assert value.const_value is not None
    shape = tuple(value.const_value.shape.numpy())
    scaled = const.changed(
        value.const_value, lambda old: np.multiply(old, factors.reshape(_fit(factors, shape))), shape
    )
    const.replace_input(graph, node, position, str(value.name), scaled)


def _fit(factors: NDArray[np.float32], shape: tuple[int, ...]) -> tuple[int, ...]:
    """A bias may be (1, O)."""
    return factors.shape if factors.ndim == len(shape) else (*[1] * (len(shape) - 1), -1)
