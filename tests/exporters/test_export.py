"""Every exported file: valid, loadable, on the kernels its target promises, and holding the codes that were solved."""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from efrapq.errors import UsageError
from efrapq.exporters import PROFILES, export_model, native_target, profile, read_quantized
from efrapq.graph.layers import find_layers
from efrapq.graph.quantized import QuantizedModel, QuantizedWeight
from efrapq.rounding import Coordinate

# The targets that keep every grid as it was solved; the others are in test_targets.py.
KEEPING = ["ort-x86", "ort-arm", "portable"]
TARGETS = pytest.mark.parametrize("target", KEEPING)
NETWORKS = pytest.mark.parametrize("network", ["residual", "varied"])
SETTINGS = pytest.mark.parametrize(
    "bits", [(8, 8), (4, 8), (4, 4), (8, 4), (3, 8), (4, 32)], ids=lambda b: f"W{b[0]}A{b[1]}"
)
Cache = dict[tuple[str, int, int], Any]


@pytest.fixture(scope="module")
def solved(residual_net: Any, varied_net: Any, quantize: Any, images: Any) -> Callable[..., Any]:
    """(network, weight bits, activation bits) → Quantized; each made once."""
    networks = {"residual": residual_net, "varied": varied_net}
    cache: Cache = {}

    def get(network: str, bits: int = 4, act_bits: int = 8) -> Any:
        key = (network, bits, act_bits)
        if key not in cache:
            cache[key] = quantize(
                networks[network](),
                images(24),
                bits=bits,
                act_bits=act_bits,
                solver=Coordinate(),
                metadata={"z.mean": "0.5", "a.note": "kept"},
            )
        return cache[key]

    return get


def initializers(proto: onnx.ModelProto) -> dict[str, onnx.TensorProto]:
    return {t.name: t for t in proto.graph.initializer}


def opset(proto: onnx.ModelProto) -> int:
    return {o.domain: int(o.version) for o in proto.opset_import}[""]


def loads(network: str, bits: tuple[int, int], target: str) -> bool:
    """Standard uint4 activations do not load in ONNX Runtime beside int8 weights, as the edge layers have."""
    return not (target == "portable" and bits[1] == 4)


@NETWORKS
@SETTINGS
@TARGETS
def test_exports_are_valid_and_run(
    solved: Any, images: Any, run_ort: Any, network: str, bits: tuple[int, int], target: str
) -> None:
    q = solved(network, *bits)
    proto = q.export(target)
    onnx.checker.check_model(proto, full_check=True)
    names = [v for node in proto.graph.node for v in node.output] + [t.name for t in proto.graph.initializer]
    assert len(set(names)) == len(names)
    assert [i.name for i in proto.graph.input] == ["input"]
    assert [o.name for o in proto.graph.output] == ["logits"]
    if not loads(network, bits, target):
        return
    for count in (1, 7):  # the batch stays dynamic
        x = images(count, seed=5)
        output = run_ort(proto, x)[0]
        assert output.shape == (count, 5)
        plain = run_ort(proto, x, optimized=False)[0]
        # With float activations a MatMul becomes MatMulNBits, which rounds them to int8 by itself.
        step = q.solved.activations[q.layers[-1].input].scale if bits[1] < 32 else 2e-3
        weight = q.solved.weights[q.layers[-1].name].dequantized()
        reach = step * np.abs(weight).sum(axis=1 - q.layers[-1].channel_axis).max()
        assert np.abs(output - plain).max() <= reach + 1e-5


@NETWORKS
@SETTINGS
@TARGETS
def test_opset_and_ir_version(solved: Any, network: str, bits: tuple[int, int], target: str) -> None:
    proto = solved(network, *bits).export(target)
    int4 = bits[0] <= 4 or (target == "portable" and bits[1] == 4)
    assert (opset(proto), proto.ir_version) == ((21, 10) if int4 else (17, 8))


