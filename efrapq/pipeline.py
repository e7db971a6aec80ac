"""defend() and export(): from a float model to a file in which the rounding is ours."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efrapq.data import Dataset, Preprocess, PreprocessOverride, load_dataset
from efrapq.errors import EfrapqError, InputError, OutputError, RuntimeSetupError, UnsupportedModelError, UsageError
from efrapq.io import check_output, load_onnx, printable, read_source, refuse_quantized, write_all
from efrapq.loading import PREPROCESS_KEY, FloatModel, effective_preprocess, image_input, load, open_for
from efrapq.options import act_range_for, check_options, memory_limit, solver_settings
from efrapq.progress import Reporter, Silent
from efrapq.report.evidence import EVIDENCE_SCHEMA, dumps, versions

if TYPE_CHECKING:
    import torch
    from torch import nn

    from efrapq.graph.quantized import QuantizedModel
    from efrapq.stream import Journal, LayerReport, PassSettings, Solved

__all__ = ["Defended", "Exported", "default_output", "defend", "export", "export_all", "exported_name"]


@dataclass(frozen=True)
class Defended:
    """What defend() made. data: the file's bytes; path, evidence_path: where they were written, if anywhere."""

    data: bytes
    evidence: dict[str, Any]
    quantized: QuantizedModel
    path: Path | None
    evidence_path: Path | None


@dataclass(frozen=True)
class Exported:
    """What export() wrote: one file with the same codes as the one it came from. notes: what its user should know."""

    data: bytes
    path: Path
    codes_sha256: str
    target: str
    notes: tuple[str, ...] = ()


def default_output(model: str | Path, bits: int) -> Path:
    """model.pt → model.int4.onnx, beside it."""
    return _beside(model, f"int{bits}")


def exported_name(model: str | Path, target: str) -> Path:
    """model.int4.onnx → model.int4.TARGET.onnx, beside it."""
    from efrapq.exporters import profile

    return _beside(model, profile(target).name)


def _beside(model: str | Path, word: str) -> Path:
    path = Path(model)
    if not path.name or path.is_dir():
        raise InputError(f"{printable(path)}: is a folder, not a model file")
    return path.with_name(f"{path.stem}.{word}.onnx")


