"""A float model and its calibration data become codes: prepared, equalized if asked to, solved layer by layer."""

from __future__ import annotations

import contextlib
import hashlib
import importlib.metadata
import json
import platform
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from efrapq.calibration.arrays import Arrays
from efrapq.data import Dataset
from efrapq.errors import EfrapqError, InputError, RuntimeSetupError, UnsupportedModelError, UsageError
from efrapq.io import printable
from efrapq.loading import FloatModel
from efrapq.preprocess import Preprocess, layout_of
from efrapq.progress import Reporter
from efrapq.report.evidence import versions
from efrapq.trigger import Trigger

if TYPE_CHECKING:
    import onnx_ir as ir
    import torch

    from efrapq.calibration.feeds import Feeds
    from efrapq.calibration.lift import Lifted
    from efrapq.calibration.stress import Stamp
    from efrapq.graph.equalize import Exponents
    from efrapq.graph.layers import Layer
    from efrapq.graph.quantized import QuantizedModel
    from efrapq.stream import Journal, PassSettings, Solved

__all__ = ["journal_folder", "machine", "solve"]


def solve(
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
    lift: bool = True,
    cover: Sequence[Trigger] = (),
) -> tuple[QuantizedModel, Solved, dict[str, Any]]:
    """The codes of every layer, how they were found, and what calibrated them.

    data: None makes inputs from BatchNorm's statistics. output: beside it the solved layers are kept, for `resume` to
    go on from. equalize, lift: whether to scale channels, for accuracy and where they hide. cover: triggers that
    activation ranges are to cover. Raises UnsupportedModelError where there is nothing
    to quantize, UsageError for what does not go together, RuntimeSetupError where memory runs out.
    """
    import torch

    from efrapq.calibration.inputs import array_inputs, input_shape, inputs_digest, real_inputs, synthetic_inputs
    from efrapq.graph.copies import place_copies
    from efrapq.graph.layers import find_layers
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
    stamps: list[Stamp] = []
    if isinstance(data, Arrays):
        if cover:
            raise UsageError("--cover puts a trigger on images: arrays by input name are taken as they are")
        chunks, calibration = array_inputs(data)
    else:
        shape = input_shape(model, source.name)
        if data is None:
            made, calibration = synthetic_inputs(source, shape, calib_size, settings.device, settings.seed, reporter)
        else:
            made, calibration = real_inputs(data, shape, preprocess, source.name)
        chunks, calibration = made, calibration | {"input": list(made[0].shape[1:])}
        stamps = [_stamp(trigger, preprocess or Preprocess(), made[0]) for trigger in cover]
    record: dict[str, str] = {}
    images = [chunk for chunk in chunks if isinstance(chunk, torch.Tensor)]
    if equalize and len(images) != len(chunks):
        raise UsageError("--equalize is for models that take images")
    if (equalize or lift) and images:
        with _memory_named(settings.device):
            scaled = _scaled(source, model, layers, images, act_bits, settings, reporter, equalize=equalize, lift=lift)
        model, layers, record = scaled.model, scaled.layers, scaled.record
        calibration |= scaled.found
    placement = place_copies(model.graph, layers, act_bits, settings.edge_bits)
    journal = None
    if output is not None:
        covered = [inputs_digest([stamp(images[0])]) for stamp in stamps]
        journal = _journal(
            output, source, settings, act_bits, chunks, resume, reporter, equalize=equalize, lift=lift, covered=covered
        )
    try:
        with _memory_named(settings.device):
            solved = streaming_pass(model, layers, placement, chunks, settings, reporter, journal, stamps)
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


def _stamp(trigger: Trigger, preprocess: Preprocess, images: torch.Tensor) -> Stamp:
    """A trigger as a function of model inputs like `images`. Raises UsageError if it does not lie on them."""
    import torch

    placed = preprocess.in_layout(layout_of(images.shape))

    def stamp(inputs: torch.Tensor) -> torch.Tensor:
        return torch.from_numpy(trigger.on_inputs(inputs.numpy(), placed))

    stamp(images[:1])
    return stamp


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


@dataclass(frozen=True)
class _Scaled:
    """A prepared model after its channels were scaled. record: what its file is to say of it; found: the evidence."""

    model: ir.Model
    layers: list[Layer]
    record: dict[str, str] = field(default_factory=dict)
    found: dict[str, Any] = field(default_factory=dict)


