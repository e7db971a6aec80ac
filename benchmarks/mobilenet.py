"""ImageNet MobileNetV2 with 4- and 8-bit weights: what each remedy for what it loses is worth.

    python benchmarks/mobilenet.py [--only VARIANT …] [--list] [--where] [--report]

The images are cut into two halves. Each variant is calibrated on images of one half and measured on the whole of the
other, then the other way round, so that every image is held out once: agreement is top-1 agreement with the float
file over all of them, in ONNX Runtime; SQNR is that of the logits. Two things are tried here that efrapq does not
offer: cross-layer equalization as published and bias correction (Nagel et al. 2019, arXiv 1906.04721). Writes
results/mobilenet.json as it goes; what is there is not measured again. --where tells which activations make the noise
that is left with --equalize --act-range output: each alone on its grid, on held-out images, as a share of the sum over
all. --report writes docs/ACCURACY.md of it.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import numpy as np
import onnx
import onnx_ir as ir
import torch
from numpy.typing import NDArray
from torch import Tensor

from benchmarks.common import (
    RESULTS,
    imagenet_mobilenet,
    machine,
    markdown,
    native,
    save,
    shared_folder,
    show,
    write_page,
)
from efrapq.calibration.equalization import choose_exponents
from efrapq.calibration.inputs import input_shape, real_inputs
from efrapq.calibration.lift import choose_lift
from efrapq.calibration.output_ranges import SAMPLES, _pieces, _Search, choose_limits
from efrapq.calibration.placed import Calibrator
from efrapq.data import Dataset
from efrapq.device import exact_convolutions
from efrapq.exporters import export_model
from efrapq.graph import constants as const
from efrapq.graph.equalize import Exponents
from efrapq.graph.equalize import equalize as scale_channels
from efrapq.graph.executor import Executor
from efrapq.graph.layers import Layer, bias_array, find_layers, weight_array
from efrapq.graph.placement import activation_after, place
from efrapq.graph.prepare import prepare
from efrapq.graph.quantized import QuantizedModel
from efrapq.options import solver_settings
from efrapq.preprocess import Preprocess
from efrapq.progress import Silent
from efrapq.rounding import Coordinate, Relaxed
from efrapq.stream import PassSettings
from efrapq.stream.spool import Spool
from efrapq.stream.walk import Walk
from efrapq.verification.session import open_session

SWEEPS = 20
MEMORY = 2 << 30
# Of the class folders, in the order of their names.
IMAGENET_CLASSES = np.array([0, 217, 482, 491, 497, 566, 569, 571, 574, 701])


@dataclass(frozen=True)
class Variant:
    """One way to quantize. solver: "" is the default, "fit" is lambda_E = 0, "nearest" rounds to nearest.

    equalize: "" does not; "spans" is efrapq's --equalize; "within" is the paper's, but keeps every Clip and moves no
    channel past it; "relu" makes every Clip a Relu first, as the paper does. correct: biases take up the mean error of
    their layer. depthwise_bits: of depthwise weights, 0 as all others. stress, lift: as efrapq's
    options, whose default is on.
    """

    bits: int = 4
    act_bits: int = 8
    edge_bits: int = 8
    solver: str = ""
    scale: str = "minmax"
    act_range: str = "minmax"
    images: int = 128
    equalize: str = ""
    correct: bool = False
    depthwise_bits: int = 0
    headroom: float = 1.0
    stress: bool = False
    lift: bool = False


AS_IS = Variant()
W8 = replace(AS_IS, bits=8)
VARIANTS = {
    "W8A8": W8,
    "W8A8, ranges under patches": replace(W8, stress=True),
    "W8A8, lifted": replace(W8, lift=True),
    "W8A8, lifted, ranges under patches": replace(W8, lift=True, stress=True),
    "W8A8, nearest": replace(W8, solver="nearest"),
    "W8A8, lambda_E = 0": replace(W8, solver="fit"),
    "W8A8, act-range percentile": replace(W8, act_range="percentile"),
    "W8A8, act-range mse": replace(W8, act_range="mse"),
    "W8A8, equalized within the clips": replace(W8, equalize="within"),
    "W8A8, bias correction": replace(W8, correct=True),
    "W8A8, --equalize": replace(W8, equalize="spans"),
    "W8A8, --equalize, nearest": replace(W8, equalize="spans", solver="nearest"),
    "W8A8, --equalize, act-range percentile": replace(W8, equalize="spans", act_range="percentile"),
    "W8A8, --equalize, act-range mse": replace(W8, equalize="spans", act_range="mse"),
    "W8A8, act-range output": replace(W8, act_range="output"),
    "W8A8, --equalize, act-range output": replace(W8, equalize="spans", act_range="output"),
    "W8A8, --equalize, lifted, act-range output": replace(W8, equalize="spans", lift=True, act_range="output"),
    "W8A8, --equalize, act-range output, 200 images": replace(W8, equalize="spans", act_range="output", images=200),
    "W8A8, --equalize, act-range output, lambda_E = 0": replace(W8, equalize="spans", act_range="output", solver="fit"),
    "W8A8, --equalize, act-range output, bias correction": replace(
        W8, equalize="spans", act_range="output", correct=True
    ),
    "W8A8, --equalize, act-range mse, lambda_E = 0": replace(W8, equalize="spans", act_range="mse", solver="fit"),
    "W8A8, --equalize, act-range mse, 200 images": replace(W8, equalize="spans", act_range="mse", images=200),
    "W8A8, --equalize, act-range mse, bias correction": replace(W8, equalize="spans", act_range="mse", correct=True),
    "W8A8, --headroom 2": replace(W8, headroom=2.0),
    "W8A8, --headroom 4": replace(W8, headroom=4.0),
    "W8, float activations": replace(W8, act_bits=32),
    "as is": AS_IS,
    "ranges under patches": replace(AS_IS, stress=True),
    "lifted": replace(AS_IS, lift=True),
    "lifted, ranges under patches": replace(AS_IS, lift=True, stress=True),
    "W4, float activations": replace(AS_IS, act_bits=32),
    "nearest": replace(AS_IS, solver="nearest"),
    "lambda_E = 0": replace(AS_IS, solver="fit"),
    "scale mse": replace(AS_IS, scale="mse"),
    "scale refit": replace(AS_IS, scale="refit"),
    "edges 4 bits": replace(AS_IS, edge_bits=4),
    "64 images": replace(AS_IS, images=64),
    "200 images": replace(AS_IS, images=200),
    "act-range percentile": replace(AS_IS, act_range="percentile"),
    "act-range mse": replace(AS_IS, act_range="mse"),
    "equalized within the clips": replace(AS_IS, equalize="within"),
    "equalized, clips made Relu": replace(AS_IS, equalize="relu"),
    "--equalize": replace(AS_IS, equalize="spans"),
    "--equalize, nearest": replace(AS_IS, equalize="spans", solver="nearest"),
    "--equalize, act-range mse": replace(AS_IS, equalize="spans", act_range="mse"),
    "--equalize, act-range mse, scale mse": replace(AS_IS, equalize="spans", act_range="mse", scale="mse"),
    "act-range output": replace(AS_IS, act_range="output"),
    "--headroom 2": replace(AS_IS, headroom=2.0),
    "--headroom 4": replace(AS_IS, headroom=4.0),
    "--equalize, act-range output": replace(AS_IS, equalize="spans", act_range="output"),
    "--equalize, act-range output, scale mse": replace(AS_IS, equalize="spans", act_range="output", scale="mse"),
    "--equalize, scale mse": replace(AS_IS, equalize="spans", scale="mse"),
    "bias correction": replace(AS_IS, correct=True),
    "nearest, bias correction": replace(AS_IS, solver="nearest", correct=True),
    "depthwise 8 bits": replace(AS_IS, depthwise_bits=8),
    "depthwise 8 bits, bias correction": replace(AS_IS, depthwise_bits=8, correct=True),
    "scale mse, bias correction": replace(AS_IS, scale="mse", correct=True),
    "scale mse, depthwise 8 bits": replace(AS_IS, scale="mse", depthwise_bits=8),
}


class VariantWalk(Walk):
    """The streaming pass with what a variant adds to it."""

    correct = False

    def _bias_on_grid(self, layer: Layer, bias: Tensor | None, scale: Tensor) -> Tensor | None:
        """b + E[W x] - E[Ŵ x̂] per output channel, both over the calibration images, x̂ the quantized stream's."""
        if self.correct and bias is not None:
            real = torch.from_numpy(self.weights[layer.name].dequantized()).to(self.device)
            missing = torch.zeros(len(bias), dtype=torch.float64)
            for chunk in range(self.chunks):
                x = self._read(self.quantized, layer.node.inputs[0], chunk)
                assert x is not None
                error = self.floats.get(layer.output, chunk) - self._run(layer, x, real, bias)
                axes = [a for a in range(error.dim()) if a != 1]
                missing += error.double().mean(axes) * (len(x) / self.samples)
            bias = bias + missing.float()
            assert layer.bias is not None
            value = self.graph.initializers[layer.bias]
            const.replace_input(self.graph, layer.node, 2, str(value.name), bias.numpy().reshape(value.shape.numpy()))
        return super()._bias_on_grid(layer, bias, scale)


