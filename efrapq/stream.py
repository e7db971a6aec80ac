"""The streaming pass: one walk over the graph with two streams of activations, float and quantized so far.

At each weight layer the streams give H and G, the solver gives codes, and the layer's quantized output continues the
quantized stream. Nothing is run twice and what no later node reads is dropped, so the cost is linear in depth and
the memory is the frontier plus one H.
"""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from efrapq.calibration.ranges import calibrate
from efrapq.device import exact_convolutions
from efrapq.errors import UnsupportedModelError
from efrapq.graph.executor import Executor
from efrapq.graph.layers import Layer, bias_array, weight_array
from efrapq.graph.placement import Placement, activation_after
from efrapq.graph.quantized import QuantizedWeight
from efrapq.graph.unfold import unfold_for
from efrapq.grid import ActivationGrid, WeightGrid, symmetric_scale
from efrapq.progress import Reporter, Task
from efrapq.rounding import (
    Coordinate,
    Moments,
    Relaxed,
    RoundingProblem,
    make_problem,
    quadratic_loss,
    solve_coordinate,
    solve_relaxed,
)

__all__ = ["LayerReport", "PassSettings", "Solved", "streaming_pass"]

# An int32 bias at scale s_x·s_w must hold |b| with room to spare: |b| / (s_x·s_w) <= 2^30.
BIAS_LIMIT = float(2**30)


@dataclass(frozen=True)
class PassSettings:
    """bits: weight bits; edge_bits: of the first and the last layer. act_range: how activation ranges are chosen.
    rows: H is accumulated over at most rows·D rows. solver: settings of one, or None for rounding to nearest.
    """

    bits: int
    edge_bits: int = 8
    act_range: str = "minmax"
    rows: int = 32
    solver: Coordinate | Relaxed | None = field(default_factory=Coordinate)
    seed: int = 0
    device: str = "cpu"


@dataclass(frozen=True)
class LayerReport:
    """What happened to one layer. L_A before: of rounding to nearest on the same grid; after: of the solution."""

    name: str
    op_type: str
    bits: int
    shape: tuple[int, ...]
    scale_min: float
    scale_max: float
    flipped: float
    loss_nearest: float
    loss: float
    rows: int
    seconds: float


@dataclass(frozen=True)
class Solved:
    """The pass's result: weights and reports in topological order, and the grid of every placed value."""

    weights: dict[str, QuantizedWeight]
    activations: dict[str, ActivationGrid]
    reports: list[LayerReport]
    fallback: tuple[str, ...]


def streaming_pass(
    model: ir.Model,
    layers: list[Layer],
    placement: Placement,
    inputs: list[Tensor],
    settings: PassSettings,
    reporter: Reporter,
) -> Solved:
    """Solve every layer over the calibration inputs, given in chunks (n, …) float32 on the CPU."""
    with exact_convolutions():
        return _Pass(model, layers, placement, inputs, settings).run(reporter)


class _Steps:
    """Progress inside one layer, for solvers that take long over it."""

    EVERY = 50

    def __init__(self, task: Task, name: str, work: float) -> None:
        self._task, self._name, self._left = task, name, work
        self._work = work

    def reached(self, step: int, steps: int) -> None:
        if step % self.EVERY == self.EVERY - 1:
            part = self._work * self.EVERY / (steps + self.EVERY)
            self._left -= part
            self._task.advance(f"{self._name}: step {step + 1} of {steps}", part)

    def finish(self, note: str) -> None:
        self._task.advance(note, self._left)


