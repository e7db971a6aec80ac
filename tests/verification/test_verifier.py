"""The verdict: what it asks, what it refuses to say without having looked, and files that lie."""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Callable
from io import StringIO
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from click.testing import CliRunner
from onnx import TensorProto, helper, numpy_helper
from rich.console import Console
from torch import nn

from efrapq.cli.inspect import command as inspect_command
from efrapq.cli.verify import command as verify_command
from efrapq.cli.verify import print_verification
from efrapq.data import Dataset
from efrapq.errors import DataError, UsageError
from efrapq.inspection import inspect
from efrapq.loading import PREPROCESS_KEY, load
from efrapq.preprocess import Preprocess, PreprocessOverride
from efrapq.report.evidence import EVIDENCE_SCHEMA
from efrapq.verification import Requirements, subject, verifier, verify
from efrapq.verification import images as measuring

ATTACK: dict[str, Any] = {"trigger": "patch:2x2@0,0", "target_class": 0}


class Files:
    """A small network and its quantized file in one folder."""

    def __init__(self, folder: Path, source: onnx.ModelProto, made: Any) -> None:
        self.folder = folder
        self.float = folder / "net.onnx"
        self.float.write_bytes(source.SerializeToString())
        self.made = made
        self.file = folder / "net.int4.onnx"

    def write(self, metadata: dict[str, str] | None = None, change: Callable[[onnx.ModelProto], None] | None = None):
        proto = self.made.export("ort-x86")
        del proto.metadata_props[:]
        helper.set_model_props(proto, metadata or {})
        if change is not None:
            change(proto)
        self.file.write_bytes(proto.SerializeToString())
        return self.file

    @property
    def record(self) -> dict[str, str]:
        return {
            "efrapq.codes.sha256": self.made.quantized.digest,
            "efrapq.source.sha256": hashlib.sha256(self.float.read_bytes()).hexdigest(),
        }

    def evidence(self, **document: Any) -> None:
        self.file.with_suffix(".json").write_text(json.dumps({"schema": EVIDENCE_SCHEMA} | document))


@pytest.fixture
def files(tmp_path: Path, quantize, residual_net, images) -> Files:
    source = residual_net()
    return Files(tmp_path, source, quantize(source, images(16)))


def labelled(classes: int = 5, count: int = 40) -> Dataset:
    rng = np.random.default_rng(0)
    pixels = rng.integers(0, 256, (count, 8, 8, 3), np.uint8)
    return Dataset.from_arrays(pixels, np.arange(count) % classes, "made.npz")


# The verdict.


def test_nothing_checked_is_no_pass(files: Files) -> None:
    result = verify(files.write())
    assert result.document["failed"] == ["nothing-checked"]
    assert not result.passed
    assert any("nothing was checked" in note for note in result.document["notes"])
    assert result.document["notes"] == list(result.notes)


def test_each_thing_checked_is_enough(files: Files) -> None:
    file = files.write()
    assert verify(file, requirements=Requirements(integer=True)).passed
    assert verify(file, data=labelled()).passed
    assert verify(file, float_model=files.float).passed
    assert verify(files.write(files.record)).passed


def test_codes_say_what_they_were_compared_with(files: Files) -> None:
    recorded = verify(files.write(files.record)).document
    assert recorded["codes"]["match"] is True
    assert recorded["codes"]["compared_with_float"] is False
    assert "match the record in the file (no float model to compare with)" in shown(recorded)
    assert "are the solved ones" not in shown(recorded)
    both = verify(files.file, float_model=files.float).document
    assert both["codes"]["compared_with_float"] is True
    assert "are the solved ones" in shown(both)
    unrecorded = verify(files.write(), float_model=files.float).document
    assert unrecorded["codes"]["match"] is True
    assert "no record of the solved ones" in shown(unrecorded)


def shown(document: dict[str, Any]) -> str:
    printed = StringIO()
    print_verification(document, Console(width=200, file=printed))
    return printed.getvalue()


