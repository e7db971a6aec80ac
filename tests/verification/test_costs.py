"""Costs, conversions and memory in the kernel report, on graphs small enough to count by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from efrapq.inspection import inspect
from efrapq.verification.advice import slower_because
from efrapq.verification.cost import activation_peak, weight_bytes
from efrapq.verification.kernels import KernelReport, report_kernels
from efrapq.verification.ort_static import quantize_with_ort
from efrapq.verification.session import open_session
from efrapq.verification.shapes import graph_shapes

CHANNELS, SIZE = 4, 6
MACS = CHANNELS * CHANNELS * 9 * SIZE * SIZE


def qdq_conv(make_model, *, zero_point: int, batch: int | str = "N", size: int | str = SIZE) -> onnx.ModelProto:
    """Q → DQ → Conv 3×3 → Relu → Q → DQ, with the output's zero point as given."""
    constants = {
        "s": np.array(0.05, np.float32), "z": np.array(0, np.uint8), "zy": np.array(zero_point, np.uint8),
        "w": np.ones((CHANNELS, CHANNELS, 3, 3), np.int8), "ws": np.full(CHANNELS, 0.01, np.float32),
        "wz": np.zeros(CHANNELS, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xr"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wr"], axis=0),
        helper.make_node("Conv", ["xr", "wr"], ["c"], pads=[1] * 4),
        helper.make_node("Relu", ["c"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "s", "zy"], ["rq"]),
        helper.make_node("DequantizeLinear", ["rq", "s", "zy"], ["y"]),
    ]
    return make_model(nodes, {"x": (batch, CHANNELS, size, size)}, {"y": None}, constants)


def measured(proto: onnx.ModelProto) -> tuple[KernelReport, int | None]:
    optimized = open_session(proto.SerializeToString()).optimized
    shapes = graph_shapes(proto, optimized)
    return report_kernels(optimized, shapes), activation_peak(optimized, shapes)


@pytest.mark.parametrize("batch", ["N", 1, 3])
def test_an_integer_convolution_costs_the_same_a_sample_for_any_batch(make_model, batch: int | str) -> None:
    report, peak = measured(qdq_conv(make_model, zero_point=0, batch=batch))
    assert [(op.integer, op.macs, op.share) for op in report.ops] == [(True, MACS, 1.0)]
    assert report.conversions == {"quantize": 1, "dequantize": 1, "constants": 0}
    # A float end of the network beside its codes is the most that lives at once.
    assert peak == CHANNELS * SIZE * SIZE * (4 + 1)


def test_a_relu_at_a_nonzero_zero_point_has_its_reason_and_cost(make_model) -> None:
    report, _ = measured(qdq_conv(make_model, zero_point=12))
    (row,) = report.unfused
    assert row.reason == "the Relu between it and QuantizeLinear is not redundant: the output's zero point is 12, not 0"
    assert (row.macs, row.share, report.macs) == (MACS, 1.0, MACS)
    words = slower_because({"float": 1.0, "defended": 1.5}, report)
    assert words is not None
    assert words.startswith("slower than float by a factor of 1.50: 1 of 1 heavy operators run in float (100.0 %")
    assert "DequantizeLinear nodes are left" in words
    assert slower_because({"float": 1.0, "defended": 0.9}, report) is None
    assert slower_because({"float": None, "defended": 0.9}, report) is None


def test_unknown_sizes_are_null(make_model) -> None:
    report, peak = measured(qdq_conv(make_model, zero_point=0, size="S"))
    assert [(op.macs, op.share) for op in report.ops] == [(None, None)]
    assert report.macs is None
    assert peak is None


def test_constants_are_counted_by_what_they_are(make_model) -> None:
    weights = CHANNELS * CHANNELS * 9
    assert weight_bytes(qdq_conv(make_model, zero_point=0)) == {
        "codes": weights, "scales": 4 + 1 + 1 + 4 * CHANNELS + CHANNELS, "biases": 0, "float": 0, "other": 0,
    }  # fmt: skip