@SETTINGS
def test_ort_x86_runs_on_integers(solved: Any, kernels: Any, float_kernels: Any, bits: tuple[int, int]) -> None:
    if bits[1] == 32:
        pytest.skip("float activations have no integer kernels")
    ops: Counter[str] = kernels(solved("residual", *bits).export("ort-x86"))
    assert float_kernels(ops) == 0
    assert ops["QLinearConv"] == 3
    assert ops["QGemm"] == 1
    assert ops["QLinearAdd"] == 1


@pytest.mark.parametrize("bits", [(8, 8), (4, 8), (4, 4)], ids=lambda b: f"W{b[0]}A{b[1]}")
def test_ort_x86_runs_other_layers_on_integers(
    solved: Any, kernels: Any, float_kernels: Any, bits: tuple[int, int]
) -> None:
    """All but the transposed convolution, which has no integer kernel."""
    ops: Counter[str] = kernels(solved("varied", *bits).export("ort-x86"))
    assert ops["ConvTranspose"] == float_kernels(ops) == 1
    assert ops["QLinearConv"] == 4


def test_portable_int4_runs_on_floats_and_int8_on_integers(solved: Any, kernels: Any, float_kernels: Any) -> None:
    assert float_kernels(kernels(solved("residual", 8, 8).export("portable"))) == 0
    # The edge layers have 8 bits; the two inner convolutions have 4.
    assert float_kernels(kernels(solved("residual", 4, 8).export("portable"))) == 2


@pytest.mark.parametrize("act_bits", [4, 8])
@pytest.mark.parametrize("high", [6.0, 0.7], ids=["relu6", "saturating"])
def test_clip_is_absorbed(
    net: Any, quantize: Any, images: Any, kernels: Any, float_kernels: Any, run_ort: Any, act_bits: int, high: float
) -> None:
    n = net()
    limits = [n.constant("low", np.array(0, np.float32)), n.constant("high", np.array(high, np.float32))]
    a = n.op("Clip", [n.conv("input", "c1", 3, 8), *limits], "a1")
    b = n.op("Clip", [n.conv(a, "c2", 8, 8), *limits], "a2")
    c = n.op("Flatten", n.op("GlobalAveragePool", b, "gap"), "flat")
    x = images(24) * 4
    q = quantize(n.model(n.gemm(c, "logits", 8, 5)), x, act_bits=act_bits)
    proto = q.export("ort-x86")
    assert float_kernels(kernels(proto)) == 0
    step = q.solved.activations["gap"].scale
    assert np.median(np.abs(run_ort(proto, x)[0] - q.output)) <= step / 4


# What the file holds.


def packed(codes: NDArray[np.int8]) -> bytes:
    """Two codes a byte, low nibble first, in plain Python."""
    flat = [int(c) & 0xF for c in codes.reshape(-1)]
    return bytes(a | (b << 4) for a, b in itertools.zip_longest(flat[::2], flat[1::2], fillvalue=0))


@NETWORKS
@TARGETS
def test_int4_codes_are_packed(solved: Any, network: str, target: str) -> None:
    q = solved(network, 4, 8)
    tensors = initializers(q.export(target))
    four = [layer for layer in q.layers if q.solved.weights[layer.name].bits == 4]
    assert len(four) == len(q.layers) - 2
    for layer in q.layers:
        codes = q.solved.weights[layer.name].codes
        tensor = tensors[f"{layer.weight}.codes"]
        assert tuple(tensor.dims) == codes.shape
        if layer in four:
            assert tensor.data_type == TensorProto.INT4
            assert tensor.raw_data == packed(codes)
            assert len(tensor.raw_data) == (codes.size + 1) // 2
            assert not tensor.int32_data
        else:
            assert tensor.data_type == TensorProto.INT8
            assert np.array_equal(numpy_helper.to_array(tensor), codes)
        assert np.array_equal(
            numpy_helper.to_array(tensors[f"{layer.weight}.scale"]), q.solved.weights[layer.name].scale
        )


