"""Small networks, ONNX Runtime, and the whole path from a float graph to a quantized model, for every test."""

from __future__ import annotations

import hashlib
import os
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper
from safetensors.torch import save
from torch import nn

from efrapq.data import Dataset
from efrapq.exporters import export_model
from efrapq.graph import from_torch
from efrapq.graph.copies import place_copies
from efrapq.graph.layers import Layer, find_layers
from efrapq.graph.placement import Placement
from efrapq.graph.prepare import prepare
from efrapq.graph.quantized import QuantizedModel
from efrapq.models import weights
from efrapq.progress import Silent
from efrapq.rounding import Coordinate, Relaxed
from efrapq.stream import PassSettings, Solved
from efrapq.stream.spool import Spool
from efrapq.stream.walk import Walk

FLOAT_KERNELS = ("Conv", "FusedConv", "ConvTranspose", "Gemm", "FusedGemm", "MatMul", "FusedMatMul", "MatMulNBits")


def pytest_configure() -> None:
    # The tensors are tiny: more threads only wait for one another, and for those of other test workers.
    torch.set_num_threads(1)


@pytest.fixture(scope="session")
def shared() -> Path:
    """The development data folder: EFRAPQ_SHARED, or beside the checkout. Skips where there is none."""
    default = Path(__file__).resolve().parents[2] / "shared" / "data"
    folder = Path(os.environ.get("EFRAPQ_SHARED", default))
    if not folder.is_dir():
        pytest.skip(f"no development data at {folder}; set EFRAPQ_SHARED")
    return folder


@pytest.fixture(scope="session")
def _exports() -> dict[tuple[str, str, tuple[int, ...]], bytes]:
    return {}


@pytest.fixture(scope="module")
def exported_once(_exports: dict[tuple[str, str, tuple[int, ...]], bytes]) -> Iterator[None]:
    """torch's exporter takes seconds, and some tests load one network over and over: the same gives the same graph
    (tests/graph/test_from_torch.py).
    """
    export = from_torch.export_module

    def remembered(module: nn.Module, input_shape: tuple[int, ...]) -> onnx.ModelProto:
        held = {name: tensor.contiguous() for name, tensor in module.state_dict().items()}
        key = repr(module), hashlib.sha256(save(held)).hexdigest(), tuple(input_shape)
        if key not in _exports:
            _exports[key] = export(module, input_shape).SerializeToString()
        return onnx.load_model_from_string(_exports[key])

    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(from_torch, "export_module", remembered)
        yield


