"""Whole networks: against ONNX Runtime, and their gradients against torch's own."""

from __future__ import annotations

import os
import warnings
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from efrapq.graph.executor import Executor

SHARED = Path(os.environ.get("EFRAPQ_SHARED", Path(__file__).resolve().parents[3] / "shared"))


class Residual(nn.Module):
    """conv-bn-relu, a residual block with a strided shortcut, max and average pooling, a linear head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU())
        self.block = nn.Sequential(
            nn.Conv2d(8, 12, 3, stride=2, padding=1, bias=False),
            nn.BatchNorm2d(12),
            nn.ReLU(),
            nn.Conv2d(12, 12, 3, padding=1, bias=False),
            nn.BatchNorm2d(12),
        )
        self.shortcut = nn.Conv2d(8, 12, 1, stride=2)
        self.head = nn.Linear(12, 5)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(self.stem(x), 3, 2, 1, ceil_mode=True)
        x = F.relu(self.block(x) + self.shortcut(x))
        return self.head(F.adaptive_avg_pool2d(x, 1).flatten(1))


class Depthwise(nn.Module):
    """Depthwise-separable convolutions, ReLU6 and hard swish, squeeze and excitation."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3, stride=2, padding=1)
        self.depthwise = nn.Conv2d(8, 8, 5, padding=2, groups=8, bias=False)
        self.norm = nn.BatchNorm2d(8)
        self.pointwise = nn.Conv2d(8, 6, 1)
        self.gate = nn.Conv2d(6, 6, 1)
        self.head = nn.Linear(6, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm(self.depthwise(F.hardswish(self.stem(x)))))
        x = self.pointwise(x)
        x = x * F.hardsigmoid(self.gate(x.mean((2, 3), keepdim=True)))
        return F.log_softmax(self.head(x.mean((2, 3))), dim=1)


