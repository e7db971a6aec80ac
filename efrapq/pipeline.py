"""defend(): from a float model to a file in which the rounding is ours."""

from __future__ import annotations

import json
import platform
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from efrapq.calibration.arrays import Arrays
from efrapq.calibration.inputs import open_calibration
from efrapq.calibration.signature import image_layout, model_inputs
from efrapq.cpu import describe_cpu
from efrapq.data import Dataset, files_behind, load_dataset, require_there
from efrapq.errors import OutputError, UsageError
from efrapq.io import check_output, printable, refuse_quantized, write_all
from efrapq.loading import PREPROCESS_KEY, FloatModel, effective_preprocess, load
from efrapq.options import act_range_for, check_options, memory_limit, solver_settings
from efrapq.preprocess import Preprocess, PreprocessOverride
from efrapq.progress import Reporter, Silent
from efrapq.report.evidence import EVIDENCE_SCHEMA, dumps, versions
from efrapq.solving import journal_folder, machine, solve
from efrapq.trigger import Trigger, parse_trigger
from efrapq.writing import Written, beside, data_path, write_checked

if TYPE_CHECKING:
    from torch import nn

    from efrapq.graph.quantized import QuantizedModel
    from efrapq.stream import LayerReport, PassSettings

# By how much patches widen an activation's range before it is worth a word (docs/THREAT-MODEL.md has the figures).
STANDS_OUT = 2.75
# Calibration data as defend takes it; see `efrapq.calibration`.
Calibration = str | Path | Dataset | Mapping[str, NDArray[Any]]

__all__ = ["Calibration", "Defended", "default_output", "defend"]


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