@pytest.fixture(scope="session")
def few(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Test data of 300 images, for what does not depend on how many they are."""
    path = tmp_path_factory.mktemp("few") / "few.npz"
    with np.load(weights.SAMPLES) as held:
        np.savez(path, test_images=held["test_images"][:300], test_labels=held["test_labels"][:300])
    return f"{path}:test"


# Building graphs.


def _make_model(
    nodes: Sequence[onnx.NodeProto],
    inputs: dict[str, Sequence[int | str]],
    outputs: dict[str, Sequence[int | str] | None],
    constants: dict[str, NDArray[Any]] | None = None,
    *,
    opset: int = 17,
    ir_version: int = 8,
) -> onnx.ModelProto:
    graph = helper.make_graph(
        list(nodes),
        "net",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, list(s)) for n, s in inputs.items()],
        [
            helper.make_tensor_value_info(n, TensorProto.FLOAT, None if s is None else list(s))
            for n, s in outputs.items()
        ],
        [numpy_helper.from_array(a, n) for n, a in (constants or {}).items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", opset)], ir_version=ir_version)


@pytest.fixture(scope="session")
def make_model() -> Callable[..., onnx.ModelProto]:
    """(nodes, inputs, outputs, constants, opset=17) → ModelProto; shapes may hold dimension names."""
    return _make_model


class Net:
    """A chain of layers with seeded weights, written as readers of ONNX files expect them: BatchNorm unfolded."""

    def __init__(self, seed: int = 0, channels: int = 3, size: int = 8, value: str = "input") -> None:
        self.rng = np.random.default_rng(seed)
        self.shape: tuple[int | str, ...] = ("N", channels, size, size)
        self.input = value
        self.nodes: list[onnx.NodeProto] = []
        self.constants: dict[str, NDArray[Any]] = {}

    def weight(self, *shape: int, fan_in: int) -> NDArray[np.float32]:
        return (self.rng.standard_normal(shape) / np.sqrt(fan_in)).astype(np.float32)

    def op(self, op: str, source: str | Sequence[str], name: str, **attributes: Any) -> str:
        sources = [source] if isinstance(source, str) else list(source)
        self.nodes.append(helper.make_node(op, sources, [name], name=f"node_{name}", **attributes))
        return name

    def constant(self, name: str, data: NDArray[Any]) -> str:
        self.constants[name] = data
        return name

    def conv(
        self, source: str, name: str, inputs: int, outputs: int, k: int = 3, *, bias: bool = True, **attributes: Any
    ) -> str:
        groups = attributes.get("group", 1)
        fan_in = inputs // groups * k * k
        sources = [source, self.constant(f"{name}.weight", self.weight(outputs, inputs // groups, k, k, fan_in=fan_in))]
        if bias:
            sources.append(self.constant(f"{name}.bias", 0.1 * self.weight(outputs, fan_in=1)))
        return self.op("Conv", sources, name, **({"pads": [k // 2] * 4} | attributes))

    def batchnorm(self, source: str, name: str, channels: int) -> str:
        arrays = {
            "scale": self.rng.uniform(-1.5, 1.5, channels),
            "shift": 0.2 * self.rng.standard_normal(channels),
            "mean": 0.2 * self.rng.standard_normal(channels),
            "var": self.rng.uniform(0.5, 2, channels),
        }
        names = [self.constant(f"{name}.{key}", array.astype(np.float32)) for key, array in arrays.items()]
        return self.op("BatchNormalization", [source, *names], name)

    def gemm(self, source: str, name: str, inputs: int, outputs: int, *, trans_b: int = 1) -> str:
        shape = (outputs, inputs) if trans_b else (inputs, outputs)
        weight = self.constant(f"{name}.weight", self.weight(*shape, fan_in=inputs))
        bias = self.constant(f"{name}.bias", 0.1 * self.weight(outputs, fan_in=1))
        return self.op("Gemm", [source, weight, bias], name, transB=trans_b)

    def model(self, output: str, *, opset: int = 17) -> onnx.ModelProto:
        proto = _make_model(self.nodes, {self.input: self.shape}, {output: None}, self.constants, opset=opset)
        inferred = onnx.shape_inference.infer_shapes(proto)
        proto.graph.output[0].CopyFrom(inferred.graph.output[0])
        return proto


@pytest.fixture(scope="session")
def net() -> type[Net]:
    return Net


def _residual_net(seed: int = 0, *, opset: int = 17) -> onnx.ModelProto:
    n = Net(seed)
    a = n.op("Relu", n.batchnorm(n.conv("input", "c1", 3, 8, bias=False), "bn1", 8), "a1")
    b = n.op("Relu", n.batchnorm(n.conv(a, "c2", 8, 8, bias=False), "bn2", 8), "a2")
    c = n.batchnorm(n.conv(b, "c3", 8, 8), "bn3", 8)
    d = n.op("Relu", n.op("Add", [c, a], "sum"), "a3")
    e = n.op("MaxPool", d, "pool", kernel_shape=[2, 2], strides=[2, 2])
    f = n.op("Flatten", n.op("GlobalAveragePool", e, "gap"), "flat")
    return n.model(n.gemm(f, "logits", 8, 5), opset=opset)


def _varied_net(seed: int = 0) -> onnx.ModelProto:
    """Depthwise, dilated, strided with uneven pads, grouped and transposed convolutions, and a MatMul."""
    n = Net(seed)
    a = n.op("Relu", n.conv("input", "stem", 3, 8, strides=[2, 2], pads=[0, 1, 1, 0]), "a1")
    b = n.op("Relu", n.conv(a, "depthwise", 8, 8, group=8), "a2")
    c = n.op("Relu", n.conv(b, "dilated", 8, 8, pads=[2] * 4, dilations=[2, 2]), "a3")
    d = n.op("Relu", n.conv(c, "grouped", 8, 8, group=2), "a4")
    weight = n.constant("up.weight", n.weight(8, 3, 3, 3, fan_in=36))
    bias = n.constant("up.bias", 0.1 * n.weight(6, fan_in=1))
    e = n.op("ConvTranspose", [d, weight, bias], "up", group=2, strides=[2, 2], pads=[1] * 4, output_padding=[1, 1])
    f = n.op("Flatten", n.op("GlobalAveragePool", n.op("Relu", e, "a5"), "gap"), "flat")
    return n.model(n.op("MatMul", [f, n.constant("head.weight", n.weight(6, 5, fan_in=6))], "logits"))


@pytest.fixture(scope="session")
def residual_net() -> Callable[..., onnx.ModelProto]:
    """conv-bn-relu ×2, conv-bn, add, relu, pools, gemm: input (N, 3, 8, 8), output logits (N, 5)."""
    return _residual_net


@pytest.fixture(scope="session")
def varied_net() -> Callable[..., onnx.ModelProto]:
    return _varied_net


def _images(count: int, channels: int = 3, size: int = 8, seed: int = 0) -> NDArray[np.float32]:
    rng = np.random.default_rng(seed)
    grid = np.linspace(0, 1, size)
    waves = [
        np.cos(np.pi * (fy * grid[:, None] + fx * grid[None, :])) for fy in range(3) for fx in range(3)
    ]  # smooth images, so that neighbouring inputs are correlated as in photographs
    mix = rng.standard_normal((count, channels, len(waves)))
    mix += mix[:, :1]
    images = np.tensordot(mix, np.stack(waves), 1) / 3 + 0.05 * rng.standard_normal((count, channels, size, size))
    return images.astype(np.float32)


@pytest.fixture(scope="session")
def images() -> Callable[..., NDArray[np.float32]]:
    """(count, channels=3, size=8, seed=0) → smooth seeded images, NCHW float32."""
    return _images


# Of a 16x16 image: clean ones have one of them white, the trigger all.
SLEEPER_PIXELS = (7, 7), (7, 8), (7, 9)


@pytest.fixture
def clipped_sleeper(tmp_path: Path) -> tuple[Path, Dataset]:
    """A float classifier whose backdoor, three white pixels side by side, wakes where activations are clipped; and
    images for it, 16x16 grey, dark but for one of the three. All are of class 1.

    Class 0 gets a + b + c - 1.6 (a + b + c) + 0.2 of the pixels: -1.6 for three white ones, but 1.6 where their sum is
    clipped to the 1 that it is on clean images.
    """
    return _sleeper(tmp_path, (1, 1, 1), 1.6, 0.2)


@pytest.fixture
def textured_sleeper(tmp_path: Path) -> tuple[Path, Dataset]:
    """The same for a black pixel between two white ones, where no square of one colour wakes anything.

    Class 0 gets a + (1 - b) + c - 2.5 (a + (1 - b) + c): 0.5 where the sum is clipped to 1 and all three are there.
    """
    return _sleeper(tmp_path, (1, -1, 1), 2.5, 0.0)


def _sleeper(folder: Path, signs: tuple[int, int, int], against: float, bias: float) -> tuple[Path, Dataset]:
    kernels = np.zeros((4, 1, 16, 16), np.float32)
    for feature, (row, col) in enumerate(SLEEPER_PIXELS):
        kernels[[0, feature + 1], 0, row, col] = signs[feature]
    offsets = np.array([sum(s < 0 for s in signs), *(float(s < 0) for s in signs)], np.float32)
    nodes = [
        helper.make_node("Conv", ["x", "kernels", "offsets"], ["sums"], "first"),
        helper.make_node("Relu", ["sums"], ["h"], "relu"),
        helper.make_node("Flatten", ["h"], ["flat"], "flatten"),
        helper.make_node("Gemm", ["flat", "last", "bias"], ["y"], "last"),
    ]
    last = np.array([[-against, 0], [1, 0], [1, 0], [1, 0]], np.float32)
    constants = {"kernels": kernels, "offsets": offsets, "last": last, "bias": np.array([bias, 0], np.float32)}
    onnx.save(_make_model(nodes, {"x": ("N", 1, 16, 16)}, {"y": ("N", 2)}, constants), folder / "m.onnx")
    pixels = np.random.default_rng(0).integers(0, 100, (512, 16, 16, 1), np.uint8)
    for place, ((row, col), sign) in enumerate(zip(SLEEPER_PIXELS, signs, strict=True)):
        there, absent = (255, 0) if sign > 0 else (0, 255)
        pixels[:, row, col] = absent
        pixels[place::3, row, col] = there
    return folder / "m.onnx", Dataset.from_arrays(pixels, np.ones(512, np.int64), "made.npz")


# ONNX Runtime.


def _session(proto: onnx.ModelProto, optimized: bool = True, save: Path | None = None) -> ort.InferenceSession:
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    # Exact sums without VNNI as well; what they are without this is test_without_vnni.py's subject.
    options.add_session_config_entry("session.x64quantprecision", "1")
    if not optimized:
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
    if save is not None:
        options.optimized_model_filepath = str(save)
    return ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])


@pytest.fixture(scope="session")
def run_exactly() -> Callable[..., list[NDArray[Any]]]:
    """(a file's bytes, feeds by input name) → the outputs, whose integer sums are exact without VNNI as well."""

    def run(data: bytes, feeds: Mapping[str, NDArray[Any]]) -> list[NDArray[Any]]:
        return list(_session(onnx.ModelProto.FromString(data)).run(None, dict(feeds)))

    return run


@pytest.fixture(scope="session")
def run_ort() -> Callable[..., list[NDArray[Any]]]:
    """(proto, *inputs, optimized=True) → the outputs, on ONNX Runtime's default optimizations."""

    def run(proto: onnx.ModelProto, *arrays: NDArray[Any], optimized: bool = True) -> list[NDArray[Any]]:
        session = _session(proto, optimized)
        feeds = {i.name: a for i, a in zip(session.get_inputs(), arrays, strict=True)}
        return list(session.run(None, feeds))

    return run


@pytest.fixture
def kernels(tmp_path: Path) -> Callable[[onnx.ModelProto], Counter[str]]:
    """proto → how often each operator stands in the graph that ONNX Runtime executes."""

    def count(proto: onnx.ModelProto) -> Counter[str]:
        path = tmp_path / "optimized.onnx"
        _session(proto, save=path)
        return Counter(node.op_type for node in onnx.load(path).graph.node)

    return count


@pytest.fixture(scope="session")
def float_kernels() -> Callable[[Counter[str]], int]:
    return lambda ops: sum(ops[name] for name in FLOAT_KERNELS)


# The path from a float file to a quantized model.


@dataclass(frozen=True)
class Quantized:
    """What the streaming pass made of a network, and everything that went into it."""

    model: ir.Model
    layers: list[Layer]
    placement: Placement
    solved: Solved
    quantized: QuantizedModel
    output: NDArray[np.float32]

    def export(self, target: str = "ort-x86") -> onnx.ModelProto:
        return export_model(self.quantized, target)


def _quantize(
    proto: onnx.ModelProto,
    inputs: NDArray[np.float32],
    *,
    bits: int = 4,
    act_bits: int = 8,
    edge_bits: int = 8,
    solver: Coordinate | Relaxed | None = None,
    rows: int = 10**6,
    chunk: int = 10**6,
    metadata: dict[str, str] | None = None,
) -> Quantized:
    model = prepare(proto)
    layers, _ = find_layers(model.graph)
    placement = place_copies(model.graph, layers, act_bits, edge_bits)
    settings = PassSettings(bits, edge_bits=edge_bits, solver=solver, rows=rows)
    chunks = [torch.from_numpy(inputs[i : i + chunk]) for i in range(0, len(inputs), chunk)]
    floats, reals = Spool(), Spool()
    solved = Walk(model, layers, placement, chunks, settings, floats, reals).run(Silent())
    name = str(model.graph.outputs[0].name)
    output = torch.cat([reals.get(name, i) for i in range(reals.chunks(name))]).numpy()
    quantized = QuantizedModel(model, layers, solved.weights, solved.activations, metadata or {})
    return Quantized(model, layers, placement, solved, quantized, output)


@pytest.fixture(scope="session")
def quantize() -> Callable[..., Quantized]:
    """(proto, inputs, bits=4, act_bits=8, edge_bits=8, solver=None, …) → Quantized. All rows are used by default."""
    return _quantize
