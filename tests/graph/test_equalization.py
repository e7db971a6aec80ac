"""How far channels are scaled, and what a file made so is held against."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

import efrapq
from efrapq.calibration.equalization import choose_exponents
from efrapq.data import Dataset
from efrapq.errors import CorruptFileError, UsageError
from efrapq.graph.equalize import EQUALIZED_KEY, Exponents, equalize, exponents_from_json, exponents_to_json
from efrapq.graph.executor import Executor
from efrapq.graph.layers import find_layers
from efrapq.graph.placement import place
from efrapq.graph.prepare import prepare

Foreign = Callable[..., onnx.ModelProto]

STREAM = """
g (float[n, 3, 8, 8] x) => (float[n, 5] y) {
  a = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1]> (x, w1, b1)
  c = Conv <kernel_shape = [1, 1]> (a, w2)
  k = Clip(c, zero, six)
  d = Conv <kernel_shape = [3, 3], pads = [1, 1, 1, 1], group = 8> (k, w3)
  l = Relu(d)
  e = Conv <kernel_shape = [1, 1]> (l, w4, b4)
  s = Add(a, e)
  h = Conv <kernel_shape = [1, 1]> (s, w5)
  r = Relu(h)
  p = GlobalAveragePool(r)
  f = Flatten(p)
  y = Gemm <transB = 1> (f, w6)
}"""


def weights() -> dict[str, Any]:
    """Channels of very different size: 1, 2, 4, … 32 in the stream."""
    rng = np.random.default_rng(3)

    def draw(*shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) / np.sqrt(np.prod(shape[1:]))).astype(np.float32)

    sizes = (2.0 ** np.arange(6)).astype(np.float32)
    return {
        "w1": draw(6, 3, 3, 3) * sizes[:, None, None, None],
        "b1": 0.1 * sizes,
        "w2": draw(8, 6, 1, 1)
        / sizes[None, :, None, None]
        * np.linspace(0.2, 3, 8, dtype=np.float32).reshape(-1, 1, 1, 1),
        "w3": draw(8, 1, 3, 3) * np.linspace(0.1, 2, 8, dtype=np.float32).reshape(-1, 1, 1, 1),
        "w4": draw(6, 8, 1, 1) * sizes[:, None, None, None],
        "b4": 0.1 * sizes,
        "w5": draw(10, 6, 1, 1) / sizes[None, :, None, None],
        "w6": draw(5, 10),
        "zero": np.array(0, np.float32),
        "six": np.array(1.5, np.float32),
    }


@pytest.fixture
def proto(foreign: Foreign) -> onnx.ModelProto:
    return foreign(STREAM, weights())


@pytest.fixture
def images() -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(1).standard_normal((24, 3, 8, 8)).astype(np.float32))


def chosen(proto: onnx.ModelProto, images: torch.Tensor, bits: int) -> tuple[Any, Exponents]:
    model = prepare(proto)
    layers, _ = find_layers(model.graph)
    widths = {layer.name: bits for layer in layers}
    chunks = [images[:16], images[16:]]
    placement = place(model.graph, layers, 8)
    return model, choose_exponents(model, layers, widths, placement, chunks, torch.device("cpu"))


def values(model: Any, images: torch.Tensor, *names: str) -> dict[str, np.ndarray]:
    with torch.no_grad():
        return {k: v.numpy() for k, v in Executor(model).run({"x": images}, names).items()}


def test_channels_come_to_one_range(proto: onnx.ModelProto, images: torch.Tensor) -> None:
    """At 8 bits of weight nothing is lost by going all the way: what was 32 to 1 is a factor of 2 at most."""
    model, exponents = chosen(proto, images, 8)
    before = np.abs(values(model, images, "s")["s"]).max((0, 2, 3))
    assert before.max() / before.min() > 10
    equalize(model, exponents)
    after = np.abs(values(model, images, "s")["s"]).max((0, 2, 3))
    assert after.max() / after.min() < 2.5


def test_no_channel_passes_the_clip(proto: onnx.ModelProto, images: torch.Tensor) -> None:
    model, exponents = chosen(proto, images, 8)
    before = values(model, images, "c", "y")
    equalize(model, exponents)
    after = values(model, images, "c", "y")
    peaks, raised = before["c"].max((0, 2, 3)), after["c"].max((0, 2, 3))
    full = peaks >= 1.5
    assert full.any()
    assert not full.all()
    np.testing.assert_allclose(raised[full], peaks[full], rtol=1e-5)
    assert (raised[~full] <= 1.5 + 1e-5).all()
    assert (raised[~full] >= np.minimum(peaks[~full] * 30, 1.3)).all()
    np.testing.assert_allclose(after["y"], before["y"], rtol=1e-4, atol=1e-5)


def test_fewer_bits_of_weight_go_less_far(proto: onnx.ModelProto, images: torch.Tensor) -> None:
    """What activations gain the readers' weights lose: with two bits it is not worth as much as with eight."""

    def moved(bits: int) -> int:
        return sum(int(np.abs(k.astype(int)).sum()) for k in chosen(proto, images, bits)[1].values())

    assert moved(2) < moved(8)