class Attention(nn.Module):
    """A transformer block over patches: layer normalization, attention, GELU."""

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.before, self.after = nn.LayerNorm(16), nn.LayerNorm(16)
        self.qkv, self.out = nn.Linear(16, 48), nn.Linear(16, 16)
        self.mlp = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
        self.head = nn.Linear(16, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        n, t, c = x.shape
        q, k, v = self.qkv(self.before(x)).reshape(n, t, 3, 2, c // 2).permute(2, 0, 3, 1, 4)
        attended = torch.softmax(q @ k.transpose(-2, -1) * (c // 2) ** -0.5, dim=-1) @ v
        x = x + self.out(attended.transpose(1, 2).reshape(n, t, c))
        x = x + self.mlp(self.after(x))
        return self.head(x.mean(1))


def _network(kind: type[nn.Module]) -> nn.Module:
    """In evaluation mode, with BatchNorm statistics that are not the trivial ones."""
    torch.manual_seed(0)
    network = kind()
    for module in network.modules():
        if isinstance(module, nn.BatchNorm2d):
            for values, low in ((module.running_mean, -1), (module.running_var, 0.5), (module.weight, 0.5)):
                nn.init.uniform_(values, low, low + 1.5)
    return network.eval().requires_grad_(False)


def _exported(network: nn.Module, x: Tensor) -> onnx.ModelProto:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the exporter's own deprecations
        program = torch.onnx.export(
            network,
            (x,),
            dynamo=True,
            verbose=False,
            opset_version=18,
            dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
            optimize=False,
        )
    assert program is not None
    return program.model_proto


def _in_ort(model: onnx.ModelProto, x: np.ndarray) -> np.ndarray:
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    return session.run(None, {session.get_inputs()[0].name: x})[0]


def _assert_agrees(model: onnx.ModelProto, x: np.ndarray, tolerance: float) -> None:
    """Max-abs error relative to the largest output; every operator in the table."""
    executor = Executor(ir.from_proto(model))
    assert executor.fallback_nodes == ()
    with torch.no_grad():
        results = executor.run({model.graph.input[0].name: torch.from_numpy(x)})
    expected = _in_ort(model, x)
    result = results[model.graph.output[0].name].numpy()
    assert np.abs(result - expected).max() <= tolerance * np.abs(expected).max()


@pytest.mark.parametrize("kind", [Residual, Depthwise, Attention])
@pytest.mark.parametrize("batch", [2, 3])
def test_exported_network_agrees_with_ort(kind: type[nn.Module], batch: int) -> None:
    model = _exported(_network(kind), torch.zeros(2, 3, 16, 16))
    x = np.random.default_rng(0).standard_normal((batch, 3, 16, 16)).astype(np.float32)
    _assert_agrees(model, x, tolerance=2e-6)


@pytest.mark.shared
@pytest.mark.parametrize(
    ("name", "shape"),
    [("cifar10_resnet20.onnx", (4, 3, 32, 32)), ("imagenet_mobilenet_v2.onnx", (1, 3, 224, 224))],
)
def test_trained_model_agrees_with_ort(name: str, shape: tuple[int, ...]) -> None:
    path = SHARED / "data" / "models" / name
    if not path.exists():
        pytest.skip(f"{path} is not there")
    x = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    _assert_agrees(onnx.load(path), x, tolerance=1e-5)


def test_gradient_is_exactly_that_of_torch() -> None:
    """Conv, BatchNorm, Relu, residual Add, global pooling and Gemm: the same kernels, so the same bits."""
    network = _network(Residual)
    model = _exported(network, torch.zeros(2, 3, 16, 16))
    executor = Executor(ir.from_proto(model))
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    ours, theirs = x.clone().requires_grad_(), x.clone().requires_grad_()
    results = executor.run({model.graph.input[0].name: ours})[model.graph.output[0].name]
    expected = network(theirs)
    assert torch.equal(results, expected)
    results.square().sum().backward()
    expected.square().sum().backward()
    assert theirs.grad is not None
    assert torch.count_nonzero(theirs.grad) > 0
    assert torch.equal(ours.grad, theirs.grad)


def test_gradient_reaches_overridden_constants() -> None:
    """A weight may be replaced by one to be solved for."""
    network = _network(Depthwise)
    model = _exported(network, torch.zeros(2, 3, 16, 16))
    executor = Executor(ir.from_proto(model))
    weight = network.get_parameter("pointwise.weight").clone().requires_grad_()
    x = torch.randn(2, 3, 16, 16, generator=torch.Generator().manual_seed(1))
    results = executor.run({model.graph.input[0].name: x}, overrides={"pointwise.weight": weight})
    results[model.graph.output[0].name].sum().backward()
    assert weight.grad is not None
    assert torch.count_nonzero(weight.grad) > 0


def test_model_from_a_file_with_external_data_runs(tmp_path: Path) -> None:
    """Weights in a file of their own are mapped read-only; the executor copies them."""
    model = _exported(_network(Residual), torch.zeros(2, 3, 16, 16))
    x = np.random.default_rng(0).standard_normal((2, 3, 16, 16)).astype(np.float32)
    expected = _in_ort(model, x)
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    executor = Executor(ir.load(tmp_path / "m.onnx"))
    result = executor.run({model.graph.input[0].name: torch.from_numpy(x)})
    np.testing.assert_allclose(result[model.graph.output[0].name].numpy(), expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("kind", [Residual, Depthwise, Attention])
def test_on_another_device_no_data_is_left_behind_on_the_cpu(kind: type[nn.Module]) -> None:
    """The meta device stands in for a GPU: it refuses inputs that lie elsewhere and numbers that are read back."""
    model = _exported(_network(kind), torch.zeros(2, 3, 16, 16))
    results = Executor(ir.from_proto(model), device="meta").run({model.graph.input[0].name: torch.zeros(2, 3, 16, 16)})
    (result,) = results.values()
    assert result.device.type == "meta"
    assert result.shape[0] == 2
