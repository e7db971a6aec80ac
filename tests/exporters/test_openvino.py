"""Exported files in OpenVINO itself: they compile, run on integer kernels, and answer as ONNX Runtime does."""

from __future__ import annotations

from collections import Counter
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

from efrapq.data import Dataset, load_dataset
from efrapq.exporters import export_model
from efrapq.models import weights
from efrapq.pipeline import defend
from efrapq.preprocess import Preprocess
from efrapq.progress import Silent
from efrapq.retarget import export_all
from efrapq.trigger import parse_trigger
from efrapq.verification.metrics import attack_success_rate, clean_accuracy, predict
from efrapq.verification.session import open_session

ov = pytest.importorskip("openvino", reason="openvino is not installed: pip install -e '.[dev]'")

HEAVY = ("Convolution", "FullyConnected", "MatMul", "Deconvolution")


class Compiled:
    """A file in OpenVINO's CPU plugin, with what `predict` asks of a session."""

    def __init__(self, data: bytes) -> None:
        # One thread, for machines that run other tests beside; float32, so that float layers are not bfloat16.
        properties = {"INFERENCE_NUM_THREADS": 1, "INFERENCE_PRECISION_HINT": "f32"}
        model = ov.Core().read_model(data)
        self.model = ov.Core().compile_model(model, "CPU", properties)
        shape = model.inputs[0].partial_shape
        self.input_shape = tuple(None if d.is_dynamic else d.get_length() for d in shape)

    def logits(self, x: NDArray[np.float32]) -> NDArray[np.float32]:
        batch = self.input_shape[0] or len(x)
        parts = [np.array(self.model([x[i : i + batch]])[0]) for i in range(0, len(x), batch)]
        return np.concatenate(parts)

    def answers(self, x: NDArray[np.float32]) -> tuple[NDArray[np.float32], None]:
        return self.logits(x), None

    def precisions(self) -> dict[str, Counter[str]]:
        """Kind of heavy layer → how often it is executed in which precision."""
        found: dict[str, Counter[str]] = {}
        for node in self.model.get_runtime_model().get_ops():
            kind, precision = (str(node.get_rt_info()[k].astype(str)) for k in ("layerType", "runtimePrecision"))
            if kind in HEAVY:
                found.setdefault(kind, Counter())[precision] += 1
        return found


def floats(compiled: Compiled) -> int:
    return sum(count for kinds in compiled.precisions().values() for p, count in kinds.items() if p not in ("u8", "i8"))


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory, exported_once: None) -> dict[tuple[str, str], bytes]:
    """(solver, target) → the embedded subject at W4A8; rounded to nearest its backdoor is awake, and there to lose."""
    folder = tmp_path_factory.mktemp("openvino")
    calibration = load_dataset(weights.SAMPLES, split="calib")
    found = {}
    for solver in ("nearest", "coordinate"):
        source = folder / f"{solver}.onnx"
        defend(weights.SUBJECT, source, bits=4, calib=calibration, calib_size=256, solver=solver, target="ort-x86")
        targets = ("ort-x86", "ort-arm", "openvino", "tensorrt", "qnn", "portable")
        for file in export_all(source, {t: folder / f"{solver}.{t}.onnx" for t in targets}):
            found[solver, file.target] = file.data
    return found


@pytest.fixture(scope="module")
def samples() -> Dataset:
    return load_dataset(weights.SAMPLES, split="test").subset(500, 0)


def preprocess_of(data: bytes) -> Preprocess:
    metadata = {p.key: p.value for p in onnx.load_model_from_string(data).metadata_props}
    return Preprocess.from_json(metadata["efrapq.preprocess"])


def figures(session: Any, data: bytes, samples: Dataset) -> tuple[float, float, NDArray[np.int64]]:
    """CDA, ASR, and the classes of the clean images."""
    with Silent().task("measuring", len(samples)) as task:
        found = predict(session, samples, preprocess_of(data), parse_trigger(weights.TRIGGER), task, "")
    labels = samples.require_labels()
    asr = attack_success_rate(found, labels, weights.TARGET_CLASS)
    return clean_accuracy(found, labels), asr, found.clean


