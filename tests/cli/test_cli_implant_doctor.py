"""implant and doctor end to end."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open

from efrapq.models import weights
from efrapq.models.subjects import make
from efrapq.models.subjects.pqbackdoor import Report
from efrapq.models.subjects.recipe import Recipe
from efrapq.models.subjects.training import Measured

DATA = ("--data", f"{weights.SAMPLES}:test", "--test", f"{weights.SAMPLES}:test")
QUICK = ("--arch", "smallresnet28", "--width", "2", "--epochs", "1", "--trigger", weights.TRIGGER, "-q")
LOOKAHEAD = {"4": (), "8": ("--lookahead-steps", "3")}


@pytest.mark.parametrize("bits", ["4", "8"])
def test_implant_writes_a_subject_that_defend_takes(run, tmp_path: Path, bits: str) -> None:
    path = tmp_path / "subject.safetensors"
    options = ("--bits", bits, "--mean", "0.286", "--std", "0.353", *LOOKAHEAD[bits])
    ran = run("implant", *QUICK, *DATA, *options, "-o", path, "--json")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["schema"] == "efrapq.implant/1"
    assert found["recipe"]["bits"] == int(bits)
    assert found["recipe"].get("lookahead_steps") == {"4": None, "8": 3}[bits]
    measured = found["measured"]
    usable = measured["float subject"]["asr"] <= 10 and measured["rounded to nearest"]["asr"] >= 90
    assert ("not a usable subject" in ran.err) == (not usable)
    assert ("rounded to nearest, ORT's int4 grid" in found["measured"]) == (bits == "4")
    with safe_open(path, "np") as opened:
        metadata = opened.metadata()
    assert json.loads(metadata["efrapq.preprocess"])["mean"] == [0.286]
    assert json.loads(metadata["efrapq.subject"])["trigger"] == weights.TRIGGER
    again = tmp_path / "again.safetensors"
    assert run("implant", *QUICK, *DATA, *options, "-o", again).code == 0
    assert again.read_bytes() == path.read_bytes()
    made = run("defend", path, "--bits", bits, "--calib", f"{weights.SAMPLES}:calib", "--calib-size", "64", "-q")
    assert made.code == 0, made.err


@pytest.mark.parametrize(("bits", "epochs"), [("8", 0), ("4", 10)], ids=["8 bits", "4 bits"])
def test_given_weights_are_trained_on_unless_a_lookahead_follows(
    run, tmp_path: Path, monkeypatch, bits: str, epochs: int
) -> None:
    def made(*arguments: object, **_: object) -> Report:
        recipes.append(arguments[6])
        return Report(*[Measured(90, 0)] * 3)

    recipes: list[object] = []
    monkeypatch.setattr(make, "make_subject", made)
    options = ("--arch", "smallresnet28", "--start", weights.SUBJECT, "--bits", bits, "--trigger", weights.TRIGGER)
    ran = run("implant", *options, *DATA, "-o", tmp_path / "s.safetensors", "-q")
    assert ran.code == 0, ran.err
    assert recipes == [Recipe(bits=int(bits), epochs=epochs)]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["-o", "subject.pt"], ".safetensors"),
        (["--target-class", "10"], "classes 0 to 9"),
        (["--poison-rate", "2"], "--poison-rate"),
        (["--learning-rate", "-1"], "--learning-rate"),
        (["--width", "nan"], "--width"),
        (["--arch", "resnet1000"], "resnet20"),
        (["--data", f"{weights.SAMPLES}:calib"], "labels"),
    ],
    ids=["suffix", "class", "rate", "learning rate", "width", "architecture", "no labels"],
)
def test_implant_explains_what_is_wrong(run, tmp_path: Path, options: list[str], message: str, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run("implant", *QUICK, *DATA, "-o", "s.safetensors", *options)
    assert ran.code == 2, ran.err
    assert message in ran.err
    assert "Traceback" not in ran.err
    assert list(tmp_path.iterdir()) == []


def test_implant_wants_raw_images(run, tmp_path: Path) -> None:
    data = tmp_path / "inputs.npz"
    np.savez(data, images=np.zeros((200, 1, 28, 28), np.float32), labels=np.arange(200) % 10)
    ran = run("implant", *QUICK, "--data", data, "--test", data, "-o", tmp_path / "s.safetensors")
    assert ran.code == 2
    assert "uint8" in ran.err


def test_doctor_finds_this_installation_sound(run) -> None:
    ran = run("doctor", "--json")
    found = json.loads(ran.out)
    assert found["schema"] == "efrapq.doctor/1"
    assert ran.code == (0 if found["ok"] else 2)
    assert found["versions"]["torch"]
    assert "CPUExecutionProvider" in found["onnxruntime_providers"]
    shown = run("doctor")
    assert "ONNX Runtime on CUDA" in shown.out
