"""What travels with a model: names, metadata, external data, several outputs, dynamic sizes, other layouts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

import efrapq
from efrapq.data import Dataset
from efrapq.errors import EfrapqError, UnsupportedModelError

F32 = np.float32
PLAIN = """
net (float[N,3,8,8] x) => (float[N,5] y)
{
    c = Conv <pads=[1,1,1,1]> (x, w1, b1)
    n = BatchNormalization (c, bn_s, bn_b, bn_m, bn_v)
    r = Relu (n)
    p = GlobalAveragePool (r)
    f = Flatten (p)
    y = Gemm <transB=1> (f, fc, fcb)
}
"""
PLAIN_WEIGHTS: dict[str, Any] = {"w1": (4, 3, 3, 3), "b1": (4,), "bn": 4, "fc": (5, 4), "fcb": (5,)}


@pytest.fixture
def plain(foreign: Any) -> onnx.ModelProto:
    return foreign(PLAIN, PLAIN_WEIGHTS)


def renamed(proto: onnx.ModelProto, how: Any) -> onnx.ModelProto:
    """Every value and node under another name."""
    for node in proto.graph.node:
        node.input[:] = [how(n) if n else "" for n in node.input]
        node.output[:] = [how(n) for n in node.output]
        node.name = how(node.op_type)
    for value in [*proto.graph.input, *proto.graph.output, *proto.graph.initializer]:
        value.name = how(value.name)
    return proto


@pytest.mark.parametrize(
    "how",
    [
        lambda n: f"/model/layers.0/{n}",
        lambda n: f"{n}:0",
        lambda n: f"StatefulPartitionedCall/{n}/conv 2d (1)",
        lambda n: f"模型.{n}.é",
        lambda n: f"{n}.codes",
        lambda n: f" {n} ",
        lambda n: f"[bold]{n}</script>",
    ],
    ids=["slashes", "colons", "spaces", "other scripts", "our own suffix", "padded", "markup"],
)
def test_names(plain: onnx.ModelProto, defended: Any, images: Any, how: Any) -> None:
    result = defended(renamed(plain, how), images(24))
    assert result.kinds == {"Conv": 1, "Gemm": 1}
    assert result.layers.keys() == {how("Conv"), how("Gemm")}


def test_nodes_without_names(plain: onnx.ModelProto, defended: Any, images: Any) -> None:
    for node in plain.graph.node:
        node.name = ""
    assert defended(plain, images(24)).kinds == {"Conv": 1, "Gemm": 1}


def test_metadata_is_kept_and_no_path_of_the_exporter_is(plain: onnx.ModelProto, defended: Any, images: Any) -> None:
    helper.set_model_props(plain, {"labels": '["cat", "dog"]', "author": "a: b\nc", "": "empty key"})
    plain.doc_string = "A plain network, licensed as Apache-2.0"
    plain.graph.doc_string = "/home/somebody/net.py"
    plain.graph.node[0].doc_string = "/home/somebody/net.py:12"
    plain.producer_name, plain.domain, plain.model_version = "pytorch", "ai.example", 7
    result = defended(plain, images(24))
    assert b"somebody" not in result.made.data
    assert result.proto.doc_string == plain.doc_string
    assert (result.proto.domain, result.proto.model_version) == ("ai.example", 7)


def test_external_data(plain: onnx.ModelProto, defended: Any, images: Any, tmp_path: Path) -> None:
    (tmp_path / "outside").mkdir()
    path = tmp_path / "outside" / "net.onnx"
    inside = defended(plain, images(24))
    onnx.save(plain, path, save_as_external_data=True, location="net.data", size_threshold=0)
    outside = defended(path, images(24))
    assert outside.made.quantized.digest == inside.made.quantized.digest
    assert not any(t.external_data for t in outside.proto.graph.initializer)


def test_several_outputs_some_of_them_inside(foreign: Any, defended: Any, images: Any) -> None:
    text = """
    net (float[N,3,8,8] x) => (float[N,5] y, float[N,4,8,8] c, float[N,4,8,8] r, int64[N] best, float[N,4] f)
    {
        c = Conv <pads=[1,1,1,1]> (x, w1, b1)
        r = Relu (c)
        d = Conv <pads=[1,1,1,1]> (r, w2)
        p = GlobalAveragePool (d)
        f = Flatten (p)
        y = Gemm <transB=1> (f, fc, fcb)
        best = ArgMax <axis=1, keepdims=0> (y)
    }
    """
    result = defended(foreign(text, PLAIN_WEIGHTS | {"w2": (4, 4, 3, 3)}), images(24))
    assert result.kinds == {"Conv": 2, "Gemm": 1}


def test_two_heads(foreign: Any, defended: Any, images: Any) -> None:
    text = """
    net (float[N,3,8,8] x) => (float[N,4,8,8] mask, float[N,5] y)
    {
        c = Conv <pads=[1,1,1,1]> (x, w1, b1)
        r = Relu (c)
        m = Conv (r, k)
        mask = Sigmoid (m)
        p = GlobalAveragePool (r)
        f = Flatten (p)
        y = Gemm <transB=1> (f, fc, fcb)
    }
    """
    assert defended(foreign(text, PLAIN_WEIGHTS | {"k": (4, 4, 1, 1)}), images(24)).kinds == {"Conv": 2, "Gemm": 1}


@pytest.mark.parametrize("output", ["x", "w1"], ids=["the input", "a weight"])
def test_outputs_that_no_node_makes(plain: onnx.ModelProto, defended: Any, images: Any, output: str) -> None:
    shape = ["N", 3, 8, 8] if output == "x" else [4, 3, 3, 3]
    plain.graph.output.append(helper.make_tensor_value_info(output, TensorProto.FLOAT, shape))
    assert defended(plain, images(24)).kinds == {"Conv": 1, "Gemm": 1}


def test_dynamic_sizes(foreign: Any, defended: Any, images: Any) -> None:
    text = """
    net (float[batch,3,height,width] x) => (float[batch,5] y, float[batch,4,h2,w2] t)
    {
        c = Conv <pads=[1,1,1,1], strides=[2,2]> (x, w1, b1)
        r = Relu (c)
        s = Shape (x)
        hw = Slice (s, two, four)
        n = Slice (s, zero, one)
        four4 = Concat <axis=0> (n, ch, hw)
        u = Resize <mode="nearest"> (r, , , four4)
        t = Conv <pads=[1,1,1,1]> (u, w2)
        p = GlobalAveragePool (t)
        f = Flatten (p)
        y = Gemm <transB=1> (f, fc, fcb)
    }
    """
    extra = {"w2": (4, 4, 3, 3)} | {
        k: np.array([v]) for k, v in (("zero", 0), ("one", 1), ("two", 2), ("four", 4), ("ch", 4))
    }
    proto = foreign(text, PLAIN_WEIGHTS | extra)
    result = defended(proto, images(24))
    x = images(2, size=13)[..., :11]
    for name, reference in run(proto, x).items():
        assert sqnr(reference, run(result.proto, x)[name]) > 15


def run(proto: onnx.ModelProto, x: Any) -> dict[str, Any]:
    import onnxruntime as ort

    session = ort.InferenceSession(proto.SerializeToString(), providers=["CPUExecutionProvider"])
    return dict(
        zip([o.name for o in session.get_outputs()], session.run(None, {session.get_inputs()[0].name: x}), strict=True)
    )


def sqnr(reference: Any, actual: Any) -> float:
    return float(10 * np.log10(np.square(reference - reference.mean()).sum() / np.square(reference - actual).sum()))


def test_a_fixed_batch(foreign: Any, defended: Any, images: Any) -> None:
    proto = foreign(PLAIN.replace("N,", "4,"), PLAIN_WEIGHTS)
    assert defended(proto, images(4)).kinds == {"Conv": 1, "Gemm": 1}


def test_dimensions_without_names(foreign: Any, defended: Any, images: Any) -> None:
    proto = foreign(PLAIN.replace("N,", "?,"), PLAIN_WEIGHTS)
    assert defended(proto, images(24)).kinds == {"Conv": 1, "Gemm": 1}


def test_channels_last(foreign: Any, defended: Any, images: Any) -> None:
    text = PLAIN.replace("float[N,3,8,8] x", "float[N,8,8,3] x").replace("(x, w1", "(z, w1")
    text = text.replace("{", "{ z = Transpose <perm=[0,3,1,2]> (x)\n", 1)
    x = np.ascontiguousarray(images(24).transpose(0, 2, 3, 1))
    assert defended(foreign(text, PLAIN_WEIGHTS), x).kinds == {"Conv": 1, "Gemm": 1}


@pytest.mark.parametrize("ir_version", [3, 8])
def test_initializers_that_are_inputs_too(plain: onnx.ModelProto, defended: Any, images: Any, ir_version: int) -> None:
    """IR 3 wants them there; later they are defaults, and a default cannot be replaced once it is codes."""
    plain.ir_version = ir_version
    if ir_version == 3:
        plain.opset_import[0].version = 8
    for tensor in plain.graph.initializer:
        plain.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    assert defended(plain, images(24)).kinds == {"Conv": 1, "Gemm": 1}


def test_a_function_of_the_model_is_put_in_place(defended: Any, images: Any) -> None:
    proto = onnx.parser.parse_model(
        """
        <ir_version: 8, opset_import: ["" : 17, "my.lib" : 1]>
        net (float[N,3,8,8] x) => (float[N,4,8,8] y)
        <float[4,3,1,1] w = {1,0,-1, 2,1,0.5, 0.25,-0.5,1, 1,1,-1}>
        { t = my.lib.block <alpha = 0.1> (x, w)  y = Sigmoid (t) }
        <domain: "my.lib", opset_import: ["" : 17]>
        block <alpha> (a, k) => (b) { c = Conv (a, k)  b = LeakyRelu <alpha: float = @alpha> (c) }
        """
    )
    assert defended(proto, images(24)).kinds == {"Conv": 1}


def test_operators_of_com_microsoft(foreign: Any, defended: Any, images: Any) -> None:
    proto = foreign(PLAIN, PLAIN_WEIGHTS)
    proto.opset_import.append(helper.make_opsetid("com.microsoft", 1))
    proto.graph.node[2].op_type, proto.graph.node[2].domain = "QuickGelu", "com.microsoft"
    assert defended(proto, images(24)).kinds == {"Conv": 1, "Gemm": 1}


def test_the_standard_domain_by_its_other_name(plain: onnx.ModelProto, defended: Any, images: Any) -> None:
    plain.opset_import[0].domain = "ai.onnx"
    for node in plain.graph.node:
        node.domain = "ai.onnx"
    assert defended(plain, images(24)).kinds == {"Conv": 1, "Gemm": 1}


def test_a_sparse_weight(foreign: Any, defended: Any, images: Any) -> None:
    proto = foreign(PLAIN, PLAIN_WEIGHTS)
    (dense,) = [t for t in proto.graph.initializer if t.name == "fc"]
    array = numpy_helper.to_array(dense)
    proto.graph.initializer.remove(dense)
    values = numpy_helper.from_array(array.reshape(-1), "fc")
    indices = numpy_helper.from_array(np.arange(array.size), "")
    proto.graph.sparse_initializer.append(helper.make_sparse_tensor(values, indices, list(array.shape)))
    assert defended(proto, images(24)).kinds == {"Conv": 1, "Gemm": 1}


# What is refused, each in one line that says what to do.


def in_float64(proto: onnx.ModelProto) -> onnx.ModelProto:
    for tensor in proto.graph.initializer:
        tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor).astype(np.float64), tensor.name))
    for value in [*proto.graph.input, *proto.graph.output]:
        value.type.tensor_type.elem_type = onnx.TensorProto.DOUBLE
    return proto


def refusal(proto: onnx.ModelProto, x: Any, tmp_path: Path) -> EfrapqError:
    path = tmp_path / "model.onnx"
    path.write_bytes(proto.SerializeToString())
    with pytest.raises(EfrapqError) as caught:
        efrapq.defend(path, tmp_path / "out.onnx", calib=Dataset.from_arrays(x, None), target="ort-x86")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model.onnx"]
    assert "\n" not in str(caught.value)
    return caught.value


def test_float64(plain: onnx.ModelProto, images: Any, tmp_path: Path) -> None:
    error = refusal(in_float64(plain), images(8), tmp_path)
    assert isinstance(error, UnsupportedModelError)
    assert "float64; networks in float32 are quantized" in str(error)


def test_nothing_to_quantize(foreign: Any, images: Any, tmp_path: Path) -> None:
    error = refusal(foreign("net (float[N,3,8,8] x) => (float[N,3,8,8] y) { y = Relu (x) }", {}), images(8), tmp_path)
    assert "nothing to quantize" in str(error)


def test_random_numbers(foreign: Any, images: Any, tmp_path: Path) -> None:
    text = PLAIN.replace("r = Relu (n)", "z = RandomNormalLike (n)\n r = Add (n, z)")
    error = refusal(foreign(text, PLAIN_WEIGHTS), images(8), tmp_path)
    assert "RandomNormalLike" in str(error)


def test_training_mode(foreign: Any, images: Any, tmp_path: Path) -> None:
    text = PLAIN.replace("BatchNormalization (", "BatchNormalization <training_mode=1> (")
    error = refusal(foreign(text, PLAIN_WEIGHTS), images(8), tmp_path)
    assert "evaluation mode" in str(error)


def test_sequences(foreign: Any, images: Any, tmp_path: Path) -> None:
    text = PLAIN.replace(
        "r = Relu (n)",
        "q = SplitToSequence <axis=1> (n, two)\n z = SequenceAt (q, zero)\n "
        "o = SequenceAt (q, one)\n r = Concat <axis=1> (z, o)",
    )
    extra = {"two": np.array([2, 2]), "zero": np.array(0), "one": np.array(1)}
    refusal(foreign(text, PLAIN_WEIGHTS | extra), images(8), tmp_path)
