"""The linter: each rule of each target has a file that breaks it, and the file says what to look for."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np
import onnx
import pytest
from numpy.typing import NDArray
from onnx import TensorProto, helper, numpy_helper

from efrapq.errors import UnsupportedModelError, UsageError
from efrapq.exporters import PROFILES, lint, rules, targets
from efrapq.exporters.profile import Profile
from efrapq.exporters.rules import Rule
from efrapq.retarget import export_all

F32 = np.float32
Edit = Callable[[dict[str, Any]], None]


def model(
    *,
    activation: Any = np.uint8,
    zero_point: int = 100,
    x_scales: int = 1,
    weight: Any = np.int8,
    weight_zero: int = 0,
    axis: int = 0,
    cast: bool = False,
    clip: bool = False,
    bias: str = "int32",
    bias_factor: float = 1.0,
    quantized_input: bool = True,
    quantized_output: bool = True,
    op: str = "Conv",
    batch: int | str = 1,
    computed_scale: bool = False,
    scale: float = 0.05,
    block: bool = False,
    control: str = "",
    code: int | None = None,
) -> onnx.ModelProto:
    """x → Q → [Clip] → DQ → Conv, ConvTranspose, Gemm or MatMul → Relu → [Q → DQ] → y: one layer, to be spoilt."""
    rng = np.random.default_rng(0)
    shape: tuple[int, ...] = (4, 4, 3, 3) if op.startswith("Conv") else (4, 4)
    nodes: list[onnx.NodeProto] = []
    constants: dict[str, NDArray[Any]] = {
        "s": np.full(x_scales, scale, F32) if x_scales > 1 else np.array(scale, F32),
        "z": np.full(x_scales, zero_point).astype(activation)
        if x_scales > 1
        else np.array(zero_point).astype(activation),
        "low": np.array(0).astype(activation),
        "high": np.array(15).astype(activation),
        "w.codes": (rng.integers(1, 8, shape) if code is None else np.full(shape, code)).astype(weight),
        "w.scale": np.linspace(0.01, 0.02, 4, dtype=F32),
        "w.zero": np.full(4, weight_zero).astype(np.int8 if cast else weight),
    }

    def pair(source: str, clipped: bool = False) -> str:
        nodes.append(helper.make_node("QuantizeLinear", [source, "s", "z"], [f"{source}.q"], name=f"q_{source}"))
        codes = f"{source}.q"
        if clipped:
            nodes.append(helper.make_node("Clip", [codes, "low", "high"], [f"{source}.c"], name=f"clip_{source}"))
            codes = f"{source}.c"
        nodes.append(helper.make_node("DequantizeLinear", [codes, "s", "z"], [f"{source}.r"], name=f"dq_{source}"))
        return f"{source}.r"

    if computed_scale:
        nodes.append(helper.make_node("Mul", ["s0", "two"], ["s"], name="scale"))
        constants |= {"s0": constants.pop("s"), "two": np.array(2, F32)}
    data = pair("x", clip) if quantized_input else "x"
    codes = "w.codes"
    if cast:
        nodes.append(helper.make_node("Cast", [codes], ["w.int8"], name="cast", to=TensorProto.INT8))
        codes = "w.int8"
    attributes: dict[str, int] = {"axis": axis}
    if block:
        constants["w.scale"], constants["w.zero"] = np.full((2, 4), 0.01, F32), np.zeros((2, 4), weight)
        attributes |= {"block_size": 2}
    dequantize = helper.make_node("DequantizeLinear", [codes, "w.scale", "w.zero"], ["w"], name="dq_w", **attributes)
    nodes.append(dequantize)
    sources = [data, "w"]
    if bias == "int32" and op != "MatMul":
        constants["b.codes"] = np.arange(4, dtype=np.int32)
        constants["b.scale"] = np.linspace(0.01, 0.02, 4, dtype=F32) * F32(scale * bias_factor)
        nodes.append(helper.make_node("DequantizeLinear", ["b.codes", "b.scale"], ["b"], name="dq_b", axis=0))
        sources.append("b")
    elif bias == "float" and op != "MatMul":
        constants["b"] = np.zeros(4, F32)
        sources.append("b")
    nodes.append(helper.make_node(op, sources, ["y0"], name="layer"))
    nodes.append(helper.make_node("Relu", ["y0"], ["y1"], name="relu"))
    nodes.append(helper.make_node("Identity", [pair("y1") if quantized_output else "y1"], ["y"], name="end"))
    if control:
        nodes.append(control_flow(control))
        constants["condition"] = np.array(True)
    used = {name for node in nodes for name in node.input}
    size = [batch, 4, 6, 6] if op.startswith("Conv") else [batch, 4]
    graph = helper.make_graph(
        nodes,
        "net",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, size)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(a, n) for n, a in constants.items() if n in used or n == "condition"],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def control_flow(op: str) -> onnx.NodeProto:
    body = helper.make_graph(
        [helper.make_node("Constant", [], ["c"], value_float=1.0)],
        "body",
        [],
        [helper.make_tensor_value_info("c", TensorProto.FLOAT, [])],
    )
    assert op == "If"
    return helper.make_node("If", ["condition"], ["branch"], name="branch", then_branch=body, else_branch=body)


TENSORRT: dict[str, Any] = {"activation": np.int8, "zero_point": 0, "bias": "float"}
INT4: dict[str, Any] = {"weight": ml_dtypes.int4}
GOOD: dict[str, list[dict[str, Any]]] = {
    "ort-x86": [{}, INT4 | {"cast": True}, {"clip": True}, {"bias": "float"}],
    "ort-avx2": [
        {},
        {"code": 64},
        {"code": 127, "clip": True},
        {"code": 127, "quantized_input": False, "bias": "float"},
        {"code": 127, "op": "ConvTranspose", "axis": 1},
        {"code": 255, "weight": np.uint8, "weight_zero": 128},
        INT4 | {"cast": True},
    ],
    "ort-arm": [{"activation": np.int8}, INT4 | {"activation": np.int8, "cast": True}],
    "openvino": [{}, {"activation": np.int8}, INT4 | {"cast": True}],
    "tensorrt": [
        TENSORRT,
        TENSORRT | {"op": "ConvTranspose", "axis": 1},
        TENSORRT | {"op": "Gemm", "axis": 1},
        TENSORRT | INT4 | {"op": "MatMul", "axis": 1, "quantized_input": False},
    ],
    "qnn": [{}, {"activation": np.int8}, INT4 | {"op": "MatMul", "axis": 1}, {"op": "ConvTranspose", "axis": 1}],
    "portable": [{}, INT4, INT4 | {"activation": ml_dtypes.uint4, "zero_point": 7}],
}
# target → name → (what is spoilt, the check that says so, the node it names, words of the detail)
BROKEN: dict[str, dict[str, tuple[dict[str, Any], str, str, str]]] = {
    "ort-x86": {
        "int8 activations": ({"activation": np.int8}, "activations_typed", "q_x", "int8, not uint8"),
        "uint4 activations": (
            {"activation": ml_dtypes.uint4, "zero_point": 7},
            "activations_typed",
            "q_x",
            "uint4, not uint8",
        ),
        "int4 without a Cast": (INT4, "int4_through_cast", "layer", "without a Cast"),
        "unsigned weights": ({"weight": np.uint8}, "weights_signed", "layer", "uint8"),
        "a weight with a zero point": ({"weight_zero": 3}, "weights_signed", "layer", "zero point"),
        "an activation with two scales": ({"x_scales": 4}, "activations_per_tensor", "q_x", "4 scales"),
        "a scale of zero": ({"scale": 0.0}, "scales_positive", "q_x", "not positive"),
        "a scale that is computed": ({"computed_scale": True}, "scales_positive", "q_x", "at run time"),
    },
    "ort-avx2": {
        "int8 activations": ({"activation": np.int8}, "activations_typed", "q_x", "int8, not uint8"),
        "int4 without a Cast": (INT4, "int4_through_cast", "layer", "without a Cast"),
        "pairs that leave int16": ({"code": 65}, "pairs_within_int16", "layer", "can reach 33,150"),
        "unsigned weights around 0": ({"weight": np.uint8}, "weights_symmetric", "layer", "other than 128"),
        "signed weights around 3": ({"weight_zero": 3}, "weights_symmetric", "layer", "other than 0"),
        "uint4 weights": ({"weight": ml_dtypes.uint4}, "weights_symmetric", "layer", "uint4, not int8"),
    },
    "ort-arm": {
        "uint8 activations": ({}, "activations_typed", "q_x", "uint8, not int8"),
        "int4 without a Cast": (INT4 | {"activation": np.int8}, "int4_through_cast", "layer", "Cast"),
    },
    "openvino": {
        "uint4 activations": (
            {"activation": ml_dtypes.uint4, "zero_point": 7},
            "activations_typed",
            "q_x",
            "uint4, not uint8 or int8",
        ),
        "a Clip of codes": ({"clip": True}, "codes_untouched", "dq_x", "a Clip stands"),
        "int4 without a Cast": (INT4, "int4_through_cast", "layer", "Cast"),
    },
    "tensorrt": {
        "uint8 activations": (TENSORRT | {"activation": np.uint8}, "activations_typed", "q_x", "uint8, not int8"),
        "a zero point": (TENSORRT | {"zero_point": -3}, "zero_points_zero", "q_x", "is -3, not 0"),
        "an int32 bias": (TENSORRT | {"bias": "int32"}, "biases_float", "dq_b", "int32"),
        "a Conv along axis 1": (TENSORRT | {"axis": 1}, "weights_per_output_channel", "layer", "axis 1, not 0"),
        "a ConvTranspose along axis 0": (
            TENSORRT | {"op": "ConvTranspose", "axis": 0},
            "weights_per_output_channel",
            "layer",
            "axis 0, not 1",
        ),
        "scales by block": (
            TENSORRT | {"op": "MatMul", "block": True},
            "weights_per_output_channel",
            "layer",
            "block",
        ),
        "an int4 convolution": (
            TENSORRT | INT4 | {"quantized_input": False},
            "int4_only_in",
            "layer",
            "of Conv, not of Gemm or MatMul",
        ),
        "int4 beside a quantized input": (
            TENSORRT | INT4 | {"op": "MatMul", "axis": 1},
            "int4_only_in",
            "layer",
            "quantized input",
        ),
        "an int4 activation": (
            TENSORRT | {"activation": ml_dtypes.int4},
            "int4_only_in",
            "q_x",
            "an activation has 4-bit codes",
        ),
        "a Clip of codes": (TENSORRT | {"clip": True}, "codes_untouched", "dq_x", "a Clip stands"),
        "a scale of zero": (TENSORRT | {"scale": 0.0}, "scales_positive", "q_x", "not positive"),
        "unsigned weights": (TENSORRT | {"weight": np.uint8}, "weights_signed", "layer", "uint8"),
        "an activation with four scales": (TENSORRT | {"x_scales": 4}, "activations_per_tensor", "q_x", "4 scales"),
    },
    "qnn": {
        "a dynamic batch": ({"batch": "N"}, "shapes_fixed", "x", "N×4×6×6"),
        "control flow": ({"control": "If"}, "no_control_flow", "branch", "If"),
        "a float bias": ({"bias": "float"}, "biases_int32", "layer", "bias is float"),
        "a bias on another scale": ({"bias_factor": 2.0}, "biases_int32", "layer", "not the product"),
        "an int4 convolution": (INT4, "int4_only_in", "layer", "of Conv"),
        "int4 with a float input": (
            INT4 | {"op": "MatMul", "axis": 1, "quantized_input": False},
            "int4_only_in",
            "layer",
            "float input",
        ),
        "int4 with a float output": (
            INT4 | {"op": "MatMul", "axis": 1, "quantized_output": False},
            "int4_only_in",
            "layer",
            "float output",
        ),
        "a Clip of codes": ({"clip": True}, "codes_untouched", "dq_x", "a Clip stands"),
        "uint4 activations": (
            {"activation": ml_dtypes.uint4, "zero_point": 7},
            "activations_typed",
            "q_x",
            "uint4",
        ),
        "a Conv along axis 1": ({"axis": 1}, "weights_per_output_channel", "layer", "axis 1, not 0"),
        "a weight with a zero point": ({"weight_zero": 1}, "weights_signed", "layer", "zero point"),
        "an activation with four scales": ({"x_scales": 4}, "activations_per_tensor", "q_x", "4 scales"),
        "a scale that is computed": ({"computed_scale": True}, "scales_positive", "q_x", "at run time"),
    },
    "portable": {
        "int8 activations": ({"activation": np.int8}, "activations_typed", "q_x", "int8"),
        "a scale of zero": ({"scale": 0.0}, "scales_positive", "q_x", "not positive"),
        "unsigned weights": ({"weight": np.uint8}, "weights_signed", "layer", "uint8"),
    },
}


def check_of(rule: Rule) -> str:
    """The name under which `rules` has the rule's check, or makes it."""
    return rule.check.__qualname__.split(".")[0]