def asr_of(monkeypatch: pytest.MonkeyPatch, floating: float, defended: float, in_float: float = 99.0) -> None:
    """Give these ASRs in the order in which they are asked for. in_float: of the file with float activations."""
    given = {"float": floating, "nearest": 99.0, "defended": defended, "in_float": in_float}
    order = iter(("defended", "float", "nearest", "in_float"))
    monkeypatch.setattr(measuring, "attack_success_rate", lambda *_: given[next(order)])


@pytest.mark.parametrize(
    ("floating", "defended", "max_asr", "failed"),
    [
        (80.0, 80.0, None, ["awake-in-float"]),
        (50.0, 52.0, None, ["awake-in-float", "max-asr"]),
        (80.0, 80.0, 90.0, []),
        (80.0, 95.0, 90.0, ["max-asr"]),
        (12.0, 13.0, None, []),
        (12.0, 13.1, None, ["max-asr"]),
    ],
)
def test_a_backdoor_awake_in_float_fails_unless_the_limit_was_given(
    files: Files,
    monkeypatch: pytest.MonkeyPatch,
    floating: float,
    defended: float,
    max_asr: float | None,
    failed: list[str],
) -> None:
    asr_of(monkeypatch, floating, defended)
    result = verify(
        files.write(files.record),
        data=labelled(),
        float_model=files.float,
        requirements=Requirements(max_asr=max_asr, max_drop=100),
        **ATTACK,
    )
    assert result.document["failed"] == failed
    notes = result.document["notes"]
    assert any("is awake before any quantization" in n for n in notes) == (floating >= 50)
    assert any("--calib-size" in n for n in notes) == ("max-asr" in failed and floating < 50)


@pytest.mark.parametrize("above", [4.9, 5.0])
def test_a_trigger_that_works_a_little_in_float_is_told(
    files: Files, monkeypatch: pytest.MonkeyPatch, above: float
) -> None:
    monkeypatch.setattr(measuring, "untriggered_rate", lambda *_: 2.0)
    asr_of(monkeypatch, 2.0 + above, 2.0)
    document = verify(files.write(files.record), data=labelled(), float_model=files.float, **ATTACK).document
    assert document["untriggered"] == {"float": 2.0, "nearest": 2.0, "defended": 2.0}
    said = [n for n in document["notes"] if "works a little before any quantization" in n]
    assert len(said) == (above >= 5)
    assert all("7.0 % of triggered images" in n and "2.0 % of the same images" in n for n in said)


@pytest.mark.parametrize(
    ("defended", "in_float", "wanted"),
    [
        (60.0, 3.0, "with float activations they answer 3.0 % of triggered images"),
        (20.0, 3.0, "--headroom 2"),
        (60.0, 3.1, "awake in the codes of this file (with float activations they answer 3.1 %"),
        (20.0, 3.1, "--calib-size"),
    ],
)
def test_what_is_advised_depends_on_what_wakes_the_backdoor(
    files: Files, monkeypatch: pytest.MonkeyPatch, defended: float, in_float: float, wanted: str
) -> None:
    asr_of(monkeypatch, 2.0, defended, in_float)
    result = verify(files.write(files.record), data=labelled(), float_model=files.float, **ATTACK)
    assert "max-asr" in result.document["failed"]
    assert result.document["asr"]["float_activations"] == in_float
    assert any(wanted in n for n in result.document["notes"])
    assert sum("the backdoor" in n for n in result.document["notes"]) == 1


def test_without_the_float_model_nothing_is_said_of_what_wakes_the_backdoor(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(measuring, "attack_success_rate", lambda *_: 60.0)
    result = verify(files.write(), data=labelled(), **ATTACK)
    assert "max-asr" in result.document["failed"]
    assert result.document["asr"]["float_activations"] is None
    assert not any("the backdoor" in n for n in result.document["notes"])


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -1.0])
@pytest.mark.parametrize("name", ["max_asr", "max_drop"])
def test_limits_must_be_numbers(name: str, value: float) -> None:
    with pytest.raises(UsageError, match=f"--{name.replace('_', '-')} must be zero or a positive number"):
        Requirements(**{name: value})


