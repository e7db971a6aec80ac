"""The public API: what it exports, and models that do not come from the zoo."""

from __future__ import annotations

import importlib
import sys
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from torch import nn

import efrapq
from efrapq.data import Dataset
from efrapq.errors import (
    AlreadyQuantizedError,
    DataError,
    EfrapqError,
    UnknownArchitectureError,
    UnsupportedModelError,
    UsageError,
)
from efrapq.progress import Silent

OWN = """
import torch
from torch import nn

class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = nn.Sequential(
            nn.Conv2d(3, 8, 3, padding=1, bias=False), nn.BatchNorm2d(8), nn.ReLU6(),
            nn.Conv2d(8, 8, 3, padding=1, groups=8), nn.ReLU(), nn.MaxPool2d(2),
        )
        self.head = nn.Linear(8, 4)

    def forward(self, x):
        return self.head(self.body(x).mean((2, 3)))

def build():
    return Own()

def nothing():
    return 3
"""


@pytest.fixture
def own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> nn.Module:
    (tmp_path / "ownnet.py").write_text(OWN)
    monkeypatch.syspath_prepend(str(tmp_path))
    sys.modules.pop("ownnet", None)
    import ownnet  # type: ignore[import-not-found]

    torch.manual_seed(0)
    module = ownnet.build().eval()
    assert isinstance(module, nn.Module)
    return module


@pytest.fixture
def pictures(images) -> Dataset:
    return Dataset.from_arrays(images(40, size=12), None, "pictures")


def test_the_public_api_is_complete_and_nothing_else() -> None:
    assert sorted(efrapq.__all__) == ["defend", "defend_searched", "export", "load", "search_trigger", "verify"]
    assert dir(efrapq) == ["defend", "defend_searched", "export", "load", "search_trigger", "verify"]
    assert all(callable(getattr(efrapq, name)) for name in efrapq.__all__)
    with pytest.raises(AttributeError):
        _ = efrapq.nonsense
    # A subpackage of the name of a public function would hide it once imported.
    importlib.import_module("efrapq.verification.verifier")
    assert callable(efrapq.verify)


def test_every_error_is_one_of_ours_and_has_a_docstring() -> None:
    from efrapq import errors

    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, EfrapqError)
        assert error.__doc__


def test_a_module_is_defended_and_stays_as_it_was(own: nn.Module, pictures: Dataset, tmp_path: Path, run_ort) -> None:
    own.train()
    before = {k: v.clone() for k, v in own.state_dict().items()}
    reporter = Silent()
    made = efrapq.defend(own, tmp_path / "own.onnx", bits=8, calib=pictures, target="ort-x86", reporter=reporter)
    assert own.training
    assert all(torch.equal(before[k], v) for k, v in own.state_dict().items())
    assert made.path is not None
    own.eval()
    x = np.asarray(pictures.raw(range(16)))
    expected = own(torch.from_numpy(x)).detach().numpy()
    got = run_ort(onnx.load(made.path), x)[0]
    assert np.abs(got - expected).max() < 0.05 * np.abs(expected).max() + 0.02
    assert onnx.load(made.path).opset_import[0].version == 17
    result = efrapq.verify(made.path)
    assert result.document["kernels"]["float"] == 0
    codes = result.document["codes"]
    assert (codes["layers"], codes["match"], codes["flipped"], codes["compared_with_float"]) == (3, True, None, False)


def test_a_state_dict_with_a_factory(own: nn.Module, pictures: Dataset, tmp_path: Path) -> None:
    path = tmp_path / "own.pt"
    torch.save({"epoch": 3, "state_dict": own.state_dict()}, path)
    made = efrapq.defend(path, tmp_path / "o.onnx", bits=4, calib=pictures, arch="ownnet:build")
    direct = efrapq.defend(own, bits=4, calib=pictures)
    assert made.quantized.digest == direct.quantized.digest
    with pytest.raises(UnknownArchitectureError, match="--arch"):
        efrapq.defend(path, calib=pictures)
    with pytest.raises(UnknownArchitectureError, match="cannot be imported"):
        efrapq.defend(path, calib=pictures, arch="ownnet:missing")
    with pytest.raises(UsageError, match=r"not an nn\.Module"):
        efrapq.defend(path, calib=pictures, arch="ownnet:nothing")
    with pytest.raises(UsageError, match="--input-shape"):
        efrapq.defend(path, arch="ownnet:build")