def test_less_error_in_the_runtime_and_the_same_proof(
    proto: onnx.ModelProto, images: torch.Tensor, tmp_path: Path
) -> None:
    """A file made so agrees better with the float model, and its codes are held against the scaled weights."""
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    data = Dataset.from_arrays(images.numpy(), None, "images")
    errors = {}
    for equalized in (False, True):
        out = tmp_path / f"{equalized}.onnx"
        made = efrapq.defend(path, out, bits=8, calib=data, equalize=equalized)
        assert made.evidence["settings"].get("equalize", False) is equalized
        found = efrapq.verify(out, data=data, float_model=path).document
        assert found["codes"]["match"] is True
        assert found["kernels"]["float"] == 0
        errors[equalized] = found["outputs"]["defended"]["relative_error"]
    assert errors[True] < 0.7 * errors[False]


def test_equalized_files_keep_their_record_through_export(
    proto: onnx.ModelProto, images: torch.Tensor, tmp_path: Path
) -> None:
    path, out, other = tmp_path / "m.onnx", tmp_path / "q.onnx", tmp_path / "p.onnx"
    onnx.save(proto, path)
    efrapq.defend(path, out, bits=4, calib=Dataset.from_arrays(images.numpy(), None, "images"), equalize=True)
    efrapq.export(out, other, target="portable")
    assert efrapq.verify(other, float_model=path).document["codes"]["match"] is True


def test_a_forged_record_is_refused(proto: onnx.ModelProto, images: torch.Tensor, tmp_path: Path) -> None:
    """Other factors make other float weights: their codes are no neighbours of them any more."""
    path, out = tmp_path / "m.onnx", tmp_path / "q.onnx"
    onnx.save(proto, path)
    efrapq.defend(path, out, bits=8, calib=Dataset.from_arrays(images.numpy(), None, "images"), equalize=True)
    saved = onnx.load(out)
    entry = next(p for p in saved.metadata_props if p.key == EQUALIZED_KEY)
    record = {name: k + 8 for name, k in exponents_from_json(entry.value).items()}
    entry.value = exponents_to_json(record)
    onnx.save(saved, out)
    found = efrapq.verify(out, float_model=path).document
    assert found["codes"]["match"] is False
    assert found["verdict"] == "fail"
    entry.value = json.dumps({"nobody": "AA=="})
    onnx.save(saved, out)
    with pytest.raises(CorruptFileError, match="not of this float model"):
        efrapq.verify(out, float_model=path)


def test_the_same_bytes_twice(proto: onnx.ModelProto, images: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    data = Dataset.from_arrays(images.numpy(), None, "images")
    assert efrapq.defend(path, calib=data, equalize=True).data == efrapq.defend(path, calib=data, equalize=True).data


def test_where_there_is_nothing_to_equalize(proto: onnx.ModelProto, images: torch.Tensor, tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    onnx.save(proto, path)
    data = Dataset.from_arrays(images.numpy(), None, "images")
    with pytest.raises(UsageError, match="activations on grids"):
        efrapq.defend(path, calib=data, equalize=True, act_bits=32)
    with pytest.raises(UsageError, match="take images"):
        efrapq.defend(path, calib={"x": images.numpy()}, equalize=True)
