"""The demo: what the README shows, with the figures it promises."""

from __future__ import annotations

import json
from pathlib import Path

import onnx


def test_the_demo_shows_what_it_promises(run, tmp_path: Path) -> None:
    folder = tmp_path / "demo"
    ran = run("demo", "-o", folder, "--json", "-q")
    assert ran.code == 0, ran.err
    found = json.loads(ran.out)
    rows = {row["name"]: row for row in found["rows"]}
    assert rows["float"]["cda"] >= 90
    assert rows["float"]["asr"] <= 5
    assert rows["nearest"]["asr"] >= 95
    assert rows["quantize_static"]["asr"] >= 95
    assert rows["efrapq"]["asr"] <= rows["float"]["asr"] + 1
    assert rows["efrapq"]["cda"] >= rows["float"]["cda"] - 1
    assert rows["efrapq"]["kernels"] == {"integer": 16, "float": 0}
    assert rows["efrapq"]["bytes"] < 0.2 * rows["float"]["bytes"]
    assert found["codes_match"] is True
    assert found["samples"]["clean"] >= 1000
    assert found["samples"]["calibration"] >= 512
    for path in found["files"].values():
        assert Path(path).is_file()
        assert path.endswith(".json") or onnx.load(path).graph.node


def test_a_folder_that_cannot_be_made(run, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("in the way")
    ran = run("demo", "-o", tmp_path / "file" / "demo")
    assert ran.code == 2
    assert "Traceback" not in ran.err
