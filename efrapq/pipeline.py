"""defend() and export(): from a float model to a file in which the rounding is ours."""

from __future__ import annotations

import json
import platform
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efrapq.data import Dataset, Preprocess, PreprocessOverride, load_dataset
from efrapq.errors import DataError, InputError, OutputError, RuntimeSetupError, UnsupportedModelError, UsageError
from efrapq.io import check_output, load_onnx, printable, read_source, refuse_quantized, write_all
from efrapq.loading import PREPROCESS_KEY, FloatModel, effective_preprocess, image_input, load, open_for
from efrapq.progress import Reporter, Silent
from efrapq.report.evidence import EVIDENCE_SCHEMA, dumps, versions

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch
    from torch import nn

    from efrapq.graph.quantized import QuantizedModel
    from efrapq.rounding import Coordinate, Relaxed
    from efrapq.stream import LayerReport

__all__ = ["Defended", "Exported", "default_output", "defend", "export", "exported_name"]

SOLVERS = ("coordinate", "relaxed", "nearest")
RANGES = ("auto", "minmax", "percentile", "mse")
# The error term's weight where the user gives none: measured for `coordinate`, the paper's for `relaxed`.
LAMBDA_E = {"coordinate": 1e-3, "relaxed": 1.0}


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
    """What export() wrote: one file with the same codes as the one it came from."""

    data: bytes
    path: Path
    codes_sha256: str


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
    error: str = "absolute",
    steps: int = 10_000,
    act_range: str = "auto",
    target: str | None = None,
    arch: str | None = None,
    input_shape: tuple[int, int, int] | None = None,
    device: str = "auto",
    seed: int = 0,
    trust_pickle: bool = False,
    reporter: Reporter | None = None,
) -> Defended:
    """Quantize a float model with EFRAP rounding (Li et al., CVPR 2024).

    model: a path or an nn.Module. output: where to write the QDQ graph; the evidence goes beside it with the suffix
    .json; None writes nothing. bits: of the weights, 4 or 8; act_bits: 8, 4, or 32 for float activations; edge_bits:
    of the first and last layer. calib: images to calibrate on, at most calib_size of them; without it inputs are
    made from the model's BatchNorm statistics. solver: coordinate, relaxed (the paper's) or nearest. lambda_e, error:
    weight and unit of the error term. The same inputs, seed and versions give the same bytes.

    Raises EfrapqError (see `efrapq.errors`) for whatever is wrong with the inputs.
    """
    from efrapq.device import resolve_device
    from efrapq.exporters import native_target, profile

    started = time.perf_counter()
    reporter = reporter or Silent()
    _check_options(bits, act_bits, edge_bits, solver, error, act_range, calib_size, seed)
    solver_settings = _solver_settings(solver, lambda_e, error, steps)
    device = resolve_device(device)
    target = target or native_target(platform.machine())
    profile(target)
    inputs = [Path(model)] if isinstance(model, str | Path) else []
    evidence_path = None
    if output is not None:
        output, evidence_path = _outputs(output, [*inputs, *_files(calib)])
    own_network = not inputs or (arch is not None and ":" in arch)
    if own_network and input_shape is None and calib is not None:
        input_shape = _sample_shape(calib, preprocess)
    source = load(model, arch=arch, input_shape=input_shape, trust_pickle=trust_pickle)
    for note in source.notes:
        reporter.warn(note)
    reporter.note(_describe(source))
    preprocess, colours_known = effective_preprocess(preprocess, source.preprocess)
    dataset = _open_calibration(calib, source, preprocess, calib_size, seed)
    if dataset is not None and not dataset.is_input and not colours_known:
        reporter.warn(
            "no preprocessing is known for this model: pixels are scaled to 0–1; pass --mean and --std if it wants more"
        )
    quantized, reports, calibration = _solve(
        source,
        dataset,
        preprocess,
        bits=bits,
        act_bits=act_bits,
        edge_bits=edge_bits,
        solver=solver_settings,
        act_range=_act_range(act_range, act_bits),
        calib_size=calib_size,
        device=device,
        seed=seed,
        reporter=reporter,
    )
    settings = {
        "bits": bits,
        "act_bits": act_bits,
        "edge_bits": edge_bits,
        "solver": solver,
        "lambda_e": _lambda_e(solver, lambda_e),
        "error": error,
        "act_range": _act_range(act_range, act_bits),
        "seed": seed,
        "target": target,
    }
    if solver == "relaxed":
        settings["steps"] = steps
    quantized.metadata.update(
        {
            "efrapq.schema": "1",
            "efrapq.version": versions()["efrapq"],
            "efrapq.source.sha256": source.sha256,
            "efrapq.codes.sha256": quantized.digest,
            "efrapq.settings": json.dumps(settings, sort_keys=True),
            "efrapq.calibration": json.dumps(calibration, sort_keys=True),
        }
    )
    if preprocess is not None:
        quantized.metadata[PREPROCESS_KEY] = preprocess.to_json()
    data = _write_checked(quantized, target, (source.input_shape[0] or 1, *calibration["input"]))
    evidence = _evidence(source, quantized, reports, settings, calibration, data, output)
    evidence["machine"] = _machine(device)
    evidence["timing"] = {
        "seconds": round(time.perf_counter() - started, 3),
        "layers": {r.name: round(r.seconds, 3) for r in reports},
    }
    if output is not None and evidence_path is not None:
        write_all({output: data, evidence_path: dumps(evidence).encode()})
    return Defended(data, evidence, quantized, output, evidence_path)


