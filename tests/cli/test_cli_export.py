"""efrapq export: one solution, several files."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import onnx
import pytest

from efrapq.exporters import PROFILES, read_quantized


@pytest.fixture
def model(defended: Path, tmp_path: Path) -> Path:
    """A copy of the defended subject in a folder of its own."""
    path = tmp_path / "model.int4.onnx"
    shutil.copyfile(defended, path)
    return path


def test_several_targets_give_several_files_of_one_solution(run, model: Path) -> None:
    ran = run("export", model, *(a for t in PROFILES for a in ("--target", t)), "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["schema"] == "efrapq.export/2"
    assert [f["target"] for f in found["files"]] == list(PROFILES)
    for file in found["files"]:
        path = Path(file["path"])
        assert path == model.with_name(f"model.int4.{file['target']}.onnx")
        assert path.stat().st_size == file["bytes"]
        assert read_quantized(onnx.load(path)).digest == found["codes_sha256"]
    assert model.with_name("model.int4.ort-x86.onnx").read_bytes() == model.read_bytes()


def test_a_target_given_twice_is_written_once(run, model: Path) -> None:
    ran = run("export", model, "--target", "portable", "--target", "portable", "--json")
    assert [f["target"] for f in json.loads(ran.out)["files"]] == ["portable"]


def test_an_output_names_the_file_of_one_target(run, model: Path, tmp_path: Path) -> None:
    output = tmp_path / "out.onnx"
    ran = run("export", model, "--target", "ort-arm", "--target", "qnn", "-o", output)
    assert ran.code == 2
    assert "several targets" in ran.err
    assert not output.exists()
    assert run("export", model, "--target", "ort-arm", "-o", output).code == 0
    assert output.is_file()


def test_one_unknown_target_and_nothing_is_written(run, model: Path) -> None:
    before = set(model.parent.iterdir())
    ran = run("export", model, "--target", "portable", "--target", "tpu")
    assert ran.code == 2
    assert "unknown target 'tpu'" in ran.err
    assert set(model.parent.iterdir()) == before


def test_what_was_changed_is_said(run, model: Path) -> None:
    ran = run("export", model, "--target", "tensorrt", "--target", "ort-x86")
    assert ran.code == 0
    assert "activation grids were made anew" in ran.out
    assert "--bits 7 --edge-bits 7" in ran.out
    assert "read back from all 3 files, the same" in ran.out


def test_inspect_names_layers_that_can_saturate(run, model: Path) -> None:
    found = json.loads(run("inspect", model, "--json").out)
    assert {s["layer"] for s in found["saturation"]} <= {"stem", "head"}
    assert all(s["worst"] > 32767 for s in found["saturation"])
    assert any("--edge-bits 7" in note for note in found["notes"])


def test_the_other_targets_verify_as_well(run, model: Path, few: str) -> None:
    """The symmetric grids of TensorRT are other grids: the defence is measured on them, in ONNX Runtime."""
    from efrapq.models import weights

    assert run("export", model, "--target", "tensorrt", "--target", "qnn").code == 0
    for target in ("tensorrt", "qnn"):
        ran = run(
            "verify", model.with_name(f"model.int4.{target}.onnx"), "--float", weights.SUBJECT, "--data", few,
            "--trigger", weights.TRIGGER, "--target-class", weights.TARGET_CLASS, "--json", "-q", "--max-asr", 8,
        )  # fmt: skip
        found = json.loads(ran.out)
        assert ran.code == 0, found["failed"]
        assert found["asr"]["nearest"] >= 95
        assert found["codes"]["match"] is True
