"""Values that float operators read beside integer kernels: rounded for these, left alone for those."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from efrapq.exporters import export_model, read_quantized
from efrapq.graph.copies import copied_from, round_copies
from efrapq.graph.layers import find_layers
from efrapq.graph.placement import place
from efrapq.graph.prepare import prepare


def block(net: Any, between: str = "Softmax", after: str = "Tanh") -> onnx.ModelProto:
    """A value that a matrix and the sum behind it read. between: the operator that makes it. after: that of the sum."""
    n = net()
    x = n.op(between, n.gemm(n.op("Flatten", "input", "flat"), "g1", 192, 8), "x")
    y = n.gemm(n.op("Relu", n.gemm(x, "g2", 8, 16), "wide"), "g3", 16, 8)
    z = n.op(after, n.op("Add", [y, x], "sum"), "z")
    model: onnx.ModelProto = n.model(n.gemm(z, "logits", 8, 5))
    return model


def copies(proto: onnx.ModelProto) -> tuple[ir.Graph, list[str]]:
    model = prepare(proto)
    layers, _ = find_layers(model.graph)
    placement = place(model.graph, layers, 8)
    count = round_copies(model.graph, layers, placement)
    again = place(model.graph, layers, 8)
    assert round_copies(model.graph, layers, again) == 0
    made = [str(node.outputs[0].name) for node in model.graph if node.op_type == "Identity"]
    assert len(made) == count
    assert set(again.grids) == {f"{n}.copy" if f"{n}.copy" in made else n for n in placement.grids}
    return model.graph, made


def test_a_value_that_a_sum_reads_in_float_has_a_copy_for_the_matrix(net: Any) -> None:
    graph, made = copies(block(net))
    assert made == ["x.copy"]
    value = next(o for node in graph for o in node.outputs if o.name == "x")
    assert Counter(use.node.op_type for use in value.uses()) == {"Identity": 1, "Add": 1}
    copy = next(o for node in graph for o in node.outputs if o.name == "x.copy")
    assert copied_from(copy) is value
    assert [use.node.op_type for use in copy.uses()] == ["Gemm"]


def test_there_is_none_where_an_integer_kernel_makes_the_value(net: Any) -> None:
    """It has codes to give, and no floats."""
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    y = n.op("Add", [n.conv(a, "c2", 4, 4), n.op("Tanh", a, "t")], "sum")
    assert copies(n.model(n.op("Tanh", y, "out")))[1] == []


def test_there_is_none_where_all_readers_are_integer(net: Any) -> None:
    n = net()
    x = n.op("Tanh", n.conv("input", "c1", 3, 4), "x")
    y = n.op("Add", [n.conv(x, "c2", 4, 4), x], "sum")
    assert copies(n.model(n.conv(y, "out", 4, 2)))[1] == []


def test_the_graph_s_input_may_be_read_by_both(net: Any) -> None:
    n = net()
    y = n.op("Add", [n.op("Tanh", n.conv("input", "c1", 3, 3), "t"), "input"], "sum")
    assert copies(n.model(n.op("Tanh", y, "out")))[1] == ["input.copy"]


@pytest.mark.parametrize("target", ["ort-x86", "ort-arm", "tensorrt"])
def test_the_file_holds_no_copies_and_comes_back_with_them(
    net: Any, quantize: Any, images: Any, run_ort: Any, target: str
) -> None:
    x = images(24)
    q = quantize(block(net), x, bits=8)
    assert list(q.solved.activations) == ["input", "flat", "x.copy", "wide", "z"]
    proto = q.export(target)
    assert "Identity" not in {node.op_type for node in proto.graph.node}
    added = next(node for node in proto.graph.node if node.op_type == "Add")
    assert "x" in added.input
    quantizer = next(node for node in proto.graph.node if node.output[0] == "x.copy.codes")
    assert quantizer.input[0] == "x"
    back = read_quantized(proto)
    if target != "tensorrt":  # whose grids are its own
        assert back.activations == q.solved.activations
        assert list(back.activations) == list(q.solved.activations)
        step = q.solved.activations["z"].scale
        np.testing.assert_allclose(run_ort(proto, x)[0], q.output, rtol=0, atol=4 * step)
    assert export_model(back, target).SerializeToString() == proto.SerializeToString()


def test_what_the_sum_reads_is_not_rounded(net: Any, quantize: Any, images: Any) -> None:
    """With the coarsest of grids on the copy, the sum is what the float value makes it."""
    q = quantize(block(net), images(24), act_bits=4, edge_bits=4)
    grid = q.solved.activations["x.copy"]
    assert grid.bits == 4
    proto = q.export()
    for name in ("x", "x.copy.real", "sum", "g3"):
        proto.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    import onnxruntime as ort

    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    found = dict(zip([o.name for o in session.get_outputs()], session.run(None, {"input": images(4)}), strict=True))
    assert np.abs(found["x"] - found["x.copy.real"]).max() > grid.scale / 8
    np.testing.assert_allclose(found["sum"], found["g3"] + found["x"], rtol=0, atol=1e-6)
