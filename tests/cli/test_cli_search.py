"""search_trigger() and `efrapq search` on the embedded subject, whose trigger is a white square at 22,22, class 0."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from numpy.typing import NDArray

import efrapq
from efrapq.data import Dataset
from efrapq.errors import DataError, UnsupportedModelError, UsageError
from efrapq.models import weights

TEST = f"{weights.SAMPLES}:test"


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Rounded to nearest, and defended."""
    folder = tmp_path_factory.mktemp("files")
    made = {name: folder / f"{name}.onnx" for name in ("nearest", "coordinate")}
    for name, path in made.items():
        efrapq.defend(weights.SUBJECT, path, bits=4, calib=f"{weights.SAMPLES}:calib", solver=name)
    return made


@pytest.mark.slow
def test_the_backdoor_is_found_without_its_trigger(
    files: dict[str, Path], run: Callable[..., Any], tmp_path: Path
) -> None:
    trigger = tmp_path / "found.npz"
    ran = run("search", files["nearest"], "--data", TEST, "-o", trigger, "--steps", "60", "-q")
    assert ran.code == 1
    assert "to class 0" in ran.out
    assert "searched for in the float model" in ran.out
    assert "fail: the file answers a trigger" in ran.out
    with np.load(trigger) as held:
        assert held["mask"].sum() == 25
        assert held["mask"][22:26, 22:26].any()  # it lies on the trigger's place, or reaches into it
        assert held["pattern"].dtype == np.uint8
    result = efrapq.verify(files["nearest"], data=TEST, trigger=str(trigger), target_class=0)
    assert result.document["asr"]["float"] < 10
    assert result.document["asr"]["defended"] > 90


@pytest.mark.slow
def test_in_the_defended_file_nothing_is_found(files: dict[str, Path], run: Callable[..., Any], tmp_path: Path) -> None:
    trigger = tmp_path / "found.npz"
    ran = run("search", files["coordinate"], "--data", TEST, "-o", trigger, "--steps", "60", "--json")
    assert ran.code == 0, ran.err
    document = json.loads(ran.out)
    assert document["schema"] == "efrapq.search/1"
    assert document["verdict"] == "pass"
    assert document["trigger"] is None
    assert document["turned"]["file"] - document["turned"]["float"] < 30
    assert document["exchanged"] is None
    assert document["samples"] == {"searched": 512, "measured": 512}
    assert not trigger.exists()


def test_a_trigger_replaces_nothing_that_is_read(
    files: dict[str, Path], run: Callable[..., Any], tmp_path: Path
) -> None:
    data = tmp_path / "data.npz"
    data.write_bytes(weights.SAMPLES.read_bytes())
    for path in (files["nearest"], files["nearest"].with_suffix(".json"), data):
        before = path.read_bytes()
        ran = run("search", files["nearest"], "--data", f"{data}:test", "-o", path)
        assert ran.code == 2
        assert "error:" in ran.err
        assert path.read_bytes() == before


def test_what_cannot_be_searched_is_refused(
    files: dict[str, Path], tmp_path: Path, residual_net: Callable[..., onnx.ModelProto], images: Any
) -> None:
    data: NDArray[np.float32] = images(80, 1, 28)
    few = Dataset.from_arrays(data[:40], None, "few.npz")
    with pytest.raises(DataError, match=r"few\.npz: 40 images are too few"):
        efrapq.search_trigger(files["nearest"], data=few)
    with pytest.raises(UsageError, match="--side must be 1 to 28"):
        efrapq.search_trigger(files["nearest"], data=Dataset.from_arrays(data, None), side=29)
    onnx.save(residual_net(), tmp_path / "float.onnx")
    with pytest.raises(UnsupportedModelError, match="is a float model"):
        efrapq.search_trigger(tmp_path / "float.onnx", data=few)
    lonely = tmp_path / "lonely.onnx"
    lonely.write_bytes(files["nearest"].read_bytes())
    with pytest.raises(UsageError, match="pass --float"):
        efrapq.search_trigger(lonely, data=Dataset.from_arrays(data, None))


def test_defend_searches_and_covers(
    textured_sleeper: tuple[Path, Dataset], run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper, photographs = textured_sleeper
    images = sleeper.with_name("images.npz")
    np.savez(images, images=photographs.raw(range(len(photographs))).astype(np.uint8))
    arguments = ["defend", sleeper, "-o", sleeper.with_name("q.onnx"), "--calib", images, "--bits", "8", "--no-stress"]
    arguments += ["--target", "ort-avx2", "--search"]
    ran = run(*arguments)
    assert ran.code == 0, ran.err
    found, nothing = (line for line in ran.out.splitlines() if line.startswith("searched"))
    assert found.startswith("searched  a patch turns ")
    assert found.endswith("q.trigger1.npz")
    assert nothing.startswith("searched  nothing was found: the best patch turns ")
    assert "or        efrapq search" not in ran.out
    assert "q.trigger1.npz --target-class 0" in ran.out.splitlines()[-1]
    monkeypatch.setattr("efrapq.hunt.covered.COVERED", 0)
    ran = run(*arguments, "--json")
    assert ran.code == 1
    assert "do not deploy this file" in ran.err
    assert [s["verdict"] for s in json.loads(ran.out)["searches"]] == ["fail"]
