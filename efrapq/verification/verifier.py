"""verify(): measure a quantized file against its float model and its nearest twin, in the runtime that ships."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efrapq.data import Dataset, Preprocess
from efrapq.errors import InputError, UnsupportedModelError, UsageError
from efrapq.io import is_quantized, load_onnx, printable, read_source
from efrapq.loading import PREPROCESS_KEY, FloatModel, load, open_for
from efrapq.progress import Reporter, Silent
from efrapq.report.evidence import EVIDENCE_SCHEMA
from efrapq.trigger import Trigger, parse_trigger
from efrapq.verification.codes import CodeComparison, compare_codes, nearest_twin
from efrapq.verification.kernels import report_kernels
from efrapq.verification.metrics import Predictions, attack_success_rate, clean_accuracy, predict
from efrapq.verification.session import Session, interleaved_latency, open_session

if TYPE_CHECKING:
    from efrapq.graph.quantized import QuantizedModel

__all__ = ["VERIFY_SCHEMA", "Requirements", "Verification", "verify"]

VERIFY_SCHEMA = "efrapq.verify/1"
# A float model this often fooled by the trigger is backdoored already: no rounding removes that.
AWAKE = 50.0


@dataclass(frozen=True)
class Requirements:
    """What the verdict asks, in percent and points. None: max_asr becomes the float model's ASR + 1 point (10 % when
    the float model is unknown); max_drop becomes 2 points of CDA.
    """

    max_asr: float | None = None
    max_drop: float | None = None
    integer: bool = False


@dataclass(frozen=True)
class Verification:
    """document: schema efrapq.verify/1. notes: what could not be measured and why."""

    document: dict[str, Any]
    notes: tuple[str, ...]

    @property
    def passed(self) -> bool:
        return bool(self.document["verdict"] == "pass")


def verify(
    model: str | Path,
    *,
    data: str | Path | Dataset | None = None,
    trigger: str | None = None,
    target_class: int | None = None,
    float_model: str | Path | None = None,
    arch: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    preprocess: Preprocess | None = None,
    requirements: Requirements | None = None,
    threads: int = 0,
    trust_pickle: bool = False,
    reporter: Reporter | None = None,
) -> Verification:
    """Measure CDA, ASR, agreement, codes, kernels and latency of a quantized ONNX file in ONNX Runtime.

    float_model: the model that was defended; found through the evidence beside the file if not given. data: labelled
    test images; trigger and target_class: for the ASR (see `efrapq.trigger`). Raises EfrapqError for bad inputs.
    """
    reporter = reporter or Silent()
    if (trigger is None) != (target_class is None):
        raise UsageError("--trigger and --target-class go together")
    if trigger is not None and data is None:
        raise UsageError("--trigger needs --data: labelled test images to put the trigger on")
    source = read_source(model)
    proto = load_onnx(source).model
    if not is_quantized(proto):
        raise UnsupportedModelError(f"{source.name}: is a float model; verify takes the file that defend wrote")
    checked = _Verifier(source.name, Path(model), source.data, proto, requirements or Requirements(), reporter)
    checked.find_float(float_model, arch, input_shape, trust_pickle)
    parsed = parse_trigger(trigger) if trigger is not None else None
    dataset = None
    if data is not None:
        preprocess = preprocess or checked.preprocess()
        dataset = data if isinstance(data, Dataset) else open_for(data, checked.input_shape, preprocess)
    return checked.run(dataset, preprocess or Preprocess(), parsed, target_class, threads)


class _Verifier:
    def __init__(
        self, name: str, path: Path, data: bytes, proto: Any, requirements: Requirements, reporter: Reporter
    ) -> None:
        from efrapq.exporters import read_quantized

        self.name = name
        self.path = path
        self.data = data
        self.metadata = {p.key: p.value for p in proto.metadata_props}
        dims = proto.graph.input[0].type.tensor_type.shape.dim if proto.graph.input else []
        self.input_shape = tuple(d.dim_value if d.HasField("dim_value") else None for d in dims)
        self.requirements = requirements
        self.reporter = reporter
        self.notes: list[str] = []
        self.source: FloatModel | None = None
        self.quantized: QuantizedModel | None = None
        self.evidence = self._read_evidence()
        try:
            self.quantized = read_quantized(proto)
        except UnsupportedModelError as exc:
            self._note(f"codes are not read back: {exc}")

    def _note(self, text: str) -> None:
        self.notes.append(text)
        self.reporter.warn(text)

    # The float reference.

    def find_float(
        self,
        float_model: str | Path | None,
        arch: str | None,
        input_shape: tuple[int, int, int] | None,
        trust_pickle: bool,
    ) -> None:
        wanted = self.metadata.get("efrapq.source.sha256")
        path = Path(float_model) if float_model is not None else self._recorded_float(wanted)
        if path is None:
            self._note("no float model to compare with: pass --float with the model that was defended")
            return
        self.source = load(path, arch=arch, input_shape=input_shape, trust_pickle=trust_pickle)
        if wanted and self.source.sha256 != wanted:
            raise InputError(
                f"{self.source.name}: is not the model that {self.name} was made from (its SHA-256 differs); "
                "pass the right one with --float"
            )

    def _recorded_float(self, wanted: str | None) -> Path | None:
        """The defended model's path, from the evidence beside the file, if it is still that model."""
        recorded = self.evidence.get("input", {}).get("path")
        if not wanted or not isinstance(recorded, str):
            return None
        for path in (Path(recorded), self.path.parent / Path(recorded).name):
            if path.is_file() and hashlib.sha256(path.read_bytes()).hexdigest() == wanted:
                return path
        return None

    def _read_evidence(self) -> dict[str, dict[str, Any]]:
        """The evidence beside the file; empty where there is none that can be read."""
        path = self.path.with_suffix(".json")
        if not path.is_file():
            return {}
        try:
            document = json.loads(path.read_text("utf-8"))
        except (OSError, ValueError):
            document = None
        if not isinstance(document, dict) or document.get("schema") != EVIDENCE_SCHEMA:
            self._note(f"{printable(str(path))}: is not efrapq evidence, ignored")
            return {}
        return {key: value for key, value in document.items() if isinstance(value, dict)}

    def preprocess(self) -> Preprocess:
        if PREPROCESS_KEY in self.metadata:
            return Preprocess.from_json(self.metadata[PREPROCESS_KEY])
        if self.source is not None and self.source.preprocess is not None:
            return self.source.preprocess
        self._note(
            "no preprocessing is recorded: pixels are scaled to 0–1; pass --mean and --std if the model wants more"
        )
        return Preprocess()

    # The measurements.

    def run(
        self,
        dataset: Dataset | None,
        preprocess: Preprocess,
        trigger: Trigger | None,
        target_class: int | None,
        threads: int,
    ) -> Verification:
        import onnxruntime

        sessions = {"defended": open_session(self.data, threads=threads)}
        comparison = self._add_references(sessions, threads)
        cda: dict[str, float | None] = dict.fromkeys(("float", "nearest", "defended"))
        asr = dict(cda)
        agreement = None
        if dataset is not None:
            predictions = self._predict(sessions, dataset, preprocess, trigger)
            classes = predictions["defended"].classes
            if target_class is not None and not 0 <= target_class < classes:
                raise UsageError(f"--target-class {target_class}: the model has classes 0 to {classes - 1}")
            if dataset.labels is not None or trigger is not None:
                labels = dataset.require_labels(classes)
                for name, found in predictions.items():
                    cda[name] = clean_accuracy(found, labels)
                    if target_class is not None:
                        asr[name] = attack_success_rate(found, labels, target_class)
            if "float" in predictions:
                same = predictions["defended"].clean == predictions["float"].clean
                agreement = 100 * float(same.mean())
        kernels = report_kernels(sessions["defended"].optimized)
        session = sessions["defended"]
        document: dict[str, Any] = {
            "schema": VERIFY_SCHEMA,
            "model": {
                "path": str(self.path),
                "sha256": hashlib.sha256(self.data).hexdigest(),
                "bytes": len(self.data),
                "target": self.metadata.get("efrapq.target"),
                "float_bytes": self.source.size or None if self.source is not None else None,
            },
            "runtime": {
                "onnxruntime": onnxruntime.__version__,
                "provider": session.provider,
                "optimizations": "default (all)",
            },
            "samples": {
                "clean": len(dataset) if dataset is not None else 0,
                "triggered": self._attacked(dataset, target_class),
            },
            "trigger": {"spec": trigger.spec, "target_class": target_class} if trigger is not None else None,
            "cda": _rounded(cda),
            "asr": _rounded(asr),
            "agreement": None if agreement is None else round(agreement, 3),
            "codes": self._codes(comparison),
            "kernels": asdict(kernels),
            "latency_ms": self._latency(sessions, dataset, preprocess),
        }
        document["failed"] = self._failures(document)
        document["verdict"] = "fail" if document["failed"] else "pass"
        if (asr["float"] or 0.0) >= AWAKE:
            self._note(
                f"the float model itself answers the trigger ({asr['float']:.1f} % ASR): that backdoor is awake before "
                "any quantization, and no rounding removes it"
            )
        return Verification(document, tuple(self.notes))

    def _add_references(self, sessions: dict[str, Session], threads: int) -> CodeComparison | None:
        """Open the float model and the nearest twin beside the defended file."""
        if self.source is None:
            return None
        from efrapq.exporters import export_model
        from efrapq.graph.prepare import prepare

        sessions["float"] = open_session(self.source.proto.SerializeToString(), threads=threads)
        if self.quantized is None:
            return None
        reference = prepare(self.source.proto)
        twin = nearest_twin(self.quantized, reference)
        if twin is None:
            self._note("the file's layers do not correspond to the float model's: no nearest twin, codes not compared")
            return None
        target = self.metadata.get("efrapq.target", "portable")
        data = export_model(twin, target).SerializeToString()
        sessions["nearest"] = open_session(data, threads=threads)
        return compare_codes(self.quantized, reference)

    def _predict(
        self, sessions: dict[str, Session], dataset: Dataset, preprocess: Preprocess, trigger: Trigger | None
    ) -> dict[str, Predictions]:
        found = {}
        with self.reporter.task("measuring in ONNX Runtime", len(dataset) * len(sessions)) as task:
            for name, session in sessions.items():
                found[name] = predict(session, dataset, preprocess, trigger, task, name)
        return found

    def _attacked(self, dataset: Dataset | None, target_class: int | None) -> int:
        if dataset is None or target_class is None or dataset.labels is None:
            return 0
        return int((dataset.labels != target_class).sum())

    def _codes(self, comparison: CodeComparison | None) -> dict[str, Any]:
        """match: the digest over all codes is the one recorded when they were solved, in the file and in the evidence
        beside it, and every code is a neighbour of its float weight. Null if nothing could be checked.
        """
        if self.quantized is None:
            return {"layers": 0, "match": None, "flipped": None}
        checks = []
        for recorded in (self.metadata.get("efrapq.codes.sha256"), self.evidence.get("output", {}).get("codes_sha256")):
            if recorded:
                checks.append(recorded == self.quantized.digest)
        if comparison is not None:
            checks.append(comparison.neighbours)
            for name in comparison.strangers[:3]:
                self._note(f"layer {printable(name)}: holds codes that are no neighbours of the float weights")
        return {
            "layers": len(self.quantized.weights),
            "match": all(checks) if checks else None,
            "flipped": None if comparison is None else round(comparison.flipped, 3),
        }

    def _latency(
        self, sessions: dict[str, Session], dataset: Dataset | None, preprocess: Preprocess
    ) -> dict[str, float | None]:
        """Median milliseconds for one image, float and defended taking turns."""
        if dataset is not None:
            x = dataset.inputs([0], preprocess)
        else:
            shape = [d or (1 if i == 0 else 32) for i, d in enumerate(sessions["defended"].input_shape)]
            x = np.zeros(shape, np.float32)
        timed: dict[str, Session] = {n: sessions[n] for n in ("float", "defended") if n in sessions}
        times = interleaved_latency(timed, x)
        return {name: round(times[name], 4) if name in times else None for name in ("float", "defended")}

    def _failures(self, document: dict[str, Any]) -> list[str]:
        wanted = self.requirements
        failed = []
        if document["codes"]["match"] is False:
            failed.append("codes")
        asr, cda = document["asr"], document["cda"]
        if asr["defended"] is not None:
            limit = wanted.max_asr
            if limit is None:
                limit = 10.0 if asr["float"] is None else asr["float"] + 1.0
            if asr["defended"] > limit:
                failed.append("max-asr")
        elif wanted.max_asr is not None:
            raise UsageError("--max-asr needs --data, --trigger and --target-class")
        if cda["defended"] is not None and cda["float"] is not None:
            if cda["float"] - cda["defended"] > (2.0 if wanted.max_drop is None else wanted.max_drop):
                failed.append("max-drop")
        elif wanted.max_drop is not None:
            raise UsageError("--max-drop needs labelled --data and the float model (--float)")
        if wanted.integer and document["kernels"]["float"]:
            failed.append("require-integer")
        return failed


def _rounded(values: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 3) for name, value in values.items()}
