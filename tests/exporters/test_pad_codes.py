"""A Pad with zeros on codes: no float between the integers on either side of it."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import onnx
import pytest

from efrapq.errors import UnsupportedModelError
from efrapq.exporters import export_model, profile, read_quantized
from efrapq.exporters.qdq import build


def shortcut(net: Any, value: float | None = None) -> onnx.ModelProto:
    """A shortcut without weights, as in ResNets for CIFAR: every second pixel, channels added around."""
    n = net()
    a = n.conv("input", "c1", 3, 4)
    limits = [n.constant(k, np.array(v)) for k, v in (("s", [0, 0]), ("e", [8, 8]), ("axes", [2, 3]), ("step", [2, 2]))]
    half = n.op("Slice", [a, *limits], "half")
    sizes = [n.constant("pads", np.array([0, 2, 0, 0, 0, 2, 0, 0]))]
    if value is not None:
        sizes.append(n.constant("value", np.array(value, np.float32)))
    b = n.op("Add", [n.conv(a, "c2", 4, 8, strides=[2, 2]), n.op("Pad", [half, *sizes], "padded")], "sum")
    f = n.op("Flatten", n.op("GlobalAveragePool", n.op("Relu", b, "a2"), "gap"), "flat")
    return n.model(n.gemm(f, "logits", 8, 5))  # type: ignore[no-any-return]


@pytest.mark.parametrize("value", [None, 0.0], ids=["no value", "zero"])
@pytest.mark.parametrize("act_bits", [8, 4])
@pytest.mark.parametrize("target", ["ort-x86", "ort-arm"])
def test_codes_are_padded(
    net: Any, quantize: Any, images: Any, run_ort: Any, kernels: Any, target: str, act_bits: int, value: float | None
) -> None:
    x = images(12)
    q = quantize(shortcut(net, value), x, act_bits=act_bits)
    proto = q.export(target)
    onnx.checker.check_model(proto, full_check=True)
    plain = build(q.quantized, replace(profile(target), pads_codes=False))
    assert np.array_equal(run_ort(proto, x, optimized=False)[0], run_ort(plain, x, optimized=False)[0])
    if target == "ort-x86":
        ops: Counter[str] = kernels(proto)
        assert (ops["Pad"], ops["QuantizeLinear"], ops["DequantizeLinear"]) == (1, 1, 0)
        assert np.array_equal(run_ort(proto, x)[0], run_ort(plain, x)[0])


@pytest.mark.parametrize("act_bits", [8, 4])
def test_it_reads_back_and_is_written_again(net: Any, quantize: Any, images: Any, act_bits: int) -> None:
    q = quantize(shortcut(net), images(12), act_bits=act_bits)
    proto = q.export("ort-x86")
    back = read_quantized(proto)
    assert back.activations == q.solved.activations
    assert export_model(back, "ort-x86").SerializeToString(deterministic=True) == proto.SerializeToString(
        deterministic=True
    )
    other = export_model(back, "portable").SerializeToString(deterministic=True)
    assert other == q.export("portable").SerializeToString(deterministic=True)


def broken(proto: onnx.ModelProto, how: str) -> onnx.ModelProto:
    pad = next(node for node in proto.graph.node if node.op_type == "Pad")
    if how == "reflect":
        pad.attribute.append(onnx.helper.make_attribute("mode", "reflect"))
    elif how == "another value":
        proto.graph.initializer.append(onnx.numpy_helper.from_array(np.array(9, np.uint8), "nine"))
        pad.input[2] = "nine"
    else:
        proto.graph.node.append(onnx.helper.make_node("Identity", [pad.output[0]], ["more"]))
        proto.graph.output.append(onnx.helper.make_tensor_value_info("more", onnx.TensorProto.UINT8, None))
    return proto


@pytest.mark.parametrize("how", ["reflect", "another value", "another reader"])
def test_other_ways_to_pad_codes_are_refused(net: Any, quantize: Any, images: Any, how: str) -> None:
    proto = quantize(shortcut(net), images(4)).export("ort-x86")
    with pytest.raises(UnsupportedModelError, match="pad"):
        read_quantized(broken(proto, how))
