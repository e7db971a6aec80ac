"""The streaming pass: one walk over the graph with two streams of activations, float and quantized so far.

At each weight layer the streams give H and g, the solver gives codes, and the layer's quantized output continues the
quantized stream. Nothing is run twice and what no later node reads is dropped chunk by chunk, so the cost is linear
in depth and the memory is the frontier plus one H; past a limit the frontier goes to disk.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import onnx_ir as ir
import torch
from torch import Tensor

from efrapq.calibration.feeds import Feeds
from efrapq.calibration.output_ranges import choose_limits
from efrapq.calibration.placed import Calibrator
from efrapq.calibration.stress import Stamp, Stressed, stressed_values
from efrapq.device import exact_convolutions
from efrapq.errors import UnsupportedModelError
from efrapq.graph.executor import Executor, reads
from efrapq.graph.layers import Layer, bias_array, weight_array
from efrapq.graph.placement import Placement, activation_after
from efrapq.graph.quantized import QuantizedWeight
from efrapq.grid import ActivationGrid
from efrapq.progress import Reporter, Task
from efrapq.rounding import Relaxed, RoundingProblem
from efrapq.stream.journal import Journal
from efrapq.stream.layer import LayerWork
from efrapq.stream.relaxed_layer import solve_layer
from efrapq.stream.settings import LayerReport, PassSettings
from efrapq.stream.spool import Spool

__all__ = ["Solved", "Walk", "streaming_pass"]


@dataclass(frozen=True)
class Solved:
    """The pass's result: weights and reports in topological order, and the grid of every placed value. filed: bytes
    of activations that went through temporary files. seconds: the whole pass took. driven: by value name, how many
    times as far it reaches with patches and triggers on the images; empty where none were tried. wider: values that got
    8 bits for it, where fewer were asked for.
    """

    weights: dict[str, QuantizedWeight]
    activations: dict[str, ActivationGrid]
    reports: list[LayerReport]
    fallback: tuple[str, ...]
    filed: int = 0
    seconds: float = 0.0
    driven: dict[str, float] = field(default_factory=dict)
    wider: tuple[str, ...] = ()


def streaming_pass(
    model: ir.Model,
    layers: list[Layer],
    placement: Placement,
    inputs: Sequence[Tensor] | Sequence[Feeds],
    settings: PassSettings,
    reporter: Reporter,
    journal: Journal | None = None,
    stamps: Sequence[Stamp] = (),
) -> Solved:
    """Solve every layer over the calibration inputs, given in chunks on the CPU: (n, …) float32 for a model with one
    such input, Feeds for any other.

    journal: keeps each layer when it is solved, and gives back those solved before. stamps: triggers that activation
    ranges cover as well; for images only.
    """
    with exact_convolutions(), Spool(settings.memory) as floats, Spool(settings.memory) as quantized:
        return Walk(model, layers, placement, inputs, settings, floats, quantized, journal, stamps).run(reporter)


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


class _Chunks(Sequence[Tensor]):
    """The chunks of one spooled value, read when they are asked for."""

    def __init__(self, spool: Spool, name: str) -> None:
        self._spool, self._name = spool, name

    def __len__(self) -> int:
        return self._spool.chunks(self._name)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        if not 0 <= index < len(self):
            raise IndexError(index)
        return self._spool.get(self._name, index)


def _joined(layer: Layer, chunks: Sequence[Tensor]) -> Tensor:
    """All chunks of a layer's inputs or outputs along the first axis; as rows, which a matrix takes one by one, where
    samples are counted on another axis and not all chunks hold as many.
    """
    if len({chunk.shape[1:] for chunk in chunks}) > 1:
        if layer.op_type not in ("Gemm", "MatMul"):
            raise UnsupportedModelError(f"layer {layer.name}: the relaxed solver needs its samples on the first axis")
        chunks = [chunk.flatten(0, -2) for chunk in chunks]
    return torch.cat(list(chunks))


class Walk:
    """One pass over one graph. floats, quantized: the two streams by value name; a value on a grid is kept in the
    quantized stream as uint8 codes.
    """

    def __init__(
        self,
        model: ir.Model,
        layers: list[Layer],
        placement: Placement,
        inputs: Sequence[Tensor] | Sequence[Feeds],
        settings: PassSettings,
        floats: Spool,
        quantized: Spool,
        journal: Journal | None = None,
        stamps: Sequence[Stamp] = (),
    ) -> None:
        self.settings, self.stamps = settings, stamps
        self.placement = placement
        self.device = torch.device(settings.device)
        self.executor = Executor(model, device=self.device)
        self.graph = model.graph
        self.layers = {layer.node_name: layer for layer in layers}
        self.weight_bits = settings.weight_bits(layers)
        self.chunks = len(inputs)
        self.samples = sum(c.samples if isinstance(c, Feeds) else len(c) for c in inputs)
        self.floats, self.quantized = floats, quantized
        self.journal = journal
        self.grids: dict[str, ActivationGrid] = {}
        self.weights: dict[str, QuantizedWeight] = {}
        self.reports: list[LayerReport] = []
        self.readers = Counter(str(v.name) for node in self.graph for v in reads(node) if v is not None)
        self.inputs = inputs

    def run(self, reporter: Reporter) -> Solved:
        """Walk to the end."""
        started = time.perf_counter()
        self.calibrator = self._calibrator(reporter)
        for value in self.graph.inputs:
            if value.name not in self.executor.constants:
                self._feed(str(value.name))
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
        filed = self.floats.filed + self.quantized.filed
        return Solved(
            self.weights,
            self.grids,
            self.reports,
            self.executor.fallback_nodes,
            filed,
            time.perf_counter() - started,
            self.calibrator.driven,
            tuple(self.calibrator.wider),
        )

    def _calibrator(self, reporter: Reporter) -> Calibrator:
        """What chooses the activations' grids."""
        settings, about = self.settings, (self.graph, self.executor, self.placement)
        if settings.act_range != "output" or not self.placement.grids:
            wanted = (settings.stress or self.stamps) and self.placement.grids
            stressed = self._stressed(reporter) if wanted else None
            return Calibrator(
                *about,
                settings.act_range,
                device=self.device,
                headroom=settings.headroom,
                stressed=stressed,
                mixed=settings.mixed,
            )
        limits = choose_limits(*about, self.inputs, self.device, settings.memory, reporter)
        reporter.note(
            f"{len(limits)} of {len(self.placement.grids)} activations have ranges by their effect on the outputs"
        )
        return Calibrator(*about, "mse", limits, self.device)

    def _stressed(self, reporter: Reporter) -> Mapping[str, Stressed]:
        """What values are under patches and triggers, where the one input is images."""
        names = [str(v.name) for v in self.graph.inputs if v.name not in self.executor.constants]
        if len(names) != 1:
            return {}
        chunks = [given.tensors[names[0]] if isinstance(given, Feeds) else given for given in self.inputs]
        if any(chunk.dim() != 4 or chunk.dtype != torch.float32 for chunk in chunks):
            return {}
        placed = [name for name in self.placement.grids if name != names[0]]
        return stressed_values(
            self.executor,
            names[0],
            chunks,
            placed,
            self.settings.seed,
            reporter,
            spread=self.settings.act_range != "minmax",
            patches=self.settings.stress,
            stamps=self.stamps,
        )

    # The two streams.

    def _feed(self, name: str) -> None:
        """Begin both streams with one input of the graph."""
        self.floats.start(name)
        for given in self.inputs:
            tensor = given.tensors[name] if isinstance(given, Feeds) else given
            # As the executor has it: what describes indices and shapes stays on the CPU.
            on_host = tensor.dtype == torch.int64 or (tensor.dtype == torch.bool and tensor.dim() == 0)
            self.floats.append(name, tensor if on_host else tensor.to(self.device))
        self._choose_grid(name)
        self.quantized.start(name)
        for chunk in range(self.chunks):
            self._keep(name, self.floats.get(name, chunk))

    def _read(self, stream: Spool, value: ir.Value | None, chunk: int) -> Tensor | None:
        """A node's input in one stream, as reals."""
        if value is None:
            return None
        name = str(value.name)
        if name in self.executor.constants:
            return self.executor.constants[name]
        stored = stream.get(name, chunk)
        if stream is self.quantized and name in self.grids:
            return self.grids[name].dequantize(stored)
        return stored

    def _keep(self, name: str, real: Tensor) -> None:
        """Add a chunk to the quantized stream, on the value's grid if it has one."""
        grid = self.grids.get(name)
        self.quantized.append(name, real if grid is None else grid.quantize(real))

    def _release(self, stream: Spool, node: ir.Node, chunk: int) -> None:
        """Forget a chunk of the inputs that only this node still reads."""
        for name, times in Counter(str(v.name) for v in reads(node) if v is not None).items():
            if name in stream and self.readers[name] == times and not self._is_output(name):
                stream.release(name, chunk)

    def _is_output(self, name: str) -> bool:
        return any(str(value.name) == name for value in self.graph.outputs)

    def _plain(self, node: ir.Node) -> None:
        """A node without a weight of its own: run it on both streams."""
        names = [str(o.name) for o in node.outputs]

        def run(stream: Spool, keep: Callable[[str, Tensor], None]) -> None:
            for name in names:
                stream.start(name)
            for chunk in range(self.chunks):
                results = self.executor.run_node(node, [self._read(stream, v, chunk) for v in reads(node)])
                for name, result in zip(names, results, strict=False):
                    keep(name, result)
                self._release(stream, node, chunk)

        run(self.floats, self.floats.append)
        for name in names:
            if self.floats.chunks(name):
                self._choose_grid(name)
        run(self.quantized, self._keep)

    def _choose_grid(self, name: str) -> None:
        """Choose the value's grid from the float stream, if it is placed on one."""
        if name in self.placement.grids:
            self.grids[name] = self.calibrator.grid(name, _Chunks(self.floats, name))
        elif name in self.placement.same:
            self.grids[name] = self.grids[self.placement.same[name]]

    def _drop(self, node: ir.Node) -> None:
        for value in reads(node):
            if value is None:
                continue
            name = str(value.name)
            self.readers[name] -= 1
            if self.readers[name] <= 0 and not value.is_graph_output():
                self.floats.drop(name)
                self.quantized.drop(name)

    # One weight layer.

    def _weighted(self, layer: Layer, steps: _Steps) -> LayerReport:
        bits = self.weight_bits[layer.name]
        weight = torch.from_numpy(weight_array(self.graph, layer).copy()).to(self.device)
        bias_np = bias_array(self.graph, layer)
        bias = None if bias_np is None else torch.from_numpy(bias_np.copy()).to(self.device)
        known = self.journal.get(layer.name, tuple(weight.shape)) if self.journal is not None else None
        work = None
        if known is None:
            grid = self.grids.get(layer.input)
            work = LayerWork(layer, weight, bias, bits, self.settings, self.samples, grid)

        self.floats.start(layer.output)
        for chunk in range(self.chunks):
            x = self._read(self.floats, layer.node.inputs[0], chunk)
            assert x is not None
            y = self._run(layer, x, weight, bias)
            self._release(self.floats, layer.node, chunk)
            self.floats.append(layer.output, y)
            if work is not None:
                work.add(self.quantized.get(layer.input, chunk), y)

        if work is not None:
            known = work.solve(lambda problem, settings: self._relaxed(layer, problem, weight, bias, settings, steps))
            if self.journal is not None:
                self.journal.put(layer.name, *known)
        assert known is not None
        solved, report = known
        self.weights[layer.name] = solved

        real = torch.from_numpy(solved.dequantized()).to(self.device)
        bias_hat = self._bias_on_grid(layer, bias, torch.from_numpy(solved.scale).to(self.device))
        self._choose_grid(layer.output)
        self.quantized.start(layer.output)
        for chunk in range(self.chunks):
            x_hat = self._read(self.quantized, layer.node.inputs[0], chunk)
            assert x_hat is not None
            self._release(self.quantized, layer.node, chunk)
            self._keep(layer.output, self._run(layer, x_hat, real, bias_hat))
        return report

    def _run(self, layer: Layer, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        inputs: list[Tensor | None] = [x, weight]
        if len(layer.node.inputs) > 2:
            inputs.append(bias)
        return self.executor.run_node(layer.node, inputs)[0]

    def _bias_on_grid(self, layer: Layer, bias: Tensor | None, scale: Tensor) -> Tensor | None:
        if bias is None or layer.input not in self.grids or not layer.integer:
            return bias
        step = scale * self.grids[layer.input].scale
        return (bias / step).round() * step

    def _relaxed(
        self,
        layer: Layer,
        problem: RoundingProblem,
        weight: Tensor,
        bias: Tensor | None,
        settings: Relaxed,
        steps: _Steps,
    ) -> Tensor:
        """Run the paper's solver with all of the layer's inputs and outputs at hand."""
        node = activation_after(layer.node.outputs[0])

        def after(y: Tensor) -> Tensor:
            if node is None:
                return y
            constants = [None if v is None else self.executor.constants.get(str(v.name)) for v in node.inputs[1:]]
            return self.executor.run_node(node, [y, *constants])[0]

        value = str((node or layer.node).outputs[0].name)
        targets = [after(y) for y in _Chunks(self.floats, layer.output)]
        grid = None
        if value in self.placement.grids:
            grid = self.calibrator.grid(value, targets)
        inputs = [self._read(self.quantized, layer.node.inputs[0], chunk) for chunk in range(self.chunks)]
        return solve_layer(
            layer,
            problem,
            tuple(weight.shape),
            run=lambda x, w: self._run(layer, x, w, bias),
            after=after,
            output_grid=grid,
            x_hat=_joined(layer, [x for x in inputs if x is not None]),
            target=_joined(layer, targets),
            settings=settings,
            seed=self.settings.seed,
            on_step=lambda step: steps.reached(step, settings.steps),
        )