def test_an_onnx_file_keeps_its_inputs_outputs_and_dynamic_batch(residual_net, images, tmp_path: Path, run_ort) -> None:
    path = tmp_path / "net.onnx"
    onnx.save(residual_net(), path)
    before = path.read_bytes()
    made = efrapq.defend(path, tmp_path / "q.onnx", calib=Dataset.from_arrays(images(32), None))
    assert path.read_bytes() == before
    proto = onnx.load(tmp_path / "q.onnx")
    assert [v.name for v in proto.graph.input] == ["input"]
    assert [v.name for v in proto.graph.output] == ["logits"]
    assert proto.graph.input[0].type.tensor_type.shape.dim[0].dim_param == "N"
    assert run_ort(proto, images(3))[0].shape == (3, 5)
    with pytest.raises(AlreadyQuantizedError):
        efrapq.defend(made.path or "", calib=Dataset.from_arrays(images(32), None))


def test_without_batchnorm_and_without_data_it_asks_for_data(net, tmp_path: Path) -> None:
    n = net()
    flat = n.op("Flatten", n.op("GlobalAveragePool", n.op("Relu", n.conv("input", "c", 3, 4), "r"), "g"), "f")
    path = tmp_path / "plain.onnx"
    onnx.save(n.model(n.gemm(flat, "y", 4, 2)), path)
    with pytest.raises(DataError, match="--calib"):
        efrapq.defend(path)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"bits": 1}, "--bits"),
        ({"bits": 9}, "--bits"),
        ({"edge_bits": 0}, "--edge-bits"),
        ({"scale": "golden"}, "unknown scale"),
        ({"fidelity": 0.9}, "--fidelity"),
        ({"fidelity": float("inf")}, "--fidelity"),
        ({"fidelity": 1.1, "lambda_e": 1e-3}, "--fidelity"),
        ({"fidelity": 1.1, "solver": "relaxed"}, "--fidelity"),
        ({"memory": 0}, "--memory"),
        ({"rows": 0}, "--rows"),
        ({"resume": True}, "--resume"),
        ({"act_bits": 2}, "--act-bits"),
        ({"solver": "magic"}, "unknown solver"),
        ({"lambda_e": float("nan")}, "--lambda-e"),
        ({"target": "toaster"}, "unknown target"),
        ({"device": "cuda"}, "CUDA"),
        ({"error": "both"}, "--error"),
        ({"act_range": "all"}, "activation range"),
        ({"calib_size": 0}, "--calib-size"),
    ],
    ids=lambda v: next(iter(v)) if isinstance(v, dict) else None,
)
def test_options_that_make_no_sense(own, pictures, options: dict[str, object], message: str) -> None:
    if options.get("device") == "cuda" and torch.cuda.is_available():
        pytest.skip("this machine has CUDA")
    with pytest.raises(UsageError, match=message):
        efrapq.defend(own, calib=pictures, **options)  # type: ignore[arg-type]


def test_a_model_with_nothing_to_quantize(tmp_path: Path, make_model, images) -> None:
    path = tmp_path / "relu.onnx"
    node = onnx.helper.make_node("Relu", ["input"], ["y"])
    onnx.save(make_model([node], {"input": ("N", 3, 8, 8)}, {"y": ("N", 3, 8, 8)}), path)
    with pytest.raises(UnsupportedModelError, match="nothing to quantize"):
        efrapq.defend(path, calib=Dataset.from_arrays(images(4), None))


@pytest.mark.parametrize("act_bits", [4, 8, 32])
def test_activation_bits(own: nn.Module, pictures: Dataset, act_bits: int, tmp_path: Path) -> None:
    made = efrapq.defend(own, tmp_path / "a.onnx", bits=4, act_bits=act_bits, calib=pictures, target="ort-x86")
    ops = {node.op_type for node in onnx.load_model_from_string(made.data).graph.node}
    assert ("QuantizeLinear" in ops) == (act_bits < 32)
    kernels = efrapq.verify(tmp_path / "a.onnx").document["kernels"]
    assert (kernels["float"] == 0) == (act_bits < 32)


@pytest.mark.parametrize("solver", ["coordinate", "relaxed", "nearest"])
def test_each_solver_through_the_pipeline(own: nn.Module, pictures: Dataset, solver: str) -> None:
    made = efrapq.defend(own, bits=4, calib=pictures, solver=solver, steps=20)
    flipped = made.evidence["flipped"]
    assert (flipped == 0) == (solver == "nearest")
    again = efrapq.defend(own, bits=4, calib=pictures, solver=solver, steps=20)
    assert again.data == made.data
    for layer in made.evidence["layers"]:
        assert (layer["loss"] == layer["loss_nearest"]) or solver != "nearest"


