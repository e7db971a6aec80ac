"""Other ways to quantize a model that may carry a backdoor, on efrapq's grid wherever the method allows it.

Each takes a `Case` and gives an ONNX file's bytes. All but quantize_static get the layers, scales, zero points and
activation grids of efrapq's own nearest file, so that nothing but the codes differs. Calibration images carry no
labels: where a method wants some, they are the float model's answers.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import torch
import torch.nn.functional as F
from torch import Tensor

import efrapq
from benchmarks.common import native
from efrapq.data import Dataset
from efrapq.exporters import export_model
from efrapq.graph.executor import Executor
from efrapq.graph.layers import weight_array
from efrapq.graph.prepare import prepare
from efrapq.graph.quantized import QuantizedModel, QuantizedWeight
from efrapq.grid import code_range
from efrapq.loading import load
from efrapq.preprocess import Preprocess
from efrapq.verification.ort_static import quantize_with_ort

BATCH = 64


@dataclass(frozen=True)
class Case:
    """A float model to be quantized. bits, act_bits: as for `efrapq defend`. steps: of the gradient solvers."""

    path: Path
    bits: int
    act_bits: int
    calibration: Dataset
    preprocess: Preprocess
    seed: int
    steps: int

    @cached_property
    def model(self) -> ir.Model:
        """The float graph, BatchNorm folded."""
        return prepare(load(self.path).proto)

    @cached_property
    def nearest(self) -> QuantizedModel:
        """Rounded to nearest: the grid that the rivals share."""
        return defended(self, solver="nearest").quantized

    @cached_property
    def inputs(self) -> Tensor:
        """The calibration images as the model takes them, (n, C, H, W) float32."""
        chosen = self.calibration.subset(512, self.seed)
        return torch.from_numpy(np.concatenate([chosen.inputs(list(b), self.preprocess) for b in chosen.batches(128)]))

    @cached_property
    def weights(self) -> dict[str, Tensor]:
        """Float weights by layer name, in ONNX layout."""
        graph = self.model.graph
        return {x.name: torch.from_numpy(weight_array(graph, x).copy()) for x in self.nearest.layers}


@dataclass(frozen=True)
class Made:
    """A rival's file. flipped: percent of codes other than nearest's on the same grid; None where it has its own."""

    data: bytes
    flipped: float | None
    seconds: float


Rival = Callable[[Case], bytes | QuantizedModel]


def defended(case: Case, **options: Any) -> efrapq.Defended:
    """`efrapq.defend` with the case's bits, images and seed, on the activation ranges that calibration alone shows: the
    rivals know no others."""
    settings: dict[str, Any] = {"calib": case.calibration, "preprocess": case.preprocess, "seed": case.seed}
    settings |= {"stress": False, "lift": False}
    settings |= {"bits": case.bits, "act_bits": case.act_bits, "target": native()}
    return efrapq.defend(case.path, None, **(settings | options))


def rounded(case: Case, weights: dict[str, Tensor]) -> QuantizedModel:
    """Other weights, rounded to nearest on the case's grid."""
    codes = {}
    for name, grid in case.nearest.weights.items():
        low, high = code_range(grid.bits)
        position = (weights[name].detach() / _along(grid)).round().clamp(low, high)
        codes[name] = grid.replace_codes(position.to(torch.int8).numpy())
    return replace(case.nearest, weights=codes)


def _along(grid: QuantizedWeight) -> Tensor:
    """A grid's scales in the shape of its weight."""
    return torch.from_numpy(grid.scale).view([-1 if i == grid.axis else 1 for i in range(grid.codes.ndim)])


def noise(case: Case) -> QuantizedModel:
    """Gaussian noise before rounding, as against quantization attacks on language models (arXiv 2405.18137): a layer's
    sigma is half its median cell."""
    generator = torch.Generator().manual_seed(case.seed)
    noisy = {}
    for name, weight in case.weights.items():
        sigma = 0.5 * float(np.median(case.nearest.weights[name].scale))
        noisy[name] = weight + sigma * torch.randn(weight.shape, generator=generator)
    return rounded(case, noisy)


def qvec(strength: float) -> Rival:
    """QVec (arXiv 2606.20254): W - strength · (RTN(W) - W), then nearest."""

    def run(case: Case) -> QuantizedModel:
        twin = {name: torch.from_numpy(grid.dequantized()) for name, grid in case.nearest.weights.items()}
        return rounded(case, {name: w - strength * (twin[name] - w) for name, w in case.weights.items()})

    return run