@pytest.mark.parametrize(
    ("target", "change"), [(t, change) for t, changes in GOOD.items() for change in changes], ids=str
)
def test_a_file_that_keeps_the_rules_passes(target: str, change: dict[str, Any]) -> None:
    proto = model(**change)
    assert lint(proto, target) == []


@pytest.mark.parametrize(("target", "name"), [(t, name) for t, cases in BROKEN.items() for name in cases], ids=str)
def test_a_broken_rule_is_named(target: str, name: str) -> None:
    change, check, node, words = BROKEN[target][name]
    found = lint(model(**change), target)
    broken = {rule.words for rule in PROFILES[target].rules if check_of(rule) == check}
    hits = [v for v in found if v.rule in broken and v.node == node]
    assert hits, [str(v) for v in found]
    assert any(words in v.detail for v in hits), [v.detail for v in hits]
    for violation in found:
        assert violation.rule in str(violation)
        assert violation.source in str(violation)
        assert violation.node in str(violation)


@pytest.mark.parametrize("target", PROFILES)
def test_every_rule_that_is_a_target_s_own_has_a_file_that_breaks_it(target: str) -> None:
    """Of the rules that all share (positive scales, symmetric weights) one target's file is enough."""
    tried = {check for _, check, _, _ in BROKEN[target].values()}
    shared = {"scales_positive", "weights_signed", "activations_per_tensor"}
    assert {check_of(rule) for rule in PROFILES[target].rules} - tried <= shared
    assert shared <= {check for cases in BROKEN.values() for _, check, _, _ in cases.values()}


