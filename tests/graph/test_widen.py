"""Models in half precision: the numbers of their weights, what they take and give, and the whole path."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import AttributeProto, TensorProto, helper, numpy_helper

import efrapq
import efrapq.io.onnx_file as onnx_file
from efrapq.calibration.signature import model_inputs
from efrapq.errors import DataError, UsageError
from efrapq.exporters import read_quantized
from efrapq.graph.layers import find_layers
from efrapq.graph.prepare import prepare
from efrapq.graph.widen import halves, widen
from efrapq.inspection import inspect
from efrapq.io import Limits
from efrapq.loading import load

KINDS = {"float16": (TensorProto.FLOAT16, np.float16), "bfloat16": (TensorProto.BFLOAT16, ml_dtypes.bfloat16)}
EVERY_TARGET = ("ort-x86", "ort-arm", "tensorrt", "openvino", "qnn", "portable")


def halved(proto: onnx.ModelProto, kind: str = "float16", *, keep_io: bool = False) -> onnx.ModelProto:
    """The model as converters to half precision write it, without a word of the code under test.

    keep_io: what it takes and gives stays float32.
    """
    code, dtype = KINDS[kind]
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    graph = copy.graph

    def tensor(held: TensorProto) -> None:
        if held.data_type == TensorProto.FLOAT:
            held.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(held).astype(dtype), held.name))

    def inside(graph: onnx.GraphProto) -> None:
        for held in graph.initializer:
            tensor(held)
        for value in (*graph.input, *graph.output, *graph.value_info):
            if value.type.tensor_type.elem_type == TensorProto.FLOAT:
                value.type.tensor_type.elem_type = code
        for node in graph.node:
            for attribute in node.attribute:
                if attribute.type == AttributeProto.TENSOR:
                    tensor(attribute.t)
                elif attribute.type == AttributeProto.GRAPH:
                    inside(attribute.g)
                elif node.op_type == "Cast" and attribute.i == TensorProto.FLOAT:
                    attribute.i = code

    inside(graph)
    if keep_io:
        given, made = graph.input[0], graph.output[0]
        for node in graph.node:
            node.input[:] = ["half_in" if name == given.name else name for name in node.input]
            node.output[:] = ["half_out" if name == made.name else name for name in node.output]
        graph.node.insert(0, helper.make_node("Cast", [given.name], ["half_in"], to=code))
        graph.node.append(helper.make_node("Cast", ["half_out"], [made.name], to=TensorProto.FLOAT))
        for value in (given, made):
            value.type.tensor_type.elem_type = TensorProto.FLOAT
    return copy


def rounded(proto: onnx.ModelProto, kind: str) -> onnx.ModelProto:
    """The float32 model with the weights that its half-precision form has."""
    copy = onnx.ModelProto()
    copy.CopyFrom(proto)
    for held in copy.graph.initializer:
        if held.data_type == TensorProto.FLOAT:
            array = numpy_helper.to_array(held).astype(KINDS[kind][1]).astype(np.float32)
            held.CopyFrom(numpy_helper.from_array(array, held.name))
    return copy


def types(values: Any) -> list[int]:
    return [value.type.tensor_type.elem_type for value in values]


def run(proto: onnx.ModelProto, x: NDArray[Any]) -> NDArray[Any]:
    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {session.get_inputs()[0].name: x})[0])


@pytest.mark.parametrize("keep_io", [False, True], ids=["half in and out", "float in and out"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_widened_model_is_the_float32_model_with_rounded_weights(
    residual_net: Callable[..., onnx.ModelProto], images: Any, kind: str, keep_io: bool
) -> None:
    float32 = residual_net()
    half = halved(float32, kind, keep_io=keep_io)
    before = half.SerializeToString()
    assert halves(half) == [kind]
    wide = widen(half)
    assert half.SerializeToString() == before
    onnx.checker.check_model(wide, full_check=True)
    x = images(4).astype(np.float16)
    calls_in_half = kind == "float16" and not keep_io
    expected = run(rounded(float32, kind), x.astype(np.float32))
    actual = run(wide, x if calls_in_half else x.astype(np.float32))
    if calls_in_half:
        assert actual.dtype == np.float16
        np.testing.assert_array_equal(actual, expected.astype(np.float16))
    else:
        np.testing.assert_array_equal(actual, expected)


def test_a_model_of_float32_is_left_alone(residual_net: Callable[..., onnx.ModelProto]) -> None:
    proto = residual_net()
    assert halves(proto) == []
    assert widen(proto) is proto


@pytest.mark.parametrize("kind", KINDS)
def test_prepared_weights_are_exactly_those_of_the_file(
    residual_net: Callable[..., onnx.ModelProto], kind: str
) -> None:
    """Folding BatchNorm included: it is computed on the widened numbers, in float64."""
    half = prepare(halved(residual_net(), kind)).graph
    single = prepare(rounded(residual_net(), kind)).graph
    constants = {name: value.const_value.numpy() for name, value in single.initializers.items()}  # type: ignore[union-attr]
    found = {name: value.const_value.numpy() for name, value in half.initializers.items()}  # type: ignore[union-attr]
    assert found.keys() == constants.keys()
    for name, array in constants.items():
        np.testing.assert_array_equal(found[name], array, name)


def test_types_in_attributes_and_subgraphs_are_widened(foreign: Callable[..., onnx.ModelProto]) -> None:
    """A Cast, a Constant, a ConstantOfShape, and a branch that captures a half-precision value from outside."""
    single = foreign(
        """
        m (float[N, 4] x) => (float[N, 4] y) {
            c = Constant <value = float[4] {1.0, 2.0, 3.0, 4.0}> ()
            s = Shape (x)
            z = ConstantOfShape <value = float[1] {0.5}> (s)
            i = Cast <to = 6> (x)
            h = Cast <to = 1> (i)
            a = Add (h, c)
            b = Add (a, z)
            t = Constant <value = bool {1}> ()
            d = If (t) <
                then_branch = t_g () => (float[N, 4] u) { u = Mul (b, c) },
                else_branch = e_g () => (float[N, 4] v) { v = Sub (b, c) }
            >
            w = Constant <value = float[4, 4] {1.,0.,0.,0., 0.,1.,0.,0., 0.,0.,1.,0., 0.,0.,0.,1.}> ()
            y = MatMul (d, w)
        }
        """
    )
    proto = halved(single)
    wide = widen(proto)
    assert (types(wide.graph.input), types(wide.graph.output)) == ([TensorProto.FLOAT16], [TensorProto.FLOAT16])
    x = np.array([[1.5, -2.5, 3.0, 0.25]], np.float16)
    expected = (np.trunc(x) + [1, 2, 3, 4] + 0.5) * [1, 2, 3, 4]
    np.testing.assert_array_equal(run(wide, x), expected.astype(np.float16))
    held = [n for n in wide.graph.node if n.op_type == "Cast" and n.attribute[0].i == TensorProto.FLOAT16]
    assert [n.output[0] for n in held] == ["y"]  # only what gives the output out
    layers, _ = find_layers(prepare(proto).graph)
    assert [layer.op_type for layer in layers] == ["MatMul"]


def test_inputs_and_constants_that_are_outputs_too(foreign: Callable[..., onnx.ModelProto]) -> None:
    proto = foreign(
        "m (float16[N, 2] x) => (float16[N, 2] x, float16[2] c, float16[N, 2] y, float16[N, 2] y) {y = Add (x, c)}"
    )
    proto.graph.initializer.append(numpy_helper.from_array(np.array([1, 2], np.float16), "c"))
    wide = widen(proto)
    x = np.array([[3, 4]], np.float16)
    session = ort.InferenceSession(wide.SerializeToString(), providers=["CPUExecutionProvider"])
    found = session.run(None, {"x": x})
    assert [array.dtype for array in found] == [np.float16] * 4
    for array, expected in zip(found, (x, [1, 2], [[4, 6]], [[4, 6]]), strict=True):
        np.testing.assert_array_equal(array, expected)


def test_a_sequence_in_between_is_widened(foreign: Callable[..., onnx.ModelProto]) -> None:
    proto = foreign(
        """
        m (float16[N, 4] x) => (float16[M, 4] y) {
            e = SequenceEmpty <dtype = 10> ()
            s = SequenceInsert (e, x)
            t = SequenceInsert (s, x)
            y = ConcatFromSequence <axis = 0> (t)
        }
        """
    )
    inferred = onnx.shape_inference.infer_shapes(proto)
    x = np.array([[3, 4, 5, 6]], np.float16)
    np.testing.assert_array_equal(run(widen(inferred), x), np.concatenate([x, x]))


@pytest.mark.parametrize("kind", KINDS)
def test_defended_verified_and_exported(
    residual_net: Callable[..., onnx.ModelProto], images: Any, tmp_path: Path, kind: str
) -> None:
    path, out, npz = tmp_path / "half.onnx", tmp_path / "out.onnx", tmp_path / "images.npz"
    onnx.save(halved(residual_net(), kind), path)
    np.savez(npz, x=images(64), y=np.arange(64) % 5)
    inspected = inspect(path)
    assert inspected["layers"], inspected["float"]
    assert any(kind in note for note in inspected["notes"])
    made = efrapq.defend(path, out, bits=8, calib=npz)
    assert not made.evidence["float"]
    outside = TensorProto.FLOAT16 if kind == "float16" else TensorProto.FLOAT
    written = onnx.load(out)
    assert (types(written.graph.input), types(written.graph.output)) == ([outside], [outside])
    found = efrapq.verify(out, data=npz).document
    assert found["verdict"] == "pass"
    assert found["codes"]["match"] is True
    assert found["codes"]["compared_with_float"] is True
    assert found["kernels"]["float"] == 0
    assert found["agreement"] >= 95
    assert found["latency_ms"]["float"] is not None
    digest = read_quantized(written).digest
    for target in EVERY_TARGET:
        again = tmp_path / f"{target}.onnx"
        efrapq.export(out, again, target=target)
        assert types(onnx.load(again).graph.input) == [outside]
        assert read_quantized(onnx.load(again)).digest == digest


def test_codes_are_those_of_the_widened_model(
    residual_net: Callable[..., onnx.ModelProto], images: Any, tmp_path: Path
) -> None:
    """On images that float16 holds exactly, half precision and its float32 twin are one problem. It does not hold the
    patches that ranges are stressed with.
    """
    x = {"input": images(32).astype(np.float16).astype(np.float32)}
    half, single = tmp_path / "half.onnx", tmp_path / "single.onnx"
    onnx.save(halved(residual_net()), half)
    onnx.save(rounded(residual_net(), "float16"), single)
    first, second = (efrapq.defend(path, calib=x, stress=False) for path in (half, single))
    assert first.quantized.digest == second.quantized.digest


def test_arrays_by_name_are_taken_and_compared(foreign: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    proto = foreign(
        "m (float[N, 16] a, float[N, 16] b) => (float[N, 8] y) {s = Mul (a, b) y = MatMul (s, w)}", {"w": (16, 8)}
    )
    path, out = tmp_path / "half.onnx", tmp_path / "out.onnx"
    onnx.save(halved(proto), path)
    rng = np.random.default_rng(0)
    arrays = {name: rng.standard_normal((64, 16)).astype(np.float32) for name in ("a", "b")}
    efrapq.defend(path, out, bits=8, calib=arrays)
    assert [given.dtype for given in model_inputs(onnx.load(out), "out")] == [np.float16, np.float16]
    found = efrapq.verify(out, data=arrays).document
    assert found["codes"]["match"] is True
    assert found["verdict"] == "pass"


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_stay_in_their_file(
    residual_net: Callable[..., onnx.ModelProto],
    images: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    kind: str,
) -> None:
    proto = halved(residual_net(), kind)
    inside, beside, npz = tmp_path / "inside.onnx", tmp_path / "beside.onnx", tmp_path / "images.npz"
    onnx.save(proto, inside)
    np.savez(npz, x=images(32), y=np.arange(32) % 5)
    expected = efrapq.defend(inside, tmp_path / "a.onnx", bits=8, calib=npz)
    onnx.save(proto, beside, save_as_external_data=True, location="data", size_threshold=0)
    monkeypatch.setattr(onnx_file, "Limits", partial(Limits, max_inline_bytes=1, min_outside_bytes=100))
    assert load(beside).outside
    made = efrapq.defend(beside, tmp_path / "b.onnx", bits=8, calib=npz)
    assert made.quantized.digest == expected.quantized.digest
    assert efrapq.verify(tmp_path / "b.onnx", data=npz).document["codes"]["match"] is True


def test_without_data_inputs_are_made_for_a_half_precision_model(
    residual_net: Callable[..., onnx.ModelProto], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from efrapq.calibration.datafree import DataFree

    monkeypatch.setattr(DataFree, "images", 8)
    monkeypatch.setattr(DataFree, "steps", 2)
    path = tmp_path / "half.onnx"
    onnx.save(halved(residual_net()), path)
    made = efrapq.defend(path, bits=8)
    assert made.evidence["calibration"]["kind"] == "batchnorm-statistics"


def test_without_data_arrays_are_asked_for(foreign: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    path = tmp_path / "half.onnx"
    proto = foreign(
        "m (float[N, 8] a, float[N, 8] b) => (float[N, 4] y) {s = Mul (a, b) y = MatMul (s, w)}", {"w": (8, 4)}
    )
    onnx.save(halved(proto), path)
    with pytest.raises(DataError, match=r"one array per input, .*'a' float16 \(N, 8\)"):
        efrapq.defend(path)


def test_images_are_for_half_precision_models_too(residual_net: Callable[..., onnx.ModelProto], tmp_path: Path) -> None:
    """What makes a model one of images is what it takes, whatever its width."""
    path = tmp_path / "half.onnx"
    onnx.save(halved(residual_net()), path)
    with pytest.raises(UsageError, match="arrays are taken as the model's inputs"):
        efrapq.defend(
            path, calib={"input": np.zeros((8, 3, 8, 8), np.float32)}, preprocess=efrapq.preprocess.Preprocess()
        )
