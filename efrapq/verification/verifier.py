"""verify(): measure a quantized file against its float model and its nearest twin, in the runtime that ships."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from efrapq.calibration.signature import image_layout, model_inputs, takes_images
from efrapq.cpu import describe_cpu
from efrapq.data import Dataset, require_there
from efrapq.errors import UnsupportedModelError, UsageError
from efrapq.io import OnnxFile, Source, is_quantized, load_onnx, printable, read_source
from efrapq.loading import open_for
from efrapq.preprocess import Preprocess, PreprocessOverride
from efrapq.progress import Reporter, Silent
from efrapq.report.page import verification_page
from efrapq.trigger import parse_trigger
from efrapq.verification.advice import slower_because
from efrapq.verification.arrays import ArrayTests, array_tests, refuse_image_options
from efrapq.verification.classes import class_axes
from efrapq.verification.codes import CodeComparison, LayerCodes, compare_codes, nearest_twin
from efrapq.verification.cost import activation_peak, weight_bytes
from efrapq.verification.images import ImageTests, refuse_rates, shape_without_classes
from efrapq.verification.kernels import report_kernels
from efrapq.verification.session import LARGE, Session, open_model, open_session
from efrapq.verification.shapes import graph_shapes
from efrapq.verification.subject import Subject
from efrapq.verification.verdict import AWAKE, LEANING, Requirements, judge, remedy

if TYPE_CHECKING:
    from efrapq.graph.quantized import QuantizedModel

__all__ = ["VERIFY_SCHEMA", "Verification", "verify"]

VERIFY_SCHEMA = "efrapq.verify/1"
NEEDED_FOR_DROP = "--max-drop needs labelled --data and the float model (--float)"


@dataclass(frozen=True)
class Verification:
    """document: schema efrapq.verify/1. notes: what could not be measured and why. evidence: what was beside the file.
    example: a test image (H, W, C) and the same with the trigger, where there was one.
    """

    document: dict[str, Any]
    notes: tuple[str, ...]
    evidence: dict[str, Any] = field(default_factory=dict)
    example: tuple[NDArray[np.uint8], NDArray[np.uint8]] | None = None

    @property
    def passed(self) -> bool:
        return bool(self.document["verdict"] == "pass")

    def page(self, when: str = "") -> str:
        """All of it as one page of HTML that needs nothing else. when: a date to show on it."""
        return verification_page(self.document, self.evidence, self.example, when)


def verify(
    model: str | Path,
    *,
    data: str | Path | Dataset | Mapping[str, Any] | None = None,
    trigger: str | None = None,
    target_class: int | None = None,
    float_model: str | Path | None = None,
    arch: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    preprocess: Preprocess | PreprocessOverride | None = None,
    requirements: Requirements | None = None,
    threads: int = 0,
    trust_pickle: bool = False,
    reporter: Reporter | None = None,
) -> Verification:
    """Measure CDA, ASR, agreement, codes, kernels and latency of a quantized ONNX file in ONNX Runtime.

    float_model: the model that was defended; found through the evidence beside the file if not given. data: labelled
    test images, for CDA and ASR; for a model that takes anything else one array per input, by its name, and `labels`
    where there are classes. Of images without labels, and for a model without classes, the outputs are compared with
    the float model's. trigger and target_class: for the ASR (see `efrapq.trigger`). input_shape: for a float model that
    needs one; the file's own by default. preprocess: a Preprocess replaces what the file records, a PreprocessOverride
    only the parts that it names. Raises EfrapqError for bad inputs.
    """
    reporter = reporter or Silent()
    requirements = requirements or Requirements()
    require_there(data)
    source = read_source(model)
    found = load_onnx(source)
    proto = found.model
    if not is_quantized(proto):
        raise UnsupportedModelError(f"{source.name}: is a float model; verify takes the file that defend wrote")
    inputs = model_inputs(proto, source.name)
    by_name = not takes_images(inputs) or isinstance(data, Mapping)
    if by_name:
        options = {"--trigger": trigger, "--target-class": target_class, "--max-asr": requirements.max_asr}
        refuse_image_options(options | {"--mean, --std or --size": preprocess}, inputs)
    elif (shape := shape_without_classes(proto)) is not None:
        asked: dict[str, object] = {"--trigger": trigger, "--target-class": target_class}
        refuse_rates(asked | {"--max-asr": requirements.max_asr, "--max-drop": requirements.max_drop}, shape)
    if (trigger is None) != (target_class is None):
        raise UsageError("--trigger and --target-class go together")
    if trigger is not None and data is None:
        raise UsageError("--trigger needs --data: labelled test images to put the trigger on")
    if requirements.max_asr is not None and (data is None or trigger is None):
        raise UsageError("--max-asr needs --data, --trigger and --target-class")
    if requirements.max_drop is not None and data is None and not by_name:
        raise UsageError(NEEDED_FOR_DROP)
    parsed = parse_trigger(trigger) if trigger is not None else None
    checked = _Verifier(source, found, requirements, reporter)
    del source  # its bytes: see _defended
    checked.find_float(float_model, arch, input_shape, trust_pickle)
    needs_cda = requirements.max_drop is not None
    if by_name:
        reference = checked.source.proto if checked.source is not None else None
        return checked.run(array_tests(data, proto, reference, checked.name, needs_cda=needs_cda), threads)
    assert not isinstance(data, Mapping)
    dataset = None
    effective = Preprocess()
    if data is not None:
        effective = checked.preprocess(preprocess).in_layout(image_layout(inputs))
        dataset = data if isinstance(data, Dataset) else open_for(data, checked.input_shape, effective)
        if parsed is not None:
            dataset.require_labels()
    axes = class_axes(checked.source.proto) if checked.source is not None else {}
    if needs_cda and (dataset is None or dataset.labels is None or checked.source is None):
        raise UsageError(NEEDED_FOR_DROP)
    return checked.run(ImageTests(dataset, effective, parsed, target_class, needs_cda, axes), threads)


class _Verifier(Subject):
    def __init__(self, source: Source, found: OnnxFile, requirements: Requirements, reporter: Reporter) -> None:
        from efrapq.exporters import read_quantized

        super().__init__(source, found, reporter)
        # The bytes as they are in the file, where they are all of the model.
        self.data = None if found.external or found.outside else source.data
        self.bytes = len(source.data) + found.external_bytes
        self.requirements = requirements
        self.quantized: QuantizedModel | None = None
        try:
            self.quantized = read_quantized(self.proto, found.outside)
        except UnsupportedModelError as exc:
            self.note(f"codes are not read back: {exc}")

    # The measurements.

    def run(self, tests: ImageTests | ArrayTests, threads: int) -> Verification:
        import onnxruntime

        sessions = {"defended": self._defended(threads)}
        tests.require(sessions["defended"], self.name)
        comparison = self._add_references(sessions, tests, threads)
        found = tests.measure(sessions, self.reporter)
        for note in found.notes:
            self.note(note)
        session = sessions["defended"]
        first = next((v.name for v in self.proto.graph.input), "")
        shapes = graph_shapes(self.proto, session.optimized, tests.sizes(first, self.metadata))
        kernels = report_kernels(session.optimized, shapes)
        latency = self._latency(sessions, tests)
        document: dict[str, Any] = {
            "schema": VERIFY_SCHEMA,
            "model": {
                "path": str(self.path),
                "sha256": self.sha256,
                "bytes": self.bytes,
                "target": self.metadata.get("efrapq.target"),
                "matches_evidence": self._matches_evidence(),
                "float_bytes": self.source.size or None if self.source is not None else None,
            },
            "float_model": self._float_model(),
            "runtime": {
                "onnxruntime": onnxruntime.__version__,
                "provider": session.provider,
                "optimizations": "default (all)",
            },
            "samples": {"clean": found.clean, "triggered": found.triggered},
            "trigger": tests.attack,
            "cda": _rounded(found.cda),
            "asr": _rounded(found.asr) | {"float_activations": None},
            "untriggered": None if found.untriggered is None else _rounded(found.untriggered),
            "clipped": None if found.clipped is None else _rounded(found.clipped),
            "agreement": None if found.agreement is None else round(found.agreement, 3),
            "outputs": found.outputs,
            "each_output": found.each_output,
            "codes": self._codes(comparison),
            "kernels": asdict(kernels),
            "weight_bytes": weight_bytes(self.proto),
            "activation_peak_bytes": activation_peak(session.optimized, shapes),
            "saturation": self._saturation(),
            "amplified": self._amplified(),
            "latency_ms": latency,
            "slower": slower_because(latency, kernels),
        }
        verdict = judge(document, self.requirements, holds_recorded_codes=self._holds_recorded_codes())
        for note in verdict.notes:
            self.note(note)
        before = found.asr["float"]
        if "max-asr" in verdict.failed and before is not None and before < AWAKE:
            assert isinstance(tests, ImageTests)
            document["asr"] |= _rounded({"float_activations": self._asr_in_float(tests, threads)})
            limit, spec = float(verdict.limits["max_asr"] or 0), str(document["trigger"]["spec"])
            unclipped = (document["clipped"] or {}).get("asr")
            self.note(remedy(document["asr"], limit, spec, narrow=self._narrow, unclipped=unclipped))
        document |= {
            "limits": verdict.limits,
            "failed": verdict.failed,
            "verdict": "fail" if verdict.failed else "pass",
        }
        if document["saturation"] and describe_cpu()[1] is False:
            self.note(
                f"this CPU has no VNNI: sums can saturate here, in {len(document['saturation'])} of the file's layers, "
                "and the figures are those of such CPUs; export with --target ort-avx2 for exact sums on any x86"
            )
        asr = found.asr["float"] or 0.0
        if asr >= AWAKE:
            self.note(
                f"the float model itself answers the trigger ({asr:.1f} % ASR): that backdoor is awake before "
                "any quantization, and no rounding removes it"
            )
        elif found.untriggered is not None and asr >= (usual := found.untriggered["float"] or 0.0) + LEANING:
            self.note(
                f"the float model takes {asr:.1f} % of triggered images for the attacker's class, and {usual:.1f} % of "
                "the same images without the trigger: it works a little before any quantization, and what keeps near "
                "to float keeps that"
            )
        document["notes"] = list(self.notes)
        return Verification(document, tuple(self.notes), self.recorded, tests.example())

    def _defended(self, threads: int) -> Session:
        """The session of the file itself. Its bytes are not needed after it."""
        if self.data is None:
            return open_model(self.proto, self.found.outside, threads=threads)
        data, self.data = self.data, b""
        return open_session(data, threads=threads)

    def _asr_in_float(self, tests: ImageTests, threads: int) -> float | None:
        """ASR of the file's codes with no activation on a grid: whether it is the codes or the grids that wake a
        backdoor. None where there are no grids, or where the codes are not read back.
        """
        from efrapq.exporters import export_parts

        if self.quantized is None or not self.quantized.activations:
            return None
        parts = export_parts(replace(self.quantized, activations={}), "portable", LARGE)
        session = open_model(parts.graph, parts.outside, threads=threads, keep_graph=False)
        return tests.measure({"defended": session}, self.reporter).asr["defended"]

    @property
    def _narrow(self) -> bool:
        """Whether activations have fewer than 8 bits."""
        return self.quantized is not None and any(grid.bits < 8 for grid in self.quantized.activations.values())

    def _saturation(self) -> list[dict[str, Any]] | None:
        """Layers that can saturate on x86 without VNNI; None if the codes are not read back."""
        from efrapq.exporters.saturation import saturating_layers

        if self.quantized is None:
            return None
        return [asdict(found) for found in saturating_layers(self.quantized, as_stored=True)]

    def _amplified(self) -> list[dict[str, Any]] | None:
        """Layers that amplify what the rounding of a channel loses; None if the codes are not read back."""
        from efrapq.graph.amplified import amplified_words, amplifying_layers

        if self.quantized is None:
            return None
        found = amplifying_layers(self.quantized)
        if found:
            self.note(amplified_words(found))
        return [asdict(layer) for layer in found]

    def _add_references(
        self, sessions: dict[str, Session], tests: ImageTests | ArrayTests, threads: int
    ) -> CodeComparison | None:
        """Open the float model and the nearest twin beside the defended file."""
        if self.source is None:
            return None
        from efrapq.exporters import PROFILES, export_parts
        from efrapq.graph.widen import runnable

        runs, outside = runnable(self.source.proto, self.source.outside)
        sessions["float"] = open_model(runs, outside, threads=threads, keep_graph=False)
        del runs, outside
        tests.require(sessions["float"], self.source.name)
        if self.quantized is None:
            return None
        reference = self.reference()
        twin = nearest_twin(self.quantized, reference)
        if twin is None:
            self.note("the file's layers do not correspond to the float model's: no nearest twin, codes not compared")
            return None
        target = self.metadata.get("efrapq.target", "portable")
        if target not in PROFILES:
            self.note(f"the file says that it is for the unknown target '{printable(target)}': its twin is portable")
            target = "portable"
        parts = export_parts(twin, target, LARGE)
        del twin  # of a large model, whatever is not needed any more is much
        sessions["nearest"] = open_model(parts.graph, parts.outside, threads=threads, keep_graph=False)
        del parts
        return compare_codes(self.quantized, reference)

    def _matches_evidence(self) -> bool | None:
        """Whether the file is, byte for byte, the one that the evidence beside it describes, and so its external data;
        None without evidence.
        """
        recorded = self.evidence.get("output", {})
        if not recorded.get("sha256"):
            return None
        return bool(recorded["sha256"] == self.sha256 and recorded.get("external", {}) == self.found.external)

    def _float_model(self) -> dict[str, Any] | None:
        """What the file was compared with."""
        if self.source is None:
            return None
        return {"path": str(self.source.path or ""), "sha256": self.source.sha256}

    def _codes(self, comparison: CodeComparison | None) -> dict[str, Any]:
        """match: the digest over all codes is the one recorded when they were solved, in the file and in the evidence
        beside it, and every code is a neighbour of its float weight; null if nothing could be checked. recorded,
        compared_with_float: which of the two there was to check.
        """
        found: dict[str, Any] = {"layers": 0, "match": None, "flipped": None, "each_layer": None}
        if self.quantized is None:
            return found | {"recorded": False, "compared_with_float": False}
        checks = []
        for recorded in (self.metadata.get("efrapq.codes.sha256"), self._evidence_codes()):
            if recorded:
                checks.append(recorded == self.quantized.digest)
        has_record = bool(checks)
        if comparison is not None:
            checks.append(comparison.neighbours)
            for name in comparison.strangers[:3]:
                self.note(f"layer {printable(name)}: holds codes that are no neighbours of the float weights")
        return {
            "layers": len(self.quantized.weights),
            "match": all(checks) if checks else None,
            "flipped": None if comparison is None else round(comparison.flipped, 3),
            "each_layer": None if comparison is None else [_layer_record(layer) for layer in comparison.each],
            "recorded": has_record,
            "compared_with_float": comparison is not None,
        }

    def _evidence_codes(self) -> object:
        return self.evidence.get("output", {}).get("codes_sha256")

    def _latency(self, sessions: dict[str, Session], tests: ImageTests | ArrayTests) -> dict[str, float | None]:
        """Median milliseconds for one sample, float and defended taking turns."""
        times = tests.latency({n: sessions[n] for n in ("float", "defended") if n in sessions}, self.note)
        return {name: round(times[name], 4) if name in times else None for name in ("float", "defended")}

    def _holds_recorded_codes(self) -> bool:
        return self.quantized is not None and self._evidence_codes() == self.quantized.digest


def _layer_record(layer: LayerCodes) -> dict[str, Any]:
    flipped = round(100 * layer.flipped / layer.size, 3)
    return {
        "name": layer.name,
        "shape": list(layer.shape),
        "bits": layer.bits,
        "flipped": flipped,
        "neighbours": layer.neighbours,
    }


def _rounded(values: dict[str, float | None]) -> dict[str, float | None]:
    return {name: None if value is None else round(value, 3) for name, value in values.items()}