@given(
    shape=st.one_of(
        st.tuples(st.integers(1, 5), st.integers(1, 7)),
        st.tuples(st.integers(1, 4), st.integers(1, 3), st.integers(1, 3), st.integers(1, 3)),
    ),
    trans_b=st.booleans(),
    bits=st.sampled_from([2, 3, 4, 8]),
    target=st.sampled_from(KEEPING),
    seed=st.integers(0, 2**16),
)
@settings(deadline=None, max_examples=80)
def test_codes_round_trip_for_any_shape(
    shape: tuple[int, ...], trans_b: bool, bits: int, target: str, seed: int
) -> None:
    """Odd and even numbers of codes, the whole range of two's complement, every layout."""
    rng = np.random.default_rng(seed)
    if len(shape) == 4:
        node = helper.make_node("Conv", ["x", "fc.weight"], ["y"], name="fc")
        axis, x = 0, ["N", shape[1], 9, 9]
    else:
        node = helper.make_node("Gemm", ["x", "fc.weight"], ["y"], name="fc", transB=int(trans_b))
        axis, x = (0 if trans_b else 1), ["N", shape[1] if trans_b else shape[0]]
    graph = helper.make_graph(
        [node],
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, x)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(np.zeros(shape, np.float32), "fc.weight")],
    )
    model = ir.from_proto(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8))
    layers, _ = find_layers(model.graph)
    low, high = -(2 ** (bits - 1)), 2 ** (bits - 1) - 1
    codes = rng.integers(low, high + 1, shape).astype(np.int8)
    weight = QuantizedWeight(codes, rng.uniform(1e-6, 1, shape[axis]).astype(np.float32), axis, bits)
    quantized = QuantizedModel(model, layers, {"fc": weight}, {})
    proto = export_model(quantized, target)
    if bits <= 4:
        assert initializers(proto)["fc.weight.codes"].raw_data == packed(codes)
    back = read_quantized(onnx.ModelProto.FromString(proto.SerializeToString()))
    assert np.array_equal(back.weights["fc"].codes, codes)
    assert np.array_equal(back.weights["fc"].scale, weight.scale)
    assert (back.weights["fc"].bits, back.weights["fc"].axis) == (bits, axis)
    assert back.digest == quantized.digest


@NETWORKS
@SETTINGS
@TARGETS
def test_reading_back_gives_what_was_written(solved: Any, network: str, bits: tuple[int, int], target: str) -> None:
    q = solved(network, *bits).quantized
    back = read_quantized(onnx.ModelProto.FromString(export_model(q, target).SerializeToString()))
    assert back.digest == q.digest
    assert back.activations == q.activations
    assert [(x.name, x.op_type, x.weight, x.channel_axis, x.groups, x.input) for x in back.layers] == [
        (x.name, x.op_type, x.weight, x.channel_axis, x.groups, x.input) for x in q.layers
    ]
    assert not {"QuantizeLinear", "DequantizeLinear", "Cast"} & {node.op_type for node in back.model.graph}


@NETWORKS
@SETTINGS
@TARGETS
def test_export_read_export_is_byte_identical(solved: Any, network: str, bits: tuple[int, int], target: str) -> None:
    first = solved(network, *bits).export(target).SerializeToString(deterministic=True)
    second = export_model(read_quantized(onnx.ModelProto.FromString(first)), target)
    assert second.SerializeToString(deterministic=True) == first


@NETWORKS
@SETTINGS
@pytest.mark.parametrize("target", KEEPING[1:])
def test_there_and_back_between_targets_is_byte_identical(
    solved: Any, network: str, bits: tuple[int, int], target: str
) -> None:
    first = solved(network, *bits).export("ort-x86").SerializeToString(deterministic=True)
    there = export_model(read_quantized(onnx.ModelProto.FromString(first)), target)
    back = export_model(read_quantized(there), "ort-x86")
    assert back.SerializeToString(deterministic=True) == first


