"""The kernel report's words, sessions with a fixed batch, and the metrics' definitions."""

from __future__ import annotations

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from efrapq.data import Dataset
from efrapq.errors import DataError, UnsupportedModelError
from efrapq.preprocess import Preprocess
from efrapq.progress import Silent
from efrapq.trigger import parse_trigger
from efrapq.verification.kernels import report_kernels
from efrapq.verification.metrics import (
    Predictions,
    attack_success_rate,
    clean_accuracy,
    predict,
    untriggered_rate,
)
from efrapq.verification.session import interleaved_latency, open_session, try_run


def test_asr_leaves_samples_of_the_target_class_out() -> None:
    labels = np.array([0, 0, 1, 2])
    found = Predictions(np.array([0, 0, 1, 1]), np.array([0, 0, 0, 2]), 3)
    assert clean_accuracy(found, labels) == 75
    assert attack_success_rate(found, labels, 0) == 50
    assert untriggered_rate(found, labels, 0) == 0
    assert untriggered_rate(found, labels, 1) == pytest.approx(100 / 3)
    with pytest.raises(DataError, match="other classes"):
        attack_success_rate(found, np.zeros(4, np.int64), 0)


def test_every_float_kernel_has_its_reason(quantize, residual_net, varied_net, images) -> None:
    made = quantize(residual_net(), images(16))
    portable = report_kernels(open_session(made.export("portable").SerializeToString()).optimized)
    assert portable.float == 2
    assert portable.integer == 2
    assert {u.op for u in portable.unfused} <= {"Conv", "FusedConv"}
    assert all("--target ort-x86" in u.reason for u in portable.unfused)
    fused = report_kernels(open_session(made.export().SerializeToString()).optimized)
    assert (fused.integer, fused.float) == (4, 0)
    weight_only = quantize(residual_net(), images(16), act_bits=32)
    report = report_kernels(open_session(weight_only.export().SerializeToString()).optimized)
    assert report.integer == 0
    assert report.float == len(report.unfused) == 4
    floating = report_kernels(open_session(residual_net().SerializeToString()).optimized)
    assert {u.reason for u in floating.unfused} == {"its weight is float"}
    transposed = report_kernels(open_session(quantize(varied_net(), images(16)).export().SerializeToString()).optimized)
    assert [u.reason for u in transposed.unfused] == ["ONNX Runtime's CPU provider has no integer ConvTranspose"]


def test_a_relu_that_is_not_redundant_is_named_with_the_zero_point(quantize, residual_net, images) -> None:
    """Symmetric grids, as TensorRT wants them, have their zero in the middle: a Relu does work there."""
    made = quantize(residual_net(), images(16), bits=8)
    report = report_kernels(open_session(made.export("tensorrt").SerializeToString()).optimized)
    reasons = {u.reason for u in report.unfused}
    assert any(
        "the Relu between it and QuantizeLinear is not redundant: the output's zero point is" in r for r in reasons
    )


def test_a_clip_that_cuts_into_the_grid_is_named(make_model) -> None:
    constants = {
        "s": np.array(0.05, np.float32), "z": np.array(0, np.uint8), "low": np.array(0, np.float32),
        "high": np.array(1, np.float32), "w": np.ones((4, 4, 1, 1), np.int8), "ws": np.full(4, 0.01, np.float32),
        "wz": np.zeros(4, np.int8),
    }  # fmt: skip
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "s", "z"], ["xq"]),
        helper.make_node("DequantizeLinear", ["xq", "s", "z"], ["xr"]),
        helper.make_node("DequantizeLinear", ["w", "ws", "wz"], ["wr"], axis=0),
        helper.make_node("Conv", ["xr", "wr"], ["c"]),
        helper.make_node("Clip", ["c", "low", "high"], ["r"]),
        helper.make_node("QuantizeLinear", ["r", "s", "z"], ["rq"]),
        helper.make_node("DequantizeLinear", ["rq", "s", "z"], ["y"]),
    ]
    proto = make_model(nodes, {"x": ("N", 4, 2, 2)}, {"y": None}, constants)
    (unfused,) = report_kernels(open_session(proto.SerializeToString()).optimized).unfused
    assert unfused.reason == "the Clip between it and QuantizeLinear is not redundant: it cuts off what the grid holds"


def fixed_batch_model(batch: int) -> bytes:
    weight = np.arange(6, dtype=np.float32).reshape(3, 2)
    graph = helper.make_graph(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["p"]),
            helper.make_node("Flatten", ["p"], ["f"]),
            helper.make_node("MatMul", ["f", "w"], ["y"]),
        ],
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [batch, 3, 4, 4])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [batch, 2])],
        [numpy_helper.from_array(weight, "w")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8)
    return model.SerializeToString()


def test_a_fixed_batch_is_fed_in_pieces() -> None:
    x = np.random.default_rng(0).standard_normal((7, 3, 4, 4)).astype(np.float32)
    session = open_session(fixed_batch_model(3))
    expected = x.mean((2, 3)) @ np.arange(6, dtype=np.float32).reshape(3, 2)
    assert np.abs(session.logits(x) - expected).max() < 1e-5


