"""What every target keeps, and what each one changes: codes never, grids by its own rule."""

from __future__ import annotations

import dataclasses
import itertools
import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, numpy_helper

from efrapq.cli.options import TARGETS as TARGETS_IN_HELP
from efrapq.exporters import PROFILES, export_model, lint, read_quantized, remarks
from efrapq.exporters.rules import Graph
from efrapq.graph.quantized import QuantizedModel
from efrapq.grid import ActivationGrid, activation_grid
from efrapq.retarget import export_all
from efrapq.rounding import Coordinate

F32 = np.float32
DOCUMENT = Path(__file__).resolve().parents[2] / "docs" / "TARGETS.md"

EVERY = pytest.mark.parametrize("target", PROFILES)
NETWORKS = pytest.mark.parametrize("network", ["residual", "varied"])
SETTINGS = pytest.mark.parametrize(
    "bits", [(8, 8), (7, 8), (4, 8), (4, 4), (8, 4), (4, 32), (8, 32)], ids=lambda b: f"W{b[0]}A{b[1]}"
)
GRIDS = [
    ActivationGrid(float(F32(0.02)), 0, 8),
    ActivationGrid(float(F32(0.02)), 37, 8),
    ActivationGrid(float(F32(0.3)), 128, 8),
    ActivationGrid(float(F32(1e-6)), 255, 8),
    ActivationGrid(float(F32(0.3)), 0, 4),
    ActivationGrid(float(F32(0.1)), 6, 4),
    ActivationGrid(1.0, 0, 8),
]


@pytest.fixture(scope="module")
def solved(residual_net: Any, varied_net: Any, quantize: Any, images: Any) -> Callable[..., QuantizedModel]:
    """(network, weight bits, activation bits) → QuantizedModel; each made once."""
    networks = {"residual": residual_net, "varied": varied_net}
    cache: dict[tuple[str, int, int], QuantizedModel] = {}

    def get(network: str, bits: int = 4, act_bits: int = 8) -> QuantizedModel:
        key = (network, bits, act_bits)
        if key not in cache:
            metadata = {"efrapq.calibration": json.dumps({"input": [3, 8, 8]})}
            made = quantize(
                networks[network](),
                images(24),
                bits=bits,
                act_bits=act_bits,
                edge_bits=min(bits, 8) if bits == 7 else 8,
                solver=Coordinate(),
                metadata=metadata,
            )
            cache[key] = made.quantized
        return cache[key]

    return get


def bytes_of(proto: onnx.ModelProto) -> bytes:
    return bytes(proto.SerializeToString(deterministic=True))


def reals(grid: ActivationGrid) -> NDArray[np.float32]:
    """All real numbers of a grid."""
    codes = torch.arange(grid.qmin, grid.qmax + 1)
    values: NDArray[np.float32] = grid.dequantize(codes).numpy()
    return values


# Every target.


@NETWORKS
@SETTINGS
@EVERY
def test_codes_and_digest_survive(solved: Any, network: str, bits: tuple[int, int], target: str) -> None:
    quantized = solved(network, *bits)
    proto = onnx.ModelProto.FromString(bytes_of(export_model(quantized, target)))
    onnx.checker.check_model(proto, full_check=True)
    assert lint(proto, target) == []
    back = read_quantized(proto)
    assert back.digest == quantized.digest
    for name, weight in quantized.weights.items():
        assert np.array_equal(back.weights[name].codes, weight.codes)
        assert np.array_equal(back.weights[name].scale, weight.scale)
        assert (back.weights[name].bits, back.weights[name].axis) == (weight.bits, weight.axis)
    rules = PROFILES[target]
    assert back.activations == {name: rules.grid(grid) for name, grid in quantized.activations.items()}