def test_all_forms_of_one_network_cost_the_same(quantize, residual_net, images) -> None:
    made = quantize(residual_net(), images(16))
    weight_only = quantize(residual_net(), images(16), act_bits=32).export()
    tool = onnx.load_from_string(quantize_with_ort(residual_net(), [images(16)], 8))
    files = [residual_net(), made.export(), made.export("portable"), weight_only, tool]
    reports = [measured(f)[0] for f in files]
    assert len({r.macs for r in reports}) == 1
    assert reports[0].macs
    for report in reports:
        assert sum(op.share or 0 for op in report.ops) == pytest.approx(1, abs=1e-5)
    assert reports[2].conversions["constants"] > reports[1].conversions["constants"]
    assert all("only its weight is quantized" in u.reason or "weight-only" in u.reason for u in reports[3].unfused)


def test_int4_on_an_old_opset_is_explained(tmp_path: Path) -> None:
    weight = helper.make_tensor("w", TensorProto.INT4, [2, 2], b"\x21\x43", raw=True)
    graph = helper.make_graph(
        [helper.make_node("DequantizeLinear", ["w", "s"], ["wr"]), helper.make_node("MatMul", ["x", "wr"], ["y"])],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["N", 2])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["N", 2])],
        [weight, numpy_helper.from_array(np.array(0.1, np.float32), "s")],
    )
    path = tmp_path / "old.onnx"
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8), path)
    found = inspect(path)
    assert found["kernels"] is None
    (note,) = [n for n in found["notes"] if "does not load" in n]
    assert "int4 needs opset 21 and IR version 10; this file says 17 and 8" in note


def test_recurrent_layers_attention_and_einsum_are_counted(make_model) -> None:
    """By hand: of an LSTM 4 gates a step, of attention the two products over all pairs, of Einsum every index once."""
    steps, size, hidden, heads = 7, 5, 3, 2
    rng = np.random.default_rng(0)

    def constants(**shapes: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {name: rng.standard_normal(shape).astype(np.float32) for name, shape in shapes.items()}

    lstm = make_model(
        [
            helper.make_node("Transpose", ["x"], ["t"], "first", perm=[1, 0, 2]),
            helper.make_node("LSTM", ["t", "w", "r"], ["y"], "lstm", hidden_size=hidden, direction="bidirectional"),
        ],
        {"x": ("N", steps, size)},
        {"y": (steps, 2, "N", hidden)},
        constants(w=(2, 4 * hidden, size), r=(2, 4 * hidden, hidden)),
    )
    einsum = make_model(
        [helper.make_node("Einsum", ["x", "w"], ["y"], "sum", equation="bsi,io->bso")],
        {"x": ("N", steps, size)},
        {"y": ("N", steps, hidden)},
        constants(w=(size, hidden)),
    )
    attention = make_model(
        [helper.make_node("Attention", ["x", "x", "x"], ["y"], "attend", q_num_heads=heads, kv_num_heads=heads)],
        {"x": ("N", steps, 2 * size)},
        {"y": ("N", steps, 2 * size)},
        opset=23,
        ir_version=10,
    )
    macs = {
        "lstm": 2 * steps * 4 * hidden * (size + hidden),
        "sum": steps * size * hidden,
        "attend": 2 * steps * steps * 2 * size,
    }
    for proto, reason in ((lstm, "recurrent"), (einsum, "no integer Einsum"), (attention, "one float kernel")):
        report, _ = measured(proto)
        (op,) = report.ops
        assert (op.integer, op.macs, op.share) == (False, macs[proto.graph.node[-1].name], 1.0)
        assert reason in report.unfused[0].reason


@pytest.mark.parametrize("equation", ["...i,io->...o", "bsi,io"])
def test_an_einsum_whose_indices_are_not_all_named(make_model, equation: str) -> None:
    w = np.ones((5, 3), np.float32)
    node = helper.make_node("Einsum", ["x", "w"], ["y"], "sum", equation=equation)
    report, _ = measured(make_model([node], {"x": ("N", 7, 5)}, {"y": None}, {"w": w}))
    assert report.ops[0].macs == (None if "." in equation else 7 * 5 * 3)
