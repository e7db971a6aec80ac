"""The literal command of the README's first line, with nothing but the model."""

from __future__ import annotations

import json
from pathlib import Path

from efrapq.models import weights


def test_defend_with_no_option_but_bits(run, tmp_path: Path) -> None:
    subject = tmp_path / "model.safetensors"
    subject.write_bytes(weights.SUBJECT.read_bytes())
    ran = run("defend", subject, "--bits", "4")
    assert ran.code == 0, ran.err
    assert "BatchNorm statistics" in ran.err
    assert "model.int4.onnx" in ran.out
    evidence = json.loads((tmp_path / "model.int4.json").read_text())
    assert evidence["calibration"]["kind"] == "batchnorm-statistics"
    verified = run(
        "verify", tmp_path / "model.int4.onnx", "--data", f"{weights.SAMPLES}:test", "--trigger", weights.TRIGGER,
        "--target-class", weights.TARGET_CLASS, "--json", "-q",
    )  # fmt: skip
    found = json.loads(verified.out)
    assert found["asr"]["nearest"] >= 95
    assert found["asr"]["defended"] <= found["asr"]["float"] + 2
    assert found["cda"]["defended"] >= found["cda"]["float"] - 5