def defend(
    model: str | Path | nn.Module,
    output: str | Path | None = None,
    *,
    bits: int = 4,
    act_bits: int = 8,
    edge_bits: int = 8,
    calib: str | Path | Dataset | None = None,
    calib_size: int = 512,
    preprocess: Preprocess | PreprocessOverride | None = None,
    solver: str = "coordinate",
    lambda_e: float | None = None,
    fidelity: float | None = None,
    error: str = "absolute",
    steps: int = 10_000,
    act_range: str = "auto",
    scale: str = "minmax",
    rows: int = 32,
    target: str | None = None,
    arch: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    device: str = "auto",
    seed: int = 0,
    memory: int | None = None,
    resume: bool = False,
    trust_pickle: bool = False,
    reporter: Reporter | None = None,
) -> Defended:
    """Quantize a float model with EFRAP rounding (Li et al., CVPR 2024).

    model: a path or an nn.Module. output: where to write the QDQ graph; the evidence goes beside it with the suffix
    .json; None writes nothing. bits: of the weights, 2 to 8; act_bits: 8, 4, or 32 for float activations; edge_bits:
    of the first and last layer. calib: images to calibrate on, at most calib_size of them; without it inputs are
    made from the model's BatchNorm statistics. solver: coordinate, relaxed (the paper's) or nearest. fidelity: the
    factor by which each layer's L_A may exceed its optimum so that more weights flip; lambda_e: a fixed weight of the
    error term instead; error: its unit. scale: of the weights, minmax, mse or refit. rows: each layer's moments are
    taken over at most so many rows per input of an output channel. memory: bytes of activations kept
    in memory, the rest goes to temporary files. resume: continue a run that was stopped. The same inputs, seed and
    versions give the same bytes.

    Raises EfrapqError (see `efrapq.errors`) for whatever is wrong with the inputs.
    """
    from efrapq.device import resolve_device
    from efrapq.exporters import native_target, profile
    from efrapq.stream import PassSettings

    started = time.perf_counter()
    reporter = reporter or Silent()
    check_options(
        bits=bits,
        act_bits=act_bits,
        edge_bits=edge_bits,
        solver=solver,
        error=error,
        act_range=act_range,
        scale=scale,
        calib_size=calib_size,
        rows=rows,
        seed=seed,
    )
    rounding = solver_settings(solver, lambda_e, fidelity, error, steps)
    device = resolve_device(device)
    target = target or native_target(platform.machine())
    profile(target)
    inputs = [Path(model)] if isinstance(model, str | Path) else []
    evidence_path = None
    if output is not None:
        output, evidence_path = _outputs(output, [*inputs, *_files(calib)])
    elif resume:
        raise UsageError("--resume needs an output: the run's layers are kept beside it")
    own_network = not inputs or (arch is not None and ":" in arch)
    if own_network and input_shape is None and calib is not None:
        input_shape = _sample_shape(calib, preprocess)
    source = load(model, arch=arch, input_shape=input_shape, trust_pickle=trust_pickle)
    for note in source.notes:
        reporter.warn(note)
    reporter.note(_describe(source))
    for width in sorted({bits, edge_bits} - {4, 8}):
        reporter.note(f"weights of {width} bits are stored in {4 if width < 4 else 8}-bit integers")
    preprocess, colours_known = effective_preprocess(preprocess, source.preprocess)
    dataset = _open_calibration(calib, source, preprocess, calib_size, seed)
    if dataset is not None and not dataset.is_input and not colours_known:
        reporter.warn(
            "no preprocessing is known for this model: pixels are scaled to 0–1; pass --mean and --std if it wants more"
        )
    settings = PassSettings(
        bits,
        edge_bits,
        act_range_for(act_range, act_bits),
        scale,
        rows,
        solver=rounding,
        seed=seed,
        device=device,
        memory=memory_limit(memory, device),
    )
    quantized, solved, calibration = _solve(
        source, dataset, preprocess, act_bits, calib_size, settings, output, resume, reporter
    )
    recorded = _recorded_settings(settings, act_bits, target)
    quantized.metadata.update(
        {
            "efrapq.schema": "1",
            "efrapq.version": versions()["efrapq"],
            "efrapq.source.sha256": source.sha256,
            "efrapq.codes.sha256": quantized.digest,
            "efrapq.settings": json.dumps(recorded, sort_keys=True),
            "efrapq.calibration": json.dumps(calibration, sort_keys=True),
        }
    )
    if preprocess is not None:
        quantized.metadata[PREPROCESS_KEY] = preprocess.to_json()
    data = _write_checked(quantized, target, (source.input_shape[0] or 1, *calibration["input"]))
    evidence = _evidence(source, quantized, solved.reports, recorded, calibration, data, output)
    evidence["machine"] = _machine(device)
    evidence["timing"] = {
        "seconds": round(time.perf_counter() - started, 3),
        "pass": round(solved.seconds, 3),
        "layers": {r.name: round(r.seconds, 3) for r in solved.reports},
    }
    if output is not None and evidence_path is not None:
        write_all({output: data, evidence_path: dumps(evidence).encode()})
        _journal_folder(output, None).discard()
    return Defended(data, evidence, quantized, output, evidence_path)


def export(model: str | Path, output: str | Path, *, target: str) -> Exported:
    """Write a defended file for another target. Not a code changes: the result is read back and compared."""
    return export_all(model, {target: output})[0]


def export_all(model: str | Path, outputs: Mapping[str, str | Path]) -> list[Exported]:
    """One solution, written for several targets. outputs: target → file. All are checked before one is written."""
    from efrapq.exporters import profile, read_quantized, remarks
    from efrapq.exporters.shapes import recorded_sizes

    for target in outputs:
        profile(target)
    source = read_source(model)
    paths = {target: Path(output) for target, output in outputs.items()}
    for path in paths.values():
        check_output(path, [Path(model)])
    proto = load_onnx(source).model
    quantized = read_quantized(proto)
    recorded = recorded_sizes(quantized.metadata)
    shape = tuple(d or (recorded[i - 1] if i and recorded else 1) for i, d in enumerate(image_input(proto)))
    made = [
        Exported(
            _write_checked(quantized, target, shape), path, quantized.digest, target, tuple(remarks(quantized, target))
        )
        for target, path in paths.items()
    ]
    write_all({file.path: file.data for file in made})
    return made


def _open_calibration(
    calib: str | Path | Dataset | None, source: FloatModel, preprocess: Preprocess | None, calib_size: int, seed: int
) -> Dataset | None:
    if calib is None:
        return None
    if not isinstance(calib, Dataset):
        calib = open_for(calib, source.input_shape, preprocess)
    return calib.subset(calib_size, seed)


