"""Integer from the first layer to the last: what ONNX Runtime makes of whole networks in the ort-x86 form.

Between the QuantizeLinear at the input and the last layer no float is left but what is named here, with the reason.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from efrapq.data import load_dataset
from efrapq.loading import load
from efrapq.models import zoo
from efrapq.preprocess import Preprocess
from efrapq.verification.session import open_session

# Operators that hand on what they are given, integers or floats.
MOVING = {"Flatten", "NhwcMaxPool", "MaxPool", "Pad", "Reshape", "Resize", "Slice", "Split", "Transpose", "Unsqueeze"}
INTEGER_LAYERS = ("QLinearConv", "QGemm", "QLinearMatMul")
WIDTHS = pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)], ids=lambda b: f"W{b[0]}A{b[1]}")


@dataclass(frozen=True)
class Executed:
    """The graph that ONNX Runtime executes. ops: all operators. floats: those that read or write floats, but for the
    first QuantizeLinear and a last layer that gives the graph's float output.
    """

    ops: Counter[str]
    floats: Counter[str]

    @property
    def layers(self) -> int:
        return sum(self.ops[name] for name in INTEGER_LAYERS)


def executed(proto: onnx.ModelProto) -> Executed:
    graph = open_session(proto.SerializeToString(), threads=1).optimized.graph
    integers: set[str] = set()
    floats: Counter[str] = Counter()
    inputs, outputs = ({v.name for v in values} for values in (graph.input, graph.output))
    for node in graph.node:
        if node.op_type in (*MOVING, "Clip"):
            integer = node.input[0] in integers
        else:
            integer = node.op_type.startswith("QLinear") or node.op_type in ("QGemm", "QuantizeLinear")
        if not integer or (node.op_type == "QuantizeLinear" and node.input[0] not in inputs):
            floats[node.op_type] += 1
        if integer and not (node.op_type in INTEGER_LAYERS and set(node.output) <= outputs):
            integers.update(node.output)
    return Executed(Counter(node.op_type for node in graph.node), floats)


# The networks of the zoo.


@dataclass(frozen=True)
class Case:
    """A small version of a network. layers: convolutions and linear layers. joins: residual additions. pads: by which
    shortcuts without weights add channels.
    """

    name: str
    width: int | float
    layers: int
    joins: int
    pads: int = 0


CASES = [
    Case("resnet20", 4, 20, 9, pads=2),
    Case("resnet18-cifar", 4, 21, 8),
    Case("vgg16-bn-cifar", 1 / 16, 14, 0),
    Case("mobilenetv2-cifar", 1 / 8, 53, 0),
]


@pytest.fixture(scope="module")
def zoo_network() -> Callable[[Case], onnx.ModelProto]:
    """A float network of the zoo with seeded weights; each is made once."""
    cache: dict[str, onnx.ModelProto] = {}

    def get(case: Case) -> onnx.ModelProto:
        if case.name not in cache:
            module = zoo.build(case.name, num_classes=10, in_channels=3, width=case.width, seed=0)
            cache[case.name] = load(module.eval(), input_shape=(3, 32, 32)).proto
        return cache[case.name]

    return get


@WIDTHS
@pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
def test_zoo_networks(zoo_network: Any, quantize: Any, images: Any, case: Case, bits: tuple[int, int]) -> None:
    float_graph = zoo_network(case).graph
    joins = sum(node.op_type == "Add" for node in float_graph.node)
    assert case.joins in (0, joins)
    x = images(4, size=32)
    q = quantize(zoo_network(case), x, bits=bits[0], act_bits=bits[1])
    found = executed(q.export("ort-x86"))
    assert found.layers == case.layers == len(q.layers)
    assert found.ops["QLinearAdd"] == joins
    assert found.ops["QLinearGlobalAveragePool"] == (case.name != "vgg16-bn-cifar")
    assert found.ops["NhwcMaxPool"] == (5 if case.name == "vgg16-bn-cifar" else 0)
    assert found.ops["Pad"] == case.pads
    assert not found.floats


@pytest.mark.shared
@pytest.mark.parametrize("bits", [4, 8])
def test_imagenet_mobilenet(quantize: Any, shared: Path, bits: int) -> None:
    proto = onnx.load(shared / "models" / "imagenet_mobilenet_v2.onnx")
    data = load_dataset(shared / "imagenette", size=(224, 224))
    x = data.inputs([0, 200], Preprocess((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)))
    found = executed(quantize(proto, x, bits=bits).export("ort-x86"))
    assert found.layers == 53
    assert found.ops["QLinearAdd"] == 10
    assert found.ops["QLinearGlobalAveragePool"] == 1
    assert not found.floats
    assert "Clip" not in found.ops


# Blocks of other networks.


def inception(net: Any) -> onnx.ModelProto:
    """Branches that meet in a Concat, one of them through an average pool, one through a max pool."""
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 8), "a1")
    pooled = n.op("AveragePool", a, "average", kernel_shape=[3, 3], pads=[1] * 4)
    peak = n.op("MaxPool", a, "peak", kernel_shape=[3, 3], pads=[1] * 4)
    b = [n.op("Relu", n.conv(v, f"b{i}", 8, 4, 1), f"ab{i}") for i, v in enumerate((a, pooled))]
    c = n.op("Relu", n.conv(n.op("Concat", [*b, peak], "cat", axis=1), "c2", 16, 8), "a2")
    f = n.op("Flatten", n.op("GlobalAveragePool", c, "gap"), "flat")
    return n.model(n.gemm(f, "logits", 8, 5))  # type: ignore[no-any-return]


def dense(net: Any) -> onnx.ModelProto:
    """Two DenseNet layers: BatchNorm before the convolution, whose output joins all that came before."""
    n = net()
    x, channels = n.conv("input", "stem", 3, 8), 8
    for i in (1, 2):
        a = n.op("Relu", n.batchnorm(x, f"bn{i}", channels), f"a{i}")
        x, channels = n.op("Concat", [x, n.conv(a, f"c{i}", channels, 4)], f"cat{i}", axis=1), channels + 4
    t = n.conv(n.op("Relu", n.batchnorm(x, "bnt", channels), "at"), "transition", channels, 8, 1)
    p = n.op("AveragePool", t, "pool", kernel_shape=[2, 2], strides=[2, 2])
    f = n.op("Flatten", n.op("GlobalAveragePool", p, "gap"), "flat")
    return n.model(n.gemm(f, "logits", 8, 5))  # type: ignore[no-any-return]


def squeeze_excite(net: Any) -> onnx.ModelProto:
    """A MobileNet block with SiLU, whose channels are scaled by a gate."""
    n = net()

    def silu(v: str, name: str) -> str:
        return str(n.op("Mul", [v, n.op("Sigmoid", v, f"{name}.gate")], name))

    a = silu(n.conv("input", "c1", 3, 8), "a1")
    b = silu(n.conv(a, "depthwise", 8, 8, group=8), "a2")
    s = silu(n.conv(n.op("GlobalAveragePool", b, "squeeze"), "s1", 8, 4, 1), "as")
    scaled = n.op("Mul", [b, n.op("Sigmoid", n.conv(s, "s2", 4, 8, 1), "gate")], "scaled")
    y = n.op("Add", [n.conv(scaled, "project", 8, 8, 1), a], "sum")
    f = n.op("Flatten", n.op("GlobalAveragePool", y, "gap"), "flat")
    return n.model(n.gemm(f, "logits", 8, 5))  # type: ignore[no-any-return]


def hard_swish(net: Any) -> onnx.ModelProto:
    n = net()
    a = n.conv("input", "c1", 3, 8)
    b = n.op("Mul", [a, n.op("HardSigmoid", a, "gate", alpha=1 / 6, beta=0.5)], "a1")
    f = n.op("Flatten", n.op("GlobalAveragePool", b, "gap"), "flat")
    return n.model(n.gemm(f, "logits", 8, 5))  # type: ignore[no-any-return]


def pyramid(net: Any) -> onnx.ModelProto:
    """A detector's neck: LeakyRelu, a smaller map repeated to the size of a larger one, channels that are split."""
    n = net()
    a = n.op("LeakyRelu", n.conv("input", "c1", 3, 8), "a1", alpha=0.1)
    b = n.op("LeakyRelu", n.conv(a, "c2", 8, 8, strides=[2, 2]), "a2", alpha=0.1)
    scales = n.constant("scales", np.array([1, 1, 2, 2], np.float32))
    up = n.op("Resize", [b, "", scales], "up", coordinate_transformation_mode="asymmetric", nearest_mode="floor")
    sizes = n.constant("sizes", np.array([4, 4]))
    n.nodes.append(onnx.helper.make_node("Split", [up, sizes], ["left", "right"], name="split", axis=1))
    cat = n.op("Concat", [a, "left", n.conv("right", "c3", 4, 4, 1)], "cat", axis=1)
    f = n.op("Flatten", n.op("GlobalAveragePool", n.conv(cat, "c4", 16, 8, 1), "gap"), "flat")
    return n.model(n.gemm(f, "logits", 8, 5))  # type: ignore[no-any-return]