def export(model: str | Path, output: str | Path, *, target: str) -> Exported:
    """Write a defended file for another target. Not a code changes: the result is read back and compared."""
    from efrapq.exporters import profile, read_quantized

    profile(target)
    source = read_source(model)
    output = Path(output)
    check_output(output, [Path(model)])
    proto = load_onnx(source).model
    quantized = read_quantized(proto)
    shape = image_input(proto)
    recorded = _recorded_input(quantized.metadata)
    data = _write_checked(
        quantized, target, tuple(d or (recorded[i - 1] if i and recorded else 1) for i, d in enumerate(shape))
    )
    write_all({output: data})
    return Exported(data, output, quantized.digest)


def _recorded_input(metadata: dict[str, str]) -> list[int] | None:
    """(C, H, W) of the calibration inputs as the file records them, for models with dynamic sizes."""
    try:
        found = json.loads(metadata.get("efrapq.calibration", "{}")).get("input")
    except (ValueError, AttributeError, RecursionError):
        return None
    return found if isinstance(found, list) and all(isinstance(d, int) and 0 < d < 10_000 for d in found) else None


def _check_options(
    bits: int, act_bits: int, edge_bits: int, solver: str, error: str, act_range: str, calib_size: int, seed: int
) -> None:
    if bits not in (4, 8) or edge_bits not in (4, 8):
        raise UsageError("--bits and --edge-bits must be 4 or 8")
    if act_bits not in (4, 8, 32):
        raise UsageError("--act-bits must be 8, 4, or 32 for float activations")
    if solver not in SOLVERS:
        raise UsageError(f"unknown solver '{solver}'; known: {', '.join(SOLVERS)}")
    if error not in ("absolute", "relative"):
        raise UsageError("--error must be absolute or relative")
    if act_range not in RANGES:
        raise UsageError(f"unknown activation range '{act_range}'; known: {', '.join(RANGES)}")
    if calib_size < 1:
        raise UsageError("--calib-size must be at least 1")
    if not 0 <= seed < 2**63:
        raise UsageError("--seed must be between 0 and 2^63 - 1")


def _act_range(act_range: str, act_bits: int) -> str:
    """Min-max keeps every value and costs nothing at 8 bits; at 4 bits the tails are not worth their levels."""
    return ("minmax" if act_bits >= 8 else "mse") if act_range == "auto" else act_range


def _lambda_e(solver: str, lambda_e: float | None) -> float:
    if solver == "nearest":
        return 0.0
    value = LAMBDA_E[solver] if lambda_e is None else lambda_e
    if not (np.isfinite(value) and value >= 0):
        raise UsageError("--lambda-e must be zero or a positive number")
    return value


def _solver_settings(solver: str, lambda_e: float | None, error: str, steps: int) -> Coordinate | Relaxed | None:
    from efrapq.rounding import Coordinate, Relaxed

    weight = _lambda_e(solver, lambda_e)
    if solver == "coordinate":
        return Coordinate(lambda_e=weight, error=error)
    if solver == "relaxed":
        return Relaxed(lambda_e=weight, error=error, steps=steps)
    return None


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


