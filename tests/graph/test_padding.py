"""Padding that the runtime was to choose, written as numbers: the same numbers as ONNX Runtime chooses."""

from __future__ import annotations

from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from efrapq.graph.layers import find_layers
from efrapq.graph.prepare import prepare


def conv(foreign: Any, op: str, size: str, attributes: str, kernel: int = 3) -> onnx.ModelProto:
    text = f"net (float[N,2,{size}] x) => (float[N,4,H2,W2] y) {{ y = {op} <{attributes}> (x, w) }}"
    return foreign(text, {"w": (4, 2, kernel, kernel) if op == "Conv" else (2, 4, kernel, kernel)})


def prepared(proto: onnx.ModelProto) -> tuple[ir.Model, ir.Node]:
    model = prepare(proto)
    (node,) = model.graph
    return model, node


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize("size", [7, 8, 9])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (2, 1, 1), (3, 2, 1), (4, 3, 1), (1, 2, 1)])
def test_conv(foreign: Any, run_ort: Any, mode: str, size: int, kernel: int, stride: int, dilation: int) -> None:
    attributes = f'auto_pad="{mode}", strides=[{stride},{stride}], dilations=[{dilation},{dilation}]'
    proto = conv(foreign, "Conv", f"{size},{size + 1}", attributes, kernel)
    model, node = prepared(proto)
    assert "auto_pad" not in node.attributes
    x = np.random.default_rng(0).standard_normal((2, 2, size, size + 1), np.float32)
    (expected,), (actual,) = run_ort(proto, x), run_ort(ir.to_proto(model), x)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 1e-5


@pytest.mark.parametrize(
    "attributes",
    [
        'auto_pad="SAME_UPPER", strides=[2,2]',
        'auto_pad="SAME_LOWER", strides=[2,2]',
        'auto_pad="SAME_UPPER", strides=[1,2]',
        "output_shape=[15,15], strides=[2,2]",
        "output_shape=[14,14], strides=[2,2]",
        "output_shape=[15,16], output_padding=[0,1], strides=[2,2]",
        'auto_pad="SAME_UPPER", output_shape=[14,15], strides=[2,2]',
        'auto_pad="VALID", strides=[2,2]',
    ],
)
def test_conv_transpose(foreign: Any, run_ort: Any, attributes: str) -> None:
    proto = conv(foreign, "ConvTranspose", "7,7", attributes)
    model, node = prepared(proto)
    assert {"auto_pad", "output_shape"}.isdisjoint(node.attributes)
    x = np.random.default_rng(0).standard_normal((2, 2, 7, 7), np.float32)
    (expected,), (actual,) = run_ort(proto, x), run_ort(ir.to_proto(model), x)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 1e-5


LINE, VOLUME = "9", "5,6,4"


@pytest.mark.parametrize(
    ("op", "size", "attributes"),
    [
        ("Conv", LINE, 'auto_pad="SAME_UPPER", strides=[2]'),
        ("Conv", LINE, 'auto_pad="SAME_LOWER", strides=[4]'),
        ("Conv", VOLUME, 'auto_pad="SAME_UPPER", strides=[2,1,3]'),
        ("Conv", VOLUME, 'auto_pad="VALID", strides=[1,2,1]'),
        ("ConvTranspose", LINE, 'auto_pad="SAME_LOWER", strides=[2]'),
        ("ConvTranspose", LINE, "output_shape=[18], strides=[2]"),
        ("ConvTranspose", VOLUME, 'auto_pad="SAME_UPPER", strides=[2,2,1]'),
        ("ConvTranspose", VOLUME, "output_shape=[10,12,5], output_padding=[1,0,0], strides=[2,2,1]"),
    ],
)
def test_one_and_three_axes(foreign: Any, run_ort: Any, op: str, size: str, attributes: str) -> None:
    axes = len(size.split(","))
    sizes = ",".join(f"S{i}" for i in range(axes))
    text = f"net (float[N,2,{size}] x) => (float[N,4,{sizes}] y) {{ y = {op} <{attributes}> (x, w) }}"
    proto = foreign(text, {"w": ((4, 2) if op == "Conv" else (2, 4)) + (3,) * axes})
    model, node = prepared(proto)
    assert {"auto_pad", "output_shape"}.isdisjoint(node.attributes)
    (layer,), _ = find_layers(model.graph)
    assert layer.op_type == op
    x = np.random.default_rng(0).standard_normal((2, 2, *map(int, size.split(","))), np.float32)
    (expected,), (actual,) = run_ort(proto, x), run_ort(ir.to_proto(model), x)
    assert actual.shape == expected.shape
    assert np.abs(actual - expected).max() < 1e-5


def test_a_dynamic_size_matters_only_with_a_stride(foreign: Any) -> None:
    _, node = prepared(conv(foreign, "Conv", "H,W", 'auto_pad="SAME_UPPER"'))
    assert node.attributes.get_ints("pads") == (1, 1, 1, 1)
    model, node = prepared(conv(foreign, "Conv", "H,W", 'auto_pad="SAME_UPPER", strides=[2,2]'))
    assert node.attributes.get_string("auto_pad") == "SAME_UPPER"
    _, (skipped,) = find_layers(model.graph)
    assert "auto_pad" in skipped.reason
    _, node = prepared(conv(foreign, "ConvTranspose", "H,W", 'auto_pad="SAME_UPPER", strides=[2,2]'))
    assert node.attributes.get_ints("pads") == (0, 0, 1, 1)
    _, node = prepared(conv(foreign, "ConvTranspose", "H,W", "output_shape=[15,15], strides=[2,2]"))
    assert node.attributes.get_ints("output_shape") == (15, 15)
