"""Models as other people's exporters write them, and the whole path from such a file to its defended form."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
import onnxruntime as ort
import pytest
import torch
from numpy.typing import NDArray
from onnx import numpy_helper, parser

import efrapq
from efrapq.data import Dataset
from efrapq.graph.executor import Executor
from efrapq.graph.prepare import prepare
from efrapq.pipeline import Defended
from efrapq.progress import Silent

Weights = Mapping[str, NDArray[Any] | tuple[int, ...] | int]


def _seeded(name: str, shape: tuple[int, ...]) -> NDArray[np.float32]:
    """Weights of one name and shape: always the same ones, of a size that keeps activations near 1."""
    rng = np.random.default_rng([ord(c) for c in name])
    fan_in = prod(shape[1:]) if len(shape) > 2 else shape[0] if len(shape) == 2 else 100
    return np.asarray(rng.standard_normal(shape) / np.sqrt(max(fan_in, 1)), np.float32)


def _batchnorm(name: str, channels: int) -> dict[str, NDArray[np.float32]]:
    rng = np.random.default_rng([ord(c) for c in name])
    arrays = {
        "s": rng.uniform(0.5, 1.5, channels) * rng.choice([-1, 1], channels),
        "b": 0.2 * rng.standard_normal(channels),
        "m": 0.2 * rng.standard_normal(channels),
        "v": rng.uniform(0.5, 2, channels),
    }
    return {f"{name}_{key}": array.astype(np.float32) for key, array in arrays.items()}


def _arrays(weights: Weights) -> dict[str, NDArray[Any]]:
    found: dict[str, NDArray[Any]] = {}
    for name, given in weights.items():
        if isinstance(given, int):
            found |= _batchnorm(name, given)
        else:
            found[name] = _seeded(name, given) if isinstance(given, tuple) else given
    return found


def _foreign(text: str, weights: Weights | None = None, *, opset: int = 17, ir_version: int = 8) -> onnx.ModelProto:
    proto = parser.parse_model(f'<ir_version: {ir_version}, opset_import: ["" : {opset}]>\n{text}')
    for name, array in _arrays(weights or {}).items():
        proto.graph.initializer.append(numpy_helper.from_array(array, name))
    return proto


@pytest.fixture(scope="session")
def foreign() -> Callable[..., onnx.ModelProto]:
    """(text of the graph, weights, opset=17, ir_version=8) → a model.

    weights: arrays, shapes of seeded ones, or, for a BatchNormalization of n channels, n: under the name NAME it
    stands for NAME_s, NAME_b, NAME_m and NAME_v (scale, shift, mean and variance).
    """
    return _foreign


def dims(value: onnx.ValueInfoProto) -> list[int | str]:
    return [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]


def run(proto: onnx.ModelProto, feeds: Mapping[str, NDArray[Any]]) -> dict[str, NDArray[Any]]:
    """All outputs by name, in ONNX Runtime with its default optimizations."""
    options = ort.SessionOptions()
    options.intra_op_num_threads = 1
    options.log_severity_level = 4
    options.add_session_config_entry("session.x64quantprecision", "1")  # exact sums without VNNI as well
    session = ort.InferenceSession(proto.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return dict(zip([o.name for o in session.get_outputs()], session.run(None, dict(feeds)), strict=True))


def sqnr(reference: NDArray[Any], actual: NDArray[Any]) -> float:
    """Signal to quantization noise in dB; the signal is what varies, a constant offset is none."""
    reference, actual = reference.astype(np.float64), actual.astype(np.float64)
    noise = np.square(reference - actual).sum()
    return float(10 * np.log10(np.square(reference - reference.mean()).sum() / noise)) if noise else np.inf


class Recorder(Silent):
    """Keeps notes as well as warnings."""

    def __init__(self) -> None:
        super().__init__()
        self.notes: list[str] = []

    @contextmanager
    def task(self, description: str, total: float) -> Iterator[Any]:
        with super().task(description, total) as task:
            yield task

    def note(self, text: str) -> None:
        self.notes.append(text)


@dataclass(frozen=True)
class Result:
    """A foreign model and what became of it. left_float: node name → reason, as the user was told."""

    source: onnx.ModelProto
    proto: onnx.ModelProto
    made: Defended
    notes: list[str]
    warnings: list[str]
    left_float: dict[str, str] = field(default_factory=dict)

    @property
    def layers(self) -> dict[str, str]:
        """Layer name → operator, of what was quantized."""
        return {layer.name: layer.op_type for layer in self.made.quantized.layers}

    @property
    def kinds(self) -> Counter[str]:
        return Counter(self.layers.values())


HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
STAYS = " stays float: "


@pytest.fixture
def defended(tmp_path: Path) -> Callable[..., Result]:
    """(proto or path, x, *, floor=25 dB, …) → Result, after everything that holds for every model has been checked:

    `prepare` and the executor compute what the file computes; the defended file runs in ONNX Runtime on the
    calibration inputs and on fewer of them where the batch is dynamic, close to the float model on every float
    output; inputs and outputs keep their names, types and dimensions; the metadata is kept; every Conv,
    ConvTranspose, Gemm and MatMul is a layer or left float for a stated reason; every layer's weight is integers.
    """

    def check(
        source: onnx.ModelProto | Path,
        x: NDArray[np.float32],
        *,
        floor: float = 25,
        exact: float = 2e-5,
        **options: Any,
    ) -> Result:
        path = source if isinstance(source, Path) else tmp_path / "foreign.onnx"
        if not isinstance(source, Path):
            path.write_bytes(source.SerializeToString())
        proto = onnx.load(path)
        constants = {t.name for t in proto.graph.initializer}
        (given,) = [i for i in proto.graph.input if i.name not in constants]
        feeds = {given.name: x}
        expected = run(proto, feeds)
        _check_prepared(efrapq.load(path).proto, feeds, expected, exact)

        recorder = Recorder()
        settings: dict[str, Any] = {"bits": 8, "target": "ort-x86", "input_shape": None} | options
        made = efrapq.defend(path, calib=Dataset.from_arrays(x, None, "samples"), reporter=recorder, **settings)
        result = onnx.load_from_string(made.data)
        onnx.checker.check_model(result, full_check=True)

        assert [i.name for i in result.graph.input] == [given.name]
        assert dims(result.graph.input[0]) == dims(given)
        assert [o.name for o in result.graph.output] == [o.name for o in proto.graph.output]
        for before, after in zip(proto.graph.output, result.graph.output, strict=True):
            if before.type.tensor_type.HasField("shape"):
                assert _kept(dims(before), dims(after), dims(given)), before.name
        metadata = {p.key: p.value for p in result.metadata_props}
        assert all(metadata[p.key] == p.value for p in proto.metadata_props)

        _check_close(expected, run(result, feeds), floor)
        if not isinstance(dims(given)[0], int) or dims(given)[0] == 0:
            _check_close(run(proto, {given.name: x[:3]}), run(result, {given.name: x[:3]}), floor - 6)

        left = dict(w.split(STAYS, 1) for w in recorder.warnings if STAYS in w)
        left = {words.split(" ", 1)[1]: reason for words, reason in left.items()}
        done = Result(proto, result, made, recorder.notes, recorder.warnings, left)
        _check_accounted(done)
        return done

    return check


def _kept(before: list[int | str], after: list[int | str], given: list[int | str]) -> bool:
    """Whether an output's dimensions are as they were; one without a size, and without a name that an input has, may
    have become the size it is."""
    return len(before) == len(after) and all(
        b == a or ((b == 0 or isinstance(b, str)) and (b == 0 or b not in given) and isinstance(a, int) and a > 0)
        for b, a in zip(before, after, strict=True)
    )


def _check_prepared(
    proto: onnx.ModelProto, feeds: dict[str, NDArray[Any]], expected: dict[str, NDArray[Any]], tolerance: float
) -> None:
    model = prepare(proto)
    actual = run(ir.to_proto(model), feeds)
    with torch.no_grad():
        executed = Executor(model).run({name: torch.from_numpy(x) for name, x in feeds.items()})
    for name, reference in expected.items():
        scale = max(1.0, float(np.abs(reference).max(initial=0)))
        for which, values in (("prepare", actual[name]), ("executor", executed[name].numpy())):
            assert values.shape == reference.shape, (which, name)
            error = np.abs(values.astype(np.float64) - reference).max(initial=0)
            assert error <= tolerance * scale, f"{which}: {name} is off by {error}"


def _check_close(expected: dict[str, NDArray[Any]], actual: dict[str, NDArray[Any]], floor: float) -> None:
    for name, reference in expected.items():
        assert actual[name].shape == reference.shape, name
        assert actual[name].dtype == reference.dtype, name
        if reference.dtype == np.float32:
            found = sqnr(reference, actual[name])
            assert found >= floor, f"{name}: {found:.1f} dB"


def _check_accounted(result: Result) -> None:
    """No heavy operator is quantized in silence or left float in silence."""
    made = result.made
    quantized = {layer.node_name for layer in made.quantized.layers}
    for node in made.quantized.model.graph.all_nodes():
        if node.op_type in HEAVY and node.domain == "":
            name = node.name or node.outputs[0].name
            assert (name in quantized) != (name in result.left_float), name
    producers = {name: node for node in result.proto.graph.node for name in node.output}
    nodes = {node.name: node for node in result.proto.graph.node}
    for name in quantized:
        assert producers[nodes[name].input[1]].op_type == "DequantizeLinear"
    bits = json.loads({p.key: p.value for p in result.proto.metadata_props}["efrapq.bits"])
    assert bits.keys() == result.layers.keys()