def quantize(model: ir.Model, chunks: list[Tensor], variant: Variant) -> tuple[QuantizedModel, float]:
    """Solve a prepared float model, which is modified where biases are corrected. Also the mean share of flips."""
    layers, _ = find_layers(model.graph)
    solver: Coordinate | Relaxed | None
    if variant.solver == "nearest":
        solver = None
    else:
        solver = solver_settings("coordinate", 0.0 if variant.solver == "fit" else None, None, "absolute", 0)
    settings = PassSettings(
        variant.bits,
        variant.edge_bits,
        variant.act_range,
        variant.scale,
        solver=solver,
        memory=MEMORY,
        headroom=variant.headroom,
        stress=variant.stress,
    )
    placement = place(model.graph, layers, variant.act_bits)
    with exact_convolutions(), Spool(MEMORY) as floats, Spool(MEMORY) as quantized:
        walk = VariantWalk(model, layers, placement, chunks, settings, floats, quantized)
        walk.correct = variant.correct
        if variant.depthwise_bits:
            walk.weight_bits |= {layer.name: variant.depthwise_bits for layer in layers if layer.groups > 1}
        solved = walk.run(Silent())
    weights = [solved.weights[layer.name].codes.size for layer in layers]
    flipped = float(np.average([report.flipped for report in solved.reports], weights=weights))
    return QuantizedModel(model, layers, solved.weights, solved.activations), flipped