def _sample_shape(
    calib: str | Path | Dataset, preprocess: Preprocess | PreprocessOverride | None
) -> tuple[int, int, int]:
    """(C, H, W) of one calibration sample, for a network that does not say what it takes."""
    size = preprocess.size if preprocess is not None else None
    dataset = calib if isinstance(calib, Dataset) else load_dataset(calib, size=size)
    shape = dataset.raw([0]).shape[1:]
    return (shape[0], shape[1], shape[2]) if dataset.is_input else (shape[2], shape[0], shape[1])


def _outputs(output: str | Path, inputs: list[Path]) -> tuple[Path, Path]:
    """The two files that defend writes, both checked before any work is done."""
    output = Path(output)
    check_output(output, inputs)
    evidence = output.with_suffix(".json")
    if evidence == output:
        raise OutputError(f"{printable(output)}: the evidence goes to the .json file; give the model another suffix")
    check_output(evidence, inputs)
    return output, evidence


def _files(calib: str | Path | Dataset | None) -> list[Path]:
    """The file behind a calibration argument, if it is one: an output must not replace it."""
    if calib is None or isinstance(calib, Dataset):
        return []
    text = str(calib)
    return [Path(text), Path(text.rsplit(":", 1)[0])]


def _describe(source: FloatModel) -> str:
    architecture = f", recognized as {source.architecture}" if source.architecture else ""
    return f"{source.name}: {source.format}{architecture}"


def _recorded_settings(settings: PassSettings, act_bits: int, target: str) -> dict[str, Any]:
    """What the file and the evidence say of how the codes were chosen."""
    from efrapq.rounding import Coordinate, Relaxed

    rounding = settings.solver
    recorded: dict[str, Any] = {
        "bits": settings.bits,
        "act_bits": act_bits,
        "edge_bits": settings.edge_bits,
        "solver": "nearest" if rounding is None else type(rounding).__name__.lower(),
        "act_range": settings.act_range,
        "scale": settings.scale,
        "rows": settings.rows,
        "seed": settings.seed,
        "target": target,
    }
    if isinstance(rounding, Coordinate) and rounding.fidelity is not None:
        recorded |= {"error": rounding.error, "fidelity": rounding.fidelity}
    elif rounding is not None:
        recorded |= {"error": rounding.error, "lambda_e": rounding.lambda_e}
    if isinstance(rounding, Relaxed):
        recorded["steps"] = rounding.steps
    return recorded


def _solve(
    source: FloatModel,
    dataset: Dataset | None,
    preprocess: Preprocess | None,
    act_bits: int,
    calib_size: int,
    settings: PassSettings,
    output: Path | None,
    resume: bool,
    reporter: Reporter,
) -> tuple[QuantizedModel, Solved, dict[str, Any]]:
    import torch

    from efrapq.calibration.inputs import input_shape, real_inputs, synthetic_inputs
    from efrapq.graph.layers import find_layers
    from efrapq.graph.placement import place
    from efrapq.graph.prepare import prepare
    from efrapq.graph.quantized import QuantizedModel
    from efrapq.stream import streaming_pass

    refuse_quantized(source.proto, source.name)
    model = prepare(source.proto)
    layers, skipped = find_layers(model.graph)
    if not layers:
        raise UnsupportedModelError(
            f"{source.name}: no Conv, ConvTranspose, Gemm or MatMul with a constant weight, nothing to quantize"
        )
    for node in skipped:
        reporter.warn(f"{node.op_type} {node.node_name} stays float: {node.reason}")
    shape = input_shape(model, source.name)
    if dataset is None:
        chunks, calibration = synthetic_inputs(source, shape, calib_size, settings.device, settings.seed, reporter)
    else:
        chunks, calibration = real_inputs(dataset, shape, preprocess, source.name)
    placement = place(model.graph, layers, act_bits, settings.edge_bits)
    journal = None
    if output is not None:
        journal = _journal(output, source, settings, act_bits, chunks, resume, reporter)
    try:
        solved = streaming_pass(model, layers, placement, chunks, settings, reporter, journal)
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise RuntimeSetupError(
            f"out of memory on {settings.device}: use a smaller --memory or --calib-size"
            + (", or --device cpu" if settings.device != "cpu" else "")
        ) from exc
    except KeyboardInterrupt:
        if journal is not None and journal.holds_layers():
            reporter.warn(f"stopped; what is solved so far lies in {printable(journal.folder.name)}: --resume goes on")
        raise
    except EfrapqError as exc:
        # The same bad input would end the same run again; a full disk need not, if there is anything to go on from.
        if journal is not None and (isinstance(exc, InputError) or not journal.holds_layers()):
            journal.discard()
        raise
    if len(solved.weights) != len(layers):
        raise UnsupportedModelError(f"{source.name}: two of its layers have the same name; please report the model")
    if journal is not None and journal.resumed:
        reporter.note(f"resumed: {journal.resumed} of {len(layers)} layers were solved before")
    for node_name in solved.fallback:
        reporter.note(f"node {node_name} was run by ONNX Runtime: efrapq has no torch form of it")
    kept = {k: v for k, v in model.metadata_props.items() if not k.startswith("efrapq.")}
    quantized = QuantizedModel(model, layers, solved.weights, solved.activations, kept)
    return quantized, solved, calibration | {"input": list(chunks[0].shape[1:])}


