"""A network of one-dimensional convolutions that tells sounds apart, from torch to verified W8A8 and W4A8 files."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from numpy.typing import NDArray
from onnx import TensorProto
from torch import Tensor, nn

import efrapq
from efrapq.cli.main import main
from efrapq.verification import Requirements, verify
from efrapq.verification.session import open_session

LENGTH = 480
CLASSES = 5


def sounds(count: int, seed: int) -> tuple[NDArray[np.float32], NDArray[np.int64]]:
    """(count, 1, LENGTH) waves and their classes: silence, a low tone, a high tone, one that rises, one that falls; of
    any phase and loudness, in noise.
    """
    rng = np.random.default_rng(seed)
    labels = rng.integers(0, CLASSES, count)
    time = np.linspace(0, 1, LENGTH)
    first, last = np.array([[0, 0], [25, 25], [80, 80], [20, 70], [70, 20]])[labels].T[:, :, None]
    turns = first * time + (last - first) * time**2 / 2 + rng.random((count, 1))
    loudness = rng.uniform(0.3, 1, (count, 1)) * (labels > 0)[:, None]
    waves = loudness * np.sin(2 * np.pi * turns) + 0.1 * rng.standard_normal((count, LENGTH))
    return waves[:, None].astype(np.float32), labels


class Separable(nn.Module):
    """A depthwise dilated convolution and a pointwise one, with a shortcut around them."""

    def __init__(self, channels: int, dilation: int) -> None:
        super().__init__()
        self.depthwise = nn.Conv1d(
            channels, channels, 3, padding=dilation, dilation=dilation, groups=channels, bias=False
        )
        self.norm1 = nn.BatchNorm1d(channels)
        self.pointwise = nn.Conv1d(channels, channels, 1, bias=False)
        self.norm2 = nn.BatchNorm1d(channels)

    def forward(self, x: Tensor) -> Tensor:
        y = torch.relu(self.norm1(self.depthwise(x)))
        return torch.relu(self.norm2(self.pointwise(y)) + x)


class Spotter(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv1d(1, 16, 16, stride=4, padding=6, bias=False)
        self.norm = nn.BatchNorm1d(16)
        self.pool = nn.MaxPool1d(2)
        self.blocks = nn.Sequential(Separable(16, 1), Separable(16, 4))
        self.widen = nn.Conv1d(16, 24, 4, stride=2, padding=1)
        self.mean = nn.AdaptiveAvgPool1d(1)
        self.head = nn.Linear(24, CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        x = self.blocks(self.pool(torch.relu(self.norm(self.stem(x)))))
        out: Tensor = self.head(self.mean(torch.relu(self.widen(x))).flatten(1))
        return out


LAYERS = 7


@pytest.fixture(scope="module")
def spotter(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The network as ONNX, trained for a second or two."""
    torch.manual_seed(0)
    net = Spotter()
    x, y = (torch.from_numpy(a) for a in sounds(512, seed=1))
    optimizer = torch.optim.Adam(net.parameters(), 1e-2)
    for _ in range(8):
        for batch in torch.randperm(len(x)).split(64):
            optimizer.zero_grad()
            nn.functional.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
    path = tmp_path_factory.mktemp("spotter") / "spotter.onnx"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        torch.onnx.export(
            net.eval(),
            (x[:2],),
            path,
            dynamo=False,
            opset_version=17,
            input_names=["wave"],
            output_names=["scores"],
            dynamic_axes={"wave": {0: "N"}, "scores": {0: "N"}},
        )
    return path


@pytest.fixture(scope="module")
def test_data() -> dict[str, NDArray[Any]]:
    waves, labels = sounds(400, seed=2)
    return {"wave": waves, "labels": labels}


