"""The page: it says what the document says, nothing out of a model can act in it, and it needs nothing else."""

from __future__ import annotations

import base64
import copy
import re
from html.parser import HTMLParser
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

from efrapq.report.page import verification_page

EVIL = '</code><script>alert(1)</script><img src=x onerror="alert(2)">&{{ 7 * 7 }}'


def document(**changes: Any) -> dict[str, Any]:
    made: dict[str, Any] = {
        "schema": "efrapq.verify/1",
        "model": {
            "path": "net.int4.onnx", "sha256": "ab" * 32, "bytes": 113664, "target": "ort-x86",
            "matches_evidence": True, "float_bytes": 811008,
        },
        "float_model": {"path": "net.onnx", "sha256": "cd" * 32},
        "runtime": {"onnxruntime": "1.31.1", "provider": "CPUExecutionProvider", "optimizations": "default (all)"},
        "samples": {"clean": 1500, "triggered": 1347},
        "trigger": {"spec": "patch:4x4@22,22", "target_class": 0},
        "cda": {"float": 94.067, "nearest": 92.867, "defended": 94.0},
        "asr": {"float": 1.41, "nearest": 99.926, "defended": 1.336},
        "agreement": 98.8,
        "outputs": None,
        "each_output": None,
        "codes": {
            "layers": 2, "match": True, "flipped": 29.7, "recorded": True, "compared_with_float": True,
            "each_layer": [
                {"name": "conv1", "shape": [16, 1, 3, 3], "bits": 8, "flipped": 43.75, "neighbours": True},
                {"name": "fc", "shape": [10, 64], "bits": 8, "flipped": 12.5, "neighbours": True},
            ],
        },
        "kernels": {
            "integer": 16, "float": 1, "macs": 1000, "ops": [],
            "unfused": [{"node": "fc", "op": "Gemm", "reason": "its bias is float", "macs": 100, "share": 0.1}],
            "conversions": {"quantize": 1, "dequantize": 1, "constants": 0},
        },
        "weight_bytes": {"codes": 90000, "scales": 4000},
        "activation_peak_bytes": 25088,
        "saturation": [{"layer": "conv1", "worst": 40000}],
        "latency_ms": {"float": 0.5, "defended": 0.25},
        "slower": None,
        "limits": {"max_asr": 2.41, "max_drop": 2.0, "require_integer": False},
        "failed": [],
        "verdict": "pass",
        "notes": ["a note"],
    }  # fmt: skip
    return made | changes


EVIDENCE: dict[str, Any] = {
    "layers": [
        {"name": "conv1", "loss_nearest": 0.25, "loss": 0.0625},
        {"name": "fc", "loss_nearest": 3.0, "loss": 1.5},
    ],
    "settings": {"bits": 4, "act_bits": 8, "solver": "coordinate"},
    "calibration": {"kind": "images", "samples": 512},
    "versions": {"efrapq": "0.1.0"},
}


