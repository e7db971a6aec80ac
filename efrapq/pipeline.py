"""defend() and export(): from a float model to a file in which the rounding is ours."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import math
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from efrapq.calibration.arrays import Arrays
from efrapq.calibration.inputs import open_calibration
from efrapq.calibration.signature import image_layout, model_inputs, takes_images
from efrapq.cpu import describe_cpu
from efrapq.data import MAX_ARRAY_BYTES, Dataset, Preprocess, PreprocessOverride, files_behind, load_dataset
from efrapq.errors import EfrapqError, InputError, OutputError, RuntimeSetupError, UnsupportedModelError, UsageError
from efrapq.io import check_output, load_onnx, printable, read_source, refuse_quantized, write_all
from efrapq.loading import PREPROCESS_KEY, FloatModel, effective_preprocess, load
from efrapq.options import act_range_for, check_options, memory_limit, solver_settings
from efrapq.progress import Reporter, Silent
from efrapq.report.evidence import EVIDENCE_SCHEMA, dumps, versions
from efrapq.writing import Written, data_path, write_checked

if TYPE_CHECKING:
    import onnx
    import onnx_ir as ir
    import torch
    from torch import nn

    from efrapq.calibration.feeds import Feeds
    from efrapq.graph.layers import Layer
    from efrapq.graph.placement import Placement
    from efrapq.graph.quantized import QuantizedModel
    from efrapq.stream import Journal, LayerReport, PassSettings, Solved

# Calibration data as defend takes it; see `efrapq.calibration`.
Calibration = str | Path | Dataset | Mapping[str, NDArray[Any]]

__all__ = ["Calibration", "Defended", "Exported", "default_output", "defend", "export", "export_all", "exported_name"]


@dataclass(frozen=True)
class Defended:
    """What defend() made. data: the file's bytes, which past 2 GiB are without the weights' codes: these are in the
    file `path`.data then. path, evidence_path: where they were written, if anywhere.
    """

    data: bytes
    evidence: dict[str, Any]
    quantized: QuantizedModel
    path: Path | None
    evidence_path: Path | None


@dataclass(frozen=True)
class Exported:
    """What export() wrote: one file with the same codes as the one it came from. data: as in Defended. notes: what its
    user should know.
    """

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
    block: int = 0,
    calib: Calibration | None = None,
    calib_size: int = 512,
    preprocess: Preprocess | PreprocessOverride | None = None,
    solver: str = "coordinate",
    lambda_e: float | None = None,
    fidelity: float | None = None,
    error: str = "absolute",
    steps: int = 10_000,
    act_range: str = "auto",
    scale: str = "minmax",
    equalize: bool = False,
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
    .json; None writes nothing. bits: of the weights, 2 to 8; act_bits: 8, 4, or 32 for float activations;
    edge_bits: of the first and last layer. block: inputs of an output channel that share a scale, 16 to 256, in
    matrices beside float activations; 0 for one scale per channel. calib: images to calibrate on, at most
    calib_size of them; without it inputs are made from the model's BatchNorm statistics. A model that takes
    anything but one batch of images needs one array per input, by name and in its layout: a dict, an .npz file or
    a folder of them. solver: coordinate, relaxed (the paper's) or nearest. fidelity: the factor by which
    each layer's L_A may exceed its optimum so that more weights flip; lambda_e: a fixed weight of the error term
    instead; error: its unit. act_range: of the activations, minmax, percentile, mse, or output, by what it does to the
    model's outputs; auto is minmax at 8 bits and mse at 4. scale: of the weights, minmax, mse or refit. equalize: scale
    channels first, where the network's function stays the same, so that one activation grid serves them all. rows: each
    layer's moments are taken over at most so many rows per input of an output channel. memory: bytes of activations
    kept in memory, the rest goes to temporary files. resume: continue a run that was stopped. The same inputs, seed and
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
        block=block,
    )
    rounding = solver_settings(solver, lambda_e, fidelity, error, steps)
    device = resolve_device(device)
    target = target or native_target(platform.machine(), describe_cpu()[1])
    profile(target)
    inputs = [Path(model)] if isinstance(model, str | Path) else []
    evidence_path = None
    if output is not None:
        output, evidence_path = _outputs(output, [*inputs, *_files(calib)])
    elif resume:
        raise UsageError("--resume needs an output: the run's layers are kept beside it")
    own_network = not inputs or (arch is not None and ":" in arch)
    if own_network and input_shape is None and calib is not None and not isinstance(calib, Mapping):
        input_shape = _sample_shape(calib, preprocess)
    source = load(model, arch=arch, input_shape=input_shape, trust_pickle=trust_pickle)
    for note in source.notes:
        reporter.warn(note)
    reporter.note(_describe(source))
    for width in sorted({bits, edge_bits} - {4, 8}):
        reporter.note(f"weights of {width} bits are stored in {4 if width < 4 else 8}-bit integers")
    refuse_quantized(source.proto, source.name)
    data_files = [source.path.parent / location for location in source.external] if source.path is not None else []
    if output is not None:
        _outputs(output, data_files)
    effective, colours_known = effective_preprocess(preprocess, source.preprocess)
    data = open_calibration(calib, source, effective, calib_size, seed)
    if isinstance(data, Arrays) and preprocess is not None:
        raise UsageError("--mean, --std and --size are for images: arrays are taken as the model's inputs")
    if isinstance(data, Dataset) and not data.is_input and not colours_known:
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
        block=block,
    )
    quantized, solved, calibration = _solve(
        source, data, effective, act_bits, calib_size, settings, output, resume, reporter, equalize=equalize
    )
    recorded = _recorded_settings(settings, act_bits, target) | ({"equalize": True} if equalize else {})
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
    if effective is not None:
        layout = image_layout(model_inputs(source.proto, source.name))
        quantized.metadata[PREPROCESS_KEY] = effective.in_layout(layout).to_json()
    shape = () if isinstance(data, Arrays) else (source.input_shape[0] or 1, *calibration["input"])
    written = write_checked(quantized, target, data.sample() if isinstance(data, Arrays) else shape, output)
    evidence = _evidence(source, quantized, solved.reports, recorded, calibration, written, output)
    evidence["machine"] = _machine(device)
    evidence["timing"] = {
        "seconds": round(time.perf_counter() - started, 3),
        "pass": round(solved.seconds, 3),
        "layers": {r.name: round(r.seconds, 3) for r in solved.reports},
    }
    if output is not None and evidence_path is not None:
        if written.external:
            check_output(data_path(output), [*inputs, *data_files, *_files(calib)])
        write_all(written.files(output) | {evidence_path: dumps(evidence).encode()})
        _journal_folder(output, None).discard()
    return Defended(written.data, evidence, quantized, output, evidence_path)


def export(model: str | Path, output: str | Path, *, target: str) -> Exported:
    """Write a defended file for another target. Not a code changes: the result is read back and compared."""
    return export_all(model, {target: output})[0]


def export_all(model: str | Path, outputs: Mapping[str, str | Path]) -> list[Exported]:
    """One solution, written for several targets. outputs: target → file. All are checked before one is written."""
    from efrapq.exporters import profile, read_quantized, remarks

    for target in outputs:
        profile(target)
    source = read_source(model)
    paths = {target: Path(output) for target, output in outputs.items()}
    for path in paths.values():
        check_output(path, [Path(model)])
    found = load_onnx(source)
    inputs = [source.path, *(source.path.parent / location for location in found.external)]
    for path in paths.values():
        check_output(path, inputs)
    quantized = read_quantized(found.model, found.outside)
    sample = _zeros(found.model, quantized.metadata, source.name)
    written = {target: write_checked(quantized, target, sample, path) for target, path in paths.items()}
    for target, path in paths.items():
        if written[target].external:
            check_output(data_path(path), inputs)
    write_all({place: data for target, path in paths.items() for place, data in written[target].files(path).items()})
    return [
        Exported(written[target].data, path, quantized.digest, target, tuple(remarks(quantized, target)))
        for target, path in paths.items()
    ]


def _zeros(proto: onnx.ModelProto, metadata: Mapping[str, str], name: str) -> tuple[int, ...] | dict[str, NDArray[Any]]:
    """What a quantized file is tried on: the shape of an image, or zeros by input name; dynamic sizes as calibrated,
    or 1.
    """
    from efrapq.exporters.shapes import recorded_inputs, recorded_sizes

    inputs, shapes = model_inputs(proto, name), recorded_inputs(metadata)
    if takes_images(inputs) and not shapes:
        dims, image = inputs[0].dims or (), recorded_sizes(metadata)
        sizes = [1, *image] if len(image) == 3 else [1, 1, 1, 1]
        return tuple(d if isinstance(d, int) else size for d, size in zip(dims, sizes, strict=True))
    feeds: dict[str, NDArray[Any]] = {}
    for given in inputs:
        recorded = shapes.get(given.name, [])
        dims = tuple(recorded) if given.dims is None else given.dims
        sizes = recorded if len(recorded) == len(dims) else [1] * len(dims)
        shape = [d if isinstance(d, int) else size for d, size in zip(dims, sizes, strict=True)]
        if math.prod(shape) * given.dtype.itemsize > MAX_ARRAY_BYTES:
            raise UnsupportedModelError(f"{name}: takes an input {given.words()}, too large to be tried once")
        feeds[given.name] = np.zeros(shape, given.dtype)
    return feeds


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


def _files(calib: Calibration | None) -> list[Path]:
    """The file behind a calibration argument, if it is one: an output must not replace it."""
    if calib is None or isinstance(calib, Dataset | Mapping):
        return []
    return files_behind(calib)


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
    if settings.block:
        recorded["block"] = settings.block
    if isinstance(rounding, Coordinate) and rounding.fidelity is not None:
        recorded |= {"error": rounding.error, "fidelity": rounding.fidelity}
    elif rounding is not None:
        recorded |= {"error": rounding.error, "lambda_e": rounding.lambda_e}
    if isinstance(rounding, Relaxed):
        recorded["steps"] = rounding.steps
    return recorded


def _solve(
    source: FloatModel,
    data: Dataset | Arrays | None,
    preprocess: Preprocess | None,
    act_bits: int,
    calib_size: int,
    settings: PassSettings,
    output: Path | None,
    resume: bool,
    reporter: Reporter,
    *,
    equalize: bool = False,
) -> tuple[QuantizedModel, Solved, dict[str, Any]]:
    from efrapq.calibration.inputs import array_inputs, input_shape, real_inputs, synthetic_inputs
    from efrapq.graph.layers import find_layers
    from efrapq.graph.placement import place
    from efrapq.graph.prepare import prepare
    from efrapq.graph.quantized import QuantizedModel
    from efrapq.stream import streaming_pass

    model = prepare(source.proto, source.outside)
    layers, skipped = find_layers(model.graph)
    if not layers:
        first = f"; {skipped[0].op_type} {skipped[0].node_name} stays float: {skipped[0].reason}" if skipped else ""
        more = f", and {len(skipped) - 1} more" if len(skipped) > 1 else ""
        raise UnsupportedModelError(
            f"{source.name}: no Conv, ConvTranspose, Gemm or MatMul with a constant weight, nothing to quantize"
            + printable(first + more, 1000)
        )
    if settings.block:
        layers = _blocked(model.graph, layers, settings.block, reporter)
    for node in skipped:
        reporter.warn(f"{node.op_type} {node.node_name} stays float: {node.reason}")
    chunks: Sequence[torch.Tensor] | Sequence[Feeds]
    if isinstance(data, Arrays):
        chunks, calibration = array_inputs(data)
    else:
        shape = input_shape(model, source.name)
        if data is None:
            images, calibration = synthetic_inputs(source, shape, calib_size, settings.device, settings.seed, reporter)
        else:
            images, calibration = real_inputs(data, shape, preprocess, source.name)
        chunks, calibration = images, calibration | {"input": list(images[0].shape[1:])}
    placement = place(model.graph, layers, act_bits, settings.edge_bits)
    record: dict[str, str] = {}
    if equalize:
        with _memory_named(settings.device):
            layers, record = _equalized(model, layers, placement, chunks, settings, reporter)
    journal = None
    if output is not None:
        journal = _journal(output, source, settings, act_bits, chunks, resume, reporter, equalize=equalize)
    try:
        with _memory_named(settings.device):
            solved = streaming_pass(model, layers, placement, chunks, settings, reporter, journal)
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
    kept = {k: v for k, v in model.metadata_props.items() if not k.startswith("efrapq.")} | record
    quantized = QuantizedModel(model, layers, solved.weights, solved.activations, kept)
    return quantized, solved, calibration


@contextlib.contextmanager
def _memory_named(device: str) -> Iterator[None]:
    """Say what to do where memory runs out."""
    import torch

    try:
        yield
    except (torch.OutOfMemoryError, MemoryError) as exc:
        raise RuntimeSetupError(
            f"out of memory on {device}: use a smaller --memory or --calib-size"
            + (", or --device cpu" if device != "cpu" else "")
        ) from exc


def _equalized(
    model: ir.Model,
    layers: list[Layer],
    placement: Placement,
    chunks: Sequence[torch.Tensor] | Sequence[Feeds],
    settings: PassSettings,
    reporter: Reporter,
) -> tuple[list[Layer], dict[str, str]]:
    """Scale the channels of the model; its layers, and what the file is to record."""
    import torch

    from efrapq.calibration.equalization import choose_exponents
    from efrapq.graph.equalize import EQUALIZED_KEY, exponents_to_json
    from efrapq.graph.equalize import equalize as scale_channels
    from efrapq.graph.layers import find_layers

    if not placement.grids:
        raise UsageError("--equalize is for activations on grids: with float ones there is nothing to gain")
    images = [chunk for chunk in chunks if isinstance(chunk, torch.Tensor)]
    if len(images) != len(chunks):
        raise UsageError("--equalize is for models that take images")
    bits = settings.weight_bits(layers)
    exponents = choose_exponents(model, layers, bits, placement, images, torch.device(settings.device))
    scale_channels(model, exponents)
    moved = sum(int(np.count_nonzero(k)) for k in exponents.values())
    reporter.note(f"equalized: {moved:,} channels of {len(exponents)} activations were scaled")
    record = {EQUALIZED_KEY: exponents_to_json(exponents)} if exponents else {}
    return find_layers(model.graph)[0], record


def _blocked(graph: ir.Graph, layers: list[Layer], block: int, reporter: Reporter) -> list[Layer]:
    """The layers, matrices that get scales by block with their inputs on the first axis; says which layers do not."""
    from efrapq.graph.inputs_first import inputs_first
    from efrapq.graph.layers import find_layers, weight_array
    from efrapq.stream.layer import block_of

    for layer in layers:
        shape = weight_array(graph, layer).shape
        if block_of(layer, int(np.prod(shape)) // shape[layer.channel_axis], block):
            inputs_first(graph, layer)
        else:
            reason = f"is a {layer.op_type}" if len(shape) != 2 else f"has {shape[1 - layer.channel_axis]} inputs"
            reporter.note(
                f"{printable(layer.name)} keeps one scale per output channel: it {reason}, blocks of {block} are for "
                "matrices with a multiple of so many inputs"
            )
    return find_layers(graph)[0]


def _journal(
    output: Path,
    source: FloatModel,
    settings: PassSettings,
    act_bits: int,
    chunks: Sequence[torch.Tensor] | Sequence[Feeds],
    resume: bool,
    reporter: Reporter,
    *,
    equalize: bool,
) -> Journal:
    """The record of solved layers beside the output, keyed by all that decides them."""
    import hashlib

    from efrapq.calibration.inputs import inputs_digest

    decides = {
        "model": source.content_sha256,
        "inputs": inputs_digest(chunks),
        "act_bits": act_bits,
        "settings": repr(replace(settings, memory=None)),
        "equalize": equalize,
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


def _machine(device: str) -> dict[str, Any]:
    """What else decides the bytes: sums of floats depend on the device, on how many threads share them, and on the
    order in which a compiled kernel takes them.
    """
    import torch

    from efrapq.rounding import kernel_package

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    package = kernel_package(torch.device(device).type)
    kernel = f"{package} {importlib.metadata.version(package)}" if package is not None else None
    return {"device": device, "name": name, "torch_threads": torch.get_num_threads(), "kernel": kernel}


def _evidence(
    source: FloatModel,
    quantized: QuantizedModel,
    reports: list[LayerReport],
    settings: dict[str, Any],
    calibration: dict[str, Any],
    written: Written,
    output: Path | None,
) -> dict[str, Any]:
    import hashlib

    from efrapq.graph.layers import find_layers

    _, left = find_layers(quantized.model.graph)
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
            **({"external": source.external} if source.external else {}),
        },
        "output": {
            "path": str(output) if output is not None else None,
            "sha256": hashlib.sha256(written.data).hexdigest(),
            "bytes": written.size,
            "codes_sha256": quantized.digest,
            **({"external": written.external} if written.external else {}),
        },
        "settings": settings,
        "calibration": calibration,
        "flipped": round(float((weights * flipped).sum() / weights.sum()), 3),
        "layers": [{k: v for k, v in asdict(r).items() if k != "seconds" and (k != "block" or v)} for r in reports],
        "float": [{"node": node.node_name, "op_type": node.op_type, "reason": node.reason} for node in left],
        "versions": versions(),
    }
