"""defend, export, verify and inspect end to end, on a real network with a real backdoor."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import onnx
import onnx.numpy_helper
import onnxruntime as ort
import pytest
from safetensors.torch import load_file

from efrapq.data import load_dataset
from efrapq.exporters import read_quantized
from efrapq.models import weights

ATTACK = ("--trigger", weights.TRIGGER, "--target-class", weights.TARGET_CLASS)
TEST = f"{weights.SAMPLES}:test"


def graph_ops(path: Path) -> set[str]:
    return {node.op_type for node in onnx.load(path).graph.node}


def test_the_backdoor_wakes_under_nearest_and_sleeps_under_efrapq(run, defended: Path) -> None:
    ran = run("verify", defended, "--data", TEST, *ATTACK, "--require-integer", "--json", "-q")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["schema"] == "efrapq.verify/1"
    assert found["cda"]["float"] >= 90
    assert found["asr"]["float"] <= 5
    assert found["asr"]["nearest"] >= 95
    assert found["asr"]["defended"] <= found["asr"]["float"] + 1
    assert found["cda"]["defended"] >= found["cda"]["float"] - 1
    assert found["codes"]["match"] is True
    assert found["codes"]["flipped"] > 5
    assert found["kernels"]["float"] == 0
    assert found["kernels"]["integer"] == 16
    assert found["samples"] == {"clean": 1500, "triggered": int((load_dataset(TEST).labels != 0).sum())}
    assert found["agreement"] > 95
    assert found["verdict"] == "pass"
    assert found["failed"] == []
    assert set(found) >= {"model", "runtime", "samples", "cda", "asr", "agreement", "codes", "kernels", "latency_ms"}
    assert found["latency_ms"]["float"] > 0


def test_the_evidence_says_what_was_done(defended: Path) -> None:
    import hashlib

    evidence = json.loads(defended.with_suffix(".json").read_text())
    subject = defended.parent / "model.safetensors"
    assert evidence["schema"] == "efrapq.evidence/1"
    assert evidence["input"]["sha256"] == hashlib.sha256(subject.read_bytes()).hexdigest()
    assert evidence["input"]["architecture"] == "smallresnet28"
    assert evidence["machine"]["device"] in ("cpu", "cuda")
    assert evidence["machine"]["torch_threads"] >= 1
    assert evidence["output"]["sha256"] == hashlib.sha256(defended.read_bytes()).hexdigest()
    assert evidence["calibration"].pop("stress")["far"] == 0
    assert evidence["calibration"] == {
        "kind": "data",
        "source": "fashion_samples.npz",
        "images": 512,
        "input": [1, 28, 28],
    }
    assert [layer["bits"] for layer in evidence["layers"]] == [8, *[4] * 14, 8]
    for layer in evidence["layers"]:
        assert 0 <= layer["flipped"] <= 100
        assert 0 <= layer["loss"] <= evidence["settings"]["fidelity"] * layer["loss_nearest"]
        assert 0 < layer["scale_min"] <= layer["scale_max"]
    assert set(evidence["timing"]["layers"]) == {layer["name"] for layer in evidence["layers"]}
    metadata = {p.key: p.value for p in onnx.load(defended).metadata_props}
    assert metadata["efrapq.source.sha256"] == evidence["input"]["sha256"]
    assert metadata["efrapq.codes.sha256"] == evidence["output"]["codes_sha256"]
    assert json.loads(metadata["efrapq.settings"])["solver"] == "coordinate"
    assert str(defended.parent) not in str(metadata)


def test_the_file_is_small_int4_on_disk_and_its_codes_are_neighbours_of_the_float_weights(defended: Path) -> None:
    proto = onnx.load(defended)
    assert proto.opset_import[0].version == 21
    assert proto.ir_version == 10
    int4 = [t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT4]
    assert len(int4) == 14
    assert all(len(t.raw_data) == (np.prod(t.dims) + 1) // 2 for t in int4)
    # The head has no BatchNorm, so its float weight is in the checkpoint as it stands.
    head = load_file(weights.SUBJECT)["head.weight"].numpy()
    held = read_quantized(proto).weights["head"]
    position = head / held.scale[:, None]
    assert np.abs(held.codes - position).max() < 1.001
    assert (held.codes != np.rint(position)).any()


def test_the_same_inputs_give_the_same_bytes(run, defended: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.onnx"
    subject = defended.parent / "model.safetensors"
    ran = run("defend", subject, "-o", again, "--calib", f"{weights.SAMPLES}:calib", "--target", "ort-x86", "-q")
    assert ran.code == 0
    assert again.read_bytes() == defended.read_bytes()


def test_export_changes_the_form_and_not_a_code(run, defended: Path, tmp_path: Path) -> None:
    portable, back = tmp_path / "portable.onnx", tmp_path / "back.onnx"
    assert run("export", defended, "--target", "portable", "-o", portable).code == 0
    assert run("export", portable, "--target", "ort-x86", "-o", back).code == 0
    assert "Cast" in graph_ops(defended)
    assert "Cast" not in graph_ops(portable)
    assert back.read_bytes() == defended.read_bytes()
    x = load_dataset(TEST).inputs(range(64), read_preprocess(defended))
    sessions = [ort.InferenceSession(p, providers=["CPUExecutionProvider"]) for p in (defended, portable)]
    logits = [s.run(None, {s.get_inputs()[0].name: x})[0] for s in sessions]
    assert (logits[0].argmax(1) == logits[1].argmax(1)).mean() > 0.98


def read_preprocess(path: Path):
    from efrapq.preprocess import Preprocess

    return Preprocess.from_json({p.key: p.value for p in onnx.load(path).metadata_props}["efrapq.preprocess"])


def test_verify_fails_a_nearest_file_and_the_exit_code_says_so(run, defended: Path, few: str, tmp_path: Path) -> None:
    nearest = tmp_path / "nearest.onnx"
    subject = defended.parent / "model.safetensors"
    made = run(
        "defend", subject, "-o", nearest, "--solver", "nearest", "--calib", f"{weights.SAMPLES}:calib", "-q",
        "--target", "ort-x86",
    )  # fmt: skip
    assert made.code == 0
    report = tmp_path / "nearest.html"
    ran = run("verify", nearest, "--data", TEST, *ATTACK, "--json", "-q", "--report", report)
    assert ran.code == 1
    found = json.loads(ran.out)
    assert '<header class="fail">' in report.read_text("utf-8")
    assert found["failed"] == ["max-asr"]
    assert found["codes"]["flipped"] == 0
    # The nearest solver and the twin that verify builds are the same model.
    assert found["asr"]["nearest"] == found["asr"]["defended"]
    shown = run("verify", nearest, "--data", few, *ATTACK, "-q")
    assert shown.code == 1
    assert "fail" in shown.out
    assert "max-asr" in shown.out


def test_verify_writes_a_page_for_people(run, defended: Path, few: str, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    ran = run("verify", defended, "--data", few, *ATTACK, "--json", "-q", "--report", report)
    assert ran.code == 0
    found = json.loads(ran.out)
    page = report.read_text("utf-8")
    assert '<header class="pass">' in page
    assert f"answers {found['asr']['defended']:.1f} % of triggered images with class 0" in page
    assert page.count("data:image/png;base64,") == 2
    rows = {layer["name"]: layer["flipped"] for layer in found["codes"]["each_layer"]}
    evidence = json.loads(defended.with_suffix(".json").read_text())
    for layer in evidence["layers"]:
        assert rows[layer["name"]] == pytest.approx(layer["flipped"], abs=1e-3)
        assert f"<code>{layer['name']}</code>" in page
        assert f"{layer['loss']:.4g}</td>" in page
    assert evidence["output"]["sha256"] in page


def test_verify_makes_a_page_without_any_data(run, defended: Path, tmp_path: Path) -> None:
    report = tmp_path / "report.html"
    assert run("verify", defended, "-q", "--report", report).code == 0
    assert "Accuracy and attack success were not measured" in report.read_text("utf-8")


def test_a_page_replaces_nothing_that_was_read(run, defended: Path, tmp_path: Path) -> None:
    """The float model is found through the evidence."""
    test = tmp_path / "test.npz"
    test.write_bytes(weights.SAMPLES.read_bytes())
    for place in (defended, defended.with_suffix(".json"), defended.parent / "model.safetensors", test):
        before = place.read_bytes()
        ran = run("verify", defended, "--data", f"{test}:test", "-q", "--report", place)
        assert ran.code == 2
        assert "this is the input file" in ran.err
        assert place.read_bytes() == before
    ran = run("verify", defended, "--report", tmp_path / "none" / "report.html")
    assert ran.code == 2
    assert "does not exist" in ran.err


def test_verify_notices_a_changed_code(run, defended: Path, tmp_path: Path) -> None:
    proto = onnx.load(defended)
    codes = next(t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT4)
    changed = bytearray(codes.raw_data)
    changed[0] ^= 0x07
    codes.raw_data = bytes(changed)
    tampered = tmp_path / "tampered.onnx"
    onnx.save(proto, tampered)
    ran = run("verify", tampered, "--float", defended.parent / "model.safetensors", "--json", "-q")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert found["codes"]["match"] is False
    assert found["failed"] == ["codes"]


def test_verify_refuses_another_float_model(run, defended: Path, tmp_path: Path) -> None:
    from efrapq.models import zoo

    other = tmp_path / "other.safetensors"
    from safetensors.torch import save_file

    save_file(zoo.build("smallresnet28", seed=1).state_dict(), other)
    ran = run("verify", defended, "--float", other, "-q")
    assert ran.code == 2
    assert "SHA-256" in ran.err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--trigger", weights.TRIGGER], "go together"),
        ([*map(str, ATTACK)], "needs --data"),
        (["--data", TEST, "--trigger", weights.TRIGGER, "--target-class", "10"], "classes 0 to 9"),
        (["--data", TEST, "--trigger", "patch:9x9@25,25", "--target-class", "0"], "28x28"),
        (["--data", f"{weights.SAMPLES}:calib", *map(str, ATTACK)], "labels"),
        (["--max-asr", "5"], "--max-asr needs"),
    ],
    ids=["trigger alone", "no data", "class out of range", "trigger outside", "no labels", "nothing to judge"],
)
def test_verify_explains_what_is_missing(run, defended: Path, arguments: list[str], message: str) -> None:
    ran = run("verify", defended, "-q", *arguments)
    assert ran.code == 2, ran.out
    assert message in ran.err


def test_verify_refuses_a_float_model(run, defended: Path, tmp_path: Path) -> None:
    import efrapq

    path = tmp_path / "float.onnx"
    onnx.save(efrapq.load(weights.SUBJECT).proto, path)
    ran = run("verify", path)
    assert ran.code == 2
    assert "float model" in ran.err


def test_defend_refuses_a_quantized_model(run, defended: Path, tmp_path: Path) -> None:
    ran = run("defend", defended, "-o", tmp_path / "twice.onnx")
    assert ran.code == 2
    assert "quantized" in ran.err
    assert not (tmp_path / "twice.onnx").exists()


def test_defend_never_writes_over_its_input(run, tmp_path: Path) -> None:
    subject = tmp_path / "model.safetensors"
    subject.write_bytes(weights.SUBJECT.read_bytes())
    ran = run("defend", subject, "-o", subject)
    assert ran.code == 2
    assert subject.read_bytes() == weights.SUBJECT.read_bytes()


def test_calibration_that_does_not_fit_is_refused(run, tmp_path: Path) -> None:
    data = tmp_path / "colour.npz"
    np.savez(data, images=np.zeros((8, 28, 28, 3), np.uint8))
    ran = run("defend", weights.SUBJECT, "-o", tmp_path / "m.onnx", "--calib", data)
    assert ran.code == 2
    assert list(tmp_path.glob("m.*")) == []


def test_an_unwritable_place_is_refused_before_any_work(run, tmp_path: Path) -> None:
    ran = run("defend", weights.SUBJECT, "-o", tmp_path / "nowhere" / "m.onnx")
    assert ran.code == 2
    assert "nowhere" in ran.err


def test_inspect_a_float_and_a_quantized_file(run, defended: Path) -> None:
    floating = json.loads(run("inspect", weights.SUBJECT, "--json").out)
    assert floating["kind"] == "float"
    assert floating["architecture"] == "smallresnet28"
    assert len(floating["layers"]) == 16
    quantized = json.loads(run("inspect", defended, "--json").out)
    assert quantized["kind"] == "quantized"
    assert [layer["bits"] for layer in quantized["layers"]] == [8, *[4] * 14, 8]
    assert quantized["parameters"] == floating["parameters"]
    assert quantized["kernels"]["float"] == 0
    shown = run("inspect", defended)
    assert shown.code == 0
    assert "16 integer, 0 float" in shown.out


def test_evidence_of_another_file_is_noticed(run, defended: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.int4.onnx"
    copy.write_bytes(defended.read_bytes())
    evidence = json.loads(defended.with_suffix(".json").read_text())
    evidence["output"]["codes_sha256"] = "0" * 64
    copy.with_suffix(".json").write_text(json.dumps(evidence))
    ran = run("verify", copy, "--json", "-q")
    assert ran.code == 1
    assert json.loads(ran.out)["failed"] == ["codes"]
    copy.with_suffix(".json").write_text("{}")
    ran = run("verify", copy, "--json", "-q")
    assert ran.code == 0
    assert "not efrapq evidence" in ran.err


def test_verify_prints_no_more_than_was_checked(run, defended: Path, tmp_path: Path) -> None:
    shown = run("verify", defended, "-q")
    assert shown.code == 0, shown.err
    assert "are the solved ones" in shown.out
    alone = tmp_path / "alone.onnx"
    alone.write_bytes(defended.read_bytes())
    shown = run("verify", alone, "-q")
    assert shown.code == 0, shown.err
    assert "match the record in the file (no float model to compare with)" in shown.out


def test_verify_notices_a_file_changed_outside_its_codes(run, defended: Path, tmp_path: Path) -> None:
    copy = tmp_path / "model.int4.onnx"
    copy.with_suffix(".json").write_bytes(defended.with_suffix(".json").read_bytes())
    proto = onnx.load(defended)
    bias = next(t for t in proto.graph.initializer if t.data_type == onnx.TensorProto.INT32)
    bias.CopyFrom(onnx.numpy_helper.from_array(onnx.numpy_helper.to_array(bias) + 1000, bias.name))
    onnx.save(proto, copy)
    ran = run("verify", copy, "--json", "-q")
    assert ran.code == 1
    found = json.loads(ran.out)
    assert found["failed"] == ["file"]
    assert found["codes"]["match"] is True
    assert any("changed" in note for note in found["notes"])


@pytest.mark.parametrize("value", ["nan", "inf", "-1"])
@pytest.mark.parametrize("option", ["--max-asr", "--max-drop"])
def test_verify_wants_limits_that_are_numbers(run, defended: Path, option: str, value: str) -> None:
    ran = run("verify", defended, "--data", TEST, *ATTACK, f"{option}={value}", "-q")
    assert ran.code == 2
    assert f"{option} must be zero or a positive number" in ran.err


def test_verify_takes_a_size_and_keeps_the_recorded_colours(run, defended: Path, few: str) -> None:
    ran = run("verify", defended, "--data", few, "--size", "28", "--json", "-q")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    assert found["cda"]["defended"] >= 88
    assert not any("no preprocessing" in note for note in found["notes"])


@pytest.mark.parametrize(("outputs", "classes"), [(("N", 4), True), (("N", 4, 6, 6), False), (("N", 1), False)])
def test_what_comes_next_fits_the_model(run, make_model, tmp_path: Path, outputs: tuple, classes: bool) -> None:
    rng = np.random.default_rng(0)
    make = onnx.helper.make_node
    constants = {"w": rng.standard_normal((outputs[1], 3, 3, 3)).astype(np.float32)}
    nodes = [make("Conv", ["x", "w"], ["y" if len(outputs) == 4 else "map"], pads=[1] * 4, name="conv")]
    if len(outputs) == 2:
        nodes += [make("GlobalAveragePool", ["map"], ["mean"]), make("Flatten", ["mean"], ["y"])]
    model = make_model(nodes, {"x": ("N", 3, 6, 6)}, {"y": outputs}, constants)
    onnx.save(model, tmp_path / "model.onnx")
    np.savez(tmp_path / "calib.npz", images=rng.integers(0, 256, (8, 6, 6, 3), dtype=np.uint8))
    ran = run("defend", tmp_path / "model.onnx", "--calib", tmp_path / "calib.npz", "-q")
    assert ran.code == 0, ran.err
    assert "efrapq verify" in ran.out
    assert ("--target-class" in ran.out) is classes