def _solve(
    source: FloatModel,
    dataset: Dataset | None,
    preprocess: Preprocess | None,
    *,
    bits: int,
    act_bits: int,
    edge_bits: int,
    solver: Coordinate | Relaxed | None,
    act_range: str,
    calib_size: int,
    device: str,
    seed: int,
    reporter: Reporter,
) -> tuple[QuantizedModel, list[LayerReport], dict[str, Any]]:
    import torch

    from efrapq.graph.layers import find_layers
    from efrapq.graph.placement import place
    from efrapq.graph.prepare import prepare
    from efrapq.graph.quantized import QuantizedModel
    from efrapq.stream import PassSettings, streaming_pass

    refuse_quantized(source.proto, source.name)
    model = prepare(source.proto)
    layers, skipped = find_layers(model.graph)
    if not layers:
        raise UnsupportedModelError(
            f"{source.name}: no Conv, ConvTranspose, Gemm or MatMul with a constant weight, nothing to quantize"
        )
    for node in skipped:
        reporter.warn(f"{node.op_type} {node.node_name} stays float: {node.reason}")
    shape = _input_shape(model, source.name)
    if dataset is None:
        chunks, calibration = _synthetic(source, shape, calib_size, device, seed, reporter)
    else:
        chunks, calibration = _real(dataset, shape, preprocess, source.name)
    placement = place(model.graph, layers, act_bits, edge_bits)
    settings = PassSettings(bits, edge_bits, act_range, solver=solver, seed=seed, device=device)
    try:
        solved = streaming_pass(model, layers, placement, chunks, settings, reporter)
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise RuntimeSetupError(
            f"out of memory on {device}: use a smaller --calib-size" + (", or --device cpu" if device != "cpu" else "")
        ) from exc
    if len(solved.weights) != len(layers):
        raise UnsupportedModelError(f"{source.name}: two of its layers have the same name; please report the model")
    for node_name in solved.fallback:
        reporter.note(f"node {node_name} was run by ONNX Runtime: efrapq has no torch form of it")
    kept = {k: v for k, v in model.metadata_props.items() if not k.startswith("efrapq.")}
    quantized = QuantizedModel(model, layers, solved.weights, solved.activations, kept)
    return quantized, solved.reports, calibration | {"input": list(chunks[0].shape[1:])}


def _input_shape(model: ir.Model, name: str) -> tuple[int | None, ...]:
    inputs = model.graph.inputs
    if len(inputs) != 1:
        raise UnsupportedModelError(f"{name}: has {len(inputs)} inputs; models with one image input are supported")
    shape = inputs[0].shape
    if shape is None or len(shape) != 4:
        raise UnsupportedModelError(f"{name}: its input is not a batch of images (N, C, H, W)")
    return tuple(d if isinstance(d, int) else None for d in shape)


def _chunk_size(shape: tuple[int | None, ...]) -> int:
    """Images a chunk: 128 at 32×32, fewer as they grow; a model with a fixed batch gets exactly that."""
    if shape[0] is not None:
        return shape[0]
    height, width = shape[2] or 224, shape[3] or 224
    return max(8, min(128, 128 * 32 * 32 // (height * width)))


def _real(
    dataset: Dataset,
    shape: tuple[int | None, ...],
    preprocess: Preprocess | None,
    name: str,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    import torch

    preprocess = preprocess or Preprocess()
    chunks = []
    size = _chunk_size(shape)
    for indices in dataset.batches(size):
        x = dataset.inputs(indices, preprocess)
        if any(want is not None and want != got for want, got in zip(shape[1:], x.shape[1:], strict=True)):
            wanted = "×".join("any" if d is None else str(d) for d in shape[1:])
            raise DataError(f"{dataset.name}: gives inputs of {'×'.join(map(str, x.shape[1:]))}, {name} wants {wanted}")
        if shape[0] is None or len(x) == size:
            chunks.append(torch.from_numpy(x))
    if not chunks:
        raise DataError(f"{dataset.name}: fewer images than the model's fixed batch of {size}")
    count = sum(len(c) for c in chunks)
    return chunks, {"kind": "data", "source": Path(dataset.name).name, "images": count}


def _synthetic(
    source: FloatModel,
    shape: tuple[int | None, ...],
    calib_size: int,
    device: str,
    seed: int,
    reporter: Reporter,
) -> tuple[list[torch.Tensor], dict[str, Any]]:
    import torch

    from efrapq.calibration.datafree import DataFree, synthesize
    from efrapq.graph.prepare import simplify

    channels, height, width = shape[1:]
    if channels is None or height is None or width is None:
        raise DataError(f"{source.name}: its input size is dynamic, so calibration inputs cannot be made: pass --calib")
    reporter.warn(
        "no --calib data: calibrating on inputs made from the model's BatchNorm statistics; real images are better"
    )
    batch = shape[0] or DataFree.batch
    settings = DataFree(images=max(min(calib_size, DataFree.images), batch), batch=batch, seed=seed)
    made = synthesize(simplify(source.proto), (channels, height, width), settings, device, reporter)
    chunks = list(torch.split(made, _chunk_size(shape)))
    if shape[0] is not None and len(chunks) > 1 and len(chunks[-1]) != shape[0]:
        chunks.pop()
    count = sum(len(c) for c in chunks)
    return chunks, {"kind": "batchnorm-statistics", "images": count, "steps": settings.steps}


def _write_checked(quantized: QuantizedModel, target: str, shape: tuple[int, ...]) -> bytes:
    """Export, read back, compare, load and run on one input of this shape: only then is it done."""
    import onnx

    from efrapq.exporters import export_model, read_quantized
    from efrapq.verification.session import try_run

    proto = export_model(quantized, target)
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