def convnext(net: Any) -> onnx.ModelProto:
    """A 7×7 depthwise convolution, LayerNormalization, two linear layers with Gelu between, a scale, a shortcut."""
    n = net()
    rng = np.random.default_rng(1)
    x = n.conv("input", "stem", 3, 8, 2, strides=[2, 2], pads=[0] * 4)
    d = n.op("Transpose", n.conv(x, "depthwise", 8, 8, 7, group=8), "last", perm=[0, 2, 3, 1])
    gains = [n.constant(f"norm.{k}", rng.uniform(0.5, 1.5, 8).astype(np.float32)) for k in ("weight", "bias")]
    y = n.op("LayerNormalization", [d, *gains], "norm", axis=-1)
    w1, w2 = (n.constant(f"w{i}", n.weight(*s, fan_in=s[0])) for i, s in ((1, (8, 32)), (2, (32, 8))))
    y = n.op("Add", [n.op("MatMul", [y, w1], "m1"), n.constant("b1", n.weight(32, fan_in=8))], "h1")
    half, one, root = (n.constant(k, np.array(v, np.float32)) for k, v in (("half", 0.5), ("one", 1), ("root", 2**0.5)))
    e = n.op("Add", [n.op("Erf", n.op("Div", [y, root], "ratio"), "erf"), one], "more")
    y = n.op("Mul", [n.op("Mul", [y, e], "product"), half], "gelu")
    y = n.op("Add", [n.op("MatMul", [y, w2], "m2"), n.constant("b2", n.weight(8, fan_in=8))], "h2")
    y = n.op("Mul", [y, n.constant("gamma", rng.uniform(0.1, 1, 8).astype(np.float32))], "scaled")
    y = n.op("Add", [n.op("Transpose", y, "first", perm=[0, 3, 1, 2]), x], "sum")
    f = n.op("Flatten", n.op("GlobalAveragePool", y, "gap"), "flat")
    return n.model(n.gemm(f, "logits", 8, 5))  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    ("build", "integer", "floats"),
    [
        (inception, {"QLinearConcat": 1, "QLinearAveragePool": 1, "QLinearConv": 4}, {}),
        (
            dense,
            {"QLinearConcat": 2, "QLinearAveragePool": 1, "QLinearConv": 4},
            # A BatchNormalization before its convolution cannot be folded, and has no integer kernel.
            {"BatchNormalization": 3, "DequantizeLinear": 3, "QuantizeLinear": 3},
        ),
        (squeeze_excite, {"QLinearSigmoid": 4, "QLinearMul": 4, "QLinearAdd": 1, "QLinearConv": 5}, {}),
        # No integer kernel, and its product would have one float input.
        (hard_swish, {"QLinearConv": 1}, {"HardSigmoid": 1, "Mul": 1, "DequantizeLinear": 2, "QuantizeLinear": 1}),
        (pyramid, {"QLinearLeakyRelu": 2, "QLinearConcat": 1, "Resize": 1, "Split": 1, "QLinearConv": 4}, {}),
    ],
    ids=lambda v: getattr(v, "__name__", ""),
)
def test_blocks(
    net: Any, quantize: Any, images: Any, run_ort: Any, build: Any, integer: dict[str, int], floats: dict[str, int]
) -> None:
    x = images(24)
    q = quantize(build(net), x)
    proto = q.export("ort-x86")
    found = executed(proto)
    assert {op: found.ops[op] for op in integer} == integer
    assert dict(found.floats) == floats
    close_to_solved(q, run_ort(proto, x)[0])