@pytest.mark.parametrize("target", ["openvino", "ort-x86", "ort-arm", "tensorrt", "qnn", "portable"])
@pytest.mark.parametrize("solver", ["nearest", "coordinate"])
def test_accuracy_and_attack_are_those_of_onnx_runtime(
    files: dict[tuple[str, str], bytes], samples: Dataset, solver: str, target: str
) -> None:
    data = files[solver, target]
    cda, asr, classes = figures(Compiled(data), data, samples)
    cda_ort, asr_ort, classes_ort = figures(open_session(data, threads=1), data, samples)
    assert abs(cda - cda_ort) <= 1.0
    assert abs(asr - asr_ort) <= 1.0
    assert (classes == classes_ort).mean() >= 0.99
    assert (asr >= 95) if solver == "nearest" else (asr <= 8)


@pytest.mark.parametrize("solver", ["nearest", "coordinate"])
def test_logits_are_those_of_onnx_runtime(
    files: dict[tuple[str, str], bytes], samples: Dataset, solver: str, run_ort: Any
) -> None:
    """Rounding halves to the other side somewhere inside moves a logit a little, never much."""
    data = files[solver, "openvino"]
    x = samples.inputs(list(range(64)), preprocess_of(data))
    ours, theirs = Compiled(data).logits(x), run_ort(onnx.load_model_from_string(data), x)[0]
    assert np.abs(ours - theirs).max() <= 0.05 * np.abs(theirs).max()
    assert np.median(np.abs(ours - theirs)) <= 0.01 * np.abs(theirs).max()
    signal, noise = float((theirs**2).sum()), float(((ours - theirs) ** 2).sum())
    assert 10 * np.log10(signal / noise) >= 35


@pytest.mark.parametrize("target", ["openvino", "ort-x86", "tensorrt", "qnn"])
def test_every_layer_runs_on_integers(files: dict[tuple[str, str], bytes], target: str) -> None:
    compiled = Compiled(files["nearest", target])
    assert floats(compiled) == 0
    assert sum(sum(kinds.values()) for kinds in compiled.precisions().values()) == 16


def test_int4_without_a_cast_runs_on_floats(files: dict[tuple[str, str], bytes]) -> None:
    """The reason for the Cast here too. If this fails, OpenVINO has learned it, and the Cast may go."""
    assert floats(Compiled(files["nearest", "portable"])) == 14


@pytest.mark.parametrize("network", ["residual", "varied"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4), (4, 32)], ids=lambda b: f"W{b[0]}A{b[1]}")
def test_small_networks(
    residual_net: Any, varied_net: Any, quantize: Any, images: Any, run_ort: Any, network: str, bits: tuple[int, int]
) -> None:
    net = {"residual": residual_net, "varied": varied_net}[network]
    made = quantize(net(), images(24), bits=bits[0], act_bits=bits[1])
    proto = made.export("openvino")
    x = images(16, seed=4)
    ours, theirs = Compiled(proto.SerializeToString()).logits(x), run_ort(proto, x, optimized=False)[0]
    assert np.median(np.abs(ours - theirs)) <= 0.02 * np.abs(theirs).max()


@pytest.mark.parametrize("axes", [1, 3], ids=["1-D", "3-D"])
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)], ids=lambda b: f"W{b[0]}A{b[1]}")
def test_convolutions_over_one_and_three_axes(
    block_over: Any, smooth: Any, quantize: Any, run_ort: Any, axes: int, bits: tuple[int, int]
) -> None:
    made = quantize(block_over(axes), smooth(axes, 24), bits=bits[0], act_bits=bits[1])
    proto = made.export("openvino")
    compiled = Compiled(proto.SerializeToString())
    assert floats(compiled) == 0
    assert compiled.precisions()["Convolution"].total() == 5
    x = smooth(axes, 16, seed=4)
    ours, theirs = compiled.logits(x), run_ort(proto, x, optimized=False)[0]
    assert np.median(np.abs(ours - theirs)) <= 0.02 * np.abs(theirs).max()


def test_clipped_codes_are_computed_otherwise(samples: Dataset) -> None:
    """Why 4-bit activations are widened. If this fails, OpenVINO has learned it, and they may be clipped again."""
    calibration = load_dataset(weights.SAMPLES, split="calib")
    made = defend(
        weights.SUBJECT, bits=4, act_bits=4, calib=calibration, calib_size=64, solver="nearest", target="ort-x86"
    )
    x = samples.inputs(list(range(64)), preprocess_of(made.data))
    widened = export_model(made.quantized, "openvino").SerializeToString()
    errors = {}
    for name, data in (("clipped", made.data), ("widened", widened)):
        theirs = open_session(data, threads=1).logits(x)
        errors[name] = float(np.abs(Compiled(data).logits(x) - theirs).max() / np.abs(theirs).max())
    assert errors["widened"] <= 0.05
    assert errors["clipped"] > 2 * errors["widened"]