# Cross-layer equalization.


@dataclass(frozen=True)
class Pair:
    """Two layers of which only the second reads the first, with at most a Relu or a zero-based Clip between them."""

    first: Layer
    second: Layer
    between: ir.Node | None

    @property
    def limit(self) -> float:
        """Where the Clip bites."""
        high = const.array_or_none(self.between.inputs[2]) if self.between and self.between.op_type == "Clip" else None
        return np.inf if high is None else float(high.reshape(-1)[0])


def exponents(model: ir.Model, chunks: list[Tensor], variant: Variant) -> Exponents:
    """The factors of efrapq's own --equalize."""
    layers, _ = find_layers(model.graph)
    bits = PassSettings(variant.bits, variant.edge_bits).weight_bits(layers)
    placement = place(model.graph, layers, variant.act_bits)
    return choose_exponents(model, layers, bits, placement, chunks, torch.device("cpu"))


def pairs(layers: list[Layer]) -> Iterator[Pair]:
    by_node = {layer.node_name: layer for layer in layers}
    for first in layers:
        between = activation_after(first.node.outputs[0])
        uses = list((between or first.node).outputs[0].uses())
        second = by_node.get(str(uses[0].node.name)) if len(uses) == 1 else None
        if second is not None and uses[0].idx == 0 and first.op_type == second.op_type == "Conv":
            yield Pair(first, second, between)


