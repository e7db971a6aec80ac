"""defend_searched(): a backdoor in what is clipped, whose trigger nobody gives."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import efrapq
from efrapq.data import Dataset
from efrapq.errors import UsageError
from efrapq.hunt import Found, covered
from efrapq.progress import Silent

OPTIONS: dict[str, Any] = {"bits": 8, "target": "ort-avx2", "stress": False}


def test_what_is_found_is_covered(textured_sleeper: tuple[Path, Dataset]) -> None:
    sleeper, photographs = textured_sleeper
    file, reporter = sleeper.with_name("q.onnx"), Silent()
    options = OPTIONS | {"calib": photographs}
    searched = efrapq.defend_searched(sleeper, file, search_steps=40, reporter=reporter, **options)
    assert searched.passed
    assert [found.passed for found in searched.searches] == [False, True]
    trigger = sleeper.with_name("q.trigger1.npz")
    assert trigger.read_bytes() == searched.searches[0].trigger
    assert "q.trigger1.npz" in "".join(reporter.warnings)
    evidence = json.loads(file.with_suffix(".json").read_text())
    assert evidence == json.loads(json.dumps(searched.made.evidence))
    assert [s["verdict"] for s in evidence["searches"]] == ["fail", "pass"]
    assert [s["trigger"] for s in evidence["searches"]] == [str(trigger), None]
    assert evidence["settings"]["cover"] == ["q.trigger1.npz"]
    asr = efrapq.verify(file, data=photographs, trigger=str(trigger), target_class=0).document["asr"]
    assert (asr["float"], asr["defended"]) == (0.0, 0.0)
    by_hand = efrapq.defend(sleeper, cover=[str(trigger)], **options)
    assert by_hand.data == file.read_bytes()
    # What an earlier run left beside the file is given to the next: its own goes elsewhere.
    again = efrapq.defend_searched(sleeper, file, search_steps=40, cover=[str(trigger)], **options)
    assert [found.passed for found in again.searches] == [True]
    assert trigger.read_bytes() == searched.searches[0].trigger


def test_where_nothing_is_found_the_file_is_that_of_defend(clipped_sleeper: tuple[Path, Dataset]) -> None:
    sleeper, photographs = clipped_sleeper
    options = OPTIONS | {"calib": photographs, "stress": True}
    searched = efrapq.defend_searched(sleeper, sleeper.with_name("q.onnx"), search_steps=10, **options)
    assert [found.passed for found in searched.searches] == [True]
    assert sleeper.with_name("q.onnx").read_bytes() == efrapq.defend(sleeper, **options).data
    assert sorted(path.name for path in sleeper.parent.iterdir()) == ["m.onnx", "q.json", "q.onnx"]


def always_found(*_: object, output: Path, **__: object) -> Found:
    """What a search says of a backdoor in the weights, which no range silences."""
    np.savez(output, mask=np.ones((16, 16), np.uint8), pattern=np.zeros((16, 16, 1), np.uint8))
    rates = {"float": 1.0, "file": 99.0}
    patch = {"side": 3, "row": 0, "col": 0}
    about = {"samples": {}, "effort": {}, "patch": patch, "target_class": 0, "turned": rates, "exchanged": rates}
    return Found(about | {"verdict": "fail", "trigger": str(output)}, output.read_bytes())


def test_what_covering_does_not_silence_is_said(
    clipped_sleeper: tuple[Path, Dataset], monkeypatch: pytest.MonkeyPatch
) -> None:
    sleeper, photographs = clipped_sleeper
    monkeypatch.setattr(covered, "search_trigger", always_found)
    reporter = Silent()
    searched = efrapq.defend_searched(
        sleeper, sleeper.with_name("q.onnx"), calib=photographs, reporter=reporter, **OPTIONS
    )
    assert not searched.passed
    assert len(searched.searches) == 3
    assert searched.made.evidence["settings"]["cover"] == ["q.trigger1.npz", "q.trigger2.npz"]
    assert reporter.warnings[-1].startswith("do not deploy this file")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"calib": None}, "pass some with --calib"),
        ({"calib": {"x": np.zeros((8, 1, 16, 16), np.float32)}}, "on images"),
        ({"act_bits": 32}, "--act-bits 32"),
        ({"act_range": "output"}, "--act-range output"),
    ],
)
def test_what_cannot_be_searched_or_covered_is_refused_before_any_work(
    clipped_sleeper: tuple[Path, Dataset], options: dict[str, Any], message: str
) -> None:
    sleeper, photographs = clipped_sleeper
    with pytest.raises(UsageError, match=message):
        efrapq.defend_searched(sleeper, sleeper.with_name("q.onnx"), **(OPTIONS | {"calib": photographs} | options))
    assert [path.name for path in sleeper.parent.iterdir()] == ["m.onnx"]