def test_every_check_is_some_target_s_rule() -> None:
    used = {check_of(rule) for profile in PROFILES.values() for rule in profile.rules}
    assert used == set(rules.__all__) - {"Finding", "Graph", "Rule"}


@pytest.mark.parametrize("target", PROFILES)
def test_rules_are_sentences_with_a_source(target: str) -> None:
    stated = PROFILES[target].rules
    assert len({rule.words for rule in stated}) == len(stated)
    for rule in stated:
        assert rule.words[0].isupper() or rule.words[0].isdigit()
        assert not rule.words.endswith(".")
        assert rule.source.startswith(("https://", "measured"))


def test_a_float_model_breaks_no_rule_but_that_of_shapes(residual_net: Callable[..., onnx.ModelProto]) -> None:
    for target in PROFILES:
        assert {v.node for v in lint(residual_net(), target)} == ({"input"} if target == "qnn" else set())


def test_linting_does_not_modify_the_file() -> None:
    proto = model()
    before = proto.SerializeToString(deterministic=True)
    for target in PROFILES:
        lint(proto, target)
    assert proto.SerializeToString(deterministic=True) == before


def test_an_unknown_target_is_a_usage_error() -> None:
    with pytest.raises(UsageError, match="unknown target"):
        lint(model(), "tpu")


def test_names_out_of_the_file_cannot_drive_the_terminal() -> None:
    proto = model(activation=np.int8)
    for node in proto.graph.node:
        if node.name == "q_x":
            node.name = "\x1b[2J\n"
    assert all(str(v).isprintable() for v in lint(proto, "ort-x86"))


def test_export_writes_nothing_that_its_linter_rejects(
    quantize: Any, residual_net: Any, images: Any, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Neither that file nor any other of the same command."""
    source = tmp_path / "model.onnx"
    source.write_bytes(quantize(residual_net(), images(8)).export().SerializeToString())
    strict = Profile("strict", "takes nothing", rules=(Rule("No convolutions", "measured", no_convolutions),))
    monkeypatch.setitem(targets.PROFILES, "strict", strict)
    outputs = {"portable": tmp_path / "portable.onnx", "strict": tmp_path / "strict.onnx"}
    with pytest.raises(UnsupportedModelError, match=r"strict would not take .*No convolutions.*\(and 2 more\)"):
        export_all(source, outputs)
    assert not any(path.exists() for path in outputs.values())


def no_convolutions(graph: rules.Graph) -> Any:
    for node in graph.nodes:
        if node.op_type == "Conv":
            yield node.name, "is a convolution"
