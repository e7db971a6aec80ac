"""The whole job on the embedded subject: defend, export, verify, beside what rounding to nearest gives."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from efrapq.data import load_dataset
from efrapq.errors import OutputError
from efrapq.io import printable, write_all
from efrapq.loading import load
from efrapq.pipeline import defend
from efrapq.progress import Reporter
from efrapq.retarget import export
from efrapq.trigger import parse_trigger
from efrapq.verification import Requirements, verify
from efrapq.verification.kernels import report_kernels
from efrapq.verification.metrics import attack_success_rate, clean_accuracy, predict
from efrapq.verification.ort_static import quantize_with_ort
from efrapq.verification.session import Session, open_session

__all__ = ["DEMO_SCHEMA", "run_demo"]

DEMO_SCHEMA = "efrapq.demo/1"


def run_demo(folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Run everything offline on the embedded subject; files go to `folder`. Returns schema efrapq.demo/1."""
    import onnx_ir as ir

    from efrapq.exporters import export_model
    from efrapq.graph.prepare import prepare
    from efrapq.models import weights
    from efrapq.verification.codes import nearest_twin

    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as exc:
        raise OutputError(
            f"{printable(str(folder))}: cannot be made ({exc.strerror}); choose another with --output"
        ) from exc
    calibration = load_dataset(weights.SAMPLES, split="calib")
    test = load_dataset(weights.SAMPLES, split="test")
    output = folder / "model.int4.onnx"
    started = time.perf_counter()
    made = defend(weights.SUBJECT, output, bits=4, calib=calibration, reporter=reporter)
    seconds = {"defend": round(time.perf_counter() - started, 2)}
    portable = export(output, folder / "model.int4.portable.onnx", target="portable")

    result = verify(
        output,
        data=test,
        trigger=weights.TRIGGER,
        target_class=weights.TARGET_CLASS,
        float_model=weights.SUBJECT,
        requirements=Requirements(max_drop=1.0, integer=True),
        reporter=reporter,
    )
    document = result.document
    source = load(weights.SUBJECT)
    assert source.preprocess is not None
    prepared = prepare(source.proto)
    folded = ir.to_proto(prepared)
    twin = nearest_twin(made.quantized, prepared)
    assert twin is not None
    nearest_data = export_model(twin, made.evidence["settings"]["target"]).SerializeToString(deterministic=True)
    batches = [calibration.inputs(list(b), source.preprocess) for b in calibration.batches(64)]
    reporter.note("quantizing once more with onnxruntime.quantization.quantize_static, for comparison")
    ort_data = quantize_with_ort(folded, batches, 4)
    float_data = source.proto.SerializeToString()
    write_all(
        {
            folder / "float.onnx": float_data,
            folder / "nearest.int4.onnx": nearest_data,
            folder / "quantize_static.int4.onnx": ort_data,
        }
    )

    trigger = parse_trigger(weights.TRIGGER)
    rival = open_session(ort_data)
    with reporter.task("measuring quantize_static's file", len(test)) as task:
        predictions = predict(rival, test, source.preprocess, trigger, task, "quantize_static")
    labels = test.require_labels()
    rows = [
        _row("float", document, "float", float_data, open_session(float_data)),
        {
            "name": "quantize_static",
            "cda": round(clean_accuracy(predictions, labels), 3),
            "asr": round(attack_success_rate(predictions, labels, weights.TARGET_CLASS), 3),
            "bytes": len(ort_data),
            "kernels": _kernels(rival),
        },
        _row("nearest", document, "nearest", nearest_data, open_session(nearest_data)),
        _row("efrapq", document, "defended", made.data, open_session(made.data)),
    ]
    return {
        "schema": DEMO_SCHEMA,
        "rows": rows,
        "samples": document["samples"] | {"calibration": len(calibration)},
        "seconds": seconds,
        "flipped": document["codes"]["flipped"],
        "codes_match": document["codes"]["match"],
        "verdict": document["verdict"],
        "failed": document["failed"],
        "files": {
            "defended": str(output),
            "evidence": str(made.evidence_path),
            "portable": str(portable.path),
            "float": str(folder / "float.onnx"),
            "nearest": str(folder / "nearest.int4.onnx"),
            "ORT's own": str(folder / "quantize_static.int4.onnx"),
        },
        "again": f"efrapq verify {output} --data {weights.SAMPLES}:test --trigger {weights.TRIGGER} "
        f"--target-class {weights.TARGET_CLASS}",
    }


def _row(name: str, document: dict[str, Any], key: str, data: bytes, session: Session) -> dict[str, Any]:
    """One line of the table."""
    return {
        "name": name,
        "cda": document["cda"][key],
        "asr": document["asr"][key],
        "bytes": len(data),
        "kernels": _kernels(session),
    }


def _kernels(session: Session) -> dict[str, int]:
    found = report_kernels(session.optimized)
    return {"integer": found.integer, "float": found.float}