class _Pass:
    def __init__(
        self,
        model: ir.Model,
        layers: list[Layer],
        placement: Placement,
        inputs: list[Tensor],
        settings: PassSettings,
    ) -> None:
        self.settings = settings
        self.placement = placement
        self.device = torch.device(settings.device)
        self.executor = Executor(model, device=self.device)
        self.graph = model.graph
        self.layers = {layer.node_name: layer for layer in layers}
        self.edges = {layers[0].node_name, layers[-1].node_name}
        self.chunks = len(inputs)
        self.samples = sum(len(c) for c in inputs)
        self.float_stream: dict[str, list[Tensor]] = {}
        self.quantized_stream: dict[str, list[Tensor]] = {}
        self.grids: dict[str, ActivationGrid] = {}
        self.weights: dict[str, QuantizedWeight] = {}
        self.reports: list[LayerReport] = []
        name = str(model.graph.inputs[0].name)
        self.float_stream[name] = [c.to(self.device) for c in inputs]
        self.quantized_stream[name] = list(self.float_stream[name])
        self._settle(name)
        self.readers = Counter(str(v.name) for node in self.graph for v in node.inputs if v is not None)

    def run(self, reporter: Reporter) -> Solved:
        work = {name: float(weight_array(self.graph, layer).size) for name, layer in self.layers.items()}
        with reporter.task("rounding", sum(work.values())) as task, torch.no_grad():
            for node in self.graph:
                layer = self.layers.get(str(node.name))
                if layer is None:
                    self._plain(node)
                else:
                    steps = _Steps(task, layer.name, work[layer.node_name])
                    report = self._weighted(layer, steps)
                    self.reports.append(report)
                    steps.finish(f"{layer.name}: {report.flipped:.1f} % flipped")
                self._drop(node)
        return Solved(self.weights, self.grids, self.reports, self.executor.fallback_nodes)

    # The two streams.

    def _read(self, stream: dict[str, list[Tensor]], value: ir.Value | None, chunk: int) -> Tensor | None:
        if value is None:
            return None
        name = str(value.name)
        if name in self.executor.constants:
            return self.executor.constants[name]
        stored = stream[name][chunk]
        if stream is self.quantized_stream and name in self.grids and stored.dtype == torch.uint8:
            return self.grids[name].dequantize(stored)
        return stored

    def _plain(self, node: ir.Node) -> None:
        """A node without a weight of its own: run it on both streams."""
        names = [str(o.name) for o in node.outputs]
        for stream in (self.float_stream, self.quantized_stream):
            for name in names:
                stream[name] = []
            for chunk in range(self.chunks):
                results = self.executor.run_node(node, [self._read(stream, v, chunk) for v in node.inputs])
                for name, result in zip(names, results, strict=False):
                    stream[name].append(result)
        for name in names:
            if self.float_stream[name]:
                self._settle(name)

    def _settle(self, name: str) -> None:
        """Choose the value's grid and put the quantized stream on it."""
        if name in self.placement.grids:
            bits = self.placement.grids[name]
            self.grids[name] = calibrate(self.float_stream[name], bits, self.settings.act_range, name)
        elif name in self.placement.same:
            self.grids[name] = self.grids[self.placement.same[name]]
        else:
            return
        grid = self.grids[name]
        self.quantized_stream[name] = [grid.quantize(c) for c in self.quantized_stream[name]]

    def _drop(self, node: ir.Node) -> None:
        for value in node.inputs:
            if value is None:
                continue
            name = str(value.name)
            self.readers[name] -= 1
            if self.readers[name] <= 0 and not value.is_graph_output():
                self.float_stream.pop(name, None)
                self.quantized_stream.pop(name, None)

    # One weight layer.

    def _weighted(self, layer: Layer, steps: _Steps) -> LayerReport:
        started = time.perf_counter()
        bits = self.settings.edge_bits if layer.node_name in self.edges else self.settings.bits
        weight = torch.from_numpy(weight_array(self.graph, layer).copy()).to(self.device)
        bias_np = bias_array(self.graph, layer)
        bias = None if bias_np is None else torch.from_numpy(bias_np.copy()).to(self.device)
        unfold = unfold_for(layer)
        rows = unfold.weight_rows(weight).contiguous()
        kernel = (int(weight.shape[2]), int(weight.shape[3])) if weight.ndim == 4 else (1, 1)

        moments = Moments(rows)
        outputs: list[Tensor] = []
        generator = torch.Generator().manual_seed(self.settings.seed)
        for chunk in range(self.chunks):
            x, x_hat = self._inputs(layer, chunk)
            y = self._run(layer, x, weight, bias)
            outputs.append(y)
            positions = self._positions(y, rows.shape[2], generator)
            target = unfold.output_rows(y, positions)
            if bias is not None:
                target = target - bias.view(rows.shape[0], 1, rows.shape[1])
            moments.add(unfold.input_rows(x_hat, kernel, positions), target)
        self.float_stream[layer.output] = outputs

        grid = self._weight_grid(layer, rows, bits, bias)
        H, cross, error = moments.mean()
        if not (math.isfinite(error) and bool(torch.isfinite(H).all())):
            raise UnsupportedModelError(
                f"the input of layer {layer.name} becomes NaN or infinite on the calibration data; "
                "check --mean, --std and the model"
            )
        problem = make_problem(rows, grid, (H, cross, error))
        up = self._solve(layer, problem, weight, bias, unfold.from_rows, steps)
        codes = unfold.from_rows((problem.floor + up).to(torch.int8), tuple(weight.shape))
        scale = grid.scale[: weight.shape[layer.channel_axis]].cpu().numpy()
        solved = QuantizedWeight(codes.cpu().numpy(), scale, layer.channel_axis, bits)
        self.weights[layer.name] = solved

        real = torch.from_numpy(solved.dequantized()).to(self.device)
        bias_hat = self._bias_on_grid(layer, bias, grid.scale)
        self.quantized_stream[layer.output] = [
            self._run(layer, self._inputs(layer, chunk)[1], real, bias_hat) for chunk in range(self.chunks)
        ]
        self._settle(layer.output)
        return LayerReport(
            name=layer.name,
            op_type=layer.op_type,
            bits=bits,
            shape=tuple(weight.shape),
            scale_min=float(scale.min()),
            scale_max=float(scale.max()),
            flipped=100 * float((up != problem.nearest).float().mean()),
            loss_nearest=quadratic_loss(problem, problem.nearest),
            loss=quadratic_loss(problem, up),
            rows=moments.rows,
            seconds=time.perf_counter() - started,
        )

    def _inputs(self, layer: Layer, chunk: int) -> tuple[Tensor, Tensor]:
        x = self._read(self.float_stream, layer.node.inputs[0], chunk)
        x_hat = self._read(self.quantized_stream, layer.node.inputs[0], chunk)
        assert x is not None
        assert x_hat is not None
        return x, x_hat

    def _run(self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        inputs: list[Tensor | None] = [x, weight]
        if len(layer.node.inputs) > 2:
            inputs.append(bias)
        return self.executor.run_node(layer.node, inputs)[0]

    def _positions(self, y: Tensor, inputs: int, generator: torch.Generator) -> Tensor | None:
        """A seeded subset of output positions, so that all chunks together give about rows·D rows."""
        if y.ndim != 4:
            return None
        available = int(y.shape[2] * y.shape[3])
        wanted = -(-self.settings.rows * inputs // self.samples)
        if wanted >= available:
            return None
        return torch.randperm(available, generator=generator)[:wanted].sort().values.to(self.device)

    def _weight_grid(self, layer: Layer, rows: Tensor, bits: int, bias: Tensor | None) -> WeightGrid:
        groups, outputs, _ = rows.shape
        flat = rows.reshape(groups * outputs, -1)
        at_least = None
        if bias is not None and layer.input in self.grids:
            at_least = bias.abs() / (self.grids[layer.input].scale * BIAS_LIMIT)
        scale = symmetric_scale(flat, bits, at_least=at_least)
        if layer.op_type == "ConvTranspose":
            # DequantizeLinear has one scale per index of the weight's channel axis, which the groups share.
            scale = scale.view(groups, outputs).amax(0).repeat(groups)
        return WeightGrid(scale, bits)

    def _bias_on_grid(self, layer: Layer, bias: Tensor | None, scale: Tensor) -> Tensor | None:
        if bias is None or layer.input not in self.grids or not layer.integer:
            return bias
        step = scale[: len(bias)] * self.grids[layer.input].scale
        return (bias / step).round() * step

    def _solve(
        self,
        layer: Layer,
        problem: RoundingProblem,
        weight: Tensor,
        bias: Tensor | None,
        from_rows: Callable[[Tensor, tuple[int, ...]], Tensor],
        steps: _Steps,
    ) -> Tensor:
        solver = self.settings.solver
        if solver is None:
            return problem.nearest
        if isinstance(solver, Coordinate):
            return solve_coordinate(problem, solver)
        shape = tuple(weight.shape)

        def laid_out(rows: Tensor) -> Tensor:
            return from_rows(rows, shape).contiguous()

        after = self._after(layer)
        targets = [after(y) for y in self.float_stream[layer.output]]
        value = self._output_value(layer)
        grid = None
        if value in self.placement.grids:
            grid = calibrate(targets, self.placement.grids[value], self.settings.act_range, value)
        x_hat = torch.cat([self._inputs(layer, chunk)[1] for chunk in range(self.chunks)])
        target = torch.cat(targets)
        if len(x_hat) != len(target):
            raise UnsupportedModelError(f"layer {layer.name}: the relaxed solver needs one output per sample")
        generator = torch.Generator().manual_seed(self.settings.seed)

        def sample() -> tuple[Tensor, Tensor]:
            picked = torch.randint(len(x_hat), (min(solver.batch, len(x_hat)),), generator=generator).to(self.device)
            return x_hat[picked], target[picked]

        def forward(w: Tensor, x: Tensor) -> Tensor:
            y = after(self._run(layer, x, w, bias))
            return y if grid is None else grid.fake_quantize(y)

        with torch.enable_grad():
            up = solve_relaxed(
                laid_out(problem.floor),
                laid_out(problem.residue),
                laid_out(problem.scale[..., None].expand_as(problem.floor)),
                laid_out(problem.nearest),
                forward,
                sample,
                channel_dim=1 if weight.ndim == 4 else -1,
                settings=solver,
                on_step=lambda step: steps.reached(step, solver.steps),
            )
        return unfold_for(layer).weight_rows(up)

    def _after(self, layer: Layer) -> Callable[[Tensor], Tensor]:
        """The activation function that the layer's grid absorbs, as a function."""
        node = activation_after(layer.node.outputs[0])
        if node is None:
            return lambda y: y
        constants = [None if v is None else self.executor.constants.get(str(v.name)) for v in node.inputs[1:]]
        return lambda y: self.executor.run_node(node, [y, *constants])[0]

    def _output_value(self, layer: Layer) -> str:
        node = activation_after(layer.node.outputs[0])
        return str((node or layer.node).outputs[0].name)