@pytest.mark.parametrize("bits", [8, 4])
def test_defended_on_integer_kernels_throughout(
    spotter: Path, test_data: dict[str, NDArray[Any]], tmp_path: Path, bits: int
) -> None:
    output = tmp_path / "out.onnx"
    made = efrapq.defend(spotter, output, bits=bits, calib={"wave": sounds(128, seed=3)[0]}, target="ort-x86")
    assert [layer.op_type for layer in made.quantized.layers] == ["Conv"] * (LAYERS - 1) + ["Gemm"]
    assert made.evidence["float"] == []
    # BatchNorm is folded, and no value between the first and the last layer is float.
    ops = [node.op_type for node in open_session(made.data).optimized.graph.node]
    assert (ops.count("QLinearConv"), ops.count("QGemm"), ops.count("QLinearAdd")) == (LAYERS - 1, 1, 2)
    assert (ops.count("QuantizeLinear"), ops.count("DequantizeLinear"), ops.count("BatchNormalization")) == (1, 0, 0)

    result = verify(output, data=test_data, float_model=spotter, requirements=Requirements(max_drop=2))
    document = result.document
    assert result.passed
    assert document["cda"]["float"] >= 95
    assert document["cda"]["defended"] >= document["cda"]["float"] - 2
    assert document["agreement"] >= 97
    assert document["codes"]["match"] is True
    assert (document["kernels"]["integer"], document["kernels"]["float"]) == (LAYERS, 0)
    stem = LENGTH // 4 * 16 * 16
    blocks = 2 * (LENGTH // 8) * 16 * (3 + 16)
    assert document["kernels"]["macs"] == stem + blocks + LENGTH // 16 * 24 * 16 * 4 + 24 * CLASSES
    assert document["codes"]["flipped"] > 0
    assert [weight.bits for weight in made.quantized.weights.values()] == [8, *[bits] * (LAYERS - 2), 8]
    stored = [t.data_type for t in onnx.load(output).graph.initializer if len(t.dims) > 1]
    assert stored.count(TensorProto.INT4) == (LAYERS - 2 if bits == 4 else 0)
    assert len(stored) == stored.count(TensorProto.INT4) + stored.count(TensorProto.INT8) == LAYERS


def test_the_command_line(
    spotter: Path, test_data: dict[str, NDArray[Any]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "calib.npz", wave=sounds(64, seed=3)[0])
    np.savez(tmp_path / "test.npz", **test_data)
    output = tmp_path / "spotter.int4.onnx"

    def command(*arguments: object) -> int:
        with pytest.raises(SystemExit) as stopped:
            main([str(a) for a in arguments])
        return int(stopped.value.code or 0)

    assert command("defend", spotter, "--calib", tmp_path / "calib.npz", "-o", output, "--target", "ort-x86", "-q") == 0
    capsys.readouterr()
    verifying = ("verify", output, "--float", spotter, "--data", tmp_path / "test.npz", "--max-drop", 3, "--json", "-q")
    assert command(*verifying) == 0
    document = json.loads(capsys.readouterr().out)
    assert (document["verdict"], document["kernels"]["float"]) == ("pass", 0)


@pytest.mark.parametrize("target", ["ort-arm", "openvino", "tensorrt", "qnn", "portable"])
def test_other_targets_hold_the_same_codes(spotter: Path, tmp_path: Path, target: str) -> None:
    source = tmp_path / "out.onnx"
    made = efrapq.defend(spotter, source, bits=4, calib={"wave": sounds(64, seed=3)[0]}, target="ort-x86")
    written = efrapq.export(source, tmp_path / "other.onnx", target=target)
    assert written.codes_sha256 == made.quantized.digest
    waves = sounds(40, seed=4)[0]
    session = open_session(written.data)
    found = np.concatenate([session.raw.run(None, {"wave": waves[i : i + 1]})[0] for i in range(len(waves))])
    expected = open_session(made.data).raw.run(None, {"wave": waves})[0]
    assert (found.argmax(1) == expected.argmax(1)).mean() >= 0.95
    first = onnx.load(written.path).graph.input[0].type.tensor_type.shape.dim[0]
    assert first.dim_value == (1 if target == "qnn" else 0)