@NETWORKS
@SETTINGS
@EVERY
def test_the_same_model_gives_the_same_bytes(solved: Any, network: str, bits: tuple[int, int], target: str) -> None:
    quantized = solved(network, *bits)
    first = bytes_of(export_model(quantized, target))
    assert bytes_of(export_model(quantized, target)) == first
    assert bytes_of(export_model(read_quantized(onnx.ModelProto.FromString(first)), target)) == first


@SETTINGS
@pytest.mark.parametrize(("source", "target"), list(itertools.permutations(PROFILES, 2)))
def test_any_target_can_be_made_from_any_other(solved: Any, source: str, target: str, bits: tuple[int, int]) -> None:
    quantized = solved("residual", *bits)
    middle = export_model(quantized, source)
    proto = export_model(read_quantized(middle), target)
    assert lint(proto, target) == []
    assert read_quantized(proto).digest == quantized.digest


@NETWORKS
@SETTINGS
@EVERY
def test_what_the_runtime_computes(
    solved: Any, images: Any, run_ort: Any, network: str, bits: tuple[int, int], target: str
) -> None:
    """Beside the file of the native target: equal on equal grids, and close where the grids were made anew."""
    if target == "portable" and bits[1] == 4:
        pytest.skip("ONNX Runtime does not load uint4 activations beside int8 weights")
    quantized = solved(network, *bits)
    x = images(1, seed=3)
    reference = run_ort(export_model(quantized, "ort-x86"), x, optimized=False)[0]
    output = run_ort(export_model(quantized, target), x, optimized=False)[0]
    rules = PROFILES[target]
    if all(rules.grid(grid) == grid for grid in quantized.activations.values()):
        assert np.abs(output - reference).max() <= 1e-5
    else:
        assert output.shape == reference.shape
        assert np.corrcoef(output.reshape(-1), reference.reshape(-1))[0, 1] > (0.9 if bits[1] == 4 else 0.99)


def test_the_help_names_every_target() -> None:
    assert TARGETS_IN_HELP.replace(" or ", ", ").split(", ") == list(PROFILES)


@EVERY
def test_the_documentation_states_every_rule_with_its_source(target: str) -> None:
    text = DOCUMENT.read_text()
    assert f"## `{target}`" in text
    section = text.split(f"## `{target}`")[1].split("\n## ")[0]
    for rule in PROFILES[target].rules:
        assert rule.words in section
        for source in rule.source.split(", "):
            assert source in section or source in text.split("\n## Sources")[1]


# Signed codes: the same real numbers.


@pytest.mark.parametrize("grid", [g for g in GRIDS if g.bits == 8], ids=str)
def test_a_signed_grid_holds_the_same_reals(grid: ActivationGrid) -> None:
    """In float32, as DequantizeLinear computes them: (code − zero point)·scale, both 128 less."""
    signed = (np.arange(-128, 128) - (grid.zero_point - 128)).astype(F32) * F32(grid.scale)
    assert np.array_equal(signed, reals(grid))


@NETWORKS
@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)], ids=lambda b: f"W{b[0]}A{b[1]}")
def test_arm_files_compute_what_x86_files_compute(
    solved: Any, images: Any, run_ort: Any, network: str, bits: tuple[int, int]
) -> None:
    quantized = solved(network, *bits)
    x = images(16, seed=7)
    unsigned = run_ort(export_model(quantized, "ort-x86"), x, optimized=False)[0]
    signed = run_ort(export_model(quantized, "ort-arm"), x, optimized=False)[0]
    assert np.array_equal(signed, unsigned)


def test_arm_files_are_signed_throughout(solved: Any) -> None:
    proto = export_model(solved("residual", 4, 4), "ort-arm")
    graph = Graph(proto)
    assert {graph.code_type(node) for node in graph.quantizers} == {TensorProto.INT8}
    limits = {t.name: int(numpy_helper.to_array(t)) for t in proto.graph.initializer if "level" in t.name}
    assert limits == {"efrapq.level_-128": -128, "efrapq.level_-113": -113}
    assert not {t.name for t in proto.graph.initializer if t.data_type == TensorProto.UINT8}