def _journal(
    output: Path,
    source: FloatModel,
    settings: PassSettings,
    act_bits: int,
    chunks: list[torch.Tensor],
    resume: bool,
    reporter: Reporter,
) -> Journal:
    """The record of solved layers beside the output, keyed by all that decides them."""
    import hashlib

    from efrapq.calibration.inputs import inputs_digest

    decides = {
        "model": hashlib.sha256(source.proto.SerializeToString(deterministic=True)).hexdigest(),
        "inputs": inputs_digest(chunks),
        "act_bits": act_bits,
        "settings": repr(replace(settings, memory=None)),
        "versions": versions(),
        "machine": _machine(settings.device),
    }
    journal = _journal_folder(output, hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest())
    if not resume:
        journal.restart()
    elif not journal.resume():
        reporter.warn("nothing to resume: starting from the first layer")
    return journal


def _journal_folder(output: Path, key: str | None) -> Journal:
    from efrapq.stream import Journal

    return Journal(output.with_name(f"{output.name}.partial"), key or "")


def _write_checked(quantized: QuantizedModel, target: str, shape: tuple[int, ...]) -> bytes:
    """Export, lint, read back, compare, load and run on one input of this shape: only then is it done."""
    import onnx

    from efrapq.exporters import export_model, lint, read_quantized
    from efrapq.verification.session import try_run

    proto = export_model(quantized, target)
    violations = lint(proto, target)
    if violations:
        more = f" (and {len(violations) - 1} more)" if len(violations) > 1 else ""
        raise UnsupportedModelError(f"{target} would not take this model: {violations[0]}{more}")
    try:
        onnx.checker.check_model(proto)
    except onnx.checker.ValidationError as exc:
        reason = printable((str(exc).splitlines() or [""])[0])
        raise UnsupportedModelError(f"the {target} form of this model is not valid ONNX ({reason})") from exc
    data = proto.SerializeToString(deterministic=True)
    if read_quantized(onnx.load_model_from_string(data)).digest != quantized.digest:
        raise UnsupportedModelError(
            f"the {target} file does not read back as the codes that were solved; please report this"
        )
    try_run(data, shape)
    return bytes(data)


def _machine(device: str) -> dict[str, Any]:
    """What else decides the bytes: sums of floats depend on the device and on how many threads share them."""
    import torch

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    return {"device": device, "name": name, "torch_threads": torch.get_num_threads()}


def _evidence(
    source: FloatModel,
    quantized: QuantizedModel,
    reports: list[LayerReport],
    settings: dict[str, Any],
    calibration: dict[str, Any],
    data: bytes,
    output: Path | None,
) -> dict[str, Any]:
    import hashlib

    weights = np.array([float(np.prod(r.shape)) for r in reports])
    flipped = np.array([r.flipped for r in reports])
    return {
        "schema": EVIDENCE_SCHEMA,
        "input": {
            "path": str(source.path) if source.path is not None else None,
            "sha256": source.sha256 or None,
            "bytes": source.size,
            "format": source.format,
            "architecture": source.architecture,
        },
        "output": {
            "path": str(output) if output is not None else None,
            "sha256": hashlib.sha256(data).hexdigest(),
            "bytes": len(data),
            "codes_sha256": quantized.digest,
        },
        "settings": settings,
        "calibration": calibration,
        "flipped": round(float((weights * flipped).sum() / weights.sum()), 3),
        "layers": [{k: v for k, v in asdict(r).items() if k != "seconds"} for r in reports],
        "versions": versions(),
    }