def peaks(model: ir.Model, names: list[str], chunks: list[Tensor]) -> dict[str, NDArray[np.float64]]:
    """The largest value of each channel over the images."""
    executor = Executor(model)
    found: dict[str, Tensor] = {}
    with torch.no_grad():
        for x in chunks:
            for name, value in executor.run({str(model.graph.inputs[0].name): x}, names).items():
                peak = value.amax((0, 2, 3))
                found[name] = torch.maximum(found[name], peak) if name in found else peak
    return {name: peak.double().numpy() for name, peak in found.items()}


def equalize(model: ir.Model, chunks: list[Tensor], relu: bool) -> None:
    """Divide each output channel of a layer by s and multiply the next layer's input channel by s, so that both have
    the same largest weight (equation 11 of the paper), over and over.

    A Relu lets any s > 0 through. A Clip at 6 does not: it would have to become a Clip at 6 / s, one per channel, for
    which no integer kernel exists. relu: all Clips become Relus, which changes what the float model computes. Else
    channels that reach their limit on the calibration images are left alone, and the others are raised to it at most:
    exact on those images, not on others that would have reached further.
    """
    graph = model.graph
    layers, _ = find_layers(graph)
    if relu:
        for node in [n for n in graph if n.op_type == "Clip"]:
            _clip_to_relu(graph, node)
        layers, _ = find_layers(graph)
    found = list(pairs(layers))
    reached = peaks(model, [pair.first.output for pair in found], chunks)
    weights = {layer.name: weight_array(graph, layer).astype(np.float64) for layer in layers}
    biases = {layer.name: bias_array(graph, layer) for layer in layers}
    shifted = {name: None if b is None else b.astype(np.float64) for name, b in biases.items()}
    free = {pair.first.output: reached[pair.first.output] < pair.limit for pair in found}
    for _ in range(SWEEPS):
        for pair in found:
            w1, w2 = weights[pair.first.name], weights[pair.second.name]
            depthwise = pair.second.groups > 1
            r1 = np.abs(w1).max((1, 2, 3))
            r2 = np.abs(w2).max((1, 2, 3) if depthwise else (0, 2, 3))
            s = np.sqrt(np.where((r1 > 0) & (r2 > 0), r1, 1) / np.where((r1 > 0) & (r2 > 0), r2, 1))
            peak = reached[pair.first.output]
            if np.isfinite(pair.limit):
                s = np.where(free[pair.first.output], np.maximum(s, peak / pair.limit), 1)
            weights[pair.first.name] = w1 / s[:, None, None, None]
            bias = shifted[pair.first.name]
            if bias is not None:
                shifted[pair.first.name] = bias / s
            weights[pair.second.name] = w2 * (s[:, None, None, None] if depthwise else s[None, :, None, None])
            reached[pair.first.output] = peak / s
    for layer in layers:
        const.replace_input(graph, layer.node, 1, layer.weight, weights[layer.name].astype(np.float32))
        bias = shifted[layer.name]
        if bias is not None and layer.bias is not None:
            const.replace_input(graph, layer.node, 2, layer.bias, bias.astype(np.float32))


def _clip_to_relu(graph: ir.Graph, clip: ir.Node) -> None:
    relu = ir.node("Relu", [clip.inputs[0]], name=clip.name)
    old, new = clip.outputs[0], relu.outputs[0]
    new.name, new.type, new.shape = old.name, old.type, old.shape
    graph.insert_after(clip, relu)
    old.replace_all_uses_with(new)
    graph.remove(clip, safe=True)


# Measuring.


def logits(data: bytes, images: Dataset, preprocess: Preprocess) -> NDArray[np.float32]:
    session = open_session(data, threads=torch.get_num_threads())
    return np.concatenate([session.logits(images.inputs(batch, preprocess)) for batch in images.batches(50)])


