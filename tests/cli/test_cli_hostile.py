"""Bad input on the command line: one line, exit code 2, no output file, no code run."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import onnx
import pytest
import torch
from onnx import numpy_helper
from safetensors.torch import load_file, save_file

from efrapq.models import weights, zoo


def refused(run, tmp_path: Path, model: Path, *options: object) -> str:
    output = tmp_path / "out.int4.onnx"
    ran = run("defend", model, "-o", output, "-q", *options)
    assert ran.code == 2, ran.err
    assert ran.out == ""
    lines = [line for line in ran.err.splitlines() if line.startswith("error: ")]
    assert len(lines) == 1, ran.err
    assert "Traceback" not in ran.err
    assert not output.exists()
    assert not output.with_suffix(".json").exists()
    assert not list(tmp_path.glob("*.tmp"))
    return lines[0]


class Runs:
    def __init__(self, canary: Path) -> None:
        self.canary = canary

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.canary}",)


def test_a_pickle_that_runs_a_program(run, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "model.pt"
    torch.save({"conv1.weight": Runs(canary)}, path)
    assert "system" in refused(run, tmp_path, path)
    assert not canary.exists()


def test_a_bare_pickle(run, tmp_path: Path) -> None:
    canary, path = tmp_path / "canary", tmp_path / "model.pt"
    path.write_bytes(pickle.dumps(Runs(canary)))
    refused(run, tmp_path, path)
    assert not canary.exists()


def test_a_whole_module_says_what_to_do(run, tmp_path: Path) -> None:
    path = tmp_path / "model.pt"
    torch.save(zoo.build("smallresnet28", width=2), path)
    message = refused(run, tmp_path, path)
    assert "--trust-pickle" in message
    assert "state_dict" in message


@pytest.mark.parametrize("part", range(0, 16, 3))
def test_truncated(run, tmp_path: Path, part: int) -> None:
    data = weights.SUBJECT.read_bytes()
    path = tmp_path / "cut.safetensors"
    path.write_bytes(data[: len(data) * part // 16])
    refused(run, tmp_path, path)


@pytest.mark.parametrize("value", [np.nan, np.inf], ids=["nan", "inf"])
def test_weights_that_are_not_numbers_are_named(run, tmp_path: Path, value: float) -> None:
    tensors = load_file(weights.SUBJECT)
    tensors["stage2.0.conv1.weight"][0, 0, 0, 0] = value
    path = tmp_path / "bad.safetensors"
    save_file(tensors, path)
    assert "stage2.0.conv1.weight" in refused(run, tmp_path, path)


def test_an_unknown_state_dict(run, tmp_path: Path) -> None:
    path = tmp_path / "unknown.safetensors"
    save_file({"\x1b[31mlayer.weight": torch.zeros(3, 3)}, path)
    message = refused(run, tmp_path, path)
    assert "--arch" in message
    assert "\x1b" not in message


def external(tmp_path: Path, location: str) -> Path:
    weight = numpy_helper.from_array(np.zeros((4, 3, 1, 1), np.float32), "w")
    weight.ClearField("raw_data")
    weight.data_location = onnx.TensorProto.EXTERNAL
    weight.external_data.add(key="location", value=location)
    node = onnx.helper.make_node("Conv", ["x", "w"], ["y"])
    graph = onnx.helper.make_graph(
        [node],
        "g",
        [onnx.helper.make_tensor_value_info("x", 1, ["N", 3, 8, 8])],
        [onnx.helper.make_tensor_value_info("y", 1, ["N", 4, 8, 8])],
        [weight],
    )
    path = tmp_path / "external.onnx"
    path.write_bytes(
        onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 17)]).SerializeToString()
    )
    return path


@pytest.mark.parametrize("location", ["../secret", "/etc/passwd", "a/../../b", "nul\0", "link"])
def test_external_data_outside_the_models_folder(run, tmp_path: Path, location: str) -> None:
    (tmp_path / "link").symlink_to("/etc/passwd")
    refused(run, tmp_path, external(tmp_path, location))


def calibration(tmp_path: Path, **arrays: object) -> Path:
    path = tmp_path / "calib.npz"
    np.savez(path, **arrays)  # type: ignore[arg-type]
    return path


@pytest.mark.parametrize(
    "arrays",
    [
        {"images": np.array([object()])},
        {"images": np.zeros((4, 28, 28, 1), np.int32)},
        {"images": np.zeros((4, 28), np.uint8)},
        {"images": np.zeros((0, 28, 28, 1), np.uint8)},
        {"images": np.full((4, 1, 28, 28), np.nan, np.float32)},
        {"images": np.zeros((4, 32, 32, 1), np.uint8)},
        {"nothing": np.zeros(3)},
    ],
    ids=["objects", "int32", "two axes", "empty", "nan", "wrong size", "no images"],
)
def test_calibration_data(run, tmp_path: Path, arrays: dict[str, object]) -> None:
    path = calibration(tmp_path, **arrays)
    assert "calib.npz" in refused(run, tmp_path, weights.SUBJECT, "--calib", path)


def test_one_broken_image_among_many_is_named(run, tmp_path: Path) -> None:
    from PIL import Image

    folder = tmp_path / "images"
    folder.mkdir()
    for i in range(5):
        Image.fromarray(np.full((28, 28), 40 * i, np.uint8)).save(folder / f"{i}.png")
    (folder / "3.png").write_bytes(b"\x89PNG\r\n\x1a\nbroken")
    assert "3.png" in refused(run, tmp_path, weights.SUBJECT, "--calib", folder)


def test_the_model_as_its_own_output(run, tmp_path: Path) -> None:
    model = tmp_path / "model.safetensors"
    model.write_bytes(weights.SUBJECT.read_bytes())
    link = tmp_path / "same.onnx"
    os.link(model, link)
    ran = run("defend", model, "-o", link)
    assert ran.code == 2
    assert link.read_bytes() == weights.SUBJECT.read_bytes()


def test_a_failure_late_in_the_run_leaves_the_old_output(run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    output = tmp_path / "out.onnx"
    output.write_bytes(b"the old file")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    ran = run("defend", weights.SUBJECT, "-o", output, "--calib", f"{weights.SAMPLES}:calib", "--calib-size", "8", "-q")
    assert ran.code == 2
    assert output.read_bytes() == b"the old file"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["out.onnx"]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "."], "."),
        (["-o", "x.json"], ".json"),
        (["--device", "gpu"], "--device"),
        (["--device", "cuda:99"], "CUDA"),
        (["--seed", "-1"], "--seed"),
        (["--arch", ":x"], "--arch"),
        (["--arch", "os:getcwd"], "--arch"),
        (["--arch", "no.such.module:f"], "--arch"),
        (["--lambda-e", "nan"], "--lambda-e"),
        (["--target", "\x1b[2Jnowhere"], "unknown target"),
    ],
    ids=["folder as output", "json as output", "device", "no such GPU", "seed", "no module", "not a network",
         "no such module", "nan", "escape codes"],
)  # fmt: skip
def test_options_that_cannot_work(run, tmp_path: Path, options: list[str], message: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("defend", weights.SUBJECT, "-q", "--calib", f"{weights.SAMPLES}:calib", "--calib-size", "8", *options)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert "\x1b" not in ran.err
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []
    # Not even a layer was solved for it: no journal lies where the output would be.
    assert list(weights.SUBJECT.parent.glob("*.partial")) == []


def test_a_folder_as_the_model(run, tmp_path: Path) -> None:
    assert run("defend", tmp_path).code == 2
    assert run("export", tmp_path, "--target", "portable").code == 2


def test_the_calibration_data_is_never_overwritten(run, tmp_path: Path) -> None:
    data = tmp_path / "calib.npz"
    data.write_bytes(weights.SAMPLES.read_bytes())
    ran = run("defend", weights.SUBJECT, "-o", data, "--calib", f"{data}:calib")
    assert ran.code == 2
    assert data.read_bytes() == weights.SAMPLES.read_bytes()