def test_what_does_not_load_is_one_typed_line() -> None:
    broken = onnx.load_model_from_string(fixed_batch_model(1))
    broken.graph.node[2].op_type = "Gemm"
    broken.graph.node[2].attribute.append(helper.make_attribute("transB", 1))
    with pytest.raises(UnsupportedModelError, match=r"ONNX Runtime does not (load|run)") as caught:
        try_run(broken.SerializeToString(), (1, 3, 4, 4))
    assert "\n" not in str(caught.value)


def test_latency_is_measured_for_each_in_turn() -> None:
    sessions = {name: open_session(fixed_batch_model(1)) for name in ("a", "b")}
    times = interleaved_latency(sessions, np.zeros((1, 3, 4, 4), np.float32), rounds=3, warmup=1)
    assert set(times) == {"a", "b"}
    assert min(times.values()) > 0


def test_latency_of_a_fixed_batch_is_shared_among_its_images(monkeypatch: pytest.MonkeyPatch) -> None:
    from efrapq.verification import session as module

    clock = iter(range(1000))
    monkeypatch.setattr(module.time, "perf_counter", lambda: float(next(clock)))
    session = open_session(fixed_batch_model(4))
    times = interleaved_latency({"a": session}, np.zeros((1, 3, 4, 4), np.float32), rounds=3, warmup=1)
    assert times == {"a": 250.0}
    assert [session.images_run(n) for n in (1, 4, 5)] == [4, 4, 8]


def classifier_with_output(make_model, shape: list[int], *, inputs: int = 1) -> bytes:
    """A model that repeats the mean of each channel over an output of this shape behind the batch."""
    names = ["x", "second"][:inputs]
    proto = make_model(
        [
            helper.make_node("GlobalAveragePool", ["x"], ["p"]),
            helper.make_node("Reshape", ["p", "to"], ["r"]),
            helper.make_node("Expand", ["r", "shape"], ["y"]),
            *(helper.make_node("Identity", [n], [f"{n}_out"]) for n in names[1:]),
        ],
        {n: ["N", 3, 4, 4] for n in names},
        {"y": None} | {f"{n}_out": None for n in names[1:]},
        {
            "to": np.array([0, 3, *[1] * (len(shape) - 1)], np.int64),
            "shape": np.array([1, *shape], np.int64),
        },
    )
    return proto.SerializeToString()


def predict_once(session) -> Predictions:
    data = Dataset.from_arrays(np.zeros((5, 4, 4, 3), np.uint8), None)
    with Silent().task("x", 1) as task:
        return predict(session, data, Preprocess(), None, task, "defended")


def test_a_pooled_output_of_one_by_one_is_a_classifiers(make_model) -> None:
    assert predict_once(open_session(classifier_with_output(make_model, [3, 1, 1]))).classes == 3


def test_an_output_with_places_is_no_classifiers(make_model) -> None:
    session = open_session(classifier_with_output(make_model, [3, 2, 5]))
    with pytest.raises(UnsupportedModelError, match="is not a classifier: its output is N×3×2×5"):
        predict_once(session)


def test_what_fails_while_running_is_one_typed_line(make_model) -> None:
    proto = make_model(
        [helper.make_node("Reshape", ["x", "to"], ["y"], name="\x1b[31mbad")],
        {"x": ["N", 3, 4, 4]},
        {"y": None},
        {"to": np.array([7, 11], np.int64)},
    )
    with pytest.raises(UnsupportedModelError, match="does not run the model on an input of 5×3×4×4") as caught:
        predict_once(open_session(proto.SerializeToString()))
    assert "\n" not in str(caught.value)
    assert "\x1b" not in str(caught.value)


def test_only_one_batch_of_images_goes_in(make_model) -> None:
    two = open_session(classifier_with_output(make_model, [3], inputs=2))
    with pytest.raises(UnsupportedModelError, match="m: has 2 inputs"):
        two.require_images("m")
    flat = make_model([helper.make_node("Relu", ["x"], ["y"])], {"x": ["N", 3]}, {"y": None})
    with pytest.raises(UnsupportedModelError, match="m: its input is not a batch of images"):
        open_session(flat.SerializeToString()).require_images("m")
    open_session(classifier_with_output(make_model, [3])).require_images("m")


def test_predictions_use_the_trigger_on_the_raw_image() -> None:
    images = np.zeros((5, 4, 4, 3), np.uint8)
    data = Dataset.from_arrays(images, np.ones(5, np.int64))
    session = open_session(fixed_batch_model(5))
    with Silent().task("x", 1) as task:
        found = predict(session, data, Preprocess(), parse_trigger("patch:4x4@0,0"), task, "")
    # Black images give equal logits (class 0 by order); white ones favour the second column.
    assert found.clean.tolist() == [0] * 5
    assert found.triggered is not None
    assert found.triggered.tolist() == [1] * 5
    assert found.classes == 2
    small = Dataset.from_arrays(np.zeros((5, 2, 2, 3), np.uint8), None)
    with pytest.raises(DataError, match="model wants"), Silent().task("x", 1) as task:
        predict(session, small, Preprocess(), None, task, "")