def fine_tuned(case: Case, epochs: int = 20, learning_rate: float = 1e-3) -> QuantizedModel:
    """The float model trained on the calibration images with its own answers as labels, then nearest.

    SGD with momentum on the layers' weights; folded BatchNorm and biases stay.
    """
    network = _Network(case)
    labels = network.answers(case.inputs)
    optimizer = torch.optim.SGD(network.parameters.values(), learning_rate, momentum=0.9)
    steps = epochs * (len(case.inputs) // BATCH)
    for index in _batches(len(case.inputs), steps, case.seed):
        loss = F.cross_entropy(network.logits(case.inputs[index], network.parameters), labels[index])
        _step(optimizer, loss)
    return rounded(case, network.parameters)


def activation_correction(case: Case, steps: int = 200, learning_rate: float = 1e-4) -> QuantizedModel:
    """LAC (Li et al., ICML 2024): train the rounded network until every layer's output is the float network's.

    Straight through the rounding, Adam, all layers at once, each layer's squared error relative to its energy. The
    paper's approximation of the poisoned activations' distribution is left out: it is a module of its own.
    """
    network = _Network(case)
    outputs = [layer.output for layer in network.layers]
    optimizer = torch.optim.Adam(network.parameters.values(), learning_rate)
    for index in _batches(len(case.inputs), steps, case.seed):
        x = case.inputs[index]
        with torch.no_grad():
            wanted = network.values(x, case.weights, outputs)
        found = network.values(x, network.on_grid(), outputs)
        terms = [(found[n] - wanted[n]).square().mean() / wanted[n].square().mean().clamp_min(1e-12) for n in outputs]
        _step(optimizer, torch.stack(terms).sum())
    return rounded(case, network.parameters)


def quantize_static(case: Case) -> bytes:
    """ONNX Runtime's own quantizer, with its own scales."""
    return quantize_with_ort(ir.to_proto(case.model), [x.numpy() for x in case.inputs.split(BATCH)], case.bits)


def rivals() -> dict[str, Rival]:
    """Every method of the table by name. `efrapq` is its default; what it owes to the activation ranges under patches,
    and what to the rounding, `RTN, ranges under patches` and `efrapq, plain ranges` tell.
    """
    usual = {"stress": True, "lift": True}
    return {
        "RTN": lambda case: case.nearest,
        "RTN, ranges under patches": lambda case: defended(case, solver="nearest", stress=True).quantized,
        "quantize_static": quantize_static,
        "noise, then RTN": noise,
        "QVec 0.5": qvec(0.5),
        "QVec 1": qvec(1.0),
        "fine-tuned, then RTN": fine_tuned,
        "LAC": activation_correction,
        "AdaRound": lambda case: defended(case, solver="relaxed", lambda_e=0.0, steps=case.steps).quantized,
        "EFRAP relaxed": lambda case: defended(case, solver="relaxed", steps=case.steps).quantized,
        "coordinate, lambda_E = 0": lambda case: defended(case, lambda_e=0.0).quantized,
        "efrapq": lambda case: defended(case, **usual).quantized,
        "efrapq, fidelity 1": lambda case: defended(case, **usual, fidelity=1.0).quantized,
        "efrapq, 2048 images": lambda case: defended(case, **usual, calib_size=2048).quantized,
        "efrapq, fidelity 1, 2048 images": lambda case: (
            defended(case, **usual, fidelity=1.0, calib_size=2048).quantized
        ),
        "efrapq, --no-lift": lambda case: defended(case, stress=True).quantized,
        "efrapq, plain ranges": lambda case: defended(case).quantized,
        "efrapq, fidelity 2": lambda case: defended(case, fidelity=2.0).quantized,
        "RTN, mixed": lambda case: defended(case, solver="nearest", stress=True, mixed=True).quantized,
        "efrapq, mixed": lambda case: defended(case, stress=True, mixed=True).quantized,
        "efrapq, headroom 2": lambda case: defended(case, headroom=2.0).quantized,
        "efrapq, headroom 4": lambda case: defended(case, headroom=4.0).quantized,
    }


def make(case: Case, rival: Rival) -> Made:
    """Run a method and write its file."""
    case.nearest, case.inputs, case.weights  # noqa: B018 - what all share is not timed
    started = time.perf_counter()
    found = rival(case)
    seconds = time.perf_counter() - started
    if isinstance(found, bytes):
        return Made(found, None, seconds)
    changed = sum(int((w.codes != case.nearest.weights[name].codes).sum()) for name, w in found.weights.items())
    total = sum(w.codes.size for w in found.weights.values())
    return Made(export_model(found, native()).SerializeToString(deterministic=True), 100 * changed / total, seconds)


class _Network:
    """The float graph in torch, with weights that can be trained."""

    def __init__(self, case: Case) -> None:
        self.case = case
        self.layers = case.nearest.layers
        self.parameters = {name: w.clone().requires_grad_() for name, w in case.weights.items()}
        self._executor = Executor(case.model)
        self._input = str(case.model.graph.inputs[0].name)
        self._output = str(case.model.graph.outputs[0].name)

    def values(self, x: Tensor, weights: dict[str, Tensor], names: list[str]) -> dict[str, Tensor]:
        replaced = {layer.weight: weights[layer.name] for layer in self.layers}
        return self._executor.run({self._input: x}, names, overrides=replaced)

    def logits(self, x: Tensor, weights: dict[str, Tensor]) -> Tensor:
        return self.values(x, weights, [self._output])[self._output]

    def answers(self, x: Tensor) -> Tensor:
        """The float model's classes, (n,)."""
        with torch.no_grad():
            return torch.cat([self.logits(part, self.case.weights).argmax(1) for part in x.split(BATCH)])

    def on_grid(self) -> dict[str, Tensor]:
        """The parameters rounded to nearest, straight through."""
        found = {}
        for name, weight in self.parameters.items():
            grid = self.case.nearest.weights[name]
            scale, (low, high) = _along(grid), code_range(grid.bits)
            real = (weight.detach() / scale).round().clamp(low, high) * scale
            found[name] = weight + (real - weight).detach()
        return found


def _batches(count: int, steps: int, seed: int) -> Iterator[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    for _ in range(steps):
        yield torch.randint(count, (BATCH,), generator=generator)


def _step(optimizer: torch.optim.Optimizer, loss: Tensor) -> None:
    optimizer.zero_grad()
    loss.backward()  # type: ignore[no-untyped-call]
    optimizer.step()
