"""Models that ONNX Runtime saved after its own optimizations: the same layers as before them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

import efrapq
from efrapq.errors import UnsupportedModelError
from efrapq.graph.layers import find_layers, weight_array
from efrapq.graph.prepare import prepare
from efrapq.graph.unfuse import DOMAIN, unfuse

FLOAT = TensorProto.FLOAT


def saved_by_the_runtime(proto: onnx.ModelProto, folder: Path) -> onnx.ModelProto:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_EXTENDED
    options.optimized_model_filepath = str(folder / "optimized.onnx")
    ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return onnx.load(folder / "optimized.onnx")


def model(
    nodes: list[onnx.NodeProto],
    shape: tuple[int | str, ...],
    constants: dict[str, NDArray[Any]],
    opset: int = 17,
    rank: int = 4,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", FLOAT, list(shape))],
        [helper.make_tensor_value_info("y", FLOAT, ["a", "b", "c", "d"][:rank])],
        [numpy_helper.from_array(array, name) for name, array in constants.items()],
    )
    imports = [helper.make_opsetid("", opset), helper.make_opsetid(DOMAIN, 1)]
    return helper.make_model(graph, opset_imports=imports, ir_version=8)


def run(proto: onnx.ModelProto, x: NDArray[Any]) -> NDArray[Any]:
    options = ort.SessionOptions()
    options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return np.asarray(session.run(None, {"x": x})[0])


def seeded(*shape: int, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng([seed, *shape]).standard_normal(shape).astype(np.float32)


def taken_apart(proto: onnx.ModelProto, x: NDArray[Any]) -> list[str]:
    """The operators after `unfuse`, which compute what they did before."""
    before = proto.SerializeToString()
    plain = unfuse(proto)
    assert proto.SerializeToString() == before
    np.testing.assert_allclose(run(plain, x), run(proto, x), rtol=1e-5, atol=1e-5)
    prepared = ir.to_proto(prepare(proto))
    np.testing.assert_allclose(run(prepared, x), run(proto, x), rtol=1e-5, atol=1e-5)
    return [node.op_type for node in plain.graph.node]


def layers_of(proto: onnx.ModelProto) -> Counter[tuple[str, bytes]]:
    graph = prepare(proto).graph
    return Counter((layer.op_type, weight_array(graph, layer).tobytes()) for layer in find_layers(graph)[0])


def test_a_convolutional_network_has_the_layers_that_it_had(residual_net: Any, images: Any, tmp_path: Path) -> None:
    saved = saved_by_the_runtime(residual_net(), tmp_path)
    assert any(node.op_type == "FusedConv" for node in saved.graph.node)
    plain = unfuse(saved)
    assert {opset.domain for opset in plain.opset_import if opset.domain == DOMAIN} == set()
    x = images(4)
    session = ort.InferenceSession(residual_net().SerializeToString(), providers=["CPUExecutionProvider"])
    expected = np.asarray(session.run(None, {"input": x})[0])
    runs = ort.InferenceSession(ir.to_proto(prepare(saved)).SerializeToString(), providers=["CPUExecutionProvider"])
    np.testing.assert_allclose(runs.run(None, {"input": x})[0], expected, rtol=1e-4, atol=1e-5)
    kinds = Counter(op for op, _ in layers_of(saved).elements())
    assert kinds == Counter(op for op, _ in layers_of(residual_net()).elements()) == {"Conv": 3, "Gemm": 1}
    assert not find_layers(prepare(saved).graph)[1]


def test_it_is_defended_and_verified_like_any_other(residual_net: Any, images: Any, tmp_path: Path) -> None:
    path, out, npz = tmp_path / "saved.onnx", tmp_path / "out.onnx", tmp_path / "images.npz"
    onnx.save(saved_by_the_runtime(residual_net(), tmp_path), path)
    np.savez(npz, x=images(64), y=np.arange(64) % 5)
    made = efrapq.defend(path, out, bits=4, calib=npz)
    assert made.evidence["float"] == []
    assert len(made.evidence["layers"]) == 4
    found = efrapq.verify(out, data=npz).document
    assert (found["verdict"], found["codes"]["match"]) == ("pass", True)
    assert (found["kernels"]["integer"], found["kernels"]["float"]) == (4, 0)


@pytest.mark.parametrize(
    ("activation", "parameters"),
    [
        ("", []),
        ("Relu", []),
        ("Tanh", []),
        ("Sigmoid", []),
        ("LeakyRelu", [0.2]),
        ("HardSigmoid", [0.3, 0.4]),
        ("Clip", [-0.5, 0.5]),
    ],
)
@pytest.mark.parametrize("opset", [10, 17])
def test_a_convolution_with_its_activation(activation: str, parameters: list[float], opset: int) -> None:
    given: dict[str, Any] = {"activation": activation} if activation else {}
    if parameters:
        given["activation_params"] = parameters
    fused = helper.make_node(
        "FusedConv", ["x", "w", "b"], ["y"], "first", domain=DOMAIN, pads=[1] * 4, strides=[2, 2], **given
    )
    proto = model([fused], ("N", 3, 8, 8), {"w": seeded(4, 3, 3, 3), "b": seeded(4)}, opset)
    if activation == "Clip" and opset < 11:
        plain = unfuse(proto)  # its numbers are attributes, which the runtime's own operator has in no opset
        assert [n.op_type for n in plain.graph.node] == ["Conv", "Clip"]
        assert {a.name: round(a.f, 3) for a in plain.graph.node[1].attribute} == {"min": -0.5, "max": 0.5}
        return
    assert taken_apart(proto, seeded(2, 3, 8, 8)) == ["Conv", activation] if activation else ["Conv"]


def test_a_convolution_with_a_sum_in_it() -> None:
    nodes = [
        helper.make_node("Conv", ["x", "v"], ["z"]),
        helper.make_node("FusedConv", ["x", "w", "", "z"], ["y"], domain=DOMAIN, activation="Relu"),
    ]
    proto = model(nodes, ("N", 3, 8, 8), {"v": seeded(4, 3, 3, 3, seed=1), "w": seeded(4, 3, 3, 3)})
    assert taken_apart(proto, seeded(2, 3, 8, 8)) == ["Conv", "Conv", "Add", "Relu"]
    layers, left = find_layers(prepare(proto).graph)
    assert [layer.op_type for layer in layers] == ["Conv", "Conv"]
    assert left == []


def test_a_product_with_its_activation() -> None:
    fused = helper.make_node(
        "FusedGemm",
        ["x", "w", "b"],
        ["y"],
        domain=DOMAIN,
        transB=1,
        alpha=0.5,
        activation="LeakyRelu",
        activation_alpha=0.1,
    )
    proto = model([fused], ("N", 6), {"w": seeded(4, 6), "b": seeded(4)}, rank=2)
    assert taken_apart(proto, seeded(3, 6)) == ["Gemm", "LeakyRelu"]
    assert [layer.op_type for layer in find_layers(prepare(proto).graph)[0]] == ["Gemm"]


@pytest.mark.parametrize("left", [0, 1])
@pytest.mark.parametrize("right", [0, 1])
def test_a_scaled_and_transposed_product(left: int, right: int) -> None:
    fused = helper.make_node("FusedMatMul", ["x", "w"], ["y"], domain=DOMAIN, transA=left, transB=right, alpha=0.25)
    shape = ("N", 6, 3) if left else ("N", 3, 6)
    proto = model([fused], shape, {"w": seeded(4, 6) if right else seeded(6, 4)}, rank=3)
    made = taken_apart(proto, seeded(2, 6, 3) if left else seeded(2, 3, 6))
    assert Counter(made) == Counter(["MatMul", "Mul"] + ["Transpose"] * (left + right))
    assert [layer.op_type for layer in find_layers(prepare(proto).graph)[0]] == ["MatMul"]


def attention(*, bias: bool = True, mask: NDArray[Any] | None = None, **attributes: Any) -> onnx.ModelProto:
    sizes = attributes.get("qkv_hidden_sizes", [8, 8, 8])
    constants = {"w": seeded(8, sum(sizes)), "b": seeded(sum(sizes))}
    inputs = ["x", "w", "b" if bias else ""]
    if mask is not None:
        constants["mask"] = mask
        inputs.append("mask")
    node = helper.make_node("Attention", inputs, ["y"], "attend", domain=DOMAIN, num_heads=2, **attributes)
    return model([node], (2, 5, 8), constants, rank=3)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"mask": np.array([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0]], np.int32)},
        {"unidirectional": 1},
        {"scale": 0.1},
        {"qkv_hidden_sizes": [4, 4, 6]},
    ],
    ids=["plain", "mask", "unidirectional", "scale", "three widths"],
)
def test_attention_gives_up_its_projections(options: dict[str, Any]) -> None:
    proto = attention(**options)
    made = taken_apart(proto, seeded(2, 5, 8))
    assert made == ["MatMul", "Add", "Split", "MultiHeadAttention"]
    layers, left = find_layers(prepare(proto).graph)
    assert len(layers) == 1
    assert [node.op_type for node in left] == ["MultiHeadAttention"]


def test_attention_without_a_bias() -> None:
    """Beside one of zeros: ONNX Runtime's own operator crashes without."""
    zeros = attention()
    (bias,) = [t for t in zeros.graph.initializer if t.name == "b"]
    bias.CopyFrom(numpy_helper.from_array(np.zeros(24, np.float32), "b"))
    plain = unfuse(attention(bias=False))
    assert [node.op_type for node in plain.graph.node] == ["MatMul", "Split", "MultiHeadAttention"]
    x = seeded(2, 5, 8)
    np.testing.assert_allclose(run(plain, x), run(zeros, x), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_taken_apart_is_named() -> None:
    """Attention with one length a sample as its mask, which MultiHeadAttention does not take on a CPU."""
    proto = attention(mask=np.array([3, 4], np.int32))
    assert unfuse(proto).graph.node[0].op_type == "Attention"
    layers, left = find_layers(prepare(proto).graph)
    assert layers == []
    assert [(node.node_name, node.op_type) for node in left] == [("attend", "Attention")]
    assert "com.microsoft" in left[0].reason


def test_an_unknown_activation_is_left_alone() -> None:
    node = helper.make_node("FusedConv", ["x", "w"], ["y"], "c", domain=DOMAIN, activation="Mystery")
    proto = model([node], ("N", 3, 8, 8), {"w": seeded(4, 3, 3, 3)})
    assert unfuse(proto).graph.node[0].op_type == "FusedConv"


def test_a_model_without_any_is_left_alone(residual_net: Callable[..., onnx.ModelProto]) -> None:
    proto = residual_net()
    assert unfuse(proto) is proto


def test_a_graph_for_one_kind_of_cpu_is_refused(tmp_path: Path) -> None:
    """Its convolutions are in blocks of channels, of as many as the CPU's registers hold."""
    node = helper.make_node("Conv", ["x", "w"], ["y"], domain="com.microsoft.nchwc")
    proto = model([node], ("N", 3, 8, 8), {"w": seeded(8, 3, 3, 3)})
    proto.opset_import.append(helper.make_opsetid("com.microsoft.nchwc", 1))
    onnx.save(proto, tmp_path / "blocks.onnx")
    with pytest.raises(UnsupportedModelError, match=r"saved by ONNX Runtime .* give the model that it was made from"):
        efrapq.load(tmp_path / "blocks.onnx")