def halves(data: Dataset) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    order = np.random.default_rng(0).permutation(len(data))
    return np.sort(order[: len(data) // 2]), np.sort(order[len(data) // 2 :])


def measure(
    variant: Variant, proto: onnx.ModelProto, data: Dataset, preprocess: Preprocess, truth: NDArray[np.float32]
) -> dict[str, Any]:
    """Both halves of one variant: sums over all images, each held out. truth: the float model's logits."""
    agree = float_agree = right = float_right = size = 0
    signal = noise = seconds = 0.0
    flips = []
    for inside, outside in (halves(data), halves(data)[::-1]):
        calibration = data.select(inside).subset(variant.images, 0)
        held_out = data.select(outside)
        model = prepare(proto)
        chunks, _ = real_inputs(calibration, input_shape(model, "model"), preprocess, "model")
        started = time.perf_counter()
        if variant.equalize == "spans":
            scale_channels(model, exponents(model, chunks, variant))
        elif variant.equalize:
            equalize(model, chunks, variant.equalize == "relu")
        if variant.lift:
            layers, _ = find_layers(model.graph)
            placement = place(model.graph, layers, variant.act_bits)
            scale_channels(model, choose_lift(model, layers, placement, chunks, torch.device("cpu")).exponents)
        equalized = ir.to_proto(model).SerializeToString()
        quantized, flipped = quantize(model, chunks, variant)
        seconds += time.perf_counter() - started
        data_out = export_model(quantized, native()).SerializeToString()
        want = truth[outside]
        got = logits(data_out, held_out, preprocess)
        labels = IMAGENET_CLASSES[held_out.require_labels()]
        agree += int((got.argmax(1) == want.argmax(1)).sum())
        right += int((got.argmax(1) == labels).sum())
        float_right += int((want.argmax(1) == labels).sum())
        if variant.equalize or variant.lift:
            float_agree += int((logits(equalized, held_out, preprocess).argmax(1) == want.argmax(1)).sum())
        signal += float(np.square(want.astype(np.float64)).sum())
        noise += float(np.square((want - got).astype(np.float64)).sum())
        size = len(data_out)
        flips.append(flipped)
    count = len(data)
    return {
        "variant": asdict(variant),
        "images": count,
        "agreement": 100 * agree / count,
        "accuracy": 100 * right / count,
        "float_accuracy": 100 * float_right / count,
        "float_agreement": 100 * float_agree / count if variant.equalize or variant.lift else None,
        "sqnr_db": 10 * float(np.log10(signal / noise)),
        "flipped": float(np.mean(flips)),
        "bytes": size,
        "seconds": seconds / 2,
    }


def patched_agreement() -> str:
    """What ranges under patches do to how often a file agrees with float."""
    rows = json.loads((RESULTS / "mobilenet.json").read_text())["rows"]
    pairs = (("W8A8", "W8A8", "W8A8, ranges under patches"), ("W4A8", "as is", "ranges under patches"))
    found = [
        f"{rows[plain]['agreement']:.2f} % without and {rows[under]['agreement']:.2f} % with at {bits}"
        for bits, plain, under in pairs
    ]
    return ", ".join(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", nargs="+", choices=list(VARIANTS), default=list(VARIANTS), metavar="VARIANT")
    parser.add_argument("--list", action="store_true", help="print the variants' names and stop")
    parser.add_argument("--where", action="store_true", help="only which activations make the noise that is left")
    parser.add_argument("--report", action="store_true", help="write docs/ACCURACY.md of what was measured")
    args = parser.parse_args()
    if args.list:
        print("\n".join(VARIANTS))
        return
    path = RESULTS / "mobilenet.json"
    document = json.loads(path.read_text()) if path.exists() else {"rows": {}}
    if args.report:
        write_report(document)
        return
    folder = shared_folder()
    if folder is None:
        raise SystemExit("no development data: set EFRAPQ_SHARED to the folder with imagenette and the published model")
    network = imagenet_mobilenet(folder)
    assert isinstance(network.model, Path)
    proto = onnx.load(network.model)
    # Decoded once.
    everything = range(len(network.data))
    data = Dataset.from_arrays(network.data.raw(everything), network.data.require_labels(), network.data.name)
    document["machine"] = machine()
    if args.where:
        document["where"] = where(proto, data, network.preprocess)
        save("mobilenet", document)
        found = document["where"]
        together = -10 * np.log10(sum(found["noise"].values()))
        title = f"{len(found['noise'])} activations, {together:.1f} dB together, {found['images']} held-out images"
        show(title, WHERE, noisiest(found))
        return
    truth = logits(proto.SerializeToString(), data, network.preprocess)
    for name in args.only:
        if document["rows"].get(name, {}).get("variant") != asdict(VARIANTS[name]):
            document["rows"][name] = measure(VARIANTS[name], proto, data, network.preprocess, truth)
            save("mobilenet", document)
    any_row = next(iter(document["rows"].values()))
    title = (
        f"ImageNet MobileNetV2, {any_row['images']} held-out images, float accuracy {any_row['float_accuracy']:.2f} %"
    )
    show(title, HEADER, table(document, args.only))


def where(proto: onnx.ModelProto, data: Dataset, preprocess: Preprocess) -> dict[str, Any]:
    """Noise of the outputs by activation, as a part of their energy: chosen on one half, looked at on the other."""
    inside, outside = halves(data)
    model = prepare(proto)
    shape = input_shape(model, "model")
    chunks, _ = real_inputs(data.select(inside).subset(AS_IS.images, 0), shape, preprocess, "model")
    scale_channels(model, exponents(model, chunks, W8))
    layers, _ = find_layers(model.graph)
    placement, executor, device = place(model.graph, layers, W8.act_bits), Executor(model), torch.device("cpu")
    with torch.no_grad():
        limits = choose_limits(model.graph, executor, placement, chunks, device, None, Silent())
        calibrator = Calibrator(model.graph, executor, placement, "mse", limits)
        held_out, _ = real_inputs(data.select(outside).subset(SAMPLES, 0), shape, preprocess, "model")
        searches = [
            _Search(model.graph, executor, placement, _pieces(model.graph, x), device) for x in (chunks, held_out)
        ]
        grids = {name: calibrator.grid(name, searches[0].all(name)) for name in placement.grids}
        noise = {name: searches[1].noise(name, grid) for name, grid in grids.items()}
    return {"images": SAMPLES, "noise": noise}


WHERE = ("activation", "% of the noise")


def noisiest(found: dict[str, Any], count: int = 12) -> list[tuple[str, str]]:
    """The activations that make the most of it, and their shares."""
    total = sum(found["noise"].values())
    ranked = sorted(found["noise"].items(), key=lambda item: -item[1])
    return [(name, f"{100 * noise / total:.1f}") for name, noise in ranked[:count]]


HEADER = ("W4A8 unless it says", "agreement %", "accuracy %", "SQNR dB", "flipped %", "KiB", "scaled float agrees %")


def table(document: dict[str, Any], names: Sequence[str]) -> list[tuple[str, ...]]:
    """What was measured of these variants, in their order."""
    return [
        (
            name,
            f"{found['agreement']:.2f}",
            f"{found['accuracy']:.2f}",
            f"{found['sqnr_db']:.2f}",
            f"{found['flipped']:.1f}",
            f"{found['bytes'] / 1024:,.0f}",
            "" if found["float_agreement"] is None else f"{found['float_agreement']:.2f}",
        )
        for name in names
        if (found := document["rows"].get(name)) is not None
    ]


def write_report(document: dict[str, Any]) -> None:
    """docs/ACCURACY.md."""
    wide = [name for name, variant in VARIANTS.items() if variant.bits == 8]
    narrow = [name for name, variant in VARIANTS.items() if variant.bits == 4]
    any_row = next(iter(document["rows"].values()))
    parts = {
        "images": str(any_row["images"]),
        "float": f"{any_row['float_accuracy']:.2f}",
        "W8A8": markdown(HEADER, table(document, wide)),
        "W4A8": markdown(HEADER, table(document, narrow)),
        "where": markdown(WHERE, noisiest(document["where"])),
    }
    write_page("ACCURACY", parts)


if __name__ == "__main__":
    main()