def test_large_biases_survive_reading_back(net: Any, quantize: Any, images: Any) -> None:
    """Codes of more than 24 bits do not fit the float32 that they are read back into."""
    n = net()
    n.op("Relu", n.conv("input", "conv", 3, 256), "relu")
    n.constants["conv.weight"][:] *= np.logspace(0, -9, 256, dtype=np.float32).reshape(-1, 1, 1, 1)
    n.constants["conv.bias"][:] = np.random.default_rng(0).uniform(1, 9, 256).astype(np.float32)
    q = quantize(n.model(n.conv("relu", "out", 256, 2)), images(8))
    first = q.export()
    codes = numpy_helper.to_array(initializers(first)["conv.bias.codes"])
    assert codes.max() > 2**28
    second = export_model(read_quantized(first), "ort-x86")
    assert second.SerializeToString(deterministic=True) == first.SerializeToString(deterministic=True)


@TARGETS
def test_metadata(solved: Any, target: str) -> None:
    proto = solved("residual", 3, 8).export(target)
    metadata = {p.key: p.value for p in proto.metadata_props}
    assert (metadata["z.mean"], metadata["a.note"], metadata["efrapq.target"]) == ("0.5", "kept", target)
    assert json.loads(metadata["efrapq.bits"]) == {"c1": 8, "c2": 3, "c3": 3, "logits": 8}
    assert proto.producer_name == "efrapq"


def with_settings(quantized: QuantizedModel, record: str) -> QuantizedModel:
    return replace(quantized, metadata=quantized.metadata | {"efrapq.settings": record})


def test_the_record_of_settings_names_the_file_s_own_target(solved: Any) -> None:
    record = json.dumps({"bits": 4, "solver": "coordinate", "target": "ort-x86"}, sort_keys=True)
    first = export_model(with_settings(solved("residual", 4, 8).quantized, record), "ort-x86")
    portable = export_model(read_quantized(first), "portable")
    for proto, target in ((first, "ort-x86"), (portable, "portable")):
        metadata = {p.key: p.value for p in proto.metadata_props}
        expected = {"bits": 4, "solver": "coordinate", "target": target}
        assert json.loads(metadata["efrapq.settings"]) == expected
        assert metadata["efrapq.target"] == target
    back = export_model(read_quantized(portable), "ort-x86")
    assert back.SerializeToString(deterministic=True) == first.SerializeToString(deterministic=True)


@pytest.mark.parametrize(
    "record", ["", "{", "[1]", '"ort-x86"', "null", '{"bits": 4}', "[" * 100_000, '{ "target":"portable" }']
)
def test_a_record_of_settings_that_is_not_ours_is_kept(solved: Any, record: str) -> None:
    proto = export_model(with_settings(solved("residual", 4, 8).quantized, record), "portable")
    assert {p.key: p.value for p in proto.metadata_props}["efrapq.settings"] == record


def test_export_leaves_the_quantized_model_alone(solved: Any) -> None:
    q = solved("residual", 4, 8).quantized
    before = ir.to_proto(q.model).SerializeToString(deterministic=True)
    metadata = dict(q.metadata)
    for target in PROFILES:
        export_model(q, target)
    assert ir.to_proto(q.model).SerializeToString(deterministic=True) == before
    assert q.metadata == metadata


@pytest.mark.parametrize("name", ["/block.0/conv/Conv_output_0", "a b", "n:0", "ünï", "x.codes", "1"])
@TARGETS
def test_names_are_kept(net: Any, quantize: Any, images: Any, run_ort: Any, name: str, target: str) -> None:
    n = net(value=f"{name}/in")
    a = n.op("Relu", n.conv(f"{name}/in", f"{name}/c", 3, 4), name)
    b = n.op("GlobalAveragePool", n.conv(a, f"{name}/c2", 4, 4), f"{name}/gap")
    proto = n.model(n.op("Flatten", b, f"{name}/out"))
    q = quantize(proto, images(8))
    exported = q.export(target)
    assert [i.name for i in exported.graph.input] == [f"{name}/in"]
    assert [o.name for o in exported.graph.output] == [f"{name}/out"]
    assert {f"{name}/c", f"{name}/c2"} == set(q.solved.weights)
    onnx.checker.check_model(exported)
    run_ort(exported, images(2))
    assert read_quantized(exported).digest == q.quantized.digest


