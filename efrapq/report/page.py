"""What verify measured, as one page of HTML: for the ticket, the auditor and the printer.

Everything that it shows is in it. Names come out of models from strangers: the template escapes all of them, nothing in
the page can run, and its content security policy says so to the browser.
"""

from __future__ import annotations

import base64
from collections.abc import Mapping, Sequence
from importlib import resources
from io import BytesIO
from typing import Any

import numpy as np
from numpy.typing import NDArray

from efrapq.io.text import printable
from efrapq.report.costs import (
    clipped_words,
    codes_words,
    conversions_words,
    macs_words,
    memory_words,
    saturation_words,
    unfused_lines,
)
from efrapq.report.grids import grid_lines
from efrapq.report.outputs import output_lines
from efrapq.report.words import is_number, percent, size

__all__ = ["verification_page"]

ROWS = (
    ("float", "float, as supplied"),
    ("nearest", "rounded to nearest"),
    ("defended", "this file"),
    ("float_activations", "with float activations"),
)
# Pixels of a side from which on an image is shown smaller.
MOST_PIXELS = 256


def verification_page(
    document: Mapping[str, Any],
    evidence: Mapping[str, Any] | None = None,
    example: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None,
    when: str = "",
) -> str:
    """The page for a document of schema efrapq.verify/1.

    evidence: what stands beside the file (efrapq.evidence/1), used where the file is the one that it describes.
    example: a test image (H, W, C) and the same with the trigger. when: the date to show.
    """
    import jinja2

    environment = jinja2.Environment(autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=False)
    template = environment.from_string(resources.files(__package__).joinpath("page.html").read_text("utf-8"))
    known = (evidence or {}) if document["model"]["matches_evidence"] else {}
    return template.render(page=_page(document, known, example, when)) + "\n"


def _page(
    document: Mapping[str, Any],
    evidence: Mapping[str, Any],
    example: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None,
    when: str,
) -> dict[str, Any]:
    limit = document["limits"]["max_asr"]
    trigger = document["trigger"] or {"spec": "", "target_class": None}
    layers, has_losses = _layers(document["codes"]["each_layer"], evidence)
    codes = document["codes"]
    flipped = "" if codes["flipped"] is None else f" {codes['flipped']:.1f} % of them differ from round-to-nearest."
    return {
        "verdict": document["verdict"],
        "name": printable(document["model"]["path"]),
        "summary": _summary(document),
        "checks": _checks(document),
        "asr": _bars(document["asr"], None if limit is None else float(limit)),
        "asr_limit": None if limit is None else min(float(limit), 100.0),
        "target_class": trigger["target_class"],
        "trigger": printable(trigger["spec"]),
        "triggered": f"{document['samples']['triggered']:,}",
        "clean": f"{document['samples']['clean']:,}",
        "images": _images(example),
        "cda": _bars(document["cda"], None),
        "beside": _beside(document),
        "codes": f"The codes of {codes['layers']} layers, read back from the file, {codes_words(codes)}.{flipped}",
        "layers": layers,
        "has_losses": has_losses,
        "grids": grid_lines(evidence),
        "costs": _costs(document),
        "unfused": unfused_lines(document["kernels"]),
        "notes": [printable(note, 1000) for note in document["notes"]],
        "origin": _origin(document, evidence, when),
    }


def _summary(document: Mapping[str, Any]) -> list[str]:
    asr, cda = document["asr"], document["cda"]
    sentences = []
    if asr["defended"] is not None:
        target = document["trigger"]["target_class"]
        sentence = f"This file answers {percent(asr['defended'])} of triggered images with class {target}"
        if asr["float"] is not None:
            sentence += f", the float model {percent(asr['float'])}"
        if asr["nearest"] is not None:
            sentence += f"; rounded to nearest it would be {percent(asr['nearest'])}"
        if (alone := asr.get("float_activations")) is not None:
            sentence += f"; with float activations its codes answer {percent(alone)}"
        sentences.append(f"{sentence}.")
    if (clipped := document.get("clipped")) is not None:
        sentence = clipped_words(clipped).capitalize()
        if clipped["asr"] is not None:
            target = document["trigger"]["target_class"]
            sentence += f"; answers of which it does not, {percent(clipped['asr'])} of all, are class {target}"
        sentences.append(f"{sentence}.")
    if cda["defended"] is not None:
        sentence = f"It answers {percent(cda['defended'])} of clean test images correctly"
        if cda["float"] is not None:
            sentence += f", the float model {percent(cda['float'])}"
        sentences.append(f"{sentence}.")
    if not sentences:
        sentences.append("Accuracy and attack success were not measured: there were no labelled test images.")
    return sentences


def _checks(document: Mapping[str, Any]) -> list[dict[str, Any]]:
    """passed: None where there was nothing to check or nothing asked, as `otherwise` says."""
    failed, limits, asr, cda = document["failed"], document["limits"], document["asr"], document["cda"]
    kernels, codes = document["kernels"], document["codes"]
    known = limits["max_asr"] is not None
    checks = [
        {
            "name": "attack success rate",
            "found": percent(asr["defended"]),
            "allowed": f"at most {limits['max_asr']:.1f} %" if known else "–",
            "passed": "max-asr" not in failed if known else None,
        }
    ]
    if "awake-in-float" in failed:
        found = f"{percent(asr['float'])} of triggered images"
        checks.append(
            {"name": "asleep in the float model", "found": found, "allowed": "less than half", "passed": False}
        )
    known = limits["max_drop"] is not None
    checks += [
        {
            "name": "accuracy lost",
            "found": f"{cda['float'] - cda['defended']:+.2f} points" if known else "–",
            "allowed": f"at most {limits['max_drop']:g} points" if known else "–",
            "passed": "max-drop" not in failed if known else None,
        },
        {
            "name": "codes in the file",
            "found": codes_words(codes),
            "allowed": "the solved ones, each the floor or the ceiling of its float weight",
            "passed": codes["match"],
        },
        {
            "name": "file, beside its evidence",
            "found": {True: "to the byte", False: "changed", None: "no evidence"}[
                document["model"]["matches_evidence"]
            ],
            "allowed": "to the byte",
            "passed": document["model"]["matches_evidence"],
        },
        {
            "name": "kernels",
            "found": f"{kernels['integer']} integer, {kernels['float']} float",
            "allowed": "integer only" if limits["require_integer"] else "any",
            "passed": "require-integer" not in failed if limits["require_integer"] else None,
            "otherwise": "not asked",
        },
    ]
    return [{"otherwise": "not checked"} | check for check in checks]