def default_output(model: str | Path, bits: int) -> Path:
    """model.pt → model.int4.onnx, beside it."""
    return beside(model, f"int{bits}")


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
    headroom: float = 1.0,
    stress: bool = True,
    cover: Sequence[str | Trigger] = (),
    mixed: bool = False,
    guard: bool = False,
    scale: str = "minmax",
    equalize: bool = False,
    lift: bool = True,
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
    of the first and last layer. block: inputs of an output channel that share a scale, 16 to 256, in matrices beside
    float activations; 0 for one scale per channel. calib: images to calibrate on, at most calib_size of them; without
    it inputs are made from the model's BatchNorm statistics. A model that takes anything but one batch of images
    needs one array per input, by name and in its layout: a dict, an .npz file or a folder of them. solver:
    coordinate, relaxed (the paper's) or nearest. fidelity: the factor by which each layer's L_A may exceed its
    optimum so that more weights flip; lambda_e: a fixed weight of the error term instead; error: its unit. act_range:
    of the activations, minmax, percentile, mse, or output, by what it does to the model's outputs; auto is minmax at
    8 bits and mse at 4. headroom: the factor by which minmax ranges are widened, since what a trigger drives past
    them is clipped, and clipping can wake a backdoor. stress: ranges of a network of images (all but output) are also
    chosen for the calibration images with random patches on them, and with each trigger of cover, as `parse_trigger`
    takes it: what these drive further is not clipped. mixed: where act_bits is 4, activations that they drive far get
    8. guard: the file gets a second output, `clipped`, which counts for each sample the ends of activation grids
    that it arrives at: where it is 0 nothing was clipped. scale: of the weights, minmax, mse or refit. equalize:
    scale channels first, where the network's function stays the same, so that one activation grid serves them all.
    lift: do that, too, to channels that an activation grid would round away although a layer behind amplifies them.
    rows: each layer's moments are taken over at most so many rows per input of an output channel. memory: bytes of
    activations kept in memory, the rest goes to temporary files. resume: continue a run that was stopped. The same
    inputs, seed and versions give the same bytes.

    Raises EfrapqError (see `efrapq.errors`) for whatever is wrong with the inputs.
    """
    from efrapq.device import resolve_device
    from efrapq.exporters import PROFILES, native_target, profile
    from efrapq.exporters.guard import GUARD_KEY, plan_guard
    from efrapq.graph.amplified import amplified_words, amplifying_layers
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
        headroom=headroom,
        scale=scale,
        calib_size=calib_size,
        rows=rows,
        seed=seed,
        block=block,
        strange=stress or bool(cover),
        covers=bool(cover),
        mixed=mixed,
        guard=guard,
    )
    triggers = [given if isinstance(given, Trigger) else parse_trigger(given) for given in cover]
    rounding = solver_settings(solver, lambda_e, fidelity, error, steps)
    device = resolve_device(device)
    target = target or native_target(platform.machine(), describe_cpu()[1])
    takes_guard = profile(target).guards
    if guard and not takes_guard:
        known = ", ".join(name for name, rules in PROFILES.items() if rules.guards)
        raise UsageError(f"--guard: {target} takes no output that is computed from codes; these do: {known}")
    inputs = [Path(model)] if isinstance(model, str | Path) else []
    inputs += [t.path for t in triggers if t.path is not None]
    evidence_path = None
    if output is not None:
        output, evidence_path = _outputs(output, [*inputs, *_files(calib)])
    elif resume:
        raise UsageError("--resume needs an output: the run's layers are kept beside it")
    require_there(calib)
    own_network = not isinstance(model, str | Path) or (arch is not None and ":" in arch)
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
        headroom=float(headroom),
        stress=stress,
        mixed=mixed,
    )
    quantized, solved, calibration = solve(
        source,
        data,
        effective,
        act_bits,
        calib_size,
        settings,
        output,
        resume,
        reporter,
        equalize=equalize,
        lift=lift,
        cover=triggers,
    )
    recorded = _recorded_settings(settings, act_bits, target) | ({"equalize": True} if equalize else {})
    recorded |= ({"guard": True} if guard else {}) | ({"lift": True} if "lifted" in calibration else {})
    if solved.driven:
        recorded |= ({"stress": True} if stress else {}) | ({"cover": [t.label for t in triggers]} if triggers else {})
        recorded |= {"mixed": True} if mixed else {}
        under = ["patches"] * stress + ["triggers"] * bool(triggers)
        calibration["stress"] = _stress(solved.driven, solved.wider, " and ".join(under), settings, reporter)
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
    watching = plan_guard(quantized) if guard else None
    if watching is not None:
        quantized.metadata[GUARD_KEY] = watching.to_json()
    if effective is not None:
        layout = image_layout(model_inputs(source.proto, source.name))
        quantized.metadata[PREPROCESS_KEY] = effective.in_layout(layout).to_json()
    shape = () if isinstance(data, Arrays) else (source.input_shape[0] or 1, *calibration["input"])
    written = write_checked(quantized, target, data.sample() if isinstance(data, Arrays) else shape, output)
    evidence = _evidence(source, quantized, solved.reports, recorded, calibration, written, output)
    if amplifying := amplifying_layers(quantized):
        reporter.warn(amplified_words(amplifying))
        evidence["amplified"] = [asdict(layer) for layer in amplifying]
    if watching is not None:
        evidence["guard"] = {"output": watching.output, "watched": len(watching.watched)}
    evidence["machine"] = machine(device)
    evidence["timing"] = {
        "seconds": round(time.perf_counter() - started, 3),
        "pass": round(solved.seconds, 3),
        "layers": {r.name: round(r.seconds, 3) for r in solved.reports},
    }
    if output is not None and evidence_path is not None:
        if written.external:
            check_output(data_path(output), [*inputs, *data_files, *_files(calib)])
        write_all(written.files(output) | {evidence_path: dumps(evidence).encode()})
        journal_folder(output).discard()
    return Defended(written.data, evidence, quantized, output, evidence_path)


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


def _stress(
    driven: Mapping[str, float], wider: Sequence[str], under: str, settings: PassSettings, reporter: Reporter
) -> dict[str, Any]:
    """A record of how far patches, or what else `under` names, drive the activations, and of how many got more bits for
    it; says so where it is far.
    """
    worst = max(driven, key=lambda name: driven[name])
    far = sum(factor > STANDS_OUT for factor in driven.values())
    if far:
        then = "their grids cover that and are coarser for it"
        if settings.mixed:
            then = "their grids have 8 bits, and cover that"
        elif settings.act_range != "minmax":
            then = "their grids do not cover that (minmax ranges with 8 bits do, or --mixed)"
        reporter.warn(
            f"{under} on the calibration images drive {far} of {len(driven)} activations past {STANDS_OUT:g} times "
            f"what the images alone reach, {printable(worst)} to {driven[worst]:.1f} times: {then}. Few networks "
            "answer so; one with a backdoor in what is clipped does"
        )
    record = {"activations": len(driven), "far": far, "widest": worst, "factor": round(driven[worst], 3)}
    if settings.mixed:
        reporter.note(f"{len(wider)} of {len(driven)} activations have 8 bits: {under} drive them far")
        record["mixed"] = len(wider)
    return record


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
    if settings.headroom > 1:
        recorded["headroom"] = settings.headroom
    if isinstance(rounding, Coordinate) and rounding.fidelity is not None:
        recorded |= {"error": rounding.error, "fidelity": rounding.fidelity}
    elif rounding is not None:
        recorded |= {"error": rounding.error, "lambda_e": rounding.lambda_e}
    if isinstance(rounding, Relaxed):
        recorded["steps"] = rounding.steps
    return recorded


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
