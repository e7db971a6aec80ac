"""Models past the limits of one file, on small models with the limits lowered: the same codes, the same bytes."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import helper

import efrapq.exporters as exporters
import efrapq.graph.outside as outside
import efrapq.io.onnx_file as onnx_file
from efrapq.calibration.datafree import DataFree
from efrapq.errors import CorruptFileError, InputError, OutputError, UsageError
from efrapq.inspection import inspect
from efrapq.io import FileTensor, Limits, load_onnx, read_source
from efrapq.pipeline import defend
from efrapq.retarget import export
from efrapq.verification import verify

TIMES = ("latency_ms", "slower")


@pytest.fixture
def small_limits(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes weights stay in their files from now on."""

    def lower() -> None:
        monkeypatch.setattr(onnx_file, "Limits", partial(Limits, max_inline_bytes=1, min_outside_bytes=100))

    return lower


@pytest.fixture
def small_files(monkeypatch: pytest.MonkeyPatch) -> Callable[[], None]:
    """Called, it makes codes go to a file of their own from now on."""

    def lower() -> None:
        monkeypatch.setattr(exporters, "MOST_BYTES", 100)
        monkeypatch.setattr(outside, "LARGE", 64)

    return lower


@pytest.fixture
def model(residual_net: Any, tmp_path: Path) -> Path:
    path = tmp_path / "net.onnx"
    onnx.save(residual_net(), path, save_as_external_data=True, location="net.data", size_threshold=0)
    return path


@pytest.fixture(params=["beside it", "inside of it"])
def any_model(request: pytest.FixtureRequest, model: Path) -> Path:
    """The weights in a file beside the model's, or in its own."""
    if request.param == "inside of it":
        onnx.save(onnx.load(model), model)
        model.with_name("net.data").unlink()
    return model


@pytest.fixture
def data(images: Any, tmp_path: Path) -> Path:
    path = tmp_path / "data.npz"
    np.savez(path, images=images(24), labels=np.arange(24) % 5)
    return path


def timeless(document: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in document.items() if key not in TIMES}


# The float model's weights in files.


@pytest.mark.parametrize("bits", [4, 8])
def test_defended_alike(any_model: Path, data: Path, tmp_path: Path, small_limits: Any, bits: int) -> None:
    whole = defend(any_model, tmp_path / "whole.onnx", calib=data, bits=bits)
    small_limits()
    apart = defend(any_model, tmp_path / "apart.onnx", calib=data, bits=bits)
    assert apart.data == whole.data
    assert apart.quantized.digest == whole.quantized.digest
    assert apart.evidence["input"] == whole.evidence["input"]
    if not (tmp_path / "net.data").exists():
        assert "external" not in apart.evidence["input"] or not apart.evidence["input"]["external"]
        assert apart.evidence["input"]["bytes"] == any_model.stat().st_size
        return
    content = (tmp_path / "net.data").read_bytes()
    assert apart.evidence["input"]["external"] == {"net.data": hashlib.sha256(content).hexdigest()}
    assert apart.evidence["input"]["bytes"] == any_model.stat().st_size + len(content)


def test_data_free_alike(any_model: Path, small_limits: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(DataFree, "batch", 4)  # 64 images take long
    whole = defend(any_model, calib_size=4)
    small_limits()
    assert defend(any_model, calib_size=4).data == whole.data


def test_blocks_alike(make_model: Any, tmp_path: Path, small_limits: Any) -> None:
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1, name="g"),
        helper.make_node("MatMul", ["h", "v"], ["y"], name="m"),
    ]
    shapes = {"w": (24, 32), "b": (24,), "v": (24, 5)}
    constants = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    path = tmp_path / "m.onnx"
    proto = make_model(nodes, {"x": ["N", 32]}, {"y": ["N", 5]}, constants)
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    calib = {"x": rng.standard_normal((16, 32)).astype(np.float32)}
    whole = defend(path, calib=calib, block=16, act_bits=32)
    small_limits()
    assert defend(path, calib=calib, block=16, act_bits=32).data == whole.data