def test_names_that_the_exporter_would_take_itself(net: Any, quantize: Any, images: Any, run_ort: Any) -> None:
    """A file from outside may already use `x.codes`, `x.real` or `w.codes` for something else."""
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "x")
    b = n.op("Relu", n.conv(a, "c2", 4, 4), "x.codes")
    c = n.op("Relu", n.conv(b, "c3", 4, 4), "x.real")
    d = n.op("Relu", n.conv(c, "c4", 4, 4), "c2.weight.codes")
    q = quantize(n.model(n.gemm(n.op("Flatten", d, "c3.weight.int8"), "x.clipped", 256, 3)), images(8), act_bits=4)
    exported = q.export()
    onnx.checker.check_model(exported)
    run_ort(exported, images(2))
    assert read_quantized(exported).digest == q.quantized.digest


@TARGETS
@pytest.mark.parametrize("swapped", [False, True], ids=["node first", "weight first"])
def test_layers_that_would_go_by_one_name(
    net: Any, quantize: Any, images: Any, run_ort: Any, target: str, swapped: bool
) -> None:
    """A node called `x` with the weight `w`, and a weight called `x.weight`: both are `x` to the eye."""
    n = net()
    n.conv("input", "stem", 3, 4)
    for name in ("right", "left") if swapped else ("left", "right"):
        n.conv("stem", name, 4, 4)
        n.nodes[-1].input[1] = "w" if name == "left" else "x.weight"
        n.constants[n.nodes[-1].input[1]] = n.constants.pop(f"{name}.weight")
        n.nodes[-1].name = "x" if name == "left" else "other"
    n.op("Flatten", n.op("GlobalAveragePool", n.op("Sub", ["left", "right"], "joined"), "gap"), "flat")
    q = quantize(n.model(n.gemm("flat", "logits", 4, 3)), images(24), bits=8)
    assert set(q.solved.weights) == {"stem", "x", "w", "logits"}
    assert q.quantized.weights["x"].codes is not q.quantized.weights["w"].codes
    exported = q.export(target)
    back = read_quantized(onnx.ModelProto.FromString(exported.SerializeToString()))
    assert {x.name: x.weight for x in back.layers} == {x.name: x.weight for x in q.layers}
    for name in q.solved.weights:
        assert np.array_equal(back.weights[name].codes, q.solved.weights[name].codes)
    tensors = initializers(exported)
    for layer in q.layers:
        held = numpy_helper.to_array(tensors[f"{layer.weight}.codes"])
        assert np.array_equal(held, q.solved.weights[layer.name].codes)
    assert np.median(np.abs(run_ort(exported, images(24), optimized=False)[0] - q.output)) <= 1e-5
    again = export_model(back, target)
    assert again.SerializeToString(deterministic=True) == exported.SerializeToString(deterministic=True)


def test_a_file_that_has_a_constant_of_the_name_of_a_limit(net: Any, quantize: Any, images: Any, run_ort: Any) -> None:
    """The limits of clipped codes are the exporter's own constants, whatever else is called like them."""
    n = net()
    a = n.op("Relu", n.conv("input", "c1", 3, 4), "a1")
    b = n.op("Relu", n.conv(a, "c2", 4, 4), "a2")
    c = n.op("Mul", [n.conv(b, "c3", 4, 4), n.constant("efrapq.level_15", np.array(2, np.float32))], "scaled")
    n.constant("efrapq.level_0", np.array(1, np.float32))
    n.op("Add", [c, "efrapq.level_0"], "shifted")
    q = quantize(n.model(n.conv("shifted", "out", 4, 2)), images(8), act_bits=4)
    exported = q.export()
    assert "Clip" in {node.op_type for node in exported.graph.node}
    onnx.checker.check_model(exported, full_check=True)
    assert np.median(np.abs(run_ort(exported, images(8), optimized=False)[0] - q.output)) <= 1e-5
    back = read_quantized(exported)
    assert (back.digest, back.activations) == (q.quantized.digest, q.quantized.activations)
    assert export_model(back, "ort-x86").SerializeToString(deterministic=True) == exported.SerializeToString(
        deterministic=True
    )