# Symmetric grids.


@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_a_symmetric_grid_covers_the_recorded_range(grid: ActivationGrid) -> None:
    made = PROFILES["tensorrt"].grid(grid)
    assert (made.zero_point, made.bits) == (128, 8)
    held, wanted = reals(made), reals(grid)
    assert 0.0 in held
    peak = np.abs(wanted).max()
    assert held.min() <= wanted.min() + 1e-6 * peak
    assert held.max() >= wanted.max() - 1e-6 * peak
    # No coarser than the range asks for: 127 steps reach its farther end.
    if grid.zero_point != 128:
        assert made.scale == pytest.approx(peak / 127, rel=1e-6)
    assert PROFILES["tensorrt"].grid(made) == made


@given(low=st.floats(-100, 0, width=32), high=st.floats(0, 100, width=32), bits=st.sampled_from([4, 8]))
def test_grids_are_made_anew_once(low: float, high: float, bits: int) -> None:
    grid = activation_grid(low, high, bits)
    for rules in PROFILES.values():
        made = rules.grid(grid)
        assert made.scale > 0
        assert np.isfinite(F32(made.scale))
        assert float(F32(made.scale)) == made.scale
        assert made.qmin <= made.zero_point <= made.qmax
        assert rules.grid(made) == made


@pytest.mark.parametrize("zero_point", range(16))
@pytest.mark.parametrize("scale", [0.3, 1e-6, 7.0])
def test_a_widened_grid_holds_every_level_of_the_narrow_one(scale: float, zero_point: int) -> None:
    narrow = ActivationGrid(float(F32(scale)), zero_point, 4)
    wide = PROFILES["qnn"].grid(narrow)
    assert wide.zero_point == 17 * zero_point
    assert np.abs(reals(wide)[::17] - reals(narrow)).max() <= 1e-6 * np.abs(reals(narrow)).max()


def test_tensorrt_files_have_zero_points_of_zero_and_float_biases(solved: Any) -> None:
    quantized = solved("varied", 4, 8)
    proto = export_model(quantized, "tensorrt")
    graph = Graph(proto)
    for node in proto.graph.node:
        if node.op_type in ("QuantizeLinear", "DequantizeLinear"):
            zero_point = graph.array(node, 2)
            assert zero_point is not None
            assert not zero_point.any()
    kinds = {graph.code_type(node) for node in graph.quantizers}
    assert kinds == {TensorProto.INT8}
    assert TensorProto.INT32 not in {t.data_type for t in proto.graph.initializer}
    axes = {use.node.op_type: use.dequantize.attribute[0].i for use in graph.weights}
    assert (axes["Conv"], axes["ConvTranspose"]) == (0, 1)


# Where 4-bit codes stay int4.


def stored(proto: onnx.ModelProto) -> dict[str, str]:
    """Name of the heavy node → type of its weight codes in the file."""
    return {use.node.name: TensorProto.DataType.Name(use.codes.data_type).lower() for use in Graph(proto).weights}


@pytest.mark.parametrize("target", ["ort-x86", "ort-arm", "openvino", "portable"])
def test_int4_everywhere(solved: Any, target: str) -> None:
    quantized = solved("varied", 4, 8)
    kinds = Counter(stored(export_model(quantized, target)).values())
    assert kinds == {"int4": len(quantized.layers) - 2, "int8": 2}


def test_tensorrt_takes_int4_for_weight_only_matrices(net: Any, quantize: Any, images: Any) -> None:
    n = net()
    flat = n.op("Flatten", n.conv("input", "c1", 3, 4), "flat")
    a = n.op("Relu", n.gemm(flat, "g1", 256, 16), "a1")
    proto = n.model(n.gemm(a, "logits", 16, 3))
    for act_bits, expected in ((8, "int8"), (32, "int4")):
        quantized = quantize(proto, images(8), act_bits=act_bits, edge_bits=4).quantized
        exported = export_model(quantized, "tensorrt")
        kinds = stored(exported)
        assert {kinds["node_g1"], kinds["node_logits"]} == {expected}
        assert kinds["node_c1"] == "int8"
        assert lint(exported, "tensorrt") == []