def test_converted_to_another_opset_alike(
    make_model: Any, tmp_path: Path, small_limits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """ReduceMean has its axes in an attribute up to opset 17; int4 needs 21."""
    rng = np.random.default_rng(0)
    nodes = [
        helper.make_node("Gemm", ["x", "w", "b"], ["h"], transB=1, name="g"),
        helper.make_node("Reshape", ["h", "shape"], ["r"], name="r"),
        helper.make_node("ReduceMean", ["r"], ["p"], axes=[1], keepdims=0, name="mean"),
        helper.make_node("MatMul", ["p", "v"], ["y"], name="m"),
    ]
    shapes = {"w": (24, 32), "b": (24,), "v": (8, 5)}
    constants = {n: rng.standard_normal(s).astype(np.float32) for n, s in shapes.items()}
    constants["shape"] = np.array([-1, 3, 8], np.int64)
    path = tmp_path / "m.onnx"
    proto = make_model(nodes, {"x": ["N", 32]}, {"y": ["N", 5]}, constants)
    onnx.save(proto, path, save_as_external_data=True, location="m.data", size_threshold=0)
    calib = {"x": rng.standard_normal((16, 32)).astype(np.float32)}
    whole = defend(path, calib=calib, edge_bits=4)
    assert onnx.load_from_string(whole.data).opset_import[0].version == 21
    small_limits()
    monkeypatch.setattr("efrapq.exporters.opset.MAX_MESSAGE", 1)
    seen: list[int] = []
    honest = onnx.version_converter.convert_version

    def convert(given: onnx.ModelProto, opset: int) -> onnx.ModelProto:
        seen.extend(math.prod(t.dims) for t in given.graph.initializer)
        return honest(given, opset)

    monkeypatch.setattr(onnx.version_converter, "convert_version", convert)
    assert defend(path, calib=calib, edge_bits=4).data == whole.data
    assert 0 < max(seen) <= 24, "the converter was given the weights"


def test_verified_and_inspected_alike(any_model: Path, data: Path, tmp_path: Path, small_limits: Any) -> None:
    """The quantized file, too: its codes are inside of it."""
    model, made = any_model, tmp_path / "made.onnx"
    defend(model, made, calib=data)
    verified, inspected = verify(made, data=data), inspect(model)
    small_limits()
    assert timeless(verify(made, data=data).document) == timeless(verified.document)
    assert verified.document["codes"]["compared_with_float"]
    assert verified.passed
    assert inspect(model) == inspected
    assert load_onnx(read_source(made)).outside
    assert inspected["kernels"]["float"] == 4


def test_a_run_is_resumed_with_its_own_weights_only(
    model: Path, data: Path, tmp_path: Path, small_limits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    import efrapq.pipeline as pipeline

    small_limits()
    made = tmp_path / "made.onnx"

    def full_disk(*_: Any) -> None:
        raise OutputError("no space")

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "write_checked", full_disk)
        with pytest.raises(OutputError):
            defend(model, made, calib=data)
    assert list((tmp_path / "made.onnx.partial").glob("*.npz"))
    content = bytearray((tmp_path / "net.data").read_bytes())
    # The last weight of the file; the .onnx file stays as it is.
    content[-1] ^= 1
    (tmp_path / "net.data").write_bytes(content)
    with pytest.raises(UsageError, match="begun with another model"):
        defend(model, made, calib=data, resume=True)
    content[-1] ^= 1
    (tmp_path / "net.data").write_bytes(content)
    assert defend(model, made, calib=data, resume=True).data == defend(model, calib=data).data


def test_a_change_while_it_runs_ends_the_run(
    any_model: Path, data: Path, tmp_path: Path, small_limits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    small_limits()
    file = next(path for path in (tmp_path / "net.data", any_model) if path.exists())
    honest, reads = FileTensor.read, 0

    def read(self: FileTensor) -> Any:
        nonlocal reads
        reads += 1
        if reads == 12:  # after loading, in which each of four is read once
            content = bytearray(file.read_bytes())
            content[self.offset] ^= 1
            file.write_bytes(content)
        return honest(self)

    monkeypatch.setattr(FileTensor, "read", read)
    made = tmp_path / "made.onnx"
    with pytest.raises(CorruptFileError, match="changed since the model was loaded"):
        defend(any_model, made, calib=data)
    assert reads == 12
    assert not made.exists()
    assert not (tmp_path / "made.json").exists()


def test_other_weights_under_the_same_graph_are_noticed(model: Path, data: Path, tmp_path: Path) -> None:
    made = tmp_path / "made.onnx"
    defend(model, made, calib=data)
    content = bytearray((tmp_path / "net.data").read_bytes())
    content[2] ^= 1
    (tmp_path / "net.data").write_bytes(content)
    with pytest.raises(InputError, match="its external data are not those"):
        verify(made, data=data)


@pytest.mark.parametrize("name", ["net.data", "net.json"])
def test_a_file_of_weights_is_never_the_output(model: Path, data: Path, tmp_path: Path, name: str) -> None:
    output = tmp_path / "net.data"
    if name == "net.json":
        onnx.save(onnx.load(model), model, save_as_external_data=True, location=name, size_threshold=0)
        output = tmp_path / "net.other"  # whose evidence would be net.json
    before = (tmp_path / name).read_bytes()
    with pytest.raises(OutputError, match="this is the input file"):
        defend(model, output, calib=data)
    assert (tmp_path / name).read_bytes() == before
    assert not (tmp_path / "net.other").exists()


def test_weights_are_written_for_the_runtime_and_removed(
    model: Path, data: Path, tmp_path: Path, small_limits: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "temporary"))
    small_limits()
    made = tmp_path / "made.onnx"
    defend(model, made, calib=data)
    assert verify(made, data=data).passed
    assert not list((tmp_path / "temporary").iterdir())


# The quantized model's codes in a file.


@pytest.fixture
def two_files(model: Path, data: Path, tmp_path: Path, small_files: Any) -> Any:
    """(the model in one file, the same in two), made.onnx."""
    whole = defend(model, tmp_path / "whole.onnx", calib=data)
    small_files()
    return whole, defend(model, tmp_path / "made.onnx", calib=data)


def test_two_files_hold_what_one_does(two_files: Any, tmp_path: Path) -> None:
    whole, apart = two_files
    assert apart.quantized.digest == whole.quantized.digest
    loaded = onnx.load(tmp_path / "made.onnx")
    were_outside = [t.name for t in loaded.graph.initializer if t.HasField("data_location")]
    assert were_outside == ["c1.weight.codes", "c2.weight.codes", "c3.weight.codes"]
    for tensor in loaded.graph.initializer:
        tensor.ClearField("data_location")
    assert loaded.SerializeToString(deterministic=True) == whole.data
    content = (tmp_path / "made.onnx.data").read_bytes()
    assert apart.evidence["output"] == {
        "path": str(tmp_path / "made.onnx"),
        "sha256": hashlib.sha256((tmp_path / "made.onnx").read_bytes()).hexdigest(),
        "bytes": len(apart.data) + len(content),
        "codes_sha256": whole.quantized.digest,
        "external": {"made.onnx.data": hashlib.sha256(content).hexdigest()},
    }
    assert sorted(p.name for p in tmp_path.glob("made*")) == ["made.json", "made.onnx", "made.onnx.data"]
    for tensor in onnx.load(tmp_path / "made.onnx", load_external_data=False).graph.initializer:
        entries = {e.key: e.value for e in tensor.external_data}
        if entries:
            assert entries["location"] == "made.onnx.data"
            assert int(entries["offset"]) % 65536 == 0


@pytest.mark.parametrize("mapped", [False, True], ids=["read whole", "left in its file"])
def test_two_files_are_read_by_every_command(
    two_files: Any, data: Path, tmp_path: Path, small_limits: Any, mapped: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, _ = two_files
    expected = timeless(verify(tmp_path / "whole.onnx", data=data).document)
    if mapped:
        small_limits()
    found = verify(tmp_path / "made.onnx", data=data)
    document = timeless(found.document)
    for changed in (document, expected):
        for key in ("path", "sha256", "bytes"):
            changed["model"].pop(key)
    assert found.passed
    assert document == expected
    assert document["model"]["matches_evidence"]
    assert inspect(tmp_path / "made.onnx")["codes_sha256"] == whole.quantized.digest
    again = export(tmp_path / "made.onnx", tmp_path / "again.onnx", target="portable")
    assert again.codes_sha256 == whole.quantized.digest
    assert (tmp_path / "again.onnx.data").exists()
    monkeypatch.undo()
    target = json.loads(whole.quantized.metadata["efrapq.settings"])["target"]
    export(tmp_path / "again.onnx", tmp_path / "back.onnx", target=target)
    assert (tmp_path / "back.onnx").read_bytes() == whole.data


def test_a_code_changed_in_the_second_file_is_noticed(two_files: Any, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "made.onnx.data"
    content = bytearray(path.read_bytes())
    content[0] ^= 0x11
    path.write_bytes(content)
    found = verify(tmp_path / "made.onnx", data=data)
    assert not found.passed
    assert "codes" in found.document["failed"]
    assert found.document["model"]["matches_evidence"] is False


def test_a_second_file_needs_a_place(model: Path, data: Path, tmp_path: Path, small_files: Any) -> None:
    small_files()
    with pytest.raises(UsageError, match="give an output path"):
        defend(model, calib=data)
    (tmp_path / "made.onnx.data").mkdir()
    with pytest.raises(OutputError, match="is a directory"):
        defend(model, tmp_path / "made.onnx", calib=data)
    assert not (tmp_path / "made.onnx").exists()
    assert not (tmp_path / "made.json").exists()


def test_the_second_file_never_replaces_the_inputs_weights(
    model: Path, data: Path, tmp_path: Path, small_files: Any
) -> None:
    proto = onnx.load(model)
    onnx.save(proto, model, save_as_external_data=True, location="made.onnx.data", size_threshold=0)
    before = (tmp_path / "made.onnx.data").read_bytes()
    small_files()
    with pytest.raises(OutputError, match="this is the input file"):
        defend(model, tmp_path / "made.onnx", calib=data)
    assert (tmp_path / "made.onnx.data").read_bytes() == before
    assert not (tmp_path / "made.onnx").exists()


def test_an_export_never_replaces_the_data_of_what_it_exports(two_files: Any, tmp_path: Path) -> None:
    before = (tmp_path / "made.onnx.data").read_bytes()
    with pytest.raises(OutputError, match="this is the input file"):
        export(tmp_path / "made.onnx", tmp_path / "made.onnx.data", target="portable")
    renamed = (tmp_path / "made.onnx").rename(tmp_path / "other.onnx")
    with pytest.raises(OutputError, match="this is the input file"):
        export(renamed, tmp_path / "made.onnx", target="portable")
    assert (tmp_path / "made.onnx.data").read_bytes() == before
    assert not (tmp_path / "made.onnx").exists()