def test_convnext_block(net: Any, quantize: Any, images: Any, run_ort: Any) -> None:
    """Its layers run on integers; normalization, Gelu, biases behind a MatMul, the scale and the sum of what it scales
    and the block's input are float operators.
    """
    x = images(24)
    q = quantize(convnext(net), x)
    proto = q.export("ort-x86")
    found = executed(proto)
    assert found.layers == 5
    assert not {"Conv", "FusedConv", "Gemm", "FusedGemm", "MatMul", "FusedMatMul"} & found.ops.keys()
    assert found.ops["QLinearAdd"] == 0
    assert not {"m1", "h1", "m2", "h2", "scaled"} & q.solved.activations.keys()
    float_operators = set(found.floats) - {"QuantizeLinear", "DequantizeLinear"} - MOVING
    assert float_operators <= {"LayerNormalization", "Gelu", "BiasGelu", "Div", "Erf", "Add", "Mul"}
    assert "LayerNormalization" in float_operators
    close_to_solved(q, run_ort(proto, x)[0])


def close_to_solved(q: Any, output: NDArray[np.float32]) -> None:
    """The runtime computes what the pass computed, to within steps of rounding that go either way."""
    step = q.solved.activations[q.layers[-1].input].scale
    reach = step * np.abs(q.solved.weights[q.layers[-1].name].dequantized()).sum(axis=1).max()
    difference = np.abs(output - q.output)
    assert np.median(difference) <= reach / 8
    assert difference.max() <= 2 * reach