def test_qnn_takes_int4_for_matrices_between_quantized_values(net: Any, quantize: Any, images: Any) -> None:
    n = net()
    flat = n.op("Flatten", n.conv("input", "c1", 3, 4), "flat")
    a = n.op("Relu", n.gemm(flat, "g1", 256, 16), "a1")
    quantized = quantize(n.model(n.gemm(a, "logits", 16, 3)), images(8), edge_bits=4).quantized
    exported = export_model(quantized, "qnn")
    # The network's output is float, so its last layer is not inside; a convolution is no matrix product.
    assert stored(exported) == {"node_c1": "int8", "node_g1": "int4", "node_logits": "int8"}
    assert lint(exported, "qnn") == []


# Shapes.


def test_qnn_files_have_one_shape(solved: Any, images: Any, run_ort: Any) -> None:
    quantized = solved("residual", 4, 8)
    proto = export_model(quantized, "qnn")
    sizes = [d.dim_value for d in proto.graph.input[0].type.tensor_type.shape.dim]
    assert sizes == [1, 3, 8, 8]
    assert [d.dim_value for d in proto.graph.output[0].type.tensor_type.shape.dim] == [1, 5]
    assert run_ort(proto, images(1))[0].shape == (1, 5)
    assert any("batch is fixed" in r for r in remarks(quantized, "qnn"))
    assert not any("batch is fixed" in r for r in remarks(read_quantized(proto), "qnn"))
    # The model it was made from still takes any batch.
    assert run_ort(export_model(quantized, "ort-x86"), images(5))[0].shape == (5, 5)


def test_qnn_sizes_come_from_the_calibration(net: Any, quantize: Any, images: Any) -> None:
    n = net()
    n.shape = ("N", 3, "height", "width")
    gap = n.op("GlobalAveragePool", n.op("Relu", n.conv("input", "c1", 3, 4), "a1"), "gap")
    proto = n.model(n.gemm(n.op("Flatten", gap, "flat"), "logits", 4, 3))
    quantized = quantize(proto, images(8), metadata={"efrapq.calibration": json.dumps({"input": [3, 8, 8]})}).quantized
    exported = export_model(quantized, "qnn")
    assert [d.dim_value for d in exported.graph.input[0].type.tensor_type.shape.dim] == [1, 3, 8, 8]
    assert lint(exported, "qnn") == []
    unknown = dataclasses.replace(quantized, metadata={})
    (violation,) = lint(export_model(unknown, "qnn"), "qnn")
    assert "dynamic" in violation.detail


# Several targets at once.


def test_one_solution_several_files(solved: Any, tmp_path: Path) -> None:
    source = tmp_path / "model.onnx"
    source.write_bytes(bytes_of(export_model(solved("residual", 4, 8), "ort-x86")))
    made = export_all(source, {target: tmp_path / f"{target}.onnx" for target in PROFILES})
    assert [file.target for file in made] == list(PROFILES)
    assert len({file.codes_sha256 for file in made}) == 1
    for file in made:
        assert file.path.read_bytes() == file.data
        assert read_quantized(onnx.load(file.path)).digest == file.codes_sha256
    assert made[0].data == source.read_bytes()


def test_remarks_say_what_was_changed(solved: Any) -> None:
    quantized = solved("residual", 4, 4)
    assert not any("made anew" in r for r in remarks(quantized, "ort-x86"))
    count = len(quantized.activations)
    assert any(f"{count} of {count} activation grids" in r for r in remarks(quantized, "tensorrt"))