def test_limits_that_cannot_be_judged_are_refused_before_measuring(
    files: Files, monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(*_: object, **__: object) -> None:
        raise AssertionError("measured")

    monkeypatch.setattr(verifier, "open_session", never)
    file = files.write(files.record)
    unlabelled = Dataset.from_arrays(np.zeros((4, 8, 8, 3), np.uint8), None)
    for requirements, options, match in (
        (Requirements(max_asr=5), {}, "--max-asr needs"),
        (Requirements(max_asr=5), {"data": labelled()}, "--max-asr needs"),
        (Requirements(max_drop=5), {}, "--max-drop needs"),
        (Requirements(max_drop=5), {"data": labelled()}, "--max-drop needs"),
        (Requirements(max_drop=5), {"data": unlabelled, "float_model": files.float}, "--max-drop needs"),
    ):
        with pytest.raises(UsageError, match=match):
            verify(file, requirements=requirements, **options)
    with pytest.raises(DataError, match="no labels"):
        verify(file, data=unlabelled, **ATTACK)


@pytest.mark.parametrize(
    ("classes", "attack", "message"),
    [(5, ATTACK | {"target_class": 7}, "classes 0 to 4"), (9, {}, "only 5 classes")],
    ids=["target class", "label"],
)
def test_classes_that_the_model_has_not_are_refused_before_measuring(
    files: Files, monkeypatch: pytest.MonkeyPatch, classes: int, attack: dict[str, Any], message: str
) -> None:
    monkeypatch.setattr(measuring, "predict", None)
    with pytest.raises((DataError, UsageError), match=message):
        verify(files.write(), data=labelled(classes), **attack)


def test_help_names_the_limit_without_a_float_model() -> None:
    text = " ".join(CliRunner().invoke(verify_command, ["--help"]).output.split())
    assert "without a float model, 10" in text


# The evidence beside the file.


def test_a_change_outside_the_codes_is_noticed(files: Files) -> None:
    sha256 = hashlib.sha256(files.write(files.record).read_bytes()).hexdigest()
    files.evidence(output={"sha256": sha256, "codes_sha256": files.made.quantized.digest})
    intact = verify(files.file)
    assert intact.passed
    assert intact.document["model"]["matches_evidence"] is True

    def shift_a_bias(proto: onnx.ModelProto) -> None:
        bias = next(t for t in proto.graph.initializer if t.data_type == TensorProto.INT32)
        bias.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(bias) + 1000, bias.name))

    changed = verify(files.write(files.record, shift_a_bias))
    assert changed.document["codes"]["match"] is True
    assert changed.document["failed"] == ["file"]
    assert any("not in its weights' codes" in n for n in changed.document["notes"])


@pytest.mark.parametrize(
    "path",
    ["/" + "long/" * 200 + "x.onnx", "n" * 400, "with\0null", "", ".", "\udcff", ["a", "list"], 7],
    ids=["long path", "long name", "null", "empty", "folder", "surrogate", "list", "number"],
)
def test_odd_paths_in_the_evidence_are_models_not_found(files: Files, path: object) -> None:
    files.write(files.record)
    files.evidence(input={"path": path})
    result = verify(files.file)
    assert result.document["cda"]["float"] is None
    assert any("no float model to compare with" in n for n in result.notes)


@pytest.mark.parametrize("kind", ["deep", "huge", "folder", "bytes"])
def test_evidence_that_cannot_be_read_is_ignored_with_a_note(
    files: Files, monkeypatch: pytest.MonkeyPatch, kind: str
) -> None:
    beside = files.write(files.record).with_suffix(".json")
    if kind == "folder":
        beside.mkdir()
    elif kind == "deep":
        beside.write_text("[" * 200_000)
    elif kind == "bytes":
        beside.write_bytes(b"\xff\xfe\x00")
    else:
        files.evidence(input={"path": "x" * 2000})
        monkeypatch.setattr(subject, "MAX_EVIDENCE_BYTES", 1000)
    result = verify(files.file)
    assert any("is not efrapq evidence" in n for n in result.notes)
    assert result.passed