def test_a_size_alone_keeps_the_recorded_colours() -> None:
    from efrapq.loading import effective_preprocess
    from efrapq.preprocess import Preprocess, PreprocessOverride

    recorded = Preprocess((0.5,), (0.25,), (32, 32))
    assert effective_preprocess(PreprocessOverride(size=(28, 28)), recorded) == (
        Preprocess((0.5,), (0.25,), (28, 28)),
        True,
    )
    colours = PreprocessOverride((0.1,), (0.2,))
    assert effective_preprocess(colours, recorded) == (Preprocess((0.1,), (0.2,), (32, 32)), True)
    assert effective_preprocess(PreprocessOverride(size=(8, 8)), None) == (Preprocess(size=(8, 8)), False)
    assert effective_preprocess(None, None) == (None, False)


def test_unknown_preprocessing_is_said_loudly(own: nn.Module, tmp_path: Path) -> None:
    raw = np.random.default_rng(0).integers(0, 256, (20, 12, 12, 3)).astype(np.uint8)
    reporter = Silent()
    efrapq.defend(own, calib=Dataset.from_arrays(raw, None), reporter=reporter)
    assert any("no preprocessing is known" in w for w in reporter.warnings)


def test_the_suppliers_metadata_travels_along(residual_net, images, tmp_path: Path) -> None:
    proto = residual_net()
    proto.metadata_props.add(key="classes", value="cat,dog")
    proto.metadata_props.add(key="efrapq.codes.sha256", value="forged")
    onnx.save(proto, tmp_path / "net.onnx")
    made = efrapq.defend(tmp_path / "net.onnx", calib=Dataset.from_arrays(images(8), None))
    metadata = {p.key: p.value for p in onnx.load_model_from_string(made.data).metadata_props}
    assert metadata["classes"] == "cat,dog"
    assert metadata["efrapq.codes.sha256"] == made.quantized.digest


def test_sizes_may_be_dynamic(net, images, tmp_path: Path) -> None:
    n = net(size=8)
    n.shape = ("N", 3, "H", "W")
    a = n.op("Relu", n.conv("input", "c", 3, 4), "r")
    proto = n.model(n.gemm(n.op("Flatten", a, "f"), "logits", 4 * 64, 3))
    path, output = tmp_path / "dynamic.onnx", tmp_path / "dynamic.int4.onnx"
    onnx.save(proto, path)
    efrapq.defend(path, output, calib=Dataset.from_arrays(images(8), None), target="ort-x86")
    exported = efrapq.export(output, tmp_path / "portable.onnx", target="portable")
    assert exported.data


@pytest.mark.parametrize("batch", [3, 100])
def test_a_fixed_batch_without_data(net, tmp_path: Path, batch: int) -> None:
    n = net(size=8)
    n.shape = (batch, 3, 8, 8)
    a = n.op("Relu", n.batchnorm(n.conv("input", "c", 3, 4), "b", 4), "r")
    proto = n.model(n.gemm(n.op("Flatten", n.op("GlobalAveragePool", a, "g"), "f"), "logits", 4, 3))
    onnx.save(proto, tmp_path / "fixed.onnx")
    made = efrapq.defend(tmp_path / "fixed.onnx")
    assert made.evidence["calibration"]["images"] % batch == 0


def test_activations_that_blow_up_name_the_layer(net, images, tmp_path: Path) -> None:
    n = net(size=8)
    a = n.op("Log", n.conv("input", "first", 3, 4), "log")
    proto = n.model(n.op("GlobalAveragePool", n.conv(a, "second", 4, 4), "y"))
    onnx.save(proto, tmp_path / "log.onnx")
    with pytest.raises(UnsupportedModelError, match="second"):
        efrapq.defend(tmp_path / "log.onnx", calib=Dataset.from_arrays(images(8), None), act_bits=32)


def test_an_unreadable_preprocessing_record_is_a_note_not_an_obstacle(residual_net, images, tmp_path: Path) -> None:
    proto = residual_net()
    proto.metadata_props.add(key="efrapq.preprocess", value="{")
    onnx.save(proto, tmp_path / "net.onnx")
    reporter = Silent()
    efrapq.defend(tmp_path / "net.onnx", calib=Dataset.from_arrays(images(8), None), reporter=reporter)
    assert any("preprocessing" in w for w in reporter.warnings)