@TARGETS
def test_names_with_a_fixed_batch(residual_net: Any, quantize: Any, images: Any, run_ort: Any, target: str) -> None:
    proto = residual_net()
    proto.graph.input[0].type.tensor_type.shape.dim[0].dim_value = 4
    proto.graph.output[0].type.tensor_type.shape.dim[0].dim_value = 4
    exported = quantize(proto, images(8)).export(target)
    assert run_ort(exported, images(4))[0].shape == (4, 5)


# Operator sets.


@pytest.mark.parametrize("source", [13, 17, 18, 20, 21])
@pytest.mark.parametrize("bits", [4, 8])
def test_any_source_opset(residual_net: Any, quantize: Any, images: Any, run_ort: Any, source: int, bits: int) -> None:
    q = quantize(residual_net(opset=source), images(8), bits=bits)
    proto = q.export()
    onnx.checker.check_model(proto, full_check=True)
    assert opset(proto) == (21 if bits == 4 else 17)
    assert np.median(np.abs(run_ort(proto, images(8))[0] - q.output)) <= 1e-5


def test_operators_whose_meaning_changed_are_converted(
    make_model: Any, quantize: Any, images: Any, run_ort: Any, net: Any
) -> None:
    """Split without sizes means equal parts in opset 13; opset 18 wants the number of parts as an attribute."""
    n = net(channels=4)
    n.conv("input", "c1", 4, 4)
    n.nodes.append(helper.make_node("Split", ["c1"], ["left", "right"], name="split", axis=1))
    n.op("Mul", ["left", "right"], "product")
    proto = n.model(n.conv("product", "out", 2, 2))
    q = quantize(proto, images(8, 4), bits=4)
    exported = q.export()
    onnx.checker.check_model(exported, full_check=True)
    assert np.median(np.abs(run_ort(exported, images(8, 4))[0] - q.output)) <= 1e-3


def test_a_newer_operator_keeps_its_opset(net: Any, quantize: Any, images: Any, run_ort: Any) -> None:
    n = net(channels=4)
    n.conv("input", "c1", 4, 4)
    m = n.op("ReduceMax", ["c1", n.constant("axes", np.array([2, 3]))], "peak", keepdims=0)
    q = quantize(n.model(n.gemm(m, "out", 4, 2), opset=18), images(8, 4), bits=8)
    exported = q.export()
    assert opset(exported) == 18
    run_ort(exported, images(2, 4))


# The table of targets.


def test_unknown_targets_are_named() -> None:
    with pytest.raises(UsageError, match=r"'tpu'.*ort-x86.*portable"):
        profile("tpu")
    for name in PROFILES:
        assert profile(name).name == name
        with pytest.raises(UsageError, match=re.escape(PROFILES[name].summary)):
            profile("tpu")


def test_an_unknown_target_cannot_drive_the_terminal() -> None:
    with pytest.raises(UsageError) as caught:
        profile("\x1b[2J\n")
    assert str(caught.value).isprintable()


@pytest.mark.parametrize(
    ("machine", "vnni", "target"),
    [
        ("x86_64", True, "ort-x86"),
        ("AMD64", None, "ort-x86"),
        ("x86_64", False, "ort-avx2"),
        ("aarch64", None, "ort-arm"),
        ("arm64", None, "ort-arm"),
        ("ARM64", None, "ort-arm"),
        ("armv7l", None, "ort-arm"),
        ("riscv64", None, "portable"),
        ("", None, "portable"),
    ],
)
def test_native_target(machine: str, vnni: bool | None, target: str) -> None:
    assert native_target(machine, vnni) == target


def test_element_types_are_those_of_the_container(solved: Any) -> None:
    """Three-bit weights travel in int4, their width in the metadata."""
    proto = solved("residual", 3, 8).export("portable")
    assert initializers(proto)["c2.weight.codes"].data_type == TensorProto.INT4
    codes = numpy_helper.to_array(initializers(proto)["c2.weight.codes"])
    assert codes.dtype == ml_dtypes.int4
    assert int(np.abs(codes.astype(np.int8)).max()) == 3
    assert read_quantized(proto).weights["c2"].bits == 3
