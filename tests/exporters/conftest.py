"""Networks whose convolutions have one, two or three spatial axes."""

from __future__ import annotations

from collections.abc import Callable
from math import prod
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import helper

SIZES = {1: (24,), 2: (10, 9), 3: (6, 8, 7)}


class _Net:
    """A chain of layers over `axes` spatial axes, with seeded weights."""

    def __init__(self, axes: int, make_model: Callable[..., onnx.ModelProto]) -> None:
        self.axes = axes
        self.rng = np.random.default_rng(axes)
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[Any]] = {}
        self._make_model = make_model

    def op(self, op: str, sources: list[str], name: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(op, sources, [name], name=f"node_{name}", **attributes))
        return name

    def weight(self, name: str, *shape: int, fan_in: int) -> str:
        self.constants[name] = (self.rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)
        return name

    def conv(self, source: str, name: str, inputs: int, outputs: int, kernel: int = 3, **attributes: Any) -> str:
        """With a bias, and what is given as one number for all spatial axes: strides, dilations, pads, group."""
        n = self.axes
        group = attributes.pop("group", 1)
        lengths = {"strides": n, "dilations": n, "pads": 2 * n, "output_padding": n}
        given = {k: v if isinstance(v, list) else [v] * lengths[k] for k, v in attributes.items()}
        transposed = name.startswith("up")
        shape = (inputs, outputs // group) if transposed else (outputs, inputs // group)
        weight = self.weight(f"{name}.weight", *shape, *(kernel,) * n, fan_in=inputs // group * kernel**n)
        bias = self.weight(f"{name}.bias", outputs, fan_in=50)
        return self.op("ConvTranspose" if transposed else "Conv", [source, weight, bias], name, group=group, **given)

    def gemm(self, source: str, name: str, inputs: int, outputs: int) -> str:
        weight = self.weight(f"{name}.weight", outputs, inputs, fan_in=inputs)
        return self.op("Gemm", [source, weight, self.weight(f"{name}.bias", outputs, fan_in=50)], name, transB=1)

    def model(self, output: str, channels: int = 3) -> onnx.ModelProto:
        shape = ("N", channels, *SIZES[self.axes])
        proto: onnx.ModelProto = self._make_model(self.nodes, {"input": shape}, {output: None}, self.constants)
        inferred = onnx.shape_inference.infer_shapes(proto)
        proto.graph.output[0].CopyFrom(inferred.graph.output[0])
        return proto


@pytest.fixture
def net_over(make_model: Callable[..., onnx.ModelProto]) -> Callable[[int], _Net]:
    """Number of spatial axes → an empty network."""
    return lambda axes: _Net(axes, make_model)


@pytest.fixture
def block_over(net_over: Callable[[int], _Net]) -> Callable[..., onnx.ModelProto]:
    """(axes, transposed=False) → a network, input (N, 3, …), logits (N, 5).

    It has a strided convolution with uneven pads, a depthwise, a dilated, a grouped and a pointwise one, a shortcut,
    all pools and a gate; `transposed` puts a ConvTranspose in front of the last pool.
    """

    def build(axes: int, *, transposed: bool = False) -> onnx.ModelProto:
        n = net_over(axes)
        a = n.op("Relu", [n.conv("input", "stem", 3, 8, strides=2, pads=[0] * axes + [1] * axes)], "a1")
        b = n.op("Relu", [n.conv(a, "depthwise", 8, 8, group=8, pads=1)], "a2")
        c = n.conv(b, "dilated", 8, 8, pads=2, dilations=2)
        d = n.op("Relu", [n.op("Add", [c, a], "sum")], "a3")
        e = n.op("MaxPool", [d], "peak", kernel_shape=[2] * axes, strides=[1] * axes)
        e = n.op("AveragePool", [e], "mean", kernel_shape=[2] * axes, strides=[1] * axes)
        f = n.op("LeakyRelu", [n.conv(e, "grouped", 8, 8, group=2, pads=1)], "a4", alpha=0.1)
        gate = n.conv(n.op("GlobalAveragePool", [f], "squeeze"), "excite", 8, 8, kernel=1)
        g = n.op("Mul", [f, n.op("Sigmoid", [gate], "gate")], "gated")
        channels = 8
        if transposed:
            g = n.op("Relu", [n.conv(g, "up", 8, 6, group=2, strides=2, pads=1, output_padding=1)], "a5")
            channels = 6
        h = n.op("Flatten", [n.op("GlobalAveragePool", [g], "gap")], "flat")
        return n.model(n.gemm(h, "logits", channels, 5))

    return build


@pytest.fixture(scope="session")
def smooth() -> Callable[..., NDArray[np.float32]]:
    """(axes, count, channels=3, seed=0) → inputs in which neighbours are alike, (count, channels, …)."""

    def make(axes: int, count: int, channels: int = 3, seed: int = 0) -> NDArray[np.float32]:
        rng = np.random.default_rng(seed)
        size = SIZES[axes]
        places = np.stack(np.meshgrid(*(np.linspace(0, 1, s) for s in size), indexing="ij")).reshape(axes, -1)
        waves = np.cos(np.pi * rng.integers(0, 4, (12, axes)) @ places)
        mixed = rng.standard_normal((count, channels, 12)) @ waves / 3 + 0.05 * rng.standard_normal(prod(size))
        return mixed.reshape(count, channels, *size).astype(np.float32)

    return make