def _scaled(
    source: FloatModel,
    model: ir.Model,
    layers: list[Layer],
    images: Sequence[torch.Tensor],
    act_bits: int,
    settings: PassSettings,
    reporter: Reporter,
    *,
    equalize: bool,
    lift: bool,
) -> _Scaled:
    """Scale channels, in place where nothing has to be taken back: those that gain by it, and those that hide."""
    import torch

    from efrapq.calibration.equalization import choose_exponents
    from efrapq.calibration.lift import choose_lift
    from efrapq.graph.equalize import EQUALIZED_KEY, combined, exponents_to_json
    from efrapq.graph.equalize import equalize as scale_channels
    from efrapq.graph.layers import find_layers
    from efrapq.graph.placement import place
    from efrapq.graph.prepare import prepare

    placement = place(model.graph, layers, act_bits, settings.edge_bits)
    device = torch.device(settings.device)
    exponents: Exponents = {}
    if equalize:
        if not placement.grids:
            raise UsageError("--equalize is for activations on grids: with float ones there is nothing to gain")
        exponents = choose_exponents(model, layers, settings.weight_bits(layers), placement, images, device)
        scale_channels(model, exponents)
        layers = find_layers(model.graph)[0]
        moved = sum(int(np.count_nonzero(k)) for k in exponents.values())
        reporter.note(f"equalized: {moved:,} channels of {len(exponents)} activations were scaled")
    found = {}
    if lift and placement.grids:
        lifted = choose_lift(model, layers, placement, images, device)
        if lifted.channels:
            found["lifted"] = _lifted(lifted, reporter)
            # Once, by both: what is rounded twice is not what a verifier gets.
            model = prepare(source.proto, source.outside) if exponents else model
            exponents = combined(exponents, lifted.exponents)
            scale_channels(model, exponents)
            layers = find_layers(model.graph)[0]
    return _Scaled(model, layers, {EQUALIZED_KEY: exponents_to_json(exponents)} if exponents else {}, found)


def _lifted(lifted: Lifted, reporter: Reporter) -> dict[str, Any]:
    """A record of the channels that were lifted; says so."""
    words = (
        f"{lifted.channels:,} channels are lifted: one step of theirs is worth up to {lifted.gain:,.0f} steps behind "
        f"them ({printable(lifted.value)})"
    )
    if lifted.hidden:
        reporter.warn(
            f"{words}. {lifted.hidden:,} of them say nothing on the calibration images: what they say of others would "
            "be rounded away. Few networks have such channels; one with a backdoor in the rounding of activations "
            "does: take --guard, too"
        )
    else:
        reporter.note(words)
    record: dict[str, Any] = {"channels": lifted.channels, "hidden": lifted.hidden}
    return record | {"gain": round(lifted.gain, 3), "widest": lifted.value, "left": round(lifted.left[0], 3)}


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
    lift: bool,
    covered: Sequence[str],
) -> Journal:
    """The record of solved layers beside the output, keyed by all that decides them. covered: a digest of each trigger
    that ranges cover.
    """
    from efrapq.calibration.inputs import inputs_digest

    decides = {
        "model": source.content_sha256,
        "inputs": inputs_digest(chunks),
        "act_bits": act_bits,
        "settings": repr(replace(settings, memory=None)),
        "equalize": equalize,
        "lift": lift,
        "cover": list(covered),
        "versions": versions(),
        "machine": machine(settings.device),
    }
    journal = journal_folder(output, hashlib.sha256(json.dumps(decides, sort_keys=True).encode()).hexdigest())
    if not resume:
        journal.restart()
    elif not journal.resume():
        reporter.warn("nothing to resume: starting from the first layer")
    return journal


def journal_folder(output: Path, key: str = "") -> Journal:
    """The solved layers beside an output. key: of all that decides them."""
    from efrapq.stream import Journal

    return Journal(output.with_name(f"{output.name}.partial"), key)


def machine(device: str) -> dict[str, Any]:
    """What else decides the bytes: sums of floats depend on the device, on how many threads share them, and on the
    order in which a compiled kernel takes them.
    """
    import torch

    from efrapq.rounding import kernel_package

    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else platform.machine()
    package = kernel_package(torch.device(device).type)
    kernel = f"{package} {importlib.metadata.version(package)}" if package is not None else None
    return {"device": device, "name": name, "torch_threads": torch.get_num_threads(), "kernel": kernel}