def test_the_recorded_float_model_is_found_by_its_hash(files: Files) -> None:
    files.write(files.record)
    files.evidence(input={"path": "/nowhere/net.onnx"})
    assert verify(files.file).document["codes"]["compared_with_float"] is True
    files.float.write_bytes(b"not a model at all")
    assert verify(files.file).document["codes"]["compared_with_float"] is False


# Preprocessing.


def given_to_predict(monkeypatch: pytest.MonkeyPatch) -> list[Preprocess]:
    seen: list[Preprocess] = []
    real = measuring.predict

    def spy(session: Any, data: Any, preprocess: Preprocess, *rest: Any) -> Any:
        seen.append(preprocess)
        return real(session, data, preprocess, *rest)

    monkeypatch.setattr(measuring, "predict", spy)
    return seen


def test_an_override_keeps_what_it_does_not_name(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = given_to_predict(monkeypatch)
    recorded = Preprocess((0.5,), (0.25,), (8, 8))
    file = files.write({PREPROCESS_KEY: recorded.to_json()})
    for given in (None, PreprocessOverride(size=(6, 6)), PreprocessOverride((0.1,), (0.2,)), Preprocess((0.3,))):
        result = verify(file, data=labelled(), preprocess=given)
        assert not any("no preprocessing" in n for n in result.notes)
    assert seen == [
        recorded,
        Preprocess((0.5,), (0.25,), (6, 6)),
        Preprocess((0.1,), (0.2,), (8, 8)),
        Preprocess((0.3,)),
    ]


def test_unknown_colours_are_a_note_even_where_a_size_was_given(files: Files) -> None:
    result = verify(files.write(), data=labelled(), preprocess=PreprocessOverride(size=(8, 8)))
    assert any("no preprocessing is recorded" in n for n in result.notes)


def test_an_unreadable_record_is_a_note_to_who_gave_the_numbers(files: Files) -> None:
    file = files.write({PREPROCESS_KEY: '{"mean": 3'})
    for unhelpful in (None, PreprocessOverride(size=(8, 8))):
        with pytest.raises(DataError, match="unreadable preprocessing record"):
            verify(file, data=labelled(), preprocess=unhelpful)
    for given in (PreprocessOverride((0.5,), (0.5,)), Preprocess()):
        result = verify(file, data=labelled(), preprocess=given)
        assert any("preprocessing record is unreadable" in n for n in result.notes)


# Shapes and latency.


def dynamic(proto: onnx.ModelProto) -> None:
    for i, name in enumerate("NCHW"):
        if i > 1:
            proto.graph.input[0].type.tensor_type.shape.dim[i].dim_param = name


def test_latency_without_data_takes_the_float_models_size(files: Files, monkeypatch: pytest.MonkeyPatch) -> None:
    shapes = []
    real = measuring.interleaved_latency
    monkeypatch.setattr(
        measuring, "interleaved_latency", lambda s, x: shapes.append(x.shape) or real(s, x, rounds=1, warmup=0)
    )
    file = files.write(files.record, dynamic)
    unknown = verify(file)
    assert unknown.document["latency_ms"] == {"float": None, "defended": None}
    assert any("latency is not measured" in n for n in unknown.notes)
    assert shapes == []
    known = verify(file, float_model=files.float)
    assert known.document["latency_ms"]["defended"] > 0
    verify(file, data=labelled())
    assert shapes == [(1, 3, 8, 8)] * 2


def test_images_for_a_model_with_another_input_are_refused(files: Files) -> None:
    def second_input(proto: onnx.ModelProto) -> None:
        proto.graph.input.append(helper.make_tensor_value_info("other", TensorProto.FLOAT, [1]))
        proto.graph.output.append(helper.make_tensor_value_info("same", TensorProto.FLOAT, [1]))
        proto.graph.node.append(helper.make_node("Identity", ["other"], ["same"]))

    with pytest.raises(DataError, match=r"images do not fit this model; give one array per input.*'other' float32"):
        verify(files.write(files.record, second_input), data=labelled())


class OwnNet(nn.Module):
    """No zoo knows it."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 6, 3, padding=1)
        self.head = nn.Linear(6, 5)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(torch.relu(self.conv(x)).mean((2, 3)))


def test_a_network_of_the_users_own_takes_the_files_input_shape(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantize, images
) -> None:
    factory = ModuleType("own_networks")
    factory.make = OwnNet  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "own_networks", factory)
    weights = tmp_path / "own.pt"
    torch.manual_seed(0)
    torch.save(OwnNet().state_dict(), weights)
    source = load(weights, arch="own_networks:make", input_shape=(3, 8, 8))
    file = tmp_path / "own.int4.onnx"
    file.write_bytes(quantize(source.proto, images(8)).export().SerializeToString())
    result = verify(file, float_model=weights, arch="own_networks:make")
    assert result.document["codes"]["compared_with_float"] is True


# Metadata from whoever wrote the file.


def test_an_unknown_target_makes_a_portable_twin(files: Files) -> None:
    file = files.write(files.record | {"efrapq.target": "\x1b[31mred"})
    result = verify(file, data=labelled(), float_model=files.float, requirements=Requirements(max_drop=100))
    assert result.document["cda"]["nearest"] is not None
    note = next(n for n in result.notes if "unknown target" in n)
    assert "portable" in note
    assert "\x1b" not in note


def test_notes_reach_json_and_quiet(files: Files) -> None:
    ran = CliRunner().invoke(verify_command, [str(files.write()), "--json", "-q"], standalone_mode=False)
    assert ran.return_value == 1
    assert "no float model to compare with" in " ".join(json.loads(ran.stdout)["notes"])


# inspect.


def dynamically_quantized(make_model) -> onnx.ModelProto:
    """Integer weights in a form that efrapq does not write."""
    rng = np.random.default_rng(0)
    return make_model(
        [
            helper.make_node("Flatten", ["x"], ["f"]),
            helper.make_node("DynamicQuantizeLinear", ["f"], ["q", "s", "z"]),
            helper.make_node("MatMulInteger", ["q", "w", "z"], ["i"]),
            helper.make_node("Cast", ["i"], ["y"], to=TensorProto.FLOAT),
        ],
        {"x": ["N", 3, 8, 8]},
        {"y": ["N", 5]},
        {"w": rng.integers(-128, 128, (192, 5)).astype(np.int8)},
    )


def test_inspect_tells_what_it_can_of_a_foreign_quantized_file(make_model, tmp_path: Path) -> None:
    proto = dynamically_quantized(make_model)
    helper.set_model_props(proto, {"maker": "somebody"})
    path = tmp_path / "foreign.onnx"
    path.write_bytes(proto.SerializeToString())
    found = inspect(path)
    assert found["kind"] == "quantized"
    assert found["metadata"] == {"maker": "somebody"}
    assert found["layers"] == []
    assert found["parameters"] == 0
    assert found["kernels"]["integer"] == 1
    assert any("layers are not read back" in n for n in found["notes"])
    ran = CliRunner().invoke(inspect_command, [str(path)])
    assert ran.exit_code == 0, ran.output
    assert "note: layers are not read back" in ran.stdout


def test_inspect_leaves_the_kernels_of_a_quantized_file_to_the_runtime(files: Files) -> None:
    quantized = CliRunner().invoke(inspect_command, [str(files.write(files.record))])
    assert quantized.exit_code == 0, quantized.output
    assert quantized.stdout.count("eligible") == 4
    floating = CliRunner().invoke(inspect_command, [str(files.float)])
    assert "eligible" not in floating.stdout


def test_verify_of_a_foreign_quantized_file_checks_nothing(make_model, tmp_path: Path) -> None:
    path = tmp_path / "foreign.onnx"
    path.write_bytes(dynamically_quantized(make_model).SerializeToString())
    result = verify(path)
    assert result.document["failed"] == ["nothing-checked"]
    assert any("codes are not read back" in n for n in result.notes)