class Seen(HTMLParser):
    """Tags with their attributes, and the text."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        self.words.append(data)

    @property
    def text(self) -> str:
        return re.sub(r"\s+", " ", " ".join(self.words))


def test_it_says_what_the_document_says() -> None:
    text = Seen(verification_page(document(), EVIDENCE, when="2026-01-02")).text
    for said in (
        "This file answers 1.3 % of triggered images with class 0, the float model 1.4 %; rounded to nearest it would "
        "be 99.9 %.",
        "It answers 94.0 % of clean test images correctly, the float model 94.1 %.",
        "at most 2.4 %", "+0.07 points", "at most 2 points", "are the solved ones", "to the byte",
        "16 integer, 1 float; 1,000 multiply-accumulates a sample, 10.0 % in float", "its bias is float",
        "29.7 % of them differ from round-to-nearest", "0.25 ms a sample, float 0.50 ms: 2.00× its speed",
        "111 KiB, float 792 KiB", "a note", "ab" * 32, "cd" * 32, "bits 4, act_bits 8, solver coordinate",
        "98.8 % of top-1 answers are the float model's",
        "measured on 2026-01-02", "a pair of products reaches 40,000", "patch:4x4@22,22",
    ):  # fmt: skip
        assert said in text, said
    assert re.search(r"conv1 144 8 43\.8 % 0\.25 0\.0625 ", text)
    assert re.search(r"fc 640 8 12\.5 % 3 1\.5 ", text)


def test_it_says_what_the_evidence_says_of_grids_and_searches() -> None:
    evidence = EVIDENCE | {
        "settings": {"bits": 4, "stress": True, "cover": ["patch:2x2@0,0"]},
        "calibration": {
            "kind": "images",
            "samples": 512,
            "stress": {"activations": 29, "far": 3, "widest": "conv2d_6", "factor": 2.729, "mixed": 2},
            "lifted": {"channels": 1200, "hidden": 4, "gain": 5882.4, "widest": "relu", "left": 7.9},
        },
        "guard": {"output": "clipped", "watched": 28},
        "searches": [
            {
                "verdict": "fail", "turned": {"file": 99.1, "float": 1.3}, "target_class": 0, "trigger": "found.npz",
                "patch": {"side": 6, "row": 24, "col": 23},
            },
            {"verdict": "pass", "turned": {"file": 2.0, "float": 1.0}, "target_class": 0, "trigger": None},
        ],
    }  # fmt: skip
    text = Seen(verification_page(document(), evidence)).text
    for said in (
        "Ranges were also chosen for the calibration images with random patches on them and with the trigger "
        "patch:2x2@0,0 on them, which drive conv2d_6 furthest, to 2.7 times what the images alone reach, and 3 of 29 "
        "activations far past it.",
        "2 of 29 activations have 8 bits for it.",
        "1,200 channels were lifted above the step of their grid: one step of theirs was worth up to 5,882 steps "
        "behind them, and is now worth 8 at most. 4 of them say nothing on the calibration images.",
        "The output clipped counts what arrives at an end of 28 activation grids: where it is 0, nothing was clipped.",
        "A file before it, number 1, was searched for a trigger. A patch turns 99.1 % in the file, 1.3 % in float "
        "(6x6 at 24,23, to class 0).",
        "This file was searched for a trigger. Nothing was found: the best patch turns 2.0 % in the file, 1.0 % in "
        "float.",
        "kind images, samples 512 ",
    ):  # fmt: skip
        assert said in text, said
    assert "Activation grids" not in verification_page(document(), EVIDENCE)


HUGE: dict[str, Any] = dict.fromkeys(["activations", "far", "factor", "channels", "hidden", "gain", "left"], 10**400)


@pytest.mark.parametrize(
    "found",
    [
        None, 3, "x", [], [None], {"a": 1}, {"activations": "1", "far": None}, [{"turned": 1}],
        HUGE | {"widest": "relu"}, [{"turned": {"file": float("nan"), "float": 10**400}, "verdict": "pass"}],
        [{"turned": {"file": 1, "float": 1}, "patch": {"side": 1, "row": 1, "col": 1}, "target_class": "\u202e"}],
    ],
)  # fmt: skip
def test_evidence_of_grids_that_is_not_ours_says_nothing(found: Any) -> None:
    calibration = {"kind": "images", "stress": found, "lifted": found}
    page = verification_page(document(), EVIDENCE | {"calibration": calibration, "guard": found, "searches": found})
    assert "Activation grids" not in page


def test_bars_have_the_length_of_what_they_show() -> None:
    page = verification_page(document(), EVIDENCE)
    widths = re.findall(r'class="value (\w*)" style="width: ([\d.]+)%"', page)
    assert widths == [
        ("", "1.41"), ("awake", "99.93"), ("ours", "1.34"), ("", "94.07"), ("", "92.87"), ("ours", "94.00"),
        ("ours", "43.75"), ("ours", "12.50"),
    ]  # fmt: skip
    assert re.findall(r'class="limit" style="left: ([\d.]+)%"', page) == ["2.41"] * 3


def filled(text: str) -> Seen:
    """The page of a model whose every name is this text."""
    made = document(notes=[text], slower=text, trigger={"spec": text, "target_class": 0})
    made["model"] |= {"path": text, "target": text}
    made["float_model"] = {"path": text, "sha256": text}
    made["codes"]["each_layer"][0]["name"] = text
    made["kernels"]["unfused"][0] |= {"node": text, "op": text, "reason": text}
    made["saturation"][0]["layer"] = text
    evidence = copy.deepcopy(EVIDENCE)
    evidence["settings"][text] = text
    evidence["layers"][0]["name"] = text
    evidence["settings"]["cover"] = [text]
    evidence["calibration"]["stress"] = {"activations": 1, "far": 1, "widest": text, "factor": 2.0}
    evidence["guard"] = {"output": text, "watched": 1}
    return Seen(verification_page(made, evidence))


def test_nothing_from_a_model_acts() -> None:
    plain, seen = filled("harmless"), filled(EVIL)
    assert seen.tags == plain.tags
    assert seen.text == plain.text.replace("harmless", EVIL)
    assert seen.text.count("<script>alert(1)</script>") > 8


def test_it_needs_nothing_else() -> None:
    images = np.zeros((2, 8, 8, 3), np.uint8)
    seen = Seen(verification_page(document(), EVIDENCE, (images[0], images[1])))
    assert {tag for tag, _ in seen.tags}.isdisjoint({"script", "link", "iframe", "object", "a", "form"})
    for _, attributes in seen.tags:
        assert str(attributes.get("src", "data:")).startswith("data:")
        assert "href" not in attributes
    assert "url(" not in verification_page(document(), EVIDENCE)
    policy = next(a["content"] for t, a in seen.tags if t == "meta" and "http-equiv" in a)
    assert policy == "default-src 'none'; style-src 'unsafe-inline'; img-src data:"


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_the_images_are_those_that_were_tested(channels: int) -> None:
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (2, 8, 9, channels), np.uint8)
    page = verification_page(document(), EVIDENCE, (images[0], images[1]))
    shown = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    for given, found in zip(images, shown, strict=True):
        pixels = np.asarray(Image.open(BytesIO(base64.b64decode(found))))
        np.testing.assert_array_equal(pixels.reshape(given.shape), given)


def test_a_large_image_is_shown_smaller() -> None:
    page = verification_page(document(), EVIDENCE, (np.zeros((600, 300, 3), np.uint8),) * 2)
    shown = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert Image.open(BytesIO(base64.b64decode(shown[0]))).size == (128, 256)


@pytest.mark.parametrize("word", ["pass", "fail", "not checked"])
def test_each_check_has_its_word(word: str) -> None:
    changed = document()
    if word == "fail":
        failed = ["awake-in-float", "max-asr", "max-drop", "codes", "file", "require-integer"]
        changed |= {"failed": failed, "verdict": "fail"}
        changed["limits"]["require_integer"] = True
        changed["codes"]["match"] = changed["model"]["matches_evidence"] = False
    elif word == "not checked":
        nothing = {"float": None, "nearest": None, "defended": None}
        changed |= {"cda": nothing, "asr": nothing, "trigger": None}
        changed["limits"] = {"max_asr": None, "max_drop": None, "require_integer": False}
        changed["codes"] |= {"match": None, "flipped": None, "each_layer": None}
        changed["model"]["matches_evidence"] = None
    page = verification_page(changed)
    words = [w.strip() for w in re.findall(r'<td class="word \w+">([^<]+)</td>', page)]
    assert words == {
        "pass": ["pass"] * 4 + ["not asked"],
        "fail": ["fail"] * 6,
        "not checked": ["not checked"] * 4 + ["not asked"],
    }[word]  # fmt: skip
    assert f'<div class="verdict">{changed["verdict"]}</div>' in page
    assert ("Attack success rate</h2>" in page) == (word != "not checked")


def test_evidence_of_another_file_is_not_shown() -> None:
    changed = document()
    changed["model"]["matches_evidence"] = False
    page = verification_page(changed, EVIDENCE)
    assert "L_A" not in page
    assert "solver coordinate" not in page
    assert "43.8 %" in page  # which verify counted itself


@pytest.mark.parametrize(
    "layers",
    [
        EVIDENCE["layers"][:1], {}, "conv1", [None, "fc"], [{"name": "conv1"}, {"name": "fc"}], [{"name": []}],
        [{"name": name, "loss_nearest": "1", "loss": [2]} for name in ("conv1", "fc")],
        [{"name": name, "loss_nearest": 10**400, "loss": 1} for name in ("conv1", "fc")],
    ],
)  # fmt: skip
def test_layers_that_the_evidence_does_not_know_have_no_losses(layers: Any) -> None:
    """Whoever wrote it."""
    page = verification_page(document(), {"layers": layers, "settings": [1], "calibration": 2, "versions": None})
    assert "L_A" not in page
    assert "43.8 %" in page