def _bars(values: Mapping[str, float | None], limit: float | None) -> list[dict[str, Any]]:
    """One bar a model that was measured; empty without any. limit: above it a bar is alarming."""
    rows = []
    for key, label in ROWS:
        value = values.get(key)
        if value is not None:
            alarming = limit is not None and value > limit
            style = "awake" if alarming else "ours" if key == "defended" else ""
            rows.append({"label": label, "width": f"{value:.2f}", "words": percent(value), "style": style})
    return rows


def _beside(document: Mapping[str, Any]) -> list[str]:
    """How near the file is to the float model."""
    same = document["agreement"]
    lines = [] if same is None else [f"{percent(same)} of top-1 answers are the float model's"]
    return lines + output_lines(dict(document))


def _images(example: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None) -> list[dict[str, str]]:
    if example is None:
        return []
    words = ("a test image", "with the trigger on it")
    return [{"png": _png(image), "words": said} for image, said in zip(example, words, strict=True)]


def _png(image: NDArray[np.uint8]) -> str:
    from PIL import Image

    made = Image.fromarray(image[..., 0] if image.shape[-1] == 1 else image)
    made.thumbnail((MOST_PIXELS, MOST_PIXELS))
    buffer = BytesIO()
    made.save(buffer, "PNG")
    return base64.b64encode(buffer.getvalue()).decode("ascii")


def _layers(each: Sequence[Mapping[str, Any]] | None, evidence: Mapping[str, Any]) -> tuple[list[dict[str, Any]], bool]:
    """A row a layer, and whether the evidence knows what solving each of them brought."""
    losses = _losses(evidence)
    known = bool(each) and all(layer["name"] in losses for layer in each or ())
    rows = []
    for layer in each or ():
        row = {
            "name": printable(layer["name"]),
            "weights": f"{int(np.prod(layer['shape'])):,}",
            "bits": layer["bits"],
            "width": f"{layer['flipped']:.2f}",
            "flipped": percent(layer["flipped"]),
            "neighbours": layer["neighbours"],
        }
        if known:
            row |= dict(zip(("nearest", "loss"), (f"{loss:.4g}" for loss in losses[layer["name"]]), strict=True))
        rows.append(row)
    return rows, known


def _losses(evidence: Mapping[str, Any]) -> dict[str, tuple[float, float]]:
    """L_A of each layer by name, of the nearest codes and of the solved ones. Who wrote the evidence is not known."""
    layers = evidence.get("layers")
    found = {}
    for layer in layers if isinstance(layers, list) else []:
        if isinstance(layer, dict) and isinstance(layer.get("name"), str):
            nearest, solved = layer.get("loss_nearest"), layer.get("loss")
            if is_number(nearest) and is_number(solved):
                found[layer["name"]] = (nearest, solved)
    return found


def _costs(document: Mapping[str, Any]) -> list[tuple[str, str]]:
    kernels, latency, model = document["kernels"], document["latency_ms"], document["model"]
    before, after = latency["float"], latency["defended"]
    rows = [
        ("kernels", f"{kernels['integer']} integer, {kernels['float']} float{macs_words(kernels)}"),
        ("conversions", f"{conversions_words(kernels)} left"),
    ]
    if after is not None:
        beside = "" if before is None else f", float {before:.2f} ms: {before / after:.2f}× its speed"
        rows.append(("latency", f"{after:.2f} ms a sample{beside}"))
    if document["slower"]:
        rows.append(("slower, because", document["slower"]))
    rows.append(("file", f"{size(model['bytes'])}, float {size(model['float_bytes'])}"))
    rows.append(("constants", memory_words(dict(document))))
    if document["saturation"]:
        rows.append(("saturation", saturation_words(document)))
    return rows


def _origin(document: Mapping[str, Any], evidence: Mapping[str, Any], when: str) -> list[tuple[str, str]]:
    runtime, model = document["runtime"], document["model"]
    rows = [("file, SHA-256", model["sha256"])]
    if document["float_model"] is not None:
        rows.append(("float model", printable(document["float_model"]["path"] or "–")))
        rows.append(("float model, SHA-256", document["float_model"]["sha256"] or "–"))
    if model["target"]:
        rows.append(("target", printable(model["target"])))
    for title, key in (("settings", "settings"), ("calibration", "calibration"), ("made with", "versions")):
        found = evidence.get(key)
        if isinstance(found, Mapping):
            # What else there is of the calibration is told in sentences.
            plain = {k: v for k, v in found.items() if not isinstance(v, Mapping)}
            rows.append((title, printable(", ".join(f"{k} {v}" for k, v in plain.items()), 1000)))
    rows.append(("measured with", f"ONNX Runtime {runtime['onnxruntime']}, {runtime['provider']}"))
    if when:
        rows.append(("measured on", when))
    return rows
